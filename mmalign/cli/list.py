"""List the available methods, rewards, model families, shipped configs and prompt sets, with their facts.

`mmalign list rewards NAME` prints everything about one reward: facts, options, published files and numbers.
"""

from __future__ import annotations

import argparse
import inspect
import math
import re
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmalign.core.errors import UserError
from mmalign.core.progress import note
from mmalign.core.registry import Registry

if TYPE_CHECKING:
    from mmalign.methods.base import Method
    from pipelines import Generator


class Listing(NamedTuple):
    """A table: its columns, its rows, and a hint how to use a row."""

    columns: list[str]
    rows: list[list[str]]
    hint: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("what", choices=sorted(LISTINGS), help="what to list")
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="only with `list rewards`: one reward, or 'package.module:Class'"
    )


def run(args: argparse.Namespace) -> int:
    """Print the table, or all facts about one reward, on standard output."""
    if args.name is not None:
        if args.what != "rewards":
            raise UserError(
                f"'{args.name}': only rewards are listed one by one; remove the name, or run `mmalign list rewards "
                "NAME`"
            )
        print(_describe(args.name))
        return 0
    listing = LISTINGS[args.what]()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(listing.columns):
        table.add_column(column, no_wrap=index == 0, overflow="fold")
    for row in listing.rows:
        table.add_row(
            *(Text(cell) for cell in row)
        )  # As Text, so that square brackets in a cell are not taken for markup.
    # In a pipe there is no width to fit: one line per row, for grep.
    Console(width=None if sys.stdout.isatty() else 2000, highlight=False).print(table)
    note(f"\n{listing.hint}")
    return 0


def _methods() -> Listing:
    rows = []
    for name, method in _working_methods():
        needs = method.needs
        paper = re.search(r"arXiv[: ](\d{4}\.\d{4,5})", inspect.getdoc(inspect.getmodule(method)) or "")
        rows.append(
            [
                name,
                needs.source,
                "yes" if needs.reference else "no",
                needs.reward,
                needs.modality,
                f"arXiv {paper[1]}" if paper else "",
                f"docs/methods/{name}.md" if method.__module__.startswith("mmalign.methods.") else "",
                _first_line(method),
            ]
        )
    columns = ["method", "learns from", "reference", "reward", "makes", "paper", "objective and curve", "what it does"]
    hint = "Use one as `method: {name: NAME, ...}` in a config; `mmalign list configs` has examples."
    return Listing(columns, rows, hint)


def _working_methods() -> Iterator[tuple[str, type[Method[Any]]]]:
    """Yield the methods; a broken third-party plug-in is a warning, and does not hide the others."""
    from mmalign.methods import methods

    for name in methods.names():
        try:
            yield name, methods.get(name)
        except UserError as error:
            note(f"warning: {error}")


def _rewards() -> Listing:
    from rewards import list_rewards

    rows = []
    for facts in list_rewards():
        bounds = " .. ".join(map(bound, facts.range))
        rows.append(
            [
                facts.name,
                facts.version,
                facts.modality,
                ", ".join(facts.needs) or "nothing",
                "yes" if facts.differentiable else "no",
                bounds if facts.higher_is_better else f"{bounds} (less is more)",
                facts.licence,
                facts.source,
                facts.summary,
            ]
        )
    columns = ["reward", "version", "scores", "needs", "gradient", "range", "licence", "weights", "what it measures"]
    hint = (
        "All about one: `mmalign list rewards NAME`. Use several as `mmalign score ... --rewards NAME,NAME` "
        "(`compare` alike), or one in a config's `rewards:`."
    )
    return Listing(columns, rows, hint)


