"""Tiny, randomly initialised pipelines made of real diffusers and transformers classes, for tests in every room.

Each builder writes a complete diffusers directory (safetensors, schedulers, tokenizers) of well under a megabyte, so a
test exercises the same loading and sampling code as Stable Diffusion does. Weights depend on ``seed`` alone.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

IMAGE_SIZE = 16
CONTEXT_LENGTH = 16
WORDS = ("red", "blue", "green", "circle", "square", "star", "above", "two", "three", "on", "the")


class BuiltModels(dict[str, str]):
    """Models of `builders` by name, each built in a folder of `folder` when it is first asked for."""

    def __init__(self, folder: Path, builders: Mapping[str, Callable[[Path], str]]) -> None:
        """Build nothing yet."""
        super().__init__()
        self.folder, self.builders = folder, builders

    def __missing__(self, name: str) -> str:
        """Build the model."""
        self[name] = self.builders[name](self.folder / name.replace(" ", "-"))
        return self[name]


def tiny_tokenizer(folder: Path, context_length: int = CONTEXT_LENGTH) -> Any:
    """Write ``vocab.json`` and ``merges.txt`` in CLIP's format and return a real ``CLIPTokenizer`` of them."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    characters = string.ascii_lowercase + string.digits + string.punctuation
    tokens = [*characters, *(f"{character}</w>" for character in characters)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        symbols = [*word[:-1], f"{word[-1]}</w>"]
        while len(symbols) > 1:
            pair = (symbols[0], symbols[1])
            if pair not in merges:
                merges.append(pair)
            symbols[:2] = ["".join(pair)]
            if symbols[0] not in tokens:
                tokens.append(symbols[0])
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=context_length)


def tiny_text_encoder(tokenizer: Any, width: int = 16, *, projection: bool = False, act: str = "quick_gelu") -> Any:
    """Return a two-layer CLIP text encoder for ``tokenizer``, with SDXL's pooled projection if asked for."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        hidden_act=act,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()
    # The default initialisation (std 0.02) makes all prompts look alike; a test must see them apart.
    with torch.no_grad():
        for embedding in (module for module in model.modules() if isinstance(module, torch.nn.Embedding)):
            embedding.weight.mul_(20.0)
    return model


def tiny_vae(kind: Literal["kl", "tiny"]) -> Any:
    """Return an autoencoder that halves the sides: ``AutoencoderKL`` or ``AutoencoderTiny``."""
    from diffusers import AutoencoderKL, AutoencoderTiny

    if kind == "kl":
        return AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            sample_size=IMAGE_SIZE,
        ).eval()
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).eval()


def tiny_scheduler(prediction_type: str) -> Any:
    """Return Stable Diffusion's own ``DDIMScheduler`` configuration with the given prediction type."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )


def _tiny_unet(**options: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        **options,
    ).eval()


