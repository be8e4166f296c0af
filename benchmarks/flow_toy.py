"""The toy of `benchmarks.flow_claims_forward`: points of the plane, a small velocity network, rounds of learning."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmalign.core.ema import Shadow
from mmalign.losses import (
    awm_log_prob,
    clipped_policy_gradient,
    denoising_error,
    dgpo,
    nft,
    old_policy_decay,
    optimality,
)
from mmalign.losses.advantages import Spread, group_advantages

PROMPTS, STEPS, UPDATES = 8, 10, 60
Objective = Callable[["Batch"], Tensor]


class Velocity(nn.Module):
    """A velocity of points [B, 2] at noise levels [B], given directions [B, 2]."""

    def __init__(self) -> None:
        """Draw the weights."""
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))

    def forward(self, x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        """Return v = noise - x0."""
        level = t[:, None]
        waves = torch.cat([level, (math.pi * level).sin(), (math.pi * level).cos(), level.square()], dim=1)
        found: Tensor = self.layers(torch.cat([x, waves, prompt], dim=1))
        return found


def directions() -> Tensor:
    """Return the prompts, unit vectors."""
    angle = torch.arange(PROMPTS) * (2 * math.pi / PROMPTS) + 0.2
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def data(prompt: Tensor) -> Tensor:
    """Return points of these prompts."""
    side = torch.randint(0, 2, (len(prompt), 1)) * 4.0 - 2.0
    return side * prompt + 0.35 * torch.randn_like(prompt)


def pretrained(steps: int = 2500) -> Velocity:
    """Return the network after flow matching."""
    torch.manual_seed(0)
    net = Velocity()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        prompt = directions()[torch.randint(0, PROMPTS, (512,))]
        x0, noise, t = data(prompt), torch.randn(512, 2), torch.rand(512)
        x = (1 - t[:, None]) * x0 + t[:, None] * noise
        denoising_error(net(x, t, prompt), noise - x0).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return net


@torch.no_grad()
def draw(net: Velocity, prompt: Tensor) -> Tensor:
    """Return samples by Euler's method."""
    x, levels = torch.randn_like(prompt), torch.linspace(1, 0, STEPS + 1)
    for now, after in zip(levels[:-1], levels[1:], strict=True):
        x = x + net(x, now.expand(len(x)), prompt) * (after - now)
    return x


def liking(x: Tensor, prompt: Tensor) -> Tensor:
    """Return the reward in [-1, 1]: how far on the + side."""
    return torch.tanh((x * prompt).sum(1))


def distance_to_data(x: Tensor, prompt: Tensor) -> Tensor:
    """Return the distance to the nearer of a prompt's two places; 0.44 on average for the data."""
    return torch.minimum((x - 2 * prompt).norm(dim=1), (x + 2 * prompt).norm(dim=1))


@dataclass
class Batch:
    """Samples at one noise level, and what three sets of weights predict there."""

    policy: Tensor
    old: Tensor
    reference: Tensor
    target: Tensor
    t: Tensor
    advantages: Tensor
    group: int


def awm_loss(batch: Batch, anchor: float = 1.0) -> Tensor:
    """Return AWM's objective with its anchor."""
    log_prob = awm_log_prob(batch.policy, batch.target, batch.t)
    gain = clipped_policy_gradient(log_prob, log_prob.detach(), batch.advantages.clamp(-5, 5) / 5, clip=1.0).mean()
    return gain + anchor * denoising_error(batch.policy, batch.old).mean()


def dgpo_loss(batch: Batch) -> Tensor:
    """Return DGPO's objective with its term of the reference."""
    errors, compared = (denoising_error(v, batch.target) for v in (batch.policy, batch.reference))
    loss = dgpo(errors, compared, batch.advantages.clamp(-5, 5), group=batch.group, beta=10.0).mean()
    return loss + 0.02 * denoising_error(batch.policy, batch.reference).mean()


def nft_loss(batch: Batch) -> Tensor:
    """Return DiffusionNFT's objective."""
    q = optimality(batch.advantages, clip=1.0)
    return nft(batch.policy, batch.old, batch.target, batch.t, q, beta=1.0).mean()


@dataclass
class Rule:
    """How a round is compared: images of a prompt, prompts, and the advantages of their rewards."""

    size: int = 8
    groups: int = PROMPTS
    advantages: Callable[[list[str], Tensor, Tensor], Tensor] | None = None

    def __call__(self, x: Tensor, prompt: Tensor, owners: list[str]) -> Tensor:
        """Return the advantages of samples."""
        if self.advantages is not None:
            return self.advantages(owners, x, prompt)
        return group_advantages(owners, liking(x, prompt), spread=Spread("batch"))


def learn(
    start: Velocity,
    objective: Objective,
    seed: int,
    rule: Rule,
    *,
    updates: int = UPDATES,
    rate: float = 1e-3,
    shared: bool = False,
    evaluate: Callable[[Velocity], None] = lambda net: None,
) -> Velocity:
    """Train a copy of the network in rounds of one update at six stratified levels."""
    torch.manual_seed(seed)
    net = copy.deepcopy(start)
    old, optimizer = Shadow(dict(net.named_parameters())), torch.optim.AdamW(net.parameters(), lr=rate)
    for step in range(updates):
        evaluate(net)
        old.follow(old_policy_decay(step, rate=0.001, limit=0.3))
        prompt = directions()[torch.arange(rule.groups) % PROMPTS].repeat_interleave(rule.size, 0)
        owners = [str(number // rule.size) for number in range(len(prompt))]
        x0 = draw(net, prompt)
        advantages = rule(x0, prompt, owners)
        for level in range(6):
            t = ((level + torch.rand(1)) / 6).clamp(0.02, 0.98).expand(len(x0))
            noise = torch.randn(rule.groups, 2).repeat_interleave(rule.size, 0) if shared else torch.randn_like(x0)
            x = (1 - t[:, None]) * x0 + t[:, None] * noise
            policy = net(x, t, prompt)
            with torch.no_grad():
                reference = start(x, t, prompt)
                with old.applied():
                    before = net(x, t, prompt)
            batch = Batch(policy, before, reference, noise - x0, t, advantages, rule.size)
            (objective(batch) / 6).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    evaluate(net)
    return net


def quality(net: Velocity, seed: int = 10_000) -> tuple[Tensor, Tensor]:
    """Return held-out samples and their prompts."""
    torch.manual_seed(seed)
    prompt = directions().repeat_interleave(256, 0)
    return draw(net, prompt), prompt
