"""DiffusionNFT's objective, its advantages and the old policy's decay against the authors' training script."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace

import torch
from torch import Tensor

from benchmarks.equivalence.checkout import Checkout
from benchmarks.equivalence.comparing import SHAPE, Comparison, World, losses, values
from mmalign.losses import denoising_error, nft, old_policy_decay, optimality
from mmalign.losses.advantages import Spread, group_advantages

REPOSITORY = "NVlabs/DiffusionNFT"
SCRIPT, TRACKER = "scripts/train_nft_sd3.py", "flow_grpo/stat_tracking.py"
BATCH, CLIP, REFERENCE = 8, 5.0, 0.1
SCHEDULES = {0: (0, 0.0, 0.0), 1: (0, 0.001, 0.5), 2: (75, 0.0075, 0.999)}


def compare(checkout: Checkout) -> list[Comparison]:
    """Run the script from the three predictions to the loss; its statistics; its schedules."""
    rows = [_objective(checkout, beta, mode) for beta, mode in ((1.0, "all"), (0.1, "all"), (1.0, "positive_only"))]
    return [*rows, _advantages(checkout), _decays(checkout)]


def _objective(checkout: Checkout, beta: float, mode: str) -> Comparison:
    step = checkout.statements(SCRIPT, r"loss_terms = ", r"loss \+= config\.train\.beta")
    world = World(pairs=BATCH)
    x0, noise, moved = (world.draw(BATCH, *SHAPE) for _ in range(3))
    level, states, advantages = torch.linspace(0.05, 1, BATCH).double(), world.states[:BATCH], 3 * world.draw(BATCH)
    sigma = level.reshape(-1, 1, 1, 1)
    x_t = (1 - sigma) * x0 + sigma * noise
    with torch.no_grad():
        reference = world.network.reference(x_t, 1000 * level, states).sample
        old = world.network(x_t, 1000 * level, states).sample + 0.05 * moved

    def theirs() -> Tensor:
        train = SimpleNamespace(adv_clip_max=CLIP, adv_mode=mode, beta=REFERENCE)
        loss: Tensor = step.run(
            config=SimpleNamespace(beta=beta, train=train),
            train_sample_batch={"advantages": advantages[:, None]},
            j_idx=0,
            x0=x0,
            xt=x_t,
            t_expanded=sigma,
            forward_prediction=world.network(x_t, 1000 * level, states).sample,
            old_prediction=old,
            ref_forward_prediction=reference,
        )["loss"]
        return loss

    def ours() -> Tensor:
        policy = world.network(x_t, 1000 * level, states).sample
        q = optimality(advantages, clip=CLIP, mode=mode.removesuffix("_only"))
        loss = CLIP * nft(policy, old, noise - x0, level, q, beta=beta).mean()
        return loss + REFERENCE * denoising_error(policy, reference).mean()

    return losses(
        SCRIPT,
        f"loss at {BATCH} noise levels, from the networks' predictions, beta {beta:g}, {mode}",
        f"advantage_clip {CLIP:g}, reference_weight {REFERENCE:g}",
        theirs,
        ours,
        world.network.inputs(),
    )


def _advantages(checkout: Checkout) -> Comparison:
    tracker = checkout.functions(TRACKER, "PerPromptStatTracker").run(deque=deque)["PerPromptStatTracker"]
    rewards, prompts = World().draw(24), [f"prompt {index // 6}" for index in range(24)]
    found = torch.from_numpy(tracker(True).update(prompts, rewards.numpy()))
    return values(
        TRACKER,
        "advantages of four prompts",
        "advantage_std batch, advantage_epsilon 1e-4",
        found,
        group_advantages(prompts, rewards, spread=Spread("batch", 1e-4)),
    )


def _decays(checkout: Checkout) -> Comparison:
    theirs = checkout.functions(SCRIPT, "return_decay").function("return_decay")
    steps = [(kind, step) for kind in SCHEDULES for step in range(0, 700, 7)]
    found = torch.tensor([float(theirs(step, kind)) for kind, step in steps], dtype=torch.float64)
    own = [
        old_policy_decay(step, **dict(zip(("flat", "rate", "limit"), SCHEDULES[kind], strict=True)))
        for kind, step in steps
    ]
    return values(
        SCRIPT,
        "decay of the old policy over 700 steps",
        "old_decay copy, slow, late",
        found,
        torch.tensor(own, dtype=torch.float64),
    )
