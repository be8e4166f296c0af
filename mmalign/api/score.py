"""Score from Python: images as objects, files or tables; rewards by name, as classes, or made already."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from mmalign.api import html
from mmalign.api.generate import Images
from mmalign.api.objects import image_bytes, plain
from mmalign.core.errors import UserError
from mmalign.core.io.decode import Frames
from mmalign.core.io.items import Item
from mmalign.scoring.choice import Choice, WeightedReward
from mmalign.scoring.run import Outcome, ScoreSettings, common_modality, score_files, score_in_memory

_SHOWN_ROWS = 20


class Scores(Sequence[dict[str, Any]]):
    """Scores as a table: one row an item, one column a reward, and `total` where rewards have weights.

    `scores[0]` is a row (`id`, `prompt`, a number a reward or None, `error` where there is none), `scores["clip"]` a
    column of floats, NaN where there is no score.
    """

    def __init__(self, outcome: Outcome) -> None:
        """Keep what `mmalign.scoring.run` returned."""
        self.outcome = outcome
        self.columns = list(outcome.columns)

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self.outcome.rows)

    def __getitem__(self, index: Any) -> Any:
        """Return a row by number, rows by slice, or a column by its name.

        Raises:
            KeyError: there is no such column.
        """
        if isinstance(index, str):
            if index not in self.columns:
                raise KeyError(f"no column '{index}'; there are {', '.join(self.columns)}")
            place = self.columns.index(index)
            return [row.scores[place] for row in self.outcome.rows]
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        row = self.outcome.rows[index]
        scores = (value if value == value else None for value in row.scores)
        cells = {"id": row.id, "prompt": row.prompt, **dict(zip(self.columns, scores, strict=True))}
        return cells | ({"error": row.error} if row.error else {})

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield every row."""
        return (self[index] for index in range(len(self)))

    @property
    def summary(self) -> dict[str, dict[str, float]]:
        """Mean, std (population), min, max of each column, and how many are missing."""
        names = ("mean", "std", "min", "max", "missing")
        return {column: dict(zip(names, self.outcome.summary(column), strict=True)) for column in self.columns}

    def to_pandas(self) -> Any:
        """Return a `pandas.DataFrame` with the same rows.

        Raises:
            UserError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise UserError("to_pandas needs pandas: pip install pandas") from None
        return pandas.DataFrame(list(self))

    def _repr_html_(self) -> str:
        means = [[column, *numbers.values()] for column, numbers in self.summary.items()]
        head = ["item", "prompt", *self.columns]
        rows = [
            [row["id"], row["prompt"] or "", *("" if row[name] is None else row[name] for name in self.columns)]
            for row in self[:_SHOWN_ROWS]
        ]
        left = len(self) - len(rows)
        more = f"<div>and {left} more</div>" if left else ""
        summary = html.table(["reward", "mean", "std", "min", "max", "no score"], means)
        return f"<div>{summary}{html.table(head, rows)}{more}</div>"


def score(
    images: Any,
    prompts: str | Sequence[str] | None = None,
    rewards: Any = "clip",
    *,
    output: str | os.PathLike[str] | None = None,
    skip_bad: bool = False,
    batch_size: int = 32,
    workers: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    frames: int | None = None,
    fps: float | None = None,
) -> Scores:
    """Score images or videos by one or more rewards, like `mmalign score`.

    ```python
    scores = mmalign.score(images, "a red circle", rewards=["shapes-clip", MyReward])
    scores["shapes-clip"]  # floats, one an image
    ```

    Args:
        images: what `mmalign.generate` returned; a list of PIL images, paths, bytes, 8-bit arrays `[H, W, 3]`, or
            tensors `[3, H, W]` in [0, 1] (rounded to 8 bits, as in a file); a tensor `[N, 3, H, W]`; rows with
            `image` and `prompt`; or, as on the command line, a folder, a glob, a table or a webdataset tar. Videos are
            given as files.
        prompts: one text for all, or one for each; by default those that come with the images.
        rewards: a name, "a,b:0.5" or a YAML file; a reward class, or one that is made already; a mapping with `name`
            and optionally `label`, `weight` and `options`; a mapping name -> weight; or a list of these.
        output: a .parquet, .csv or .jsonl file that keeps the scores: the same call again scores only what is new.
            Only for files, and for rewards that are named or classes.
        skip_bad: go on without what cannot be scored. batch_size: media at once. workers: threads that decode.
        device, dtype: of the rewards (not of those made already). frames, fps: which frames of a video are scored.

    Raises:
        UserError, RewardError: there is no such reward, a prompt is missing, or something cannot be scored.
    """
    from mmalign.scoring.checks import check_device

    check_device(device)
    chosen = _choices(rewards)
    made = {choice.label: reward for choice, reward in chosen if reward is not None}
    choices = [choice for choice, _ in chosen]
    one = prompts if isinstance(prompts, str) else None
    settings = ScoreSettings(one, skip_bad, batch_size, workers, device, dtype, Frames(frames, fps))
    if output is not None:
        if made or not _names_files(images) or (prompts is not None and one is None):
            raise UserError(
                "output: keeps the scores of files by rewards that are named, with one prompt or their own; leave it "
                "out, or give such"
            )
        from mmalign.scoring.results import check_format

        check_format(Path(output))
        return Scores(score_files(_paths(images), choices, Path(output), settings))
    modality = _modality(choices, made)
    items = _items(images, prompts, modality)
    loaded = _load(choices, made, items, modality, settings)
    return Scores(score_in_memory(items, choices, loaded, modality, settings))


def _choices(rewards: Any) -> list[tuple[Choice, Any]]:
    """Return what was asked for, each with the reward where it is made already."""
    from mmalign.scoring.chosen import check_labels, check_weight, read_choices
    from rewards import Reward

    found: list[tuple[Choice, Any]] = []
    listed = [rewards] if isinstance(rewards, str | Path | Mapping | type | Reward) else list(rewards)
    for one in listed:
        if isinstance(one, Reward):
            found.append((Choice(one.name or type(one).__name__, one.name or type(one).__name__), one))
        elif isinstance(one, type):
            found.append((Choice(plain(one, "rewards"), getattr(one, "name", one.__name__)), None))
        elif isinstance(one, Mapping) and "name" in one:
            values = plain(one, "rewards")
            name = values.pop("name")
            label, weight, options = values.pop("label", name), values.pop("weight", None), values.pop("options", {})
            if values:
                raise UserError(f"rewards: '{name}' has {', '.join(values)}; known: name, label, weight, options")
            check_weight(label, weight)
            found.append((Choice(name, label, weight, options), None))
        elif isinstance(one, Mapping):
            for name, weight in plain(one, "rewards").items():
                check_weight(name, weight)
                found.append((Choice(name, name, weight), None))
        else:
            found += [(choice, None) for choice in read_choices(plain(one, "rewards"))]
    if not found:
        raise UserError("rewards: none are given; see `mmalign list rewards`")
    check_labels([choice for choice, _ in found])
    return found


def _modality(choices: Sequence[Choice], made: Mapping[str, Any]) -> str:
    from mmalign.scoring.checks import check_usable
    from rewards import Facts

    named = [choice for choice in choices if choice.label not in made]
    modality = common_modality(named) if named else next(iter(made.values())).modality
    for label, reward in made.items():
        check_usable(Facts.of(reward), label, modality)
    return str(modality)


def _load(
    choices: Sequence[Choice],
    made: Mapping[str, Any],
    items: Sequence[Item],
    modality: str,
    settings: ScoreSettings,
) -> list[WeightedReward]:
    """Return the rewards in the order of the choices, those loaded here that are not made already."""
    from mmalign.scoring.chosen import load_choices

    prompts = list(dict.fromkeys(item.prompt for item in items if item.prompt is not None))
    named = [choice for choice in choices if choice.label not in made]
    loaded = load_choices(named, prompts, modality=modality, device=settings.device, dtype=settings.dtype)
    by_label = {entry.name: entry for entry in loaded}
    for label, reward in made.items():
        reward.check_prompts(prompts)
        by_label[label] = WeightedReward(label, 1.0, reward)
    return [by_label[choice.label] for choice in choices]


def _names_files(images: Any) -> bool:
    parts = [images] if isinstance(images, str | Path) else images
    return isinstance(parts, list | tuple) and len(parts) > 0 and all(isinstance(one, str | Path) for one in parts)


def _paths(images: Any) -> list[str]:
    return [str(images)] if isinstance(images, str | Path) else [str(one) for one in images]


def _items(images: Any, prompts: str | Sequence[str] | None, modality: str) -> list[Item]:
    """Return what is to be scored, each with its prompt; objects are encoded when their turn comes."""
    if _names_files(images):
        from mmalign.scoring.inputs import find_items

        found = find_items(_paths(images), modality).items
        texts = _texts(prompts, len(found)) or [item.prompt for item in found]
        return [replace(item, prompt=text) for item, text in zip(found, texts, strict=True)]
    if modality != "image":
        raise UserError(f"images: the rewards judge {modality}s; give files, a folder, or a table")
    own: list[str | None] | None = None
    if isinstance(images, Images):
        images, own = images.images, list(images.prompts)
    if isinstance(images, Tensor | np.ndarray):
        images = list(images) if images.ndim == 4 else [images]
    listed: list[Any] = [images] if isinstance(images, Image.Image | bytes | Mapping) else list(images)
    if all(isinstance(one, Mapping) and "image" in one for one in listed):
        listed, own = [row["image"] for row in listed], [row.get("prompt") for row in listed]
    if not listed:
        raise UserError("images: none are given")
    given = _texts(prompts, len(listed)) or own or [None] * len(listed)
    return [
        Item(f"image {index}", partial(image_bytes, one, f"image {index}"), text)
        for index, (one, text) in enumerate(zip(listed, given, strict=True))
    ]


def _texts(prompts: str | Sequence[str] | None, count: int) -> list[str | None] | None:
    if prompts is None:
        return None
    texts: list[str | None] = [prompts] * count if isinstance(prompts, str) else list(prompts)
    if len(texts) != count:
        raise UserError(f"prompts: {len(texts)} are given for {count} images; give one for all, or one for each")
    return texts
