"""Open a model: a diffusers directory, a single-file checkpoint, a LoRA directory of ours, or a Hub id.

The family is read from ``model_index.json`` before any weight is touched or downloaded, so that a model of the wrong
kind is refused at once.
"""

from __future__ import annotations

import hashlib
import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pipelines.adapters import RECORD_NAME
from pipelines.any_pipeline import DiffusersPipeline, is_text_to_image
from pipelines.attention import PROCESSORS
from pipelines.components import (
    INDEX,
    file_digest,
    has_component,
    load_component,
    model_fingerprint,
    parse_dtype,
    read_json,
)
from pipelines.errors import MissingModelError, PipelineError, choose, nearest
from pipelines.flow import FlowOptions
from pipelines.generator import Generator
from pipelines.hub import explained, fetch_file, is_hub_id, local_path, repository
from pipelines.integrity import explain_loading
from pipelines.lora_files import WEIGHTS_NAME, AdapterPath, adapter_file, is_lora_file, with_weight
from pipelines.noise import NoiseProcess
from pipelines.single_file import checkpoint_directory, kind_of
from pipelines.video import VideoOptions

FAMILIES = {
    "StableDiffusionPipeline": "pipelines.families.unet_image:StableDiffusion",
    "StableDiffusionXLPipeline": "pipelines.families.unet_image:StableDiffusionXL",
    "StableDiffusion3Pipeline": "pipelines.families.sd3:StableDiffusion3",
    "FluxPipeline": "pipelines.families.flux:Flux",
    "ZImagePipeline": "pipelines.families.z_image:ZImage",
    "QwenImagePipeline": "pipelines.families.qwen_image:QwenImage",
    "Flux2KleinPipeline": "pipelines.families.flux2:Flux2Klein",
    "AnimateDiffPipeline": "pipelines.families.animatediff:AnimateDiff",
    "CogVideoXPipeline": "pipelines.families.cogvideox:CogVideoX",
    "CogVideoXImageToVideoPipeline": "pipelines.families.cogvideox_image:CogVideoXFromImage",
    "WanPipeline": "pipelines.families.wan:Wan",
    "WanImageToVideoPipeline": "pipelines.families.wan_image:WanFromImage",
    "LTXPipeline": "pipelines.families.ltx:LTX",
}

FEW_STEPS = ("turbo", "lightning", "schnell", "lcm", "dmd", "distilled")
"""Words in the names of models that were distilled to few sampling steps."""
FEW_STEP_SCHEDULERS = ("LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler")


@explain_loading
def load_generator(
    name_or_path: str | Path,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
    adapter: AdapterPath | Sequence[AdapterPath] | None = None,
    attention: str = "sdpa",
    resolve: Callable[[str], str] = str,
    flow: FlowOptions | None = None,
    video: VideoOptions | None = None,
) -> Generator:
    """Load a generator; its family is detected from ``model_index.json``.

    `name_or_path` is a diffusers directory, a single-file checkpoint of Stable Diffusion or FLUX.1, a Hub id
    ``org/name[@revision]``, or what `Generator.save_lora` wrote, which names its own base model (found by way of
    `resolve`). `adapter` is a LoRA file or directory to load on top, or several: ``PATH``, ``PATH:WEIGHT`` or
    ``(path, weight)`` each; they are added up, to that of `name_or_path` too.
    `device` defaults to CUDA where there is one; `attention` is ``"sdpa"`` or ``"xformers"``. `flow` is for flow
    models: size, text length, guidance and training levels; `video` for video models: size, frames and their rate.
    Raises `PipelineError` for a model of an unsupported kind and for `flow` or `video` with a model of another kind,
    `MissingModelError` for a missing one.

    >>> load_generator("assets/shapes-sd", device="cpu").family
    'sd'
    """
    model = _load(name_or_path, dtype, device, adapter, attention, resolve, _family, flow, video)
    assert isinstance(model, Generator)
    return model


@explain_loading
def load_drawer(
    name_or_path: str | Path,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
    adapter: AdapterPath | Sequence[AdapterPath] | None = None,
    resolve: Callable[[str], str] = str,
    image_size: int | None = None,
    video: VideoOptions | None = None,
    flow: FlowOptions | None = None,
) -> Generator | DiffusersPipeline:
    """Load what can draw: a generator as `load_generator` does, or any text-to-image pipeline of diffusers.

    `image_size` is the side of images (or frames) in pixels, by default the model's own, and comes before that
    of `flow`; `video`, which comes before it, and `flow` are those of `load_generator`. Raises `PipelineError` as
    `load_generator` does, for an adapter on a model outside our families, and for a size that the model cannot draw.
    """
    return _load(name_or_path, dtype, device, adapter, "sdpa", resolve, _kind, flow, video, image_size)


