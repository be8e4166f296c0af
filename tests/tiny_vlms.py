"""Tiny, randomly initialised vision-language models of the real classes, for tests in every room.

Each builder writes what ``save_pretrained`` of the real model and processor writes, around a byte-level tokenizer
built here; directories of a few hundred kilobytes. Pictures are 16 pixels wide. Weights depend on ``seed`` alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SIDE = 16
WIDTH = 16
HEADS = {"num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {"hidden_size": WIDTH, "intermediate_size": 24, "num_key_value_heads": 1, **HEADS}
VISION = {"hidden_size": 8, "intermediate_size": 16, "image_size": SIDE, "patch_size": 8, **HEADS}
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
QWEN = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
CHAT = (
    "{{% for message in messages %}}<|im_start|>{{{{ message['role'] }}}}\n{{% if message['content'] is string %}}"
    "{{{{ message['content'] }}}}{{% else %}}{{% for part in message['content'] %}}{{% if part['type'] == 'text' %}}"
    "{{{{ part['text'] }}}}{{% elif part['type'] == 'image' %}}{image}{{% else %}}{video}{{% endif %}}{{% endfor %}}"
    "{{% endif %}}<|im_end|>\n{{% endfor %}}{{% if add_generation_prompt %}}<|im_start|>assistant\n{{% endif %}}"
)


def byte_tokenizer(vision: dict[str, str], others: tuple[str, ...] = ()) -> Any:
    """Return a real fast tokenizer with a token a byte, chat marks, and the special tokens that a family names."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=vision
    )
    tokenizer.add_tokens([*SPECIAL, *others], special_tokens=True)
    return tokenizer


