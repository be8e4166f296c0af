"""VideoReward: visual quality, motion quality and text alignment of a generated video, by Qwen2-VL-2B.

Source: Liu et al. 2025, "Improving Video Generation with Human Feedback" (arXiv:2501.13918), section 3. The model
reads the frames and a long instruction; a linear head without bias gives three numbers at each of the tokens
<|VQ_reward|>, <|MQ_reward|>, <|TA_reward|>, of which the first, second and third are taken. Each is shifted and scaled
by its mean and standard deviation over the authors' data, and the overall score is their sum.

The checkpoint is a directory as the authors' training writes it: model_config.json, and checkpoint-STEP with either
model.pth (all weights) or adapter_model.safetensors and non_lora_state_dict.pth (what differs from Qwen2-VL-2B).
Deviations: the low-rank updates are added to the weights once, and the head computes in float32, where the authors'
code does both in bfloat16 at every call.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rewards.backbones.checkpoints import locate_directory, read_checkpoint
from rewards.backbones.heads import Float32Head
from rewards.backbones.instruction import Instruction, read_instruction
from rewards.backbones.preprocess import MODES
from rewards.backbones.weights import GITHUB, Weights, load_state, read_state
from rewards.bases.cross_encoder import CrossEncoderReward
from rewards.bases.qwen2_vl import Qwen2VLReader, VisualTokens, backbone_name
from rewards.errors import RewardError, choices
from rewards.media import Media, read_media

DIMENSIONS = ("VQ", "MQ", "TA")
TOKENS = tuple(f"<|{dimension}_reward|>" for dimension in DIMENSIONS)
# Over the authors' data; values of model_config.json take precedence.
STATISTICS = {"VQ": (3.6757, 2.2476), "MQ": (1.1646, 1.3811), "TA": (2.8105, 2.5121)}
SUPPORTED: dict[str, dict[str, Any]] = {
    "data_config": {"prompt_template_type": "detailed_special", "sample_type": "uniform"},
    "model_config": {"use_special_tokens": True, "output_dim": 3},
}
LEAST_PIXELS = 128 * 28 * 28
LEAST_FRAMES, MOST_FRAMES = 4, 768
CHECKPOINT = ("model.pth", "adapter_model.safetensors", "non_lora_state_dict.pth")
WRAPPER = "base_model.model."
SOURCE, BASE = "KwaiVGI/VideoReward", "Qwen/Qwen2-VL-2B-Instruct"
INSTRUCTION = Instruction(
    Weights(
        "KwaiVGI/VideoAlign",
        "prompt_template.py",
        revision="219ab9db64c045e5181a2202d11f686439351292",
        sha256="8fb42f91fd7440a1c9a377e78f36d67da6132eb348f402eecbeb57e41f138ae9",
        host=GITHUB,
    ),
    ("DETAILED_PROMPT_WITH_SPECIAL_TOKEN",),
    "fdb6309bac618dd0c8b1b589d3a0970a974f7856eecbb355a190b2dce54af700",
)


class VideoAlign(CrossEncoderReward):
    """Human preference for a video given its prompt, by VideoReward (2 B parameters); each part about N(0, 1).

    dims: which of `VQ`, `MQ`, `TA` are added up, by default all. normalise=False leaves the parts as the head gives
    them. media_fps: frames per second of the videos given, of which as many are then taken as in training (2 a second,
    at least 4); by default all frames are taken, so give them at that rate: fewer or more shift the scores. weights:
    directory or hub id; base: that of Qwen2-VL-2B-Instruct, for configuration, processor, and what the checkpoint
    leaves out. instruction: the authors' prompt_template.py, a text file, or the text with {text_prompt} where the
    prompt goes; by default fetched from the authors' repository. preprocessing: as in `rewards.backbones.preprocess`.
    dtype: bfloat16 by default, as published. Raises `RewardError` for a checkpoint trained with other settings than
    the published one, for weights of another model, videos of one frame, and prompts with special tokens.
    """

    name: ClassVar[str] = "video-align"
    version = "VQ + MQ + TA"
    modality = "video"
    differentiable = True
    licence = "MIT (code); weights: see their card; Apache-2.0 (Qwen2-VL)"
    source = f"{SOURCE}; {BASE}"
    citation = "Liu et al. 2025, arXiv:2501.13918"
    least_frames = 2

    def __init__(
        self,
        *,
        weights: str | PathLike[str] | None = None,
        base: str | PathLike[str] = BASE,
        instruction: str | PathLike[str] | None = None,
        dims: Sequence[str] = DIMENSIONS,
        normalise: bool = True,
        media_fps: int | float | None = None,
        preprocessing: str = "differentiable",
        dtype: str | torch.dtype | None = None,
        batch_size: int = 4,
        **options: Any,
    ) -> None:
        """Load settings, model, head and instruction."""
        super().__init__(dtype=dtype or "bfloat16", batch_size=batch_size, **options)
        if preprocessing not in MODES:
            raise RewardError(f"preprocessing {preprocessing!r} is unknown; {choices(preprocessing, MODES)}")
        if media_fps is not None and not media_fps > 0:
            raise RewardError(f"media_fps is {media_fps}; give the frames per second of the videos")
        self.preprocessing, self.media_fps, self.normalise = preprocessing, media_fps, normalise
        self.chosen = _chosen(dims)
        template = read_instruction(INSTRUCTION, instruction)
        parts = [" + ".join(DIMENSIONS[i] for i in self.chosen), "" if normalise else "raw", template.version]
        self.version = ", ".join(filter(None, parts))
        directory = locate_directory(weights or SOURCE, [f"checkpoint-*/{name}" for name in CHECKPOINT])
        settings = _settings(directory)
        self.data: dict[str, Any] = settings["data_config"]
        self.statistics = _statistics(settings)
        state = _read(directory, settings, base)
        layers = {name: state.pop(name) for name in list(state) if name.startswith("rm_head.")}
        self.reader = Qwen2VLReader(
            base, state, directory, reward_tokens=TOKENS, instruction=template, dtype=self.dtype
        ).to(self.device)
        head = Float32Head(nn.Linear(self.reader.width, len(DIMENSIONS), bias=False))
        load_state(head, layers, directory, rename=lambda name: name.replace("rm_head", "0"))
        self.head = head.to(self.device, self.dtype)

    def encode_media(self, media: Float[Tensor, "batch frames 3 height width"]) -> VisualTokens:
        """Choose frames and encode them into tokens of the language model."""
        frames = choose_frames(media.shape[1], self.media_fps, self.data["fps"], self.data.get("num_frames"))
        pixels = (LEAST_PIXELS, int(self.data["max_frame_pixels"]))
        return self.reader.encode(media[:, frames.to(media.device)], "video", pixels, self.preprocessing)

    def compare(self, encoded: VisualTokens, prompts: list[str]) -> Float[Tensor, " batch"]:
        """Return the sum of the chosen parts."""
        return self._parts(encoded, prompts)[:, self.chosen].sum(1)

    def parts(self, media: Media, *, prompts: Sequence[str]) -> Float[Tensor, "batch 3"]:
        """Return visual quality, motion quality and text alignment, whatever `dims` is: `[B, 3]` float32."""
        groups = read_media(media, self.modality)
        checked = self._check_prompts(prompts, sum(len(positions) for positions, _ in groups)) or []

        def row(chunk: Tensor, positions: list[int]) -> Tensor:
            return self._parts(self.encode_media(chunk), [checked[i] for i in positions])

        return self._run(groups, row)

    def _parts(self, encoded: VisualTokens, prompts: list[str]) -> Tensor:
        parts = self.head(self.reader(encoded, prompts)).diagonal(dim1=1, dim2=2)
        if not self.normalise:
            return parts
        mean, deviation = parts.new_tensor(self.statistics).T
        return (parts - mean) / deviation


def choose_frames(
    total: int, media_fps: int | float | None, fps: int | float, number: int | float | None
) -> Int[Tensor, " frames"]:
    """Return the indices of the frames to be seen, evenly from the first to the last; an even number if it must fit.

    number: as many, whatever their rate; else all without `media_fps`, or `fps` a second, 4 to 768 of them. Raises
    `RewardError` for a single frame.
    """
    if total < 2:
        raise RewardError("a video of 1 frame has no motion; at least 2 frames are needed")
    if number is not None:
        count = round(number / 2) * 2
    elif media_fps is None:
        count = total
    else:
        count = round(min(max(total / media_fps * fps, LEAST_FRAMES), min(MOST_FRAMES, total) // 2 * 2) / 2) * 2
    return torch.linspace(0, total - 1, min(count, total)).round().long()


def merge_low_rank(state: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Add `scale` B A to every weight that has low-rank updates A and B; the names of peft vanish."""
    plain = {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}
    for name, down in state.items():
        if ".lora_A." not in name:
            continue
        up, target = state.get(name.replace(".lora_A.", ".lora_B.")), name.split(".lora_A.")[0] + ".weight"
        if up is None or target not in plain:
            raise RewardError(f"{name} has no {'counterpart lora_B' if up is None else 'weight that it adds to'}")
        weight = plain[target]
        plain[target] = (weight.float() + scale * (up.float() @ down.float())).to(weight.dtype)
    return plain


