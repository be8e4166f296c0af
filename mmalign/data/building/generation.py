"""Generate images or videos from prompts in batches, for `generate`, `pairs sample` and `compare`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.core.errors import UserError
from mmalign.data.building.real_media import Start
from mmalign.data.prompts import Prompt
from pipelines.conditioning import Conditioning


class GeneratedImage(NamedTuple):
    """One image, or one video ``[F, 3, H, W]``, in [0, 1], float32 on the CPU, with its prompt and seed."""

    prompt_index: int
    seed: int
    image: Float[Tensor, "*media"]


def generate_images(
    generator: Any,
    prompts: Sequence[str | Prompt],
    *,
    seeds: Sequence[int] | Sequence[Sequence[int]],
    steps: int = 50,
    guidance: float = 7.5,
    eta: float = 0.0,
    solver: str = "ddim",
    batch_size: int = 8,
    start: Callable[[int], Start | None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Iterator[GeneratedImage]:
    """Yield an image for every prompt and seed: all seeds of the first prompt, then of the second, and so on.

    `seeds` holds the seeds used for every prompt alike, or one sequence of them for each prompt. An image depends on
    (model, settings, prompt, seed) alone, up to the rounding of kernels that differ between batch sizes; so that these
    differ as little as possible, a short last batch is filled up and the surplus discarded. Each distinct
    prompt is encoded once and forgotten after its last use. A video starts from the first frame of its prompt if it
    has one and the model takes it. `progress` is called with the number of images newly made. `start`, called once
    with the place of each prompt, tells where its images start in the place of pure noise; those of a prompt for which
    it is None are left out. A batch then holds images of one prompt.

    Raises:
        UserError: the numbers of prompts and of seed sequences differ, or batch_size is not positive.
    """
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size}: must be at least 1")
    takes = getattr(generator, "takes_first_frame", False)
    texts = [_wanted(prompt, takes) for prompt in prompts]
    jobs = [(index, seed) for index, own in enumerate(_per_prompt(seeds, len(texts))) for seed in own]
    return _generate(
        generator, texts, jobs, batch_size, start, progress, steps=steps, guidance=guidance, eta=eta, solver=solver
    )


def _wanted(prompt: str | Prompt, takes_first_frame: bool) -> Prompt:
    """Return what of a prompt the model is given."""
    if isinstance(prompt, str):
        return Prompt(prompt)
    return Prompt(prompt.text, first_frame=prompt.first_frame if takes_first_frame else None)


def _per_prompt(seeds: Sequence[Any], count: int) -> list[list[int]]:
    if all(isinstance(seed, int) for seed in seeds):
        return [list(seeds)] * count
    if len(seeds) != count:
        raise UserError(f"{len(seeds)} sequences of seeds for {count} prompts; give one for each, or seeds for all")
    return [list(own) for own in seeds]


@torch.no_grad()
def _generate(
    generator: Any,
    texts: list[Prompt],
    jobs: list[tuple[int, int]],
    batch_size: int,
    start: Callable[[int], Start | None] | None,
    progress: Callable[[int], None] | None,
    **settings: Any,
) -> Iterator[GeneratedImage]:
    draw = _drawing(generator, [texts[index] for index, _ in jobs])
    before = 0
    for batch, done, beginning in _batches(jobs, batch_size, start):
        # A short batch is filled up, except where a batch is the images of one prompt.
        filled = batch + batch[-1:] * (batch_size - len(batch) if before and beginning is None else 0)
        prompts, seeds = [texts[index] for index, _ in filled], [seed for _, seed in filled]
        images: Sequence[Tensor] = list(draw(prompts, seeds, done, settings, beginning))[: len(batch)] if batch else []
        if progress is not None:
            progress(done - before)
        before = done
        for (index, seed), image in zip(batch, images, strict=True):
            yield GeneratedImage(index, seed, image)


def _batches(
    jobs: list[tuple[int, int]], batch_size: int, start: Callable[[int], Start | None] | None
) -> Iterator[tuple[list[tuple[int, int]], int, Start | None]]:
    """Yield each batch, how many jobs there are up to its end, and where it starts; an empty one for jobs left out."""
    if start is None:
        yield from ((batch, done, None) for batch, done in _cut(jobs, batch_size, 0))
        return
    done = 0
    for index, own in groupby(jobs, key=lambda job: job[0]):
        members, beginning = list(own), start(index)
        if beginning is not None:
            yield from ((batch, end, beginning) for batch, end in _cut(members, batch_size, done))
        done += len(members)
        if beginning is None:
            yield [], done, None


def _cut(jobs: list[tuple[int, int]], size: int, before: int) -> Iterator[tuple[list[tuple[int, int]], int]]:
    for at in range(0, len(jobs), size):
        yield jobs[at : at + size], before + min(at + size, len(jobs))


Draw = Callable[[list[Prompt], list[int], int, dict[str, Any], Start | None], Tensor]


def _drawing(generator: Any, texts_of_jobs: list[Prompt]) -> Draw:
    """Return how a batch is drawn: by our sampler, or by the pipeline itself where it is outside our families."""
    from pipelines import sample, sdedit

    encoder = _PromptMemory(generator, texts_of_jobs)

    def by_sampler(
        prompts: list[Prompt], seeds: list[int], jobs_done: int, settings: dict[str, Any], start: Start | None
    ) -> Tensor:
        cond = encoder.take(prompts, jobs_done)
        if start is None:
            latents = sample(generator, cond, seeds=seeds, **settings).latents
        else:
            clean = start.latents.expand(len(seeds), *start.latents.shape)
            latents = sdedit(generator, cond, clean, strength=start.strength, seeds=seeds, **settings).latents
        return generator.decode(latents).float().cpu()

    def by_itself(
        prompts: list[Prompt], seeds: list[int], jobs_done: int, settings: dict[str, Any], start: Start | None
    ) -> Tensor:
        return generator.draw([prompt.text for prompt in prompts], seeds, **settings)

    return by_itself if hasattr(generator, "draw") else by_sampler


class _PromptMemory:
    """Encodes each distinct prompt at its first use and drops it after its last job."""

    def __init__(self, generator: Any, texts_of_jobs: list[Prompt]) -> None:
        self._generator = generator
        self._last_use = {text: position for position, text in enumerate(texts_of_jobs)}
        self._encoded: dict[Prompt, Conditioning] = {}

    def take(self, texts: list[Prompt], jobs_done: int) -> Conditioning:
        """Return the prompts of a batch encoded; `jobs_done` counts the jobs up to the end of this batch."""
        fresh = [text for text in dict.fromkeys(texts) if text not in self._encoded]
        if fresh:
            encoded = condition(self._generator, fresh)
            self._encoded |= {text: encoded[row] for row, text in enumerate(fresh)}
        cond = Conditioning.cat([self._encoded[text] for text in texts])
        self._encoded = {text: row for text, row in self._encoded.items() if self._last_use[text] >= jobs_done}
        return cond


def condition(generator: Any, prompts: Sequence[Prompt]) -> Conditioning:
    """Return prompts encoded, with their first frames if they have such: of a model that takes them.

    Raises:
        UserError: an image cannot be read, or some of the prompts have none.
    """
    encoded: Conditioning = generator.encode_prompts([prompt.text for prompt in prompts])
    firsts = [prompt.first_frame for prompt in prompts if prompt.first_frame is not None]
    if not firsts:
        return encoded
    if len(firsts) < len(prompts):
        raise UserError(f"{len(firsts)} of {len(prompts)} prompts have a first frame; give one to all, or to none")
    from mmalign.data.encoded.first_frames import read_frame
    from mmalign.data.encoded.transforms import Decision, VideoTransform

    fit = VideoTransform(*generator.media_shape[2:])
    frames = [read_frame(path, fit, Decision(), "first frame").float() / 255 for path in firsts]
    started: Conditioning = generator.with_first_frame(encoded, torch.stack(frames))
    return started
