"""Statistics of sampled images that need no model: diversity, clipping, darkness, high frequencies and grids.

Images are `[batch, 3, height, width]` in [0, 1]. Reward hacking shows in them early: all images of a prompt become the
same, colours run into black and white, images go dark, or a fine pattern or a grid covers everything.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

FEATURE_EDGE = 16
DARK = 0.1
PERIODS = (4, 8, 16, 32)
"""Periods of a grid in pixels: those of autoencoders, and of the patches of transformers on their latents."""
STRONG_STEP, LEAST_STEP = 0.02, 0.002
LEAST_PERIODS = 4
"""A period is looked for where an image holds it this often."""


def diversity(images: Float[Tensor, "batch 3 height width"], groups: Sequence[Hashable]) -> Float[Tensor, ""]:
    """Return the diversity within groups of images (of one prompt): the mean over its pairs, then over the groups.

    The feature of an image is the image itself, averaged over a 16 x 16 grid of areas, and the distance of two is the
    root mean square of their difference: in pixel values, 0 (alike) to 1 (black and white). It needs no model and
    measures layout and colour, not texture. Groups of one image are left out; NaN if there are no others.
    """
    if len(groups) != len(images):
        raise ValueError(f"{len(images)} images and {len(groups)} groups; give one group for each image")
    features = adaptive_avg_pool2d(images.float(), FEATURE_EDGE).flatten(1)
    members: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    means = [torch.pdist(features[rows]).mean() for rows in members.values() if len(rows) > 1]
    return torch.stack(means).mean() / features.shape[1] ** 0.5 if means else features.new_tensor(math.nan)


def motion(videos: Float[Tensor, "batch times 3 height width"]) -> Float[Tensor, ""]:
    """Return the mean absolute difference of neighbouring frames, in pixel values, over all videos: 0 is a still."""
    return videos.float().diff(dim=1).abs().mean()


def saturation(images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, " batch"]:
    """Return the share of each image's channel values that are 0, 1, 254 or 255 when rounded to 8 bits.

    That is 0 or 1 within 1/255, with the bound between two 8-bit values so that rounding cannot move one across it.
    """
    return ((images.float() - 0.5).abs() > 0.5 - 1.5 / 255).float().mean((1, 2, 3))


def high_frequency(images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, " batch"]:
    """Return the share of each image's spectral energy above half the Nyquist frequency, in [0, 1].

    Of the luma (Rec. 601) without its mean, by the FFT: energy at more than 1/4 cycle per pixel in either direction.
    1 is a checkerboard of pixels, 3/4 is white noise; smooth images have almost none, and a flat one has 0.
    """
    luma = _luma(images)
    height, width = luma.shape[-2:]
    energy = torch.fft.rfft2(luma - luma.mean((1, 2), keepdim=True)).abs().square()
    # rfft2 leaves out the mirrored half of the columns, all but the first and, for an even width, the last.
    energy[..., 1 : (width + 1) // 2] *= 2
    rows = torch.fft.fftfreq(height, device=luma.device).abs()
    columns = torch.fft.rfftfreq(width, device=luma.device)
    high = (rows[:, None] > 0.25) | (columns[None, :] > 0.25)
    total = energy.sum((1, 2))
    flat = total / (height * width) ** 2 < 1e-8  # a standard deviation of a fortieth of an 8-bit step: rounding
    return torch.where(flat, 0.0, (energy * high).sum((1, 2)) / total.clamp_min(1e-30))


def dark(images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, " batch"]:
    """Return the share of each image's pixels whose luma is below 0.1."""
    return (_luma(images) < DARK).float().mean((1, 2))


def grid(images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, ""]:
    """Return how much stronger edges are on the lines of a grid than between them: 0 none, 1 twice as strong.

    Of the mean absolute step between neighbouring pixels, over all images, column by column and row by row: for each
    period, the strongest phase against the mean of the others; the largest over periods and the two directions. A grid
    that is fixed to the patches of a model has the same place in all images, while what they show has not; steps above
    0.02, which are mostly content, count as 0.02. The others count as at least 0.002, half a step of 8 bits.
    """
    luma = _luma(images)
    steps = (luma.diff(dim=2).abs(), luma.diff(dim=1).abs())
    profiles = [one.clamp_max(STRONG_STEP).mean(over) for one, over in zip(steps, ((0, 1), (0, 2)), strict=True)]
    return torch.stack([_line_excess(profile) for profile in profiles]).max()


def _line_excess(profile: Float[Tensor, " steps"]) -> Float[Tensor, ""]:
    """Return the largest excess of a phase over the others, relative to them."""
    found = [profile.new_zeros(())]
    for period in PERIODS:
        whole = len(profile) // period * period
        if len(profile) + 1 >= LEAST_PERIODS * period:
            phases = profile[:whole].view(-1, period).mean(0)
            top = phases.max()
            others = (phases.sum() - top) / (period - 1)
            found.append((top - others) / others.clamp_min(LEAST_STEP))
    return torch.stack(found).max()


def _luma(images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch height width"]:
    """Return the luma (Rec. 601)."""
    return torch.einsum("bchw,c->bhw", images.float(), images.new_tensor([0.299, 0.587, 0.114], dtype=torch.float32))