@explain_loading
def family_of(name_or_path: str | Path, resolve: Callable[[str], str] = str) -> type[Generator]:
    """Return the family of the model that `load_generator` would load, by its index; no weight is read.

    Of a Hub id the index alone is fetched. Raises `PipelineError` as `load_generator` does.
    """
    name, _ = _base_and_adapters(str(name_or_path), None, resolve)
    return _family(_read(name, INDEX), name)


@explain_loading
def drawer_of(name_or_path: str | Path, resolve: Callable[[str], str] = str) -> type[Generator | DiffusersPipeline]:
    """Return the class of what `load_drawer` would load, by its index; no weight is read."""
    name, _ = _base_and_adapters(str(name_or_path), None, resolve)
    return _kind(_read(name, INDEX), name)


def makes_videos(name_or_path: str | Path, resolve: Callable[[str], str] = str) -> bool:
    """Say whether what `load_drawer` would load makes videos, by its index; no weight is read."""
    return getattr(drawer_of(name_or_path, resolve), "modality", "image") == "video"


@explain_loading
def process_of(name_or_path: str | Path, resolve: Callable[[str], str] = str) -> NoiseProcess | None:
    """Return the noise process of the model that `load_generator` would load, by its scheduler; no weight is read.

    None for a single-file checkpoint, which may not have been converted yet. Of a Hub id the configuration of the
    scheduler alone is fetched. Raises `PipelineError` as `load_generator` does.
    """
    name, _ = _base_and_adapters(str(name_or_path), None, resolve)
    if local_path(name).is_file():
        return None
    index = _read(name, INDEX)
    if local_path(name).is_dir():
        root = local_path(name)
    else:
        with explained(name, "diffusers"):
            root = fetch_file(name, "scheduler/scheduler_config.json").parent.parent
    return NoiseProcess.from_scheduler(load_component(root, index, "scheduler"))


@explain_loading
def distillation(name_or_path: str | Path, resolve: Callable[[str], str] = str) -> str | None:
    """Return what says that the model was distilled to few sampling steps, None where nothing does; no weight is read.

    Such are an index with ``is_distilled`` (FLUX.2 klein), FLUX.1 without an embedded guidance (schnell), a scheduler
    made for distilled models, and a name with a word of `FEW_STEPS`, the model's own or the one that its index keeps.
    A model that says none of it is not found out. Raises `PipelineError` as `load_generator` does.
    """
    name, _ = _base_and_adapters(str(name_or_path), None, resolve)
    index = _read(name, INDEX)
    if index.get("is_distilled"):
        return f"is_distilled in {INDEX}"
    network = _read(name, "transformer/config.json") if index.get("_class_name") == "FluxPipeline" else {}
    if not network.get("guidance_embeds", True):
        return "guidance_embeds false in transformer/config.json, as in FLUX.1-schnell"
    if has_component(index, "scheduler") and index["scheduler"][1] in FEW_STEP_SCHEDULERS:
        return f"its scheduler {index['scheduler'][1]}"
    for given in (Path(name).name, str(index.get("_name_or_path", ""))):
        if words := set(re.split(r"[^a-z]+", given.lower())) & set(FEW_STEPS):
            return f"'{min(words)}' in its name {given}"
    return None


def _read(name: str, file: str) -> dict[str, Any]:
    """Return one JSON file of a model, empty where it is not there; of a Hub id that file alone is fetched."""
    if is_hub_id(name) and not local_path(name).exists():
        with explained(name, "diffusers"):
            return read_json(fetch_file(name, file))
    if local_path(name).is_file():  # not converted for this
        kind = kind_of(local_path(name))
        return {"_class_name": kind.pipeline, "_name_or_path": kind.repo} if file == INDEX else {}
    path = _locate(name, _family)[0] / file
    return read_json(path) if path.exists() or file == INDEX else {}


