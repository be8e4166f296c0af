"""Whatever a file or an argument holds: a valid plan, or exit code 2 and one line for each fault; never a traceback.

Hypothesis makes the inputs. The quick tests take seconds; the slow ones (`make test-all`) make many more.
"""

from __future__ import annotations

import io
import json
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mmalign.cli import main
from mmalign.config.yaml import parse_value
from mmalign.core.errors import UserError
from mmalign.core.io.spreadsheet import escape, unescape

QUICK = settings(
    max_examples=40, deadline=20_000, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)
DEEP = settings(QUICK, max_examples=1500)
CONFIG = """\
model: assets/shapes-sd
method: {name: sft}
data: {labels: labels.parquet}
adapter: {kind: lora, rank: 4}
trainer: {steps: 3, learning_rate: 1.0e-4, betas: [0.9, 0.99], seed: 1}
evaluate: {prompts: shapes-validation, every: 2, rewards: [shapes-quality]}
output: out
"""
HARD = ["", "~", "null", ".nan", ".inf", "-1", "0", "1e400", "9" * 400, "[", "{}", "[]", "&a", "*a", "!!int x", "a: b"]
HARD += [
    "os:system",
    ":",
    "..:x",
    "\x00",
    "\ud800",
    "²",
    "~nobody/x",
    "/" * 300,
    "x" * 300,
    "#",
    "'",
    '"',
    "- a",
    "<<",
]
words = st.one_of(st.sampled_from(HARD), st.text(max_size=12), st.integers().map(str), st.floats().map(repr))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder, before = tmp_path_factory.mktemp("fuzz"), Path.cwd()
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (9, 99, 200)).save(buffer, "PNG")
    (folder / "a.png").write_bytes(buffer.getvalue())
    picture = buffer.getvalue()
    labels = {"image": [picture] * 40, "caption": ["a star"] * 40, "label": ["1"] * 40}
    pairs = {"jpg_0": [picture] * 40, "jpg_1": [picture] * 40, "caption": ["a"] * 40}
    pq.write_table(pa.table(labels), folder / "labels.parquet")
    pq.write_table(pa.table({**pairs, "label_0": [1.0] * 40, "label_1": [0.0] * 40}), folder / "pairs.parquet")
    os.chdir(folder)
    yield folder
    os.chdir(before)


