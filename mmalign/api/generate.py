"""Draw images from Python, and the options of sampling that `mmalign generate` and `mmalign pairs sample` share."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

from mmalign.api import html
from mmalign.core.errors import UserError, did_you_mean
from mmalign.core.progress import note, track
from mmalign.core.resources import find, resolve_model

if TYPE_CHECKING:
    from mmalign.data.building.generation import GeneratedImage
    from mmalign.data.prompts import Prompt

SOLVERS, PRECISIONS = ("ddim", "dpm++"), ("fp32", "bf16", "fp16")
_SHOWN_ROWS = 40


def _as_argument(name: str) -> str:
    return name


@dataclass(frozen=True)
class Sampling:
    """Which model draws, and how; what an image depends on besides its prompt and its seed."""

    model: str
    steps: int = 50
    guidance: float = 7.5
    eta: float = 0.0
    solver: str = "ddim"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    adapter: Any = None
    """LoRA files or directories on top of the model: one or several of PATH, PATH:WEIGHT or (path, weight)"""
    adapter_scale: float = 1.0
    image_size: int | None = None
    """side of the images in pixels; None: the model's own"""
    video: Any = None
    """a `pipelines.VideoOptions` for a video model; None: the model's own geometry"""
    low_noise_guidance: float | None = None
    """guidance of the expert for low noise, where a model has two; None: as `guidance`"""

    @property
    def adapters(self) -> list[tuple[Path, float]]:
        """The adapters with their weights; shipped ones are found.

        Raises:
            UserError: one does not exist. PipelineError: a weight is not finite.
        """
        from pipelines.lora_files import with_weight

        given = self.adapter
        listed = [] if not given else [given] if isinstance(given, str | Path | tuple) else list(given)
        return [(find(path), weight) for path, weight in map(with_weight, listed)]

    def check(self, key: Callable[[str], str] = _as_argument) -> None:
        """Refuse what cannot work before a model is read; `key` tells what the user calls an option.

        Raises:
            UserError: options are out of range or exclude each other.
        """
        from mmalign.core.precision import check_precision

        for name, allowed in (("solver", SOLVERS), ("precision", PRECISIONS)):
            if (given := getattr(self, name)) not in allowed:
                raise UserError(
                    f"{key(name)} '{given}'; allowed: {', '.join(allowed)}{did_you_mean(str(given), allowed)}"
                )
        if self.image_size is not None and self.image_size < 1:
            raise UserError(f"{key('image_size')} {self.image_size}: must be a number of pixels above 0")
        if self.steps < 1:
            raise UserError(f"{key('steps')} {self.steps}: must be at least 1")
        if not 0 <= self.guidance < math.inf:
            raise UserError(
                f"{key('guidance')} {self.guidance}: must be a number of at least 0 (1: none, 0: without the prompt)"
            )
        if self.low_noise_guidance is not None and not 0 <= self.low_noise_guidance < math.inf:
            raise UserError(f"{key('low_noise_guidance')} {self.low_noise_guidance}: must be a number of at least 0")
        if not 0 <= self.eta <= 1:
            raise UserError(f"{key('eta')} {self.eta}: must lie between 0 and 1")
        if self.eta and self.solver != "ddim":
            raise UserError(f"{key('eta')} {self.eta} needs {key('solver')} ddim; '{self.solver}' is deterministic")
        if not 0 <= self.adapter_scale < math.inf:
            raise UserError(
                f"{key('adapter_scale')} {self.adapter_scale}: must be a number of at least 0 (0: the base)"
            )
        if self.adapter_scale != 1 and not self.adapter:
            from mmalign.training.models import require_adapter

            what = f"{key('adapter_scale')} {self.adapter_scale:g}"
            require_adapter(self.model, what, f"give {key('adapter')} PATH or a MODEL that is one")
        check_precision(self.precision, key=key("precision"))

    def open(self, device: Any = None) -> Any:
        """Load the model with its adapter.

        Raises:
            UserError, PipelineError: there is no such model or adapter.
        """
        from pipelines import FlowOptions, load_drawer

        adapters = self.adapters
        model = resolve_model(self.model)
        generator = load_drawer(
            model,
            dtype=self.precision,
            device=device,
            adapter=adapters,
            resolve=resolve_model,
            image_size=self.image_size,
            video=self.video,
            flow=None if self.low_noise_guidance is None else FlowOptions(low_noise_guidance=self.low_noise_guidance),
        )
        if self.adapter_scale != 1:
            generator.set_adapter_scale(self.adapter_scale)
        return generator

    def draw(
        self,
        generator: Any,
        prompts: Sequence[str | Prompt],
        seeds: Sequence[int] | Sequence[Sequence[int]],
        batch_size: int,
        progress: Callable[[int], None],
    ) -> Iterator[GeneratedImage]:
        """Yield images in the way that these options say; see `mmalign.data.building.generation.generate_images`."""
        from mmalign.data.building.generation import generate_images

        return generate_images(
            generator,
            prompts,
            seeds=seeds,
            steps=self.steps,
            guidance=self.guidance,
            eta=self.eta,
            solver=self.solver,
            batch_size=batch_size,
            progress=progress,
        )

    def makes_videos(self) -> bool:
        """Say whether the model makes videos, by its index.

        Raises:
            UserError, PipelineError: there is no such model.
        """
        from pipelines.load import makes_videos

        return makes_videos(resolve_model(self.model), resolve_model)

    def only_draws(self) -> bool:
        """Say whether the model is a pipeline outside of our families, by its index.

        Raises:
            UserError, PipelineError: there is no such model.
        """
        return not self._drawer_has("encode")

    def with_first_frames(self, prompts: Sequence[Prompt], image: Path | None = None) -> list[Prompt]:
        """Return the prompts as the model takes them: each with `image` if given, without an image if it takes none.

        Raises:
            UserError: they lack the first frame that the model needs, or `image` is for a model of text alone.
        """
        from mmalign.data.prompts import check_first_frames

        if self._drawer_has("takes_first_frame"):
            given = list(prompts) if image is None else [replace(prompt, first_frame=image) for prompt in prompts]
            fix = "give --image FILE, or prompts in a table with a column first_frame"
            check_first_frames(given, self.model, self._drawer_has("needs_first_frame"), fix)
            return given
        if image is not None:
            raise UserError(f"--image {image}: {self.model} draws from a text alone; remove it")
        if any(prompt.first_frame is not None for prompt in prompts):
            note(f"{self.model} draws from a text alone: it is not given the first frames of the prompts")
        return [replace(prompt, first_frame=None) for prompt in prompts]

    def _drawer_has(self, name: str) -> bool:
        from pipelines.load import drawer_of

        return bool(getattr(drawer_of(resolve_model(self.model), resolve_model), name, False))

    def identity(self) -> tuple[str, str]:
        """Return the model's name for people and a fingerprint of its weights, an extra adapter's included.

        Raises:
            UserError, PipelineError: there is no such model or adapter.
        """
        from pipelines import fingerprint_model

        adapters = self.adapters
        fingerprint = fingerprint_model(resolve_model(self.model), adapter=adapters, resolve=resolve_model)
        names = [str(path) if weight == 1 else f"{path}:{weight:g}" for path, weight in adapters]
        return " + ".join([self.model, *names]), fingerprint


