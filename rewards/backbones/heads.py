"""Small heads on large encoders, kept in float32 while the encoder runs in half precision."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Float32Head(nn.Sequential):
    """Layers that stay in at least float32 when the module around them is moved to float16 or bfloat16.

    Published heads were trained and applied in float32; half precision would change the second decimal of a score.
    """

    def forward(self, hidden: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch outputs"]:
        """Apply the layers in their own dtype, whatever that of `hidden`."""
        return super().forward(hidden.to(next(self.parameters()).dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32Head:
        return super()._apply(in_float32(fn), recurse)


def in_float32(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Wrap the function that `nn.Module._apply` applies to tensors so that it never goes below float32."""

    def keep(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        whole = torch.promote_types(moved.dtype, torch.float32) == moved.dtype
        return moved if whole else tensor.to(moved.device)

    return keep