def _load(
    name_or_path: str | Path,
    dtype: str | torch.dtype,
    device: str | torch.device | None,
    adapter: AdapterPath | Sequence[AdapterPath] | None,
    attention: str,
    resolve: Callable[[str], str],
    kind: Callable[[dict[str, Any], str], Any],
    flow: FlowOptions | None = None,
    video: VideoOptions | None = None,
    image_size: int | None = None,
) -> Generator | DiffusersPipeline:
    torch_dtype = parse_dtype(dtype)
    choose("attention kernel", attention, PROCESSORS)
    name, adapters = _base_and_adapters(str(name_or_path), adapter, resolve)
    root, index = _locate(name, kind)
    found = kind(index, name)
    options: dict[str, Any] = {
        "name_or_path": name,
        "dtype": torch_dtype,
        "device": torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")),
    }
    if video is not None and getattr(found, "modality", "image") != "video":
        raise PipelineError(
            f"{name} is a {index['_class_name']}, which makes images and has no video options (height, width,"
            " frames, fps); remove them."
        )
    if found is DiffusersPipeline:
        if adapters:
            raise PipelineError(
                f"{name} is a {index['_class_name']}, on which adapters are not loaded; merge {adapters[0][0]} into it"
                " with diffusers: pipe.load_lora_weights(A); pipe.fuse_lora(); pipe.save_pretrained(DIR)."
            )
        return DiffusersPipeline(root, index, **options, image_size=image_size)
    if found.modality == "video":
        options["video"] = (video or VideoOptions()).filled(VideoOptions(image_size, image_size))
    elif image_size is not None:
        sized = replace(flow or FlowOptions(), image_size=image_size)
        options |= {"flow": sized} if found.is_flow else {"image_size": image_size}
    if flow is not None:
        if not found.is_flow:
            raise PipelineError(
                f"{name} is a {index['_class_name']}, which has no flow options (size, text length, embedded guidance,"
                " density of training levels); remove them."
            )
        options.setdefault("flow", flow)
    generator: Generator = found(root, index, **options, attention=attention)
    if adapters:
        generator.load_adapter(*adapters)
    return generator


def fingerprint_model(
    name_or_path: str | Path,
    *,
    adapter: AdapterPath | Sequence[AdapterPath] | None = None,
    resolve: Callable[[str], str] = str,
) -> str:
    """Return 32 hex digits that identify the model that `load_generator` would load; nothing is loaded.

    They change with weights, configurations, tokenizer and scheduler, and with nothing else that lies in a directory.
    An adapter counts together with its base model; a Hub id stands for the commit that it resolves to. Raises
    `PipelineError` for a model of an unsupported kind.
    """
    name, adapters = _base_and_adapters(str(name_or_path), adapter, resolve)
    if is_hub_id(name):
        with explained(name, "diffusers"):
            file = fetch_file(name, INDEX)
        _kind(read_json(file), name)
        content = f"{repository(name)[0]}@{file.parent.name}"
    else:
        root, index = _locate(name, _kind)
        _kind(index, name)
        content = model_fingerprint(root, index)
    for path, weight in adapters:
        content += f"+{file_digest(adapter_file(path))}" + (f"*{weight!r}" if weight != 1 else "")
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def is_adapter(path: str | Path) -> bool:
    """Say whether a path is a LoRA, its directory or its file, and no whole model."""
    path = Path(path)
    if path.is_dir():
        return (path / WEIGHTS_NAME).is_file() and not (path / INDEX).is_file()
    return path.suffix == ".safetensors" and path.is_file() and is_lora_file(path)


def _base_and_adapters(
    name: str, given: AdapterPath | Sequence[AdapterPath] | None, resolve: Callable[[str], str]
) -> tuple[str, list[tuple[Path, float]]]:
    """Return the whole model and the adapters, with their weights, that a name and adapters beside it stand for."""
    listed: Any = [] if given is None else [given] if isinstance(given, str | Path | tuple) else given
    adapters = [with_weight(one) for one in listed]
    if not is_adapter(name):
        return name, adapters
    return base_of(Path(name) if Path(name).is_dir() else Path(name).parent, resolve), [(Path(name), 1.0), *adapters]


def base_and_adapter(
    name: str, adapter: str | Path | None, resolve: Callable[[str], str], is_adapter: Callable[[str], bool]
) -> tuple[str, str | Path | None]:
    """Return the whole model and the adapter that a name and an adapter beside it stand for."""
    if not is_adapter(name):
        return name, adapter
    if adapter is not None:
        raise PipelineError(f"{name} is itself an adapter, so adapter={adapter} cannot be loaded too; give one.")
    return base_of(Path(name), resolve), name


