"""CSV that spreadsheets show as it is: text that they would run as a formula is quoted, and read back exactly.

A spreadsheet runs a cell that starts with `=`, `+`, `-`, `@`, a tab or a carriage return. Such text is written with
an apostrophe in front, which spreadsheets take as the sign of text. Numbers are left alone.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from typing import TextIO

_FORMULA = re.compile(r"'*[=+\-@\t\r]")


def escape(text: str) -> str:
    """Return the cell for a text: with one more apostrophe in front where it, or what follows its own, is a formula.

    >>> escape("=1+1"), escape("'=1"), escape("it's")
    ("'=1+1", "''=1", "it's")
    """
    return f"'{text}" if _FORMULA.match(text) else text


def unescape(cell: str) -> str:
    """Return the text of a cell that `escape` made."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def write_csv(file: TextIO, rows: Iterable[Sequence[object]]) -> None:
    """Write rows to an open file, text escaped; None is an empty cell."""
    for row in rows:
        line = io.StringIO()
        # A writer quotes the characters that end its own lines, so this one ends them with both.
        csv.writer(line, lineterminator="\r\n").writerow(
            [escape(cell) if isinstance(cell, str) else cell for cell in row]
        )
        file.write(line.getvalue().removesuffix("\r\n") + "\n")
