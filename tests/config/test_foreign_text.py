"""Text on the command line, documents that are no config, and numbers that no computation can use."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from mmalign.config.run import load_config
from mmalign.config.yaml import parse_value, read_tree
from mmalign.core.errors import UserError

RECIPE = "model: m\nmethod: {name: diffusion_dpo}\ndata: {pairs: p.parquet}\noutput: o\n"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    return path


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("runs/try #2", "runs/try #2"),
        ("#1", "#1"),
        ("a: b", "a: b"),
        ("C: x: y", "C: x: y"),
        ("{x}", "{x}"),
        ("[1", "[1"),
        ("runs/{a: 1", "runs/{a: 1"),
        ("007", "007"),
        ("true", "true"),
        ("1e-4", "1e-4"),
        ("*x", "*x"),
        ("!x", "!x"),
        ("- a", "- a"),
        ("'a #b'", "a #b"),  # quotes are read as YAML, as they always were
        ('"007"', "007"),
        ("'a' and 'b'", "'a' and 'b'"),
        ("it's", "it's"),
        ("a=b", "a=b"),
    ],
)
def test_text_is_text_where_the_key_takes_text(recipe: Path, given: str, read: str) -> None:
    keys = ("output", "model", "data.pairs", "data.cache", "trainer.tracker_run", "data.caption_column")
    config = load_config(recipe, [f"{key}={given}" for key in keys])
    found = [config.output, config.model, config.data.pairs, config.data.cache, config.data.caption_column]
    assert found == [read] * 5 and config.trainer.tracker_run == read


def test_text_in_lists_and_null(recipe: Path) -> None:
    config = load_config(recipe, ["adapter.targets.0=to_q #1", "data.cache=null"])
    assert config.adapter.targets == ["to_q #1"] and config.data.cache is None
    assert load_config(recipe, ["method=sft"]).method_name == "sft"
    with pytest.raises(UserError, match="output"):
        load_config(recipe, ["output="])
    with pytest.raises(UserError, match="output"):
        load_config(recipe, ["output=''"])


def test_a_comment_in_another_value_is_refused_with_the_fix(recipe: Path) -> None:
    with pytest.raises(UserError, match="'#2' would be a comment in YAML; quote the text"):
        parse_value("a b #2")
    with pytest.raises(UserError, match=r"trainer.steps.*would be a comment"):
        load_config(recipe, ["trainer.steps=5 # few"])
    assert parse_value("'a b #2'") == "a b #2" and parse_value("a#2") == "a#2"


LAUGHS = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1, y: 2}\n" + "".join(
    f"{new}: &{new} {{<<: [{', '.join([f'*{old}'] * 30)}]}}\n" for old, new in zip("abcdef", "bcdefg", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "more than 100,000 values, with its aliases expanded"),
        (MERGES, "more than 100,000 values, with its aliases expanded"),
        ("a: !!binary aGk=\n", "!!binary, which no config has"),
        ("a: !!set {x, y}\n", "!!set"),
        ("a: !!omap [x: 1]\n", "!!omap"),
        ("a: !!pairs [x: 1]\n", "!!pairs"),
        ("a: !!timestamp 2024-01-01\n", "!!timestamp"),
        ("a: !!timestamp no\n", "!!timestamp"),
        ("a: !!int abc\n", "'abc' is no !!int"),
        ("a: !!float abc\n", "'abc' is no !!float"),
        ("a: !!bool maybe\n", "'maybe' is no !!bool"),
        ("a: !!int [1]\n", "!!int"),
        ("a: !!str {x: 1}\n", "!!str"),
        ("a: !!map x\n", "!!map"),
        ("a: !mine x\n", "!mine"),
        ("? [a, b]\n: 1\n", "a key is text"),
        ("? {a: b}\n: 1\n", "a key is text"),
        ("{[a]: 1}\n", "a key is text"),
        ("!!binary aGk=: 1\n", "a key is text"),
        ("a: &a [*a]\n", "an anchor that holds itself"),
        ("a: &a {b: {c: *a}}\n", "an anchor that holds itself"),
        ("a: &a {<<: *a}\n", "an anchor that holds itself"),
        ("a: {<<: x}\n", "<< takes a mapping"),
        ("a: " + "[" * 1500 + "]" * 1500 + "\n", "more than 50 lists and mappings"),
        ("a: " + "{b: " * 6000 + "1" + "}" * 6000 + "\n", "more than 50 lists and mappings"),
        ("a: " + "9" * 5000 + "\n", "a number of 5,000 characters"),
        ("a: 0x" + "f" * 5000 + "\n", "a number of 5,002 characters"),
        ("a: 0." + "1" * 5000 + "\n", "a number of 5,002 characters"),
        ('a: "\\ud800"\n', "surrogate"),
        ('a: "\\UFFFFFFFF"\n', ""),
        ("a: *unknown\n", "undefined alias"),
        ("a: '" + "x" * 1_000_001 + "'\n", "a config has at most 1,000,000"),
    ],
)
def test_documents_that_are_no_config_take_one_line_and_no_time(tmp_path: Path, text: str, message: str) -> None:
    path, started = tmp_path / "c.yaml", time.monotonic()
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_tree(path, [])
    assert message in str(caught.value) and "not valid YAML: " in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300 + len(str(path))
    assert time.monotonic() - started < 5


def test_keys_are_text_and_aliases_still_work(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("1: a\non: b\nnull: c\nlist: &l [1, 2]\nagain: [*l, *l]\n")
    read = read_tree(path, []).values
    assert read == {"1": "a", "on": "b", "null": "c", "list": [1, 2], "again": [[1, 2], [1, 2]]}
    path.write_text("1: a\n'1': b\n")
    with pytest.raises(UserError, match="key '1' is given twice"):
        read_tree(path, [])


@pytest.mark.parametrize(
    "override",
    [
        "trainer.learning_rate=.nan",
        "trainer.learning_rate=.inf",
        "trainer.learning_rate=1e999",
        "trainer.learning_rate=1e39",
        "trainer.max_grad_norm=.inf",
        "trainer.weight_decay=.nan",
        "trainer.warmup=.inf",
        "trainer.ema=.nan",
        "trainer.betas=[0.9, 1.0]",
        "trainer.betas=[-0.1, 0.9]",
        "trainer.betas=[.nan, 0.9]",
        "trainer.steps=2000000000",
        "trainer.seed=9223372036854775808",
        "adapter.alpha=.inf",
        "adapter.rank=100000000",
        "adapter.targets=[]",
        "adapter.targets.0=''",
        "method.beta=.nan",
        "method.beta=-.inf",
        "data.min_margin=.inf",
        "data.resolution=8000000",
        "data.caption_dropout=.nan",
        "evaluate={prompts: x, every: 5, rewards: [clip], guidance: .inf}",
    ],
)
def test_every_number_is_finite_and_bounded(recipe: Path, override: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(recipe, [override])
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"the command line: {override.split('=')[0].split('.0')[0]}") and "given" in line


def test_numbers_within_options_of_any_type_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE.replace("diffusion_dpo", "ddpo").replace("pairs: p.parquet", "prompts: p.txt"))
    with pytest.raises(UserError, match=r"rewards.0.options.w.1: given nan; allowed: a finite number"):
        load_config(path, ["rewards=[{name: clip, options: {w: [1, .nan]}}]"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.²=5", "unknown key"),
        ("trainer.٣=5", "unknown key"),
        ("rewards.0.name.x=1", "rewards.0.name"),
        ("method=os:system", "no method"),
        ("method=os:path", "no method"),
        (".".join(["a"] * 5000) + "=1", "no config is that deep"),
    ],
)
def test_overrides_that_are_no_keys_take_lines_and_no_traceback(recipe: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(recipe, [override])
