"""RefCLIPScore: fit of an image to its caption, and of the caption to human captions of the image.

Source: Hessel et al. 2021, "CLIPScore" (arXiv:2104.08718), section 3: with c = 2.5 * max(cos, 0) of the image and the
caption, and r the greatest cosine of the caption and its references, cut at zero, 2 c r / (c + r); all texts with the
prefix "A photo depicts ". A dataset's score is the mean.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from rewards.base import check_strings
from rewards.clip import ClipReward
from rewards.errors import RewardError
from rewards.media import Media


class RefClipScore(ClipReward):
    """Harmonic mean of CLIPScore and of the prompt's similarity to its reference captions.

    captions: prompts to their reference captions, a mapping or a JSON file with one. The other options are those of
    `clip`; `kind` must be one that cuts at zero.
    """

    name: ClassVar[str] = "ref-clipscore"
    default_kind = "hessel"
    range = (0.0, 2 * 2.5 / (2.5 + 1))

    def __init__(self, *, captions: Mapping[str, Sequence[str]] | str | PathLike[str], **options: Any) -> None:
        """Read the captions and load the model."""
        super().__init__(**options)
        self.captions = _captions(captions)
        if not self.kind.clamp:
            raise RewardError("ref-clipscore needs a kind that clamps at zero: kind='hessel' or kind='clipscore'")
        self.range = (0.0, 2 * self.kind.scale / (self.kind.scale + 1))
        self.version += ", with reference captions"

    def score(
        self,
        media: Float[Tensor, " batch *shape"],
        prompts: Sequence[str] | None,
        references: Sequence[Tensor] | None,
    ) -> Float[Tensor, " batch"]:
        """Compare the i-th medium with the i-th prompt, and that with its reference captions."""
        return self._with_captions(super().score(media, prompts, references), prompts or ())

    def matrix(self, media: Media, prompts: Sequence[str]) -> Float[Tensor, "batch prompts"]:
        """Score every medium against every prompt: `[B, P]` float32, each medium and each prompt embedded once."""
        return self._with_captions(super().matrix(media, prompts), prompts)

    def _with_captions(self, scores: Tensor, prompts: Sequence[str]) -> Tensor:
        """Turn CLIPScores `[..., P]` into RefCLIPScores."""
        lacking = [prompt for prompt in prompts if prompt not in self.captions]
        if lacking:
            raise RewardError(f"captions= has none for the prompt {lacking[0]!r}, nor for {len(lacking) - 1} others")
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            pairs = zip(self.prompt_embeddings(prompts), prompts, strict=True)
            nearest = [(self.prompt_embeddings(self.captions[p]) @ embedding).max() for embedding, p in pairs]
        agreement = torch.stack(nearest).clamp(min=0).to(scores)
        return 2 * scores * agreement / (scores + agreement).clamp(min=1e-12)


def _captions(given: Mapping[str, Sequence[str]] | str | PathLike[str]) -> dict[str, list[str]]:
    try:
        read = given if isinstance(given, Mapping) else json.loads(Path(given).read_text(encoding="utf-8"))
        found = {prompt: [row] if isinstance(row, str) else list(row) for prompt, row in read.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise RewardError(
            f"captions={str(given)[:60]!r}: not a mapping of prompts to lists of captions: {error}"
        ) from error
    for prompt, row in found.items():
        if not row:
            raise RewardError(f"captions= has an empty list for the prompt {prompt!r}")
        check_strings(row)
    return found
