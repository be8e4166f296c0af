"""What Flow-GRPO and its relatives put in place of a sampling step's log-probability, and weights of the steps.

A step draws ``x' = mean + std * z``. With the change ``d = mean - old_mean`` since the samples were drawn, the noise
``z = (x' - old_mean) / std``, and means over the D latent dimensions, the log-ratio of the step is::

    Gaussian  mean(z d) / std - mean(d^2) / (2 std^2)     Flow-GRPO (arXiv 2505.05470)
    CPS       2 std mean(z d) - mean(d^2)                 FlowCPS (arXiv 2509.05952): 2 std^2 times the former
    Guard     mean(z d)                                   GRPO-Guard (arXiv 2510.22319)

The second term of the Gaussian is negative whatever the advantage: ratios below 1, and more so where std is small,
which makes one clip one-sided. Guard takes it away, and the unit of the step with it.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def squared_error_log_prob(
    sample: Float[Tensor, "batch *latent"], mean: Float[Tensor, "batch *latent"]
) -> Float[Tensor, " batch"]:
    """Return FlowCPS's log-probability without constants and scale: -(x' - mean)^2, the mean over dimensions.

    >>> squared_error_log_prob(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 0.0]])).item()
    -2.5
    """
    return -(sample - mean).square().flatten(1).mean(1)


def guard_log_ratio(
    sample: Float[Tensor, "batch *latent"],
    mean: Float[Tensor, "batch *latent"],
    old_mean: Float[Tensor, "batch *latent"],
    std: Float[Tensor, " batch"],
) -> Float[Tensor, " batch"]:
    """Return GRPO-Guard's log-ratio mean(z (mean - old_mean)), z = (x' - old_mean) / std; `std` must be above 0.

    The code of verl-omni writes it as (log-ratio + mean(d^2) / (2 std^2)) * std. `old_mean` gets no gradient.
    """
    old_mean = old_mean.detach()
    noise = (sample - old_mean) / std.reshape(-1, *[1] * (mean.ndim - 1))
    return (noise * (mean - old_mean)).flatten(1).mean(1)


def temp_weights(stds: Float[Tensor, " steps"]) -> Float[Tensor, " steps"]:
    """Return TempFlow-GRPO's weight of each step's loss (arXiv 2508.04324; code of UniRL): 2.25 std."""
    return 2.25 * stds


def flash_weights(
    stds: Float[Tensor, " steps"], slopes: Float[Tensor, " steps"], pool: Float[Tensor, " pool"]
) -> Float[Tensor, " steps"]:
    """Return Flash-GRPO's weight of each step's loss (arXiv 2605.15980): what makes gradients equally large.

    `slopes` are |d mean / d output| of the steps. The gradient of the Gaussian log-ratio by the network's output is in
    proportion to slope / std, and the weight is the inverse, in units of its mean over the steps that might have been
    drawn, whose std / slope is `pool`. For Flow-SDE, slope / std is sqrt|dt| / s + s sqrt|dt| (1 - sigma) / (2 sigma).

    >>> stds, slopes = torch.tensor([0.5, 0.5]), torch.tensor([0.1, 0.2])
    >>> flash_weights(stds, slopes, stds / slopes).tolist()
    [1.333..., 0.666...]
    """
    return stds / slopes / pool.mean()
