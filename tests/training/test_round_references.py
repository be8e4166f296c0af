"""What a round is compared with: the model that it starts from, the first model, or any other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_models import build_tiny_sd
from tiny_runs import BRIGHTNESS, losses, run_config, write_pairs

from mmalign.config.run import RunConfig, load_config
from mmalign.config.yaml import ConfigIssues
from mmalign.core.errors import UserError
from mmalign.methods.noising import noise_pairs
from mmalign.training.accelerator import make_accelerator
from mmalign.training.prepare import prepare
from mmalign.training.train import train
from pipelines import load_generator

KINDS = {"lora": {"kind": "lora", "rank": 4}, "full": {"kind": "full"}}
BOTH = pytest.mark.parametrize("kind", ["lora", pytest.param("full", marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_sd(tmp_path_factory.mktemp("references") / "sd", vae="tiny")


def rounds_config(model: str, folder: Path, kind: str, reference: str, **changes: Any) -> RunConfig:
    folder.mkdir(parents=True, exist_ok=True)
    prompts = folder / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n")
    rounds = {"count": 2, "prompts": str(prompts), "reward": BRIGHTNESS, "images_per_prompt": 2, "steps": 2}
    rounds |= {"guidance": 1.0, "reference": reference}
    given = {
        "steps": 2,
        "learning_rate": 1e-2,
        "adapter": KINDS[kind],
        "rounds": rounds,
        "data": {"pairs": None},
        **changes,
    }
    return run_config(model, prompts, folder / "out", **given)


def first_logit(config: RunConfig, policy: str, reference: str) -> float:
    """Return the mean logit of the first batch in float64, from two models that are read apart."""
    parts = prepare(config, make_accelerator(config))
    batch = next(parts.sampler.micro_batches(0))
    noised, errors = noise_pairs(parts.run, batch, parts.method.config), []
    for path in (policy, reference):
        generator = load_generator(path, device="cpu", dtype=torch.float64)
        cond = type(noised.cond)(noised.cond.prompt_embeds.double())
        with torch.no_grad():
            output = generator.predict(noised.x_t.double(), noised.t, cond)
        errors.append(((output - noised.target.double()) ** 2).mean((1, 2, 3)))
    gain = errors[1] - errors[0]
    half = len(gain) // 2
    return float(parts.method.config.beta / 2 * (gain[:half] - gain[half:]).mean())


@BOTH
def test_a_fixed_reference_is_the_first_model_and_a_moving_one_the_start(
    model: str, tmp_path: Path, kind: str
) -> None:
    moving = train(rounds_config(model, tmp_path / "moving", kind, "previous"))
    fixed = train(rounds_config(model, tmp_path / "fixed", kind, "base"))
    first = [output / "rounds" / "1" / "model" for output in (moving, fixed)]
    assert losses(first[0]) == losses(first[1])  # the first round is the same, to the bit
    assert losses(first[0], "logit")[1] == losses(moving, "logit")[1] == 0

    written = load_config(fixed / "config.yaml")
    assert written.reference == model and written.rounds is None
    assert (written.model, written.adapter.start) == (
        (model, str(first[1])) if kind == "lora" else (str(first[1]), None)
    )
    expected = first_logit(written, policy=str(first[1]), reference=model)
    assert abs(expected) > 1e-2
    assert losses(fixed, "logit")[1] == pytest.approx(expected, rel=2e-3, abs=5e-4)
    # The same call again finds everything finished.
    before = (fixed / "metrics.jsonl").stat().st_mtime_ns
    train(rounds_config(model, tmp_path / "fixed", kind, "base"))
    assert (fixed / "metrics.jsonl").stat().st_mtime_ns == before


@pytest.mark.slow
@BOTH
def test_any_model_of_the_family_may_be_the_reference(model: str, tmp_path: Path, kind: str) -> None:
    other = build_tiny_sd(tmp_path / "other", vae="tiny", seed=3)
    pairs = write_pairs(tmp_path / "pairs")
    config = run_config(model, pairs, tmp_path / "out", steps=1, adapter=KINDS[kind])
    config = config.model_copy(update={"reference": other})
    output = train(config)
    expected = first_logit(load_config(output / "config.yaml"), policy=model, reference=other)
    assert losses(output, "logit")[1] == pytest.approx(expected, rel=2e-3, abs=5e-4) and abs(expected) > 1e-2
    # Another reference is another run: a checkpoint of this one does not go on.
    with pytest.raises(UserError, match="reference"):
        train(config.model_copy(update={"reference": None, "trainer": config.trainer.model_copy(update={"steps": 2})}))


def test_references_that_do_not_fit_are_refused(model: str, tmp_path: Path) -> None:
    from tiny_videos import build_tiny_wan

    pairs = write_pairs(tmp_path / "pairs")
    config = run_config(model, pairs, tmp_path / "out")
    wan = build_tiny_wan(tmp_path / "wan")
    with pytest.raises(UserError, match=r"of the family 'wan', and model .* of 'sd'"):
        train(config.model_copy(update={"reference": wan}))
    other = tmp_path / "v-prediction"
    shutil.copytree(model, other)
    scheduler = other / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), "prediction_type": "v_prediction"}))
    with pytest.raises(
        UserError, match=r"in prediction \(v_prediction and epsilon\); choose a reference of the model"
    ):
        train(config.model_copy(update={"reference": str(other)}))
    unet = other / "unet" / "config.json"
    unet.write_text(json.dumps({**json.loads(unet.read_text()), "cross_attention_dim": 7}))
    with pytest.raises(UserError, match=r"in cross_attention_dim \(7 and "):
        train(config.model_copy(update={"reference": str(other)}))
    adapter = train(run_config(model, pairs, tmp_path / "adapter", steps=1))
    with pytest.raises(UserError, match="is an adapter; merge it first"):
        train(config.model_copy(update={"reference": str(adapter)}))
    following = rounds_config(model, tmp_path, "lora", "base").model_copy(
        update={"method": {"name": "diffusion_dpo", "reference_every": 1}}
    )
    with pytest.raises(UserError, match=r"rounds.reference: method 'diffusion_dpo' has, with these options, no"):
        train(following)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "mapo", "reference": "other"}, "reference: method 'mapo' has no reference; remove it"),
        ({"method": "mapo", "rounds": {"reference": "base"}}, "rounds.reference: method 'mapo' has no reference"),
        ({"reference": "other", "rounds": {}}, "reference: rounds have references of their own"),
        ({"rounds": {"frames": 2}}, "rounds.frames: is for image rewards on video models"),
        ({"rounds": {"trusted_drop": 0.1}}, "rounds: .*trusted_drop is for a trusted reward"),
        ({"rounds": {}, "data": {"axis": "VQ"}}, "data.axis: is for pairs of your own, and rounds make theirs"),
        ({"rounds": {}, "adapter": {"start": "some"}}, "adapter.start: would be added again to the model of each"),
        (
            {"method": {"name": "diffusion_dpo", "sft_weight": 0.1}, "data": {"rarity": 1.0}, "rounds": {"real": "a"}},
            "data.rarity: weighs pairs by their scores, and real samples have none",
        ),
    ],
)
def test_configs_that_contradict_themselves(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    base = {"model": "m", "output": "o", "method": "diffusion_dpo", "data": {}}
    if "rounds" in changes:
        changes["rounds"] = {"count": 2, "prompts": "shapes-train", "reward": "clip", **changes["rounds"]}
    else:
        base["data"] = {"pairs": "some.parquet"}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**base, **changes}))
    with pytest.raises(ConfigIssues, match=message):
        load_config(path)
