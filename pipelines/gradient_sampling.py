"""Sample with a gradient from a reward of the result to the weights, with the chosen steps trained.

AlignProp: arXiv 2310.03739; DRaFT, DRaFT-K and DRaFT-LV: arXiv 2309.17400; ReFL: arXiv 2304.05977.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor

from pipelines.conditioning import Conditioning
from pipelines.generator import Generator
from pipelines.guidance import Autocast, Predictor, guided_predictor
from pipelines.kernels import Kernel, pick_kernel
from pipelines.sampling import Segment, Trajectory, noise_stream, sample
from pipelines.truncation import Truncation


@dataclass(frozen=True)
class GradientSample:
    """Latents with a graph, and the trained steps.

    latents
        ``[repeats * batch, *latent]``, all prompts of the batch in order, then all of them again, so
        that ``prompts * repeats`` go with them and ``reward.reshape(repeats, batch)`` is a row for each repeat.
    repeats
        Images a prompt: 1, and ``1 + n`` for DRaFT-LV, of which the first is the sampled one.
    grad_steps
        For each prompt, the sampling steps whose prediction is trained, ascending.
    """

    latents: Float[Tensor, "images *latent"]
    repeats: int
    grad_steps: tuple[tuple[int, ...], ...]


def sample_with_gradient(
    generator: Generator,
    cond: Conditioning,
    *,
    truncation: Truncation,
    rng: torch.Generator | Sequence[torch.Generator],
    seeds: Sequence[int],
    steps: int = 50,
    guidance: float = 7.5,
    kernel: Kernel | str | None = None,
    eta: float | Sequence[float] | None = None,
    negative: Conditioning | None = None,
    checkpoint: bool = True,
    autocast: Autocast = nullcontext,
) -> GradientSample:
    """Sample latents that carry the gradient of the network's weights; `truncation` chooses the steps.

    The mean of ``reward(decode(latents))`` is the objective of every mode. For DRaFT-LV that is the mean over the
    sample and its n re-noised copies, where the paper's algorithm adds their gradients up: 1 / (1 + n) of its step,
    which Adam does not see. For ReFL the latents are the clean ones predicted at the trained step.

    `rng` (on the CPU) draws the steps and nothing else: one generator draws once, for all samples; a sequence holds
    one for each sample, whose steps then depend on its own generator alone. Noise is that of `seeds`, one a prompt.
    The rest is as for `sample`, errors included; with `checkpoint` memory grows with the trained steps by no more
    than their latents.
    """
    chosen = pick_kernel(kernel, eta)
    if isinstance(rng, torch.Generator):
        grad_steps = (truncation.draw(steps, rng),) * len(seeds)
    else:
        grad_steps = tuple(truncation.draw(steps, one) for one in rng)

    def rollout(segment: Segment, copies: int = 1, latents: Tensor | None = None, record: bool = False) -> Trajectory:
        return sample(
            generator,
            _copies(cond, copies),
            steps=steps,
            guidance=guidance,
            kernel=chosen,
            seeds=list(seeds) * copies,
            negative=negative if negative is None or len(negative) == 1 else _copies(negative, copies),
            latents=latents,
            segment=segment,
            record=record,
            autocast=autocast,
        )

    if truncation.mode == "refl":
        exits = [exit_step for (exit_step,) in grad_steps]
        if len(set(exits)) == 1:
            sampled = rollout(Segment(0, exits[0], grad_steps[0], checkpoint=checkpoint)).latents
        else:
            path = rollout(Segment(exit=max(exits)), record=True)
            predict = guided_predictor(generator, cond, guidance, negative, autocast=autocast, checkpoint=checkpoint)
            sampled = _clean_at(generator, path, exits, predict)
        return GradientSample(sampled, 1, grad_steps)
    sampled = rollout(Segment.of_each(grad_steps, checkpoint=checkpoint)).latents
    if truncation.mode != "low-variance":
        return GradientSample(sampled, 1, grad_steps)
    noisy = _renoised(generator, sampled.detach(), seeds, steps, truncation.repeats)
    last = Segment(steps - 1, None, grad_steps[0], checkpoint=checkpoint)
    again = rollout(last, truncation.repeats, noisy).latents
    return GradientSample(torch.cat([sampled, again]), 1 + truncation.repeats, grad_steps)


def _clean_at(generator: Generator, path: Trajectory, exits: list[int], predict: Predictor) -> Tensor:
    """Return the clean latents that each sample's prediction at a step of its own implies, with its graph."""
    assert path.states is not None
    x = path.states[exits, range(len(exits))]
    t = path.timesteps[exits].to(x.device)
    with torch.enable_grad():
        return generator.process.clean(x, predict(x, t), t)


def _renoised(generator: Generator, x0: Tensor, seeds: Sequence[int], steps: int, repeats: int) -> Tensor:
    """Noise the sampled latents anew to the level of the last step, ``[repeats * batch, ...]``.

    Each sample's noise follows in its own stream upon the ``1 + steps`` draws that `sample` may have taken.
    """
    level = generator.process.schedule(steps).levels[-1].item()
    stream = islice(noise_stream(seeds, x0.shape[1:], x0.device), 1 + steps, 1 + steps + repeats)
    return torch.cat([generator.process.add_noise(x0, noise.to(x0.dtype), level) for noise in stream])


def _copies(cond: Conditioning, copies: int) -> Conditioning:
    return cond if copies == 1 else Conditioning.cat([cond] * copies)