def holds(arguments: list[str]) -> int:
    """Run a command and check the promise; returns the exit code."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(arguments)
    said = err.getvalue()
    assert "Traceback" not in said, f"{arguments}\n{said[-1500:]}"
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert (code == 2) == bool(errors), f"{arguments}: {code}\n{said[-500:]}"
    assert code in (0, 2, 3) and all(len(line) < 2000 for line in errors)
    return code


def written(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return path


@contextmanager
def mutated(path: Path, seed: int, cut: float, changes: int) -> Iterator[Path]:
    """Yield a copy of a file with some bytes changed, cut off at a share of its length."""
    random_, raw = random.Random(seed), bytearray(path.read_bytes())
    raw = raw[: max(1, int(len(raw) * cut))]
    for _ in range(changes):
        raw[random_.randrange(len(raw))] = random_.randrange(256)
    yield written(path.with_name(f"mutated{path.suffix}"), bytes(raw))


def config_text(place: Path, line: int, kept: int, word: str) -> None:
    lines = CONFIG.splitlines()
    lines[line] = lines[line][:kept] + word
    written(place / "c.yaml", "\n".join(lines))
    holds(["show-config", "c.yaml"])


LINES = (st.integers(0, 6), st.integers(0, 60), words)


@QUICK
@given(*LINES)
def test_configs(place: Path, line: int, kept: int, word: str) -> None:
    config_text(place, line, kept, word)


@pytest.mark.slow
@DEEP
@given(*LINES)
def test_many_configs(place: Path, line: int, kept: int, word: str) -> None:
    config_text(place, line, kept, word)


KEYS = "model method method.name data data.labels data.resolution adapter.rank adapter.targets trainer trainer.steps "
KEYS += "trainer.betas trainer.seed trainer.learning_rate evaluate evaluate.rewards evaluate.rewards.0 output rewards "
KEYS += "rewards.0.name rewards.0.weight rounds rounds.count monitors.action extends a.b.c trainer.² .. ="
OVERRIDES = (st.one_of(st.sampled_from(KEYS.split()), st.text(max_size=8)), words)


def overridden(place: Path, key: str, word: str) -> None:
    written(place / "c.yaml", CONFIG)
    if f"{key}={word}".startswith("-"):
        return  # an option, as argparse has it
    holds(["show-config", "c.yaml", f"{key}={word}"])


@QUICK
@given(*OVERRIDES)
def test_overrides(place: Path, key: str, word: str) -> None:
    overridden(place, key, word)


@pytest.mark.slow
@DEEP
@given(*OVERRIDES)
def test_many_overrides(place: Path, key: str, word: str) -> None:
    overridden(place, key, word)


@QUICK
@given(st.text(max_size=40))
def test_values_are_read_or_refused(text: str) -> None:
    try:
        json.dumps(parse_value(text))
    except UserError as error:
        assert "\n" not in str(error)


@QUICK
@given(st.one_of(st.text(max_size=9), st.sampled_from(["=1", "'=1", "''-x", "-", "\t", "\r"])))
def test_cells_are_read_back(text: str) -> None:
    assert unescape(escape(text)) == text
    assert not escape(text).startswith(("=", "+", "-", "@", "\t", "\r"))


values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.floats(), st.integers(), st.text(max_size=8), st.sampled_from(HARD)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)
rows = st.fixed_dictionaries({}, optional={key: values for key in ("image", "prompt", "file_name", "jpg_0", "label")})
TABLES = (
    st.lists(rows, max_size=4),
    st.sampled_from(["t.jsonl", "t.csv", "t.tsv", "t.json"]),
    st.one_of(st.just(""), st.text(max_size=10), st.sampled_from(['"', "[" * 5000, "9" * 5000, "\x00", "\ufeff"])),
)


def table(place: Path, rows: list[dict[str, object]], name: str, tail: str) -> None:
    if name.endswith(("v", "tsv")):
        sign = "," if name.endswith(".csv") else "\t"
        text = f"image{sign}prompt\n" + "".join(f"{row.get('image')}{sign}{row.get('prompt')}\n" for row in rows)
    else:
        text = "".join(json.dumps({"image": "a.png", **row}) + "\n" for row in rows)
    written(place / name, text + tail)
    for out in ("o.csv", "o.csv.meta.json", "o.csv.parts"):
        (place / out).unlink(missing_ok=True) if (place / out).is_file() else None
    if name != "t.json":
        holds(["score", name, "--rewards", "jpeg-compressibility", "--out", "o.csv", "--skip-bad"])
        holds(["train", "shapes/diffusion_dpo", f"data.pairs={name}", "evaluate=null", "output=o", "--dry-run"])
    holds(["generate", "assets/none", "--prompts", name, "--out", "g"])


@settings(QUICK, max_examples=20)
@given(*TABLES)
def test_tables(place: Path, rows: list[dict[str, object]], name: str, tail: str) -> None:
    table(place, rows, name, tail)


@pytest.mark.slow
@settings(DEEP, max_examples=400)
@given(*TABLES)
def test_many_tables(place: Path, rows: list[dict[str, object]], name: str, tail: str) -> None:
    table(place, rows, name, tail)


DAMAGE = (st.integers(0, 2**32), st.sampled_from([1.0, 1.0, 0.99, 0.5, 0.01]), st.integers(0, 30))


def damaged(place: Path, seed: int, cut: float, changes: int) -> None:
    commands: list[tuple[str, Callable[[str], list[str]]]] = [
        ("labels.parquet", lambda name: ["train", "c.yaml", f"data.labels={name}", "evaluate=null", "--dry-run"]),
        ("labels.parquet", lambda name: ["score", name, "--rewards", "jpeg-compressibility", "--out", "d.parquet"]),
        (
            "pairs.parquet",
            lambda name: ["train", "shapes/diffusion_dpo", f"data.pairs={name}", "evaluate=null", "--dry-run"],
        ),
    ]
    written(place / "c.yaml", CONFIG)
    for file, command in commands:
        with mutated(place / file, seed, cut, changes) as path:
            holds(command(path.name))
        (place / "d.parquet").unlink(missing_ok=True)


@settings(QUICK, max_examples=6)
@given(*DAMAGE)
def test_damaged_parquet(place: Path, seed: int, cut: float, changes: int) -> None:
    damaged(place, seed, cut, changes)


@pytest.mark.slow
@settings(DEEP, max_examples=400)
@given(*DAMAGE)
def test_many_damaged_parquets(place: Path, seed: int, cut: float, changes: int) -> None:
    damaged(place, seed, cut, changes)
