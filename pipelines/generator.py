"""The interface of all media generators: encode prompts and media, predict, decode, adapt, save.

A family (a file such as ``unet_image.py``) fills in the abstract methods; samplers, methods and data caches use this
class and do not depend on the family.
"""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pipelines import adapters
from pipelines.attention import AttentionReport, set_attention
from pipelines.components import fingerprint, load_component, model_fingerprint
from pipelines.conditioning import Conditioning
from pipelines.errors import PipelineError
from pipelines.export import save_pipeline
from pipelines.lora_files import WEIGHTS_NAME, AdapterPath, with_weight
from pipelines.noise import NoiseProcess, Schedule


class Generator(ABC):
    """A text-to-media model from a diffusers directory.

    The denoiser (`network`) and the scheduler are loaded at once; the autoencoder and the text encoders when they are
    first used, and `free_encoders` drops them again. Latents are float32 everywhere outside the network, and
    ``[batch, *latent]`` with the shape `latent_shape`; media are in [0, 1].

    >>> from pipelines import load_generator
    >>> generator = load_generator("assets/shapes-sd", device="cpu")
    >>> generator.latent_shape, generator.process.prediction
    ((4, 16, 16), 'v_prediction')
    >>> x0 = generator.encode(torch.rand(1, 3, 32, 32))
    >>> noise, t = torch.randn_like(x0), torch.tensor([500])
    >>> output = generator.predict(generator.process.add_noise(x0, noise, t), t, generator.encode_prompts(["a star"]))
    >>> output.shape == generator.process.target(x0, noise, t).shape == x0.shape
    True

    Attributes: `name_or_path` as the user gave it (the base model, when an adapter was named); `root` the local
    directory; `process` the noise process; `attention` the running attention kernel.
    """

    family: ClassVar[str]
    modality: ClassVar[Literal["image", "video"]] = "image"
    network_name: ClassVar[str]
    vae_names: ClassVar[tuple[str, ...]] = ("vae",)
    text_names: tuple[str, ...]
    lora_targets: ClassVar[tuple[str, ...]] = adapters.DEFAULT_TARGETS
    takes_first_frame: ClassVar[bool] = False
    """Whether videos may start from an image each: the class is a `pipelines.families.first_frame.FromFirstFrame`."""
    needs_first_frame: ClassVar[bool] = False
    """Whether they must."""
    keeps_first_frame: ClassVar[bool] = False
    """Whether the latents of the image are the first of the video's, so that nothing is learned from these."""
    is_flow: ClassVar[bool] = False
    """Whether the models are flow-matching transformers, which take `pipelines.flow.FlowOptions`."""
    guidance_inside: ClassVar[bool] = False
    """Whether guidance is distilled into the network, so that classifier-free guidance is not part of sampling."""

    def __init__(
        self,
        root: Path,
        index: dict[str, Any],
        *,
        name_or_path: str,
        dtype: torch.dtype,
        device: torch.device,
        attention: str = "sdpa",
    ) -> None:
        """Load scheduler and denoiser from `root`, whose parsed ``model_index.json`` is `index`."""
        self.root = root
        self.index = index
        self.name_or_path = name_or_path
        self.scheduler = load_component(root, index, "scheduler")
        self.process = NoiseProcess.from_scheduler(self.scheduler)
        self.network = self._load_network(dtype).to(device)
        self.attention: AttentionReport = set_attention(self.network, attention)
        self._load_dtype = dtype
        self._encoders: dict[str, Any] = {}
        self._unconditional: Conditioning | None = None
        self._lora_layers: list[Any] = []

    def _load_network(self, dtype: torch.dtype) -> Any:
        """Load the denoiser; a family overrides this where it does not lie in one directory."""
        return load_component(self.root, self.index, self.network_name, dtype)

    @property
    def networks(self) -> dict[str, Any]:
        """The diffusers models inside `network` by the names of their components: one, or one for each expert."""
        return {self.network_name: self.bare_network}

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one sample's latents at the model's own size, channels first.

        An image is (channels, height, width), a video (channels, frames, height, width); a family that packs them
        into (tokens, channels) for its network does so inside `predict`, or has latents of that shape.
        """

    @property
    @abstractmethod
    def image_size(self) -> int:
        """The model's own image side in pixels."""

    @property
    def media_shape(self) -> tuple[int, ...]:
        """Shape of one sample's media: an image's (3, height, width), a video's (frames, 3, height, width)."""
        return 3, self.image_size, self.image_size

    @property
    def fps(self) -> int | float | None:
        """Frames a second of the videos; None for images."""
        return None

    def schedule(self, steps: int, latent_shape: Sequence[int] | None = None) -> Schedule:
        """Return the levels of a sampling run, for latents of a shape (default: `latent_shape`)."""
        return self.process.schedule(steps)

    @classmethod
    def check_guidance(cls, guidance: float) -> None:
        """Raise `PipelineError` for a scale of classifier-free guidance that the family does not take by itself."""
        if cls.guidance_inside and guidance != 1:
            raise PipelineError(
                f"'{cls.family}' models have guidance distilled into the network and are sampled without"
                f" classifier-free guidance: give guidance 1, not {guidance:g}"
                " (FLUX.1-dev's own scale is embedded_guidance)."
            )

    @classmethod
    def variant(cls, index: dict[str, Any]) -> type[Generator]:
        """Return the class for a model's ``model_index.json``, where a family has several."""
        return cls

    @property
    def guidance_varies(self) -> bool:
        """Whether the scale of guidance depends on the noise level."""
        return False

    def guidance_at(self, guidance: float, t: Shaped[Tensor, " batch"]) -> float | Shaped[Tensor, "batch *ones"]:
        """Return the scale of classifier-free guidance at the levels of a batch; by default that given."""
        return guidance

    def guide(
        self,
        with_prompt: Float[Tensor, "batch *latent"],
        without: Float[Tensor, "batch *latent"],
        guidance: float | Shaped[Tensor, "batch *ones"],
    ) -> Float[Tensor, "batch *latent"]:
        """Return classifier-free guidance's combination of two predictions, the family's own; differentiable."""
        return without + guidance * (with_prompt - without)

    def describe(self) -> str:
        """Return, for the log, the conventions that the family was given; empty where there is no choice."""
        return ""

    @abstractmethod
    def predict(
        self, x_t: Float[Tensor, "batch *latent"], t: Shaped[Tensor, " batch"], cond: Conditioning
    ) -> Float[Tensor, "batch *latent"]:
        """Run the denoiser once, without guidance; differentiable; the output is float32."""

    @abstractmethod
    def encode(self, media: Float[Tensor, "batch *media"]) -> Float[Tensor, "batch *latent"]:
        """Return the (mean) latents of media in [0, 1], scaled for the denoiser."""

    @abstractmethod
    def encode_posterior(
        self, media: Float[Tensor, "batch *media"]
    ) -> tuple[Float[Tensor, "batch *latent"], Float[Tensor, "batch *latent"]]:
        """Return mean and standard deviation of the latents' posterior, scaled (std 0 where there is none)."""

    @abstractmethod
    def decode(self, latents: Float[Tensor, "batch *latent"]) -> Float[Tensor, "batch *media"]:
        """Return the media in [0, 1]; differentiable."""

    def decode_checkpointed(
        self, latents: Float[Tensor, "batch *latent"], batch_size: int | None = None
    ) -> Float[Tensor, "batch *media"]:
        """Decode as `decode` does, keeping no activations: the backward pass computes them again, a slice at a time.

        `batch_size` is the size of the slices (default: the batch in one), and sets the peak of memory.
        """
        if batch_size is not None and batch_size < 1:
            raise PipelineError(f"batch_size must be at least 1, got {batch_size}.")
        slices = latents.split(batch_size or len(latents))
        return torch.cat([checkpoint(self.decode, part, use_reentrant=False) for part in slices])

    def decode_frames(
        self, latents: Float[Tensor, "batch *latent"], frames: Sequence[int]
    ) -> Float[Tensor, "batch chosen 3 height width"]:
        """Return one picture a chosen latent frame of videos, activations computed again; see `LatentVideo`."""
        raise PipelineError(f"'{self.family}' makes images, which have no frames.")

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts, each distinct one once."""

    @abstractmethod
    def _make_unconditional(self) -> Conditioning:
        """Return the conditioning, batch of one, that the family's own pipeline uses without a negative prompt."""

    def unconditional(self) -> Conditioning:
        """Return the default negative conditioning for guidance, a batch of one; made once and kept."""
        if self._unconditional is None:
            self._unconditional = self._make_unconditional()
        return self._unconditional

    @property
    def bare_network(self) -> Any:
        """The diffusers model inside `network`, which training may have wrapped (DDP, ``torch.compile``)."""
        network = self.network
        while hasattr(network, "module") or hasattr(network, "_orig_mod"):
            network = network.module if hasattr(network, "module") else network._orig_mod
        return network

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the network's own (not the adapter's) weights, to which `predict` casts its inputs."""
        return next(self.network.parameters()).dtype

    @property
    def vae_id(self) -> str:
        """Identifies the content of the autoencoder, for caches of latents."""
        return fingerprint(self.root, self.vae_names)

    @property
    def text_id(self) -> str:
        """Identifies the content of the tokenizers and text encoders, for caches of conditionings."""
        return fingerprint(self.root, self.text_names)

    @property
    def model_id(self) -> str:
        """Identifies the content of the whole model as it was saved; an adapter on top does not count."""
        return model_fingerprint(self.root, self.index)

    def load_encoders(self) -> None:
        """Read the autoencoder and the text encoders, where they are not in memory already."""
        for name in (*self.vae_names, *self.text_names):
            self.encoder(name)

    def free_encoders(self, keep: Collection[str] = ()) -> None:
        """Drop the autoencoder and the text encoders, but for those named in `keep`; they come back when used."""
        self._encoders = {name: encoder for name, encoder in self._encoders.items() if name in keep}
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def encoder(self, name: str) -> Any:
        """Return one of the encoders or tokenizers by its name in ``model_index.json``, loading it if need be."""
        if name not in self._encoders:
            if name.startswith(("tokenizer", "image_processor")):
                self._encoders[name] = load_component(self.root, self.index, name)
            else:
                module = load_component(self.root, self.index, name, self._encoder_dtype(name))
                self._encoders[name] = module.requires_grad_(False).to(self.device)
        return self._encoders[name]

    def _encoder_dtype(self, name: str) -> torch.dtype:
        return self._load_dtype

    @property
    def has_adapter(self) -> bool:
        """Whether the network carries a LoRA."""
        return any(adapters.has_adapter(network) for network in self.networks.values())

    @property
    def target_groups(self) -> dict[str, list[str]]:
        """Names for groups of layers that a LoRA may be put on, where a family has such."""
        return {}

    def add_adapter(
        self,
        rank: int,
        alpha: float | None = None,
        target_modules: Sequence[str] | None = None,
        seed: int = 0,
        init: adapters.Init = "gaussian",
    ) -> None:
        """Add a trainable LoRA (A seeded, B zero) to the family's `lora_targets` and freeze everything else.

        `target_modules` are ends of the names of layers, or names of `target_groups`.
        """
        groups = self.target_groups
        targets = [layer for one in target_modules or self.lora_targets for layer in groups.get(one, [one])]
        for place, network in enumerate(self.networks.values()):
            adapters.add_adapter(network, rank, alpha, targets, seed + place, init)
        self._lora_layers = adapters.lora_layers(self.bare_network)

    def load_adapter(self, *given: AdapterPath) -> None:
        """Load LoRA files or directories, each alone or with its weight, as one adapter and freeze everything else."""
        for name, network in self.networks.items():
            adapters.load_adapters(network, [self._own_adapter(name, *with_weight(one)) for one in given])
        self._lora_layers = adapters.lora_layers(self.bare_network)

    def _own_adapter(self, name: str, path: Path, weight: float) -> tuple[Path, float]:
        """Return where the adapter of one of the `networks` lies: a second expert's in a folder of its name."""
        if name == self.network_name:
            return path, weight
        if not (path / name).is_dir():
            raise PipelineError(
                f"{self.name_or_path} has two experts, and {path} holds an adapter for one; give a directory with"
                f" {WEIGHTS_NAME} and {name}/{WEIGHTS_NAME}."
            )
        return path / name, weight

    def adapter_disabled(self) -> AbstractContextManager[None]:
        """Context in which `predict` is, to the bit, that of the base model."""
        if not self.has_adapter:
            raise PipelineError("the model carries no adapter to switch off; use a frozen copy as the reference.")
        return adapters.adapter_disabled(self._lora_layers)

    def set_adapter_scale(self, scale: float) -> None:
        """Multiply the adapter's effect by `scale`: 0 is the base, 1 as trained, in between they are interpolated."""
        if not self.has_adapter:
            raise PipelineError(
                f"{self.name_or_path} carries no LoRA adapter to scale; give one, or leave the scale out."
            )
        for network in self.networks.values():
            adapters.set_adapter_scale(network, scale)

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        """Return the trainable parameters: the adapter's weights if there is one, else the whole network's."""
        return [parameter for parameter in self.network.parameters() if parameter.requires_grad]

    def enable_gradient_checkpointing(self) -> None:
        """Trade compute for memory in the network's backward pass."""
        self.bare_network.enable_gradient_checkpointing()

    @property
    def pipeline_class(self) -> Any:
        """The diffusers pipeline class of this model."""
        import diffusers

        return getattr(diffusers, self.index["_class_name"])

    @property
    def saved_index(self) -> dict[str, Any]:
        """The ``model_index.json`` that `save` writes: the model's own, unless a family saves its parts otherwise."""
        return self.index

    def save(self, path: str | Path) -> None:
        """Write a diffusers directory (safetensors); an adapter is merged into a copy of the weights first."""
        merged = {
            name: adapters.merged_copy(network) if self.has_adapter else network
            for name, network in self.networks.items()
        }
        save_pipeline(path, self.root, self.saved_index, merged)

    def save_lora(self, path: str | Path, *, base_model: str | None = None) -> None:
        """Write the adapter for diffusers and for ComfyUI and kohya, and ``mmalign.json`` naming the base model.

        That of a second expert lies in a folder of its component's name: ``pipe.load_lora_weights(
        "path/transformer_2", load_into_transformer_2=True)``.
        """
        record = {"base_model": base_model or self.name_or_path, "family": self.family}
        for name, network in reversed(self.networks.items()):  # a directory that has the first's is complete
            adapters.save_adapter(network, Path(path) if name == self.network_name else Path(path) / name, record)

    def check_lora_export(self, folder: Path) -> None:
        """Write the adapter with made-up weights into a folder inside `folder`, read it again and compare.

        Raises `PipelineError` where a file would give another model, or cannot be read.
        """
        for name, network in self.networks.items():
            place = "" if name == self.network_name else name
            adapters.check_round_trip(network, self.save_lora, folder, place)
