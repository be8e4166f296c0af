"""Describe a video by the captions of its clips, in any order: TEMPLE's released pipeline (arXiv 2503.16929).

The model captions every clip; the same model then writes one paragraph from the list of captions alone, or the
captions are joined. Unlike in TEMPLE, a clip is shown whole and without the one before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from mmalign.data.batches import TimedMedia
from mmalign.data.video.answering import Answerer, Request
from mmalign.data.video.events import clip_lengths
from mmalign.data.video.items import VideoItem
from mmalign.data.video.reading import VideoReader

CAPTION = "Describe what happens in this clip in one sentence."
COMPOSE = (
    "Here are descriptions of the clips of one video, in the order in which they are shown:\n{}\n"
    "Retell the whole video in one paragraph, in this order and without mentioning clips."
)


def tell_clips(
    items: Sequence[VideoItem],
    orders: Sequence[Sequence[Sequence[int]]],
    reader: VideoReader,
    answerer: Answerer,
    seed_of: Callable[[str], int | None],
    *,
    compose: bool,
) -> list[list[str]]:
    """Return for every item a text for each of its orders, which are numbers of clips.

    `seed_of` gives the seed of an answer by its name; with `compose` the model writes the text.
    """
    captions = _captions(items, reader, answerer, seed_of)
    lists = [[[own[number] for number in order] for order in each] for own, each in zip(captions, orders, strict=True)]
    if not compose:
        return [[" ".join(_sentence(caption) for caption in one if caption) for one in each] for each in lists]
    requests = [
        Request(COMPOSE.format("\n".join(f"{k}. {text}" for k, text in enumerate(one, 1))), "", _nothing, seed)
        for item, each in zip(items, lists, strict=True)
        for seed in [seed_of(f"{item.id}/compose")]
        for one in each
    ]
    composed = iter(answerer.answer(requests, "compose descriptions"))
    return [[next(composed) for _ in each] for each in lists]


def _captions(
    items: Sequence[VideoItem], reader: VideoReader, answerer: Answerer, seed_of: Callable[[str], int | None]
) -> list[list[str]]:
    lengths = [clip_lengths(reader.states(item)) for item in items]
    requests = [
        Request(
            CAPTION,
            f"{reader.media_id(item)}+clip {number} of {own}",
            partial(reader.show_clip, item, number),
            seed_of(f"{item.id}/clip/{number}"),
        )
        for item, own in zip(items, lengths, strict=True)
        for number in range(len(own))
    ]
    answers = iter(answerer.answer(requests, "caption clips"))
    return [[next(answers) for _ in own] for own in lengths]


def _sentence(caption: str) -> str:
    return caption if caption.endswith((".", "!", "?")) else f"{caption}."


def _nothing() -> TimedMedia:
    return TimedMedia((), 1.0)
