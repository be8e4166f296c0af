"""Qwen2-VL as a backbone whose hidden states at special tokens become rewards (HPSv3, VideoReward).

Source: Wang et al. 2024, "Qwen2-VL" (arXiv:2409.12191). The published rewards are full checkpoints of the model, with
the rows of the word embeddings cut to the tokenizer and its reward tokens, and without use for the language head.

Positions: Qwen2-VL gives image tokens positions in three dimensions, but both rewards were trained through the
language model alone, which then counts every token, image or word, one after another. So it is done here.

Media are prepared on tensors, and so differentiably: resized to multiples of 28 pixels within bounds on their number,
normalised, and cut into patches of 14 x 14 pixels and 2 frames (an image is its own second frame).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rewards.backbones.checkpoints import build
from rewards.backbones.hf import features, load_pretrained
from rewards.backbones.instruction import Template
from rewards.backbones.preprocess import Preprocess
from rewards.bases.cross_encoder import refuse_tokens
from rewards.errors import RewardError

MAX_RATIO = 200


class VisualTokens(NamedTuple):
    """Media as tokens of the language model: `[B, tokens, width]`, and the kind that the chat template knows."""

    tokens: Tensor
    kind: str


class Qwen2VLReader(nn.Module):
    """Media and prompts -> hidden states at reward tokens, `[B, tokens, width]`."""

    def __init__(
        self,
        base: str | PathLike[str],
        state: Mapping[str, Tensor],
        source: object,
        *,
        reward_tokens: tuple[str, ...],
        instruction: Template,
        dtype: torch.dtype,
    ) -> None:
        """Build the model from `state` (names of any version of transformers).

        base: directory or hub id of the Qwen2-VL it comes from, for configuration and processor alone. Raises
        `RewardError` for weights of another model, and for an instruction without the reward tokens.
        """
        super().__init__()
        import transformers

        self.instruction, self.reward_tokens = instruction, reward_tokens
        for token in reward_tokens:
            if instruction.text.count(token) != 1:
                raise RewardError(f"the instruction must contain {token} exactly once, where the score is read")
        self.processor: Any = load_pretrained("AutoProcessor", base)
        self.tokenizer: Any = self.processor.tokenizer
        self.tokenizer.add_tokens(list(reward_tokens), special_tokens=True)
        self.reward_ids = self.tokenizer.convert_tokens_to_ids(list(reward_tokens))
        renamed = {new: value for name, value in state.items() if (new := backbone_name(name)) is not None}
        rows = len(renamed.get("language_model.embed_tokens.weight", ()))
        if rows != len(self.tokenizer):
            raise RewardError(
                f"{source} has {rows} word embeddings, the tokenizer of {base} with {', '.join(reward_tokens)} "
                f"{len(self.tokenizer)} words: they do not belong together"
            )
        config = load_pretrained("Qwen2VLConfig", base)
        config.text_config.vocab_size = rows
        self.model = build(transformers.Qwen2VLModel, config, renamed, source, dtype)
        images = self.processor.image_processor
        self.patch, self.merge, self.frames = images.patch_size, images.merge_size, images.temporal_patch_size
        self.preprocess = Preprocess(
            self.patch * self.merge, tuple(images.image_mean), tuple(images.image_std), resize="squash"
        )
        self.special_tokens = tuple(self.tokenizer.get_added_vocab())

    @property
    def width(self) -> int:
        """Features of a hidden state."""
        return self.model.config.text_config.hidden_size

    def encode(
        self,
        media: Float[Tensor, "batch frames 3 height width"],
        kind: str,
        pixels: tuple[int, int],
        preprocessing: str,
    ) -> VisualTokens:
        """Encode media in [0, 1]; kind: `image` (one frame) or `video`; pixels: least and most of a frame."""
        size = smart_resize(*media.shape[-2:], factor=self.patch * self.merge, least=pixels[0], most=pixels[1])
        prepared = replace(self.preprocess, size=size)(media.flatten(0, 1), preprocessing).unflatten(
            0, media.shape[:2]
        )
        patches, grid = patchify(prepared, self.patch, self.merge, self.frames)
        rows = torch.tensor([grid] * len(media), device=media.device)
        tokens = features(self.model.visual(patches.flatten(0, 1).to(self.model.dtype), grid_thw=rows))
        return VisualTokens(tokens.unflatten(0, (len(media), -1)), kind)

    def forward(self, visual: VisualTokens, prompts: list[str]) -> Float[Tensor, "batch tokens features"]:
        """Read media and the instruction with each prompt; return the states at the reward tokens, in their order."""
        refuse_tokens("Qwen2-VL", prompts, self.special_tokens)
        texts = [self._text(visual, prompt) for prompt in prompts]
        inputs = self.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").to(
            visual.tokens.device
        )
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        embeddings = self.model.get_input_embeddings()(ids)
        pad = self.tokenizer.convert_tokens_to_ids(_pad(visual.kind))
        embeddings = embeddings.masked_scatter((ids == pad)[..., None], visual.tokens.to(embeddings.dtype))
        positions = torch.arange(ids.shape[1], device=ids.device).expand(3, *ids.shape)
        hidden = self.model.language_model(
            inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        found = torch.stack([(ids == token).int().argmax(1) for token in self.reward_ids], dim=1)
        return hidden.gather(1, found[..., None].expand(-1, -1, hidden.shape[-1]))

    def _text(self, visual: VisualTokens, prompt: str) -> str:
        content = [{"type": visual.kind}, {"type": "text", "text": self.instruction.fill(prompt)}]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        pad = _pad(visual.kind)
        if text.count(pad) != 1:
            raise RewardError(f"the chat template gives {text.count(pad)} places for one {visual.kind}; 1 is expected")
        return text.replace(pad, pad * visual.tokens.shape[1])


def patchify(
    media: Float[Tensor, "batch frames 3 height width"], patch: int, merge: int, frames: int
) -> tuple[Float[Tensor, "batch patches values"], tuple[int, int, int]]:
    """Cut media into patches, with patches to be merged side by side; the last frame is repeated to a full patch.

    Returns the patches and their grid: how many in time, height and width.
    """
    missing = -media.shape[1] % frames
    if missing:
        media = torch.cat([media, media[:, -1:].expand(-1, missing, -1, -1, -1)], dim=1)
    grid = (media.shape[1] // frames, media.shape[3] // patch, media.shape[4] // patch)
    split = media.unflatten(4, (-1, merge, patch)).unflatten(3, (-1, merge, patch)).unflatten(1, (-1, frames))
    # From batch, time, frame, channel, block row, row in it, y, block column, column in it, x to the place of a patch
    # (batch, time, block, row and column in it) and its values (channel, frame, y, x).
    return split.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9).flatten(6).flatten(1, 5), grid


def smart_resize(height: int, width: int, *, factor: int, least: int, most: int) -> tuple[int, int]:
    """Return a size near the given one: multiples of `factor`, with the pixel count within bounds and nearly the same
    ratio.

    Raises:
        RewardError: one side is more than 200 times the other.
    """
    if max(height, width) > MAX_RATIO * min(height, width):
        raise RewardError(f"media of {height} x {width} pixels: one side may be at most {MAX_RATIO} times the other")
    size = tuple(max(factor, round(side / factor) * factor) for side in (height, width))
    if math.prod(size) > most:
        shrink = math.sqrt(height * width / most)
        size = tuple(max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif math.prod(size) < least:
        grow = math.sqrt(least / (height * width))
        size = tuple(math.ceil(side * grow / factor) * factor for side in (height, width))
    return size[0], size[1]


def _pad(kind: str) -> str:
    return f"<|{kind}_pad|>"


def backbone_name(name: str) -> str | None:
    """Map names of transformers 4 (`visual`, `model`) and 5 (below `model`) to the bare model's, None for the rest."""
    if name.startswith("lm_head."):
        return None
    for prefix, new in (("model.visual.", "visual."), ("model.language_model.", "language_model.")):
        if name.startswith(prefix):
            return new + name.removeprefix(prefix)
    return "language_model." + name.removeprefix("model.") if name.startswith("model.") else name
