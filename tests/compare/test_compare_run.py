"""A whole comparison of two tiny pipelines: what it writes, what it uses again, and what the control does."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_models import build_tiny_sd

from mmalign.cli import main
from mmalign.compare.config import CompareConfig, make_compare_config
from mmalign.compare.images.guidance_control import mean_ranks
from mmalign.compare.images.store import ImageStore, Sampling, noise_seed
from mmalign.compare.run import compare
from mmalign.core.errors import UserError
from mmalign.data.building import generation as evaluation
from rewards import RewardError

REWARDS = '''
from rewards import Reward

class Brightness(Reward):
    """Mean of all pixels."""
    name = "brightness"
    seen = []

    def score(self, media, prompts, references):
        self.seen.extend(prompts or [None] * len(media))
        return media.mean(dim=(1, 2, 3))

class Redness(Reward):
    """Red minus the mean of green and blue."""
    name = "redness"
    higher_is_better = False

    def score(self, media, prompts, references):
        return media[:, 0].mean(dim=(1, 2)) - media[:, 1:].mean(dim=(1, 2, 3))

class Broken(Reward):
    """Not a number."""
    name = "broken"

    def score(self, media, prompts, references):
        return media.mean(dim=(1, 2, 3)) * float("nan")

class Similar(Reward):
    """Needs what compare has not."""
    name = "similar"
    needs = frozenset({"references"})

    def score(self, media, prompts, references):
        return media.mean(dim=(1, 2, 3))
'''
PROMPTS = [("a red circle", "colors"), ("<script>alert(1)</script>", "conflicting"), ("two blue stars", "counting")]


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with two models, test and validation prompts, and a module of rewards that can be imported."""
    folder = tmp_path_factory.mktemp("compare")
    build_tiny_sd(folder / "base", vae="tiny")
    build_tiny_sd(folder / "tuned", vae="tiny", seed=1)
    (folder / "tiny_compare_rewards.py").write_text(REWARDS)
    with (folder / "prompts.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("Prompts", "Category"), *PROMPTS])
    (folder / "validation.txt").write_text("a green square\nthree circles\n")
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    sys.modules.pop("tiny_compare_rewards", None)


def config_of(room: Path, output: Path, **changes: Any) -> CompareConfig:
    values: dict[str, Any] = {
        "systems": [
            {"name": "base", "model": str(room / "base")},
            {"name": "tuned", "model": str(room / "tuned"), "trained_on": ["redness"]},
        ],
        "prompts": str(room / "prompts.csv"),
        "rewards": ["tiny_compare_rewards:Brightness", {"name": "tiny_compare_rewards:Redness", "label": "red"}],
        "output": str(output),
        "seeds": [0, 5],
        "steps": 2,
        "guidance": 2.0,
        "batch_size": 4,
        "resamples": 200,
    }
    return make_compare_config(**{**values, **changes})


@pytest.fixture(scope="module")
def finished(room: Path) -> Path:
    """The output of a comparison with a guidance control."""
    control = {"guidances": [1.0, 2.0, 6.0], "prompts": str(room / "validation.txt"), "rewards": ["red"]}
    compare(config_of(room, room / "out", guidance_control=control))
    return room / "out"


@pytest.fixture
def results(finished: Path) -> dict[str, Any]:
    return json.loads((finished / "results.json").read_text())


def test_results_have_the_documented_shape(results: dict[str, Any]) -> None:
    assert (results["prompts"], results["seeds"], results["baseline"]) == (3, [0, 5], "base")
    assert list(results["systems"])[0] == "base" and "versus_baseline" not in results["systems"]["base"]
    tuned = results["systems"]["tuned"]
    assert tuned["trained_on"] == ["redness"]
    reward = tuned["rewards"]["red"]
    assert set(reward["by_category"]) == {"colors", "conflicting", "counting"}
    assert reward["ci95"][0] <= reward["mean"] <= reward["ci95"][1]
    versus = tuned["versus_baseline"]["red"]
    assert versus["wins"] + versus["losses"] + versus["ties"] == 6
    assert versus["delta"] == pytest.approx(reward["mean"] - results["systems"]["base"]["rewards"]["red"]["mean"])


def test_scores_are_those_of_the_stored_images(finished: Path, results: dict[str, Any]) -> None:
    with (finished / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3 * 3 * 2  # rewards x systems x prompts x seeds
    brightness = "tiny_compare_rewards:Brightness"
    for row in rows:
        if row["reward"] == brightness:
            image = Image.open(finished / "images" / row["system"] / f"{int(row['index']):04d}-{row['seed']}.png")
            assert float(row["score"]) == pytest.approx(np.asarray(image).mean() / 255, abs=1e-6)
    mean = np.mean([float(row["score"]) for row in rows if (row["reward"], row["system"]) == (brightness, "tuned")])
    assert results["systems"]["tuned"]["rewards"][brightness]["mean"] == pytest.approx(mean)


def test_a_reward_trained_on_is_marked_and_decides_nothing(results: dict[str, Any]) -> None:
    rewards = results["systems"]["tuned"]["rewards"]
    assert rewards["red"]["trained_on"] and not rewards["tiny_compare_rewards:Brightness"]["trained_on"]
    assert results["verdicts"]["tuned"]["versus_baseline"]["held_out"] == ["tiny_compare_rewards:Brightness"]


def test_the_control_is_the_baseline_at_its_best_validation_guidance(
    finished: Path, results: dict[str, Any], room: Path
) -> None:
    sweep = results["guidance_control"]
    means = {point["guidance"]: point["rewards"]["red"]["mean"] for point in sweep["points"]}
    assert sweep["chosen"] == min(means, key=means.__getitem__)  # of redness, less is better
    assert sweep["system"] == f"base@guidance={sweep['chosen']:g}" == results["control"]
    assert list(results["systems"]) == ["base", sweep["system"], "tuned"]
    assert "versus_control" in results["systems"]["tuned"]
    assert "versus_control" not in results["systems"][sweep["system"]]
    assert set(results["verdicts"]) == {"tuned"}
    # The sweep's images are those of the validation prompts, at the guidance that their folder names.
    folder = finished / "control" / "base@guidance=6"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["guidance"] == 6 and set(manifest["images"]) == {
        f"{i:04d}-{s}.png" for i in (0, 1) for s in (0, 5)
    }


def test_the_report_is_one_page_with_escaped_prompts(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    assert "<script>alert(1)</script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert page.count("data:image/png;base64,") == 3 * 3 * 2
    assert "http://" not in page and "https://" not in page


def test_a_second_run_draws_and_scores_nothing(
    finished: Path, room: Path, results: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tiny_compare_rewards import Brightness

    import pipelines

    monkeypatch.setattr(evaluation, "generate_images", lambda *a, **k: pytest.fail("drew images that were there"))
    monkeypatch.setattr(pipelines, "load_generator", lambda *a, **k: pytest.fail("loaded a model for nothing"))
    Brightness.seen.clear()
    assert main(["compare", str(finished / "config.yaml")]) == 0
    assert Brightness.seen == []
    again = json.loads((finished / "results.json").read_text())
    for document in (results, again):
        del document["created"]
    assert again == results


def test_only_what_changed_is_drawn(room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[str, list[int]]] = []
    generate = evaluation.generate_images

    def counting(generator: Any, prompts: Any, *, seeds: Any, **settings: Any) -> Any:
        drawn.extend(zip(prompts, seeds, strict=True))
        return generate(generator, prompts, seeds=seeds, **settings)

    def noise(index: int, *seeds: int) -> tuple[str, list[int]]:
        return PROMPTS[index][0], [noise_seed(seed, PROMPTS[index][0]) for seed in seeds]

    monkeypatch.setattr(evaluation, "generate_images", counting)
    compare(config_of(room, tmp_path))
    assert drawn == [noise(index, 0, 5) for index in (0, 1, 2)] * 2
    drawn.clear()
    (tmp_path / "images" / "base" / "0001-5.png").unlink()
    compare(config_of(room, tmp_path, seeds=[0, 5, 9], limit=2))
    assert drawn[:2] == [noise(0, 9), noise(1, 5, 9)]
    drawn.clear()
    compare(config_of(room, tmp_path, limit=1, guidance=3.0))
    assert drawn == [noise(0, 0, 5)] * 2


def test_an_image_made_otherwise_is_not_vouched_for(tmp_path: Path) -> None:
    sampling = Sampling(steps=4, guidance=2.0)
    store = ImageStore(tmp_path, "print", sampling, ["a", "b"], [0])
    store.put(0, 0, b"png")
    store.save()
    assert ImageStore(tmp_path, "print", sampling, ["a", "b"], [0]).missing() == {1: [0]}
    for other in (
        ImageStore(tmp_path, "other", sampling, ["a"], [0]),
        ImageStore(tmp_path, "print", Sampling(steps=5, guidance=2.0), ["a"], [0]),
        ImageStore(tmp_path, "print", sampling, ["changed"], [0]),
    ):
        assert other.missing() == {0: [0]}
    (tmp_path / "manifest.json").write_text("{ damaged")
    assert ImageStore(tmp_path, "print", sampling, ["a"], [0]).missing() == {0: [0]}


def test_a_run_killed_between_image_and_manifest_mixes_nothing(tmp_path: Path) -> None:
    old = ImageStore(tmp_path, "print", Sampling(4, 2.0), ["a", "b"], [0])
    for index in (0, 1):
        old.put(index, 0, b"old")
    old.save()
    new = ImageStore(tmp_path, "print", Sampling(4, 3.0), ["a", "b"], [0])
    new.disown(new.missing())
    new.put(0, 0, b"new")  # killed here: the manifest is not saved
    assert ImageStore(tmp_path, "print", Sampling(4, 2.0), ["a", "b"], [0]).missing() == {0: [0], 1: [0]}


def test_a_store_adopts_only_images_made_in_the_same_way(tmp_path: Path) -> None:
    source = ImageStore(tmp_path / "a", "print", Sampling(4, 2.0), ["a", "b"], [0])
    source.put(0, 0, b"png")
    same = ImageStore(tmp_path / "b", "print", Sampling(4, 2.0), ["a", "b"], [0])
    same.adopt(source)
    assert same.path(0, 0).read_bytes() == b"png" and same.missing() == {1: [0]}
    other = ImageStore(tmp_path / "c", "print", Sampling(4, 3.0), ["a", "b"], [0])
    other.adopt(source)
    assert other.missing() == {0: [0], 1: [0]}


def test_unusable_rewards_are_refused_before_anything_is_drawn(room: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs references"):
        compare(config_of(room, tmp_path, rewards=["tiny_compare_rewards:Similar"]))
    with pytest.raises(RewardError, match="has no option 'gain'; allowed: batch_size, device, dtype"):
        compare(
            config_of(room, tmp_path, rewards=[{"name": "tiny_compare_rewards:Brightness", "options": {"gain": 2}}])
        )
    with pytest.raises(RewardError, match="shapes-strict cannot score 1 of 3 prompts: Shapes cannot read 'script'"):
        compare(config_of(room, tmp_path, rewards=["shapes-strict"]))
    (tmp_path / "validation.txt").write_text("a green square\nfour lazy dogs\n")
    (tmp_path / "test.txt").write_text("a red circle\n")
    control = {"guidances": [1.0, 2.0], "prompts": str(tmp_path / "validation.txt"), "rewards": ["shapes-strict"]}
    prompts = str(tmp_path / "test.txt")
    with pytest.raises(RewardError, match="cannot score 1 of 2 prompts: Shapes cannot read .*'four lazy dogs'"):
        compare(config_of(room, tmp_path, rewards=["shapes-strict"], prompts=prompts, guidance_control=control))
    assert not (tmp_path / "images").exists() and not (tmp_path / "control").exists()
    with pytest.raises(UserError, match="gave nan for .*0000-0.png"):
        compare(config_of(room, tmp_path, rewards=["tiny_compare_rewards:Broken"], limit=1))
    assert not (tmp_path / "results.json").exists()


def test_half_precision_on_a_cpu_is_refused_at_once(
    room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="^precision: fp16 needs a GPU"):
        compare(config_of(room, tmp_path, precision="fp16"))


def test_the_command_line_prints_the_table(room: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["compare", str(room / "base"), str(room / "tuned"), "--prompts", str(room / "prompts.csv"),
                 "--rewards", "tiny_compare_rewards:Brightness", "--out", str(tmp_path / "o"), "--steps", "1",
                 "--seeds", "0", "--limit", "2"]  # fmt: skip
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "tiny_compare_rewards:Brightness" in printed and "win rate" in printed
    assert f"report: {tmp_path / 'o' / 'report.html'}" in printed
    assert main([*arguments[:-2], "--baseline", "tunde"]) == 2
    assert "did you mean 'tuned'" in capsys.readouterr().err


def test_several_control_rewards_choose_by_mean_rank() -> None:
    from mmalign.compare.scores import RewardFacts

    def facts(label: str, higher: bool) -> RewardFacts:
        return RewardFacts(label, label, label, "1", "", higher, False, "", "", "")

    scores = {
        "up": {"g1": np.array([[0.1]]), "g2": np.array([[0.5]]), "g3": np.array([[0.5]])},
        "down": {"g1": np.array([[0.1]]), "g2": np.array([[0.2]]), "g3": np.array([[0.3]])},
    }
    ranks = mean_ranks(scores, {"up": facts("up", True), "down": facts("down", False)})
    np.testing.assert_allclose(ranks, [(2 + 0) / 2, (0.5 + 1) / 2, (0.5 + 2) / 2])


def test_noise_differs_by_prompt_and_seed_and_is_stable() -> None:
    assert len({noise_seed(seed, prompt) for seed in (0, 1) for prompt in ("a", "b")}) == 4
    assert noise_seed(0, "a") == noise_seed(0, "a") < 2**32
