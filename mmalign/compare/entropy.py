"""Entropies of counts as means over prompts, so that the intervals of every other measure hold for them too.

The entropy of pooled counts is no mean of one number per prompt. Linearised at the counts it is one: prompt i of P,
with n_i of the N images and the counts c_ik, contributes

    H + P / N * sum_k (c_ik - n_i p_k) (-log2 p_k),     p_k the pooled shares

These values have the mean H, and their spread over prompts is its first-order sampling error (the influence function;
Hampel 1974). Images of one prompt are so resampled together, differences between systems are paired, and training
seeds enter as a crossed effect (`mmalign.compare.crossed`).

A plug-in entropy is too low, to second order by sum_k var(p_k) / p_k / (2 ln 2) bits. That is added, up to the bits
of equal shares. With the binomial variance it is Miller's (K - 1) / (2 N ln 2) (Miller 1955); images of one prompt
are alike, so the variance here is that over prompts. Systems on the same prompts and seeds have about the same N, and
little of it is left in their differences.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float


def entropy_values(counts: Float[np.ndarray, "prompts kinds"]) -> Float[np.ndarray, " prompts"]:
    """Return one value per prompt, in bits, whose mean is the corrected entropy of the pooled counts.

    The counts are not all 0; a prompt's may be: it left nothing open, or showed nothing of it.

    ```python
    entropy_values(np.array([[2.0, 0.0], [0.0, 2.0]])).mean()   # 1.0: as much as two kinds can have
    ```
    """
    total, (prompts, kinds) = counts.sum(), counts.shape
    pooled = counts.sum(axis=0)
    occurring = pooled > 0
    shares = pooled[occurring] / total
    surprise = -np.log2(shares)
    off = counts[:, occurring] - counts.sum(axis=1, keepdims=True) * shares  # of what the shares let expect
    variances = (off**2).sum(axis=0) / total**2 * prompts / max(prompts - 1, 1)
    correction = float((variances / shares).sum()) / (2 * math.log(2))
    bits = min(float(shares @ surprise) + correction, math.log2(kinds))
    values: np.ndarray = bits + off @ surprise * prompts / total
    return values


def ratio_values(
    values: Float[np.ndarray, "prompts replicas"], other: Float[np.ndarray, "prompts replicas"]
) -> Float[np.ndarray, "prompts replicas"]:
    """Return one value per prompt whose mean is the ratio of the two means, linearised at it (Cochran 1977, 6.4)."""
    mean, base = values.mean(axis=0), other.mean(axis=0)
    ratio = mean / base
    linear: np.ndarray = ratio + ((values - mean) - ratio * (other - base)) / base
    return linear
