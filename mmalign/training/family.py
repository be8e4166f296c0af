"""The family of a run's image model: recipes that it cannot train are refused before a weight is read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mmalign.config.flow import FlowConfig
from mmalign.core.errors import UserError
from mmalign.core.resources import resolve_model
from mmalign.methods import methods
from pipelines.load import family_of

if TYPE_CHECKING:
    from mmalign.config.run import RunConfig
    from pipelines import Generator
    from pipelines.flow import FlowOptions


def flow_family(config: RunConfig, path: str) -> type[Generator] | None:
    """Return the family of the model at `path` if it is a flow model; reads its index alone.

    Raises:
        UserError: it is none, and the recipe has a section `flow`. PipelineError: a model of an unsupported kind.
    """
    # Single-file checkpoints are Stable Diffusion 1, 2 or XL, or adapters.
    family = None if Path(path).is_file() else family_of(path, resolve_model)
    if family is not None and family.is_flow:
        return family
    if config.flow is not None:
        raise UserError(
            f"flow: is for flow models (SD3, FLUX.1, Z-Image), and {config.model} is none; remove the section"
        )
    return None


def flow_options(config: RunConfig, path: str) -> FlowOptions | None:
    """Return the recipe's choices for the flow model at `path`, None for a model of another kind."""
    if flow_family(config, path) is None:
        return None
    return (config.flow or FlowConfig()).options(config.data.resolution)


def check_family(config: RunConfig) -> None:
    """Refuse a recipe that the model's family cannot train.

    Raises:
        UserError: names the key and the fix. PipelineError: a model of an unsupported kind.
    """
    family = flow_family(config, resolve_model(config.model))
    if family is None:
        return
    if not methods.get(config.method_name).needs.flow:
        raise UserError(
            f"method.name '{config.method_name}' does not train flow models, and {config.model} is one"
            f" ('{family.family}'); choose another method or model"
        )
    if config.rounds is not None and config.rounds.solver != "ddim":
        raise UserError(f"rounds.solver {config.rounds.solver}: is for diffusion models; set rounds.solver: ddim")
    for key, scale in _guidance_scales(config):
        if family.guidance_inside and scale != 1:
            raise UserError(
                f"{key} {scale:g}: '{family.family}' models have guidance distilled into them and are sampled without"
                f" classifier-free guidance; set {key}: 1.0 (their own scale is flow.embedded_guidance)"
            )


def _guidance_scales(config: RunConfig) -> Iterator[tuple[str, float]]:
    for key in ("guidance", "reference_guidance"):
        if key in config.method_options:
            yield f"method.{key}", config.method_options[key]
    if config.evaluate is not None:
        yield "evaluate.guidance", config.evaluate.guidance
    if config.rounds is not None:
        yield "rounds.guidance", config.rounds.guidance
