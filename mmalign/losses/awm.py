"""Advantage weighted matching: a policy gradient whose log-likelihood is the denoising error with its sign changed.

Source: "Advantage Weighted Matching: Aligning RL with Pretraining in Diffusion Models" (AWM, arXiv 2509.25050), in the
convention of the authors' code (scxue/advantage_weighted_matching, scripts/train_sd3_awm.py).

With l the MEAN squared error of the velocity of a noised sample and t its noise level, the surrogate of its
log-likelihood is -w(l, t). The objective is then that of any policy gradient (`clipped_policy_gradient`): where the
ratio is 1, the gradient is A dw/dl grad l, denoising weighted by the advantage A. Where A < 0 it pushes the sample
away without a bound, so something else has to hold the policy.
"""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from mmalign.losses.denoising import denoising_error

Weighting = Literal["uniform", "t", "t2", "huber", "ghuber"]
SMALL = 1e-10
"""Added to an error before its root is taken, as in the authors' code."""


def awm_log_prob(
    policy: Float[Tensor, "batch *latent"],
    target: Float[Tensor, "batch *latent"],
    t: Float[Tensor, " batch"],
    *,
    weighting: Weighting = "ghuber",
    power: float = 0.25,
) -> Float[Tensor, " batch"]:
    """Return the surrogate log-likelihood of each sample, at most 0, in float64.

    policy, target: predicted and true velocity [B, ...]. t: noise level sigma [B] in [0, 1].

    weighting
        With l the error and e = 1e-10: ``uniform`` -l; ``t`` -t l; ``t2`` -t^2 l; ``huber`` -t (sqrt(l + e) -
        sqrt(e)); ``ghuber`` -(t / power) ((l + e)^power - e^power), which is ``t`` at power 1 and twice ``huber`` at
        1/2. The last two weigh large errors less.

    >>> v, u, t = torch.zeros(1, 4), torch.full((1, 4), 2.0), torch.tensor([0.5])
    >>> awm_log_prob(v, u, t, weighting="t")  # -0.5 * 2^2
    tensor([-2.], dtype=torch.float64)

    Raises:
        ValueError: the shapes do not fit, the weighting is not known, or the power is not in (0, 1].
    """
    if t.shape != policy.shape[:1]:
        raise ValueError(f"t has shape {tuple(t.shape)}; needed: one noise level for each of {len(policy)} samples")
    if not 0 < power <= 1:
        raise ValueError(f"power={power} must lie in (0, 1]")
    error, t = denoising_error(policy.double(), target.detach().double()), t.detach().double()
    if weighting == "uniform":
        return -error
    if weighting == "t":
        return -t * error
    if weighting == "t2":
        return -t.square() * error
    if weighting == "huber":
        return -t * ((error + SMALL).sqrt() - SMALL**0.5)
    if weighting == "ghuber":
        return -t / power * ((error + SMALL).pow(power) - SMALL**power)
    raise ValueError(f"weighting={weighting!r} is not known; allowed: 'uniform', 't', 't2', 'huber', 'ghuber'")