def _describe(name: str) -> str:
    """Describe a reward: its facts, its docstring, its options with defaults, its files and published numbers."""
    from rewards import Facts, reward_class
    from rewards.goldens import GOLDENS
    from rewards.registry import options_of

    found = reward_class(name)
    facts = Facts.of(found)
    numbers = [f"{one.name}: {one.given} ({one.source})" for one in GOLDENS if one.reward == facts.name]
    entries = {
        "version": facts.version,
        "scores": facts.modality + "s",
        "needs": ", ".join(facts.needs) or "nothing but media",
        "gradient": "yes, to the pixels" if facts.differentiable else "no",
        "range": " .. ".join(map(bound, facts.range)),
        "better": "higher" if facts.higher_is_better else "lower",
        "in a batch": "each scored alone" if facts.batch_invariant else "depends on its neighbours",
        "derived from": ", ".join(facts.derived_from),
        "licence": facts.licence,
        "source": facts.source,
        "files": "\n".join(f"{file} {f'sha256 {file.sha256}' if file.sha256 else ''}" for file in facts.files),
        "citation": facts.citation,
        "numbers": "\n".join(numbers) or "none published",
        "options": "\n".join(_option(*item) for item in (options_of(found) or {}).items()) or "anything",
        "code": inspect.getsourcefile(found) or "",
    }
    lines = [facts.name, "", inspect.getdoc(found) or "", ""]
    for entry, text in entries.items():
        for number, line in enumerate(text.splitlines()):
            lines.append(f"{entry if number == 0 else '':<13} {line.rstrip()}")
    lines += ["", f"mmalign score INPUT --rewards {name} --out scores.parquet    # --option {facts.name}.OPTION=VALUE"]
    return "\n".join(lines)


def _option(name: str, default: object) -> str:
    return f"{name}: must be given" if default is inspect.Parameter.empty else f"{name} = {default!r}"


def _families() -> Listing:
    from pipelines.load import FAMILIES
    from pipelines.vlm.families import FAMILIES as vlm_families

    families = Registry("model family", FAMILIES)
    rows = []
    for pipeline in FAMILIES:
        family = families.get(pipeline)
        rows.append([family.family, pipeline, _first_line(family), _trained_by(family)])
    for name, answering in vlm_families.items():
        rows.append([name, answering.model_class, "answers about images and videos", "every vision-language method"])
    hint = "The family is read from a model's model_index.json or config.json; you never name it."
    return Listing(["family", "diffusers or transformers class", "models", "trained by"], rows, hint)


def _trained_by(generator: type[Generator]) -> str:
    """Return the methods that train a family of image or video generators."""
    flow, video = generator.is_flow, generator.modality == "video"
    working = _working_methods()
    refused = [name for name, one in working if flow and not one.needs.flow or video and not one.needs.video]
    return "every image method" + (f" but {', '.join(refused)}" if refused else "")


def _configs() -> Listing:
    from mmalign.config.yaml import find_config, list_configs

    rows = []
    for name in list_configs():
        text = find_config(name).read_text(encoding="utf-8")
        header = dict(re.findall(r"^# (Run|Needs|Cost): (.*)", text, re.MULTILINE))
        rows.append([name, *(header.get(key, "") for key in ("Run", "Needs", "Cost"))])
    hint = "The first lines of a config say more, such as its result; see its values with `mmalign show-config NAME`."
    return Listing(["config", "run", "needs", "cost"], rows, hint)


def _prompts() -> Listing:
    from mmalign.data.prompts import builtin_prompt_sets, load_prompts

    rows = []
    for name in builtin_prompt_sets():
        prompts = load_prompts(name)
        categories = dict.fromkeys(prompt.category for prompt in prompts if prompt.category)
        rows.append([name, str(len(prompts)), ", ".join(categories)])
    hint = "Use one as `--prompts NAME`; any CSV, TSV, JSONL or TXT file of prompts is taken as well."
    return Listing(["prompts", "count", "categories"], rows, hint)


LISTINGS: dict[str, Callable[[], Listing]] = {
    "methods": _methods,
    "rewards": _rewards,
    "families": _families,
    "configs": _configs,
    "prompts": _prompts,
}


def _first_line(thing: object) -> str:
    return (inspect.getdoc(thing) or "").partition("\n")[0]


def bound(value: float) -> str:
    """Format a bound of a range."""
    return f"{value:g}" if math.isfinite(value) else ("-inf" if value < 0 else "inf")
