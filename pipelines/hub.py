"""Names of models on the Hub: recognise a name, pin its revision, and report errors in one line."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.errors import MissingModelError, PipelineError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")


def local_path(name: str) -> Path:
    """Return a name as a path, with `~` replaced by the home folder; one of an unknown user stays as it is."""
    return Path(os.path.expanduser(name))


def is_hub_id(name: str) -> bool:
    """Tell whether a name has the form ``org/name[@revision]`` and is no local path."""
    path = local_path(name)
    return HUB_ID.fullmatch(name) is not None and not path.exists() and not path.parent.is_dir()


def repository(name: str) -> tuple[str, dict[str, Any]]:
    """Return the repository of a Hub id and the keyword arguments that pin its revision."""
    repo, _, revision = name.partition("@")
    return repo, {"revision": revision} if revision else {}


def fetch_file(name: str, file: str) -> Path:
    """Return the local copy of one file of a Hub model; its folder is named after the commit.

    It is small, and the first that is asked for: a name that is wrong or a network that is down is told at once, while
    the Hub's client would try five times more.
    """
    from huggingface_hub import hf_hub_download

    repo, pinned = repository(name)
    with _without_retries():
        return Path(hf_hub_download(repo, file, **pinned))


@contextmanager
def _without_retries() -> Iterator[None]:
    """Switch off the second round of attempts of `hf_hub_download`, in the versions that have one."""
    from huggingface_hub import file_download

    names = ("_DEFAULT_RETRY_ON_EXCEPTIONS", "_DEFAULT_RETRY_ON_STATUS_CODES")
    held = {name: getattr(file_download, name) for name in names if hasattr(file_download, name)}
    for name in held:
        setattr(file_download, name, ())
    try:
        yield
    finally:
        for name, value in held.items():
            setattr(file_download, name, value)


@contextmanager
def explained(name: str, kind: str) -> Iterator[None]:
    """Turn an error of the Hub's client into one line; `kind` is the kind of model, such as "diffusers"."""
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if local_path(name).is_dir():
            raise PipelineError(
                f"cannot load {name}: {reason}; its files are damaged or do not belong together."
            ) from error
        raise MissingModelError(
            f"'{name}' is neither a directory nor a {kind} model that the Hub gives out ({reason});"
            " check the spelling, the network, and `hf auth login` for gated models."
        ) from error
