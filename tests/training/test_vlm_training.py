"""Vision-language models in the one engine: losses at the start, resuming, exports, references."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import losses, run_config, write_answer_pairs
from tiny_vlms import build_llava_onevision, build_qwen2_vl, build_smolvlm, tie

from mmalign.config.run import RunConfig
from mmalign.core.errors import UserError
from mmalign.training.checkpoint import list_checkpoints, load_checkpoint
from mmalign.training.output import is_finished
from mmalign.training.train import train
from pipelines import load_vlm

LN2 = math.log(2)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("world")
    return {
        "vlm": build_llava_onevision(folder / "vlm"),
        "pairs": write_answer_pairs(folder / "data", own_media=True),
    }


def config(world: dict[str, Any], output: Path, method: Any = "vlm_dpo", **changes: Any) -> RunConfig:
    return run_config(world["vlm"], world["pairs"], output, method, **changes)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("vlm_dpo", LN2),
        ({"name": "vlm_dpo", "anchor_weight": 1.0}, 2 * LN2),
        ("rrpo", LN2),
        ({"name": "vdpo", "selection": "random", "operators": ["black"]}, LN2),
        ("rdpo", 2 * LN2),
        ({"name": "rdpo", "unseen": "column", "anchor_weight": 1.0}, 3 * LN2),
    ],
)
def test_the_loss_starts_at_multiples_of_ln_2_and_falls(
    world: dict[str, Any], tmp_path: Path, method: Any, expected: float
) -> None:
    output = train(config(world, tmp_path, method, steps=2, batch_size=6, learning_rate=1e-2))
    found = losses(output)
    assert found[1] == pytest.approx(expected, abs=1e-6)
    assert found[2] < expected - 1e-3
    # Forward and backward of two or three answers a pair, and of the reference forward.
    name = method if isinstance(method, str) else method["name"]
    assert losses(output, "images_seen")[2] == 2 * 6 * 3 * (3 if name == "rdpo" else 2)


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("build", [build_llava_onevision, build_qwen2_vl, build_smolvlm])
def test_tied_embeddings_start_at_ln_2_in_bf16_too(
    world: dict[str, Any], tmp_path: Path, build: Callable[[Path], str], kind: str
) -> None:
    tied = tie(build(tmp_path / "untied"), tmp_path / "tied")
    adapter = {"kind": "lora", "rank": 2} if kind == "lora" else {"kind": "full"}
    shared = {"steps": 2, "adapter": adapter, "precision": "bf16", "ema": 0.5}
    output = train(config({**world, "vlm": tied}, tmp_path / "run", **shared))
    assert losses(output)[1] == pytest.approx(LN2, abs=1e-7)
    network = load_vlm(output, device="cpu").network  # that it gives the trained model's logits, `train` has checked
    assert network.get_output_embeddings().weight is network.get_input_embeddings().weight


def test_jsd_counts_what_it_looks_at(world: dict[str, Any], tmp_path: Path) -> None:
    options = {"name": "vdpo", "candidates": 2, "full_weight_at": 1e-6, "least_relevance": -1.0}
    output = train(config(world, tmp_path, options, steps=2))
    assert losses(output)[1] == pytest.approx(LN2, abs=1e-6)
    assert losses(output, "weight")[1] == 1.0
    # Six for the loss, and three looks (clean and two candidates) at each of two answers.
    assert losses(output, "images_seen")[2] == 2 * 2 * (6 + 3)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_stopped_run_goes_on_to_the_bit_and_the_export_loads_back(
    world: dict[str, Any], tmp_path: Path, kind: str
) -> None:
    adapter = {"kind": "lora", "rank": 2} if kind == "lora" else {"kind": "full"}
    shared = {"adapter": adapter, "precision": "bf16", "checkpoint_every": 2, "ema": 0.5}
    whole = train(config(world, tmp_path / "whole", steps=4, **shared))
    train(config(world, tmp_path / "parts", steps=2, **shared))
    parts = train(config(world, tmp_path / "parts", steps=4, **shared))
    for key in ("loss", "grad_norm", "policy_chosen"):
        assert losses(whole, key) == losses(parts, key)
    ends = [load_checkpoint(list_checkpoints(one / "checkpoints")[-1]).tensors["weights"] for one in (whole, parts)]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())

    assert is_finished(whole)
    model = load_vlm(whole, device="cpu")  # that it gives the trained model's logits, `train` has checked itself
    assert model.has_adapter == (kind == "lora")
    card = (whole / "README.md").read_text()
    assert "library_name: transformers" in card and "AutoModelForImageTextToText" in card
    assert ("load_adapter" in card) == (kind == "lora")
    with pytest.raises(UserError, match="another adapter.kind"):
        other = {"kind": "full"} if kind == "lora" else {"kind": "lora"}
        train(config(world, tmp_path / "whole", adapter=other))


@pytest.mark.parametrize(
    "options",
    [{"name": "vlm_dpo"}, {"name": "vlm_dpo", "length_normalised": True}, {"name": "rdpo"}],
    ids=["sums", "means", "three sides"],
)
def test_a_precomputed_reference_gives_the_losses_of_a_live_one(
    world: dict[str, Any], tmp_path: Path, options: dict[str, Any]
) -> None:
    changes: dict[str, Any] = {"adapter": {"kind": "full"}, "steps": 3, "data": {"cache": str(tmp_path / "cache")}}
    live = train(config(world, tmp_path / "live", {**options, "beta": 0.5}, **changes))
    given = {**options, "beta": 0.5, "reference": "precomputed"}
    stored = train(config(world, tmp_path / "stored", given, **changes))
    assert losses(stored) == pytest.approx(losses(live), abs=5e-6)
    # The policy alone: forward and backward of every side.
    assert losses(stored, "images_seen")[3] == 3 * 2 * 2 * (3 if options["name"] == "rdpo" else 2)
    (shard,) = (tmp_path / "cache" / "references").rglob("*.safetensors")
    made = shard.stat().st_mtime_ns
    changes["steps"] = 1
    train(config(world, tmp_path / "again", given, **changes))
    (shard,) = (tmp_path / "cache" / "references").rglob("*.safetensors")
    assert shard.stat().st_mtime_ns == made  # found, not computed again


@pytest.mark.parametrize("options", [{"name": "rdpo"}, {"name": "vlm_dpo", "reference": "precomputed"}])
def test_a_bad_video_ends_no_run_that_leaves_it_out(
    world: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, Any]
) -> None:
    pairs = write_answer_pairs(tmp_path / "data")
    (tmp_path / "data" / "2.mkv").write_bytes(b"no video")
    given = {**world, "pairs": pairs}
    with pytest.raises(UserError, match=r"answers.jsonl: row 2, pair 'pair-2': unreadable video .*; data.on_bad=skip"):
        train(config(given, tmp_path / "run", options, steps=4))
    capsys.readouterr()
    # The same run goes on, the checkpoints of before it included.
    output = train(config(given, tmp_path / "run", options, steps=4, data={"on_bad": "skip"}))
    assert sorted(losses(output)) == [1, 2, 3, 4] and all(map(math.isfinite, losses(output).values()))
    assert capsys.readouterr().err.count("left out: ") == 1


def test_training_starts_from_an_adapter_which_is_the_reference(world: dict[str, Any], tmp_path: Path) -> None:
    first = train(config(world, tmp_path / "first", steps=2))
    second = train(config(world, tmp_path / "second", steps=2, adapter={"start": str(first)}, precision="bf16"))
    assert losses(second)[1] == pytest.approx(LN2, abs=1e-6) and load_vlm(second, device="cpu").has_adapter
