"""Two networks that share the noise levels: one for the noisy ones, one for the others, as Wan 2.2 A14B has them."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn


class Experts(nn.Module):
    """Routes each sample of a batch to its expert by its level; the names of the two are diffusers'.

    Only an expert that has samples runs, so that only its weights get a gradient.
    """

    def __init__(self, noisy: nn.Module, clean: nn.Module, boundary: float) -> None:
        """Take the expert for levels from `boundary` up, and that for the levels below it."""
        super().__init__()
        self.transformer, self.transformer_2, self.boundary = noisy, clean, boundary

    def forward(
        self, hidden_states: Float[Tensor, "batch *latent"], timestep: Shaped[Tensor, " batch"], **inputs: Any
    ) -> tuple[Float[Tensor, "batch *latent"]]:
        """Return the prediction of each sample's own expert; tensors among `inputs` are batches too."""
        noisy = timestep >= self.boundary
        rows = [group.nonzero().flatten() for group in (noisy, ~noisy)]
        parts = []
        for expert, own in zip((self.transformer, self.transformer_2), rows, strict=True):
            if len(own):
                given = {name: one[own] if isinstance(one, Tensor) else one for name, one in inputs.items()}
                parts.append(expert(hidden_states=hidden_states[own], timestep=timestep[own], **given)[0])
        return (torch.cat(parts)[torch.cat(rows).argsort()],)

    def enable_gradient_checkpointing(self) -> None:
        """Trade compute for memory in the backward pass of both."""
        for expert in (self.transformer, self.transformer_2):
            expert.enable_gradient_checkpointing()  # type: ignore[operator]

    def set_attention_backend(self, backend: str) -> None:
        """Choose the attention kernel of both, in diffusers' terms."""
        for expert in (self.transformer, self.transformer_2):
            expert.set_attention_backend(backend)  # type: ignore[operator]
