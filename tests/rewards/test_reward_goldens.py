"""The published numbers: those that need no weights hold here, and absence is told from disagreement."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from golden_data import golden_file

from mmalign.cli import main
from rewards import RewardError, goldens
from rewards.goldens import GOLDENS, HEADS, Golden, goldens_of, verify
from rewards.held_to import HELD_TO
from rewards.registry import BUILTIN


def golden(compute, expected=(1.0,), tolerance=0.1, **options):
    return Golden("clip/made-up", "nothing", expected, tolerance, "this test", compute, **options)


def test_names_are_unique_and_of_rewards_that_exist():
    names = [one.name for one in GOLDENS]
    assert len(set(names)) == len(names)
    assert {one.reward for one in GOLDENS} <= set(BUILTIN)


@pytest.mark.parametrize(
    "one", [one for one in GOLDENS if not one.files and "vit" not in one.name], ids=lambda g: g.name
)
def test_what_needs_no_weights_holds(one):
    assert verify(one).status == "ok"


@pytest.mark.parametrize("name", ["v1", "v1-b-32", "v2"])
def test_published_heads_on_published_embeddings(name):
    (one,) = goldens_of(f"aesthetic/{name}")
    verdict = verify(one, golden_file(HEADS).parent)
    assert verdict.status == "ok" and len(verdict.got) == 10
    changed = Golden(
        one.name, "", (*one.expected[:9], one.expected[9] + 0.01), one.tolerance, "", one.compute, one.files
    )
    assert verify(changed, golden_file(HEADS).parent).status == "differs"


def test_verdicts(tmp_path):
    def fails(call):
        raise RewardError("has unknown layers.9")

    def absent(call):
        raise RewardError("cannot fetch it") from ConnectionError("no network")

    def extra(call):
        raise RewardError('needs rapidocr: pip install "mmalign[ocr]"')

    assert verify(golden(lambda call: [1.05])).status == "ok"
    assert verify(golden(lambda call: [1.2])).status == "differs"
    assert verify(golden(lambda call: [math.nan])).status == "differs"
    assert verify(golden(lambda call: [1.0, math.nan], (1.0, 2.0))).status == "differs"
    assert verify(golden(lambda call: [1.0, 2.0])).status == "error"
    assert verify(golden(lambda call: [101.0], (100.0,), 0.02, relative=True)).status == "ok"
    assert verify(golden(lambda call: [103.0], (100.0,), 0.02, relative=True)).status == "differs"
    assert (verify(golden(fails)).status, verify(golden(fails)).reason) == ("error", "has unknown layers.9")
    assert verify(golden(absent)).status == "skipped" and verify(golden(extra)).status == "skipped"
    assert verify(golden(absent), weights="here").status == "error"  # weights that are given must be there
    assert verify(golden(fails, files=("a.png",)), tmp_path).reason == f"no a.png in {tmp_path}"


def test_weights_reach_the_reward(clip_directory, images):
    from rewards import load_reward

    expected = load_reward("clip", weights=clip_directory, device="cpu")(images[:1], prompts=["cat"]).item()
    one = golden(lambda call: call.load("clip", "of/somebody")(images[:1], prompts=["cat"]), (expected,), 1e-6)
    assert verify(one, weights=str(clip_directory), device="cpu").status == "ok"
    assert verify(one).status == "skipped"


def test_clip_goldens_run_through_any_clip(clip_directory):
    """The computations themselves, on a tiny CLIP whose numbers are of course not the published ones."""
    for one in goldens_of("clip"):
        folder = golden_file(one.files[0]).parent if one.files else None
        verdict = verify(one, folder, weights=str(clip_directory), device="cpu")
        assert verdict.status == ("ok" if one.name == "clip/tokenizer" else "differs"), verdict.reason
        if one.name == "clip/vit-b-32":
            assert sum(verdict.got) == pytest.approx(1.0)


def test_command_line(monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("MMALIGN_GOLDEN", raising=False)
    table = (
        golden(lambda call: [1.0]),
        Golden("hps/image", "an image", (0.2,), 0.1, "", lambda call: [0.25], ("cat.png",)),
        Golden("hps/other", "another", (0.2,), 0.1, "", lambda call: torch.tensor([0.25])),
    )
    monkeypatch.setattr(goldens, "GOLDENS", table)
    assert main(["rewards", "verify"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["golden", "input", "expected", "got", "difference", "verdict"]
    assert lines[1].split() == ["clip/made-up", "nothing", "1", "1", "0.0e+00", "of", "0.1", "ok"]
    assert "skipped: no cat.png (MMALIGN_GOLDEN is not set)" in lines[2]
    assert lines[3].split()[-4:] == ["5.0e-02", "of", "0.1", "ok"]
    assert lines[-1] == "2 ok, 1 skipped"
    (tmp_path / "cat.png").touch()
    assert main(["rewards", "verify", "hps", "--golden", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2 ok"
    monkeypatch.setattr(goldens, "GOLDENS", (golden(lambda call: [2.0]),))
    assert main(["rewards", "verify"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "1 differs: clip/made-up"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "x"], "--weights applies to one reward"),
        (["aestetic"], "did you mean 'aesthetic'?"),
        (["hps", "--golden", "no/such"], "no/such is not a folder"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    assert main(["rewards", "verify", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_reward_without_a_published_score_says_what_its_tests_hold_it_to(capsys):
    assert main(["rewards", "verify", "vqa-score"]) == 0
    assert "tests/rewards/test_reward_vqa_score.py compares it with P(Yes)" in capsys.readouterr().out
    with_score = {golden.reward for golden in goldens.GOLDENS}
    assert set(HELD_TO) == set(BUILTIN) - with_score  # every reward has one or the other
    for file, _ in HELD_TO.values():
        assert (Path(__file__).parent / f"{file}.py").is_file()
