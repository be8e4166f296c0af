"""VQAScore: the probability that a model answers "Yes" when asked whether an image shows what its prompt says.

Source: Lin et al. 2024 (arXiv:2404.01291), equation 1. Two forms, whose scores are not comparable:

* `clip-flant5`  the paper's own model. The answer is "Yes" with its end of sequence, and the score the exponential of
  the mean log-probability over these two tokens, sqrt(P(Yes) P(</s> | Yes)), as in the authors' code: not P(Yes).
* `vlm`          any vision-language model of transformers: P(first token of "Yes") at the first generated step.

Images of `clip-flant5` are padded to a square with CLIP's mean colour, in 8 bits, and resized to 336 pixels. The
question is an option, and so part of `version` where it is not the form's own. Deviations: the authors' code also
offers models of other makers, each with a wording of its own; here the question of `vlm` is the one it has for
Qwen2-VL. It reads the Flan-T5 tokenizer in its slow form; the fast one gives the same tokens.
"""

from __future__ import annotations

from os import PathLike
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rewards.backbones.hf import load_pretrained
from rewards.backbones.preprocess import MODES, OPENAI, Preprocess
from rewards.backbones.truncation import Truncation
from rewards.bases.cross_encoder import CrossEncoderReward, refuse_tokens
from rewards.errors import RewardError, choices

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
MAX_TOKENS = 2048
TOKENIZER = "google/flan-t5-xxl"


class Form(NamedTuple):
    """The defaults of a form."""

    weights: str
    question: str
    licence: str


FORMS = {
    "clip-flant5": Form(
        "zhiqiulin/clip-flant5-xxl", 'Does this figure show "{}"? Please answer yes or no.', "Apache-2.0"
    ),
    "vlm": Form("Qwen/Qwen2.5-VL-7B-Instruct", 'Does this image show "{}"?', "that of the model: see its card"),
}


