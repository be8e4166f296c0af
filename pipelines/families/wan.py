"""Wan 2.1 (arXiv 2503.20314) and 2.2: flow transformers over latents of a causal video autoencoder, with umT5.

The conventions are those of diffusers' ``WanPipeline``: the text is cleaned, cut to `text_length` tokens, and its
embeddings end in zeros in the place of padding, to which the network attends. Classifier-free guidance against "".
Wan 2.2 A14B has two experts, one for the noisy levels; Wan 2.2 TI2V 5B takes a time for each token, and a first frame
in the place of the first latents.
"""

from __future__ import annotations

import html
import importlib.util
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from pipelines import adapters
from pipelines.components import INDEX, has_component, load_component
from pipelines.conditioning import Conditioning
from pipelines.errors import PipelineError
from pipelines.experts import Experts
from pipelines.families.first_frame import FromFirstFrame
from pipelines.families.flow_transformer import FlowTransformer
from pipelines.families.latent import single
from pipelines.families.latent_video import LatentVideo
from pipelines.generator import Generator
from pipelines.video import VideoOptions

EXPERTS = ("transformer", "transformer_2")


class Wan(FlowTransformer, LatentVideo):
    """Wan 2.1 and 2.2, text to video."""

    family = "wan"
    text_names = ("text_encoder", "tokenizer")
    lora_targets = adapters.DEFAULT_TARGETS
    default_text_length = 512
    default_video = VideoOptions(480, 832, 81, 16.0)
    even_sigmas = None  # diffusers' pipeline takes the scheduler's own grid

    @classmethod
    def variant(cls, index: dict[str, Any]) -> type[Generator]:
        """Return the class of a model of two experts, of one that takes a time for each token, or of the others."""
        if index.get("expand_timesteps"):
            return WanPerToken
        return WanExperts if has_component(index, "transformer_2") else cls

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the network's large weights; diffusers keeps norms and tables of a half one in float32."""
        found: torch.dtype = self.networks[self.network_name].patch_embedding.weight.dtype
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
            hidden_states=self._inputs(x_t.to(dtype), cond),
            timestep=self._times(t, x_t, cond),
            encoder_hidden_states=cond.prompt_embeds.to(dtype),
            return_dict=False,
            **self._beside(cond),
        )[0]
        return single(output)

    def _inputs(self, x_t: Tensor, cond: Conditioning) -> Tensor:
        """Return the channels that the network takes."""
        return x_t

    def _times(self, t: Tensor, x_t: Tensor, cond: Conditioning) -> Tensor:
        """Return the time that the network takes for a batch."""
        return t

    def _beside(self, cond: Conditioning) -> dict[str, Tensor]:
        """Return what the network takes beside latents, time and text."""
        return {}

    def _encode_batch(self, prompts: list[str]) -> Conditioning:
        texts = [clean_prompt(prompt) for prompt in prompts]
        tokens = self._tokenize("tokenizer", prompts, self.text_length, texts=texts)
        mask = tokens["attention_mask"]
        hidden = self.encoder("text_encoder")(tokens["input_ids"], mask).last_hidden_state
        return Conditioning(torch.where(mask.unsqueeze(-1) > 0, hidden, torch.zeros_like(hidden)))

    def _encoder_dtype(self, name: str) -> torch.dtype:
        # The autoencoder (and the CLIP of image to video) is kept in float32, as the model's card asks.
        half = self._load_dtype in (torch.float16, torch.bfloat16)
        return torch.float32 if name in self.vae_names and half else self._load_dtype


class WanExperts(Wan):
    """Wan 2.2 A14B: an expert for levels from ``boundary_ratio`` up, one for those below, and a LoRA for each."""

    has_experts = True

    def _check_channels(self) -> None:
        super()._check_channels()
        ratio = self.index.get("boundary_ratio")
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < 1:
            raise PipelineError(
                f"{self.root / INDEX}: boundary_ratio is {ratio!r}; two experts need a number between 0 and 1."
            )

    def _load_network(self, dtype: torch.dtype) -> Any:
        noisy, clean = (load_component(self.root, self.index, name, dtype) for name in EXPERTS)
        return Experts(noisy, clean, self.boundary)

    @property
    def boundary(self) -> float:
        """The lowest level of the expert for noisy ones."""
        return float(self.index["boundary_ratio"]) * self.process.num_train_timesteps

    @property
    def networks(self) -> dict[str, Any]:
        """The two experts by the names of their components."""
        return {name: getattr(self.bare_network, name) for name in EXPERTS}

    @property
    def guidance_varies(self) -> bool:
        """Whether the expert for low noise has a scale of guidance of its own."""
        return self.flow.low_noise_guidance is not None

    def guidance_at(self, guidance: float, t: Shaped[Tensor, " batch"]) -> float | Shaped[Tensor, "batch *ones"]:
        """Return the scale of guidance at the levels of a batch."""
        low = self.flow.low_noise_guidance
        if low is None:
            return guidance
        return torch.where(t >= self.boundary, guidance, low).float().reshape(-1, 1, 1, 1, 1)

    def describe(self) -> str:
        """Return the conventions in one line, with the boundary."""
        low = "" if self.flow.low_noise_guidance is None else f", guidance {self.flow.low_noise_guidance:g} below"
        return f"{super().describe()}; experts meet at level {self.boundary:g}{low}"


class WanPerToken(FromFirstFrame, Wan):
    """Wan 2.2 TI2V 5B: a time for each token, and an autoencoder that divides sides by 16.

    With a first frame its latents stand in the place of the first noisy ones at time 0, as in diffusers'
    ``WanImageToVideoPipeline``. `predict` returns there the velocity that leads to them, whatever the network says:
    the sampler ends with them, and the loss has no gradient from them (published training cuts them off:
    ``diffsynth/diffusion/loss.py`` of modelscope/DiffSynth-Studio).
    """

    default_video = VideoOptions(704, 1280, 121, 24)
    needs_first_frame = False
    keeps_first_frame = True

    def predict(
        self, x_t: Float[Tensor, "batch channels frames h w"], t: Shaped[Tensor, " batch"], cond: Conditioning
    ) -> Float[Tensor, "batch channels frames h w"]:
        """Run the transformer once, without guidance, as `Wan.predict` does; with a first frame, see the class."""
        if cond.first_frame is None and not self.needs_first_frame:
            return super().predict(x_t, t, cond)
        given, rest = self._first_frame(cond).to(x_t), x_t[:, :, 1:]
        output = super().predict(torch.cat([given, rest], dim=2), t, cond)[:, :, 1:]
        sigma = self.process.sigma(t).reshape(-1, 1, 1, 1, 1)
        distance = x_t[:, :, :1] - given  # 0 without noise, where methods that invert start
        return torch.cat([(distance / torch.where(sigma > 0, sigma, 1)).to(output), output], dim=2)

    def _times(self, t: Tensor, x_t: Tensor, cond: Conditioning) -> Tensor:
        times = t.unsqueeze(1).repeat(1, self.tokens(x_t.shape[1:]))
        if cond.first_frame is not None:
            times[:, : self.tokens(cond.first_frame.shape[1:])] = 0
        return times

    def _encode_first(self, frames: Tensor) -> dict[str, Tensor]:
        return {"first_frame": self.encode(frames.unsqueeze(1))}


def clean_prompt(prompt: str) -> str:
    """Return a prompt as Wan's pipeline reads it: ftfy's repairs where it is installed, no entities, single spaces."""
    if importlib.util.find_spec("ftfy") is not None:
        import ftfy

        prompt = ftfy.fix_text(prompt)
    return " ".join(html.unescape(html.unescape(prompt)).split())