class Images(Sequence[Image.Image]):
    """Images with what they were drawn from; all seeds of the first prompt come first. Shows itself as a grid.

    prompts: the prompt of each image. seeds: the seed of each image.
    """

    def __init__(self, images: Sequence[Image.Image], prompts: Sequence[str], seeds: Sequence[int]) -> None:
        """Keep three lists of one length."""
        self.images, self.prompts, self.seeds = list(images), list(prompts), list(seeds)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def __getitem__(self, index: Any) -> Any:
        """Return an image, or for a slice these images with their prompts and seeds."""
        if isinstance(index, slice):
            return Images(self.images[index], self.prompts[index], self.seeds[index])
        return self.images[index]

    def grid(self) -> Image.Image:
        """Return one picture: a row for each prompt, a column for each seed."""
        from mmalign.core.io.grid import image_grid

        rows = list(self._rows())
        most = max((seeds for _, seeds in rows), key=len)
        return image_grid(
            [[seeds.get(seed) for seed in most] for _, seeds in rows],
            row_labels=[prompt for prompt, _ in rows],
            column_labels=[f"seed {seed}" for seed in most],
        )

    def _rows(self) -> Iterator[tuple[str, dict[int, Image.Image]]]:
        """Yield each prompt with its images by seed; a prompt given twice makes two rows."""
        row: dict[int, Image.Image] = {}
        for place, (picture, prompt, seed) in enumerate(zip(self.images, self.prompts, self.seeds, strict=True)):
            if row and (prompt != self.prompts[place - 1] or seed in row):
                yield self.prompts[place - 1], row
                row = {}
            row[seed] = picture
        if row:
            yield self.prompts[-1], row

    def _repr_html_(self) -> str:
        if not self.images:
            return "<div>no images</div>"
        rows = list(self._rows())
        seeds = max((held for _, held in rows), key=len)
        cells = [(prompt, [html.image(one) for one in held.values()]) for prompt, held in rows[:_SHOWN_ROWS]]
        more = f"<div>and {len(rows) - _SHOWN_ROWS} more prompts</div>" if len(rows) > _SHOWN_ROWS else ""
        return f"<div>{html.image_table(cells, [f'seed {seed}' for seed in seeds])}{more}</div>"

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.grid().save(buffer, format="PNG")
        return buffer.getvalue()


