"""Training a tiny Wan on pairs of MP4 files, by every kind of offline method, and on labelled segments."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import losses, run_config
from tiny_videos import GEOMETRY, build_tiny_wan, write_clip

from mmalign.core.errors import UserError
from mmalign.data.batches import PairBatch, Segments
from mmalign.methods import methods
from mmalign.methods.noising import noise_pairs
from mmalign.methods.reference import Reference
from mmalign.methods.run import Run
from mmalign.training.train import train
from pipelines import VideoOptions, load_generator
from pipelines.conditioning import Conditioning

METHODS: list[dict[str, Any]] = [
    {"name": "diffusion_dpo", "beta": 20.0, "timesteps": [0.0, 0.5]},
    {"name": "mapo"},
    {"name": "inpo", "beta": 20.0, "inversion_steps": 2},
    {"name": "sft"},
    {"name": "diffusion_kto"},
]


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_wan(tmp_path_factory.mktemp("wan") / "wan")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pairs of nine frames at eight a second, longer than the model's; the chosen ones are brighter."""
    folder = tmp_path_factory.mktemp("clips")
    part = {"start": 0, "end": 0.2, "label": "rejected"}, {"start": 0.2, "end": 1, "label": "chosen"}
    lines = []
    for index in range(4):
        sides = {"chosen": f"{index}-w.mp4", "rejected": f"{index}-l.mp4"}
        write_clip(folder / sides["chosen"], level=150, seed=index)
        write_clip(folder / sides["rejected"], seed=10 + index)
        more = {"segments": part, "weight": 2.0} if index == 0 else {}
        lines.append(json.dumps({"prompt": f"a {'red' if index % 2 else 'blue'} cat", **sides, **more}))
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    return folder / "pairs.jsonl"


def config(wan: str, clips: Path, output: Path, method: dict[str, Any], **changes: Any) -> Any:
    given = {"flow": {"text_length": 32}, "video": GEOMETRY, "steps": 2, "data": {}, **changes}
    return run_config(wan, clips, output, method, **given)


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(one, id=one["name"], marks=[pytest.mark.slow] * (number in (1, 2, 4)))
        for number, one in enumerate(METHODS)
    ],
)
def test_an_offline_method_trains_on_clips(
    wan: str, clips: Path, tmp_path: Path, method: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    output = train(config(wan, clips, tmp_path / "run", method))
    assert set(losses(tmp_path / "run")) == {1, 2}
    said = " ".join(capsys.readouterr().err.split())
    assert "takes no weights or segments" in said or method["name"] not in ("mapo", "inpo")
    trained = load_generator(str(output), device="cpu", video=VideoOptions(**GEOMETRY))
    assert any(bool(one.abs().max() > 0) for one in trained.trainable_parameters())


@pytest.mark.slow
def test_two_passes_learn_the_same_and_are_the_default(wan: str, clips: Path, tmp_path: Path) -> None:
    found = []
    for given in ({}, {"two_pass": False}):
        out = tmp_path / str(len(found))
        train(config(wan, clips, out, {**METHODS[0], **given}))
        found.append([losses(out, key)[step] for key in ("loss", "grad_norm") for step in (1, 2)])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_bad_clips_stop_a_run_or_are_counted(wan: str, clips: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    for source in clips.parent.glob("*.mp4"):
        (folder / source.name).parent.mkdir(exist_ok=True)
        (folder / source.name).write_bytes(source.read_bytes())
    (folder / "pairs.jsonl").write_text(clips.read_text())
    (folder / "1-l.mp4").write_bytes(b"not a video")
    method = {"name": "sft"}
    with pytest.raises(UserError, match=r"none of|pair '2'|cannot be used"):
        train(config(wan, folder / "pairs.jsonl", tmp_path / "a", {"name": "mapo"}))
    train(config(wan, folder / "pairs.jsonl", tmp_path / "b", method, data={"on_bad": "skip"}, steps=1))
    (folder / "1-w.mp4").unlink()
    with pytest.raises(UserError, match="1 of the 8 files that it names do not exist"):
        train(config(wan, folder / "pairs.jsonl", tmp_path / "c", {"name": "mapo"}))


def test_segments_and_weights_change_the_loss_as_the_formula_says(wan: str) -> None:
    generator = load_generator(wan, device="cpu", dtype=torch.float64, video=VideoOptions(**GEOMETRY))
    generator.add_adapter(2, seed=1)
    with torch.no_grad():
        for parameter in generator.trainable_parameters():
            parameter.add_(0.1)
    run = Run(generator, reference=Reference(generator, "adapter"))
    source, shape = torch.Generator().manual_seed(0), generator.latent_shape
    chosen, rejected = torch.randn(2, 2, *shape, generator=source)
    batch = PairBatch(chosen, rejected, Conditioning(torch.randn(2, 8, 24, generator=source)), ["a", "b"])
    method = methods.get("diffusion_dpo")(methods.get("diffusion_dpo").Config(beta=50.0))
    plain = method.loss(run, batch).loss
    whole = Segments(torch.tensor([[1.0, 0.0]] * 2), torch.full((2, 2, shape[1]), 1 / shape[1]))
    torch.testing.assert_close(method.loss(run, replace(batch, segments=whole)).loss, plain)
    heavy = replace(batch, weights=torch.tensor([2.0, 0.0]))
    one = PairBatch(chosen[:1], rejected[:1], batch.cond[:1], ["a"])
    torch.testing.assert_close(method.loss(run, heavy).loss, method.loss(run, one).loss, rtol=1e-5, atol=1e-6)
    # A latent frame is compared by itself: the loss with one segment a frame is that of each frame's own errors.
    frames = Segments(torch.tensor([[1.0, -1.0]] * 2), torch.eye(2).expand(2, 2, 2))
    z = _logits(run, method, batch)
    expected = torch.nn.functional.softplus(-z * torch.tensor([1.0, -1.0])).mean()
    torch.testing.assert_close(method.loss(run, replace(batch, segments=frames)).loss, expected, rtol=1e-5, atol=1e-6)


def _logits(run: Run, method: Any, batch: PairBatch) -> torch.Tensor:
    """Return beta / 2 times the difference of the gains of each latent frame, [pairs, frames]."""
    noised = noise_pairs(run, batch, method.config)
    with torch.no_grad():
        own, other = (
            (predict(noised.x_t, noised.t, noised.cond) - noised.target).square().mean(dim=(1, 3, 4))
            for predict in (run.predict, run.reference.predict)
        )
    gain = other - own
    return 25.0 * (gain[:2] - gain[2:])
