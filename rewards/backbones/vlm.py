"""A vision-language model of transformers: the probability of a word at the first generated step."""

from __future__ import annotations

from os import PathLike
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rewards.backbones.hf import load_pretrained
from rewards.errors import RewardError
from rewards.media import pil_images


class VisionLanguageModel(nn.Module):
    """Images and questions -> P(first token of a word). Weights, processor and chat template are those of `source`."""

    def __init__(self, source: str | PathLike[str], dtype: torch.dtype) -> None:
        """Load a model that `AutoModelForImageTextToText` knows, from a directory or the hub."""
        super().__init__()
        self.model = load_pretrained("AutoModelForImageTextToText", source, dtype=dtype)
        self.processor: Any = load_pretrained("AutoProcessor", source)
        if not getattr(self.processor, "chat_template", None):
            raise RewardError(f"{source} has no chat template; an instruction-tuned model is expected")
        # The last position of every row is then the one that predicts the first new token.
        self.processor.tokenizer.padding_side = "left"

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return self.processor.tokenizer

    def first_token_probability(
        self, media: Float[Tensor, "batch 3 height width"], questions: list[str], word: str
    ) -> Float[Tensor, " batch"]:
        """P(the first token of `word`) as the model's first answer token to each question: `[B]` float32, in [0, 1].

        The probability is that of the raw logits, before any temperature or repetition penalty that the checkpoint's
        generation settings ask for.
        """
        from transformers import GenerationConfig

        content = [[{"type": "image"}, {"type": "text", "text": question}] for question in questions]
        texts = [
            self.processor.apply_chat_template(
                [{"role": "user", "content": part}], tokenize=False, add_generation_prompt=True
            )
            for part in content
        ]
        inputs = self.processor(images=pil_images(media), text=texts, padding=True, return_tensors="pt").to(
            media.device
        )
        floats = {name: value.to(self.model.dtype) for name, value in inputs.items() if value.is_floating_point()}
        settings = GenerationConfig(
            max_new_tokens=1,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        logits = self.model.generate(**{**inputs, **floats}, generation_config=settings).logits[0]
        (first, *_) = self.tokenizer(word, add_special_tokens=False)["input_ids"]
        return logits.float().softmax(-1)[:, first]
