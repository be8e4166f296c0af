"""FLUX.2 klein: a flow transformer on patchified latents, conditioned by three layers of a language model (Qwen3).

No paper; the conventions are those of diffusers' ``Flux2KleinPipeline``. Latents here are what its network sees: 2 x 2
patches of the autoencoder's latents as channels, normalised by the statistics of the autoencoder's batch norm. The
shift of the sampling levels depends on the number of tokens and of steps. Base checkpoints take classifier-free
guidance; distilled ones, which their index calls ``is_distilled``, take none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from pipelines import adapters
from pipelines.conditioning import Conditioning
from pipelines.errors import PipelineError
from pipelines.families.flux import DEFAULT_SIDE
from pipelines.families.latent import single
from pipelines.families.transformer_image import TransformerImage
from pipelines.generator import Generator

TEXT_LAYERS = (9, 18, 27)
"""The hidden states of the language model that are put side by side."""
PATCH = 2
LARGE = 4300
"""Tokens above which the shift does not depend on the number of steps; it falls there (2.04 to 1.18 at 50 steps)."""
LOGGED_STEPS = 50


def patchify(latents: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch patch rows columns"]:
    """Return 2 x 2 patches as channels, of ``4 * channels``: channel, then row, then column.

    >>> patchify(torch.arange(8.0).reshape(1, 1, 2, 4))[0, :, 0].tolist()
    [[0.0, 2.0], [1.0, 3.0], [4.0, 6.0], [5.0, 7.0]]
    """
    return torch.nn.functional.pixel_unshuffle(latents, PATCH)


def unpatchify(patches: Float[Tensor, "batch patch rows columns"]) -> Float[Tensor, "batch channels height width"]:
    """Return the latents that `patchify` made patches of."""
    return torch.nn.functional.pixel_shuffle(patches, PATCH)


def positions(height: int, width: int) -> Float[Tensor, "tokens 4"]:
    """Return ``(0, row, column, 0)`` of each token of latents of `height` and `width`."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    zeros = torch.zeros_like(rows)
    return torch.stack([zeros, rows, columns, zeros], dim=-1).reshape(-1, 4).float()


def empirical_mu(tokens: int, steps: int) -> float:
    """Return the shift for so many tokens and steps, diffusers' ``compute_empirical_mu``: a fit at 10 and 200 steps.

    >>> round(empirical_mu(4096, 50), 4), round(empirical_mu(4096, 4), 4), round(empirical_mu(4301, 50), 4)
    (2.0234, 2.2912, 1.1847)
    """
    at_200 = 0.00016927 * tokens + 0.45666666
    if tokens > LARGE:
        return at_200
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    return at_200 + (at_200 - at_10) / 190.0 * (steps - 200)


class Flux2Klein(TransformerImage):
    """FLUX.2 klein, base and distilled."""

    family = "flux2"
    text_names = ("text_encoder", "tokenizer")
    lora_targets = (*adapters.DEFAULT_TARGETS, "to_qkv_mlp_proj")
    default_text_length = 512
    even_sigmas = True
    patch_size = 1

    @classmethod
    def variant(cls, index: dict[str, Any]) -> type[Generator]:
        """Return the class of distilled checkpoints for their index; refuses all where diffusers has no pipeline."""
        import diffusers

        if not hasattr(diffusers, index["_class_name"]):
            raise PipelineError(
                f"FLUX.2 klein needs diffusers 0.37 or newer, and {diffusers.__version__} is installed; upgrade it."
            )
        return DistilledFlux2Klein if index.get("is_distilled") else cls

    @property
    def latent_channels(self) -> int:
        """Channels of the patches."""
        return int(self._vae_config["latent_channels"]) * PATCH**2

    @property
    def vae_factor(self) -> int:
        """How many pixels a side one patch covers."""
        return super().vae_factor * PATCH

    @property
    def _default_side(self) -> int:
        return DEFAULT_SIDE * self.vae_factor // PATCH

    def mu(self, latent_shape: Sequence[int]) -> Callable[[int], float]:
        """Return what gives the shift of the sampling levels for a number of steps."""
        return partial(empirical_mu, self.tokens(latent_shape))

    def describe(self) -> str:
        """Return size, text length and levels in one line, with the shift of a run of 50 steps."""
        tokens = self.tokens(self.latent_shape)
        shift = f"mu {empirical_mu(tokens, LOGGED_STEPS):.4g} at {LOGGED_STEPS} steps"
        jump = f", which falls to {empirical_mu(LARGE + 1, LOGGED_STEPS):.4g} above {LARGE} tokens"
        return f"{super().describe()}; {shift} and {tokens} tokens{jump if tokens <= LARGE else ''}"

    def predict(
        self, x_t: Float[Tensor, "batch channels height width"], t: Shaped[Tensor, " batch"], cond: Conditioning
    ) -> Float[Tensor, "batch channels height width"]:
        """Run the transformer once on a token a patch; the output, ``noise - x0``, is float32 (or float64)."""
        dtype, (height, width) = self.dtype, x_t.shape[-2:]
        text = cond.prompt_embeds.to(dtype)
        words = torch.zeros(text.shape[1], 4)
        words[:, 3] = torch.arange(text.shape[1])
        output = self.network(
            hidden_states=x_t.to(dtype).flatten(2).transpose(1, 2),
            timestep=t.to(dtype) / self.process.num_train_timesteps,
            guidance=None,
            encoder_hidden_states=text,
            txt_ids=words.to(x_t.device).expand(len(x_t), -1, -1),
            img_ids=positions(height, width).to(x_t.device).expand(len(x_t), -1, -1),
            return_dict=False,
        )[0]
        return single(output).transpose(1, 2).unflatten(2, (height, width))

    def _encode_batch(self, prompts: list[str]) -> Conditioning:
        tokens = self._chat(prompts, thinking=False)
        # The language model alone: its head would give logits over the vocabulary for every token.
        encoder = self.encoder("text_encoder")
        encoder = getattr(encoder, "model", encoder)
        hidden = encoder(**tokens, output_hidden_states=True, use_cache=False).hidden_states
        return Conditioning(torch.cat([hidden[layer] for layer in TEXT_LAYERS], dim=-1))

    def _latent_scaling(self, like: Tensor) -> tuple[Tensor, Tensor]:
        vae = self.encoder("vae")
        std = (vae.bn.running_var.to(like) + vae.config.batch_norm_eps).sqrt()
        return vae.bn.running_mean.to(like).reshape(1, -1, 1, 1), std.reciprocal().reshape(1, -1, 1, 1)

    def _moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        # The model is trained on the mean itself, as in diffusers' train_dreambooth_lora_flux2_klein.py.
        mean = patchify(super()._moments(images)[0])
        return mean, torch.zeros_like(mean)

    def _media(self, latents: Tensor) -> Tensor:
        return super()._media(unpatchify(latents))


class DistilledFlux2Klein(Flux2Klein):
    """FLUX.2 klein, distilled to a few steps without classifier-free guidance."""

    guidance_inside = True
