"""Full checkpoints of large models: a directory or hub repository, its shards, and a transformers model from them.

A reward whose published names are not those of a transformers class reads the tensors here, renames them itself, and
has the class built straight from them: there is no random initialisation, which would take minutes at 7 B.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewards.backbones.weights import read_state
from rewards.errors import RewardError

BESIDES = ("*.json", "*.jinja", "*.model", "*.txt")  # configurations, chat templates, tokenizers
FORMATS = ("model.safetensors", "pytorch_model.bin")


def locate_directory(source: str | PathLike[str], weights: Iterable[str] = ()) -> Path:
    """Return a local directory, or download a hub repository: `BESIDES` and the file patterns in `weights`.

    Raises:
        RewardError: there is no such directory, or the repository cannot be fetched.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or str(source).startswith(("~", ".")):
        raise RewardError(f"{source}: no such directory; give a model's directory, or its hub repository as org/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=[*BESIDES, *weights]))
    except Exception as error:  # the hub's own exceptions differ from version to version
        reason = " ".join(str(error).split())[:200]
        raise RewardError(f"cannot fetch {source}: {reason}; or give the directory of a local copy") from error


def read_checkpoint(source: str | PathLike[str]) -> dict[str, Tensor]:
    """Read all weights of a checkpoint in transformers' layout, in one file or in shards; safetensors preferred.

    Raises:
        RewardError: there are no weights, a shard is missing, or a file is damaged or not plain weights.
    """
    for name in FORMATS:
        directory = locate_directory(source, [f"*{Path(name).suffix}"])
        index = directory / f"{name}.index.json"
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        elif (directory / name).is_file():
            shards = [name]
        else:
            continue
        state: dict[str, Tensor] = {}
        for shard in shards:
            if not (directory / shard).is_file():
                raise RewardError(f"{directory}: {shard} is missing, which {index.name} lists")
            state |= read_state(directory / shard)
        return state
    raise RewardError(f"{source} has no weights; {' or '.join(FORMATS)} is expected, or shards with an index")


def build(cls: Any, config: Any, state: Mapping[str, Tensor], source: object, dtype: torch.dtype) -> Any:
    """Build a model of a transformers class from weights under its own names.

    Raises:
        RewardError: lists missing and unexpected weights, and those of another shape.
    """
    from transformers.utils import logging

    with torch.device("meta"):
        wanted = {name: value.shape for name, value in cls(config).state_dict().items()}
    other = [
        f"{name} {list(value.shape)} instead of {list(wanted[name])}"
        for name, value in state.items()
        if name in wanted and value.shape != wanted[name]
    ]
    if other:
        raise _another_model(source, {"has other shapes for": other})
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, info = cls.from_pretrained(
            None, config=config, state_dict=dict(state), dtype=dtype, output_loading_info=True
        )
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
    if info["missing_keys"] or info["unexpected_keys"]:
        problems = {"lacks": sorted(info["missing_keys"]), "has unknown": sorted(info["unexpected_keys"])}
        raise _another_model(source, problems)
    return model.eval()


def _another_model(source: object, problems: Mapping[str, list[str]]) -> RewardError:
    said = [
        f"{what} {', '.join(names[:6])}" + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        for what, names in problems.items()
        if names
    ]
    return RewardError(f"{source}: {'; '.join(said)}: these are the weights of another model")
