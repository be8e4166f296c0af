"""The gradient through the sampler, cut anew at every step, against TRL, which had AlignProp until version 0.23."""

from __future__ import annotations

from types import SimpleNamespace

from benchmarks.equivalence.align_prop import STEPS, through_sampler
from benchmarks.equivalence.checkout import Checkout
from benchmarks.equivalence.comparing import Comparison

REPOSITORY = "huggingface/trl"
FILE = "trl/models/modeling_sd_base.py"
DRAWS = (3, 1, 5, 2, 9, 9, 0, 8, 4, 10)
"""What their random numbers of 0..10 are for this run; step i keeps its gradient where the draw is at most i."""


def compare(checkout: Checkout) -> list[Comparison]:
    """Run their loop over the sampling steps with known random numbers."""
    loop = checkout.statements(FILE, r"(?s)for i, t in .*rand_timestep", r"for i, t in ")
    step = checkout.functions(FILE, "_left_broadcast", "_get_variance", "scheduler_step").function(
        "scheduler_step",
        DDPOSchedulerOutput=lambda latents, log_probs: SimpleNamespace(latents=latents, log_probs=log_probs),
        randn_tensor=lambda shape, **_: 0.0,
    )
    # Two sides of a comparison call once each, and theirs alone draws.
    draws = iter(DRAWS)
    trained = tuple(index for index, drawn in enumerate(DRAWS) if drawn <= index)
    return [
        through_sampler(
            FILE,
            loop,
            trained,
            step=step,
            random=SimpleNamespace(randint=lambda low, high: next(draws)),
            truncated_backprop=True,
            truncated_backprop_rand=True,
            truncated_rand_backprop_minmax=(0, STEPS),
        )
    ]