def _chosen(dims: Sequence[str]) -> list[int]:
    names = [dims] if isinstance(dims, str) else list(dims)
    for name in names:
        if name not in DIMENSIONS:
            raise RewardError(f"dims has {name!r}; {choices(str(name), DIMENSIONS)}")
    if not names or len(set(names)) < len(names):
        raise RewardError(f"dims is {names}; each at most once, at least one of {', '.join(DIMENSIONS)}")
    return [i for i, name in enumerate(DIMENSIONS) if name in names]


def _settings(directory: Path) -> dict[str, Any]:
    path = directory / "model_config.json"
    if not path.is_file():
        raise RewardError(f"{directory} lacks model_config.json; the directory or hub id of a VideoReward is expected")
    settings = json.loads(path.read_text(encoding="utf-8"))
    for section, values in SUPPORTED.items():
        for name, value in values.items():
            if settings[section].get(name) != value:
                raise RewardError(
                    f"{path}: {section}.{name} is {settings[section].get(name)!r}; only {value!r}, as published, "
                    "is supported"
                )
    return settings


def _statistics(settings: Mapping[str, Any]) -> list[tuple[float, float]]:
    given = settings.get("inference_config") or {}
    return [
        (given.get(f"{name}_mean", STATISTICS[name][0]), given.get(f"{name}_std", STATISTICS[name][1]))
        for name in DIMENSIONS
    ]


