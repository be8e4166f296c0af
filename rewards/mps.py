"""MPS: a CLIP ViT-H/14 whose image tokens attend to the words of the prompt relevant to a preference condition.

Source: Zhang et al. 2024, "Learning Multi-dimensional Human Preference for Text-to-Image Generation"
(arXiv:2405.14705), section 4, and the layout of the released model. With t_i the projected states of the prompt's 77
positions, c_j those of the condition's, v the image's 257, e the prompt's embedding:

    m_i = max_j <t_i, c_j>;    words kept: m_i / max_i m_i > threshold
    r = exp(logit scale) cos(e, h_0),    h = cross model(v, t of the kept words)

Deviations: in the authors' training code the maximum that divides m runs over the whole batch, so that a score depends
on its neighbours; here it is each prompt's own, as in their evaluation, which scores one pair at a time. Positions
after the end token take part, as they do there. The threshold is 0.3 in the authors' evaluation and 0.01 in their
model's `forward`, which their README calls: an option, named in `version`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from rewards.backbones.hf import load_pretrained
from rewards.backbones.load import check_mode
from rewards.backbones.mps_cross import CrossModel
from rewards.backbones.preprocess import Preprocess
from rewards.backbones.truncation import Truncation
from rewards.backbones.weights import Weights, load_state, locate, read_state
from rewards.bases.cross_encoder import CrossEncoderReward
from rewards.errors import RewardError

PUBLISHED = Weights("RE-N-Y/mpsv1", "model.safetensors")
TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
OVERALL = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, "
    "texture, quantity, attributes, position, number, location, word, things."
)
CACHED_PROMPTS = 256

# CLIP ViT-H/14; `eos_token_id` 2 makes transformers pool at the highest token id, which is the end token.
VIT_H: dict[str, Any] = {
    "text_config": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "hidden_act": "gelu", "projection_dim": 1024, "eos_token_id": 2,
    },
    "vision_config": {
        "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
        "hidden_act": "gelu", "projection_dim": 1024, "patch_size": 14, "image_size": 224,
    },
    "projection_dim": 1024,
}  # fmt: skip


class Words(NamedTuple):
    """The encoding of one prompt: the states of its positions, which of them are kept, and its embedding."""

    states: Float[Tensor, "positions width"]
    kept: Bool[Tensor, " positions"]
    embedding: Float[Tensor, " width"]


class Mps(CrossEncoderReward):
    """Human preference for an image given its prompt under a condition in words, by MPS (overall).

    weights: a safetensors or torch file of the state dict (`model.*`, `cross_model.*`, with or without `mps.` before
    them), or a directory that holds the published one; the authors' own file is a pickled program and is not read.
    tokenizer: directory or hub id of CLIP's. condition: the words of which the prompt's are kept if they are close;
    by default the authors' for overall preference. threshold: how close, relative to the closest. Prompts are cut at
    77 tokens, with one warning. preprocessing: as in `rewards.backbones.preprocess`. Raises `RewardError` for other
    weights.
    """

    name: ClassVar[str] = "mps"
    version = "overall, threshold 0.3"
    differentiable = True
    range = (-100.0, 100.0)
    licence = "MIT (code); weights without a stated licence"
    source = f"{PUBLISHED}, a copy of Kwai-Kolors/MPS; tokenizer of {TOKENIZER}"
    citation = "Zhang et al. 2024, arXiv:2405.14705"
    files = (PUBLISHED,)

    architecture: ClassVar[dict[str, Any]] = VIT_H

    def __init__(
        self,
        *,
        weights: str | PathLike[str] | None = None,
        tokenizer: str | PathLike[str] | None = None,
        condition: str = OVERALL,
        threshold: float = 0.3,
        preprocessing: str = "differentiable",
        **options: Any,
    ) -> None:
        """Load CLIP, cross model and tokenizer."""
        super().__init__(**options)
        if not threshold < 1:
            raise RewardError(
                f"mps: threshold is {threshold}; a number below 1, the value of the closest word, is allowed"
            )
        self.condition, self.threshold = condition, float(threshold)
        self.preprocessing = check_mode(preprocessing)
        path = locate(PUBLISHED, weights)
        state = {_name(name): value for name, value in read_state(path).items() if not name.endswith("position_ids")}
        clip, cross = _clip(self.architecture), CrossModel.like(state, "cross_model.")
        load_state(nn.ModuleDict({"model": clip, "cross_model": cross}), state, path)
        self.model = clip.to(self.device, self.dtype)
        self.cross_model = cross.to(self.device, self.dtype)
        # read before the weights are rounded to half precision
        self.scale = state["model.logit_scale"].double().exp().item()
        self.range = (-self.scale, self.scale)
        self.preprocess = Preprocess(self.architecture["vision_config"]["image_size"])
        self.tokenizer = load_pretrained("AutoTokenizer", tokenizer or TOKENIZER)
        self.context = self.model.config.text_config.max_position_embeddings
        self.truncation = Truncation(self.name, self.context)
        self.source = self.source if weights is None else str(path)
        kind = "overall" if condition == OVERALL else f"condition {condition!r}"
        self.version = f"{kind}, threshold {self.threshold:g}"
        self._cache: OrderedDict[str, Words] = OrderedDict()

    def encode_media(self, media: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch tokens features"]:
        """Return the projected states of the image's tokens, [CLS] first."""
        pixels = self.preprocess(media, self.preprocessing).to(self.dtype)
        return self.model.visual_projection(self.model.vision_model(pixel_values=pixels).last_hidden_state)

    def compare(self, encoded: Float[Tensor, "batch tokens features"], prompts: list[str]) -> Float[Tensor, " batch"]:
        """Let the image attend to the kept words, and compare the result with the prompt."""
        words = self._words(prompts)
        states, kept = (torch.stack([row[i] for row in words]) for i in (0, 1))
        seen = self.cross_model(encoded, states, kept)[:, 0]
        whole = torch.promote_types(seen.dtype, torch.float32)
        embeddings = torch.stack([row.embedding for row in words])
        return self.scale * F.cosine_similarity(seen.to(whole), embeddings.to(whole), dim=-1)

    @property
    def truncated_prompts(self) -> int:
        """How many distinct prompts were cut at the context length so far."""
        return self.truncation.count

    def _words(self, prompts: Sequence[str]) -> list[Words]:
        """Encode each distinct prompt once, and cache the latest."""
        found = {prompt: self._cache[prompt] for prompt in prompts if prompt in self._cache}
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in found]
        if missing:
            self.truncation.note(missing, [len(ids) for ids in self.tokenizer(missing, verbose=False)["input_ids"]])
            # Tensors made in inference mode could not be used in a later call with gradients.
            with torch.inference_mode(False), torch.no_grad():
                states, embeddings = self._read([*missing, self.condition])
                closeness = torch.einsum("pid,jd->pij", states[:-1], states[-1]).amax(-1)
                kept = closeness / closeness.amax(-1, keepdim=True) > self.threshold
                found |= {p: Words(states[i], kept[i], embeddings[i]) for i, p in enumerate(missing)}
        self._cache.update(found)
        while len(self._cache) > CACHED_PROMPTS:
            self._cache.popitem(last=False)
        return [found[prompt] for prompt in prompts]

    def _read(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Return the projected states at every position, padding too, and the embeddings."""
        tokens = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=self.context, return_tensors="pt"
        )
        output = self.model.text_model(input_ids=tokens["input_ids"].to(self.device))
        project = self.model.text_projection
        return project(output.last_hidden_state), project(output.pooler_output)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Mps:
        """Clear the cache when the weights move or change their dtype."""
        self._cache.clear()
        return super()._apply(fn, recurse)


def _name(published: str) -> str:
    return published.removeprefix("mps.")


def _clip(architecture: dict[str, Any]) -> Any:
    from transformers import CLIPConfig, CLIPModel

    return CLIPModel(CLIPConfig(**architecture))
