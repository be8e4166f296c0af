"""Generate the images of a system: one model in memory at a time, and none if every image exists."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

from mmalign.compare.config import CompareConfig
from mmalign.compare.images.media import ImageMedia
from mmalign.compare.images.store import ImageStore, Sampling, draw_missing
from mmalign.compare.systems.facts import SystemFacts
from mmalign.core.resources import resolve_model
from mmalign.data.prompts import Prompt


class ModelHolder:
    """Holds the model used last, and drops it before another is loaded."""

    def __init__(self, config: CompareConfig) -> None:
        """Remember the precision, and the sizes that are not the model's own; nothing is loaded."""
        self._options: dict[str, Any] = {"dtype": config.precision, "image_size": config.image_size}
        self._options["video"] = config.video.options() if config.video else None
        self._model: str | None = None
        self._generator: Any = None

    def open(self, model: str, adapter_scale: float = 1.0) -> Any:
        """Return the generator of a model, its adapter scaled.

        Raises:
            PipelineError: it cannot be loaded.
        """
        from pipelines import load_drawer

        if model != self._model:
            self.close()
            self._generator = load_drawer(resolve_model(model), resolve=resolve_model, **self._options)
            self._model = model
        if self._generator.has_adapter or adapter_scale != 1:
            self._generator.set_adapter_scale(adapter_scale)
        return self._generator

    def close(self) -> None:
        """Free the memory of the model."""
        self._model, self._generator = None, None
        gc.collect()
        _empty_device_cache()


def draw_system(
    config: CompareConfig,
    system: SystemFacts,
    prompts: list[Prompt],
    folder: Path,
    models: ModelHolder,
    media: ImageMedia,
    source: ImageStore | None = None,
) -> ImageStore:
    """Complete the media of one system under `folder/<name>`; they are copied from `source` where it holds them."""
    sampling = Sampling(
        config.steps,
        system.guidance,
        config.solver,
        config.precision,
        system.adapter_scale,
        config.image_size,
        config.video.options().given() if config.video else None,
    )
    texts = [prompt.text for prompt in prompts]
    store = ImageStore(folder / system.name, system.fingerprint, sampling, texts, config.seeds, media)
    if source is not None:
        store.adopt(source)
    draw_missing(
        store,
        lambda: models.open(system.model, system.adapter_scale),
        batch_size=config.batch_size or media.at_once,
        label=f"draw {system.name}",
    )
    return store


def _empty_device_cache() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
