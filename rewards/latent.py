"""A reward on noisy latents: half of a diffusion model, trained by `mmalign train-reward`.

Source: Zhang et al. 2025, arXiv:2502.01051; the network and its formula: `rewards.backbones.latent_network`. It scores
the noisy latents of a sampler, without a decoder or a prediction of the clean image (`score_latents`). It also scores
pixels like any reward: they are encoded and noised to a low level, always with the same noise.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from rewards.backbones.latent_files import LatentParts
from rewards.backbones.latent_network import Texts
from rewards.backbones.preprocess import Preprocess
from rewards.base import Reward
from rewards.errors import RewardError

CACHED_PROMPTS = 4096
PROBE_SIZE, PROBE_TOLERANCE = 64, 0.1


class LatentReward(Reward):
    """Fit of an image, or of noisy latents at any noise level, to its prompt, by half of a diffusion model.

    weights: the directory that `mmalign train-reward` wrote. level: the timestep at which pixels are scored, 0 the
    least noise. Latents are those of this very autoencoder: of another model, only where that has the same.
    """

    name: ClassVar[str] = "latent"
    needs = frozenset({"prompts"})
    differentiable = True
    range = (-100.0, 100.0)
    licence = "that of the generator it was made of"
    source = "trained by mmalign train-reward"
    citation = "Zhang et al. 2025, arXiv:2502.01051"

    def __init__(self, *, weights: str | PathLike[str] | None = None, level: int = 1, **options: Any) -> None:
        """Load network, autoencoder and tokenizers."""
        super().__init__(**options)
        if weights is None:
            raise RewardError(
                "latent: has no published weights; give weights=DIR, the output of `mmalign train-reward`"
            )
        parts = LatentParts.load(weights)
        self.alphas = parts.scheduler.alphas_cumprod.double()
        if not 0 <= level < len(self.alphas):
            raise RewardError(f"latent: level is {level}; 0 to {len(self.alphas) - 1} are allowed")
        self.level, self.source = level, f"trained by mmalign train-reward: {weights}"
        self.network = parts.network.to(self.device, self.dtype)
        # In float32: SDXL's autoencoder overflows in half precision.
        self.vae = parts.vae.to(self.device)
        self.truncation, self._tokens = parts.truncation, parts.tokens
        size = parts.network.image_size
        self.preprocess = Preprocess(size, (0.0,) * 3, (1.0,) * 3, rounding=False)
        self._texts: OrderedDict[str, Texts] = OrderedDict()

    def score_latents(
        self,
        latents: Float[Tensor, "batch channels height width"],
        t: int | Shaped[Tensor, " batch"],
        prompts: Sequence[str],
    ) -> Float[Tensor, " batch"]:
        """Score noisy latents, scaled as for the denoiser, at their timesteps: float32, without a gradient.

        Prompts are encoded once and remembered. Raises `RewardError` unless there is one for each.
        """
        if len(prompts) != len(latents):
            raise RewardError(f"latent: {len(prompts)} prompts for {len(latents)} latents; give one each")
        levels = torch.as_tensor(t, device=self.device).expand(len(latents))
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            parts = [
                self._score(latents[start:stop].to(self.device), levels[start:stop], prompts[start:stop])
                for start in range(0, len(latents), self.batch_size)
                for stop in [start + self.batch_size]
            ]
        return torch.cat(parts).to(latents.device, torch.float32)

    def score(
        self,
        media: Float[Tensor, "batch 3 height width"],
        prompts: Sequence[str] | None,
        references: Sequence[Tensor] | None,
    ) -> Float[Tensor, " batch"]:
        """Score images at the fixed level, all with the same noise."""
        assert prompts is not None, "declared in needs, and so checked before"
        latents = self.encode(self.preprocess(media))
        source = torch.Generator().manual_seed(0)
        noise = torch.randn(latents.shape[1:], generator=source, dtype=torch.float64).to(latents)
        alpha = float(self.alphas[self.level])
        noisy = alpha**0.5 * latents + (1 - alpha) ** 0.5 * noise
        return self._score(noisy, torch.full((len(noisy),), self.level, device=self.device), prompts)

    def encode(self, media: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch channels h w"]:
        """Return the (mean) latents of media in [0, 1], scaled for the denoiser."""
        encoded = self.vae.encode(media.to(self.device, self.vae.dtype) * 2 - 1)
        mean = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latents
        config = self.vae.config
        scale = float(config.get("scaling_factor") or 1.0)
        if config.get("latents_mean") and config.get("latents_std"):
            shift, std = (mean.new_tensor(config[key]).view(1, -1, 1, 1) for key in ("latents_mean", "latents_std"))
            return (mean - shift) * scale / std
        return (mean - float(config.get("shift_factor") or 0.0)) * scale

    @property
    def truncated_prompts(self) -> int:
        """How many distinct prompts were cut so far."""
        return self.truncation.count

    @torch.no_grad()
    def same_latents(self, encode: Callable[[Tensor], Tensor]) -> bool:
        """Tell whether another autoencoder, given as a function that encodes media in [0, 1], has the same latents.

        Both encode one test image, so that another file, precision or decoder of the same autoencoder does not matter.
        """
        line = torch.linspace(0, 1, PROBE_SIZE, device=self.device)
        disc = ((line[:, None] - 0.5) ** 2 + (line - 0.4) ** 2 < 0.05).float()
        picture = torch.stack([line.expand(PROBE_SIZE, -1), disc, 1 - line[:, None].expand(-1, PROBE_SIZE)])[None]
        own, other = self.encode(picture).double(), encode(picture).to(self.device).double()
        return own.shape == other.shape and bool((own - other).norm() <= PROBE_TOLERANCE * own.norm())

    def _score(self, latents: Tensor, t: Tensor, prompts: Sequence[str]) -> Tensor:
        texts = self._encoded([*prompts, ""])
        count = len(prompts)
        own, empty = Texts(*(part[:count] for part in texts)), Texts(*(part[count:] for part in texts))
        return self.network(latents.to(self.dtype), t, own, empty)

    def _encoded(self, prompts: Sequence[str]) -> Texts:
        found = {prompt: self._texts[prompt] for prompt in prompts if prompt in self._texts}
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in found]
        if missing:
            # Tensors made in inference mode could not be used in a later call with gradients.
            with torch.inference_mode(False), torch.no_grad():
                encoded = self.network.encode(self._tokens(missing))
            found |= {prompt: Texts(*row) for prompt, *row in zip(missing, *encoded, strict=True)}
        for prompt, row in found.items():
            self._texts[prompt] = row
            self._texts.move_to_end(prompt)
        while len(self._texts) > CACHED_PROMPTS:
            self._texts.popitem(last=False)
        rows = [found[prompt] for prompt in prompts]
        return Texts(torch.stack([row.hidden for row in rows]), torch.stack([row.pooled for row in rows]))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LatentReward:
        """Clear the encoded prompts when the weights move or change their dtype."""
        self._texts.clear()
        return super()._apply(fn, recurse)
