"""Vision-language models: load, encode prompts with media, log-probabilities of answers, generate answers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.vlm.batch import VlmBatch, VlmSample
    from pipelines.vlm.features import media_features
    from pipelines.vlm.load import fingerprint_vlm, load_vlm
    from pipelines.vlm.model import VisionLanguageModel

__all__ = ["VisionLanguageModel", "VlmBatch", "VlmSample", "fingerprint_vlm", "load_vlm", "media_features"]

_HOMES = {
    "VisionLanguageModel": "model",
    "VlmBatch": "batch",
    "VlmSample": "batch",
    "fingerprint_vlm": "load",
    "load_vlm": "load",
    "media_features": "features",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'pipelines.vlm' has no attribute '{name}'")
    return getattr(importlib.import_module(f"pipelines.vlm.{_HOMES[name]}"), name)
