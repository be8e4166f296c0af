"""CSV that spreadsheets do not run: formulas are quoted, read back exactly, and numbers stay numbers."""

from __future__ import annotations

import csv
import io

import pytest

from mmalign.core.io.spreadsheet import escape, unescape, write_csv


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("=cmd|' /C calc'!A0", "'=cmd|' /C calc'!A0"),
        ("+1", "'+1"),
        ("-x", "'-x"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\tx", "'\tx"),
        ("\rx", "'\rx"),
        ("'=1", "''=1"),  # else its reading would drop the apostrophe
        ("''-", "'''-"),
        ("it's", "it's"),
        ("'quoted'", "'quoted'"),
        ("a=b", "a=b"),
        ("", ""),
    ],
)
def test_a_text_and_its_cell(text, cell):
    assert escape(text) == cell and unescape(cell) == text


@pytest.mark.parametrize("text", ["\rx", "a cat\r=HYPERLINK(1)", "two\nlines", "\r\n", 'a "quoted", one'])
def test_line_ends_stay_within_their_cell(tmp_path, text):
    path = tmp_path / "table.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        write_csv(file, [["prompt", "score"], [text, 1.5]])
    with path.open(newline="", encoding="utf-8") as file:
        (header, (cell, score)) = csv.reader(file)
    assert header == ["prompt", "score"] and (unescape(cell), score) == (text, "1.5")


def test_numbers_are_not_text():
    file = io.StringIO()
    write_csv(file, [["a", "b", "c"], [-1.5, -2, None], ["-1.5", "=2", "x"]])
    assert file.getvalue() == "a,b,c\n-1.5,-2,\n'-1.5,'=2,x\n"
    assert [unescape(cell) for cell in list(csv.reader(file.getvalue().splitlines()))[2]] == ["-1.5", "=2", "x"]
