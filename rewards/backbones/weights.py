"""Published weights: find or download a file, read it without running code, and load it into a module.

A reward names its files as :class:`Weights`, on the Hugging Face hub or in a GitHub repository; the user may give a
path instead. Missing or unexpected weights, or weights of another shape, are an error: an incomplete checkpoint would
give plausible scores.
"""

from __future__ import annotations

import hashlib
import os
import urllib.parse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewards.errors import RewardError

GITHUB = "https://raw.githubusercontent.com"


@dataclass(frozen=True)
class Weights:
    """One published file: hub repository, its name there, revision, and its SHA-256 where known.

    `host`: the root below which `repo/revision/file` is found, for files that are not on the Hugging Face hub.
    """

    repo: str
    file: str
    revision: str = "main"
    sha256: str | None = None
    host: str = ""

    def __str__(self) -> str:
        """Return `org/name:file`, with the revision where it is pinned."""
        return f"{self.repo}:{self.file}" + ("" if self.revision == "main" else f"@{self.revision}")


def locate(published: Weights, given: str | PathLike[str] | None = None) -> Path:
    """Return a local file: `given` (the file, or a directory that holds one of its name), or else a download.

    Raises:
        RewardError: the file does not exist, cannot be downloaded, or has another SHA-256.
    """
    if given is not None:
        path = Path(given).expanduser()
        path = path / published.file if path.is_dir() else path
        if not path.is_file():
            raise RewardError(f"weights {str(given)!r}: no such file; give {published.file} or its directory")
        return path
    try:
        path = _fetch(published)
    except Exception as error:  # the hub's own exceptions differ from version to version
        reason = " ".join(str(error).split())[:200]
        raise RewardError(f"cannot fetch {published}: {reason}; or give weights=PATH of a copy") from error
    if published.sha256 and sha256(path) != published.sha256:
        raise RewardError(f"{path}: its SHA-256 is not that of {published}; remove the file to download it again")
    return path


def _fetch(published: Weights) -> Path:
    if not published.host:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(published.repo, published.file, revision=published.revision))
    below = f"{published.repo}/{published.revision}/{published.file}"
    path = Path(torch.hub.get_dir()) / "mmalign" / below
    if not path.is_file():
        if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
            raise ConnectionError("not fetched before, and HF_HUB_OFFLINE forbids to")
        path.parent.mkdir(parents=True, exist_ok=True)
        url = f"{published.host}/{urllib.parse.quote(below)}"
        torch.hub.download_url_to_file(url, str(path), published.sha256, progress=False)
    return path


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_state(path: Path, unwrap: Iterable[str] = ("state_dict", "model", "module")) -> dict[str, Tensor]:
    """Read a state dict on the CPU: safetensors, or a torch file from which only tensors are taken (no code runs).

    A file that holds the state dict under one of the keys `unwrap` is unwrapped.

    Raises:
        RewardError: the file is damaged, or needs code to be read.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling and safetensors raise their own types
        reason = " ".join(str(error).split())[:200]
        raise RewardError(f"{path}: not readable as plain weights ({reason})") from error
    for key in unwrap:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise RewardError(f"{path}: holds no state dict (a mapping of names to tensors)")
    return dict(content)


def load_state(
    module: nn.Module,
    state: Mapping[str, Tensor],
    source: object,
    *,
    rename: Callable[[str], str | None] = lambda name: name,
) -> None:
    """Copy a state dict into a module, in the module's dtype; `rename` maps published names, to None to drop one.

    Raises:
        RewardError: lists missing and unexpected weights, and those of another shape.
    """
    renamed = {new: tensor for name, tensor in state.items() if (new := rename(name)) is not None}
    wanted: dict[str, Any] = module.state_dict()
    problems = [
        ("lacks", [name for name in wanted if name not in renamed]),
        ("has unknown", [name for name in renamed if name not in wanted]),
        (
            "has other shapes for",
            [
                f"{name} {list(renamed[name].shape)} instead of {list(value.shape)}"
                for name, value in wanted.items()
                if name in renamed and renamed[name].shape != value.shape
            ],
        ),
    ]
    said = [f"{what} {_some(names)}" for what, names in problems if names]
    if said:
        raise RewardError(f"{source}: {'; '.join(said)}: these are the weights of another model")
    module.load_state_dict(renamed)


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
