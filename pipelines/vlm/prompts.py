"""Prompts with media: media stand where the text says `<image>` or `<video>`, or else before the text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from pipelines.errors import PipelineError

Kind = Literal["image", "video"]
Content = list[dict[str, str]]
"""Parts of a turn in the chat format: `{"type": "image"}`, `{"type": "video"}`, `{"type": "text", "text": ...}`."""

_TAG = re.compile("<(image|video)>")
_TAG_WITH_BREAKS = re.compile(r"\n?<(?:image|video)>\n?")

_VISION_TOKENS = ("image_token", "video_token", "vision_start_token", "vision_end_token", "start_image_token",
                  "end_image_token", "context_image_token", "fake_image_token", "global_image_token")  # fmt: skip


def turns_of(prompt: str, kinds: Sequence[Kind], processor: Any) -> list[dict[str, Any]]:
    """Return the user's turn: the prompt with media of these kinds, for the chat format of a processor.

    Each `<image>` or `<video>` in the text stands for the next medium of its kind. Where there are only videos,
    `<image>` stands for a video too, as in the data of LLaVA-Video. Without tags the media come first.

    Raises:
        PipelineError: the text names other media than there are.
    """
    tags = _tags(prompt, kinds)
    content = content_of(prompt, tags or kinds)
    media_first = all(part["type"] != "text" for part in content[:-1])
    if not (media_first or _keeps_places(processor)):
        written = iter(tags)
        text = _TAG.sub(lambda _: str(getattr(processor, f"{next(written)}_token")), prompt)
        content = [{"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def content_of(prompt: str, kinds: Sequence[Kind]) -> Content:
    """Return the parts of a prompt whose tags stand for media of these kinds, or of one without tags.

    A line feed on either side belongs to the tag:

        content_of("<video>\nWhat?", ["video"])   # [{"type": "video"}, {"type": "text", "text": "What?"}]
    """
    texts = _TAG_WITH_BREAKS.split(prompt)
    if len(texts) == 1:
        media: Content = [{"type": kind} for kind in kinds]
        return [*media, {"type": "text", "text": prompt}]
    parts: Content = []
    for number, text in enumerate(texts):
        parts += [{"type": kinds[number - 1]}] * bool(number)
        parts += [{"type": "text", "text": text}] * bool(text)
    return parts


def separator_of(turns: list[dict[str, Any]], prompt: str, processor: Any) -> str:
    """Return the blanks that a chat format writes between a prompt and its answer (a space, for some)."""
    answer = {"role": "assistant", "content": [{"type": "text", "text": "answer"}]}
    whole = processor.apply_chat_template([*turns, answer], tokenize=False)
    between = whole.removeprefix(prompt).partition("answer")[0] if whole.startswith(prompt) else ""
    return between if between.isspace() else ""


def vision_ids(config: Any, processor: Any) -> frozenset[int]:
    """Collect the special tokens that mark or hold vision: the configuration's, the tokenizer's, tile marks."""
    vocabulary = processor.tokenizer.get_vocab()
    ids = {getattr(config, f"{name}_id", None) for name in _VISION_TOKENS}
    for name in _VISION_TOKENS:
        word = getattr(processor, name, None) or getattr(processor.tokenizer, name, None)
        ids.add(vocabulary.get(str(word)))
    ids |= {token for word, token in processor.tokenizer.get_added_vocab().items() if word.startswith("<row_")}
    return frozenset(token for token in ids if token is not None)


def _tags(prompt: str, kinds: Sequence[Kind]) -> list[Kind]:
    """Return the kind of medium that each tag of the text stands for."""
    tags: list[Kind] = ["image" if tag == "image" else "video" for tag in _TAG.findall(prompt)]
    if set(kinds) == {"video"} and len(tags) == len(kinds):
        return list(kinds)
    if tags and sorted(tags) != sorted(kinds):
        raise PipelineError(
            f"the text has {tags.count('image')} <image> and {tags.count('video')} <video>, but the sample has"
            f" {list(kinds).count('image')} images and {list(kinds).count('video')} videos; give a tag for each of"
            " them, or no tag."
        )
    return tags


def _keeps_places(processor: Any) -> bool:
    """Tell whether a chat format leaves an image between two texts there; some put all media first."""
    content = [{"type": "text", "text": "before"}, {"type": "image"}, {"type": "text", "text": "after"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    return bool(text.partition("before")[2].partition("after")[0].strip())