def _write(path: str | Path, model_class: Any, config: Any, processor: Any, seed: int, boost: float = 0.25) -> str:
    """Save model and processor; weights are enlarged, so that an output tells every input apart."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                large = 1.0 if "embed_tokens" in name else boost
                parameter.add_(torch.randn_like(parameter) * (large if parameter.dim() > 1 else 0.05))
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return str(path)


def _text(tokenizer: Any, kind: str = "qwen2", **options: Any) -> dict[str, Any]:
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    return {"model_type": kind, "vocab_size": len(tokenizer), "tie_word_embeddings": False} | TEXT | ends | options


def build_llava_onevision(path: str | Path, seed: int = 0) -> str:
    """SigLIP tower, pooled video frames with one newline, images as tiles of 16 pixels."""
    import transformers as hf

    tokenizer = byte_tokenizer({"image_token": "<image>", "video_token": "<video>"})
    pinpoints = [[16, 16], [16, 32], [32, 16], [32, 32]]
    square = {"height": SIDE, "width": SIDE}
    processor = hf.LlavaOnevisionProcessor(
        hf.LlavaOnevisionImageProcessor(size=square, image_grid_pinpoints=pinpoints),
        tokenizer,
        hf.LlavaOnevisionVideoProcessor(size=square),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=CHAT.format(image="<image>\n", video="<video>\n"),
    )
    config = hf.LlavaOnevisionConfig(
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **VISION},
        text_config=_text(tokenizer),
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )
    return _write(path, hf.LlavaOnevisionForConditionalGeneration, config, processor, seed)


def build_llava_next_video(path: str | Path, seed: int = 0) -> str:
    """CLIP tower with a class token, Llama language model."""
    import transformers as hf

    tokenizer = byte_tokenizer({"image_token": "<image>", "video_token": "<video>"})
    pinpoints = [[16, 32], [32, 16], [32, 32]]
    crop = {"height": SIDE, "width": SIDE}
    processor = hf.LlavaNextVideoProcessor(
        hf.LlavaNextVideoVideoProcessor(size={"shortest_edge": SIDE}, crop_size=crop),
        hf.LlavaNextImageProcessor(size={"shortest_edge": SIDE}, crop_size=crop, image_grid_pinpoints=pinpoints),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT.format(image="<image>\n", video="<video>\n"),
    )
    config = hf.LlavaNextVideoConfig(
        vision_config={"model_type": "clip_vision_model", "projection_dim": 8, **VISION},
        text_config=_text(tokenizer, "llama"),
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        image_grid_pinpoints=pinpoints,
        tie_word_embeddings=False,
    )
    return _write(path, hf.LlavaNextVideoForConditionalGeneration, config, processor, seed)


def _qwen(path: str | Path, name: str, vision: dict[str, Any], text: dict[str, Any], seed: int) -> str:
    """Write a model of the Qwen-VL line: dynamic resolution, grids, three-axis positions."""
    import transformers as hf

    tokenizer = byte_tokenizer(QWEN)
    frame = "<|vision_start|><|{}_pad|><|vision_end|>"
    chat = CHAT.format(image=frame.format("image"), video=frame.format("video"))
    bounds = {"patch_size": 4, "size": {"shortest_edge": 64, "longest_edge": 10**6}}
    newest = name.startswith("Qwen3")
    videos = hf.Qwen3VLVideoProcessor if newest else hf.Qwen2VLVideoProcessor
    processor_name = "Qwen2_5_VLProcessor" if name == "Qwen2_5_VL" else f"{name}Processor"
    processor = getattr(hf, processor_name)(
        hf.Qwen2VLImageProcessor(**bounds), tokenizer, videos(**bounds), chat_template=chat
    )
    config = getattr(hf, f"{name}Config")(
        text_config=_text(tokenizer, **text),
        vision_config={"depth": 2, "num_heads": 2, "patch_size": 4, **vision},
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        vision_start_token_id=tokenizer.vision_start_token_id,
        vision_end_token_id=tokenizer.vision_end_token_id,
        tie_word_embeddings=False,
    )
    return _write(path, getattr(hf, f"{name}ForConditionalGeneration"), config, processor, seed)


def _sections(*parts: int) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(parts)}}


def build_qwen2_vl(path: str | Path, seed: int = 0) -> str:
    """Qwen2-VL."""
    text = {"model_type": "qwen2_vl_text", **_sections(2, 1, 1)}
    return _qwen(path, "Qwen2VL", {"embed_dim": 16, "hidden_size": WIDTH, "mlp_ratio": 2}, text, seed)


def build_qwen2_5_vl(path: str | Path, seed: int = 0) -> str:
    """Qwen2.5-VL: windowed attention in the tower, absolute time in the positions."""
    text = {"model_type": "qwen2_5_vl_text", **_sections(2, 1, 1)}
    vision = {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": WIDTH, "window_size": 16}
    return _qwen(path, "Qwen2_5_VL", vision | {"fullatt_block_indexes": [1]}, text, seed)


def build_qwen3_vl(path: str | Path, seed: int = 0) -> str:
    """Qwen3-VL: timestamps between frames, features of inner layers added to inner layers."""
    text = {"model_type": "qwen3_vl_text", "head_dim": 8, **_sections(2, 1, 1)}
    vision = {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": WIDTH, "num_position_embeddings": 16}
    return _qwen(path, "Qwen3VL", vision | {"deepstack_visual_indexes": [0]}, text, seed)


def build_smolvlm(path: str | Path, seed: int = 0) -> str:
    """SmolVLM: frames as images with their times written between them."""
    import transformers as hf

    marks = {
        "image_token": "<image>",
        "video_token": "<video>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
    }
    tokenizer = byte_tokenizer(marks, tuple(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)))
    tokenizer.eos_token = "<end_of_utterance>"
    size = {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
    sampling = {"max_frames": 8, "fps": 1, "video_size": {"longest_edge": SIDE}}
    processor = hf.SmolVLMProcessor(
        hf.SmolVLMImageProcessor(**size),
        tokenizer,
        hf.SmolVLMVideoProcessor(**size, video_sampling=sampling),
        image_seq_len=1,
        chat_template=CHAT.format(image="<image>", video="<video>"),
    )
    config = hf.SmolVLMConfig(
        vision_config={"model_type": "smolvlm_vision", **VISION},
        text_config=_text(tokenizer, "llama"),
        image_token_id=tokenizer.image_token_id,
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    return _write(path, hf.SmolVLMForConditionalGeneration, config, processor, seed)


def build_internvl(path: str | Path, seed: int = 0) -> str:
    """InternVL: tiles of an image, frames of a video, all through one image token."""
    import transformers as hf

    marks = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = byte_tokenizer(marks)
    square = {"height": SIDE, "width": SIDE}
    processor = hf.InternVLProcessor(
        hf.GotOcr2ImageProcessor(size=square, crop_to_patches=True, max_patches=4),
        tokenizer,
        hf.InternVLVideoProcessor(size=square),
        image_seq_length=1,
        chat_template=CHAT.format(image="<IMG_CONTEXT>\n", video="<video>\n"),
    )
    config = hf.InternVLConfig(
        vision_config={"model_type": "internvl_vision", **VISION, "image_size": [SIDE] * 2, "patch_size": [8] * 2},
        text_config=_text(tokenizer),
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=1,
        tie_word_embeddings=False,
    )
    return _write(path, hf.InternVLForConditionalGeneration, config, processor, seed)


def tie(source: str | Path, path: str | Path) -> str:
    """Write the model at `source` once more, its output head tied to the input embeddings."""
    import transformers as hf

    model = hf.AutoModelForImageTextToText.from_pretrained(source)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(path)
    hf.AutoProcessor.from_pretrained(source).save_pretrained(path)
    return str(path)


BUILDERS: dict[str, Callable[..., str]] = {
    "llava_onevision": build_llava_onevision,
    "llava_next_video": build_llava_next_video,
    "qwen2_vl": build_qwen2_vl,
    "qwen2_5_vl": build_qwen2_5_vl,
    "qwen3_vl": build_qwen3_vl,
    "smolvlm": build_smolvlm,
    "internvl": build_internvl,
}
