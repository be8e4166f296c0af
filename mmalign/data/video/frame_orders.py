"""The temporal operators: the frames (or captions of clips) that remain and their order, as lists of indices.

Block operators follow TEMPLE (arXiv 2503.16929): for n items and a ratio r the block length is max(1, n // r), so a
larger ratio re-orders more finely and drops more. TEMPLE's own shuffle may leave the order as it was (half of the
time at ratio 2 and even n); here it never does unless `avoid_identity=False`.
"""

from __future__ import annotations

import numpy as np

from mmalign.core.errors import UserError

RATIOS = (16, 8, 4, 2)
"""TEMPLE's curriculum, from easy to hard to tell from the original."""


def drop(n: int, rng: np.random.Generator, *, ratio: int = 4) -> list[int]:
    """Keep max(1, n // ratio) items drawn without replacement, in their order."""
    return sorted(rng.permutation(n)[: _block_length(n, ratio)].tolist())


def block_shuffle(n: int, rng: np.random.Generator, *, ratio: int = 4, avoid_identity: bool = True) -> list[int]:
    """Put the blocks in random order, keeping the order inside each; the last block may be short."""
    blocks = _blocks(n, ratio)
    if avoid_identity and len(blocks) < 2:
        raise UserError(_one_block(n, ratio, "shuffled"))
    while True:
        order = rng.permutation(len(blocks)).tolist()
        if not avoid_identity or order != sorted(order):
            return [index for block in order for index in blocks[block]]


def block_reverse(n: int, rng: np.random.Generator, *, ratio: int = 4, avoid_identity: bool = True) -> list[int]:
    """Put the last block first and so on, keeping the order inside each."""
    blocks = _blocks(n, ratio)
    if avoid_identity and len(blocks) < 2:
        raise UserError(_one_block(n, ratio, "reversed"))
    return [index for block in reversed(blocks) for index in block]


def reverse(n: int, rng: np.random.Generator) -> list[int]:
    """Run backwards."""
    return list(range(n))[::-1]


def local_shuffle(n: int, rng: np.random.Generator, *, window: int = 4) -> list[int]:
    """Shuffle inside consecutive windows, at least one of which changes (RRPO, arXiv 2504.12083: local shuffle)."""
    if not 2 <= window or n < 2:
        raise UserError(f"{n} frames in windows of {window} cannot be shuffled: use two frames and window=2 or more")
    while True:
        order = [
            i for start in range(0, n, window) for i in (start + rng.permutation(min(window, n - start))).tolist()
        ]
        if order != sorted(order):
            return order


def freeze(n: int, rng: np.random.Generator, *, frame: int | None = None) -> list[int]:
    """Show one frame, `frame` or a random one, all the time."""
    if frame is not None and not -n <= frame < n:
        raise UserError(f"frame={frame}: there are {n} frames")
    return [int(rng.integers(n)) if frame is None else frame % n] * n


def subsample(n: int, rng: np.random.Generator, *, stride: int = 2) -> list[int]:
    """Keep every `stride`-th item from the first on: the video runs `stride` times as fast."""
    if stride < 1:
        raise UserError(f"stride={stride}: must be 1 or more")
    return list(range(0, n, stride))


def event_swap(n: int, rng: np.random.Generator, *, cut: int | None = None) -> list[int]:
    """Show what comes from item `cut` on (by default, the second half) before the rest."""
    at = n // 2 if cut is None else cut
    if not 0 < at < n:
        raise UserError(f"cut={at}: both parts of {n} frames must hold a frame; use 1 to {n - 1}")
    return [*range(at, n), *range(at)]


def _block_length(n: int, ratio: int) -> int:
    if ratio < 1:
        raise UserError(f"ratio={ratio}: must be 1 or more; TEMPLE uses {', '.join(map(str, RATIOS))}")
    return max(1, n // ratio)


def _blocks(n: int, ratio: int) -> list[range]:
    length = _block_length(n, ratio)
    return [range(start, min(start + length, n)) for start in range(0, n, length)]


def _one_block(n: int, ratio: int, verb: str) -> str:
    return f"{n} frame{'s' * (n != 1)} at ratio={ratio} are one block, which cannot be {verb}; use a higher ratio"
