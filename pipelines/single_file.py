"""Single-file checkpoints of Stable Diffusion and FLUX.1, converted once, by diffusers, into a cached directory.

Such a file holds weights alone. Tokenizer, scheduler and configurations come from a local directory: the one beside
the file that has its name without the suffix, or the Hub's cache. Text encoders that a file of SD3 or FLUX.1 lacks, as
most do, come from there too, and so does the autoencoder. Nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipelines.components import INDEX, file_digest, has_component, load_component, quiet_loading, read_json
from pipelines.errors import PipelineError
from pipelines.lora_files import tensor_names
from pipelines.saving import replacing_parts


class Kind(NamedTuple):
    """A kind of checkpoint, the pipeline that it makes, and the repository that has its configuration."""

    name: str
    pipeline: str
    repo: str


UNETS = {
    "conditioner.embedders.1.": Kind(
        "Stable Diffusion XL", "StableDiffusionXLPipeline", "stabilityai/stable-diffusion-xl-base-1.0"
    ),
    "cond_stage_model.transformer.": Kind(
        "Stable Diffusion 1", "StableDiffusionPipeline", "stable-diffusion-v1-5/stable-diffusion-v1-5"
    ),
    "cond_stage_model.model.": Kind(
        "Stable Diffusion 2", "StableDiffusionPipeline", "stabilityai/stable-diffusion-2-1"
    ),
}
"""How the names of a UNet's text encoder begin -> the kind of its checkpoint."""
NETWORK = "model.diffusion_model."
CLIPS = ("text_encoders.clip_l.", "text_encoders.clip_g.")
T5 = "text_encoders.t5xxl."
HELD = {
    "StableDiffusion3Pipeline": {"text_encoder": CLIPS[0], "text_encoder_2": CLIPS[1], "text_encoder_3": T5},
    "FluxPipeline": {"text_encoder": CLIPS[0], "text_encoder_2": T5},
}
"""How the tensors of each text encoder begin, where the file has it."""
VAES = ("first_stage_model.", "vae.")
CONFIGURATION = ("*.json", "*.txt", "*.model")
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.bfloat16, "F8_E5M2": torch.bfloat16}


def checkpoint_directory(file: Path) -> Path:
    """Return the diffusers directory of a single-file checkpoint, which is made at the first call.

    It lies in ``$XDG_CACHE_HOME/mmalign/single-file`` (``~/.cache``), under a name made of the content of the
    checkpoint and of its configuration.

    Raises:
        PipelineError: the file is no such checkpoint, its configuration is not on this machine, or does not fit.
    """
    kind = kind_of(file)
    config = _configuration(file, kind)
    digest = hashlib.sha256(file_digest(file).encode())
    weights = [one for name in _beside(file, kind, config) for one in (config / name).glob("*.safetensors")]
    found = (path for pattern in CONFIGURATION for path in config.rglob(pattern) if path.is_file())
    for part in sorted({*found, *weights}):
        digest.update(f"{part.relative_to(config)}:{file_digest(part)};".encode())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    folder = cache / "mmalign" / "single-file" / f"{file.stem[:60]}-{digest.hexdigest()[:16]}"
    if not (folder / INDEX).is_file():
        _convert(file, kind, config, folder)
    return folder


def kind_of(file: Path) -> Kind:
    """Return the kind of a checkpoint, by the names of its tensors.

    Raises:
        PipelineError: it is none of those that are supported.
    """
    if file.suffix != ".safetensors":
        raise PipelineError(f"{file} is not safetensors; only safetensors checkpoints are read, convert it first.")
    names = tensor_names(file)
    if (transformer := _transformer({name.removeprefix(NETWORK) for name in names})) is not None:
        return transformer
    if any(name.startswith(NETWORK) for name in names):
        for start, kind in UNETS.items():
            if any(name.startswith(start) for name in names):
                return kind
    raise PipelineError(
        f"{file} is no single-file checkpoint of Stable Diffusion 1, 2 or XL with its text encoder, of Stable"
        " Diffusion 3 or of FLUX.1; give a diffusers directory."
    )


