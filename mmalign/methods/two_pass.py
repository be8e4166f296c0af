"""The exact gradient of a batch with the activations of one sample in memory: two passes, sample by sample.

The first pass computes the outputs of all samples and keeps no activations. The loss is a function of the outputs, so
its gradient at each output is known after it. The second pass goes back through the network one sample at a time: it
computes the sample's forward again and frees it before the next one. The gradient is that of the whole batch in one
graph, up to the order of additions. It works for every loss that reaches the policy by `Run.predict`.

The last sample is not computed twice. Of n samples the network does 2n - 1 forward and n backward passes; a pair of
Diffusion-DPO with its reference takes 5 forward and 2 backward passes in place of 4 and 2.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pipelines.conditioning import Conditioning

Predict = Callable[[Tensor, Tensor, Conditioning], Tensor]
Context = Callable[[], AbstractContextManager[Any]]


def predict_by_sample(
    predict: Predict,
    x_t: Float[Tensor, "batch *latent"],
    t: Shaped[Tensor, " batch"],
    cond: Conditioning,
    again: Context = nullcontext,
) -> Float[Tensor, "batch *latent"]:
    """Return what `predict` gives for a batch, computed one sample at a time; see the module for its gradient.

    `again` makes the context of the forward passes of the second pass. Random draws in the network, such as dropout,
    are the same in both passes.

    >>> weight, nothing = torch.tensor(2.0, requires_grad=True), Conditioning(torch.zeros(3, 1, 1))
    >>> output = predict_by_sample(lambda x, t, cond: weight * x, torch.ones(3, 1), torch.zeros(3), nothing)
    >>> output.sum().backward()
    >>> weight.grad
    tensor(3.)
    """
    rows = [slice(row, row + 1) for row in range(len(x_t))]
    if not torch.is_grad_enabled():
        return torch.cat([predict(x_t[row], t[row], cond[row]) for row in rows])
    first = [
        checkpoint(
            predict, x_t[row], t[row], cond[row], use_reentrant=False, context_fn=lambda: (nullcontext(), again())
        )
        for row in rows[:-1]
    ]
    # Autograd goes back through the last sample first, so that its activations are gone before the second pass.
    return torch.cat([*first, predict(x_t[rows[-1]], t[rows[-1]], cond[rows[-1]])])
