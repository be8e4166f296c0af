"""The parts of a diffusers directory: read its index, load one part, identify its content.

Parts are loaded one by one, so that training can hold the denoiser without the encoders.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from pipelines.errors import MissingModelError, PipelineError, choose
from pipelines.integrity import check_files, check_scheduler, check_tokenizer, read_json, reason

INDEX = "model_index.json"

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


VARIANTS = ("fp16", "bf16", "non_ema")
"""Variants of weights, the preferred one first, which are read where the plain weights are not there."""


CLASSES = {
    "unet": ("UNet2DConditionModel", "UNetMotionModel"),
    "motion_adapter": ("MotionAdapter",),
    "vae": (
        *("AutoencoderKL", "AutoencoderTiny", "AutoencoderKLQwenImage", "AutoencoderKLFlux2"),
        *("AutoencoderKLWan", "AutoencoderKLLTXVideo", "AutoencoderKLCogVideoX"),
    ),
    "transformer": (
        *(f"{kind}Transformer2DModel" for kind in ("SD3", "Flux", "ZImage", "QwenImage", "Flux2")),
        *("WanTransformer3DModel", "LTXVideoTransformer3DModel", "CogVideoXTransformer3DModel"),
    ),
    "text_encoder": (
        *("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel", "UMT5EncoderModel"),
        *("Qwen3Model", "Qwen3ForCausalLM", "Qwen2_5_VLForConditionalGeneration"),
    ),
    "image_encoder": ("CLIPVisionModel",),
    "image_processor": ("CLIPImageProcessor", "CLIPImageProcessorFast"),
    "tokenizer": tuple(f"{kind}Tokenizer{fast}" for kind in ("CLIP", "T5", "Qwen2") for fast in ("", "Fast")),
}
"""The classes of the components of our families, those of a second and third encoder included."""


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Return the torch dtype for a name such as ``"bf16"``; a dtype passes through."""
    return dtype if isinstance(dtype, torch.dtype) else DTYPES[choose("dtype", dtype, DTYPES)]


def component_config(root: Path, name: str) -> dict[str, Any]:
    """Return the configuration of one component without loading its weights."""
    return read_json(root / name / "config.json")


def has_component(index: dict[str, Any], name: str) -> bool:
    """Say whether a ``model_index.json`` lists a component (absent ones are written as ``[null, null]``)."""
    entry = index.get(name)
    return isinstance(entry, list) and len(entry) == 2 and all(entry)


def load_component(root: Path, index: dict[str, Any], name: str, dtype: torch.dtype | None = None) -> Any:
    """Load one component of a diffusers directory by the class that ``model_index.json`` names.

    Weights come from safetensors only (the plain files, or a variant such as fp16 where that is all there is). Pass
    `dtype` for networks; schedulers and tokenizers take none.
    """
    if not has_component(index, name):
        raise PipelineError(f"{root / INDEX} lists no '{name}', which this kind of model needs.")
    component_class = _component_class(root, index, name)
    options: dict[str, Any] = {}
    if dtype is not None:
        variant = _variant(root / name)
        key = "dtype" if index[name][0] == "transformers" else "torch_dtype"
        options = {key: dtype, "use_safetensors": True, **({"variant": variant} if variant else {})}
    elif not (root / name).is_dir():
        raise MissingModelError(f"{root / name} is missing; the model directory is incomplete, fetch it again.")
    try:
        check_files(root / name)
    except PipelineError as error:
        raise PipelineError(f"cannot load '{name}': {error}") from None
    if dtype is not None:
        component_config(root, name)
    if name == "scheduler":
        check_scheduler(root / name / "scheduler_config.json")
    with quiet_loading():
        try:
            component = component_class.from_pretrained(str(root / name), **options)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # the libraries raise anything where a configuration is wrong
            files = ", ".join(path.name for path in sorted((root / name).glob("*.json")))
            raise PipelineError(f"cannot load '{name}' from {root / name} ({files}): {reason(error)}") from error
    if name.startswith("tokenizer"):
        check_tokenizer(component, root / name)
    return component.eval() if isinstance(component, torch.nn.Module) else component


