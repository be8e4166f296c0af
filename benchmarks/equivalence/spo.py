"""SPO's step loss and choice of pairs against the authors' training script; LPO's share the code."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.equivalence.checkout import Checkout
from benchmarks.equivalence.comparing import SHAPE, Comparison, World, losses, values
from mmalign.losses import spo, step_preference
from pipelines import ddim
from pipelines.conditioning import Conditioning
from pipelines.guidance import guided_predictor
from pipelines.sampling import gaussian_log_prob

REPOSITORY = "RockeyCoss/SPO"
ROOT = "spo_training_and_inference"
STEPS, GUIDANCE, CLIP = 20, 5.0, 0.1


def compare(checkout: Checkout) -> list[Comparison]:
    """Run the script from the networks' calls to the loss, and its choice of the best and the worst candidate."""
    chosen = checkout.functions(f"{ROOT}/spo/preference_models/compare_funcs.py", "preference_score_compare")
    scores = World().draw(4, 40)
    indices, valid = chosen.function("preference_score_compare")(scores, 0.3)
    return [
        step_loss(checkout, f"{ROOT}/train_scripts/train_spo.py", f"{ROOT}/spo", beta=10.0),
        values(
            f"{ROOT}/spo/preference_models/compare_funcs.py",
            "best, worst and validity of 40 steps with 4 candidates",
            "threshold 0.3",
            torch.stack([*indices, valid]),
            torch.stack(step_preference(scores, 0.3)),
        ),
    ]


def step_loss(checkout: Checkout, script: str, package: str, *, beta: float) -> Comparison:
    """Compare the loss of pairs of candidates, one pair at each level of a 20-step grid, some of them clipped."""
    from diffusers import DDIMScheduler

    world = World(change=4e-2)
    world.scheduler.set_timesteps(STEPS)
    t = world.scheduler.timesteps.clone()
    state, states, negative = world.draw(STEPS, *SHAPE), world.draw(STEPS, 5, 6), world.draw(1, 5, 6)
    predict = guided_predictor(world, Conditioning(states), GUIDANCE, Conditioning(negative))  # type: ignore[arg-type]

    def step() -> tuple[Tensor, Tensor]:
        mean, std = ddim(1.0)(world.process, state, predict(state, t), t, (t - 50).clamp_min(-1))
        return mean, std.reshape(-1)

    def reference_step() -> tuple[Tensor, Tensor]:
        world.network.disable_adapters()
        with torch.no_grad():
            result = step()
        world.network.enable_adapters()
        return result

    mean, std = (x.detach() for x in step())
    candidates = mean + std.reshape(-1, 1, 1, 1) * world.draw(2, STEPS, *SHAPE)

    def log_ratios() -> list[Tensor]:
        policy, reference = step()[0], reference_step()[0]
        return [gaussian_log_prob(x, policy, std) - gaussian_log_prob(x, reference, std) for x in candidates]

    def theirs() -> Tensor:
        functions = checkout.functions(
            f"{package}/custom_diffusers/ddim_with_logprob.py",
            *("_left_broadcast", "_get_variance", "ddim_step_with_logprob"),
        ).run(DDIMScheduler=DDIMScheduler)
        sides = [{"latents": state, "timesteps": t, "next_latents": x, "prompt_embeds": states} for x in candidates]
        names: dict[str, Any] = checkout.statements(script, r"with autocast\(\)", r"loss = -torch\.log\(").run(
            autocast=nullcontext,
            config=SimpleNamespace(
                train=SimpleNamespace(cfg=True, eps=CLIP, beta=beta),
                sample=SimpleNamespace(guidance_scale=GUIDANCE, eta=1.0),
            ),
            pipeline=SimpleNamespace(scheduler=world.scheduler),
            ddim_step_with_logprob=functions["ddim_step_with_logprob"],
            unet=world.network,
            ref=world.network.reference,
            sample_0=sides[0],
            sample_1=sides[1],
            embeds_0=torch.cat([negative.expand_as(states), states]),
            embeds_1=torch.cat([negative.expand_as(states), states]),
            train_b_start=0,
            train_b_end=STEPS,
        )
        loss: Tensor = names["loss"]
        return loss

    def ours() -> Tensor:
        best, worst = log_ratios()
        return spo(best, worst, torch.ones(STEPS, dtype=torch.bool), beta=beta, clip=CLIP).mean()

    ratios = torch.stack(log_ratios()).exp()
    clipped = int(((ratios - 1).abs() > CLIP).sum())
    return losses(
        script,
        f"loss of pairs of candidates, from the networks' predictions, {clipped} of {2 * STEPS} ratios clipped",
        f"beta {beta:g}, clip = eps = {CLIP:g}, {STEPS} steps, eta 1, guidance {GUIDANCE:g}; log-densities are means",
        theirs,
        ours,
        world.network.inputs(),
    )
