"""Training and held-out data of a latent reward: encoded pairs with the prompt as text, split by prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mmalign.core.errors import UserError
from mmalign.core.hashing import uniform
from mmalign.data.batches import ComparisonBatch
from mmalign.data.encoded.cache import CachedSides
from mmalign.data.pairs import PairTable
from mmalign.losses import pair_weights


class Comparisons:
    """Some pairs of a table, as `mmalign.data.sampler.BatchSampler` samples them."""

    def __init__(self, table: PairTable, sides: CachedSides, rows: Sequence[int]) -> None:
        """Weigh the pairs chosen by `rows`."""
        self.rows, self._table, self._sides = list(rows), table, sides
        ties = table.ties()
        self.preference = torch.tensor([0.5 if ties[row] else 1.0 for row in self.rows])
        self.weights = pair_weights([table.prompt_index(row) for row in self.rows]).float()

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.rows)

    def batch(self, indices: Sequence[int], epoch: int, seed: int) -> ComparisonBatch:
        """Return these pairs, in this order, on the CPU in float32."""
        chosen_rows = [self.rows[index] for index in indices]
        ids, (chosen, rejected), _ = self._sides.sides(chosen_rows, epoch, seed)
        prompts = [self._table.prompts[self._table.prompt_index(row)] for row in chosen_rows]
        picked = torch.as_tensor(indices, dtype=torch.long)
        return ComparisonBatch(chosen, rejected, prompts, self.preference[picked], self.weights[picked], ids, epoch)


def split(table: PairTable, sides: CachedSides, share: float, seed: int) -> tuple[Comparisons, Comparisons]:
    """Return the pairs to learn from and those held out: all pairs of about that share of the prompts, by a hash.

    Raises:
        UserError: nothing is held out, nothing is left, or all held-out pairs are ties.
    """
    aside = [uniform(seed, "held out", prompt) < share for prompt in table.prompts]
    parts: tuple[list[int], list[int]] = ([], [])
    for row in range(len(table)):
        parts[aside[table.prompt_index(row)]].append(row)
    if not all(parts):
        raise UserError(
            f"held_out {share:g} of {len(table.prompts)} prompts leaves {len(parts[0])} pairs to learn from and "
            f"{len(parts[1])} to measure on; give more prompts, or another share"
        )
    held_out = Comparisons(table, sides, parts[1])
    if bool((held_out.preference == 0.5).all()):
        raise UserError(
            f"all {len(held_out)} pairs held out are ties, which have no right answer; give a larger held_out, or "
            "data.ties drop"
        )
    return Comparisons(table, sides, parts[0]), held_out
