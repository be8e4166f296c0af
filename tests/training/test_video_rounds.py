"""Rounds of a video model: drawn, labelled, learned from, watched by a trusted reward, and resumed."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_models import build_tiny_sd
from tiny_runs import BRIGHTNESS, Motion, losses, run_config
from tiny_videos import GEOMETRY, build_tiny_wan, write_clip

from mmalign.compare.systems.facts import find_trained_on, read_system
from mmalign.config.run import RunConfig, dump_config, load_config
from mmalign.config.sections import DataConfig
from mmalign.core.errors import UserError
from mmalign.core.io.parquet import read_metadata
from mmalign.data.pairs import read_pairs
from mmalign.training.round_pairs import RoundData
from mmalign.training.train import train
from pipelines import VideoOptions, load_generator

MOTION = "tiny_runs:Motion"


class Stillness(Motion):
    """The opposite of motion."""

    name = "stillness"
    higher_is_better = False


class Choosing(Motion):
    """Says which of two videos moves more, in both orders, and about a score nothing."""

    name = "choosing"
    compares_pairs = True

    def score(self, media: Any, prompts: Any, references: Any) -> Any:
        raise AssertionError("videos are compared, not scored")

    def pairwise(self, first: Any, second: Any, *, prompts: Any = None, references: Any = None) -> Any:
        return (Motion.score(self, first, None, None) - Motion.score(self, second, None, None)).sign()


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_wan(tmp_path_factory.mktemp("wan") / "wan")


def rounds_config(
    wan: str, folder: Path, reward: str = MOTION, method: Any = "diffusion_dpo", **rounds: Any
) -> RunConfig:
    folder.mkdir(parents=True, exist_ok=True)
    prompts = folder / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n")
    given = {
        "count": 2,
        "prompts": str(prompts),
        "reward": reward,
        "images_per_prompt": 2,
        "steps": 2,
        "guidance": 1.0,
    }
    sections = {"rounds": {**given, **rounds}, "data": {"pairs": None}, "video": GEOMETRY, "flow": {"text_length": 32}}
    return run_config(wan, prompts, folder / "out", method, steps=2, **sections)


def test_two_rounds_of_videos_go_on_where_they_were_broken_off(wan: str, tmp_path: Path) -> None:
    whole = train(rounds_config(wan, tmp_path / "whole", trusted=MOTION))
    first, second = whole / "rounds" / "1", whole / "rounds" / "2"
    written = yaml.safe_load((whole / "config.yaml").read_text())
    assert (written["model"], written["data"]["pairs"]) == (str(first / "merged"), str(second / "pairs.parquet"))
    sampling = read_metadata(first / "pairs.parquet")["sampling"]
    assert sampling["video"] == "height 16, width 16, frames 5, fps 8"
    generator = load_generator(str(whole), device="cpu", video=VideoOptions(**GEOMETRY))
    assert generator.has_adapter and generator.modality == "video"
    agreed = json.loads((second / "agreement.json").read_text())
    assert (agreed["agreement"], agreed["scored"]) == (1.0, 2)  # of the labels' own reward

    # Broken off after the second round had drawn, and called again: it labels, measures and trains the same.
    expected, sampled = losses(whole), second / "samples" / "images.parquet"
    before = [path.stat().st_mtime_ns for path in (sampled, first / "model" / "metrics.jsonl")]
    for path in (second / "pairs.parquet", second / "agreement.json", *whole.iterdir()):
        if path.name != "rounds":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    train(rounds_config(wan, tmp_path / "whole", trusted=MOTION))
    assert [path.stat().st_mtime_ns for path in (sampled, first / "model" / "metrics.jsonl")] == before
    assert losses(whole) == expected and set(expected) == {1, 2}
    assert json.loads((second / "agreement.json").read_text()) == agreed


@pytest.mark.slow
def test_a_killed_process_goes_on(wan: str, tmp_path: Path) -> None:
    config = rounds_config(wan, tmp_path / "killed", reference="base")
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(config))
    process = subprocess.Popen([sys.executable, "-m", "mmalign", "train", str(path)])
    sign = tmp_path / "killed" / "out" / "rounds" / "1" / "model" / "metrics.jsonl"
    for _ in range(2400):
        if sign.is_file() or process.poll() is not None:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert subprocess.run([sys.executable, "-m", "mmalign", "train", str(path)], check=False).returncode == 0
    expected = train(rounds_config(wan, tmp_path / "whole", reference="base"))
    resumed = tmp_path / "killed" / "out"
    assert losses(resumed) == losses(expected) and losses(resumed, "logit")[1] != 0


@pytest.mark.slow
def test_rounds_end_where_the_trusted_reward_no_longer_agrees(
    wan: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mmalign.scoring import agreement

    shares = iter([agreement.Share(0.9, 100), agreement.Share(0.88, 100), agreement.Share(0.86, 100)])
    monkeypatch.setattr(agreement, "share_in_order", lambda *given, **named: next(shares))
    config = rounds_config(wan, tmp_path, count=3, trusted=MOTION)
    output = train(config)
    said = capsys.readouterr().err
    assert "orders 90.0 % (standard error 3.0) of 100 pairs" in said
    assert "stopped before the training of round 3: that is 4.0 points below round 1" in said
    assert "the output is the model of round 2" in said
    kept = output / "rounds" / "2" / "model"
    name = "pytorch_lora_weights.safetensors"
    assert (output / name).read_bytes() == (kept / name).read_bytes()
    assert not (output / "rounds" / "3" / "model").exists() and not (output / "checkpoints").exists()
    assert load_generator(str(output), device="cpu", video=VideoOptions(**GEOMETRY)).has_adapter
    assert [step for step, _ in read_system("out", str(output), 1.0).curves["loss"]] == [1, 2, 3, 4]
    assert train(config) == output  # measured already, and so is the end
    assert "the output is the model of round 2" in capsys.readouterr().err
    # Where more is allowed, the third round is trained in place of the copy, from its first step.
    assert config.rounds is not None
    train(config.model_copy(update={"rounds": config.rounds.model_copy(update={"trusted_drop": 0.04})}))
    assert load_config(output / "config.yaml").model == str(output / "rounds" / "2" / "merged")
    assert (output / name).read_bytes() != (kept / name).read_bytes()
    assert set(losses(output)) == {1, 2} and losses(output) != losses(kept)


def test_comparisons_and_frames_label_videos(wan: str, tmp_path: Path) -> None:
    """The three ways to label of the same samples; a trusted reward that says the opposite agrees with no pair."""
    name = f"{__name__}:Choosing"
    data = RoundData(
        rounds_config(wan, tmp_path, name, votes=True, images_per_prompt=3, trusted=f"{__name__}:Stillness")
    )
    samples = data.sample(wan, tmp_path / "1", 1)
    voted = data.label(samples, tmp_path / "1")
    table = read_pairs(str(voted), DataConfig())
    assert read_metadata(voted)["labelling"]["mode"] == "votes"
    assert table.margins() == [1.0, 1.0]  # the best of three wins both comparisons, the worst none
    assert data.agreement(voted, tmp_path / "1").value == 0.0

    scored = RoundData(rounds_config(wan, tmp_path, images_per_prompt=3)).label(samples, tmp_path / "2")
    own = read_pairs(str(scored), DataConfig())
    assert [(one.chosen, one.rejected) for one in own] == [(one.chosen, one.rejected) for one in table]

    framed = RoundData(rounds_config(wan, tmp_path, BRIGHTNESS, images_per_prompt=3, frames=2))
    pairs = framed.label(samples, tmp_path / "3")
    assert read_metadata(pairs)["frames"] == 2
    before = pairs.stat().st_mtime_ns
    assert framed.label(samples, tmp_path / "3").stat().st_mtime_ns == before
    for changed, said in (({"frames": 1}, "frames"), ({"images_per_prompt": 2, "frames": 2}, "samples")):
        other = RoundData(rounds_config(wan, tmp_path, BRIGHTNESS, **{"images_per_prompt": 3, **changed}))
        if said == "samples":
            samples = other.sample(wan, tmp_path / "4", 1)
        with pytest.raises(UserError, match=rf"made with other settings \(.*{said}.*--resume never"):
            other.label(samples, tmp_path / "3")
    with pytest.raises(UserError, match=r"rounds.reward: '.*Brightness' scores images.* give rounds.frames"):
        RoundData(rounds_config(wan, tmp_path, BRIGHTNESS))
    with pytest.raises(UserError, match=r"judges videos, and there are only images"):
        sd = build_tiny_sd(tmp_path / "sd")
        RoundData(rounds_config(sd, tmp_path).model_copy(update={"video": None}))


@pytest.mark.parametrize("method", [{"name": "diffusion_dpo", "sft_weight": 0.1}, {"name": "sft"}])
def test_real_videos_are_mixed_in(wan: str, tmp_path: Path, method: dict[str, Any]) -> None:
    folder = tmp_path / "real"
    clips = [write_clip(folder / f"{number}.mp4", seed=number) for number in range(2)]
    lines = [{"video": clip.name, "caption": "a real star", "label": "good"} for clip in clips]
    (folder / "real.jsonl").write_text("\n".join(map(json.dumps, lines)))
    critic = tmp_path / "critic.yaml"
    critic.write_text(f"rewards: [{{name: '{MOTION}', label: critic, options: {{batch_size: 2}}}}]")
    config = rounds_config(
        wan, tmp_path, str(critic), method, count=1, real=str(folder / "real.jsonl"), real_share=0.6
    )
    output = train(config)
    assert find_trained_on(str(output)) == ([MOTION], "")
    written = yaml.safe_load((output / "config.yaml").read_text())["data"]
    mixed = output / "rounds" / "1" / "mixed.parquet"
    assert written["pairs" if method["name"] == "diffusion_dpo" else "labels"] == str(mixed)
    if method["name"] == "diffusion_dpo":
        table = read_pairs(str(mixed), DataConfig())
        real = [one for one in table if one.id.startswith("real/")]
        assert len(table) == 5 and {one.chosen for one in real} == {clip.read_bytes() for clip in clips}
        assert all(one.chosen == one.rejected for one in real)
    assert set(losses(output)) == {1, 2}
    shutil.rmtree(output)
