"""GDPO's advantages of several rewards against the authors' trainer."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from benchmarks.equivalence.checkout import Checkout
from benchmarks.equivalence.comparing import Comparison, World, values
from mmalign.losses.advantages import Spread, each_group_advantages

REPOSITORY = "NVlabs/GDPO"
SCRIPT = "trl-GDPO/trl-0.18.0-gdpo/trl/trainer/grpo_trainer.py"
GROUP, GROUPS, WEIGHTS = 6, 4, [1.0, 0.5, 2.0]


def compare(checkout: Checkout) -> list[Comparison]:
    """Run the trainer's statements from the rewards of each function to the advantages."""
    step = checkout.statements(SCRIPT, r"rewards_per_func_filter = ", r"advantages = ")
    rewards = World().draw(GROUP * GROUPS, len(WEIGHTS)) * torch.tensor([1.0, 50.0, 0.2])
    trainer = SimpleNamespace(reward_weights=torch.tensor(WEIGHTS).double(), num_generations=GROUP)
    theirs = step.run(rewards_per_func=rewards, self=trainer, device="cpu")["advantages"]
    prompts = [str(row // GROUP) for row in range(GROUP * GROUPS)]
    ours = each_group_advantages(prompts, rewards, WEIGHTS, spread=Spread("group", 1e-4, 0.0))
    count = GROUP * GROUPS
    return [
        values(
            SCRIPT,
            f"advantages of {GROUPS} groups of {GROUP} with three rewards",
            "advantage_of each; theirs times sqrt(24/23), since ours divide by the population's deviation",
            theirs * (count / (count - 1)) ** 0.5,
            ours,
        )
    ]
