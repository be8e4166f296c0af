"""Visual features of a vision-language model, one vector a sample, for finding similar media or measuring change."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pipelines.errors import PipelineError
from pipelines.vlm.model import Media, VisionLanguageModel

_METHODS = {"pixel_values": "get_image_features", "pixel_values_videos": "get_video_features"}


@torch.no_grad()
def media_features(model: VisionLanguageModel, media: Sequence[Media]) -> Float[Tensor, "batch features"]:
    """Return the mean of the language model's input features for each sample's media, in float32.

    They are the vision tower's after projection, so the mean represents the content; families whose tower sees one
    frame
    at a time give the same vector for the same frames in any order.

    Raises:
        PipelineError: a sample without media.
    """
    return torch.stack([_of_one(model, one) for one in media])


def _of_one(model: VisionLanguageModel, media: Media) -> Tensor:
    if not media:
        raise PipelineError("a sample without media has no features; leave it out.")
    vision = {name: value.to(model.device) for name, value in model.encode_prompt("", media).vision.items()}
    parts = []
    for pixels, method in _METHODS.items():
        if pixels in vision:
            function = getattr(model.network.model, method)
            taken = inspect.signature(function).parameters
            arguments = {name: value for name, value in vision.items() if name in taken}
            arguments[pixels] = arguments[pixels].to(model.network.dtype)
            parts += _rows(function(**arguments))
    return torch.cat(parts).float().mean(0)


def _rows(output: Any) -> list[Tensor]:
    """Return features as matrices; transformers 5 wraps them in an output, earlier ones return them bare."""
    features = getattr(output, "pooler_output", output)
    return [part.flatten(0, -2) for part in ([features] if isinstance(features, Tensor) else features)]