class VqaScore(CrossEncoderReward):
    """Agreement of image and prompt: probability that a vision-language model answers "Yes", by VQAScore.

    form: `clip-flant5` (default) or `vlm`. weights: directory or hub id; by default clip-flant5-xxl (11 B parameters;
    `zhiqiulin/clip-flant5-xl` has 3 B) or Qwen2.5-VL-7B-Instruct. question: template with one `{}` for the prompt;
    answer: its first token (vlm) or all of it (clip-flant5) is scored. tokenizer, vision_tower: directories or hub
    ids, of clip-flant5 alone, by default google/flan-t5-xxl (or the weights' own directory where that has a tokenizer)
    and what the weights' config.json names. preprocessing: as in `rewards.backbones.preprocess`, of clip-flant5 alone;
    `vlm` leaves it to the model's processor and is not differentiable. dtype: bfloat16 by default, as published.
    Raises `RewardError` for weights of another model, and for prompts that contain one of the tokenizer's special
    tokens.
    """

    name: ClassVar[str] = "vqa-score"
    version = "clip-flant5"
    differentiable = True
    range = (0.0, 1.0)
    licence = FORMS["clip-flant5"].licence
    source = FORMS["clip-flant5"].weights
    citation = "Lin et al. 2024, arXiv:2404.01291"

    def __init__(
        self,
        *,
        form: str = "clip-flant5",
        weights: str | PathLike[str] | None = None,
        question: str | None = None,
        answer: str = "Yes",
        tokenizer: str | PathLike[str] | None = None,
        vision_tower: str | PathLike[str] | None = None,
        preprocessing: str = "differentiable",
        dtype: str | torch.dtype | None = None,
        **options: Any,
    ) -> None:
        """Load the model of the form."""
        super().__init__(dtype=dtype or "bfloat16", **options)
        if form not in FORMS:
            raise RewardError(f"form {form!r} is unknown; {choices(form, FORMS)}")
        if preprocessing not in MODES:
            raise RewardError(f"preprocessing {preprocessing!r} is unknown; {choices(preprocessing, MODES)}")
        own = FORMS[form]
        self.question = own.question if question is None else question
        if self.question.count("{}") != 1:
            raise RewardError(f"question {self.question!r}: exactly one {{}} is expected, in place of the prompt")
        self.form, self.answer, self.preprocessing = form, answer, preprocessing
        changed = (self.question, answer) != (own.question, "Yes")
        self.version = form + (f", question {self.question!r}, answer {answer!r}" if changed else "")
        self.source, self.licence = str(weights or own.weights), own.licence
        self.differentiable = form == "clip-flant5"
        if form == "vlm":
            if tokenizer or vision_tower or preprocessing != "differentiable":
                raise RewardError(
                    "tokenizer, vision_tower and preprocessing apply to form='clip-flant5' only; remove them"
                )
            self._load_vlm()
        else:
            self._load_clip_flant5(tokenizer, vision_tower)
        self.special_tokens = {"<image>", *self.tokenizer.get_added_vocab()}

    def _load_vlm(self) -> None:
        from rewards.backbones.vlm import VisionLanguageModel

        self.model: Any = VisionLanguageModel(self.source, self.dtype).to(self.device)
        self.tokenizer = self.model.tokenizer

    def _load_clip_flant5(self, tokenizer: Any, vision_tower: Any) -> None:
        from rewards.backbones.checkpoints import locate_directory
        from rewards.backbones.clip_t5 import ClipT5

        directory = locate_directory(self.source)
        own = any((directory / name).is_file() for name in ("tokenizer.json", "spiece.model"))
        self.tokenizer = load_pretrained("AutoTokenizer", tokenizer or (directory if own else TOKENIZER))
        self.model = ClipT5(self.source, vision_tower, self.dtype).to(self.device)
        self.preprocess = Preprocess(self.model.image_size, *OPENAI, resize="squash")
        self.truncation = Truncation(self.name, MAX_TOKENS)

    def encode_media(self, media: Float[Tensor, "batch 3 height width"]) -> Tensor:
        """Encode images as tokens of the language model (`vlm`: leave them unchanged)."""
        if self.form == "vlm":
            return media
        return self.model.image_features(self.preprocess(pad_to_square(media), self.preprocessing))

    def compare(self, encoded: Tensor, prompts: list[str]) -> Float[Tensor, " batch"]:
        """Ask the question of every image and its prompt."""
        refuse_tokens(self.name, prompts, self.special_tokens)
        questions = [self.question.replace("{}", prompt) for prompt in prompts]
        if self.form == "vlm":
            return self.model.first_token_probability(encoded, questions, self.answer)
        before, answer = self._ids(f"{SYSTEM} USER: "), self._ids(self.answer)
        after = [self._ids(f"\n{question} ASSISTANT: ") for question in questions]
        # The limit counts the image as one token.
        self.truncation.note(prompts, [len(before) + 1 + len(ids) for ids in after])
        after = [ids[: MAX_TOKENS - 1 - len(before)] for ids in after]
        log = self.model.answer_log_likelihood(encoded, before, after, answer, len(self.tokenizer))
        return log.exp()

    @property
    def truncated_prompts(self) -> int:
        """How many distinct prompts were cut at 2048 tokens so far."""
        return self.truncation.count if self.form == "clip-flant5" else 0

    def _ids(self, text: str) -> Tensor:
        """Tokenise a part of the question with its own end-of-sequence token, as in training."""
        return torch.tensor(self.tokenizer(text, verbose=False)["input_ids"], device=self.device)


def pad_to_square(media: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 side side"]:
    """Centre images on a square of CLIP's mean colour, truncated to 8 bits: (122, 116, 104) of 255."""
    height, width = media.shape[-2:]
    side = max(height, width)
    colour = media.new_tensor([int(255 * value) / 255 for value in OPENAI[0]])
    square = colour.view(3, 1, 1).repeat(len(media), 1, side, side)
    top, left = (side - height) // 2, (side - width) // 2
    square[..., top : top + height, left : left + width] = media
    return square
