"""The cross model of MPS: layers in which image tokens attend to words, then to each other.

Written from the description of its parts and the names and shapes of the released weights: pre-normalised residual
layers in which attention and a SwiGLU feed-forward (Shazeer 2020, arXiv:2002.05202) run side by side on the same input
(as in PaLM, Chowdhery et al. 2022, arXiv:2204.02311), and all heads share one key and one value (Shazeer 2019,
arXiv:1911.02150). The self-attention has rotary positions (Su et al. 2021, arXiv:2104.09864), over [CLS] and the
patches in reading order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from rewards.backbones.heads import in_float32
from rewards.errors import RewardError


class Norm(nn.Module):
    """Layer norm whose bias is zero and not trained, though it stands among the weights."""

    bias: Tensor

    def __init__(self, width: int) -> None:
        """`width` features."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.register_buffer("bias", torch.zeros(width))

    def forward(self, hidden: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """Normalise the last dimension."""
        return F.layer_norm(hidden, hidden.shape[-1:], self.weight, self.bias)


class SwiGlu(nn.Module):
    """The first half of the features, gated by the second."""

    def forward(self, hidden: Float[Tensor, "*batch twice"]) -> Float[Tensor, "*batch width"]:
        """Halve the last dimension."""
        values, gate = hidden.chunk(2, dim=-1)
        return F.silu(gate) * values


class Residual(nn.Module):
    """Add a layer's output to its input; the attribute keeps the published name `fn`."""

    def __init__(self, fn: nn.Module) -> None:
        """`fn`: the layer."""
        super().__init__()
        self.fn = fn

    def forward(self, hidden: Tensor, *rest: Tensor) -> Tensor:
        """Add."""
        return hidden + self.fn(hidden, *rest)


class Rotary(nn.Module):
    """Angles of the positions of a sequence, in at least float32: half precision is too coarse for far positions."""

    inv_freq: Tensor

    def __init__(self, head_width: int) -> None:
        """Compute one frequency for each pair of a head's features."""
        super().__init__()
        self.register_buffer("inv_freq", 10000.0 ** -(torch.arange(0, head_width, 2).float() / head_width))

    def forward(self, count: int) -> Float[Tensor, "count head_width"]:
        """Return the angle of every feature at `count` positions."""
        return (torch.arange(count, device=self.inv_freq.device)[:, None] * self.inv_freq).repeat(1, 2)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
        return super()._apply(in_float32(fn), recurse)


class CrossLayer(nn.Module):
    """Attention of image tokens to words, beside a feed-forward."""

    def __init__(self, width: int, heads: int, head_width: int, inner: int) -> None:
        """`inner`: features between the two halves of the feed-forward."""
        super().__init__()
        self.heads = heads
        self.norm = Norm(width)
        self.to_q = nn.Linear(width, heads * head_width, bias=False)
        self.to_kv = nn.Linear(width, 2 * head_width, bias=False)
        self.to_out = nn.Linear(heads * head_width, width, bias=False)
        self.ff = nn.Sequential(nn.Linear(width, 2 * inner, bias=False), SwiGlu(), nn.Linear(inner, width, bias=False))

    def forward(
        self,
        tokens: Float[Tensor, "batch tokens width"],
        words: Float[Tensor, "batch words width"],
        kept: Bool[Tensor, "batch words"],
    ) -> Float[Tensor, "batch tokens width"]:
        """Attend to the kept words, which are not normalised."""
        tokens = self.norm(tokens)
        keys, values = self.to_kv(words).chunk(2, dim=-1)
        attended = _attend(self.to_q(tokens), keys, values, self.heads, kept[:, None, None, :])
        return self.to_out(attended) + self.ff(tokens)


class SelfLayer(nn.Module):
    """Attention of image tokens to each other, beside a feed-forward, from one fused projection."""

    def __init__(self, width: int, heads: int, head_width: int, inner: int) -> None:
        """`inner`: features between the two halves of the feed-forward."""
        super().__init__()
        self.heads = heads
        self.parts = (heads * head_width, head_width, head_width, 2 * inner)
        self.norm = Norm(width)
        self.rotary_emb = Rotary(head_width)
        self.fused_attn_ff_proj = nn.Linear(width, sum(self.parts), bias=False)
        self.attn_out = nn.Linear(heads * head_width, width, bias=False)
        self.ff_out = nn.Sequential(SwiGlu(), nn.Linear(inner, width, bias=False))

    def forward(self, tokens: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens width"]:
        """Attend to all tokens."""
        queries, keys, values, hidden = self.fused_attn_ff_proj(self.norm(tokens)).split(self.parts, dim=-1)
        angles = self.rotary_emb(tokens.shape[1])
        queries = _rotate(queries.unflatten(-1, (self.heads, -1)), angles[:, None]).flatten(-2)
        attended = _attend(queries, _rotate(keys, angles), values, self.heads, None)
        return self.attn_out(attended) + self.ff_out(hidden)


class CrossModel(nn.Module):
    """Layers that take image tokens `[B, N, D]` and words `[B, W, D]` to image tokens `[B, N, D]`."""

    def __init__(self, width: int, layers: int, heads: int, head_width: int, inner: int) -> None:
        """The released model has 1024 features, 4 layers, 16 heads of 64, and 4096 features inside."""
        super().__init__()
        sizes = (width, heads, head_width, inner)
        self.layers = nn.ModuleList(
            nn.ModuleList([Residual(CrossLayer(*sizes)), Residual(SelfLayer(*sizes))]) for _ in range(layers)
        )

    @classmethod
    def like(cls, state: Mapping[str, Tensor], prefix: str) -> CrossModel:
        """Build an empty model of the sizes that a state dict has below `prefix`."""
        first = f"{prefix}layers.0.0.fn."
        try:
            inner_width, width = state[first + "to_q.weight"].shape
            head_width = state[first + "to_kv.weight"].shape[0] // 2
            inner = state[first + "ff.2.weight"].shape[1]
        except KeyError as error:
            raise RewardError(f"the checkpoint lacks {error.args[0]}; it is not a model of MPS") from error
        layers = {name.removeprefix(prefix).split(".")[1] for name in state if name.startswith(f"{prefix}layers.")}
        return cls(width, len(layers), inner_width // head_width, head_width, inner)

    def forward(
        self,
        tokens: Float[Tensor, "batch tokens width"],
        words: Float[Tensor, "batch words width"],
        kept: Bool[Tensor, "batch words"],
    ) -> Float[Tensor, "batch tokens width"]:
        """Attend to the kept words and to each other, layer by layer; every prompt needs a kept word."""
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleList)
            tokens = layer[1](layer[0](tokens, words, kept))
        return tokens


def _attend(queries: Tensor, keys: Tensor, values: Tensor, heads: int, kept: Tensor | None) -> Tensor:
    """Attend with all heads to the same keys `[B, K, d]` and values; queries and result are `[B, N, heads * d]`."""
    per_head = queries.unflatten(-1, (heads, -1)).transpose(1, 2)
    keys, values = (tensor[:, None].expand(-1, heads, -1, -1) for tensor in (keys, values))
    return F.scaled_dot_product_attention(per_head, keys, values, attn_mask=kept).transpose(1, 2).flatten(-2)


def _rotate(vectors: Tensor, angles: Tensor) -> Tensor:
    """Rotate pairs of features, i and i + half, by the angles of their positions."""
    first, second = vectors.chunk(2, dim=-1)
    cos, sin = angles.cos().to(vectors.dtype), angles.sin().to(vectors.dtype)
    return vectors * cos + torch.cat([-second, first], dim=-1) * sin
