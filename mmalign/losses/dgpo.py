"""Direct group preference optimisation: the better images of a group against the worse ones, without pairs.

Source: "Reinforcing Diffusion Models by Direct Group Preference Optimization" (DGPO, arXiv 2510.08425), in the
convention of the authors' code (Luo-Yihong/DGPO, scripts/train_sd3_dgpo.py).

With l the MEAN squared error of the velocity of an image, A its advantage and G the number of images of a prompt:

    w = sigmoid(beta / G * sum over the group of A (l - l_ref)),   the loss of an image = w A l,

w held constant. It is the gradient, divided by beta, of a preference loss -log sigmoid(-(the sum)): a group that the
policy already orders better than the reference does counts less. Where advantages add up to 0, a constant added to
all errors of the reference changes nothing. With two images and A = +-1 it is Diffusion-DPO.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def dgpo(
    errors: Float[Tensor, " batch"],
    reference_errors: Float[Tensor, " batch"],
    advantages: Float[Tensor, " batch"],
    *,
    group: int,
    beta: float,
) -> Float[Tensor, " batch"]:
    """Return w A l of each image; each `group` images in a row are those of a prompt.

    Both errors are MEANS over latent dimensions. Gradients reach `errors` alone, and not through w.

    >>> same = torch.tensor([0.3, 0.5])
    >>> dgpo(same, same, torch.tensor([1.0, -1.0]), group=2, beta=100.0)  # w = 1/2
    tensor([ 0.1500, -0.2500])

    Raises:
        ValueError: beta is not positive, the shapes differ, or the images do not make up whole groups.
    """
    if not beta > 0:
        raise ValueError(f"beta={beta} must be positive")
    if not errors.shape == reference_errors.shape == advantages.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (errors, reference_errors, advantages))
        raise ValueError(f"errors, reference errors and advantages have shapes {shapes}; needed: three of [B]")
    if group < 1 or len(errors) % group:
        raise ValueError(f"{len(errors)} images are not whole groups of {group}")
    a = advantages.detach().to(errors.dtype)
    gain = (a * (errors - reference_errors).detach()).reshape(-1, group).sum(1) / group
    weight = torch.sigmoid(beta * gain).repeat_interleave(group)
    return weight * a * errors


def moved_enough(
    errors: Float[Tensor, " batch"],
    old_errors: Float[Tensor, " batch"],
    advantages: Float[Tensor, " batch"],
    *,
    clip: float,
) -> Bool[Tensor, " batch"]:
    """Tell which images have moved from the old policy by more than the clip, in the direction of their advantage.

    PPO's rule with the ratio exp(l_old - l): above 1 + clip where A > 0, below 1 - clip elsewhere.

    Raises:
        ValueError: clip is not positive.
    """
    if not clip > 0:
        raise ValueError(f"clip={clip} must be positive")
    ratio = (old_errors - errors).detach().exp()
    return torch.where(advantages > 0, ratio > 1 + clip, ratio < 1 - clip)
