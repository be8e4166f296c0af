"""ImageReward v1.0: a BLIP trained on 137 000 expert comparisons of generated images.

Source: Xu et al. 2023, "ImageReward" (arXiv:2304.05977), section 3; the score is the reward head's output, shifted and
scaled by its mean and standard deviation over the authors' data:

    r(x, y) = (MLP(h_CLS(x, y)) - 0.16717362830052426) / 1.0333394966054072

with h_CLS the last hidden state at [CLS] of the text that attends to the image, and an MLP 768-1024-128-64-16-1
without activations. Deviations: an image is converted to RGB before it is resized, where the authors' code resizes a
palette or translucent image first; the MLP computes in at least float32, as in the authors' own half-precision code.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from rewards.backbones.blip import Blip, ImageContext
from rewards.backbones.heads import Float32Head
from rewards.backbones.hf import load_pretrained
from rewards.backbones.preprocess import MODES, Preprocess
from rewards.backbones.truncation import Truncation
from rewards.backbones.weights import Weights, load_state, locate, read_state
from rewards.bases.cross_encoder import CrossEncoderReward
from rewards.errors import RewardError, choices

MEAN, STD = 0.16717362830052426, 1.0333394966054072
MAX_TOKENS = 35
HEAD = (1024, 128, 64, 16)
PUBLISHED = Weights("THUDM/ImageReward", "ImageReward.pt")

# Left over from BLIP's pre-training: the contrastive projections, and a buffer of position numbers.
UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")


class ImageReward(CrossEncoderReward):
    """Human preference for an image given its prompt, by ImageReward v1.0; about N(0, 1) over the authors' data.

    weights: the file ImageReward.pt (or .safetensors with the same names), or a directory that holds it; by default
    `THUDM/ImageReward` on the hub. tokenizer: directory or hub id of bert-base-uncased's tokenizer; by default the
    directory of the weights where that has a vocab.txt, else the hub. Prompts are cut at 35 tokens, [CLS] and [SEP]
    included, as in training, with one warning. preprocessing: as in `rewards.backbones.preprocess`. Raises
    `RewardError` for weights of another model.
    """

    name: ClassVar[str] = "image-reward"
    version = "v1.0"
    differentiable = True
    licence = "Apache-2.0"
    source = "THUDM/ImageReward, ImageReward.pt; tokenizer of bert-base-uncased"
    citation = "Xu et al. 2023, arXiv:2304.05977"
    files = (PUBLISHED,)

    def __init__(
        self,
        *,
        weights: str | PathLike[str] | None = None,
        tokenizer: str | PathLike[str] | None = None,
        preprocessing: str = "differentiable",
        **options: Any,
    ) -> None:
        """Load weights and tokenizer."""
        super().__init__(**options)
        if preprocessing not in MODES:
            raise RewardError(f"preprocessing {preprocessing!r} is unknown; {choices(preprocessing, MODES)}")
        self.preprocessing = preprocessing
        path = locate(PUBLISHED, weights)
        state = {name: value for name, value in read_state(path).items() if not name.startswith(UNUSED)}
        blip = Blip(state, "blip.")
        head = _head(blip.text_encoder.width)
        load_state(nn.ModuleDict({"blip": blip, "mlp": nn.ModuleDict({"layers": head})}), state, path)
        self.blip = blip.to(self.device, self.dtype)
        self.head = head.to(self.device, self.dtype)
        self.preprocess = Preprocess(blip.visual_encoder.image_size)
        self.tokenizer = _tokenizer(tokenizer or (path.parent if (path.parent / "vocab.txt").is_file() else None))
        if len(self.tokenizer) != blip.text_encoder.words:
            raise RewardError(
                f"{path} has {blip.text_encoder.words} word embeddings, the tokenizer with [DEC] and [ENC] "
                f"{len(self.tokenizer)} words; give tokenizer=PATH of bert-base-uncased's"
            )
        self.truncation = Truncation(self.name, MAX_TOKENS)

    def encode_media(self, media: Float[Tensor, "batch 3 height width"]) -> ImageContext:
        """Encode images into the keys and values that prompts attend to."""
        return self.blip.image_context(self.preprocess(media, self.preprocessing).to(self.dtype))

    def compare(self, encoded: ImageContext, prompts: list[str]) -> Float[Tensor, " batch"]:
        """Score images against prompts."""
        self.truncation.note(prompts, [len(ids) for ids in self.tokenizer(prompts, verbose=False)["input_ids"]])
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(self.device)
        hidden = self.blip(tokens["input_ids"], tokens["attention_mask"].bool(), encoded)[:, 0]
        return (self.head(hidden)[:, 0] - MEAN) / STD

    @property
    def truncated_prompts(self) -> int:
        """How many distinct prompts were cut at 35 tokens so far."""
        return self.truncation.count


def _head(width: int) -> Float32Head:
    """Build the reward head; the dropouts, inactive here, keep the published numbering 0, 2, 4, 6, 7."""
    first, second, third, fourth = HEAD
    return Float32Head(
        *(nn.Linear(width, first), nn.Dropout(0.2), nn.Linear(first, second), nn.Dropout(0.2)),
        *(nn.Linear(second, third), nn.Dropout(0.1), nn.Linear(third, fourth), nn.Linear(fourth, 1)),
    )


def _tokenizer(source: str | Path | PathLike[str] | None) -> Any:
    """Load BERT's tokenizer and append BLIP's two tokens, which get the two highest ids (30522 and 30523)."""
    tokenizer = load_pretrained("BertTokenizer", source or "google-bert/bert-base-uncased")
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_tokens(["[ENC]"], special_tokens=True)
    return tokenizer
