"""Prompt sets: the built-in ones by name, or any CSV, TSV, JSONL, JSON or TXT file in the layout its authors publish.

Supported without conversion: DrawBench (`Prompts,Category`), PartiPrompts
(`Prompt<TAB>Category<TAB>Challenge<TAB>Note`), GenEval (JSONL with `prompt` and `tag`), and plain text with one prompt
a line.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmalign.core.errors import UserError, nearest
from mmalign.core.files import exists, expand, is_dir, is_file
from mmalign.core.io.columns import PROMPT_COLUMNS
from mmalign.core.io.items import printable
from mmalign.core.io.tables import column, csv_records, json_lines, prompt_column, read_text
from mmalign.core.progress import note
from mmalign.core.resources import resource_root, shipped

CATEGORY_COLUMNS = ("category", "categories", "tag")
FIRST_FRAME_COLUMNS = ("first_frame", "image")
SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".txt")


@dataclass(frozen=True)
class Prompt:
    """One prompt and its category in the set ("" where the set has none).

    `first_frame` is the image that its videos start from, in a column `first_frame` (or `image`) of a table, relative
    to the table; models of a text alone do not look at it.
    """

    text: str
    category: str = ""
    first_frame: Path | None = None


def builtin_prompt_sets() -> dict[str, Path]:
    """Return the prompt sets that ship with mmalign: name -> CSV file."""
    return {path.stem: path for path in sorted((resource_root() / "assets" / "prompts").glob("*.csv"))}


def load_prompts(name_or_path: str | Path, limit: int | None = None) -> list[Prompt]:
    """Return the prompts of a built-in set or a file, in its order, the first `limit` of them if given.

    Duplicates are kept, since published sets contain some, and reported in one line on standard error.

    Raises:
        UserError: no such set or file, an unknown suffix, no prompt column (the columns found are listed), text that
            is not UTF-8, a malformed line (with its number), or no prompt at all.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit {limit}: must be at least 1")
    path = _locate(name_or_path)
    prompts = _parse(path, read_text(path))
    if not prompts:
        raise UserError(f"{path}: holds no prompt")
    prompts = prompts[:limit]
    for number, prompt in enumerate(prompts, start=1):
        if printable(prompt.text) != prompt.text:
            raise UserError(f"{path}: prompt {number} is no text in UTF-8 (it holds half a character); mend it")
    _report_duplicates(path, prompts)
    return prompts


def check_first_frames(prompts: Sequence[Prompt], model: str, needed: bool, fix: str) -> None:
    """Refuse prompts that lack the first frame of their videos, or whose file is missing, before a model is read.

    `needed`: the model makes no video without; else all prompts have one, or none.

    Raises:
        UserError: says how many, and ends with `fix`.
    """
    given = [prompt.first_frame for prompt in prompts if prompt.first_frame is not None]
    if len(given) < len(prompts) and (needed or given):
        lacking = f"{len(prompts) - len(given)} of {len(prompts)} prompts have none"
        raise UserError(f"{model} makes videos of a first frame, and {lacking}; {fix}")
    missing = [path for path in given if not is_file(path)]
    if missing:
        raise UserError(f"{len(missing)} of {len(given)} first frames do not exist, such as {missing[0]}; add them")


def _locate(name_or_path: str | Path) -> Path:
    builtin = builtin_prompt_sets()
    given = expand(name_or_path)
    for path in (given, shipped(given)):
        if path is not None and exists(path) and not is_dir(path):
            return path
    if str(name_or_path) in builtin:
        return builtin[str(name_or_path)]
    if is_dir(given):
        raise UserError(f"prompts '{name_or_path}' is a directory; give a file ({', '.join(SUFFIXES)})")
    neighbours = {str(given.parent / entry.name) for entry in _files_in(given.parent)}
    match = nearest(str(name_or_path), [*builtin, *neighbours])
    hint = f"; did you mean '{match}'?" if match else ""
    known = ", ".join(builtin) or "none here"
    raise UserError(f"prompts '{name_or_path}': no such file, and no such built-in set (built in: {known}){hint}")


def _files_in(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if entry.suffix in SUFFIXES] if is_dir(folder) else []


