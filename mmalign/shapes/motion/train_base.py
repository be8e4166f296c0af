"""Train the text-to-video base of moving Shapes from an image model: `mmalign shapes train-base --video`.

The U-Net of `assets/shapes-flow` gets motion modules that change nothing at first, so that the model starts with
what it knows of pictures; its text encoder gets the new words. All of it is trained together on clips: first on three
frames of each, apart in time, which is where a motion shows at a third of the cost, then on whole ones. Written is a
plain diffusers `AnimateDiffPipeline` directory; beside it a folder `NAME.training`, from which the same command goes
on.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmalign.core.ema import EMA
from mmalign.core.files import replacing
from mmalign.shapes.motion import judge
from mmalign.shapes.motion.corpus import WORDINGS, cached_corpus
from mmalign.shapes.motion.language import parse, vocabulary
from mmalign.shapes.motion.oracle import read
from mmalign.shapes.motion.prompts import TEST_COUNTS, make_prompts
from mmalign.shapes.motion.world import FRAMES
from mmalign.shapes.tokenizer import build_tokenizer
from mmalign.shapes.train_base import build_flow_scheduler, build_text_encoder, tidy_vae_config

SEED = 14
SNAPSHOT_SECONDS = 600
DROPOUT = 0.1
"""Share of captions that are left out, for guidance."""
LEVEL_MEAN, LEVEL_STD = 1.4, 1.3
"""Mean and deviation of the logit of the noise level. What a picture shows is settled at less noise than how nine of
them go together, and the model knows pictures already."""
SHIFT = 3.0
"""Of the levels of sampling, for the same reason."""
PICTURES = 72
"""Frames in a step: of eight clips, or three each of 24."""
WATCHED, STEPS = 24, 8


@dataclass
class VideoModel:
    """The parts that are trained and those that are kept; `image` is the U-Net of pictures, filled when saved."""

    unet: Any
    image: Any
    text_encoder: Any
    tokenizer: Any
    vae: Any
    scheduler: Any

    def parameters(self) -> dict[str, nn.Parameter]:
        """Every weight that is trained, by its name."""
        parts = (("unet", self.unet), ("text_encoder", self.text_encoder))
        return {f"{part}.{name}": p for part, module in parts for name, p in module.named_parameters()}

    def predict(self, latents: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        """The flow `noise - x0` of latents `[B, 4, F, 16, 16]`, for timesteps `[B]` and tokens `[B, L]`."""
        # Over so few tokens the plain kernel is the faster one on a CPU (`python -m benchmarks cpu_attention`).
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            states = self.text_encoder(tokens.long()).last_hidden_state
            states = states.repeat_interleave(latents.shape[2], 0)
            return self.unet(latents, timesteps, states).sample.float()


def build_adapter(unet: Any) -> Any:
    """Motion modules of 2.8 M parameters: attention over the frames behind every block of the U-Net."""
    from diffusers import MotionAdapter

    return MotionAdapter(
        block_out_channels=tuple(unet.config.block_out_channels), motion_layers_per_block=1,
        motion_num_attention_heads=4, motion_norm_num_groups=16, motion_max_seq_length=FRAMES,
    )  # fmt: skip


def build_model(start: Path, folder: Path) -> VideoModel:
    """The image pipeline at `start` with silent motion modules and new words; its tokenizer is written to `folder`."""
    from diffusers import AutoencoderTiny, UNet2DConditionModel, UNetMotionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    torch.manual_seed(SEED)
    image = UNet2DConditionModel.from_pretrained(start / "unet")
    unet = UNetMotionModel.from_unet2d(image, build_adapter(image))
    for name, parameter in unet.named_parameters():
        if "motion_modules" in name and ".proj_out." in name:
            torch.nn.init.zeros_(parameter)
    tokenizer = build_tokenizer(folder, vocabulary())
    words = CLIPTokenizer.from_pretrained(start / "tokenizer")
    text_encoder = extend(CLIPTextModel.from_pretrained(start / "text_encoder"), words, tokenizer)
    vae = AutoencoderTiny.from_pretrained(start / "vae").eval().requires_grad_(False)
    scheduler: Any = build_flow_scheduler()
    scheduler.register_to_config(flow_shift=SHIFT)
    scheduler = type(scheduler).from_config(scheduler.config)
    return VideoModel(unet.train(), image, text_encoder.train(), tokenizer, vae, scheduler)


def extend(text_encoder: Any, old: Any, new: Any) -> Any:
    """The text encoder for a larger vocabulary: known words keep their embedding, new ones get a random one."""
    larger = build_text_encoder(len(new), new.eos_token_id)
    weights = text_encoder.state_dict()
    [name] = [n for n in weights if n.endswith("token_embedding.weight")]
    known, table = weights[name], old.get_vocab()
    rows = torch.randn(len(new), known.shape[1]) * known.std()
    for word, index in new.get_vocab().items():
        if word in table:
            rows[index] = known[table[word]]
    larger.load_state_dict({**weights, name: rows})
    return larger


@contextmanager
def at_frames(unet: Any, frames: list[int]) -> Iterator[None]:
    """Within: clips given to the U-Net are these frames of theirs, which keep their positions in time."""
    from diffusers.models.embeddings import SinusoidalPositionalEmbedding

    tables: dict[Any, Any] = {
        module: module.pe for module in unet.modules() if isinstance(module, SinusoidalPositionalEmbedding)
    }
    for module, table in tables.items():
        module.pe = table[:, frames]
    try:
        yield
    finally:
        for module, table in tables.items():
            module.pe = table


@torch.inference_mode()
def sample(
    model: VideoModel, prompts: list[str], *, steps: int = STEPS, seed: int = 0, guidance: float = 1.0
) -> UInt8[Tensor, "clips frames 3 64 64"]:
    """Clips of the prompts as the model is now, by its own scheduler."""
    scheduler, seeds = copy.deepcopy(model.scheduler), torch.Generator().manual_seed(seed)
    side = model.unet.config.sample_size
    latents = torch.randn(len(prompts), 4, FRAMES, side, side, generator=seeds)
    texts = model.tokenizer([*prompts, ""], padding="max_length", truncation=True, return_tensors="pt").input_ids
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        output = model.predict(latents, t.expand(len(prompts)), texts[:-1])
        if guidance != 1.0:
            plain = model.predict(latents, t.expand(len(prompts)), texts[-1:].expand(len(prompts), -1))
            output = plain + guidance * (output - plain)
        latents = scheduler.step(output, t, latents).prev_sample
    frames = model.vae.decode(latents.transpose(1, 2).flatten(0, 1)).sample
    return frames.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).unflatten(0, (len(prompts), FRAMES))


def measure(model: VideoModel, count: int) -> str:
    """Grades of clips of `count` validation prompts, in words."""
    rows = make_prompts({k: v // 2 for k, v in TEST_COUNTS.items()}, "validation", 202)
    prompts = [rows[int(index)][0] for index in np.linspace(0, len(rows) - 1, count)]
    grades = []
    for prompt, clip in zip(prompts, sample(model, prompts).permute(0, 1, 3, 4, 2).numpy(), strict=True):
        query, reading = parse(prompt), read(clip)
        graders = (judge.correctness, judge.motion, judge.is_strict, judge.smoothness)
        grades.append([float(grader(query, reading)) for grader in graders])
    things, motion, strict, smooth = np.mean(grades, 0)
    return f"of {count} clips: things {things:.3f} motion {motion:.3f} strict {strict:.3f} smooth {smooth:.3f}"


@dataclass
class Training:
    """Optimiser, schedule and average of a model, which a file can hold."""

    model: VideoModel
    steps: int
    learning_rate: float
    step: int = 0

    def __post_init__(self) -> None:
        """Motion modules learn at the full rate; what is known already, at a third of it."""
        self.weights = self.model.parameters()
        new = [p for name, p in self.weights.items() if "motion_modules" in name]
        old = [p for name, p in self.weights.items() if "motion_modules" not in name]
        self.optimizer = torch.optim.AdamW(
            [{"params": new, "rate": self.learning_rate}, {"params": old, "rate": self.learning_rate / 3}],
            lr=self.learning_rate, betas=(0.9, 0.99), weight_decay=0.01, foreach=True,
        )  # fmt: skip
        self.average = EMA(self.weights, 0.998)

    def update(self, loss: Tensor) -> None:
        """One optimiser step, at a rate that warms up and falls like a cosine."""
        progress = min(self.step / self.steps, 1.0)
        share = min(1.0, (self.step + 1) / 100) * (0.05 + 0.95 * 0.5 * (1 + np.cos(np.pi * progress)))
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * share
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(self.weights.values()), 1.0)
        self.optimizer.step()
        self.average.update()
        self.step += 1

    def save(self, file: Path) -> None:
        """Write everything that :meth:`load` needs to go on."""
        held = {f"weight.{n}": p.detach() for n, p in self.weights.items()}
        held |= {f"average.{n}": value for n, value in self.average.shadow.items()}
        for name, p in self.weights.items():
            held |= {f"{key}.{name}": self.optimizer.state[p][key] for key in ("exp_avg", "exp_avg_sq")}
        with replacing(file) as temporary:
            save_file({n: v.contiguous() for n, v in held.items()}, temporary, {"step": str(self.step)})

    @torch.no_grad()
    def load(self, file: Path) -> None:
        """Go on from a file of :meth:`save`."""
        with safe_open(file, "pt") as stored:
            self.step = int(stored.metadata()["step"])
            for name, p in self.weights.items():
                p.copy_(stored.get_tensor(f"weight.{name}"))
                moments = {key: stored.get_tensor(f"{key}.{name}") for key in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[p] = {"step": torch.tensor(float(self.step)), **moments}
            self.average.load({n: stored.get_tensor(f"average.{n}") for n in self.weights}, self.step)


def flow_loss(
    model: VideoModel, x0: Float[Tensor, "batch 4 frames 16 16"], tokens: Tensor, generator: torch.Generator
) -> Tensor:
    """Squared error of the flow at logit-normal levels, in the mean over all dimensions."""
    level = (LEVEL_MEAN + LEVEL_STD * torch.randn(len(x0), generator=generator)).sigmoid()
    share, noise = level.reshape(-1, 1, 1, 1, 1), torch.randn(x0.shape, generator=generator)
    return F.mse_loss(model.predict((1 - share) * x0 + share * noise, 1000 * level, tokens), noise - x0)


def step_frames(rng: np.random.Generator, whole: bool) -> list[int]:
    """The frames that a step sees: all of them, or one of each third."""
    return list(range(FRAMES)) if whole else [int(start + rng.integers(3)) for start in range(0, FRAMES, FRAMES // 3)]


def train_video_base(
    out: Path, *, start: Path, clips: int = 10_000, glimpses: int = 30_000, videos: int = 6_000,
    pictures: int = PICTURES, learning_rate: float = 1e-3, watched: int = WATCHED, log: Callable[[str], None] = print,
) -> None:  # fmt: skip
    """The whole recipe: clips, motion modules, training; goes on where an earlier call stopped.

    `start`: the image pipeline, a flow model. `clips`: how many are drawn. `glimpses`: of how many the model first
    sees three frames; `videos`: how many it then sees whole. `pictures`: frames in a step. `watched`: how many clips
    it makes every ten minutes for the grades in the log.
    """
    state = out.with_name(f"{out.name}.training")
    model = build_model(start, state / "tokenizer")
    corpus = cached_corpus(state / "corpus.safetensors", clips, seed=SEED, vae=model.vae, tokenizer=model.tokenizer)
    nothing = torch.tensor(model.tokenizer("", padding="max_length").input_ids, dtype=torch.int16)
    glances = 3 * glimpses // pictures
    training = Training(model, glances + FRAMES * videos // pictures, learning_rate)
    if (state / "state.safetensors").is_file():
        training.load(state / "state.safetensors")
        log(f"going on at step {training.step}")
    began, first, losses = time.time(), training.step, []
    saved = began
    while training.step < training.steps:
        rng = np.random.default_rng([SEED, training.step])  # a step's draws are its own: a stop changes none
        frames = step_frames(rng, training.step >= glances)
        index = rng.integers(clips, size=pictures // len(frames))
        tokens = corpus.tokens[index, rng.integers(WORDINGS, size=len(index))]
        tokens[torch.from_numpy(rng.random(len(index)) < DROPOUT)] = nothing
        seeds = torch.Generator().manual_seed(int(rng.integers(2**62)))
        with at_frames(model.unet, frames):
            loss = flow_loss(model, corpus.latents[index][:, :, frames].float(), tokens, seeds)
            training.update(loss)
        losses.append(loss.item())
        if training.step % 20 == 0:
            pace = (time.time() - began) / (training.step - first)
            left = (training.steps - training.step) * pace / 60
            log(
                f"step {training.step}/{training.steps} loss {np.mean(losses[-20:]):.4f} "
                f"{pictures / pace:.1f} frames/s, {left:.0f} min left"
            )
        if training.step == training.steps or time.time() - saved > SNAPSHOT_SECONDS:
            training.save(state / "state.safetensors")
            with training.average.applied():
                save_video_pipeline(out, model)
                log(measure(model, watched))
            saved = time.time()


def save_video_pipeline(out: Path, model: VideoModel) -> None:
    """Write an `AnimateDiffPipeline`: the U-Net of pictures and its motion adapter apart, in half precision.

    The text encoder is in single precision: transformers opens it in the one it is stored in, diffusers the rest.
    """
    from diffusers import AnimateDiffPipeline

    weights = model.unet.state_dict()
    model.image.load_state_dict({name: value for name, value in weights.items() if "motion_modules" not in name})
    adapter = build_adapter(model.image)
    adapter.load_state_dict({name: value for name, value in weights.items() if "motion_modules" in name})
    parts = {"vae": model.vae, "motion_adapter": adapter, "unet": model.image}
    halves = {name: copy.deepcopy(module).half() for name, module in parts.items()}
    pipeline: Any = AnimateDiffPipeline(
        **halves, text_encoder=model.text_encoder, tokenizer=model.tokenizer, scheduler=model.scheduler
    )
    pipeline.register_modules(unet=halves["unet"])  # it joined the two parts, which are stored once
    pipeline.save_pretrained(out)
    tidy_vae_config(out)
