"""The gradient through the sampler, cut at one step a rollout, against AlignProp's second code."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.equivalence.checkout import Checkout, Fragment
from benchmarks.equivalence.comparing import SHAPE, Comparison, World, losses
from pipelines import Segment, sample
from pipelines.conditioning import Conditioning

REPOSITORY = "mihirp1998/AlignProp"
FILE = "sd_pipeline.py"
STEPS, GUIDANCE = 10, 5.0


def compare(checkout: Checkout) -> list[Comparison]:
    """Run the script's loop over the sampling steps with a cut at the third, and at the last."""
    loop = checkout.statements(FILE, r"(?s)for i, t in .*backprop_timestep", r"for i, t in ")
    return [through_sampler(FILE, loop, tuple(range(cut, STEPS)), step=_ddim, backprop_timestep=cut) for cut in (2, 9)]


def through_sampler(file: str, loop: Fragment, trained: tuple[int, ...], *, step: Any, **names: object) -> Comparison:
    """Compare a linear function of the sampled latents, and its gradient, where only `trained` steps keep theirs."""
    world, count = World(change=1e-2), 2
    noise, weights = world.draw(count, *SHAPE), world.draw(count, *SHAPE)
    prompts, negative = world.draw(count, 5, 6), world.draw(1, 5, 6)

    def theirs() -> Tensor:
        world.scheduler.set_timesteps(STEPS)
        pipeline = SimpleNamespace(
            unet=lambda x, t, encoder_hidden_states, **_: (world.network(x, t, encoder_hidden_states).sample,),
            scheduler=world.scheduler,
        )
        latents: Tensor = loop.run(
            pipeline=pipeline,
            scheduler_step=step,
            timesteps=world.scheduler.timesteps,
            latents=noise,
            prompt_embeds=torch.cat([negative.expand_as(prompts), prompts]),
            do_classifier_free_guidance=True,
            guidance_scale=GUIDANCE,
            guidance_rescale=0.0,
            gradient_checkpoint=False,
            cross_attention_kwargs=None,
            eta=0.0,
            all_latents=[],
            all_log_probs=[],
            num_warmup_steps=0,
            progress_bar=SimpleNamespace(update=lambda: None),
            callback=None,
            **names,
        )["latents"]
        return (weights * latents).sum()

    def ours() -> Tensor:
        drawn = sample(
            world,  # type: ignore[arg-type]
            Conditioning(prompts),
            steps=STEPS,
            guidance=GUIDANCE,
            negative=Conditioning(negative),
            latents=noise,
            segment=Segment(grad_steps=trained),
        )
        return (weights * drawn.latents).sum()

    return losses(
        file,
        f"a function of sampled latents; trained steps {', '.join(map(str, trained))} of 0..{STEPS - 1}",
        f"{STEPS} steps, eta 0, guidance {GUIDANCE:g}",
        theirs,
        ours,
        world.network.inputs(),
    )


def _ddim(scheduler: Any, output: Tensor, t: Tensor, latents: Tensor, eta: float) -> SimpleNamespace:
    """Stand in for the step that the script imports from TRL."""
    return SimpleNamespace(latents=scheduler.step(output, t, latents, eta=eta).prev_sample, log_probs=None)
