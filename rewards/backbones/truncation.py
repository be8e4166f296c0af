"""Warn once about prompts that are too long for a model, and count them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence


class Truncation:
    """The prompts that were cut at the context length of a reward's model."""

    def __init__(self, name: str, limit: int) -> None:
        """`name` of the reward and `limit` in tokens, for the warning."""
        self.name, self.limit = name, limit
        self._cut: set[str] = set()

    def note(self, prompts: Sequence[str], lengths: Sequence[int]) -> None:
        """Count the prompts longer than the limit in tokens; warn at the first call with such prompts."""
        long = [prompt for prompt, length in zip(prompts, lengths, strict=True) if length > self.limit]
        if long and not self._cut:
            warnings.warn(
                f"{self.name}: {len(long)} of {len(prompts)} prompts exceed {self.limit} tokens and are cut there, "
                f"first {long[0][:60]!r}; later ones are only counted in `truncated_prompts`",
                stacklevel=3,
            )
        self._cut.update(long)

    @property
    def count(self) -> int:
        """How many distinct prompts were cut so far."""
        return len(self._cut)
