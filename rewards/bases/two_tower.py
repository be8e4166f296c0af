"""Rewards that embed media and prompts separately and compare the embeddings (CLIP, PickScore, HPS, ALIGN ...).

A subclass embeds; this class caches the prompts' embeddings, compares row by row, and computes `matrix` with every
embedding made once.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from rewards.base import Reward
from rewards.media import Media, read_media

CACHED_PROMPTS = 10_000
PROMPTS_AT_ONCE = 256


class TwoTowerReward(Reward):
    """Compare embeddings of media and prompts; subclasses implement `encode_media`, `encode_prompts`, `compare`."""

    needs = frozenset({"prompts"})
    differentiable = True

    def __init__(self, **options: Any) -> None:
        """Pass the common options on, and start with an empty cache."""
        super().__init__(**options)
        self._cache: OrderedDict[str, Tensor] = OrderedDict()

    @abstractmethod
    def encode_media(self, media: Float[Tensor, " batch *shape"]) -> Float[Tensor, "batch features"]:
        """Embed media in [0, 1]; the norm of the embedding does not matter."""

    @abstractmethod
    def encode_prompts(self, prompts: list[str]) -> Float[Tensor, "batch features"]:
        """Embed prompts; the norm of the embedding does not matter. Called once for each prompt."""

    @abstractmethod
    def compare(self, cosine: Float[Tensor, " *shape"]) -> Float[Tensor, " *shape"]:
        """Map cosines to scores, elementwise."""

    def media_embeddings(self, media: Float[Tensor, " batch *shape"]) -> Float[Tensor, "batch features"]:
        """Unit embeddings of media, normalised in at least float32."""
        return unit(self.encode_media(media))

    def prompt_embeddings(self, prompts: Sequence[str]) -> Float[Tensor, "prompts features"]:
        """Unit embeddings of prompts; each distinct prompt is encoded once and remembered."""
        found = {prompt: self._cache[prompt] for prompt in prompts if prompt in self._cache}
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in found]
        # Tensors made in inference mode could not be used in a later call with gradients.
        with torch.inference_mode(False), torch.no_grad():
            for start in range(0, len(missing), PROMPTS_AT_ONCE):
                chunk = missing[start : start + PROMPTS_AT_ONCE]
                found.update(zip(chunk, unit(self.encode_prompts(chunk)).unbind(), strict=True))
        self._remember(found)
        return torch.stack([found[prompt] for prompt in prompts])

    def score(
        self,
        media: Float[Tensor, " batch *shape"],
        prompts: Sequence[str] | None,
        references: Sequence[Tensor] | None,
    ) -> Float[Tensor, " batch"]:
        """Compare the i-th medium with the i-th prompt."""
        assert prompts is not None, "declared in needs, and so checked before"
        return self.compare((self.media_embeddings(media) * self.prompt_embeddings(prompts)).sum(-1))

    def matrix(self, media: Media, prompts: Sequence[str]) -> Float[Tensor, "batch prompts"]:
        """Score every medium against every prompt: `[B, P]` float32, each medium and each prompt embedded once."""
        self._check_matrix(prompts)
        with torch.autocast(self.device.type, enabled=False):
            embedded = self.prompt_embeddings(prompts)

        def row(chunk: Tensor, positions: list[int]) -> Tensor:
            return self.compare(self.media_embeddings(chunk) @ embedded.T)

        return self._run(read_media(media, self.modality), row)

    def embeddings(self, media: Media) -> Float[Tensor, "batch features"]:
        """Embed media, given as to a call, in micro-batches: unit vectors, float32, on the device of the media."""
        return self._run(read_media(media, self.modality), lambda chunk, positions: self.media_embeddings(chunk))

    def _remember(self, found: dict[str, Tensor]) -> None:
        for prompt, embedding in found.items():
            self._cache[prompt] = embedding
            self._cache.move_to_end(prompt)
        while len(self._cache) > CACHED_PROMPTS:
            self._cache.popitem(last=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TwoTowerReward:
        """Clear the cache when the weights move or change their dtype."""
        self._cache.clear()
        return super()._apply(fn, recurse)


def unit(embeddings: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch features"]:
    """Scale embeddings to length 1, in at least float32."""
    return F.normalize(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)), dim=-1)
