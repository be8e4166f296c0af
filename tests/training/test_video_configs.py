"""Every shipped recipe for a video model passes `--dry-run` on a tiny model of its class; new files are found."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_motion import build_tiny_animatediff, build_tiny_cogvideox
from tiny_videos import build_tiny_ltx, build_tiny_wan, write_clip

from mmalign.cli import main
from mmalign.config.run import load_config
from mmalign.config.yaml import list_configs
from mmalign.core.io.images import encode_png

BUILDERS: dict[str, Callable[[Path], str]] = {
    "wan": build_tiny_wan,
    "cogvideox": build_tiny_cogvideox,
    "ltx": build_tiny_ltx,
    "animatediff": build_tiny_animatediff,
}
VARIANTS: dict[str, Callable[[Path], str]] = {
    "wan/diffusion_dpo_a14b": lambda path: build_tiny_wan(path, experts=True),
    "wan/diffusion_dpo_a14b_i2v": lambda path: build_tiny_wan(path, experts=True, from_image=True),
    "cogvideox/diffusion_dpo_i2v": lambda path: build_tiny_cogvideox(path, from_image=True),
}
"""What configs train that is not the family's first model."""
TINY = {"wan": (5, 16), "cogvideox": (9, 16), "ltx": (9, 32), "animatediff": (5, 16)}
"""Frames and side of the videos of the tiny models."""
STEPS = {"wan": (4, 16), "cogvideox": (8, 16), "ltx": (8, 32), "animatediff": (1, 8)}
"""Of the published models: frames are a multiple of the first and one more, sides multiples of the second."""
NAMES = [name for name in list_configs() if name.split("/")[0] in BUILDERS]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {name: build(folder / name) for name, build in (BUILDERS | VARIANTS).items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pairs of clips, as a table with labelled segments and as VideoAlign's CSV."""
    made = tmp_path_factory.mktemp("clips")
    (made / "first.png").write_bytes(encode_png(torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))))
    part = [{"start": 0, "end": 0.5, "label": "chosen"}, {"start": 0.5, "end": 2, "label": "rejected"}]
    pairs, labels = [], []
    for index in range(2):
        better, worse = f"{index}-w.mp4", f"{index}-l.mp4"
        write_clip(made / better, level=150, seed=index)
        write_clip(made / worse, seed=10 + index)
        pair = {"prompt": f"{index} cats", "chosen": better, "rejected": worse, "first_frame": "first.png"}
        pairs.append(json.dumps({**pair, "segments": part}))
        votes = dict.fromkeys(("VQ", "MQ", "TA", "Overall"), "A")
        rate = {"fps_A": 8, "num_frames_A": 9, "fps_B": 8, "num_frames_B": 9}
        labels.append({"path_A": better, "path_B": worse, "prompt": f"{index} cats", **votes, **rate})
    (made / "pairs.jsonl").write_text("\n".join(pairs))
    (made / "real.jsonl").write_text('{"video": "0-w.mp4", "caption": "a cat", "label": "good"}\n')
    (made / "critic.yaml").write_text("rewards: [{name: tiny_runs:Motion, label: critic, options: {batch_size: 2}}]\n")
    with (made / "videoalign.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, labels[0])
        writer.writeheader()
        writer.writerows(labels)
    return made


def test_every_family_has_recipes_and_the_guide_lists_them() -> None:
    assert {name.split("/")[0] for name in NAMES} == set(BUILDERS)
    guide = (Path(__file__).parents[2] / "docs" / "guides" / "video.md").read_text(encoding="utf-8")
    assert [name for name in NAMES if f"| `{name}` |" not in guide] == []


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=[pytest.mark.slow] * (not (name.endswith(("/diffusion_dpo", "_rounds")) or name in VARIANTS)),
        )
        for name in NAMES
    ],
)
def test_a_recipe_fits_its_model(models: dict[str, str], folder: Path, tmp_path: Path, name: str) -> None:
    config, family = load_config(name), name.split("/")[0]
    assert config.video is not None and config.video.frames and config.video.height and config.video.width
    frames, side = STEPS[family]
    assert (config.video.frames - 1) % frames == config.video.height % side == config.video.width % side == 0
    prompts = tmp_path / "prompts.txt"
    step = config.trainer.batch_size * config.trainer.gradient_accumulation
    prompts.write_text("".join(f"{number} stars\n" for number in range(step)))
    pairs = folder / ("videoalign.csv" if config.data.axis else "pairs.jsonl")
    (tiny_frames, tiny_side), offline = TINY[family], config.data.pairs is not None
    given = [
        f"model={models[name if name in VARIANTS else family]}",
        f"data.{f'pairs={pairs}' if offline else f'prompts={prompts}'}",
    ]
    given += [f"data.cache={tmp_path / 'cache'}", f"output={tmp_path / 'out'}", "evaluate=null"]
    given += [f"video={{frames: {tiny_frames}, height: {tiny_side}, width: {tiny_side}, fps: 8}}"]
    given += ["trainer.precision=fp32"] + (["flow.text_length=32"] if family in ("wan", "ltx") else [])
    given += ["trainer.batch_size=1", "trainer.gradient_accumulation=1"] if offline else []
    if config.rounds:
        given = [f"rounds.prompts={prompts}", *(one for one in given if not one.startswith("data.prompts"))]
        given += [f"rounds.real={folder / 'real.jsonl'}", f"rounds.reward={folder / 'critic.yaml'}"]
        gone = ["rounds.trusted=tiny_runs:Brightness"]  # scores images, and rounds.frames is not given
        assert main(["train", name, *given, *gone, "--dry-run"]) == 2
    if config.rewards:
        sees = [f"{{name: tiny_runs:Brightness, frames: {one.frames}}}" for one in config.rewards if one.frames]
        given += [f"rewards=[{(sees or ['{name: tiny_runs:Motion}'])[0]}]"]
    assert main(["train", name, *given, "--dry-run"]) == 0
