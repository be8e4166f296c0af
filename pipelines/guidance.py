"""One network call of a sampler: classifier-free guidance, precision and gradient checkpointing in one function.

Classifier-free guidance: arXiv 2207.12598; gradient checkpointing: arXiv 1604.06174 (torch's, non-reentrant).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils import checkpoint as checkpointing

from pipelines.conditioning import Conditioning
from pipelines.errors import PipelineError
from pipelines.generator import Generator

Predictor = Callable[[Tensor, Tensor], Tensor]
Autocast = Callable[[], AbstractContextManager[Any]]


def guided_predictor(
    generator: Generator,
    cond: Conditioning,
    guidance: float = 1.0,
    negative: Conditioning | None = None,
    *,
    autocast: Autocast = nullcontext,
    checkpoint: bool = False,
    constant_negative: bool = False,
) -> Predictor:
    """Return ``predict(x_t, t)`` with classifier-free guidance in ONE network call on a doubled batch.

    ``uncond + guidance * (cond - uncond)`` for every finite ``guidance >= 0``: 1 is the conditional prediction alone
    and 0 the unconditional one, each at the cost of a single batch. (diffusers takes anything up to 1 for 1.) A family
    may combine the two predictions otherwise (`Generator.guide`; Qwen-Image does), in sampling and training alike.
    `negative` (a batch of one, or as long as `cond`) defaults to the family's unconditional conditioning; families
    without one (those distilled from guidance, as FLUX.1) need it given. Everything that does not change between steps
    is prepared here, once.

    `autocast` makes the context of each call. With `checkpoint` a call that has a graph keeps its inputs alone and the
    backward pass computes the rest again: one more forward pass, and the same gradients to the bit. With
    `constant_negative` no gradient flows through the prediction without the prompt.
    """
    predict = _guided(generator, cond, guidance, negative, constant_negative)

    def call(x_t: Tensor, t: Tensor) -> Tensor:
        # Older versions of torch give the cast weight of a call without a graph to a later call with one, whose
        # gradient then never reaches the weight. A context of our own does not help within one of the caller's.
        torch.clear_autocast_cache()
        with autocast():
            output = predict(x_t, t)
        torch.clear_autocast_cache()
        return output

    def checkpointed(x_t: Tensor, t: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return call(x_t, t)
        output: Tensor = checkpointing.checkpoint(call, x_t, t, use_reentrant=False)
        return output

    return checkpointed if checkpoint else call


def _guided(
    generator: Generator, cond: Conditioning, guidance: float, negative: Conditioning | None, constant: bool
) -> Predictor:
    if not 0.0 <= guidance < math.inf:
        raise PipelineError(f"guidance must be a number of at least 0 (1 is none), got {guidance}.")
    cond = cond.to(generator.device, generator.dtype)
    varies = generator.guidance_varies
    if guidance == 1.0 and not varies:
        return lambda x_t, t: generator.predict(x_t, t, cond)
    default = negative is None
    if default:
        generator.check_guidance(guidance)
    negative = (generator.unconditional() if negative is None else negative).to(generator.device, generator.dtype)
    if len(negative) not in (1, len(cond)):
        raise PipelineError(
            f"negative must hold 1 or {len(cond)} prompts to go with {len(cond)}, got {len(negative)}."
        )
    if len(negative) != len(cond):
        negative = negative.repeat_interleave(len(cond))
    if default:
        negative.time_ids = cond.time_ids
    if negative.first_frame is None:
        negative.first_frame, negative.image_embeds = cond.first_frame, cond.image_embeds
    if guidance == 0.0 and not varies:
        return lambda x_t, t: generator.predict(x_t, t, negative)
    both = Conditioning.cat([negative, cond])

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        without, with_prompt = generator.predict(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        without = without.detach() if constant else without
        return generator.guide(with_prompt, without, generator.guidance_at(guidance, t))

    return predict
