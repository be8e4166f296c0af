"""`mmalign list rewards`: every fact of every reward, all about one, and no model library loaded for it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mmalign.cli import main
from rewards.registry import BUILTIN, options_of, reward_class


def test_all_rewards_with_their_facts(capsys):
    assert main(["list", "rewards"]) == 0
    output = capsys.readouterr()
    lines = {line.split()[0]: line for line in output.out.splitlines() if line}
    header = [
        "reward",
        "version",
        "scores",
        "needs",
        "gradient",
        "range",
        "licence",
        "weights",
        "what",
        "it",
        "measures",
    ]
    assert lines["reward"].split() == header
    assert set(BUILTIN) <= set(lines)
    assert len([line for line in output.out.splitlines() if line.strip()]) == len(lines)  # one line a reward
    for fact in ("v2.1", "image", "prompts", "yes", "-1 .. 1", "Apache-2.0", "xswu/HPSv2, HPS_v2.1_compressed.pt"):
        assert f" {fact} " in lines["hps"]
    assert "mmalign list rewards NAME" in output.err


def test_everything_about_one(capsys):
    assert main(["list", "rewards", "aesthetic"]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert lines[0] == "aesthetic" and "Raises `RewardError` for an unknown version" in text
    for line in (
        "needs         nothing but media",
        "gradient      yes, to the pixels",
        "range         -inf .. inf",
        "citation      Schuhmann et al. 2022, arXiv:2210.08402",
        "options       version = 'v2'",
        "              batch_size = 32",
    ):
        assert line in lines
    assert "sha256 21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0" in text
    assert "numbers       aesthetic/v1: ten published CLIP embeddings" in text
    assert main(["list", "rewards", "mmalign.shapes.rewards:ShapesQuality"]) == 0
    assert "numbers       none published" in capsys.readouterr().out


@pytest.mark.parametrize("name", BUILTIN)
def test_every_reward_can_be_described(name, capsys):
    assert main(["list", "rewards", name]) == 0
    assert f"{name}.OPTION=VALUE" in capsys.readouterr().out


def test_options_are_those_of_the_class_and_its_bases():
    options = options_of(reward_class("clip"))
    assert options is not None
    assert list(options)[0] == "weights" and options["batch_size"] == 32 and "preprocessing" in options


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["methods", "sft"], "'sft': only rewards are listed one by one"),
        (["rewards", "aestetic"], "did you mean 'aesthetic'?"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    assert main(["list", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_no_model_library_is_loaded_for_the_facts():
    code = "import sys; from mmalign.cli import main; main(['list', 'rewards']); "
    code += "print([m for m in HEAVY if m in sys.modules])"
    heavy = ("transformers", "open_clip", "diffusers", "torchvision", "rapidocr", "onnxruntime")
    done = subprocess.run(
        [sys.executable, "-c", f"HEAVY = {heavy}\n{code}"], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
