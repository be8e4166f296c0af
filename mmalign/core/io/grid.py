"""Grids of images as one picture: prompts by seeds or systems, or a list of images with a label each."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mmalign.core.io.images import tensor_to_image
from rewards.combining.on_frames import evenly

GAP = 4
FONT_SIZE = 13
LABEL_WIDTH = 200
MIN_CELL = 96
BACKGROUND = "white"
INK = (40, 40, 40)
Cell = Tensor | Image.Image | None


def image_grid(
    rows: Sequence[Sequence[Cell]],
    *,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    cell: int | None = None,
    column_label_lines: int = 2,
    row_label_width: int = LABEL_WIDTH,
) -> Image.Image:
    """Draw images (PIL, or tensors `[3, H, W]` in [0, 1]; None leaves a hole) in a grid with labels at left and top.

    `cell` is the edge of a cell in pixels; by default the largest image's, but at least 96, so that tiny images can
    be seen. Images keep their proportions; enlarged ones keep their pixels sharp. Labels wrap and
    are cut with an ellipsis.

    Raises:
        ValueError: there is no image, or the number of labels does not fit.
    """
    pictures = [[tensor_to_image(item) if isinstance(item, Tensor) else item for item in row] for row in rows]
    sizes = [max(picture.size) for row in pictures for picture in row if picture is not None]
    columns = max((len(row) for row in pictures), default=0)
    if not sizes:
        raise ValueError("a grid needs at least one image")
    for name, labels, count in (("row", row_labels, len(pictures)), ("column", column_labels, columns)):
        if labels is not None and len(labels) != count:
            raise ValueError(f"{len(labels)} {name} labels for {count} {name}s")
    edge = cell or max(MIN_CELL, *sizes)
    font = ImageFont.load_default(FONT_SIZE)
    left = row_label_width + GAP if row_labels is not None else GAP
    top = column_label_lines * _line_height(font) + 2 * GAP if column_labels is not None else GAP
    canvas = Image.new("RGB", (left + columns * (edge + GAP), top + len(pictures) * (edge + GAP)), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for column, label in enumerate(column_labels or ()):
        _write(draw, label, (left + column * (edge + GAP), GAP, edge - GAP, top - GAP), font)
    for row, row_pictures in enumerate(pictures):
        y = top + row * (edge + GAP)
        if row_labels is not None:
            _write(draw, row_labels[row], (GAP, y, row_label_width - GAP, edge), font)
        for column, picture in enumerate(row_pictures):
            if picture is not None:
                _place(canvas, picture, (left + column * (edge + GAP), y), edge)
    return canvas


def frame_strips(
    videos: Sequence[Tensor], labels: Sequence[str], *, frames: int = 8, cell: int | None = None
) -> Image.Image:
    """Draw videos, tensors `[F, 3, H, W]` in [0, 1], one a row: up to so many of its frames, spread evenly over it."""
    rows = [[video[frame] for frame in evenly(len(video), frames)] for video in videos]
    return image_grid(rows, row_labels=labels, cell=cell)


def labelled_grid(images: Sequence[Cell], labels: Sequence[str], *, columns: int = 6) -> Image.Image:
    """Draw images in rows of `columns`, each under its own label.

    Raises:
        ValueError: there is no image, or not one label for each.
    """
    if len(images) != len(labels) or not images:
        raise ValueError(f"{len(labels)} labels for {len(images)} images; a grid needs one for each, and an image")
    columns = min(columns, len(images))
    strips = [
        image_grid(
            [[*images[start : start + columns], *[None] * (start + columns - len(images))]],
            column_labels=[*labels[start : start + columns], *[""] * (start + columns - len(images))],
        )
        for start in range(0, len(images), columns)
    ]
    return stack(strips)


def stack(pictures: Sequence[Image.Image]) -> Image.Image:
    """Put pictures below each other, aligned at the left."""
    size = max(picture.width for picture in pictures), sum(picture.height for picture in pictures)
    canvas, top = Image.new("RGB", size, BACKGROUND), 0
    for picture in pictures:
        canvas.paste(picture, (0, top))
        top += picture.height
    return canvas


def _place(canvas: Image.Image, picture: Image.Image, corner: tuple[int, int], edge: int) -> None:
    scale = edge / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    if size != picture.size:
        # Interpolation would hide what a small image truly shows; shrinking without it would alias.
        method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
        picture = picture.resize(size, method)
    canvas.paste(picture.convert("RGB"), (corner[0] + (edge - size[0]) // 2, corner[1] + (edge - size[1]) // 2))


def _line_height(font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    left, top, right, bottom = font.getbbox("Ag")
    return round(bottom - top) + 4


def _write(
    draw: ImageDraw.ImageDraw,
    text: str,
    box: tuple[int, int, int, int],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    """Write wrapped text into a box (x, y, width, height); what does not fit ends in an ellipsis."""
    x, y, width, height = box
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and draw.textlength(longer, font=font) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    room = max(1, height // _line_height(font))
    if len(lines) > room:
        lines = [*lines[: room - 1], f"{lines[room - 1]}…"]
    for number, line in enumerate(lines):
        while len(line) > 1 and draw.textlength(line, font=font) > width:
            line = f"{line.rstrip('…')[:-1]}…"
        draw.text((x, y + number * _line_height(font)), line, fill=INK, font=font)