def _transformer(names: set[str]) -> Kind | None:
    """Return the kind of a flow transformer by the names of its tensors, None for any other network."""
    if "joint_blocks.0.x_block.attn.qkv.weight" in names:
        large = "joint_blocks.37.x_block.attn.qkv.weight" in names
        medium = "joint_blocks.0.x_block.attn2.qkv.weight" in names
        repo = "3.5-large" if large else "3.5-medium" if medium else "3-medium-diffusers"
        return Kind("Stable Diffusion 3", "StableDiffusion3Pipeline", f"stabilityai/stable-diffusion-{repo}")
    if {"double_blocks.0.img_attn.norm.key_norm.scale", "vector_in.in_layer.weight"} <= names:
        repo = "FLUX.1-dev" if "guidance_in.in_layer.weight" in names else "FLUX.1-schnell"
        return Kind("FLUX.1", "FluxPipeline", f"black-forest-labs/{repo}")
    return None


def _configuration(file: Path, kind: Kind) -> Path:
    beside = file.with_suffix("")
    if (beside / INDEX).is_file():
        return beside
    from huggingface_hub import snapshot_download

    try:
        found = Path(snapshot_download(kind.repo, allow_patterns=list(CONFIGURATION), local_files_only=True))
    except (OSError, ValueError):
        found = beside
    if (found / INDEX).is_file():
        if kind.name == "Stable Diffusion 2":
            warnings.warn(
                f"{file} is read as {kind.repo} is configured, with v-prediction at 768 pixels; for a checkpoint of"
                f" another base put its configuration into {beside}.",
                stacklevel=3,
            )
        return found
    patterns = " ".join(f"--include '{pattern}'" for pattern in CONFIGURATION)
    raise PipelineError(
        f"{file} is a {kind.name} checkpoint, whose configuration and tokenizer are not on this machine; fetch them"
        f" once: `hf download {kind.repo} {patterns} --local-dir {beside}`."
    )


def _beside(file: Path, kind: Kind, config: Path) -> list[str]:
    """Return the networks that the file lacks and that lie with its configuration, T5 of SD3 only if it does.

    Raises:
        PipelineError: one lies at neither place.
    """
    if kind.pipeline not in HELD:
        return []
    names, index = tensor_names(file), read_json(config / INDEX)
    held: dict[str, tuple[str, ...]] = {part: (start,) for part, start in HELD[kind.pipeline].items()}
    lacking = [part for part, starts in {**held, "vae": VAES}.items() if not any(n.startswith(starts) for n in names)]
    with_weights = [part for part in lacking if any((config / part).glob("*.safetensors"))]
    for part in lacking:
        if part not in with_weights and part != "text_encoder_3" and has_component(index, part):
            raise PipelineError(
                f"{file} holds no '{part}', and neither does {config}; fetch it once: `hf download {kind.repo}"
                f" --include '{part}/*' --local-dir {file.with_suffix('')}`."
            )
    return with_weights


def _convert(file: Path, kind: Kind, config: Path, folder: Path) -> None:
    import diffusers

    index = read_json(config / INDEX)
    if index.get("_class_name") != kind.pipeline:
        raise PipelineError(
            f"{config} configures a {index.get('_class_name')}, which {file} is not; give the configuration of its"
            " kind."
        )
    dtype = _dtype(file)
    beside = {part: load_component(config, index, part, dtype) for part in _beside(file, kind, config)}
    options: dict[str, Any] = {"config": str(config), "local_files_only": True, "torch_dtype": dtype, **beside}
    if kind.pipeline == "StableDiffusion3Pipeline" and not (
        "text_encoder_3" in beside or any(name.startswith(T5) for name in tensor_names(file))
    ):
        options |= {"text_encoder_3": None, "tokenizer_3": None}
    with quiet_loading(), replacing_parts(folder, INDEX) as scratch:
        try:
            pipe = getattr(diffusers, kind.pipeline).from_single_file(str(file), **options)
        except Exception as error:  # diffusers lets KeyErrors and its own kinds through
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise PipelineError(f"{file} does not fit the configuration {config}: {reason}") from error
        pipe.save_pretrained(scratch, safe_serialization=True)


def _dtype(file: Path) -> torch.dtype:
    """Return the type of the checkpoint's network, so that half precision takes no more room than before."""
    from safetensors import safe_open

    with safe_open(str(file), "pt") as opened:
        names = list(opened.keys())
        if any(name.endswith(("scale_weight", "scaled_fp8")) for name in names):
            raise PipelineError(f"{file} is quantised with scales of its own, which are not read; give a bf16 file.")
        own = [name for name in names if name.startswith(NETWORK)] or names
        return _DTYPES.get(opened.get_slice(own[0]).get_dtype(), torch.float32)
