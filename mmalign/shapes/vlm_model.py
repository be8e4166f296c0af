"""The Shapes video language model, untrained: tokenizer, processor and network of transformers' own classes.

A LLaVA-OneVision: a SigLIP tower sees one frame of 48 px at a time as 6 x 6 patches, a projector's features are pooled
to 3 x 3 a frame, and a Qwen2 language model reads them frame after frame; only the language model combines frames.
"""

from __future__ import annotations

from typing import Any

import torch

from mmalign.core.io.video_questions import INSTRUCTIONS
from mmalign.shapes.twins import sample_families
from mmalign.shapes.vlm_lessons import DESCRIBE, SIZE, lessons_of
from mmalign.shapes.wording import QUESTIONS
from mmalign.shapes.world import COLOURS, SHAPES

PATCH = 8
SIDE = SIZE // PATCH
"""Patches a side; pooled by two."""
MAX_LENGTH = 1024
USER, ASSISTANT, END, PAD = "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"
IMAGE, VIDEO = "<image>", "<video>"

_CHAT = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<{{ part['type'] }}>{% endif %}{% endfor %}{% endif %}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def _texts() -> list[str]:
    """Texts that hold every word of the questions, answers and captions of the Shapes videos."""
    wordings = [wording for topic in QUESTIONS.values() for wording in topic]
    things = [f" {colour} {shape}" for colour in COLOURS for shape in SHAPES]
    families = enumerate(sample_families(220))
    lessons = [lesson for i, family in families for own in lessons_of(family, f"words-{i}") for lesson in own]
    return [*wordings, *things, *DESCRIBE, *INSTRUCTIONS.values(), *(text for one in lessons for text in one[:2])]


def build_tokenizer() -> Any:
    """A tokenizer in which every word of the lessons is one token, and any other falls into its bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = sorted({word for text in _texts() for word, _ in split.pre_tokenize_str(text)})
    tokens = dict.fromkeys([*sorted(split.alphabet()), *words])
    vocabulary = {token: number for number, token in enumerate(tokens)}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    raw.pre_tokenizer, raw.decoder = split, decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token=END, pad_token=PAD, model_max_length=MAX_LENGTH,
        extra_special_tokens={"image_token": IMAGE, "video_token": VIDEO},
    )  # fmt: skip
    tokenizer.add_tokens([USER, ASSISTANT], special_tokens=True)
    tokenizer.chat_template = _CHAT
    return tokenizer


def build_processor() -> Any:
    """The processor: frames of 48 px scaled to [-1, 1], one turn of the user and one of the assistant."""
    import transformers as hf

    tokenizer = build_tokenizer()
    scale: dict[str, Any] = {"size": {"height": SIZE, "width": SIZE}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return hf.LlavaOnevisionProcessor(
        hf.LlavaOnevisionImageProcessor(image_grid_pinpoints=[[SIZE, SIZE]], **scale),
        tokenizer,
        hf.LlavaOnevisionVideoProcessor(**scale),
        num_image_tokens=SIDE**2,
        vision_feature_select_strategy="full",
        chat_template=tokenizer.chat_template,
    )


def build_network(tokenizer: Any, seed: int, *, width: int = 192, layers: int = 6, vision_layers: int = 3) -> Any:
    """The network, randomly initialised from `seed` alone."""
    import transformers as hf

    vision = {
        "model_type": "siglip_vision_model", "vision_use_head": False, "image_size": SIZE, "patch_size": PATCH,
        "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": vision_layers, "num_attention_heads": 4,
    }  # fmt: skip
    text = {
        "model_type": "qwen2", "vocab_size": len(tokenizer), "hidden_size": width, "intermediate_size": width * 8 // 3,
        "num_hidden_layers": layers, "num_attention_heads": width // 32, "num_key_value_heads": width // 32,
        "max_position_embeddings": MAX_LENGTH, "initializer_range": 0.05, "tie_word_embeddings": True,
        "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    config = hf.LlavaOnevisionConfig(
        vision_config=vision, text_config=text, image_token_index=tokenizer.image_token_id,
        video_token_index=tokenizer.video_token_id, image_grid_pinpoints=[[SIZE, SIZE]], vision_feature_layer=-1,
        vision_feature_select_strategy="full", tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return hf.LlavaOnevisionForConditionalGeneration(config)
