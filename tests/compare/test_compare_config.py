"""What compare is asked to do: YAML and command line give the same config, and every fault is said clearly."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from mmalign.cli.compare import add_arguments, read_arguments
from mmalign.compare.config import CompareConfig, load_compare_config, make_compare_config
from mmalign.compare.run import _check_category
from mmalign.config.run import dump_config
from mmalign.core.errors import UserError
from mmalign.data.prompts import Prompt

YAML = """
systems:
  - {name: base, model: models/a}
  - {name: dpo, model: models/b, guidance: 5, trained_on: [clip]}
prompts: shapes-validation
rewards: [clip, {name: clip, label: other, options: {weights: here}}]
seeds: [3, 4]
output: out
"""


def parse(*arguments: str) -> CompareConfig:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return read_arguments(parser.parse_intermixed_args(list(arguments)))


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "compare.yaml"
    path.write_text(YAML)
    return path


def test_yaml_is_read_with_its_defaults(config_file: Path) -> None:
    config = load_compare_config(config_file)
    assert [(system.name, system.guidance) for system in config.systems] == [("base", None), ("dpo", 5.0)]
    assert [reward.title for reward in config.rewards] == ["clip", "other"]
    assert config.baseline_name == "base"
    assert (config.seeds, config.steps, config.resamples) == ([3, 4], 50, 10_000)


def test_a_dumped_config_reads_back_equal(config_file: Path, tmp_path: Path) -> None:
    config = load_compare_config(config_file)
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_compare_config(again) == config


def test_options_and_assignments_override_the_file(config_file: Path) -> None:
    config = parse(str(config_file), "--seeds", "7", "--rewards", "brightness", "steps=12", "--out", "elsewhere")
    assert (config.seeds, config.steps, config.output) == ([7], 12, "elsewhere")
    assert [reward.title for reward in config.rewards] == ["brightness"]


def test_models_on_the_command_line() -> None:
    config = parse(
        "a/base", "b/dpo", "--prompts", "p.csv", "--rewards", "clip,aesthetic", "--out", "o", "--guidance-control",
        "3,4.5", "--control-prompts", "v.csv", "--baseline", "dpo", "--limit", "5",
    )  # fmt: skip
    assert [(system.name, system.model) for system in config.systems] == [("base", "a/base"), ("dpo", "b/dpo")]
    assert config.baseline_name == "dpo" and config.limit == 5
    control = config.guidance_control
    assert (control.guidances, control.prompts, control.rewards) == ([3, 4.5], "v.csv", ["clip"])


def test_models_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    for run in ("one", "two"):
        (tmp_path / run / "dpo").mkdir(parents=True)
    config = parse(
        str(tmp_path / "one/dpo"), str(tmp_path / "two/dpo"), "--prompts", "p", "--rewards", "r", "--out", "o"
    )
    assert [system.name for system in config.systems] == ["one-dpo", "two-dpo"]


GIVEN = ["a", "b", "--prompts", "p", "--rewards", "r", "--out", "o"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "b", "--rewards", "r", "--out", "o"], "--prompts is missing"),
        (GIVEN[1:], "only 'b'"),
        ([*GIVEN, "--names", "x"], "1 names for 2 models"),
        ([*GIVEN, "--names", "x,../y"], "cannot name a folder"),
        ([*GIVEN, "--baseline", "c"], "no system is called 'c'"),
        ([*GIVEN, "--rewards", "r,r"], "r occurs more than once"),
        ([*GIVEN, "--guidance-control", "1,2"], "--control-prompts"),
        ([*GIVEN, "--seeds", "1,1"], "different whole numbers"),
        ([*GIVEN, "--guidance", "-1"], "guidance: Input should be greater than or equal to 0"),
        ([*GIVEN, "--guidance", "inf"], "guidance: Input should be a finite number"),
        ([*GIVEN, "--guidance-control=-1,2", "--control-prompts", "v"], "greater than or equal to 0"),
        ([*GIVEN, "--guidance-control", "2,2", "--control-prompts", "v"], "different numbers"),
    ],
)
def test_faults_of_the_command_line(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse(*arguments)
    assert "\n" not in str(caught.value)


def test_faults_of_the_file_are_reported_together(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("systems: []\npromts: x\nrewards: [clip]\noutput: o\nsteps: many\nguidance: .inf\n")
    with pytest.raises(UserError) as caught:
        load_compare_config(path)
    text = str(caught.value)
    assert "guidance: given" in text and "a finite number" in text
    assert "did you mean 'prompts'" in text
    assert "steps" in text and "many" in text


def test_a_control_reward_must_be_compared() -> None:
    control = {"guidances": [1.0, 2.0], "prompts": "v", "rewards": ["clop"]}
    with pytest.raises(UserError, match="'clop' is not among the rewards compared; did you mean 'clip'"):
        make_compare_config(
            systems=[{"name": "a", "model": "a"}], prompts="p", rewards=["clip"], output="o", guidance_control=control
        )


def test_a_category_that_no_prompt_has_cannot_stand_apart(config_file: Path) -> None:
    config = load_compare_config(config_file, ["category_apart=Conflict"])
    prompts = [Prompt("a star", "Conflicting"), Prompt("a ring", "Colors")]
    with pytest.raises(UserError, match="no category 'Conflict'; it has Conflicting, Colors.*Conflicting"):
        _check_category(config, prompts)
    with pytest.raises(UserError, match="it has none"):
        _check_category(config, [Prompt("a star")])
