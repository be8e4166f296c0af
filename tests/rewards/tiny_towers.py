"""Tiny two-tower models of transformers' own classes, saved in transformers' own layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

OPENAI_IMAGES = {
    "image_processor_type": "CLIPImageProcessor",
    "do_center_crop": True,
    "crop_size": {"height": 32, "width": 32},
    "size": {"shortest_edge": 32},
    "resample": 3,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
SIGLIP_IMAGES = {
    "image_processor_type": "SiglipImageProcessor",
    "size": {"height": 32, "width": 32},
    "resample": 3,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}
# As transformers' conversion of ALIGN writes them, but smaller: resized to more than the crop, 2 x - 1.
ALIGN_IMAGES = {
    "image_processor_type": "EfficientNetImageProcessor",
    "do_center_crop": True,
    "crop_size": {"height": 32, "width": 32},
    "size": {"height": 38, "width": 38},
    "resample": 2,
    "rescale_factor": 1 / 127.5,
    "rescale_offset": True,
    "do_normalize": False,
    "include_top": False,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
VIT_IMAGES = {
    "feature_extractor_type": "ViTFeatureExtractor",
    "do_resize": True,
    "do_normalize": True,
    "size": 32,
    "resample": 2,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *"a red blue circle square on table two cat dog photo of".split(),
]


def write_images(path: Path, images: dict[str, Any]) -> None:
    """Write an image processor's configuration."""
    (path / "preprocessor_config.json").write_text(json.dumps(images))


def write_clip_tokenizer(path: Path, context: int = 77) -> None:
    """Write CLIP's own byte-pair vocabulary, which ships with open_clip, as a tokenizer of transformers."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    ours = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(word, word): number for word, number in ours.encoder.items()}
    (path / "vocab.json").write_text(json.dumps(vocabulary))
    merges = ["#version: 0.2", *(" ".join(pair) for pair in ours.bpe_ranks)]
    (path / "merges.txt").write_text("\n".join(merges) + "\n")
    CLIPTokenizer.from_pretrained(path, model_max_length=context).save_pretrained(path)


def clip_config(context: int = 77, eos_token_id: int = 49407, **vision: Any) -> Any:
    """Return the configuration of a CLIP with 2 layers and CLIP's own vocabulary."""
    from transformers import CLIPConfig

    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = tower | {"vocab_size": 49408, "max_position_embeddings": context, "eos_token_id": eos_token_id}
    text |= {"bos_token_id": 49406, "pad_token_id": 1, "hidden_act": "gelu"}
    images = tower | {"image_size": 32, "patch_size": 8, "hidden_act": "gelu"} | vision
    return CLIPConfig(text_config=text, vision_config=images, projection_dim=16)


def write_hf_clip(path: Path, context: int = 77, eos_token_id: int = 49407) -> Any:
    """Write a randomly initialised CLIP of transformers with tokenizer and image settings; return the model."""
    from transformers import CLIPModel

    path.mkdir(parents=True, exist_ok=True)
    model = _random(CLIPModel(clip_config(context, eos_token_id)))
    model.save_pretrained(path)
    write_clip_tokenizer(path, context)
    write_images(path, OPENAI_IMAGES)
    return model


def write_siglip(path: Path, context: int = 12) -> Any:
    """Write a randomly initialised SigLIP of transformers with a tokenizer by words."""
    from transformers import SiglipConfig, SiglipModel

    path.mkdir(parents=True, exist_ok=True)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = tower | {"vocab_size": len(WORDS), "max_position_embeddings": context, "projection_size": 32}
    text |= {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    config = SiglipConfig(text_config=text, vision_config=tower | {"image_size": 32, "patch_size": 8})
    model = _random(SiglipModel(config))
    model.save_pretrained(path)
    write_word_tokenizer(path, context)
    write_images(path, SIGLIP_IMAGES)
    return model


def write_align(path: Path) -> Any:
    """Write a randomly initialised ALIGN of transformers (EfficientNet and BERT) with a tokenizer by words."""
    from transformers import AlignConfig, AlignModel

    path.mkdir(parents=True, exist_ok=True)
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"vocab_size": len(WORDS), "max_position_embeddings": 128, "pad_token_id": 0}
    vision = {"image_size": 32, "hidden_dim": 32, "width_coefficient": 1.0, "depth_coefficient": 1.0}
    vision |= {"kernel_sizes": [3, 3], "in_channels": [32, 16], "out_channels": [16, 32], "depthwise_padding": []}
    vision |= {"strides": [2, 2], "num_block_repeats": [1, 1], "expand_ratios": [1, 4]}
    model = _random(AlignModel(AlignConfig(text_config=text, vision_config=vision, projection_dim=32)))
    for name, value in model.named_buffers():
        if name.endswith("running_var"):
            value.fill_(1.0)
        elif name.endswith("running_mean"):
            value.zero_()
    model.save_pretrained(path)
    write_word_tokenizer(path, 64)
    write_images(path, ALIGN_IMAGES)
    return model


def write_vit(path: Path) -> Any:
    """Write a randomly initialised vision transformer, without a pooler as DINO's is."""
    from transformers import ViTConfig, ViTModel

    path.mkdir(parents=True, exist_ok=True)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = _random(ViTModel(ViTConfig(image_size=32, patch_size=8, **tower), add_pooling_layer=False))
    model.save_pretrained(path)
    write_images(path, VIT_IMAGES)
    return model


def write_word_tokenizer(path: Path, context: int) -> None:
    """Write a BERT tokenizer over `WORDS`."""
    from transformers import BertTokenizer

    (path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    BertTokenizer(str(path / "vocab.txt"), model_max_length=context).save_pretrained(path)


def _random(model: Any) -> Any:
    """Draw weights larger than the library does, so that embeddings differ visibly between inputs."""
    generator = torch.Generator().manual_seed(0)
    for name, value in model.named_parameters():
        if value.dim() > 1:
            scale = value[0].numel() ** -0.5
            value.data = torch.randn(value.shape, generator=generator) * (0.5 if "embedding" in name else 1.5 * scale)
    return model.eval()
