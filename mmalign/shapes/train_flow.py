"""Train the Shapes flow model: a small Z-Image over the autoencoder of `shapes-sd`, text encoder included.

`mmalign shapes train-flow --out DIR` writes a plain diffusers `ZImagePipeline` directory.
Z-Image: arXiv 2511.22699; rectified flow: arXiv 2209.03003; Muon: Jordan et al., 2024.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmalign.core.ema import EMA
from mmalign.core.errors import UserError
from mmalign.shapes.corpus import build_corpus
from mmalign.shapes.tokenizer import MAX_LENGTH
from mmalign.shapes.train_base import SNAPSHOT_SECONDS, encode_corpus

SEED = 21
WIDTH, DEPTH, HEADS = 192, 6, 6
TEXT_WIDTH, TEXT_DEPTH = 128, 3
EMPTY_SHARE = 0.1
INNER = ("attention.to_", "feed_forward", "self_attn", "mlp")
"""Names of the layers whose matrices Muon trains."""
CHAT_TEMPLATE = "{{ messages[0]['content'] }}"
"""The prompt as it is."""


@dataclass
class FlowModel:
    """The parts of the pipeline; the autoencoder is that of `shapes-sd`, and frozen."""

    vae: Any
    tokenizer: Any
    text_encoder: Any
    transformer: Any
    scheduler: Any
    seed: int = SEED
    """Of noise and order; another one for a model that was trained before."""

    def velocity(self, x: Tensor, sigma: Tensor, tokens: Tensor) -> Tensor:
        """Return the prediction of ``noise - x0`` `[B, C, H, W]` at levels sigma `[B]`, for token ids `[B, L]`."""
        # The first padding token is the end of the prompt.
        ends = (tokens == self.tokenizer.eos_token_id).int().cumsum(1)
        mask = ends - (tokens == self.tokenizer.eos_token_id).int() == 0
        hidden = self.text_encoder(tokens, attention_mask=mask, output_hidden_states=True).hidden_states[-2]
        texts = [text[kept] for text, kept in zip(hidden, mask, strict=True)]
        found = self.transformer(list(x.unsqueeze(2)), 1 - sigma, texts, return_dict=False)[0]
        return -torch.stack(found).squeeze(2)

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are trained, by name."""
        parts = {"transformer": self.transformer, "text_encoder": self.text_encoder}
        return {f"{part}.{name}": p for part, module in parts.items() for name, p in module.named_parameters()}

    def save(self, out: Path) -> None:
        """Write the pipeline's directory in half precision; the live weights stay as they are."""
        from diffusers import ZImagePipeline

        halves = {
            name: copy.deepcopy(getattr(self, name)).to(torch.float16)
            for name in ("vae", "text_encoder", "transformer")
        }
        pipeline: Any = ZImagePipeline(**halves, tokenizer=self.tokenizer, scheduler=self.scheduler)
        pipeline.save_pretrained(out, safe_serialization=True)
        config = out / "vae" / "config.json"
        # diffusers writes a key there that it warns about when it reads it, and the folder that the weights came from.
        unwanted = ("block_out_channels", "_name_or_path")
        values = {key: value for key, value in json.loads(config.read_text()).items() if key not in unwanted}
        config.write_text(json.dumps(values, indent=2) + "\n")


