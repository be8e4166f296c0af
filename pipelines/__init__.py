"""Run a generator or a vision-language model: load it, encode, predict or score, sample or answer, save.

``pipelines`` knows nothing of rewards or training; see ``mmalign`` for those. Names are imported when first used, so
importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.conditioning import Conditioning
    from pipelines.errors import PipelineError
    from pipelines.generator import Generator
    from pipelines.gradient_sampling import GradientSample, sample_with_gradient
    from pipelines.guidance import guided_predictor
    from pipelines.load import fingerprint_model, load_generator
    from pipelines.noise import NoiseProcess
    from pipelines.sampling import Trajectory, gaussian_log_prob, invert, sample, seeded_noise
    from pipelines.truncation import Truncation
    from pipelines.vlm.batch import VlmBatch, VlmSample
    from pipelines.vlm.features import media_features
    from pipelines.vlm.load import fingerprint_vlm, load_vlm
    from pipelines.vlm.model import VisionLanguageModel

__all__ = [
    "Conditioning",
    "Generator",
    "GradientSample",
    "NoiseProcess",
    "PipelineError",
    "Trajectory",
    "Truncation",
    "VisionLanguageModel",
    "VlmBatch",
    "VlmSample",
    "fingerprint_model",
    "fingerprint_vlm",
    "gaussian_log_prob",
    "guided_predictor",
    "invert",
    "load_generator",
    "load_vlm",
    "media_features",
    "sample",
    "sample_with_gradient",
    "seeded_noise",
]

_HOMES = {
    "Conditioning": "conditioning",
    "Generator": "generator",
    "GradientSample": "gradient_sampling",
    "NoiseProcess": "noise",
    "PipelineError": "errors",
    "Truncation": "truncation",
    "VisionLanguageModel": "vlm.model",
    "VlmBatch": "vlm.batch",
    "VlmSample": "vlm.batch",
    "fingerprint_model": "load",
    "fingerprint_vlm": "vlm.load",
    "guided_predictor": "guidance",
    "load_generator": "load",
    "load_vlm": "vlm.load",
    "media_features": "vlm.features",
    "sample_with_gradient": "gradient_sampling",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'pipelines' has no attribute '{name}'")
    return getattr(importlib.import_module(f"pipelines.{_HOMES.get(name, 'sampling')}"), name)
