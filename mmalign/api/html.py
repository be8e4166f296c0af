"""What results show in a notebook: tables, curves and images as HTML; all text is escaped."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from PIL import Image

from mmalign.core.io.images import encode_png

WIDTH, HEIGHT = 320, 120
"""Size of a curve in pixels."""
_MARGIN = 18


def escape(value: Any) -> str:
    """Return a value as text that HTML shows as it is; numbers with four significant digits."""
    return html.escape(f"{value:.4g}" if isinstance(value, float) else str(value))


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]], caption: str = "") -> str:
    """Return a table of text and numbers."""
    lines = ["<table>", *([f"<caption>{escape(caption)}</caption>"] if caption else [])]
    lines.append("<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>")
    lines += ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return "\n".join([*lines, "</table>"])


def image(picture: Image.Image, *, edge: int = 128) -> str:
    """Return an image inside the page, enlarged to an `edge` of so many pixels if it is smaller; its pixels sharp."""
    data = base64.b64encode(encode_png(picture)).decode()
    scale = max(1.0, edge / max(picture.size))
    width, height = (round(side * scale) for side in picture.size)
    style = "image-rendering: pixelated" if scale > 1 else ""
    return f'<img width="{width}" height="{height}" style="{style}" src="data:image/png;base64,{data}">'


def image_table(rows: Mapping[str, Sequence[str]] | Sequence[tuple[str, Sequence[str]]], head: Sequence[Any]) -> str:
    """Return a table with a label at the left of each row of cells that are HTML already."""
    pairs = rows.items() if isinstance(rows, Mapping) else rows
    lines = ["<table>", "<tr><th></th>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    for label, cells in pairs:
        lines.append(f"<tr><td>{escape(label)}</td>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return "\n".join([*lines, "</table>"])


def curve(title: str, points: Sequence[tuple[float, float]]) -> str:
    """Return an SVG line through (x, y), with the range of both written at the corners."""
    xs, ys = zip(*points, strict=True)
    left, right, low, high = min(xs), max(xs), min(ys), max(ys)

    def place(value: float, start: float, end: float, length: int) -> float:
        return _MARGIN + (value - start) / ((end - start) or 1.0) * (length - 2 * _MARGIN)

    path = " ".join(
        f"{place(x, left, right, WIDTH):.1f},{HEIGHT - place(y, low, high, HEIGHT):.1f}" for x, y in points
    )
    text = 'font-size="10" fill="currentColor"'
    return (
        f'<svg width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{escape(title)}">'
        f'<text x="2" y="11" {text}>{escape(title)}: {escape(float(ys[0]))} to {escape(float(ys[-1]))}</text>'
        f'<text x="{WIDTH - 2}" y="{HEIGHT - 4}" text-anchor="end" {text}>step {escape(right)}</text>'
        f'<polyline fill="none" stroke="#3b76c0" stroke-width="1.5" points="{path}"/></svg>'
    )
