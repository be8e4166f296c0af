"""Encoded prompts as a batch of tensors that can be indexed, joined and cached."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pipelines.errors import PipelineError


@dataclass
class Conditioning:
    """The denoiser's conditioning for each prompt of a batch.

    prompt_embeds
        Hidden states of the text encoder(s), ``[batch, length, width]``.
    pooled
        Pooled text embedding, ``[batch, pooled_width]``; SDXL, SD3 and FLUX.1 only.
    time_ids
        Size conditioning in pixels, ``[batch, 6]``: original height and width, crop top and left, target height and
        width; SDXL only. Always kept in float32, because bf16 cannot hold most pixel counts.
    mask
        Which positions hold text, ``[batch, length]``; Z-Image and Qwen-Image only, whose other positions hold zeros.
    first_frame
        Latents that an image-to-video model sees of the first frame, ``[batch, channels, frames, rows, columns]``;
        float32 as all latents are.
    image_embeds
        Hidden states of the first frame, ``[batch, tokens, width]``; Wan 2.1 only.
    """

    prompt_embeds: Float[Tensor, "batch length width"]
    pooled: Float[Tensor, "batch pooled_width"] | None = None
    time_ids: Float[Tensor, "batch 6"] | None = None
    mask: Bool[Tensor, "batch length"] | None = None
    first_frame: Float[Tensor, "batch channels frames rows columns"] | None = None
    image_embeds: Float[Tensor, "batch tokens image_width"] | None = None

    def __post_init__(self) -> None:
        """Check that all tensors have one batch size."""
        sizes = {name: len(tensor) for name, tensor in self.tensors().items()}
        if len(set(sizes.values())) > 1:
            raise PipelineError(f"a Conditioning needs tensors of one batch size, got {sizes}.")

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self.prompt_embeds)

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Conditioning:
        """Return the chosen rows as a batch; an integer gives a batch of one."""
        if isinstance(index, int):
            position = range(len(self))[index]
            index = slice(position, position + 1)
        elif not isinstance(index, slice):
            index = torch.as_tensor(index, dtype=None if isinstance(index, Tensor) else torch.long)
        rows = index
        return self._map(lambda name, tensor: tensor[rows.to(tensor.device) if isinstance(rows, Tensor) else rows])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        """Move to a device and cast the embeddings; `time_ids` and `first_frame` keep float32, `mask` its own type."""
        types = {"time_ids": torch.float32, "mask": torch.bool, "first_frame": torch.float32}
        return self._map(lambda name, tensor: tensor.to(device, types.get(name, dtype)))

    def repeat_interleave(self, n: int) -> Conditioning:
        """Repeat each row `n` times in place: ``a, b -> a, a, b, b`` for ``n=2``."""
        return self._map(lambda name, tensor: tensor.repeat_interleave(n, dim=0))

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are present, by name, ready for safetensors."""
        present = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in present.items() if tensor is not None}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Conditioning:
        """Rebuild from what `tensors` returned; unknown names are an error."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(tensors) - known)
        if unknown or "prompt_embeds" not in tensors:
            raise PipelineError(
                f"cannot read a Conditioning from {sorted(tensors)}; needs prompt_embeds, allows {sorted(known)}."
            )
        return cls(**tensors)

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Join batches in order; all must carry the same tensors."""
        names = [set(part.tensors()) for part in parts]
        if not parts or any(name != names[0] for name in names):
            raise PipelineError(
                f"only conditionings with the same tensors can be joined, got {[sorted(name) for name in names]}."
            )
        return parts[0]._map(lambda name, _: torch.cat([getattr(part, name) for part in parts]))

    def _map(self, change: Callable[[str, Tensor], Tensor]) -> Conditioning:
        return Conditioning(**{name: change(name, tensor) for name, tensor in self.tensors().items()})
