"""Generate the images of a system: one model in memory at a time, and none if every image exists."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

from mmalign.compare.config import CompareConfig
from mmalign.compare.images.store import ImageStore, Sampling, draw_missing
from mmalign.compare.systems.facts import SystemFacts
from mmalign.core.resources import resolve_model
from mmalign.data.prompts import Prompt


class ModelHolder:
    """Holds the model used last, and drops it before another is loaded."""

    def __init__(self, precision: str, image_size: int | None = None) -> None:
        """Remember the precision, and the side of the images where it is not the model's own; nothing is loaded."""
        self._dtype, self._image_size = precision, image_size
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
            self._generator = load_drawer(
                resolve_model(model), dtype=self._dtype, resolve=resolve_model, image_size=self._image_size
            )
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
    source: ImageStore | None = None,
) -> ImageStore:
    """Complete the images of one system under `folder/<name>`; images are copied from `source` where it holds them."""
    sampling = Sampling(
        config.steps, system.guidance, config.solver, config.precision, system.adapter_scale, config.image_size
    )
    texts = [prompt.text for prompt in prompts]
    store = ImageStore(folder / system.name, system.fingerprint, sampling, texts, config.seeds)
    if source is not None:
        store.adopt(source)
    draw_missing(
        store,
        lambda: models.open(system.model, system.adapter_scale),
        batch_size=config.batch_size,
        label=f"draw {system.name}",
    )
    return store


def _empty_device_cache() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
