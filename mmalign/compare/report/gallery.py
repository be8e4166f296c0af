"""The cards of the report: each prompt with its images or videos, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmalign.compare.report.clips import Clip, embed_clip, fit_clips
from mmalign.compare.report.thumbnails import MAX_SIDE, Thumbnail, choose_prompts, embed
from mmalign.compare.results.comparison import Comparison

MOST_KINDS = 4
"""Sizes, lengths and rates of videos that a note lists; folders of videos made elsewhere may hold many."""


def media_gallery(comparison: Comparison) -> dict[str, Any]:
    """Return the cards of the prompts, each with its media by seed and system."""
    return (_videos if comparison.modality == "video" else _images)(comparison)


def _images(comparison: Comparison) -> dict[str, Any]:
    paths = comparison.image_paths
    shown = choose_prompts(len(comparison.prompts), len(paths) * len(comparison.seeds))
    held = {i: [embed(paths[name][i][column]) for name, column in _cells(comparison)] for i in shown}
    notes = _left_out(comparison, shown)
    if any(image.shrunk for row in held.values() for image in row):
        notes.append(f"Images larger than {MAX_SIDE} px are shown as thumbnails; scores are those of the originals.")
    return {"cards": _cards(comparison, held), "shown": shown, "notes": notes}


def _videos(comparison: Comparison) -> dict[str, Any]:
    paths, cells = comparison.image_paths, _cells(comparison)
    held = fit_clips(
        len(comparison.prompts),
        len(cells),
        lambda index, quality: [embed_clip(paths[name][index][column], quality) for name, column in cells],
    )
    shown, clips = list(held), [clip for row in held.values() for clip in row]
    notes = [*(_geometry(clips) if clips else []), *_left_out(comparison, shown)]
    if clips and not clips[0].uri:
        notes.append("This PyAV writes neither H.264 nor VP9, so that the page has frames alone.")
    return {"cards": _cards(comparison, held), "shown": shown, "notes": notes, "clips": True}


def _geometry(clips: Sequence[Clip]) -> list[str]:
    """Say what the videos are, and how their copies differ from them."""
    kinds = dict.fromkeys(
        f"{clip.frames} frames of {clip.width} × {clip.height} px at {clip.rate:g} a second" for clip in clips
    )
    if len(kinds) > MOST_KINDS:
        kinds = dict.fromkeys([*list(kinds)[:MOST_KINDS], f"{len(kinds) - MOST_KINDS} other kinds"])
    shrunk = " smaller" if any(clip.shrunk for clip in clips) else ""
    return [f"Videos: {'; '.join(kinds)}. Shown are{shrunk} compressed copies; scores are those of the originals."]


def _left_out(comparison: Comparison, shown: Sequence[int]) -> list[str]:
    if len(shown) == len(comparison.prompts):
        return []
    kind = f"{comparison.modality}s"
    return [
        f"Shown: {len(shown)} of {len(comparison.prompts)} prompts, evenly spaced over the set and not picked by "
        f"score, to keep the page light; all {kind} are in the folder {kind} beside this page."
    ]


def _cells(comparison: Comparison) -> list[tuple[str, int]]:
    """Return system and column of every cell of a card, row by row."""
    return [(name, column) for column in range(len(comparison.seeds)) for name in comparison.systems]


def _cards(comparison: Comparison, held: Mapping[int, Sequence[Thumbnail | Clip]]) -> list[dict[str, Any]]:
    cards = []
    for position, (index, media) in enumerate(held.items()):
        by_cell = dict(zip(_cells(comparison), media, strict=True))
        rows = [
            {"seed": seed, "column": column, "media": {name: by_cell[name, column] for name in comparison.systems}}
            for column, seed in enumerate(comparison.seeds)
        ]
        prompt, category = comparison.prompts[index], comparison.categories[index]
        cards.append(
            {"position": position, "number": index + 1, "prompt": prompt.text, "category": category, "rows": rows}
        )
    return cards