def generate(
    model: Any,
    prompts: str | Sequence[str],
    *,
    seeds: int | Sequence[int] = 0,
    steps: int = 50,
    guidance: float = 7.5,
    eta: float = 0.0,
    solver: str = "ddim",
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    adapter: Any = None,
    adapter_scale: float = 1.0,
    image_size: int | None = None,
    batch_size: int = 8,
    device: Any = None,
) -> Images:
    """Draw an image for every prompt and seed, like `mmalign generate`, and return them; nothing is written.

    ```python
    images = mmalign.generate("assets/shapes-sd", ["a red circle", "two stars"], seeds=[0, 1], guidance=4)
    images[0].save("circle.png")  # PIL; in a notebook `images` alone shows the grid
    ```

    Args:
        model: a model directory or single-file checkpoint, the directory or result of a training, a hub id, or what
            `load_generator` returned.
        prompts: one text or several.
        seeds: one or several, drawn for every prompt alike; an image depends on model, options, prompt and seed alone.
        steps: sampling steps, 1 or more. guidance: scale of classifier-free guidance; 1: none, 0: without the prompt.
        eta: noise of DDIM, 0 to 1. solver: ddim or dpm++. precision: type of the weights: fp32, bf16 or fp16.
        adapter: LoRA file or directory on top of the model, "PATH:WEIGHT", (path, weight), or a list of them.
        adapter_scale: how much of the whole adapter; 1: as trained.
        image_size: side of the images in pixels; None: the model's own.
        batch_size: images at once. device: where; by default CUDA where there is one.

    Raises:
        UserError, PipelineError: an option cannot work, or there is no such model.
    """
    from mmalign.core.io.images import tensor_to_image
    from mmalign.scoring.checks import check_device

    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    several: Any = [seeds] if isinstance(seeds, Integral) else seeds
    numbers = [int(seed) for seed in several]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise UserError("prompts: give one text or a list of texts")
    if not numbers or len(set(numbers)) < len(numbers) or min(numbers) < 0:
        raise UserError(f"seeds {numbers}: must be different whole numbers of at least 0")
    name = None if hasattr(model, "encode_prompts") else _named(model)
    options = Sampling(
        name or "",
        steps,
        float(guidance),
        float(eta),
        solver,
        precision,
        os.fspath(adapter) if isinstance(adapter, os.PathLike) else adapter,
        adapter_scale,
        image_size,
    )
    given = (adapter, device, image_size)
    if name is None and (any(one is not None for one in given) or adapter_scale != 1 or precision != "fp32"):
        raise UserError(
            "adapter, adapter_scale, image_size, precision and device belong to load_generator, which made this model"
        )
    options.check()
    check_device(device)
    if model.modality == "video" if name is None else options.makes_videos():
        raise UserError("model: makes videos, and this draws images; write files with `mmalign generate`")
    with track(len(texts) * len(numbers), "generate") as job:
        generator = model if name is None else options.open(device)
        drawn = options.draw(generator, texts, numbers, batch_size, job.advance)
        made = [(tensor_to_image(item.image), texts[item.prompt_index], item.seed) for item in drawn]
    images, used, of = zip(*made, strict=True)
    return Images(images, used, of)


def _named(model: Any) -> str:
    if isinstance(model, str | os.PathLike):
        return os.fspath(model)
    raise UserError(
        f"model: a {type(model).__name__}; give a directory, the result of a training, a hub id, or what "
        "mmalign.load_generator returned"
    )


def load_generator(model: str | os.PathLike[str], **options: Any) -> Any:
    """Load a text-to-image model, to draw with it many times: `mmalign.generate(load_generator(...), prompts)`.

    model: a model directory, the directory or result of a training, a hub id, or a name that mmalign ships, such as
    "assets/shapes-sd". options: see `pipelines.load_generator`.

    Raises:
        UserError, PipelineError: there is no such model, or it is of another kind.
    """
    import pipelines

    return pipelines.load_generator(resolve_model(os.fspath(model)), resolve=resolve_model, **options)


def load_vlm(model: str | os.PathLike[str], **options: Any) -> Any:
    """Load a vision-language model, whole or adapter; its `generate` takes a prompt and media.

    model: as for `load_generator`. options: see `pipelines.load_vlm`.

    Raises:
        UserError, PipelineError: there is no such model, or it is of another kind.
    """
    import pipelines

    return pipelines.load_vlm(resolve_model(os.fspath(model)), resolve=resolve_model, **options)
