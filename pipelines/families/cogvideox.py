"""CogVideoX (2B, 5B, 1.5): a transformer over the latents of a causal video autoencoder, conditioned by T5.

CogVideoX: arXiv 2408.06072; v-prediction. The conventions are those of diffusers' ``CogVideoXPipeline``: the network
takes frames before channels; rotary positions are those of the grid of tokens. The autoencoder takes frames by eight
after the first one, so that videos have odd numbers of latent frames. 1.5 makes one token of two of them: a video is
filled up at its front, in training by a copy of its first latent frame, as in the published code (THUDM/CogVideo,
``finetune/models/cogvideox_t2v``), and cut there after sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from pipelines.components import INDEX, component_config
from pipelines.conditioning import Conditioning
from pipelines.errors import PipelineError
from pipelines.families.latent import single
from pipelines.families.latent_video import LatentVideo
from pipelines.video import VideoOptions

FPS = {None: 8.0, 2: 16.0}
"""Frames a second by the latent frames of a token: of CogVideoX, and of 1.5."""
SIDES_1_5 = (768, 1360)
"""Height and width that the card of 1.5 recommends; its network has positions for more."""
CHUNK = 3
"""Latent frames that the autoencoder decodes at first; then two at a time."""

Rotary = tuple[Float[Tensor, "tokens width"], Float[Tensor, "tokens width"]]


class CogVideoX(LatentVideo):
    """CogVideoX, text to video: 2B (sine positions), 5B and 1.5 (rotary positions)."""

    family = "cogvideox"
    network_name = "transformer"
    text_names = ("text_encoder", "tokenizer")

    def __init__(self, root: Path, index: dict[str, Any], *, name_or_path: str, **options: Any) -> None:
        """Load as `LatentVideo` does; raises `PipelineError` for networks with other inputs than text."""
        self.root, self.index, self.name_or_path = root, index, name_or_path
        self.config = component_config(root, self.network_name)
        self._check_encoders()
        self._check_network()
        self._rotary: dict[tuple[Any, ...], Rotary] = {}
        super().__init__(root, index, name_or_path=name_or_path, **options)

    def _check_network(self) -> None:
        self._check_inputs()
        patch = self.config.get("patch_size_t")
        if patch not in FPS:
            raise PipelineError(
                f"the transformer of {self.name_or_path} makes a token of {patch} latent frames (patch_size_t);"
                " supported are 1 and 2."
            )

    def _check_inputs(self) -> None:
        """Raise `PipelineError` for a network that takes other inputs than noisy latents and text."""
        channels = int(self.config.get("in_channels", 16))
        image = self.config.get("ofs_embed_dim") or self.config.get("use_learned_positional_embeddings")
        if channels != self.latent_channels or image:
            raise PipelineError(
                f"the transformer of {self.name_or_path} takes {channels} channels, its autoencoder gives"
                f" {self.latent_channels}; it takes an image too, and {INDEX} names a text-to-video pipeline: fetch"
                " the model again, or use a text-to-video model."
            )

    @property
    def text_length(self) -> int:
        """How many tokens prompts are padded and cut to: what the network was trained on."""
        return int(self.config.get("max_text_seq_length", 226))

    @property
    def text_id(self) -> str:
        """Identifies the text encoder and the length that prompts are padded to."""
        return f"{super().text_id}-{self.text_length}"

    @property
    def default_video(self) -> VideoOptions:
        """The geometry that diffusers' pipeline has by default; of 1.5 what its card recommends."""
        height, width = (side * self.vae_factor for side in self._trained_sides)
        if self.config.get("patch_size_t"):
            height, width = min(height, SIDES_1_5[0]), min(width, SIDES_1_5[1])
        frames = int(self.config.get("sample_frames", 49))
        return VideoOptions(height, width, frames, FPS[self.config.get("patch_size_t")])

    @property
    def _trained_sides(self) -> tuple[int, int]:
        return int(self.config.get("sample_height", 60)), int(self.config.get("sample_width", 90))

    @property
    def patch_size(self) -> int:
        """How many latents a side one token covers."""
        return int(self.config.get("patch_size", 2))

    @property
    def side_multiple(self) -> int:
        """What the sides of frames are multiples of, in pixels: whole tokens."""
        return self.vae_factor * self.patch_size

    def check_size(self, height: int, width: int) -> None:
        """Raise `PipelineError` as `LatentVideo` does, and where 1.5 has no positions for so many tokens."""
        super().check_size(height, width)
        most = [side * self.vae_factor for side in self._trained_sides]
        if self.config.get("patch_size_t") and (height > most[0] or width > most[1]):
            raise PipelineError(
                f"'{self.family}' 1.5 has positions for frames of at most {most[0]} x {most[1]}, not {height} x"
                f" {width}; the nearest size is {min(height, most[0])} x {min(width, most[1])}."
            )

    @property
    def frame_step(self) -> int:
        """How many frames each latent frame but the first stands for."""
        return int(self._vae_config.get("temporal_compression_ratio", 4))

    @property
    def frame_multiple(self) -> int:
        """The autoencoder decodes latent frames by two after the first."""
        return 2 * self.frame_step

    def latent_frames(self, frames: int) -> int:
        """Return how many latent frames the network takes for so many frames."""
        made = super().latent_frames(frames)
        return made + self._filled(made)

    def _filled(self, made: int) -> int:
        """Return how many latent frames stand before those of the autoencoder, to make whole tokens."""
        return -made % int(self.config.get("patch_size_t") or 1)

    @property
    def _cut(self) -> int:
        """Latent frames before those of a video; videos have odd numbers of them, so that 1.5 always has one."""
        return self._filled(1)

    def describe(self) -> str:
        """Return the geometry and the text length in one line."""
        return f"{self.family}: {self.describe_size()}, {self.text_length} text tokens"

    def predict(
        self, x_t: Float[Tensor, "batch channels frames h w"], t: Shaped[Tensor, " batch"], cond: Conditioning
    ) -> Float[Tensor, "batch channels frames h w"]:
        """Run the transformer once, without guidance; the output, v, is float32 (or float64)."""
        dtype = self.dtype
        output = self.network(
            hidden_states=self._inputs(x_t.to(dtype), cond).transpose(1, 2),
            encoder_hidden_states=cond.prompt_embeds.to(dtype),
            timestep=t,
            image_rotary_emb=self._positions(x_t),
            return_dict=False,
            **self._beside(x_t),
        )[0]
        return single(output).transpose(1, 2)

    def _inputs(self, x_t: Tensor, cond: Conditioning) -> Tensor:
        """Return the channels that the network takes, before frames are put first."""
        return x_t

    def _beside(self, x_t: Tensor) -> dict[str, Tensor]:
        """Return what the network takes beside latents, time and text."""
        return {}

    def _positions(self, x_t: Tensor) -> Rotary | None:
        """Return cosines and sines of the rotary positions of latents' tokens, None for sine positions."""
        if not self.config.get("use_rotary_positional_embeddings"):
            return None
        frames, height, width = x_t.shape[2:]
        key = (frames, height, width, x_t.device)
        if key not in self._rotary:
            self._rotary[key] = self._rotary_of(frames, height, width, x_t.device)
        return self._rotary[key]

    def _rotary_of(self, frames: int, height: int, width: int, device: torch.device) -> Rotary:
        from diffusers.models.embeddings import get_3d_rotary_pos_embed
        from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

        grid = height // self.patch_size, width // self.patch_size
        trained_height, trained_width = (side // self.patch_size for side in self._trained_sides)
        options: dict[str, Any] = {"embed_dim": int(self.config.get("attention_head_dim", 64)), "device": device}
        if patch := self.config.get("patch_size_t"):
            options |= {"temporal_size": frames // patch, "grid_type": "slice", "crops_coords": None}
            options["max_size"] = trained_height, trained_width
        else:
            options |= {"temporal_size": frames}
            options["crops_coords"] = get_resize_crop_region_for_grid(grid, trained_width, trained_height)
        cosines, sines = get_3d_rotary_pos_embed(grid_size=grid, **options)
        return cosines, sines

    def _moments(self, media: Tensor) -> tuple[Tensor, Tensor]:
        moments = super()._moments(media)
        mean, std = (torch.cat([one[:, :, :1]] * self._cut + [one], dim=2) for one in moments)
        return mean, std

    def _media(self, latents: Tensor) -> Tensor:
        return super()._media(latents[:, :, self._cut :])

    def decode_frames(
        self, latents: Float[Tensor, "batch channels frames h w"], frames: Sequence[int]
    ) -> Float[Tensor, "batch chosen 3 height width"]:
        """Return one picture a chosen latent frame, the last that it stands for, as `LatentVideo.decode_frames` does.

        Three latent frames are decoded for each. Those of the first three are exact; for later ones the autoencoder
        sees the pair that it decodes together, and of all before it one frame. The frame that 1.5 puts before a video
        stands for its first.
        """
        self._check_chosen(latents, frames)
        pictures = []
        for frame in (max(0, frame - self._cut) for frame in frames):
            start = 0 if frame < CHUNK else frame - 2 + frame % 2
            before, own = latents.tensor_split([self._cut], dim=2)
            window = torch.cat([before, own[:, :, start : start + CHUNK]], dim=2)
            pictures.append(self.decode_checkpointed(window)[:, (frame - start) * self.frame_step])
        return torch.stack(pictures, dim=1)

    def _encode_batch(self, prompts: list[str]) -> Conditioning:
        tokens = self._tokenize("tokenizer", prompts, self.text_length)
        return Conditioning(self.encoder("text_encoder")(tokens["input_ids"])[0])

    def _encoder_dtype(self, name: str) -> torch.dtype:
        # ``force_upcast`` is a key of image autoencoders; this one has it by default, and its pipeline reads it not.
        return self._load_dtype
