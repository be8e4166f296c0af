"""Sampling steps with a density, as the policy gradients and the dense reward learn from them: eta 1, guidance."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.equivalence.comparing import SHAPE, World
from pipelines import ddim
from pipelines.conditioning import Conditioning
from pipelines.guidance import guided_predictor
from pipelines.sampling import gaussian_log_prob


class Steps:
    """One transition at each level of a sampling grid, drawn from the reference; log-densities are means."""

    def __init__(self, world: World, steps: int, guidance: float) -> None:
        """Draw the states, the prompts, and where each step led."""
        self.world = world
        self.guidance = guidance
        world.scheduler.set_timesteps(steps)
        self.t: Tensor = world.scheduler.timesteps.clone()
        self.below = (self.t - 1000 // steps).clamp_min(-1)
        self.states = world.draw(steps, *SHAPE)
        self.prompts, self.negative = world.draw(steps, 5, 6), world.draw(1, 5, 6)
        mean, std = self.gaussian(reference=True)
        self.next_states = mean + std.reshape(-1, 1, 1, 1) * world.draw(steps, *SHAPE)
        self.old_log_probs = self.log_probs(self.next_states, reference=True)

    @property
    def both_prompts(self) -> Tensor:
        """The prompts as scripts give them to a network for guidance: the negative ones first."""
        return torch.cat([self.negative.expand_as(self.prompts), self.prompts])

    def gaussian(self, *, reference: bool = False) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of every step under the policy or, without a graph, the reference."""
        world = self.world
        cond, negative = Conditioning(self.prompts), Conditioning(self.negative)
        predict = guided_predictor(world, cond, self.guidance, negative)  # type: ignore[arg-type]
        world.network.adapter = not reference
        with torch.set_grad_enabled(not reference):
            output = predict(self.states, self.t)
        world.network.adapter = True
        mean, std = ddim(1.0)(world.process, self.states, output, self.t, self.below)
        return mean, std.reshape(-1)

    def log_probs(self, next_states: Tensor, *, reference: bool = False) -> Tensor:
        """Return the log-density of having gone to `next_states`."""
        return gaussian_log_prob(next_states, *self.gaussian(reference=reference))
