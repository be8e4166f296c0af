"""How often the oracle of moving Shapes agrees with the scene graph, on drawn and on degraded clips."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from mmalign.core.resources import find
from mmalign.shapes.motion import judge
from mmalign.shapes.motion.language import Action, MotionQuery, query_of
from mmalign.shapes.motion.oracle import ClipReading, read
from mmalign.shapes.motion.world import MOTIONS, SPEEDS, Clip, frames_of, render, sample_clip
from mmalign.shapes.world import COLOURS, Quality, degrade


class Row(NamedTuple):
    """Shares of clips of one quality; `frames`: of frames. `seconds`: processor time to read and grade one clip.

    `motion`, `strict`: full marks for a true prompt. `wrong_motion`, `wrong_strict`: for the same prompt with one
    action made another, or at another speed.
    """

    quality: str
    clips: int
    frames: float
    motion: float
    strict: float
    smooth: float
    wrong_motion: float
    wrong_strict: float
    seconds: float


def check_oracle(count: int, seed: int) -> list[Row]:
    """Read `count` fresh clips (held-out combinations included) in every quality."""
    rng = np.random.default_rng(seed)
    clips = [sample_clip(rng, held_out=True) for _ in range(count)]
    queries = [query_of(clip, rng) for clip in clips]
    wrong = [contradicted(rng, query) for query in queries]
    drawn = [render(clip).permute(0, 2, 3, 1).numpy() for clip in clips]
    return [
        _row(quality, clips, queries, wrong, [change(pixels, rng) for pixels in drawn])
        for quality, change in _qualities().items()
    ]


def contradicted(rng: np.random.Generator, query: MotionQuery) -> MotionQuery:
    """The query with one action that is another: the other speed if one is named, half of the time, else a motion."""
    index = int(rng.integers(len(query.actions)))
    action = query.actions[index]
    if action.speed is not None and rng.random() < 0.5:
        changed = replace(action, speed=next(speed for speed in SPEEDS if speed != action.speed))
    else:
        motion = str(rng.choice([m for m in MOTIONS if m != action.motion]))
        colours = {c for a in query.actions for c in (a.group.colour, a.colour)}
        colour = str(rng.choice([c for c in COLOURS if c not in colours])) if motion == "recolour" else None
        changed = Action(action.group, motion, None, colour)
    actions = tuple(changed if number == index else one for number, one in enumerate(query.actions))
    return replace(query, actions=actions, ordered=False)


def _row(
    quality: str, clips: list[Clip], queries: list[MotionQuery], wrong: list[MotionQuery], drawn: list[np.ndarray]
) -> Row:
    began = time.process_time()
    readings = [read(pixels) for pixels in drawn]
    motions = np.array([judge.motion(q, r) for q, r in zip(queries, readings, strict=True)])
    seconds = (time.process_time() - began) / len(clips)
    strict = [judge.is_strict(q, r) for q, r in zip(queries, readings, strict=True)]
    smooth = np.array([judge.smoothness(q, r) for q, r in zip(queries, readings, strict=True)])
    frames = [right for clip, reading in zip(clips, readings, strict=True) for right in _frames_right(clip, reading)]
    failed = np.array([judge.motion(q, r) for q, r in zip(wrong, readings, strict=True)])
    passed = [judge.is_strict(q, r) for q, r in zip(wrong, readings, strict=True)]
    full = 1.0 - 1e-6
    return Row(
        quality, len(clips), float(np.mean(frames)), float(np.mean(motions > full)), float(np.mean(strict)),
        float(np.mean(smooth > full)), float(np.mean(failed > full)), float(np.mean(passed)), seconds,
    )  # fmt: skip


def _frames_right(clip: Clip, reading: ClipReading) -> list[bool]:
    """For every frame whether the shapes and colours of its things, their number and its background are right."""
    return [
        sorted((o.shape, o.colour) for o in things) == sorted((s.shape, s.colour) for s in frame.objects)
        and frame.background == clip.background
        for things, frame in zip(frames_of(clip), reading, strict=True)
    ]


def _qualities() -> dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]]:
    """How the clips are shown; the strengths are random over the range of the image world's qualities."""

    def degraded(kind: str) -> Callable[[np.ndarray, np.random.Generator], np.ndarray]:
        def change(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
            quality = Quality(kind, float(rng.random()))
            return np.stack([degrade(f.astype(np.float32), quality, int(rng.integers(2**31))) for f in pixels])

        return change

    from diffusers import AutoencoderTiny

    vae: Any = AutoencoderTiny.from_pretrained(find("assets/shapes-flow") / "vae")

    @torch.inference_mode()
    def coded(pixels: np.ndarray, rng: np.random.Generator, noise: float = 0.0) -> np.ndarray:
        latents = vae.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1).latents
        latents = latents + noise * torch.from_numpy(rng.standard_normal(latents.shape, np.float32))
        frames = vae.decode(latents).sample.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
        return frames.permute(0, 2, 3, 1).numpy()

    return {
        "crisp": lambda pixels, rng: pixels,
        "blurred": degraded("blurred"),
        "noisy": degraded("noisy"),
        "autoencoder": coded,
        "autoencoder, latents with noise of 0.3": lambda pixels, rng: coded(pixels, rng, 0.3),
    }
