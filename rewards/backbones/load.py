"""Load an encoder: a model of open_clip, or a CLIP, SigLIP or ALIGN of transformers."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from rewards.backbones.encoder import Encoder
from rewards.backbones.preprocess import MODES
from rewards.errors import RewardError, choices


def check_mode(preprocessing: str) -> str:
    """Return the name of a preprocessing mode, or raise a `RewardError` with the allowed names."""
    if preprocessing not in MODES:
        raise RewardError(f"preprocessing {preprocessing!r} is unknown; {choices(preprocessing, MODES)}")
    return preprocessing


def load_encoder(
    weights: str | PathLike[str] | None, *, model: str | None = None, pretrained: str | None = None
) -> Encoder:
    """Load the encoder that `weights` names, or else open_clip's `model` with its tag `pretrained`.

    weights: a directory in open_clip's or transformers' layout; a weights file for open_clip's `model`;
    `hf-hub:org/name` for open_clip, `org/name` for transformers. Raises `RewardError` for anything else.
    """
    from rewards.backbones.hf_encoder import load_hf_encoder
    from rewards.backbones.open_clip_encoder import HUB, load_open_clip

    path = None if weights is None else Path(weights).expanduser()
    given = str(weights)
    if path is None or path.is_file() or given.startswith(HUB) or (path / "open_clip_config.json").is_file():
        return load_open_clip(weights, model=model, pretrained=pretrained)
    if model is not None or pretrained is not None:
        raise RewardError(f"weights {given!r} name a whole model; remove model= and pretrained=")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise RewardError(f"{path} is not a model; it needs open_clip_config.json, or transformers' config.json")
        return load_hf_encoder(path)
    if given.count("/") != 1 or path.is_absolute():
        raise RewardError(
            f"weights {given!r}: no such directory or file; allowed: a directory of open_clip or transformers, a "
            f"weights file (with model=), or a model of the hub, 'hf-hub:org/name' for open_clip, 'org/name' for "
            "transformers"
        )
    try:
        return load_hf_encoder(given)
    except RewardError as error:
        raise RewardError(f"weights {given!r}: no such local directory or file; as a hub id: {error}") from error


def load_preset(weights: str | PathLike[str] | None, *, model: str, pretrained: str | None) -> Encoder:
    """Load the model that `weights` names (a file belongs to open_clip's `model`), or else `model` with its tag.

    Raises `RewardError` as `load_encoder`.
    """
    if weights is None:
        return load_encoder(None, model=model, pretrained=pretrained)
    return load_encoder(weights, model=model if Path(weights).expanduser().is_file() else None)
