"""Run a generator or a vision-language model: load it, encode, predict or score, sample or answer, save.

``pipelines`` knows nothing of rewards or training; see ``mmalign`` for those. Names are imported when first used, so
importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.conditioning import Conditioning
    from pipelines.editing import sdedit, start_step
    from pipelines.errors import PipelineError
    from pipelines.flow import Density, FlowOptions
    from pipelines.generator import Generator
    from pipelines.gradient_sampling import GradientSample, sample_with_gradient
    from pipelines.guidance import guided_predictor
    from pipelines.inversion import invert
    from pipelines.kernels import KERNELS, Kernel, cps, dance, ddim, flow_sde, named_kernel, ode, wan_sde
    from pipelines.load import fingerprint_model, load_drawer, load_generator
    from pipelines.noise import NoiseProcess, Schedule
    from pipelines.sampling import Segment, Trajectory, gaussian_log_prob, sample, seeded_noise
    from pipelines.truncation import Truncation
    from pipelines.video import VideoOptions
    from pipelines.vlm.batch import VlmBatch, VlmSample
    from pipelines.vlm.features import media_features
    from pipelines.vlm.load import fingerprint_vlm, load_vlm
    from pipelines.vlm.model import VisionLanguageModel

__all__ = [
    "KERNELS",
    "Conditioning",
    "Density",
    "FlowOptions",
    "Generator",
    "GradientSample",
    "Kernel",
    "NoiseProcess",
    "PipelineError",
    "Schedule",
    "Segment",
    "Trajectory",
    "Truncation",
    "VideoOptions",
    "VisionLanguageModel",
    "VlmBatch",
    "VlmSample",
    "cps",
    "dance",
    "ddim",
    "fingerprint_model",
    "fingerprint_vlm",
    "flow_sde",
    "gaussian_log_prob",
    "guided_predictor",
    "invert",
    "load_drawer",
    "load_generator",
    "load_vlm",
    "media_features",
    "named_kernel",
    "ode",
    "sample",
    "sample_with_gradient",
    "sdedit",
    "seeded_noise",
    "start_step",
    "wan_sde",
]

_HOMES = {
    "Conditioning": "conditioning",
    "Density": "flow",
    "FlowOptions": "flow",
    "Generator": "generator",
    "GradientSample": "gradient_sampling",
    "NoiseProcess": "noise",
    "PipelineError": "errors",
    "Schedule": "noise",
    "Truncation": "truncation",
    "VideoOptions": "video",
    "VisionLanguageModel": "vlm.model",
    "VlmBatch": "vlm.batch",
    "VlmSample": "vlm.batch",
    "fingerprint_model": "load",
    "fingerprint_vlm": "vlm.load",
    "guided_predictor": "guidance",
    "invert": "inversion",
    "load_drawer": "load",
    "load_generator": "load",
    "load_vlm": "vlm.load",
    "media_features": "vlm.features",
    "sample_with_gradient": "gradient_sampling",
    "sdedit": "editing",
    "start_step": "editing",
} | dict.fromkeys(
    ("KERNELS", "Kernel", "cps", "dance", "ddim", "flow_sde", "named_kernel", "ode", "wan_sde"), "kernels"
)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'pipelines' has no attribute '{name}'")
    return getattr(importlib.import_module(f"pipelines.{_HOMES.get(name, 'sampling')}"), name)
