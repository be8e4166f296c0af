"""The training of the video base: what it starts from, what it writes, and how it goes on after a stop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mmalign.cli import main
from mmalign.shapes.motion import train_base
from mmalign.shapes.motion.train_base import build_model, flow_loss, train_video_base
from mmalign.shapes.motion.world import FRAMES

FLOW = Path(__file__).resolve().parents[2] / "assets" / "shapes-flow"
PROMPT = "a red circle above a blue square"


def test_at_first_the_frames_are_those_of_the_image_model(tmp_path: Path) -> None:
    """Silent motion modules and known words: every frame is predicted as the image model predicts it."""
    from diffusers import StableDiffusionPipeline

    model = build_model(FLOW, tmp_path)
    image = StableDiffusionPipeline.from_pretrained(FLOW, torch_dtype=torch.float32)
    x, t = torch.randn(1, 4, FRAMES, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([600.0])
    with torch.inference_mode():
        texts = [
            tok([PROMPT], padding="max_length", return_tensors="pt").input_ids
            for tok in (model.tokenizer, image.tokenizer)
        ]
        ours, theirs = model.text_encoder(texts[0]).last_hidden_state, image.text_encoder(texts[1]).last_hidden_state
        length = len(PROMPT.split()) + 2
        assert torch.allclose(ours[:, :length], theirs[:, :length], atol=1e-5)
        frames = image.unet(x[0].transpose(0, 1), t.expand(FRAMES), theirs.expand(FRAMES, -1, -1)).sample
        clip = model.unet(x, t, theirs.repeat_interleave(FRAMES, 0)).sample
    assert torch.allclose(clip[0].transpose(0, 1), frames, atol=1e-4)
    assert all(len(model.tokenizer(word).input_ids) == 3 for word in ("leftwards", "vanishing", "slowly", "circle"))


def test_a_perfect_prediction_has_no_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """The target is noise - x0, and (noisy - x0) / level is just that; a prediction of nothing costs 2."""
    x0 = torch.randn(64, 4, FRAMES, 16, 16, generator=torch.Generator().manual_seed(1))

    class Knowing:
        def predict(self, noisy, timesteps, tokens):
            return (noisy - x0) / (timesteps / 1000).reshape(-1, 1, 1, 1, 1)

    class Silent:
        def predict(self, noisy, timesteps, tokens):
            return torch.zeros_like(noisy)

    def loss(model) -> float:
        return float(flow_loss(model, x0, torch.zeros(64, 3), torch.Generator().manual_seed(2)))

    assert loss(Knowing()) == pytest.approx(0.0, abs=1e-6) and loss(Silent()) == pytest.approx(2.0, abs=0.02)


def test_three_frames_keep_their_positions_in_time(tmp_path: Path) -> None:
    """A motion module on frames 1, 3 and 8 of a clip: attention over them alone, at positions 1, 3 and 8."""
    unet = build_model(FLOW, tmp_path).unet
    module = unet.mid_block.motion_modules[0].transformer_blocks[0].pos_embed
    x, before = torch.randn(2, FRAMES, module.pe.shape[2]), module.pe
    with train_base.at_frames(unet, [1, 3, 8]):
        some = module(x[:, [1, 3, 8]])
    assert torch.equal(some, module(x)[:, [1, 3, 8]]) and module.pe is before
    draws = [train_base.step_frames(np.random.default_rng(seed), whole=False) for seed in range(40)]
    assert all(a in (0, 1, 2) and b in (3, 4, 5) and c in (6, 7, 8) for a, b, c in draws)
    assert {frame for draw in draws for frame in draw} == set(range(FRAMES))


@pytest.mark.slow
def test_it_is_written_for_plain_diffusers_and_a_stop_changes_nothing(tmp_path: Path, monkeypatch) -> None:
    from diffusers import AnimateDiffPipeline

    options = {"start": FLOW, "clips": 6, "glimpses": 12, "videos": 4, "pictures": 18, "watched": 2}
    train_video_base(tmp_path / "whole", **options)
    monkeypatch.setattr(train_base, "SNAPSHOT_SECONDS", 0.0)  # a snapshot after every step

    class Stopped(Exception):
        pass

    def stop(line: str) -> None:
        if line.startswith("of 2 clips") and (tmp_path / "cut").exists():
            raise Stopped

    with pytest.raises(Stopped):
        train_video_base(tmp_path / "cut", log=stop, **options)
    lines: list[str] = []
    train_video_base(tmp_path / "cut", log=lines.append, **options)
    assert lines[0] == "going on at step 1"
    for part in ("unet", "motion_adapter"):
        whole, cut = (
            load_file(tmp_path / run / part / "diffusion_pytorch_model.safetensors") for run in ("whole", "cut")
        )
        assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)
    size = sum(file.stat().st_size for file in (tmp_path / "whole").rglob("*"))
    assert size < 25e6
    pipe = AnimateDiffPipeline.from_pretrained(tmp_path / "whole")
    pipe.set_progress_bar_config(disable=True)
    clip = pipe(
        PROMPT, num_frames=FRAMES, height=64, width=64, num_inference_steps=2, guidance_scale=2.0, output_type="pt"
    )
    assert clip.frames.shape == (1, FRAMES, 3, 64, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--video needs --start"),
        (["--start", "nowhere"], "--video needs --start"),
        (["--start", str(FLOW), "--clips", "0"], "--clips 0 and --videos 6000 must be at least 1"),
    ],
)
def test_the_command_tells_what_it_lacks(options: list[str], message: str, tmp_path: Path, capsys) -> None:
    assert main(["shapes", "train-base", "--video", "--out", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
