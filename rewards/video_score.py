"""VideoScore: five aspects of a generated video, regressed by Idefics2-8B (Mantis).

Source: He et al. 2024, "VideoScore" (arXiv:2406.15252), section 4. The model reads a long instruction with the prompt
and the frames; a linear head on the hidden state of the last token gives visual quality, temporal consistency, dynamic
degree, alignment with the prompt and factual consistency, each trained on human ratings from 1 to 4, not clamped.

The published class belongs to a package of the authors; its parts are those of Idefics2 in transformers, and are put
together here. Two things differ from the authors' code: the head computes in float32, not bfloat16 (a difference in
the third decimal), and frames of a uniform middle grey are seen like others, where that code takes them for padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rewards.backbones.checkpoints import build, read_checkpoint
from rewards.backbones.heads import Float32Head
from rewards.backbones.hf import load_pretrained
from rewards.backbones.instruction import Instruction, read_instruction
from rewards.backbones.load import check_mode
from rewards.backbones.preprocess import Preprocess
from rewards.backbones.weights import GITHUB, Weights, load_state
from rewards.bases.cross_encoder import CrossEncoderReward, refuse_tokens
from rewards.errors import RewardError, choices
from rewards.media import Media, read_media

ASPECTS = (
    "visual-quality", "temporal-consistency", "dynamic-degree", "text-to-video-alignment", "factual-consistency",
)  # fmt: skip
HEAD, MODEL = "score.", "model."
IMAGE = "<image> "
FRAMES_AT_ONCE = 16
INSTRUCTION = Instruction(
    Weights(
        "TIGER-AI-Lab/VideoScore",
        "examples/run_videoscore.py",
        revision="8e449734bbeb4aba327b82f2269e7247633a7abc",
        sha256="a8530842207c81eaa86b8b9c1b9b518d64ebd7247f7d5196bdc327fb7032b204",
        host=GITHUB,
    ),
    ("REGRESSION_QUERY_PROMPT",),
    "49b386d9ea3003760c983cc258cf4211faf858d58191f95fcfacdf68a8fed2c0",
)


class Version(NamedTuple):
    """A published model: its repository, and the most frames that it was trained on."""

    repo: str
    frames: int


VERSIONS = {"v1": Version("TIGER-Lab/VideoScore", 16), "v1.1": Version("TIGER-Lab/VideoScore-v1.1", 48)}


class VideoScore(CrossEncoderReward):
    """Mean of five aspects of a video given its prompt, by VideoScore (8 B parameters); about 1 to 4.

    version: `v1` (16 frames) or `v1.1` (48 frames); of longer videos as many are taken, evenly. aspects: which are
    averaged, by default all; the authors report each for itself, as `parts` does. weights: directory or hub id of the
    model with its processor. instruction: what the model was trained with, as the authors' run_videoscore.py, a text
    file, or the text with {text_prompt} where the prompt goes; by default fetched from the authors' repository, and
    part of `version` if it is another. preprocessing: as in `rewards.backbones.preprocess`. dtype: bfloat16 by
    default, as published. Raises `RewardError` for weights of another model and for prompts with special tokens.
    """

    name: ClassVar[str] = "video-score"
    version = "v1.1"
    modality = "video"
    differentiable = True
    licence = "MIT (code); weights: see their card; Apache-2.0 (Idefics2)"
    source = VERSIONS["v1.1"].repo
    citation = "He et al. 2024, VideoScore, arXiv:2406.15252"

    def __init__(
        self,
        *,
        version: str = "v1.1",
        weights: str | PathLike[str] | None = None,
        aspects: Sequence[str] = ASPECTS,
        instruction: str | PathLike[str] | None = None,
        preprocessing: str = "differentiable",
        dtype: str | torch.dtype | None = None,
        batch_size: int = 1,
        **options: Any,
    ) -> None:
        """Load model, head, processor and instruction."""
        super().__init__(dtype=dtype or "bfloat16", batch_size=batch_size, **options)
        if version not in VERSIONS:
            raise RewardError(f"video-score: version {version!r} is unknown; {choices(version, VERSIONS)}")
        self.preprocessing, self.frames = check_mode(preprocessing), VERSIONS[version].frames
        self.chosen = _chosen(aspects)
        self.instruction = read_instruction(INSTRUCTION, instruction)
        some = "" if len(self.chosen) == len(ASPECTS) else " + ".join(ASPECTS[i] for i in self.chosen)
        self.version = ", ".join(filter(None, (version, some, self.instruction.version)))
        source = VERSIONS[version].repo if weights is None else weights
        self.source = str(source)
        self._load(source)

    def encode_media(
        self, media: Float[Tensor, "batch frames 3 height width"]
    ) -> Float[Tensor, "batch tokens features"]:
        """Choose frames and encode each into as many tokens of the language model as the resampler has."""
        count = len(media)
        frames = media[:, choose_frames(media.shape[1], self.frames).to(media.device)].flatten(0, 1)
        size = fit_size(*frames.shape[-2:], least=self.edges[0], most=self.edges[1])
        prepare = replace(self.preprocess, size=size)
        tokens = [self._encode(prepare(chunk, self.preprocessing)) for chunk in frames.split(FRAMES_AT_ONCE)]
        return torch.cat(tokens).unflatten(0, (count, -1)).flatten(1, 2)

    def compare(self, encoded: Float[Tensor, "batch tokens features"], prompts: list[str]) -> Float[Tensor, " batch"]:
        """Average the chosen aspects."""
        return self._outputs(encoded, prompts)[:, self.chosen].mean(1)

    def parts(self, media: Media, *, prompts: Sequence[str]) -> Float[Tensor, "batch 5"]:
        """Return all five aspects, in the order of `ASPECTS`, whatever `aspects` is: `[B, 5]` float32."""
        groups = read_media(media, self.modality)
        checked = self._check_prompts(prompts, sum(len(positions) for positions, _ in groups)) or []

        def row(chunk: Tensor, positions: list[int]) -> Tensor:
            return self._outputs(self.encode_media(chunk), [checked[i] for i in positions])

        return self._run(groups, row)

    def _load(self, source: str | PathLike[str]) -> None:
        import transformers

        config = load_pretrained("AutoConfig", source)
        if config.model_type != "idefics2":
            raise RewardError(f"{source}: the model type is {config.model_type!r}; VideoScore is an 'idefics2'")
        self.processor: Any = load_pretrained("AutoProcessor", source)
        self.tokenizer: Any = self.processor.tokenizer
        images = self.processor.image_processor
        if images.do_image_splitting:
            raise RewardError(
                f"{source}: its processor splits images, but VideoScore was trained without; set do_image_splitting "
                "to false"
            )
        self.edges = (images.size["shortest_edge"], images.size["longest_edge"])
        # The size is that of each video; the filter of Idefics2 is bilinear.
        self.preprocess = Preprocess(
            self.edges[0], tuple(images.image_mean), tuple(images.image_std), resize="squash", interpolation="bilinear"
        )
        self.special_tokens = tuple(self.tokenizer.get_added_vocab())
        self.image_id = self.tokenizer.convert_tokens_to_ids(IMAGE.strip())
        state = read_checkpoint(source)
        layers = {name.removeprefix(HEAD): state.pop(name) for name in list(state) if name.startswith(HEAD)}
        renamed = {name.removeprefix(MODEL): value for name, value in state.items()}
        self.model: Any = build(transformers.Idefics2Model, config, renamed, source, self.dtype).to(self.device)
        self.head = _head(layers, config.text_config.hidden_size, source).to(self.device, self.dtype)

    def _encode(self, pixels: Float[Tensor, "frames 3 height width"]) -> Float[Tensor, "frames tokens features"]:
        patch = self.model.config.vision_config.patch_size
        rows, columns = (side // patch for side in pixels.shape[-2:])
        seen = torch.ones(len(pixels), rows, columns, dtype=torch.bool, device=pixels.device)
        hidden = self.model.vision_model(
            pixel_values=pixels.to(self.model.dtype), patch_attention_mask=seen
        ).last_hidden_state
        return self.model.connector(hidden, attention_mask=seen.flatten(1))

    def _outputs(self, encoded: Tensor, prompts: list[str]) -> Float[Tensor, "batch 5"]:
        refuse_tokens(self.name, prompts, self.special_tokens)
        frames = encoded.shape[1] // self.model.config.perceiver_config.resampler_n_latents
        texts = [self.instruction.fill(prompt) + IMAGE * frames for prompt in prompts]
        self.tokenizer.padding_side = "right"
        inputs = self.processor(text=texts, padding=True, return_tensors="pt").to(encoded.device)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        embeddings = self.model.get_input_embeddings()(ids)
        embeddings = embeddings.masked_scatter((ids == self.image_id)[..., None], encoded.to(embeddings.dtype))
        hidden = self.model.text_model(
            inputs_embeds=embeddings, attention_mask=mask, use_cache=False
        ).last_hidden_state
        last = mask.sum(1) - 1
        return self.head(hidden[torch.arange(len(hidden), device=hidden.device), last])


def choose_frames(total: int, most: int) -> Int[Tensor, " frames"]:
    """Return the indices of the sampled frames: all, or `most` of them, each the first of an equal part."""
    return torch.arange(total) if total <= most else torch.arange(most) * total // most


def fit_size(height: int, width: int, *, least: int, most: int) -> tuple[int, int]:
    """Return the size that Idefics2 resizes to: the longer edge at most `most`, then either edge at least `least`."""
    if max(height, width) > most:
        scale = most / max(height, width)
        height, width = (most, int(width * scale)) if height > width else (int(height * scale), most)
    return max(height, least), max(width, least)


def _chosen(aspects: Sequence[str]) -> list[int]:
    names = [aspects] if isinstance(aspects, str) else list(aspects)
    for name in names:
        if name not in ASPECTS:
            raise RewardError(f"video-score: aspects has {name!r}; {choices(str(name), ASPECTS)}")
    if not names or len(set(names)) < len(names):
        raise RewardError(f"video-score: aspects is {names}; each at most once, at least one of {', '.join(ASPECTS)}")
    return [i for i, name in enumerate(ASPECTS) if name in names]


def _head(layers: Mapping[str, Tensor], width: int, source: object) -> Float32Head:
    head = Float32Head(nn.Linear(width, len(ASPECTS), bias="bias" in layers))
    load_state(head, layers, f"{source}, {HEAD}*", rename=lambda name: f"0.{name}")
    return head