def _component_class(root: Path, index: dict[str, Any], name: str) -> Any:
    """Return the class that the index names for a component; one of the kind that components of that name are."""
    library, class_name = index[name]
    where = f"{root / INDEX} names {library}.{class_name} as '{name}'"
    if library not in ("diffusers", "transformers"):
        raise PipelineError(
            f"{where}; components are classes of diffusers and transformers, and no other code is run."
        )
    found = getattr(importlib.import_module(library), str(class_name), None)
    if found is None:
        raise PipelineError(f"{where}, and {library} has no such class; upgrade {library}.")
    role = name.removesuffix("_2").removesuffix("_3")
    if role in CLASSES and str(class_name) not in CLASSES[role]:
        raise PipelineError(f"{where}; supported: {', '.join(CLASSES[role])}.")
    if not (isinstance(found, type) and hasattr(found, "from_pretrained")):
        raise PipelineError(f"{where}, which is not a class that can be loaded; fetch the model again.")
    return found


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a component: without variant if there are any, else all."""
    files = sorted(folder.glob("*.safetensors"))
    return [file for file in files if _variant_of(file) is None] or files


def fingerprint(root: Path, names: Iterable[str]) -> str:
    """Return 32 hex digits that identify the content of some components: configurations, vocabularies and weights.

    Bookkeeping keys (paths and library versions) do not count, so a copy of a model has the id of the original; nor
    does anything beside the components, such as logs and checkpoints.
    """
    digest = hashlib.sha256()
    for name in sorted(names):
        if not (root / name).is_dir():
            raise MissingModelError(f"{root / name} is missing; the model directory is incomplete, fetch it again.")
        for file in sorted(
            path for path in (root / name).iterdir() if path.suffix in (".json", ".txt", ".model", ".jinja")
        ):
            content = file.read_bytes()
            if file.name in ("config.json", "scheduler_config.json"):
                content = _without_bookkeeping(read_json(file))
            digest.update(f"{name}/{file.name}:{hashlib.sha256(content).hexdigest()};".encode())
        for file in weight_files(root / name):
            digest.update(f"{file.stat().st_size}:{file_digest(file)};".encode())
    return digest.hexdigest()[:32]


def model_fingerprint(root: Path, index: dict[str, Any]) -> str:
    """Return 32 hex digits that identify a whole model: its parsed index and every component that is there."""
    names = [name for name in index if has_component(index, name) and (root / name).is_dir()]
    return hashlib.sha256(_without_bookkeeping(index) + fingerprint(root, names).encode()).hexdigest()[:32]


def file_digest(file: Path) -> str:
    """Return the SHA-256 of a file, computed once per process as long as its size and time of change stay the same."""
    status = file.stat()
    return _sha256(str(file.resolve()), status.st_size, status.st_mtime_ns)


@cache
def _sha256(path: str, size: int, modified: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _without_bookkeeping(config: dict[str, Any]) -> bytes:
    return json.dumps({k: v for k, v in config.items() if not _is_bookkeeping(k)}, sort_keys=True).encode()


def _is_bookkeeping(key: str) -> bool:
    return (key.startswith("_") and key != "_class_name") or key in ("transformers_version", "dtype", "torch_dtype")


def _variant_of(file: Path) -> str | None:
    """Return the variant in the name of a weight file, whole (`model.fp16.safetensors`) or a shard of one."""
    name = re.sub(r"-\d{5}-of-\d{5}$", "", file.name.removesuffix(".safetensors"))
    return next((part for part in name.split(".")[1:] if part in VARIANTS), None)


def weight_variant(folder: Path) -> str | None:
    """Return the variant of a component's weights where the plain ones are not there."""
    held = {_variant_of(file) for file in weight_files(folder)}
    return next((variant for variant in VARIANTS if variant in held), None) if None not in held else None


def _variant(folder: Path) -> str | None:
    """Return the weight variant to ask for, checking that there are safetensors at all."""
    if not folder.is_dir():
        raise MissingModelError(f"{folder} is missing; the model directory is incomplete, fetch it again.")
    if not weight_files(folder):
        raise PipelineError(
            f"{folder} holds no safetensors; only safetensors are read, so convert it:"
            " DiffusionPipeline.from_pretrained(DIR).save_pretrained(DIR, safe_serialization=True)."
        )
    return weight_variant(folder)


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Hide the libraries' progress bars, of saving too, and diffusers' false alarm about a key in AutoencoderTiny."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    logger = logging.getLogger("diffusers.configuration_utils")
    bars = [library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()]

    def keep(record: logging.LogRecord) -> bool:
        return "block_out_channels" not in record.getMessage()

    for library in bars:
        library.disable_progress_bar()
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
        for library in bars:
            library.enable_progress_bar()
