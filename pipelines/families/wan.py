"""Wan 2.1 (arXiv 2503.20314): a flow transformer over the latents of a causal video autoencoder, conditioned by umT5.

The conventions are those of diffusers' ``WanPipeline``: the text is cleaned, cut to `text_length` tokens, and its
embeddings end in zeros in the place of padding, to which the network attends. Classifier-free guidance against "".
"""

from __future__ import annotations

import html
import importlib.util

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from pipelines import adapters
from pipelines.conditioning import Conditioning
from pipelines.errors import PipelineError
from pipelines.families.flow_transformer import FlowTransformer
from pipelines.families.latent import single
from pipelines.families.latent_video import LatentVideo
from pipelines.video import VideoOptions


class Wan(FlowTransformer, LatentVideo):
    """Wan 2.1, text to video."""

    family = "wan"
    text_names = ("text_encoder", "tokenizer")
    lora_targets = adapters.DEFAULT_TARGETS
    default_text_length = 512
    default_video = VideoOptions(480, 832, 81, 16.0)
    even_sigmas = None  # diffusers' pipeline takes the scheduler's own grid

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the network's large weights; diffusers keeps norms and tables of a half one in float32."""
        found: torch.dtype = self.bare_network.patch_embedding.weight.dtype
        return found

    @property
    def latent_channels(self) -> int:
        """Channels of the latents, as the autoencoder's configuration gives them."""
        return int(self._vae_config["z_dim"])

    @property
    def vae_factor(self) -> int:
        """How many pixels a side one latent covers."""
        return int(self._vae_config.get("scale_factor_spatial") or 8)

    @property
    def frame_step(self) -> int:
        """How many frames each latent frame but the first stands for."""
        return int(self._vae_config.get("scale_factor_temporal") or 4)

    @property
    def patch_size(self) -> int:
        """How many latents a side one token of the network covers."""
        return int(self.config["patch_size"][1])

    def _check_channels(self) -> None:
        super()._check_channels()
        if list(self.config["patch_size"]) != [1, self.patch_size, self.patch_size]:
            raise PipelineError(
                f"the transformer of {self.name_or_path} has patches of {self.config['patch_size']} latents; supported"
                " are square ones of one frame."
            )

    def predict(
        self, x_t: Float[Tensor, "batch channels frames h w"], t: Shaped[Tensor, " batch"], cond: Conditioning
    ) -> Float[Tensor, "batch channels frames h w"]:
        """Run the transformer once, without guidance; the output, ``noise - x0``, is float32 (or float64)."""
        dtype = self.dtype
        output = self.network(
            hidden_states=x_t.to(dtype),
            timestep=t,
            encoder_hidden_states=cond.prompt_embeds.to(dtype),
            return_dict=False,
        )[0]
        return single(output)

    def _encode_batch(self, prompts: list[str]) -> Conditioning:
        texts = [clean_prompt(prompt) for prompt in prompts]
        tokens = self._tokenize("tokenizer", prompts, self.text_length, texts=texts)
        mask = tokens["attention_mask"]
        hidden = self.encoder("text_encoder")(tokens["input_ids"], mask).last_hidden_state
        return Conditioning(torch.where(mask.unsqueeze(-1) > 0, hidden, torch.zeros_like(hidden)))

    def _encoder_dtype(self, name: str) -> torch.dtype:
        # The autoencoder is kept in float32, as the model's card asks.
        half = self._load_dtype in (torch.float16, torch.bfloat16)
        return torch.float32 if name == "vae" and half else self._load_dtype


def clean_prompt(prompt: str) -> str:
    """Return a prompt as Wan's pipeline reads it: ftfy's repairs where it is installed, no entities, single spaces."""
    if importlib.util.find_spec("ftfy") is not None:
        import ftfy

        prompt = ftfy.fix_text(prompt)
    return " ".join(html.unescape(html.unescape(prompt)).split())
