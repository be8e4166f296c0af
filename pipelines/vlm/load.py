"""Open a vision-language model: a directory in transformers' layout, an adapter of ours, or a Hub id.

The family is read from ``config.json`` before any weight is touched or downloaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pipelines.components import file_digest, fingerprint, parse_dtype, quiet_loading, read_json
from pipelines.errors import MissingDependencyError, PipelineError, choose, nearest
from pipelines.hub import explained, fetch_file, is_hub_id, local_path, repository
from pipelines.integrity import check_files, explain_loading, reason
from pipelines.load import base_and_adapter, base_of, missing_model
from pipelines.vlm.adapters import CONFIG_NAME, PEFT_WEIGHTS, is_vlm_adapter
from pipelines.vlm.families import FAMILIES
from pipelines.vlm.model import VisionLanguageModel

ATTENTION = ("sdpa", "eager", "flash_attention_2")


@explain_loading
def load_vlm(
    name_or_path: str | Path,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
    adapter: str | Path | None = None,
    attention: str = "sdpa",
    resolve: Callable[[str], str] = str,
) -> VisionLanguageModel:
    """Load a vision-language model; its family is detected from ``config.json``.

    `name_or_path` is a directory that ``save_pretrained`` wrote, a Hub id ``org/name[@revision]``, or what
    `VisionLanguageModel.save_lora` wrote, which names its own base model (found by way of `resolve`). `adapter` is an
    adapter directory to load on top. `device` defaults to CUDA where there is one.

    Raises:
        PipelineError: no such model, one of another kind, or an unknown option.
    """
    torch_dtype = parse_dtype(dtype)
    choose("attention kernel", attention, ATTENTION)
    name, adapter = base_and_adapter(str(name_or_path), adapter, resolve, is_vlm_adapter)
    model_class = _model_class(_config(name), name)
    network, processor = _load(model_class, name, torch_dtype, attention)
    network.to(torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
    model = VisionLanguageModel(network, processor, name)
    _check_chat(processor, name)
    if adapter is not None:
        model.load_adapter(adapter)
    return model


def fingerprint_vlm(name_or_path: str | Path, *, resolve: Callable[[str], str] = str) -> str:
    """Return 32 hex digits that identify a model: weights, configurations, tokenizer, chat format.

    A Hub id stands for the commit that it resolves to, an adapter counts together with its base model, which is found
    by way of `resolve`. Nothing is loaded.

    Raises:
        PipelineError: no such model.
    """
    name = str(name_or_path)
    if is_vlm_adapter(name):
        base = fingerprint_vlm(base_of(Path(name), resolve))
        parts = "+".join(file_digest(Path(name) / file) for file in (CONFIG_NAME, PEFT_WEIGHTS))
        return hashlib.sha256(f"{base}+{parts}".encode()).hexdigest()[:32]
    _config(name)
    if not local_path(name).is_dir():
        with explained(name, "transformers"):
            commit = fetch_file(name, "config.json").parent.name
        return hashlib.sha256(f"{repository(name)[0]}@{commit}".encode()).hexdigest()[:32]
    return fingerprint(local_path(name), ["."])


def _config(name: str) -> dict[str, Any]:
    """Return the model's configuration without fetching anything else."""
    path = local_path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            hint = " (it is a diffusers pipeline)" if (path / "model_index.json").is_file() else ""
            raise PipelineError(f"{path} is not a vision-language model: it has no config.json{hint}.")
        return read_json(path / "config.json")
    if not is_hub_id(name):
        raise missing_model(path, "directory with config.json")
    with explained(name, "transformers"):
        return read_json(fetch_file(name, "config.json"))


def _model_class(config: dict[str, Any], name: str) -> Any:
    """Return the class in transformers, or raise an error that names the kind of model."""
    import transformers

    kind = str(config.get("model_type"))
    if kind not in FAMILIES:
        raise PipelineError(
            f"{name} is a model of the wrong kind: {kind}; supported: {', '.join(FAMILIES)}.{nearest(kind, FAMILIES)}"
        )
    wanted = FAMILIES[kind].model_class
    if not hasattr(transformers, wanted):
        raise MissingDependencyError(
            f"{name} needs {wanted}, which transformers {transformers.__version__} lacks: pip install -U transformers"
        )
    return getattr(transformers, wanted)


def _check_chat(processor: Any, name: str) -> None:
    """Refuse a chat format that fails on a message, or leaves its text out."""
    turn = {"role": "user", "content": [{"type": "text", "text": "something to say"}]}
    try:
        written = processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
    except Exception as error:  # the format is a foreign program, run in a sandbox
        raise PipelineError(f"the chat template of {name} fails on a message: {reason(error)}") from error
    if "something to say" not in written:
        raise PipelineError(f"the chat template of {name} leaves out the text of a message; fetch the model again.")


def _load(model_class: Any, name: str, dtype: torch.dtype, attention: str) -> tuple[Any, Any]:
    """Return network and processor; errors name a missing package or missing weights."""
    from transformers import AutoProcessor

    source, pinned = repository(name) if is_hub_id(name) else (str(local_path(name)), {})
    if not is_hub_id(name):
        check_files(Path(source))
    with explained(name, "transformers"):
        try:
            processor = AutoProcessor.from_pretrained(source, trust_remote_code=False, **pinned)
        except ImportError as error:
            reason = " ".join(str(error).split())
            raise MissingDependencyError(f"the processor of {name} needs a package: {reason}") from error
        with quiet_loading():
            network, report = model_class.from_pretrained(
                source,
                dtype=dtype,
                attn_implementation=attention,
                output_loading_info=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # they are refused below
                **pinned,
            )
    mismatched = sorted(key if isinstance(key, str) else key[0] for key in report["mismatched_keys"])
    if mismatched:
        raise PipelineError(
            f"{len(mismatched)} weights of {name} have other shapes than its config.json says, {mismatched[0]} first;"
            " they do not belong together."
        )
    missing = sorted(report["missing_keys"])
    if missing:
        # transformers would continue with random weights.
        raise PipelineError(f"{name} lacks {len(missing)} of the model's weights, {missing[0]} first; fetch it again.")
    return network, processor
