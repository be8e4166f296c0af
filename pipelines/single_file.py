"""Single-file checkpoints of Stable Diffusion 1, 2 and XL, converted once, by diffusers, into a cached directory.

Such a file holds weights alone. Tokenizer, scheduler and configurations come from a local directory: the one beside
the file that has its name without the suffix, or the Hub's cache. Nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from pathlib import Path
from typing import Any

import torch

from pipelines.components import INDEX, file_digest, quiet_loading, read_json
from pipelines.errors import PipelineError
from pipelines.lora_files import tensor_names
from pipelines.saving import replacing_parts

KINDS = {
    "conditioner.embedders.1.": ("Stable Diffusion XL", "stabilityai/stable-diffusion-xl-base-1.0"),
    "cond_stage_model.transformer.": ("Stable Diffusion 1", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
    "cond_stage_model.model.": ("Stable Diffusion 2", "stabilityai/stable-diffusion-2-1"),
}
"""How the names of a checkpoint's text encoder begin -> its kind, and the repository that has its configuration."""
CONFIGURATION = ("*.json", "*.txt")
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}


def checkpoint_directory(file: Path) -> Path:
    """Return the diffusers directory of a single-file checkpoint, which is made at the first call.

    It lies in ``$XDG_CACHE_HOME/mmalign/single-file`` (``~/.cache``), under a name made of the content of the
    checkpoint and of its configuration.

    Raises:
        PipelineError: the file is no such checkpoint, its configuration is not on this machine, or does not fit.
    """
    kind, repo = _kind(file)
    config = _configuration(file, kind, repo)
    digest = hashlib.sha256(file_digest(file).encode())
    for part in sorted(path for pattern in CONFIGURATION for path in config.rglob(pattern) if path.is_file()):
        digest.update(f"{part.relative_to(config)}:{file_digest(part)};".encode())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    folder = cache / "mmalign" / "single-file" / f"{file.stem[:60]}-{digest.hexdigest()[:16]}"
    if not (folder / INDEX).is_file():
        _convert(file, config, folder)
    return folder


def _kind(file: Path) -> tuple[str, str]:
    if file.suffix != ".safetensors":
        raise PipelineError(f"{file} is not safetensors; only safetensors checkpoints are read, convert it first.")
    names = tensor_names(file)
    if any(name.startswith("model.diffusion_model.") for name in names):
        for start, kind in KINDS.items():
            if any(name.startswith(start) for name in names):
                return kind
    raise PipelineError(
        f"{file} is no single-file checkpoint of Stable Diffusion 1, 2 or XL with its text encoder; give a diffusers"
        " directory."
    )


def _configuration(file: Path, kind: str, repo: str) -> Path:
    beside = file.with_suffix("")
    if (beside / INDEX).is_file():
        return beside
    from huggingface_hub import snapshot_download

    try:
        found = Path(snapshot_download(repo, allow_patterns=list(CONFIGURATION), local_files_only=True))
    except (OSError, ValueError):
        found = beside
    if (found / INDEX).is_file():
        if kind == "Stable Diffusion 2":
            warnings.warn(
                f"{file} is read as {repo} is configured, with v-prediction at 768 pixels; for a checkpoint of"
                f" another base put its configuration into {beside}.",
                stacklevel=3,
            )
        return found
    raise PipelineError(
        f"{file} is a {kind} checkpoint, whose configuration and tokenizer are not on this machine; fetch them once:"
        f" `hf download {repo} --include '*.json' --include '*.txt' --local-dir {beside}`."
    )


def _convert(file: Path, config: Path, folder: Path) -> None:
    import diffusers

    name = str(read_json(config / INDEX).get("_class_name"))
    if name not in ("StableDiffusionPipeline", "StableDiffusionXLPipeline"):
        raise PipelineError(f"{config} configures a {name}, which {file} is not; give the configuration of its kind.")
    options: dict[str, Any] = {"config": str(config), "local_files_only": True, "torch_dtype": _dtype(file)}
    with quiet_loading(), replacing_parts(folder, INDEX) as scratch:
        try:
            pipe = getattr(diffusers, name).from_single_file(str(file), **options)
        except Exception as error:  # diffusers lets KeyErrors and its own kinds through
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise PipelineError(f"{file} does not fit the configuration {config}: {reason}") from error
        pipe.save_pretrained(scratch, safe_serialization=True)


def _dtype(file: Path) -> torch.dtype:
    """Return the type of the checkpoint's UNet, so that half precision takes no more room than before."""
    from safetensors import safe_open

    with safe_open(str(file), "pt") as opened:
        name = next(name for name in opened.keys() if name.startswith("model.diffusion_model."))  # noqa: SIM118
        return _DTYPES.get(opened.get_slice(name).get_dtype(), torch.float32)
