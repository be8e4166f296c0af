from __future__ import annotations

import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import pytest
import yaml

from mmalign.config.renamed import current_recipe
from mmalign.config.run import dump_config, load_config, load_schema, load_with_tree
from mmalign.config.sections import StrictModel
from mmalign.config.yaml import flatten, list_configs, parse_value, read_tree, write_yaml
from mmalign.core.errors import UserError
from mmalign.training.recipe import build_method, complete

RECIPE = """\
# a recipe
model: assets/shapes-sd
method: {name: diffusion_dpo, beta: 1000}
data: {pairs: pairs.parquet}
trainer: {steps: 400, learning_rate: 1e-4}
output: runs/x
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def issues(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_config(path, list(overrides))
    return str(caught.value).splitlines()


def test_reads_the_recipe_and_fills_in_the_methods_own_deissues(recipe: Path) -> None:
    config = load_config(recipe)
    assert config.method_name == "diffusion_dpo"
    assert config.method_options["beta"] == 1000.0
    assert config.method_options["loss_type"] == "sigmoid"
    assert config.trainer.learning_rate == 1e-4
    assert config.trainer.betas == (0.9, 0.999)
    assert config.adapter.kind == "lora"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("2E3", 2000.0),
        (".5", 0.5),
        ("-.inf", float("-inf")),
        ("010", 10),
        ("0x10", 16),
        ("12:30", "12:30"),
        ("no", "no"),
        ("on", "on"),
        ("True", True),
        ("~", None),
        ("", None),
        ("2024-05-01", "2024-05-01"),
        ("1e", "1e"),
        ("[a, 2, 3.0]", ["a", 2, 3.0]),
        ("{kind: full}", {"kind": "full"}),
    ],
)
def test_values_follow_yaml_1_2(text: str, value: object) -> None:
    parsed = parse_value(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_overrides_win_and_reach_into_lists(recipe: Path) -> None:
    overrides = [
        "method.beta=2e3",
        "trainer.trackers=[tensorboard]",
        "trainer.betas.1=0.95",
        "trainer.betas=[0.8, 0.9]",
    ]
    config = load_config(recipe, overrides)
    assert config.method_options["beta"] == 2000.0
    assert config.trainer.trackers == ["tensorboard"]
    assert config.trainer.betas == (0.8, 0.95)  # the whole before its parts, in whatever order they were typed
    config = load_config(recipe, ["evaluate.prompts=a.txt", "evaluate.every=5", "evaluate.rewards.0=clip"])
    assert config.evaluate is not None and config.evaluate.rewards == ["clip"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.steps", "write it as key=value"),
        ("data.pairs.0=x", "data.pairs is the value 'pairs.parquet'"),
        ("trainer.0=x", "trainer is a mapping, not a list"),
        ("trainer.steps=[1", "not a YAML value"),
        ("method.beta=x: y: z", "not a YAML value"),
    ],
)
def test_overrides_that_cannot_be_applied(recipe: Path, override: str, message: str) -> None:
    (line,) = issues(recipe, override)
    assert override.partition("=")[0] in line and message in line


def test_an_override_given_twice_is_refused(recipe: Path) -> None:
    assert "given twice" in issues(recipe, "trainer.steps=1", "trainer.steps=2")[0]


def test_all_issues_at_once_each_with_key_given_allowed_and_nearest(recipe: Path) -> None:
    lines = issues(
        recipe,
        "trainer.stepz=3",
        "trainer.batch_size=ten",
        "trainer.precision=bf15",
        "trainer.ema=2",
        "trainer.betas=[0.9]",
        "method.bta=3",
        "method.timesteps=[0.5, x]",
        "data.flip=yes",
        "data.prompts=p.txt",
        "adapter=full",
        "evaluate.every=0",
    )
    expected = [
        "data.flip: given the text 'yes'; allowed: true or false",
        "adapter: given the text 'full'; allowed: a mapping",
        "trainer.betas.1: missing; the list is too short",
        "trainer.batch_size: given the text 'ten'; allowed: a whole number",
        "trainer.precision: given the text 'bf15'; allowed: fp32, bf16, fp16; did you mean 'bf16'?",
        "trainer.ema: given 2; allowed: less than 1",
        "trainer.stepz: unknown key; did you mean 'steps'? (known: steps, budget",
        "evaluate.every: given 0; allowed: greater than or equal to 1",
        "evaluate.prompts: missing; give a built-in name",
        "evaluate.rewards: missing",
        "method.bta: unknown key; did you mean 'beta'?",
        "method.timesteps: given the list [0.5, 'x']; allowed: [whole number, whole number] or [number, number]",
        "data: data.pairs and data.prompts exclude each other; keep data.pairs",
    ]
    for text in expected:
        assert sum(text in line for line in lines) == 1, (text, lines)
    assert len(lines) == len(expected)
    assert sum(line.startswith("the command line: ") for line in lines) == len(lines) - 1


def test_issues_name_file_and_line(tmp_path: Path) -> None:
    base = tmp_path / "base.yaml"
    base.write_text(RECIPE + "trainr: {}\n")
    child = tmp_path / "child.yaml"
    child.write_text("extends: base.yaml\ntrainer:\n  steps: 0\n")
    lines = issues(child)
    assert f"{child}:3: trainer.steps: given 0; allowed: greater than or equal to 1" in lines
    assert any(line.startswith(f"{base}:7: trainr: unknown key; did you mean 'trainer'?") for line in lines)


def test_a_missing_key_says_what_to_give(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("data: {}\n")
    lines = issues(path)
    assert f"{path}: model: missing; give a model directory, or a hub id 'organisation/name'" in lines
    assert any(line.startswith(f"{path}: method: missing; give `name`") for line in lines)
    assert any("output: missing; give folder that the run writes to" in line for line in lines)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=dpo"], "unknown method 'dpo'; did you mean 'dense_dpo' or 'diffusion_dpo' or 'vlm_dpo'?"),
        (["data.pairs=null"], "method 'diffusion_dpo' learns from pairs; give data.pairs"),
        (["data={prompts: x.txt}"], "learns from pairs, not from prompts; give data.pairs instead"),
        (["rewards=[clip]"], "takes no rewards; remove `rewards`"),
        (
            ["method=prdp", "data={prompts: p}", "rewards=[clip, {name: clip, weight: 2}]"],
            "'clip' occurs more than once",
        ),
        (["adapter.kind=full", "adapter.rank=4"], "adapter.rank: applies to kind: lora only"),
        (["trainer.warmup=500"], "500 steps of warm-up in a run of 400"),
        (["trainer.warmup=3.5"], "a fraction of the steps below 1, or a whole number"),
        (["evaluate={prompts: x, every: 5, rewards: [clop]}"], "did you mean 'clip'?"),
        (["method={beta: 3}"], "method.name: missing; give the method's name (known: align_prop, "),
        (["method.timesteps=[0.9, 0.1]"], "fractions must satisfy 0 <= low < high <= 1"),
    ],
)
def test_what_excludes_each_other(recipe: Path, overrides: list[str], message: str) -> None:
    assert message in "\n".join(issues(recipe, *overrides))


def test_an_average_of_lora_weights_is_allowed(recipe: Path) -> None:
    assert load_config(recipe, ["trainer.ema=0.99"]).trainer.ema == 0.99


class TestMethodPlugins:
    """Third parties' methods, by dotted path."""

    SOURCE = """
from pydantic import BaseModel
from mmalign.methods.base import Method, Needs

class Config(BaseModel):
    strength: float = 1.0

class Mine(Method):
    name = "mine"
    Config = Config
    needs = Needs(source="prompts", reward="differentiable")

    def loss(self, run, batch):
        raise NotImplementedError
"""

    @pytest.fixture
    def mine(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
        (tmp_path / "config_test_methods.py").write_text(self.SOURCE)
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
        return "method=config_test_methods:Mine"

    def test_is_found_and_its_needs_are_checked(self, recipe: Path, mine: str) -> None:
        assert "learns from prompts, not from pairs" in "\n".join(issues(recipe, mine, "rewards=[clip]"))
        assert "needs at least one reward; see `mmalign list rewards`" in "\n".join(
            issues(recipe, mine, "data={prompts: x}")
        )
        config = load_config(recipe, [mine, "data={prompts: x}", "rewards=[clip]"])
        assert config.method == {"name": "config_test_methods:Mine", "strength": 1.0}

    def test_an_unknown_option_is_an_issue_even_if_its_config_forgot_to_forbid_it(
        self, recipe: Path, mine: str
    ) -> None:
        lines = issues(recipe, mine, "data={prompts: x}", "rewards=[clip]", "method.strenght=2")
        assert any("method.strenght: unknown key; did you mean 'strength'?" in line for line in lines)

    def test_pairs_only_options_beside_prompts(self, recipe: Path, mine: str) -> None:
        lines = issues(recipe, mine, "data={prompts: x, min_margin: 0.1}", "rewards=[clip]")
        assert "data.min_margin: applies to pairs only" in lines[0]


class TestRenamedKeys:
    OLD = "method={name: vlm_dpo, margin_rise: 0.25}"

    def test_the_old_name_is_read_with_a_note_and_the_new_one_written(
        self, recipe: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        recipe.write_text(
            RECIPE.replace("{name: diffusion_dpo, beta: 1000}", "\n  name: vlm_dpo\n  margin_rise: 0.25")
        )
        config, tree = load_with_tree(recipe, ["method.margin_slope=2"])
        assert (config.method["dynamic_beta_scale"], config.method["dynamic_beta_slope"]) == (0.25, 2.0)
        notes = capsys.readouterr().err.splitlines()
        assert notes == [
            "method.margin_rise is now called dynamic_beta_scale; the old name is still read",
            "method.margin_slope is now called dynamic_beta_slope; the old name is still read",
        ]
        assert tree.value_origin(("method", "dynamic_beta_scale")) == f"{recipe}:5"
        assert tree.value_origin(("method", "dynamic_beta_slope")) == "the command line"
        assert "margin_rise" not in dump_config(config)
        recipe.write_text(dump_config(config))
        assert load_config(recipe) == config and capsys.readouterr().err == ""

    def test_a_wrong_value_is_reported_under_the_new_name(self, recipe: Path) -> None:
        (line,) = issues(recipe, "method={name: vlm_dpo, margin_slope: 0}")
        assert "method.dynamic_beta_slope: given 0; allowed: greater than 0" in line

    def test_both_names_are_an_error(self, recipe: Path) -> None:
        (line,) = issues(recipe, self.OLD, "method.dynamic_beta_scale=0.5")
        assert line.endswith(
            "method.margin_rise: is the old name of dynamic_beta_scale, which is given too; remove it"
        )

    def test_options_of_a_config_built_in_python(self, recipe: Path) -> None:
        config = load_config(recipe, ["method=vlm_dpo"])
        given = config.model_copy(update={"method": {"name": "vlm_dpo", "margin_rise": 0.25}})
        assert build_method(given).config.dynamic_beta_scale == 0.25
        assert complete(given).method == {**config.method, "dynamic_beta_scale": 0.25}
        both = {"name": "vlm_dpo", "margin_rise": 0.25, "dynamic_beta_scale": 0.5}
        with pytest.raises(ValueError, match="margin_rise"):
            build_method(config.model_copy(update={"method": both}))

    def test_one_line_renames_a_key_of_any_schema(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        class Part(StrictModel):
            renamed: ClassVar[Mapping[str, str]] = {"b": "c"}
            c: tuple[int, int]

        class Whole(StrictModel):
            renamed: ClassVar[Mapping[str, str]] = {"first": "part"}
            part: Part
            more: list[Part] = []

        path = tmp_path / "whole.yaml"
        path.write_text("first: {b: [1, 2]}\nmore: [{c: [3, 4]}, {b: [5, 6]}]\n")
        whole = load_schema(Whole, path)
        assert whole.part.c == (1, 2) and [one.c for one in whole.more] == [(3, 4), (5, 6)]
        notes = capsys.readouterr().err.splitlines()
        assert [line.partition(" ")[0] for line in notes] == ["first", "more.1.b", "part.b"]
        saved = {"more.0.b": 1, "more.1.c": 2, "part.b": 3, "data.content": "x", "method.b": 4, "method.name": "m"}
        now = {"more.0.c": 1, "more.1.c": 2, "part.c": 3, "data.content": "x", "method.c": 4, "method.name": "m"}
        assert current_recipe(saved, Whole, Part) == now


def test_extends_merges_and_the_child_wins(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(RECIPE)
    (tmp_path / "sub").mkdir()
    child = tmp_path / "sub" / "child.yaml"
    child.write_text("extends: ../base.yaml\ntrainer: {steps: 7}\nadapter: {rank: 4}\n")
    config = load_config(child)
    assert (config.trainer.steps, config.trainer.learning_rate, config.adapter.rank) == (7, 1e-4, 4)
    assert config.method_options["beta"] == 1000.0


def test_changing_a_name_or_kind_starts_the_mapping_afresh(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(RECIPE + "adapter: {kind: lora, rank: 8}\n")
    child = tmp_path / "child.yaml"
    child.write_text("extends: base\nmethod: {name: sft}\nadapter: {kind: full}\n")
    config = load_config(child)
    assert config.method_name == "sft" and "beta" not in config.method
    assert config.adapter.kind == "full"
    config = load_config(
        tmp_path / "base.yaml", ["adapter.kind=full", "method.timesteps=[0.0, 0.5]", "method.name=sft"]
    )
    assert config.adapter.kind == "full" and config.method == {"name": "sft", "timesteps": [0.0, 0.5]}
    same = load_config(tmp_path / "base.yaml", ["method.name=diffusion_dpo"])
    assert same.method_options["beta"] == 1000.0


def test_several_bases_and_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("x: 1\ny: {p: 1, q: 1}\n")
    (tmp_path / "b.yaml").write_text("y: {q: 2}\n")
    (tmp_path / "c.yaml").write_text("extends: [a, b]\nz: [3]\n")
    assert read_tree(tmp_path / "c.yaml", []).values == {"x": 1, "y": {"p": 1, "q": 2}, "z": [3]}
    (tmp_path / "a.yaml").write_text("extends: c\n")
    with pytest.raises(UserError, match="extends itself"):
        read_tree(tmp_path / "c.yaml", [])
    (tmp_path / "d.yaml").write_text("extends: {a: b}\n")
    with pytest.raises(UserError, match="extends: give the name of a config file"):
        read_tree(tmp_path / "d.yaml", [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3, column 1: key 'a' is given twice, first in line 1"),
        ("t:\n  s: 1\n  s: 2\n", "line 3, column 3: key 's' is given twice"),
        ("a: [1\n", "not valid YAML: line 2"),
        ("- a\n", "a config is a mapping"),
        ("a: !!python/object:os.system x\n", "not valid YAML: line 1"),
        ("a: 1\n---\nb: 2\n", "not valid YAML"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_tree(path, [])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_binary_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "weights.yaml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(UserError, match="not a text file"):
        load_config(tmp_path / "weights.yaml")
    with pytest.raises(UserError, match="is a directory"):
        load_config(tmp_path)
    with pytest.raises(UserError, match="no such file and no shipped config"):
        load_config("nothing/like/it")


def test_anchors_and_merge_keys_work(tmp_path: Path) -> None:
    path = tmp_path / "anchors.yaml"
    path.write_text("a: &base {x: 1, y: 1}\nb: {<<: *base, y: 2}\n")
    assert read_tree(path, []).values["b"] == {"x": 1, "y": 2}


@pytest.mark.parametrize(
    "overrides", [[], ["adapter.kind=full"], ["evaluate={prompts: x, every: 5, rewards: [clip]}", "trainer.ema=1e-5"]]
)
def test_the_dumped_config_reads_back_to_the_same_run(recipe: Path, tmp_path: Path, overrides: list[str]) -> None:
    config = load_config(recipe, overrides)
    dumped = tmp_path / "resolved.yaml"
    dumped.write_text(dump_config(config))
    assert load_config(dumped) == config
    assert yaml.safe_load(dumped.read_text())["trainer"]["checkpoint_every"] == 500


def test_whatever_is_written_is_read_back_as_it_was() -> None:
    words = """1e-4 3e-5 1E4 +.5e3 1e+05 on off yes no y N true TRUE tRUE null Null ~ 0123 09 0o17 0x1F 0b11 12:30
        1_000 2024-01-01 2024-01-01T10:00:00Z .inf -.inf .nan .NaN 1. .5 +1 -1 - -- --- ... = << a:b #x ! &a *b % @ `
        ? | > [ ] { } , ' " """.split()
    texts = [*words, "", " ", " a", "a ", "a: b", "- a", "a #b", "a\nb", "\n", "\t", "é", "\x85", "\u2028", "\ufeffa"]
    source = random.Random(0)
    texts += ["".join(source.choices("01.eE+-_:xob~ #'\"\n", k=source.randint(1, 6))) for _ in range(1000)]
    numbers = [3e-5, 1e-4, 1e16, 1e22, 5e-324, -0.0, 1.0, math.inf, -math.inf, 0.1, 7, -7, 10**20, True, False, None]
    numbers += [source.uniform(-1, 1) * 10 ** source.randint(-30, 30) for _ in range(300)]
    for value in [*texts, *numbers]:
        assert repr(parse_value(write_yaml({"k": value, "l": [value]}))) == repr({"k": value, "l": [value]})
    for text in texts:
        assert parse_value(write_yaml({text: 1})) == {text: 1}


def test_flatten_keeps_plain_lists_and_empty_mappings() -> None:
    assert flatten({"a": {"b": [1, 2], "c": {}}, "d": [{"e": 1}]}) == {"a.b": [1, 2], "a.c": {}, "d.0.e": 1}


def test_origins(recipe: Path) -> None:
    _, tree = load_with_tree(recipe, ["trainer.steps=5"])
    assert tree.value_origin(("trainer", "steps")) == "the command line"
    assert tree.value_origin(("trainer", "learning_rate")) == f"{recipe}:5"
    assert tree.value_origin(("trainer", "seed")) is None


@pytest.mark.parametrize("name", list_configs())
def test_every_shipped_config_has_a_header_and_is_yaml(name: str) -> None:
    from mmalign.config.yaml import find_config

    assert find_config(name).read_text().startswith("# ")
    read_tree(name, [])


def test_values_and_sections_given_in_python_are_read_by_the_same_rules() -> None:
    base = {"extends": "shapes/diffusion_dpo", "output": "runs/mine"}
    config = load_config(base, ["trainer.seed=3"], {"trainer": {"steps": 7}, "method": "sft"})
    shipped = load_config("shapes/diffusion_dpo")
    assert (config.output, config.trainer.steps, config.trainer.seed) == ("runs/mine", 7, 3)
    assert config.model == shipped.model and config.trainer.learning_rate == shipped.trainer.learning_rate
    assert config.method_name == "sft" and "beta" not in config.method_options
    assert base == {"extends": "shapes/diffusion_dpo", "output": "runs/mine"}
    with pytest.raises(UserError) as error:
        load_config({"modle": "m"}, sections={"trainer": {"stpes": 7}})
    assert "the config given: modle: unknown key; did you mean 'model'?" in str(error.value)
    assert "the arguments: trainer.stpes: unknown key; did you mean 'steps'?" in str(error.value)
    with pytest.raises(UserError, match="the config given: extends: give the name"):
        load_config({"extends": 3})


@pytest.mark.parametrize(
    ("adapter", "more", "found"),
    [
        ({"kind": "full", "start": "lora"}, {}, "adapter.start: applies to kind: lora only"),
        ({"kind": "full", "init": "kaiming"}, {}, "adapter.init: applies to kind: lora only"),
        (
            {"start": "lora"},
            {"data": {}, "rounds": {"count": 2, "prompts": "p.txt", "rewards": [{"name": "clip"}]}},
            "adapter.start: would be added again to the model of each of the rounds",
        ),
    ],
)
def test_an_adapter_that_the_run_would_misuse_is_refused(adapter, more, found, tmp_path):
    values = {
        "model": "m",
        "method": {"name": "sft"},
        "data": {"pairs": "p"},
        "output": "o",
        "adapter": adapter,
        **more,
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=found):
        load_config(path)
