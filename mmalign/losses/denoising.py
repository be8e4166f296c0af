"""The denoising error of a sample, on which all preference objectives for diffusion models are built.

Source: Ho et al., "Denoising Diffusion Probabilistic Models" (arXiv 2006.11239), eq. 14, with constant weight.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor


def denoising_error(
    output: Float[Tensor, "batch *latent"],
    target: Float[Tensor, "batch *latent"],
    reduce: Literal["mean", "sum"] = "mean",
) -> Float[Tensor, " batch"]:
    """Return the squared error of each sample, >= 0, in float32 or in the higher precision of its arguments.

    `reduce="mean"` averages over the D latent dimensions, the convention of every released DPO-like code;
    `"sum"` is the squared norm of the papers' formulas. They differ by the factor D, so an objective with
    strength beta on means equals the one with strength beta / D on sums.

    Half precision is never used for the error itself: an implicit reward is beta (thousands) times a difference of
    errors near 1e-5, far below the spacing of float16 and bfloat16 at 1.

    Raises:
        ValueError: the shapes differ (broadcasting would hide a mistake), or `reduce` is not known.
    """
    if output.shape != target.shape:
        raise ValueError(f"output has shape {tuple(output.shape)}, target {tuple(target.shape)}; they must be equal")
    if reduce not in ("mean", "sum"):
        raise ValueError(f"reduce={reduce!r} is not known; allowed: 'mean', 'sum'")
    precise = torch.promote_types(torch.promote_types(output.dtype, target.dtype), torch.float32)
    squared = (output.to(precise) - target.to(precise)).square().flatten(start_dim=1)
    return squared.mean(dim=1) if reduce == "mean" else squared.sum(dim=1)
