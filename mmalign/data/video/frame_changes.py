"""Changes to the content of frames: `[..., 3, H, W]` in, the same shape and dtype out, the input left as it was.

Floats are in [0, 1], uint8 in 0 to 255. One rectangle, window or hue serves all frames of a video; noise is drawn anew
for each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Num, Shaped
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF

from mmalign.core.errors import UserError

Media = Num[Tensor, "*frames 3 height width"]


def mask(media: Media, rng: torch.Generator, *, area: tuple[float, float] = (0.25, 0.5), level: float = 0.83) -> Media:
    """Cover a rectangle of a random share `area` of the frame, and of its proportions, with light grey.

    The shares and the colour are those of RRPO (arXiv 2504.12083, section 3).
    """
    top, left, height, width = _window(media, rng, area)
    changed = media.clone()
    changed[..., top : top + height, left : left + width] = level if media.is_floating_point() else round(255 * level)
    return changed


def crop(media: Media, rng: torch.Generator, *, area: tuple[float, float] = (0.01, 0.2)) -> Media:
    """Cut out a random window of a random share `area` and enlarge it; the default is mDPO's (arXiv 2406.11839)."""
    top, left, height, width = _window(media, rng, area)
    window = media[..., top : top + height, left : left + width]
    return _on_floats(
        window,
        lambda x: F.interpolate(
            x.reshape(-1, *x.shape[-3:]), size=media.shape[-2:], mode="bilinear", align_corners=False, antialias=True
        ).reshape(media.shape),
    )


def hue(media: Media, rng: torch.Generator, *, turn: tuple[float, float] = (0.3, 0.5)) -> Media:
    """Turn every hue by a random share of the colour circle, either way; greys stay."""
    amount = _between(rng, *turn) * (1 if torch.rand((), generator=rng) < 0.5 else -1)
    return _on_floats(media, lambda x: TF.adjust_hue(x, amount))


def flip(media: Media, rng: torch.Generator) -> Media:
    """Mirror left and right."""
    return media.flip(-1)


def frame_noise(media: Media, rng: torch.Generator, *, share: float = 0.5, std: float = 0.3) -> Media:
    """Add Gaussian noise of deviation `std` to a random `share` of the frames (at least one), clipped to the range."""
    frames = media.shape[0] if media.ndim == 4 else 1
    chosen = torch.randperm(frames, generator=rng)[: max(1, round(share * frames))]

    def add(x: Tensor) -> Tensor:
        noisy = x.clone().reshape(frames, *media.shape[-3:])
        noisy[chosen] += std * torch.randn(noisy[chosen].shape, generator=rng).to(x)
        return noisy.clamp(0, 1).reshape(media.shape)

    return _on_floats(media, add)


def diffusion_noise(media: Media, rng: torch.Generator, *, step: int = 500) -> Media:
    """Diffuse frames to `step` of DDPM's 1000 (betas 1e-4 to 0.02, pixels in [-1, 1]), clipped to the range."""
    if not 0 <= step < 1000:
        raise UserError(f"step={step}: must be 0 to 999")
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[step].item()

    def diffuse(x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=rng).to(x)
        return ((kept**0.5 * (2 * x - 1) + (1 - kept) ** 0.5 * noise + 1) / 2).clamp(0, 1)

    return _on_floats(media, diffuse)


def black(media: Media, rng: torch.Generator) -> Media:
    """Show blank frames."""
    return torch.zeros_like(media)


def neighbour(
    media: Media,
    rng: torch.Generator,
    *,
    bank: Sequence[Media],
    embed: Callable[[Tensor], Shaped[Tensor, " features"]] | None = None,
    rank: int = 0,
) -> Media:
    """Show instead the `rank`-nearest other media of a bank, by cosine similarity of their embeddings by `embed`.

    By default `embed` is an 8x8 thumbnail of the mean frame; rDPO takes the model's own vision encoder. Media equal to
    the given one are never returned.
    """
    others = [other for other in bank if not (other.shape == media.shape and torch.equal(other, media))]
    if not 0 <= rank < len(others):
        raise UserError(f"rank={rank}: the bank holds {len(others)} other media")
    of = embed or _thumbnail
    similar = torch.stack([F.cosine_similarity(of(media), of(other), dim=0) for other in others])
    return others[int(similar.argsort(descending=True, stable=True)[rank])].clone()


def _thumbnail(media: Media) -> Shaped[Tensor, " features"]:
    mean = media.reshape(-1, *media.shape[-3:]).double().mean(0)
    small = F.adaptive_avg_pool2d(mean, 8).flatten()
    return small - small.mean()


def _window(media: Media, rng: torch.Generator, area: tuple[float, float]) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random rectangle that covers a share of the frame within `area`."""
    if not 0 < area[0] <= area[1] <= 1:
        raise UserError(f"area={area}: must be two shares, 0 < least <= most <= 1")
    share = _between(rng, *area)
    # Neither side may exceed the frame's: the proportions are drawn between the two extremes.
    height_share = share ** _between(rng, 0.25, 0.75)
    height = min(max(1, round(media.shape[-2] * height_share)), media.shape[-2])
    width = min(max(1, round(media.shape[-1] * share / height_share)), media.shape[-1])
    top = int(torch.randint(media.shape[-2] - height + 1, (), generator=rng))
    left = int(torch.randint(media.shape[-1] - width + 1, (), generator=rng))
    return top, left, height, width


def _between(rng: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=rng, dtype=torch.float64))


def _on_floats(media: Media, change: Callable[[Tensor], Tensor]) -> Media:
    """Apply a change that needs floats in [0, 1], and give the result the dtype of `media`."""
    if media.dtype in (torch.float32, torch.float64):
        return change(media)
    if media.is_floating_point():  # half precision: not every operation exists for it
        return change(media.float()).to(media.dtype)
    return (change(media.float() / 255) * 255).round().clamp(0, 255).to(media.dtype)