def base_of(folder: Path, resolve: Callable[[str], str]) -> str:
    """Return the base model that an adapter directory names: relative to here, or to the directory itself."""
    record = folder / RECORD_NAME
    if not record.is_file():
        raise PipelineError(
            f"{folder} is an adapter without {RECORD_NAME}, so its base model is unknown;"
            f" load the base model and pass adapter={folder}."
        )
    base = read_json(record).get("base_model")
    if not isinstance(base, str):
        raise PipelineError(f"{record} names no base_model; add it, or load the base and pass adapter={folder}.")
    if not Path(base).exists() and (folder / base).is_dir():
        return str(folder / base)
    moved = f"if it moved, write its place as base_model into {record}, or load it and pass adapter={folder}"
    try:
        found = resolve(base)
    except Exception as error:  # of the kind that the caller's `resolve` raises
        raise MissingModelError(
            f"{folder} belongs to the base model '{base}', which is not found ({error}); {moved}."
        ) from error
    if not local_path(found).exists() and not is_hub_id(found):
        raise MissingModelError(f"{folder} belongs to the base model '{base}', which is not there; {moved}.")
    return found


def _locate(name: str, kind: Callable[[dict[str, Any], str], Any]) -> tuple[Path, dict[str, Any]]:
    """Return the local directory and the index of a model, fetching it from the Hub if it is an id."""
    path = local_path(name)
    if path.is_dir():
        if not (path / INDEX).is_file():
            raise _not_a_pipeline(path)
        return path, read_json(path / INDEX)
    if path.is_file():
        root = checkpoint_directory(path)
        return root, read_json(root / INDEX)
    if is_hub_id(name):
        return _fetch(name, kind)
    raise missing_model(path, f"diffusers directory (with {INDEX})")


def missing_model(path: Path, wanted: str) -> MissingModelError:
    """Return the error for a path without a model, with the nearest directory beside it."""
    siblings = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
    return MissingModelError(
        f"no model at {path}; give a {wanted} or a Hub id org/name.{nearest(path.name, siblings)}"
    )


def _fetch(name: str, kind: Callable[[dict[str, Any], str], Any]) -> tuple[Path, dict[str, Any]]:
    from diffusers import DiffusionPipeline

    with explained(name, "diffusers"):
        index = read_json(fetch_file(name, INDEX))
        kind(index, name)
        repo, pinned = repository(name)
        return Path(DiffusionPipeline.download(repo, use_safetensors=True, **pinned)), index


def _family(index: dict[str, Any], name: str) -> type[Generator]:
    """Return the generator class for a pipeline index, or raise an error that names the kind of model."""
    pipeline = str(index.get("_class_name"))
    if pipeline not in FAMILIES:
        drawn = " `generate`, `pairs sample` and `compare` take it." if is_text_to_image(pipeline) else ""
        raise PipelineError(
            f"{name} is a model of the wrong kind: a {pipeline}; supported: {', '.join(FAMILIES)}."
            f"{drawn or nearest(pipeline, FAMILIES)}"
        )
    module, _, attribute = FAMILIES[pipeline].partition(":")
    generator_class: type[Generator] = getattr(importlib.import_module(module), attribute)
    return generator_class.variant(index)


def _kind(index: dict[str, Any], name: str) -> type[Generator] | type[DiffusersPipeline]:
    """Return the generator class for a pipeline index, or `DiffusersPipeline` where diffusers alone can draw."""
    pipeline = index.get("_class_name")
    if str(pipeline) not in FAMILIES and is_text_to_image(pipeline):
        return DiffusersPipeline
    return _family(index, name)


def _not_a_pipeline(path: Path) -> PipelineError:
    """Return an error for a directory that is no diffusers pipeline, by its files."""
    inside = sorted(entry.name for entry in path.iterdir() if (entry / INDEX).is_file())
    if inside:
        return PipelineError(f"{path} is not a model but holds {', '.join(inside)}; did you mean {path / inside[0]}?")
    if (path / "open_clip_config.json").is_file():
        return PipelineError(f"{path} is a model of the wrong kind: an open_clip model, not a diffusers pipeline.")
    if (path / "config.json").is_file():
        config = read_json(path / "config.json")
        kind = config.get("_class_name") or next(iter(config.get("architectures") or []), None) or "single model"
        hint = f"; did you mean {path.parent}?" if (path.parent / INDEX).is_file() else ""
        return PipelineError(
            f"{path} is a model of the wrong kind: a {kind}, not a diffusers pipeline with {INDEX}{hint or '.'}"
        )
    return PipelineError(f"{path} is not a diffusers directory: it has no {INDEX}; give the directory that has one.")
