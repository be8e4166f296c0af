"""The family of a run's generator: recipes that it cannot train are refused before a weight is read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mmalign.config.flow import FlowConfig
from mmalign.core.errors import UserError
from mmalign.core.resources import resolve_model
from mmalign.data.prompts import check_first_frames, load_prompts
from mmalign.methods import methods
from mmalign.training.recipe import build_method
from pipelines.load import distillation, family_of, process_of

if TYPE_CHECKING:
    from mmalign.config.run import RunConfig
    from mmalign.methods.base import Method
    from pipelines import Generator, NoiseProcess
    from pipelines.flow import FlowOptions


def flow_family(config: RunConfig, path: str) -> type[Generator] | None:
    """Return the family of the model at `path` if it is a flow model; reads its index alone.

    Raises:
        UserError: it is none, and the recipe has a section `flow`. PipelineError: a model of an unsupported kind.
    """
    family = family_of(path, resolve_model)
    if family.is_flow:
        return family
    if config.flow is not None:
        raise UserError(
            f"flow: is for flow models (SD3, FLUX, Z-Image, Qwen-Image), and {config.model} is none of these;"
            " remove it"
        )
    return None


def flow_options(config: RunConfig, path: str) -> FlowOptions | None:
    """Return the recipe's choices for the flow model at `path`, None for a model of another kind."""
    if flow_family(config, path) is None:
        return None
    return (config.flow or FlowConfig()).options(config.data.resolution)


def check_family(config: RunConfig) -> None:
    """Refuse a recipe that the model, or its family, cannot train.

    Raises:
        UserError: names the key and the fix. PipelineError: a model of an unsupported kind.
    """
    path = resolve_model(config.model)
    _check_modality(config, family_of(path, resolve_model))
    family = flow_family(config, path)
    if family is not None:
        _check_flow(config, family)
    _check_distillation(config, path)
    if family is None and (process := process_of(path, resolve_model)) is not None:
        check_process(build_method(config), process, config.model)


def _check_modality(config: RunConfig, family: type[Generator]) -> None:
    _check_first_frame(config, family)
    if family.modality == "video" and config.video is None:
        raise UserError(
            f"model {config.model} makes videos ('{family.family}'); give a section video, such as video:"
            " {frames: 33, height: 240, width: 416}, or video: {} for its own geometry"
        )
    if family.modality == "video" and not methods.get(config.method_name).needs.video:
        raise UserError(
            f"method.name '{config.method_name}' does not train video models, and {config.model} is one"
            f" ('{family.family}'); choose another method or model"
        )
    if family.modality != "video" and config.video is not None:
        raise UserError(
            f"video: is for video models, and {config.model} makes images ('{family.family}'); remove the section"
        )


def _check_first_frame(config: RunConfig, family: type[Generator]) -> None:
    """Refuse what gives a model of image to video no first frame, and first frames for any other."""
    asked, model = config.data.first_frame, config.model
    if asked and not family.takes_first_frame:
        raise UserError(
            f"data.first_frame: model {model} ('{family.family}') is not made of an image and a text; remove it"
        )
    if not (asked or family.needs_first_frame):
        return
    if asked is False:
        raise UserError(f"data.first_frame false: model {model} makes no videos without one; remove it")
    if config.rounds is not None:
        raise UserError(
            f"rounds: draw videos of prompts alone, and model {model} makes them of a first frame each; learn from"
            " stored videos (data.pairs, data.labels) or from data.prompts with first frames"
        )
    column = "in a table with a column first_frame"
    if config.data.prompts is not None:
        prompts = load_prompts(str(config.data.prompts), config.data.limit)
        check_first_frames(prompts, model, True, f"give data.prompts {column}")
    if config.evaluate is not None:
        prompts = load_prompts(str(config.evaluate.prompts), config.evaluate.limit)
        fix = f"give evaluate.prompts {column}, or set evaluate: null"
        check_first_frames(prompts, model, family.needs_first_frame, fix)


def check_process(method: Method[Any], process: NoiseProcess, model: str) -> None:
    """Refuse a noise process that the method does not train, or with these options; a U-Net may be a flow model too.

    Raises:
        UserError: names the key and the fix.
    """
    if process.prediction == "flow" and not method.needs.flow:
        raise UserError(
            f"method.name '{method.name}' does not train flow models, and {model} is one; choose another method or"
            " model"
        )
    method.check(process)


def _check_flow(config: RunConfig, family: type[Generator]) -> None:
    if not methods.get(config.method_name).needs.flow:
        raise UserError(
            f"method.name '{config.method_name}' does not train flow models, and {config.model} is one"
            f" ('{family.family}'); choose another method or model"
        )
    for key, scale in _guidance_scales(config):
        if family.guidance_inside and scale != 1:
            raise UserError(
                f"{key} {scale:g}: '{family.family}' models have guidance distilled into them and are sampled without"
                f" classifier-free guidance; set {key}: 1.0 (their own scale is flow.embedded_guidance)"
            )


def _check_distillation(config: RunConfig, path: str) -> None:
    """Refuse to train a model that samples in few steps on its own samples, unless the recipe allows it."""
    online = methods.get(config.method_name).needs.source == "prompts" or config.rounds is not None
    if not online or config.allow_distilled:
        return
    if evidence := distillation(path, resolve_model):
        raise UserError(
            f"model {config.model} was distilled to few sampling steps ({evidence}), which training on its own samples"
            " undoes; train its base model, or set allow_distilled: true"
        )


def _guidance_scales(config: RunConfig) -> Iterator[tuple[str, float]]:
    for key in ("guidance", "reference_guidance"):
        if key in config.method_options:
            yield f"method.{key}", config.method_options[key]
    if config.evaluate is not None:
        yield "evaluate.guidance", config.evaluate.guidance
    if config.rounds is not None:
        yield "rounds.guidance", config.rounds.guidance