def build_tiny_sd(
    path: str | Path,
    prediction_type: str = "epsilon",
    vae: Literal["kl", "tiny"] = "kl",
    *,
    seed: int = 0,
) -> str:
    """Write a ``StableDiffusionPipeline`` for 16x16 images (latents ``[4, 8, 8]``) and return its path.

    ``prediction_type="epsilon"`` is shaped like SD1.5, ``"v_prediction"`` like SD2.1 (linear projections, heads by
    level, gelu text encoder).
    """
    from diffusers import StableDiffusionPipeline

    path = Path(path)
    second = prediction_type == "v_prediction"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = tiny_tokenizer(path / "tokenizer")
        pipe = StableDiffusionPipeline(
            vae=tiny_vae(vae),
            text_encoder=tiny_text_encoder(tokenizer, act="gelu" if second else "quick_gelu"),
            tokenizer=tokenizer,
            unet=_tiny_unet(
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                cross_attention_dim=16,
                attention_head_dim=(2, 4) if second else 2,
                use_linear_projection=second,
            ),
            scheduler=tiny_scheduler(prediction_type),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipe.save_pretrained(path, safe_serialization=True)
    return str(path)


def build_tiny_sdxl(path: str | Path, *, seed: int = 0) -> str:
    """Write a ``StableDiffusionXLPipeline`` (two text encoders, size conditioning) and return its path."""
    from diffusers import StableDiffusionXLPipeline

    path = Path(path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizers = [tiny_tokenizer(path / name) for name in ("tokenizer", "tokenizer_2")]
        pipe = StableDiffusionXLPipeline(
            vae=tiny_vae("kl"),
            text_encoder=tiny_text_encoder(tokenizers[0]),
            text_encoder_2=tiny_text_encoder(tokenizers[1], width=24, projection=True, act="gelu"),
            tokenizer=tokenizers[0],
            tokenizer_2=tokenizers[1],
            unet=_tiny_unet(
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                cross_attention_dim=16 + 24,
                attention_head_dim=(2, 4),
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=24 + 6 * 8,
            ),
            scheduler=tiny_scheduler("epsilon"),
        )
        pipe.save_pretrained(path, safe_serialization=True)
    return str(path)


def tiny_t5(folder: Path, width: int) -> tuple[Any, Any]:
    """Return a real ``T5TokenizerFast`` over characters and a one-layer ``T5EncoderModel`` for it."""
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    vocabulary += [(character, -3.0) for character in string.ascii_lowercase + string.digits]
    vocabulary += [(f"\u2581{word}", -1.0) for word in WORDS]
    tokenizer = T5TokenizerFast(vocab=vocabulary, extra_ids=0)
    tokenizer.save_pretrained(folder)
    config = T5Config(vocab_size=len(vocabulary), d_model=width, d_kv=8, d_ff=2 * width, num_layers=1, num_heads=2)
    return tokenizer, T5EncoderModel(config).eval()


def tiny_flow_vae() -> Any:
    """Return an ``AutoencoderKL`` of 16 channels with shift and scale, halving the sides, like those of SD3."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=16,
        norm_num_groups=4,
        sample_size=IMAGE_SIZE,
        shift_factor=0.06,
        scaling_factor=1.5,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def build_tiny_sd3(
    path: str | Path, *, t5: bool = False, second: int = 16, medium: bool = False, seed: int = 0
) -> str:
    """Write a ``StableDiffusion3Pipeline`` for 16x16 images (latents ``[16, 8, 8]``), shift 3, and return its path.

    `second` is the width of the second CLIP; `medium` gives it SD3.5 medium's second attention and norms.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    path = Path(path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizers = [tiny_tokenizer(path / name) for name in ("tokenizer", "tokenizer_2")]
        third, encoder = tiny_t5(path / "tokenizer_3", 40) if t5 else (None, None)
        pipe = StableDiffusion3Pipeline(
            transformer=SD3Transformer2DModel(
                sample_size=8,
                patch_size=2,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=2,
                joint_attention_dim=40,
                caption_projection_dim=16,
                pooled_projection_dim=16 + second,
                pos_embed_max_size=8,
                **({"dual_attention_layers": (0,), "qk_norm": "rms_norm"} if medium else {}),
            ).eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=tiny_flow_vae(),
            text_encoder=tiny_text_encoder(tokenizers[0], projection=True),
            text_encoder_2=tiny_text_encoder(tokenizers[1], second, projection=True),
            text_encoder_3=encoder,
            tokenizer=tokenizers[0],
            tokenizer_2=tokenizers[1],
            tokenizer_3=third,
        )
        pipe.save_pretrained(path, safe_serialization=True)
    return str(path)


def build_tiny_z_image(path: str | Path, *, seed: int = 0) -> str:
    """Write a ``ZImagePipeline`` (1024x1024 images by default; tests ask for 16x16) and return its path."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from tiny_vlms import byte_tokenizer
    from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vocabulary = byte_tokenizer({}).get_vocab()
        tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[])
        tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
        tokenizer.chat_template = (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
        text = Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            initializer_range=0.3,
        )
        transformer = ZImageTransformer2DModel(
            dim=32,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[8, 4, 4],
            axes_lens=[512, 64, 64],
        )
        with torch.no_grad():  # diffusers before 0.37 leaves them uninitialised
            transformer.x_pad_token.normal_()
            transformer.cap_pad_token.normal_()
        pipe = ZImagePipeline(
            transformer=transformer.eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=tiny_flow_vae(),
            text_encoder=Qwen3Model(text).eval(),
            tokenizer=tokenizer,
        )
        pipe.save_pretrained(path, safe_serialization=True)
    return str(path)


def build_tiny_flux(path: str | Path, *, schnell: bool = False, seed: int = 0) -> str:
    """Write a ``FluxPipeline`` (dev: embedded guidance, shift by size; schnell: neither) and return its path.

    The network has no size of its own, and 256x256 images by default; tests ask for 16x16.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    path = Path(path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = tiny_tokenizer(path / "tokenizer")
        second, encoder = tiny_t5(path / "tokenizer_2", 24)
        pipe = FluxPipeline(
            transformer=FluxTransformer2DModel(
                patch_size=1,
                in_channels=64,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=24,
                pooled_projection_dim=16,
                guidance_embeds=not schnell,
                axes_dims_rope=(4, 4, 8),
            ).eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0 if schnell else 3.0, use_dynamic_shifting=not schnell),
            vae=tiny_flow_vae(),
            text_encoder=tiny_text_encoder(tokenizer),
            text_encoder_2=encoder,
            tokenizer=tokenizer,
            tokenizer_2=second,
        )
        pipe.save_pretrained(path, safe_serialization=True)
    return str(path)