def build_flow(start: Path) -> FlowModel:
    """Return the untrained model over the autoencoder and tokenizer of a directory, or the flow model in it.

    Raises:
        UserError: the directory is neither a StableDiffusionPipeline nor what `train_flow` writes.
    """
    from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
    from transformers import CLIPTokenizer, Qwen3Config, Qwen3Model

    index = start / "model_index.json"
    kind = json.loads(index.read_text()).get("_class_name") if index.is_file() else None
    if kind not in ("StableDiffusionPipeline", "ZImagePipeline"):
        raise UserError(f"--start {start} is no directory of a pipeline such as assets/shapes-sd")
    torch.manual_seed(SEED)
    tokenizer = CLIPTokenizer.from_pretrained(start / "tokenizer", chat_template=CHAT_TEMPLATE)
    text_encoder: Any = Qwen3Model(
        Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=TEXT_WIDTH, intermediate_size=3 * TEXT_WIDTH, head_dim=32,
            num_hidden_layers=TEXT_DEPTH, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, use_cache=False,
        )
    )  # fmt: skip
    transformer: Any = ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=WIDTH, n_layers=DEPTH, n_refiner_layers=1,
        n_heads=HEADS, n_kv_heads=HEADS, cap_feat_dim=TEXT_WIDTH, axes_dims=[8, 12, 12], axes_lens=[1024, 8, 8],
    )  # fmt: skip
    for pad in (transformer.x_pad_token, transformer.cap_pad_token):
        nn.init.normal_(pad, std=0.02)
    if kind == "ZImagePipeline":
        transformer = ZImageTransformer2DModel.from_pretrained(start / "transformer", torch_dtype=torch.float32)
        text_encoder = Qwen3Model.from_pretrained(start / "text_encoder", dtype=torch.float32)
    vae: Any = AutoencoderTiny.from_pretrained(start / "vae", torch_dtype=torch.float32)
    vae.eval().requires_grad_(False)
    scheduler = FlowMatchEulerDiscreteScheduler()
    return FlowModel(vae, tokenizer, text_encoder, transformer, scheduler, SEED + (kind == "ZImagePipeline"))


def train_flow(
    out: Path,
    *,
    start: Path,
    scenes: int = 60_000,
    images: int = 220_000,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    seed: int = 0,
    workers: int = 2,
    log: Callable[[str], None] = print,
) -> None:
    """Draw the corpus of `train_base` and fit ``noise - x0`` at logit-normal levels; writes averaged weights to `out`.

    Matrices of attention and feed-forward layers by Muon, the rest by AdamW; the rate falls linearly to 0.
    """
    model = build_flow(start)
    corpus = build_corpus(scenes, seed=seed, workers=workers)
    log(f"corpus of {scenes} scenes drawn")
    latents = encode_corpus(model.vae, corpus)
    texts = [text for wordings in corpus.captions for text in wordings]
    wordings = len(corpus.captions[0])
    tokens = torch.tensor(
        model.tokenizer([*texts, ""], padding="max_length", max_length=MAX_LENGTH, truncation=True).input_ids,
        dtype=torch.int16,
    )
    named = model.trained()
    inner = {name for name, p in named.items() if p.ndim == 2 and any(layer in name for layer in INNER)}
    rest = [p for name, p in named.items() if name not in inner]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(
            [named[name] for name in sorted(inner)], learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(rest, lr=learning_rate / 2, betas=(0.9, 0.99), weight_decay=0.01, foreach=True),
    ]
    steps = images // batch_size
    rate = [torch.optim.lr_scheduler.LambdaLR(one, lambda n: min((n + 1) / 100, 1 - n / steps)) for one in optimizers]
    ema, rng = EMA(named, 0.999), np.random.default_rng(model.seed)
    generator = torch.Generator().manual_seed(model.seed)
    began = saved = time.time()
    recent = []
    for step in range(steps):
        index = rng.integers(len(latents), size=batch_size)
        text = index * wordings + rng.integers(wordings, size=batch_size)
        text = np.where(rng.random(batch_size) < EMPTY_SHARE, len(texts), text)
        x0 = latents[index].float()
        noise = torch.randn(x0.shape, generator=generator)
        sigma = torch.randn(batch_size, generator=generator).sigmoid().reshape(-1, 1, 1, 1)
        with torch.autocast("cpu", torch.bfloat16):
            output = model.velocity((1 - sigma) * x0 + sigma * noise, sigma.flatten(), tokens[text].long())
        loss = F.mse_loss(output.float(), noise - x0)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
        for optimizer, schedule in zip(optimizers, rate, strict=True):
            optimizer.step()
            schedule.step()
        ema.update()
        recent.append(loss.item())
        if step % 50 == 0 or step == steps - 1:
            speed, taken = (step + 1) * batch_size / (time.time() - began), time.time() - began
            log(f"flow step {step}/{steps} loss {np.mean(recent[-50:]):.4f} {speed:.0f} images/s {taken:.0f} s")
        if step == steps - 1 or time.time() - saved > SNAPSHOT_SECONDS:
            saved = time.time()
            with ema.applied():
                model.save(out)
