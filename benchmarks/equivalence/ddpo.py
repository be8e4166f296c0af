"""DDPO's clipped objective, its log-densities and its running advantages against the authors' training script."""

from __future__ import annotations

from collections import deque
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.equivalence.checkout import Checkout
from benchmarks.equivalence.comparing import Comparison, World, losses, values
from benchmarks.equivalence.stepping import Steps
from mmalign.losses import clipped_policy_gradient
from mmalign.losses.advantages import PromptStatistics

REPOSITORY = "kvablack/ddpo-pytorch"
SCRIPT, STEP, TRACKER = (
    "scripts/train.py",
    "ddpo_pytorch/diffusers_patch/ddim_with_logprob.py",
    "ddpo_pytorch/stat_tracking.py",
)
STEPS, GUIDANCE = 50, 5.0
CLIP, CUT = 1e-4, 5.0


def compare(checkout: Checkout) -> list[Comparison]:
    """Run the script from the network's call to the loss, one step of each of 50 chains, and its statistics."""
    from diffusers import DDIMScheduler

    functions = checkout.functions(STEP, "_left_broadcast", "_get_variance", "ddim_step_with_logprob").run(
        DDIMScheduler=DDIMScheduler
    )
    step = checkout.statements(SCRIPT, r"with autocast\(\)", r"loss = torch\.mean\(torch\.maximum\(")
    config = SimpleNamespace(
        train=SimpleNamespace(cfg=True, adv_clip_max=CUT, clip_range=CLIP),
        sample=SimpleNamespace(guidance_scale=GUIDANCE, eta=1.0),
    )

    def theirs(steps: Steps, advantages: Tensor) -> Tensor:
        loss: Tensor = step.run(
            autocast=nullcontext,
            config=config,
            pipeline=SimpleNamespace(scheduler=steps.world.scheduler),
            ddim_step_with_logprob=functions["ddim_step_with_logprob"],
            unet=steps.world.network,
            embeds=steps.both_prompts,
            sample={
                "latents": steps.states[:, None],
                "next_latents": steps.next_states[:, None],
                "timesteps": steps.t[:, None],
                "log_probs": steps.old_log_probs[:, None],
                "advantages": advantages,
            },
            j=0,
        )["loss"]
        return loss

    return [objective(SCRIPT, theirs), advantages(checkout, TRACKER)]


def objective(file: str, theirs: Any) -> Comparison:
    """Compare the objective of one step at each of 50 levels, ratios near 1 and beyond the clip."""
    steps = Steps(World(change=4e-3), STEPS, GUIDANCE)
    advantage = 4 * steps.world.draw(STEPS)

    def ours() -> Tensor:
        now = steps.log_probs(steps.next_states)
        return clipped_policy_gradient(now, steps.old_log_probs, advantage.clamp(-CUT, CUT), clip=CLIP).mean()

    ratio = (steps.log_probs(steps.next_states) - steps.old_log_probs).detach().exp()
    beyond = int(((ratio - 1).abs() > CLIP).sum())
    return losses(
        file,
        f"loss of {STEPS} steps, from the network's predictions, {beyond} ratios beyond the clip",
        f"clip {CLIP:g}, advantage_clip {CUT:g}, {STEPS} steps, eta 1, guidance {GUIDANCE:g}",
        lambda: theirs(steps, advantage),
        ours,
        steps.world.network.inputs(),
    )


def advantages(checkout: Checkout, file: str) -> Comparison:
    """Compare the advantages of four rounds of six prompts, before and after a prompt has enough rewards."""
    found = checkout.functions(file, "PerPromptStatTracker").run(deque=deque)["PerPromptStatTracker"]
    theirs, ours, world = found(16, 8), PromptStatistics(buffer_size=16, min_count=8, clip=None), World()
    rows: list[tuple[Tensor, Tensor]] = []
    for _ in range(4):
        prompts, rewards = [f"prompt {i % 6}" for i in range(24)], world.draw(24)
        rows.append((torch.from_numpy(theirs.update(prompts, rewards.numpy())), ours.advantages(prompts, rewards)))
    return values(
        file,
        "advantages of four rounds",
        "advantage: running, buffer 16, min_count 8; theirs adds 1e-6 to the deviation, ours 1e-8",
        torch.cat([a for a, _ in rows]),
        torch.cat([b for _, b in rows]),
    )