def _parse(path: Path, content: str) -> list[Prompt]:
    # What is no regular file, such as /dev/stdin or a shell's <(command), has no suffix that tells the format.
    match path.suffix.lower() if is_file(path) else ".txt":
        case ".csv":
            return _from_rows(path, _csv_rows(path, content))
        case ".tsv":
            return _from_rows(path, _tsv_rows(content))
        case ".jsonl":
            return _from_objects(path, [value for _, value in json_lines(path, content.split("\n"))])
        case ".json":
            return _from_objects(path, _json_list(path, content))
        case ".txt":
            return [Prompt(line.strip()) for line in content.split("\n") if line.strip()]
        case other:
            raise UserError(f"{path}: cannot tell the format from '{other}'; use one of {', '.join(SUFFIXES)}")


def _csv_rows(path: Path, content: str) -> list[list[str]]:
    records = csv_records(path, io.StringIO(content, newline=""))
    return [row for _, row in records if any(cell.strip() for cell in row)]


def _tsv_rows(content: str) -> list[list[str]]:
    # PartiPrompts writes quotation marks inside and at the start of a field without escaping them, so the csv
    # module's quoting would eat them; only a field that is quoted as a whole is unwrapped.
    return [[_unquote(cell) for cell in line.split("\t")] for line in content.split("\n") if line.strip()]


def _unquote(cell: str) -> str:
    inner = cell[1:-1]
    quoted = len(cell) >= 2 and cell[0] == cell[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if quoted else cell


def _from_rows(path: Path, rows: list[list[str]]) -> list[Prompt]:
    if not rows:
        return []
    header = [cell.strip() for cell in rows[0]]
    text_column, category_column = prompt_column(header), column(header, CATEGORY_COLUMNS)
    if text_column is None:
        raise UserError(
            f"{path}: no prompt column; found {_listed(header)}, expected one of {', '.join(PROMPT_COLUMNS)} "
            "(any case) in the first line"
        )
    text_at = header.index(text_column)
    category_at = None if category_column is None else header.index(category_column)
    frame_column = column(header, FIRST_FRAME_COLUMNS)
    frame_at = None if frame_column is None else header.index(frame_column)
    prompts = []
    for number, row in enumerate(rows[1:], start=2):
        if len(row) <= text_at or not row[text_at].strip():
            raise UserError(f"{path}: record {number} has no prompt in column '{text_column}'")
        if any(cell.strip() for cell in row[len(header) :]):
            raise UserError(
                f"{path}: record {number} has {len(row)} fields for {len(header)} columns; "
                "put a prompt that contains the separator in quotation marks"
            )
        category, frame = (
            row[at].strip() if at is not None and len(row) > at else "" for at in (category_at, frame_at)
        )
        prompts.append(Prompt(row[text_at].strip(), category, _first_frame(path, frame)))
    return prompts


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names) or "no columns"


def _json_list(path: Path, content: str) -> list[object]:
    try:
        loaded = json.loads(content) if content.strip() else []
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON ({error.msg} in line {error.lineno})") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or nested too deep
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(loaded, list):
        raise UserError(f"{path}: holds a JSON {type(loaded).__name__}; expected a list of prompts or of objects")
    return loaded


def _from_objects(path: Path, objects: list[object]) -> list[Prompt]:
    prompts = []
    for number, entry in enumerate(objects, start=1):
        if isinstance(entry, str):
            entry = {"prompt": entry}
        if not isinstance(entry, dict):
            raise UserError(f"{path}: record {number} is a {type(entry).__name__}; expected an object with 'prompt'")
        text_at, category_at = prompt_column(entry), column(entry, CATEGORY_COLUMNS)
        text = entry[text_at] if text_at is not None else None
        if not isinstance(text, str) or not text.strip():
            raise UserError(
                f"{path}: record {number} has no prompt text; found {_listed(entry)}, "
                f"expected one of {', '.join(PROMPT_COLUMNS)}"
            )
        category = entry[category_at] if category_at is not None else ""
        frame_at = column(entry, FIRST_FRAME_COLUMNS)
        frame = entry[frame_at] if frame_at is not None else None
        prompts.append(Prompt(text.strip(), str(category), _first_frame(path, frame)))
    return prompts


def _first_frame(table: Path, given: object) -> Path | None:
    return table.parent / given if isinstance(given, str) and given else None


def _report_duplicates(path: Path, prompts: list[Prompt]) -> None:
    counted = Counter((prompt.text, prompt.first_frame) for prompt in prompts)
    repeated = {key: n for key, n in counted.items() if n > 1}
    if repeated:
        extra = sum(repeated.values()) - len(repeated)
        note(
            f"{path}: {extra} of {len(prompts)} prompts repeat an earlier one (kept), e.g. '{next(iter(repeated))[0]}'"
        )
