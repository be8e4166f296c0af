"""What flow-matching transformers share: options, the shift that depends on the size, T5 and CLIP.

Rectified flow transformers: arXiv 2403.03206. The convention of every family is that of `FlowProcess`: latents are not
packed outside of `predict`, which returns ``noise - x0`` for levels in (0, 1000].
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from pipelines.components import component_config
from pipelines.conditioning import Conditioning
from pipelines.errors import PipelineError
from pipelines.families.latent import Latent
from pipelines.flow import FlowOptions
from pipelines.integrity import reason
from pipelines.noise import FlowProcess, Schedule

LONGEST_TEXT = 512
JOINT_ATTENTION = tuple(
    f"attn.{name}" for name in "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out".split()
)
"""The projections of attention over image and text together, which a LoRA adapts by default."""


class FlowTransformer(Latent):
    """A flow-matching transformer over latents; `TransformerImage` and the video families add their sizes."""

    network_name = "transformer"
    is_flow = True
    lora_targets: ClassVar[tuple[str, ...]] = JOINT_ATTENTION
    even_sigmas: ClassVar[bool | None] = False
    """Whether the family's own pipeline starts from ``linspace(1, 1 / steps, steps)``; None: as the scheduler does."""
    has_experts: ClassVar[bool] = False
    """Whether the network is two of them, one for noisy levels and one for the others."""
    process: FlowProcess

    def __init__(
        self, root: Path, index: dict[str, Any], *, name_or_path: str, flow: FlowOptions | None = None, **options: Any
    ) -> None:
        """Check options and directory, then load as `Generator` does; raises `PipelineError` before any weight."""
        self.root, self.index, self.name_or_path = root, index, name_or_path
        self.config = component_config(root, self.network_name)
        self.flow = flow or FlowOptions()
        self._check_encoders()
        self._check_channels()
        self.text_length = self.flow.text_length or self.default_text_length
        if not 1 <= self.text_length <= self.longest_text:
            raise PipelineError(f"text_length must lie in 1..{self.longest_text} tokens, got {self.text_length}.")
        self.embedded_guidance = self._choose_guidance(self.flow.embedded_guidance)
        if self.flow.low_noise_guidance is not None and not self.has_experts:
            raise PipelineError(
                f"low_noise_guidance is for models of two experts, and {name_or_path} has one network; remove it."
            )
        self._choose_size()
        super().__init__(root, index, name_or_path=name_or_path, **options)
        if not isinstance(self.process, FlowProcess):
            raise PipelineError(
                f"the scheduler of {name_or_path} is a {index['scheduler'][1]}, which is not for flow matching as"
                f" '{self.family}' models need it; use FlowMatchEulerDiscreteScheduler."
            )
        if self.even_sigmas is not None:
            self.process.even_sigmas = self.even_sigmas
        self.process.set_density(self.flow.density)
        if self.process.shifts_by_size:
            self.process.mu = self.mu(self.latent_shape)

    def _choose_size(self) -> None:
        """Take the size of the images from the options; raises `PipelineError` for one that does not fit."""
        if self.flow.image_size is not None:
            raise PipelineError(
                f"image_size {self.flow.image_size} is for images; '{self.family}' makes videos, whose height, width,"
                " frames and fps are options of their own (video)."
            )

    @property
    def longest_text(self) -> int:
        """How many tokens prompts may be padded to at most."""
        return LONGEST_TEXT

    @property
    @abstractmethod
    def default_text_length(self) -> int:
        """How many tokens prompts are padded and cut to for the longest encoder, unless `flow` says otherwise."""

    @property
    def patch_size(self) -> int:
        """How many latents a side one token of the network covers."""
        return int(self.config["patch_size"])

    @property
    def network_channels(self) -> int:
        """Channels of the latents that the network takes, as its configuration gives them."""
        return int(self.config["in_channels"])

    @property
    def side_multiple(self) -> int:
        """What the sides of images are multiples of, in pixels: whole tokens."""
        return self.vae_factor * self.patch_size

    @property
    def text_id(self) -> str:
        """Identifies the text encoders and the length that prompts are padded to."""
        return f"{super().text_id}-{self.text_length}"

    def tokens(self, latent_shape: Sequence[int]) -> int:
        """Return how many tokens the network makes of latents of a shape."""
        patch, frames = self.patch_size, latent_shape[1] if len(latent_shape) == 4 else 1
        return int(frames) * (latent_shape[-2] // patch) * (latent_shape[-1] // patch)

    def schedule(self, steps: int, latent_shape: Sequence[int] | None = None) -> Schedule:
        """Return the levels of a sampling run; where the shift depends on the size, that of the latents given."""
        if latent_shape is None or not self.process.shifts_by_size:
            return self.process.schedule(steps)
        mu = self.mu(latent_shape)
        return self.process.schedule(steps, mu=mu(steps) if callable(mu) else mu)

    def mu(self, latent_shape: Sequence[int]) -> float | Callable[[int], float]:
        """Return the shift of the sampling levels for latents of a shape, or what gives it for a number of steps."""
        return self.process.mu_for(self.tokens(latent_shape))

    def describe(self) -> str:
        """Return size, text length, guidance and levels in one line."""
        guidance = "" if self.embedded_guidance is None else f", embedded guidance {self.embedded_guidance:g}"
        text = f"{self.text_length} text tokens{guidance}"
        return f"{self.family}: {self.describe_size()}, {text}; {self.process.describe()}"

    def _check_channels(self) -> None:
        if self.network_channels != self.latent_channels:
            raise PipelineError(
                f"the transformer of {self.name_or_path} takes {self.network_channels} channels, its autoencoder gives"
                f" {self.latent_channels}; inpainting, editing and control models are not supported, use the base"
                " model."
            )

    def _choose_guidance(self, given: float | None) -> float | None:
        """Return the scale that the network takes as an input, None where it takes none."""
        if given is not None:
            raise PipelineError(
                f"{self.name_or_path} has no embedded guidance, so embedded_guidance {given:g} would do nothing;"
                " remove it."
            )
        return None

    def _pooled(self, cond: Conditioning) -> Tensor:
        if cond.pooled is None:
            raise PipelineError(f"'{self.family}' needs pooled embeddings; encode the prompts with this generator.")
        return cond.pooled.to(self.dtype)

    def _clip(self, suffix: str, prompts: list[str], *, warn: bool = False) -> Any:
        """Return the output of a CLIP text encoder, hidden states included."""
        # Both of SD3's tokenizers are padded to the length of the first, as its pipeline does.
        length = self.encoder("tokenizer").model_max_length
        tokens = self._tokenize(f"tokenizer{suffix}", prompts, length, warn=warn)
        return self.encoder(f"text_encoder{suffix}")(tokens["input_ids"], output_hidden_states=True)

    def _t5(self, suffix: str, prompts: list[str]) -> Tensor:
        """Return the hidden states of T5, ``[prompts, text_length, width]``; padding is not masked."""
        tokens = self._tokenize(f"tokenizer{suffix}", prompts, self.text_length)
        hidden: Tensor = self.encoder(f"text_encoder{suffix}")(tokens["input_ids"])[0]
        return hidden

    def _chat(self, prompts: list[str], *, thinking: bool) -> dict[str, Tensor]:
        """Return token ids and mask of prompts as a user's messages, `text_length` long."""
        options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": thinking}
        asked = [[{"role": "user", "content": prompt}] for prompt in prompts]
        try:
            texts = [self.encoder("tokenizer").apply_chat_template(one, **options) for one in asked]
        except Exception as error:  # a template is a program of its own
            raise PipelineError(
                f"{self.root / 'tokenizer'}: its chat format fails ({reason(error)}); fetch the model again."
            ) from error
        return self._tokenize("tokenizer", prompts, self.text_length, texts=texts)

    def _make_unconditional(self) -> Conditioning:
        return self.encode_prompts([""])
