"""Qwen-Image: a flow transformer on 2 x 2 packed latents, conditioned by a vision-language model (Qwen2.5-VL).

Qwen-Image: arXiv 2508.02324. The conventions are those of diffusers' ``QwenImagePipeline``: a chat template whose
first 34 tokens are dropped, text of any length with a mask, latents normalised by channel, and classifier-free
guidance that keeps, in each token of 2 x 2 latents, the norm of the conditional prediction.
"""

from __future__ import annotations

from functools import cache

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from pipelines import adapters
from pipelines.conditioning import Conditioning
from pipelines.errors import PipelineError
from pipelines.families.flux import DEFAULT_SIDE, pack, unpack
from pipelines.families.latent import single
from pipelines.families.transformer_image import TransformerImage

TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial"
    " relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
PREFIX = 34
"""Tokens of the template before the prompt, whose hidden states are dropped."""


class QwenImage(TransformerImage):
    """Qwen-Image."""

    family = "qwen_image"
    text_names = ("text_encoder", "tokenizer")
    lora_targets = adapters.DEFAULT_TARGETS
    default_text_length = 512
    longest_text = 1024
    even_sigmas = True
    patch_size = 2

    @property
    def network_channels(self) -> int:
        """Channels of the latents, four of which make a packed one."""
        return int(self.config["in_channels"]) // 4

    @property
    def latent_channels(self) -> int:
        """Channels of the latents, as the autoencoder's configuration gives them."""
        return int(self._vae_config["z_dim"])

    @property
    def vae_factor(self) -> int:
        """How many pixels a side one latent covers."""
        return int(2 ** len(self._vae_config["temperal_downsample"]))

    @property
    def _default_side(self) -> int:
        return DEFAULT_SIDE * self.vae_factor

    def _check_channels(self) -> None:
        super()._check_channels()
        file, channels = self.root / "vae" / "config.json", self.latent_channels
        for key in ("latents_mean", "latents_std"):
            if len(self._vae_config.get(key) or ()) != channels:
                raise PipelineError(f"{file}: {key} must hold {channels} numbers, one a channel.")

    def _choose_guidance(self, given: float | None) -> float | None:
        for key in ("guidance_embeds", "use_additional_t_cond", "use_layer3d_rope"):
            if self.config.get(key):
                raise PipelineError(
                    f"the transformer of {self.name_or_path} has {key}, which is not supported; use Qwen-Image itself."
                )
        return super()._choose_guidance(given)

    def guide(
        self,
        with_prompt: Float[Tensor, "batch channels height width"],
        without: Float[Tensor, "batch channels height width"],
        guidance: float | Shaped[Tensor, "batch *ones"],
    ) -> Float[Tensor, "batch channels height width"]:
        """Return guidance's combination, each token of it scaled to the norm of the prediction with the prompt."""
        guided, height, width = super().guide(with_prompt, without, guidance), *with_prompt.shape[-2:]
        tokens = pack(guided)
        norm = pack(with_prompt).norm(dim=-1, keepdim=True)
        tiny = torch.finfo(tokens.dtype).tiny
        return unpack(tokens * (norm / tokens.norm(dim=-1, keepdim=True).clamp_min(tiny)), height, width)

    def predict(
        self, x_t: Float[Tensor, "batch channels height width"], t: Shaped[Tensor, " batch"], cond: Conditioning
    ) -> Float[Tensor, "batch channels height width"]:
        """Run the transformer once on packed latents; the output, ``noise - x0``, is float32 (or float64)."""
        if cond.mask is None:
            raise PipelineError("'qwen_image' needs the mask of each prompt; encode the prompts with this generator.")
        height, width = x_t.shape[-2:]
        if height % 2 or width % 2:
            self.check_size(height * self.vae_factor, width * self.vae_factor)
        lengths = cond.mask.sum(1).tolist()
        if len(set(lengths)) == 1 or masks_text():
            return self._predict(x_t, t, cond, lengths)
        groups = [[row for row, own in enumerate(lengths) if own == length] for length in sorted(set(lengths))]
        parts = [self._predict(x_t[rows], t[rows], cond[rows], [lengths[row] for row in rows]) for rows in groups]
        order = torch.tensor([row for rows in groups for row in rows]).argsort()
        return torch.cat(parts)[order.to(x_t.device)]

    def _predict(self, x_t: Tensor, t: Tensor, cond: Conditioning, lengths: list[int]) -> Tensor:
        """Run the transformer on text cut to the longest prompt; no mask where all are as long."""
        assert cond.mask is not None
        dtype, (height, width), longest = self.dtype, x_t.shape[-2:], max(lengths)
        output = self.network(
            hidden_states=pack(x_t.to(dtype)),
            timestep=t.to(dtype) / self.process.num_train_timesteps,
            encoder_hidden_states=cond.prompt_embeds[:, :longest].to(dtype),
            encoder_hidden_states_mask=None if min(lengths) == longest else cond.mask[:, :longest],
            img_shapes=[[(1, height // 2, width // 2)]] * len(x_t),
            **({} if masks_text() else {"txt_seq_lens": lengths}),
            return_dict=False,
        )[0]
        return unpack(single(output), height, width)

    def _encode_batch(self, prompts: list[str]) -> Conditioning:
        self.encoder("tokenizer").padding_side = "right"
        texts = [TEMPLATE.format(prompt) for prompt in prompts]
        tokens = self._tokenize("tokenizer", prompts, self.text_length + PREFIX, texts=texts)
        mask = tokens["attention_mask"]
        longest = int(mask.sum(1).max())
        # The language model alone: its head would give logits over the vocabulary for every token.
        encoder = self.encoder("text_encoder").model
        hidden = encoder(tokens["input_ids"][:, :longest], attention_mask=mask[:, :longest]).last_hidden_state
        hidden = torch.nn.functional.pad(hidden, (0, 0, 0, mask.shape[1] - longest)) * mask.unsqueeze(-1)
        return Conditioning(hidden[:, PREFIX:], mask=mask[:, PREFIX:].bool())

    def _moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = super()._moments(images.unsqueeze(2))  # the autoencoder is one of videos
        return mean.squeeze(2), std.squeeze(2)

    def _media(self, latents: Tensor) -> Tensor:
        return super()._media(latents.unsqueeze(2)).squeeze(2)

    def _make_unconditional(self) -> Conditioning:
        return self.encode_prompts([" "])


@cache
def masks_text() -> bool:
    """Say whether diffusers' transformer heeds the mask of the text; that of 0.36 attends to all of it."""
    from diffusers.models.transformers import transformer_qwenimage

    return hasattr(transformer_qwenimage, "compute_text_seq_len_from_mask")
