"""Upload a finished run to the Hugging Face Hub: weights, model card, config, metrics; not its checkpoints."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mmalign.core.errors import MissingPath, UserError
from mmalign.core.progress import note
from mmalign.training.output import is_finished

LEFT_OUT = ("checkpoints*", "rounds*", "stages*", "data", "cache", "wandb", "events.out.tfevents.*", "tracking.json")
"""Names of files and folders that are not uploaded: checkpoints, logs of trackers, and data that may not be public."""


def files_to_push(folder: Path) -> list[Path]:
    """Return the files to upload, relative to the folder of the run, sorted.

    Raises:
        UserError: there is no such folder, or the run in it is not finished.
    """
    if not folder.is_dir():
        raise MissingPath(folder, "; name the output of a training")
    if not is_finished(folder):
        raise UserError(
            f"{folder}: holds no finished run (weights, and the config and model card that belong to them); run "
            "`mmalign train` to its end first, or name the output of a run"
        )
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(file for file in files if not any(_stays(part) for part in file.parts))


def push(
    folder: Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    api: Any = None,
) -> str:
    """Upload a finished run, into a repository that is created if missing, and return its address.

    Args:
        folder: the output of a training. repo: "organisation/name". private: make a new repository private.
        revision: the branch, created if missing; None: the main one. message: of the commit.
        api: a `huggingface_hub.HfApi`; by default one that is logged in as this machine is.

    Raises:
        UserError: the run is not finished, the name cannot be one, the login is missing or may not write there, or the
        hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    files = files_to_push(folder)
    if Path("metrics.jsonl") not in files:
        note(f"{folder} has no metrics.jsonl; the run is uploaded without its metrics")
    check_repo(repo)
    api = api or HfApi()
    commit = message or f"Upload {folder.resolve().name}, trained with mmalign"
    # Whatever client the hub's package is built on, its errors have the base of the hub's own.
    client_errors: Any = (HfHubHTTPError.__bases__[0], OSError)
    try:
        api.whoami()
        repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=[file.as_posix() for file in files],
            revision=revision,
            commit_message=commit,
        )
    except LocalTokenNotFoundError:
        raise UserError("not logged in to the Hugging Face Hub; run `hf auth login`, or set HF_TOKEN") from None
    except OfflineModeIsEnabled:
        raise UserError("HF_HUB_OFFLINE is set, so that nothing can be uploaded; unset it") from None
    except HfHubHTTPError as error:
        raise UserError(_explain(error, repo)) from None
    except client_errors as error:
        raise UserError(f"the Hugging Face Hub cannot be reached ({_first_line(error)}); try again online") from None
    return str(getattr(done, "repo_url", None) or f"https://huggingface.co/{repo}")


def check_repo(repo: str) -> None:
    """Refuse an invalid name of a repository.

    Raises:
        UserError: see above.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"repository '{repo}': {_first_line(error)} Write it as organisation/name") from None


def _stays(name: str) -> bool:
    return name.startswith(".") or name.endswith(".tmp") or any(fnmatch(name, pattern) for pattern in LEFT_OUT)


def _explain(error: Any, repo: str) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return "the Hugging Face Hub refuses the login; run `hf auth login` with a token that may write"
    if status == 403:
        return f"this login may not write to '{repo}'; choose a repository of yours, or a token that may write"
    return f"the Hugging Face Hub refuses the upload: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
