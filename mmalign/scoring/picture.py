"""The best and the worst of a run as one picture: for each reward two rows, with scores and prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mmalign.core.errors import UserError
from mmalign.core.files import write_atomically
from mmalign.core.io.decode import Frames, decode
from mmalign.core.io.grid import image_grid, stack
from mmalign.core.io.images import encode_png
from mmalign.core.io.items import Item
from mmalign.scoring.run import Outcome

SHOWN = 6
CELL = 160


def write_picture(outcome: Outcome, path: Path, frames: Frames) -> None:
    """Draw for every column its highest and its lowest `SHOWN`, the better end first; videos by their middle frame.

    Raises:
        UserError: nothing has a score.
    """
    strips = []
    better = {entry.name: entry.reward.higher_is_better for entry in outcome.rewards}
    for index, column in enumerate(outcome.columns):
        scores = np.array([row.scores[index] for row in outcome.rows])
        present = np.flatnonzero(np.isfinite(scores))
        if not len(present):
            continue
        rising = present[np.argsort(scores[present], kind="stable")]
        best, worst = rising[::-1][:SHOWN], rising[:SHOWN]
        if not better.get(column, True):
            best, worst = worst, best
        for name, chosen in (("best", best), ("worst", worst)):
            strips.append(_strip(f"{column} {name}", outcome, chosen.tolist(), scores, frames))
    if not strips:
        raise UserError("nothing has a score, so there is nothing to draw")
    write_atomically(path, encode_png(stack(strips)))


def _strip(title: str, outcome: Outcome, chosen: Sequence[int], scores: np.ndarray, frames: Frames) -> Image.Image:
    pictures = [_thumbnail(outcome.items[index], outcome.modality, frames) for index in chosen]
    labels = [f"{scores[index]:.4g} · {outcome.rows[index].prompt or ''}" for index in chosen]
    missing = SHOWN - len(chosen)
    return image_grid(
        [[*pictures, *[None] * missing]],
        row_labels=[title],
        column_labels=[*labels, *[""] * missing],
        cell=CELL,
        column_label_lines=3,
        row_label_width=150,
    )


def _thumbnail(item: Item, modality: str, frames: Frames) -> Image.Image:
    levels = decode(item.media() if callable(item.media) else item.media, modality, frames)
    if modality == "video":
        levels = levels[len(levels) // 2]
    picture = Image.fromarray(levels.permute(1, 2, 0).numpy())
    if max(picture.size) > CELL:
        picture.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
    return picture