def _read(directory: Path, settings: Mapping[str, Any], base: str | PathLike[str]) -> dict[str, Tensor]:
    """Read the last checkpoint, with the low-rank updates added to the weights, under the names of Qwen2-VL."""
    steps = {int(path.name.split("-")[1]): path for path in directory.glob("checkpoint-*") if path.is_dir()}
    if not steps:
        raise RewardError(f"{directory} has no checkpoint-STEP directory")
    full, adapter, rest = (steps[max(steps)] / name for name in CHECKPOINT)
    if full.is_file():
        state = _unwrapped(read_state(full))
    elif adapter.is_file() and rest.is_file():
        state = _unwrapped(read_checkpoint(base)) | _unwrapped(read_state(rest)) | _unwrapped(read_state(adapter))
    else:
        raise RewardError(f"{full.parent} has neither {full.name} nor both of {adapter.name} and {rest.name}")
    lora = settings.get("peft_lora_config", {})
    if any(".lora_" in name for name in state) and not {"lora_alpha", "lora_r"} <= lora.keys():
        raise RewardError(
            f"{directory}: model_config.json lacks lora_alpha and lora_r, yet there are low-rank updates"
        )
    rank = lora.get("lora_r", 1)
    return merge_low_rank(state, lora.get("lora_alpha", 0) / (rank**0.5 if lora.get("use_rslora") else rank))


def _unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Strip peft's prefixes from the names, and return the bare model's names."""
    names = ((backbone_name(name.removeprefix(WRAPPER)), value) for name, value in state.items())
    return {name: value for name, value in names if name is not None}
