"""Tiny pipelines of the families that read prompts with a Qwen model: Qwen-Image and FLUX.2 klein, of real classes.

Each writes a complete diffusers directory; weights depend on ``seed`` alone. The tokenizer is one of bytes, with the
words of Qwen-Image's template as tokens of their own, so that the template begins with 34 tokens as it does there.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from tiny_vlms import byte_tokenizer

from pipelines.families.qwen_image import TEMPLATE

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


def tiny_qwen_tokenizer() -> Any:
    """Return a ``Qwen2Tokenizer`` over bytes and the words of the template."""
    from transformers import AddedToken, Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer(vocab=byte_tokenizer({}).get_vocab(), merges=[])
    words = dict.fromkeys(re.findall(r" ?[A-Za-z]{2,}", TEMPLATE.replace("im_start", "").replace("im_end", "")))
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in sorted(words, key=len, reverse=True)])
    tokenizer.add_tokens(MARKS, special_tokens=True)
    tokenizer.chat_template = CHAT
    return tokenizer


def text_options(tokenizer: Any, layers: int = 2) -> dict[str, Any]:
    """Return the configuration of a language model of width 16; its weights tell prompts apart."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def build_tiny_qwen_image(path: str | Path, *, seed: int = 0) -> str:
    """Write a ``QwenImagePipeline`` (256x256 images by default; tests ask for 16x16) and return its path."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = tiny_qwen_tokenizer()
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
    config = Qwen2_5_VLConfig(
        text_config=text_options(tokenizer) | {"rope_parameters": rope, "rope_scaling": rope},
        vision_config={"depth": 1, "hidden_size": 8, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16},
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = QwenImagePipeline(
            transformer=QwenImageTransformer2DModel(
                in_channels=64,
                out_channels=16,
                num_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=16,
                axes_dims_rope=(4, 4, 8),
            ).eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True,
                base_shift=0.5,
                max_shift=0.9,
                base_image_seq_len=256,
                max_image_seq_len=8192,
                shift_terminal=0.02,
            ),
            vae=AutoencoderKLQwenImage(
                base_dim=8, z_dim=16, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False]
            ).eval(),
            text_encoder=Qwen2_5_VLForConditionalGeneration(config).eval(),
            tokenizer=tokenizer,
        )
        pipe.save_pretrained(path, safe_serialization=True)
    return str(path)


def build_tiny_flux2(path: str | Path, *, distilled: bool = False, seed: int = 0) -> str:
    """Write a ``Flux2KleinPipeline`` (256x256 images by default; tests ask for 16x16) and return its path.

    The language model has 28 layers, since the family reads its 9th, 18th and 27th hidden states.
    """
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = tiny_qwen_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKLFlux2(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
        ).eval()
        vae.bn.running_mean.normal_(std=0.3)
        vae.bn.running_var.uniform_(0.5, 2.0)
        pipe = Flux2KleinPipeline(
            transformer=Flux2Transformer2DModel(
                in_channels=16,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=3 * 16,
                timestep_guidance_channels=16,
                axes_dims_rope=(4, 4, 4, 4),
                guidance_embeds=False,
            ).eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=vae,
            text_encoder=Qwen3ForCausalLM(Qwen3Config(**text_options(tokenizer, 28), head_dim=8)).eval(),
            tokenizer=tokenizer,
            is_distilled=distilled,
        )
        pipe.save_pretrained(path, safe_serialization=True)
    return str(path)
