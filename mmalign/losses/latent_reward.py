"""The objective of a latent reward model: which of two noisy images of a prompt is better.

Source: Zhang et al., "Diffusion Model as a Noise-Aware Latent Reward Model for Step-Level Preference Optimization"
(arXiv 2502.01051; code Kwai-Kolors/LPO), after PickScore (Kirstain et al., arXiv 2305.01569).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def latent_reward(
    first: Float[Tensor, " batch"], second: Float[Tensor, " batch"], preference: Float[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """Return KL(p || softmax(first, second)) of each pair, p = (preference, 1 - preference).

    This is the softmax cross-entropy of the two scores less the entropy of the label: `preference` is 1 where the
    first is better, 0 where the second is, 1/2 for a tie, whose loss is 0 where the scores are equal (and not log 2).

    Raises:
        ValueError: a preference is outside [0, 1].
    """
    if not bool(((preference >= 0) & (preference <= 1)).all()):
        raise ValueError("preferences are probabilities; they must lie in [0, 1]")
    gap = first - second
    cross_entropy = -preference * F.logsigmoid(gap) - (1 - preference) * F.logsigmoid(-gap)
    return cross_entropy + torch.xlogy(preference, preference) + torch.xlogy(1 - preference, 1 - preference)


def pair_weights(prompts: Sequence[Hashable]) -> Float[Tensor, " pairs"]:
    """Return a weight for each pair, given its prompt, so that all prompts weigh the same in total; the mean is 1."""
    counts = Counter(prompts)
    weights = torch.tensor([1.0 / counts[prompt] for prompt in prompts], dtype=torch.float64)
    return weights * (len(prompts) / len(counts))
