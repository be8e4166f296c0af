"""Kinds of images: how many a model draws, over all prompts and for one, by clusters of their colours.

A model that learns from groups may draw ever fewer kinds of images, such as one background for all prompts, while two
images of a prompt still differ in layout and so stay far apart. Hence the clusters: those of the first images of the
run, by k-means, are kept, and later images are counted by the nearest. Nothing here needs a network.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

LEVELS = 4
"""Steps of each colour channel; an image is described by its shares of the 4 x 4 x 4 colours."""
EDGE = 64
"""Larger images are averaged to this many pixels a side first."""
ROUNDS, RESTARTS = 50, 4


def colour_shares(images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 64"]:
    """Return the square roots of each image's shares of 64 colours; the images are in [0, 1].

    Their Euclidean distance is Hellinger's, up to a factor. Layout plays no part.
    """
    images = images.detach().float()
    if max(images.shape[-2:]) > EDGE:
        images = adaptive_avg_pool2d(images, EDGE)
    red, green, blue = (images * LEVELS).long().clamp(0, LEVELS - 1).flatten(2).unbind(1)
    cells = (red * LEVELS + green) * LEVELS + blue
    counts = cells.new_zeros(len(cells), LEVELS**3).scatter_add_(1, cells, torch.ones_like(cells))
    return (counts.float() / cells.shape[1]).sqrt()


def k_means(points: Float[Tensor, "points features"], count: int, seed: int = 0) -> Float[Tensor, "count features"]:
    """Return the centres of at most `count` clusters, the same for the same points and seed.

    Lloyd's algorithm from k-means++ (Arthur and Vassilvitskii 2007), the best of four starts; fewer centres where
    fewer points differ.
    """
    count = min(count, len(points.unique(dim=0)))
    source = torch.Generator().manual_seed(seed)
    fits = [_lloyd(points, _spread_centres(points, count, source)) for _ in range(RESTARTS)]
    return min(fits, key=lambda centres: _squares(points, centres).min(1).values.sum().item())


def nearest(
    points: Float[Tensor, "points features"], centres: Float[Tensor, "count features"]
) -> Int[Tensor, " points"]:
    """Return the number of the centre that each point is nearest to."""
    return _squares(points, centres).argmin(1)


def kinds_entropy(kinds: Sequence[int]) -> float:
    """Return the entropy in bits of how often each kind occurs, with Miller's correction for few images."""
    counts = torch.bincount(torch.tensor(kinds)).double()
    shares = counts[counts > 0] / len(kinds)
    return float(-(shares * shares.log2()).sum()) + (len(shares) - 1) / (2 * len(kinds) * math.log(2))


def entropy_within(kinds: Sequence[int], groups: Sequence[Hashable]) -> float:
    """Return the mean entropy in bits within groups of at least two images (of one prompt); NaN if there are none."""
    members: dict[Hashable, list[int]] = {}
    for kind, group in zip(kinds, groups, strict=True):
        members.setdefault(group, []).append(kind)
    found = [kinds_entropy(held) for held in members.values() if len(held) > 1]
    return sum(found) / len(found) if found else math.nan


def _squares(points: Tensor, centres: Tensor) -> Tensor:
    return torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist").square()


def _spread_centres(points: Tensor, count: int, source: torch.Generator) -> Tensor:
    """Draw centres among the points, each in proportion to its squared distance from those drawn before."""
    centres = points[torch.randint(len(points), (1,), generator=source)]
    while len(centres) < count:
        far = _squares(points, centres).min(1).values
        centres = torch.cat([centres, points[torch.multinomial(far, 1, generator=source)]])
    return centres


def _lloyd(points: Tensor, centres: Tensor) -> Tensor:
    """Move centres to the means of their points until none moves; one without points stays."""
    for _ in range(ROUNDS):
        own = nearest(points, centres)
        moved = torch.stack(
            [points[own == one].mean(0) if (own == one).any() else centres[one] for one in range(len(centres))]
        )
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres
