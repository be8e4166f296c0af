"""`mmalign push`: what goes, what stays, and one line for each thing that can be wrong; and the card's metadata."""

from __future__ import annotations

import importlib
import types
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from mmalign.cli import main
from mmalign.config.run import RunConfig, dump_config
from mmalign.core.errors import UserError
from mmalign.training.model_card import write_card
from mmalign.training.output import is_finished
from mmalign.training.push import files_to_push, push

# The client that the hub's package is built on is another from one of its versions to the next.
client = importlib.import_module(HfHubHTTPError.__bases__[0].__module__.partition(".")[0])
KEPT = ["README.md", "config.yaml", "evaluation/step_4.png", "metrics.jsonl", "pytorch_lora_weights.safetensors"]


def config_of(output: Path, **changes: Any) -> RunConfig:
    values = {"model": "org/base@v2", "method": {"name": "sft"}, "data": {"pairs": "org/pairs:train"}}
    return RunConfig(**(values | {"output": str(output)} | changes))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a finished run, with everything beside that stays."""
    folder = tmp_path / "dpo"
    stays = ["checkpoints/step_4/weights.safetensors", "checkpoints.previous/x", "wandb/run/x", "data/pairs-1.parquet"]
    stays += ["mmalign/events.out.tfevents.1", "tracking.json", ".README.md.12.tmp", "rounds/1/pairs.parquet"]
    for name in [*KEPT, *stays]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"12345")
    (folder / "metrics.jsonl").write_text('{"step": 4, "evaluation/clip": 0.25}\n')
    (folder / "config.yaml").write_text(dump_config(config_of(folder)))
    write_card(config_of(folder), folder, {"pairs": 12})
    return folder


class FakeApi:
    """Keeps what it is asked to do; raises `error` where one is set."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.done = error, list[tuple[Any, ...]]()

    def whoami(self) -> dict[str, str]:
        if self.error:
            raise self.error
        return {"name": "me"}

    def create_repo(self, repo: str, **options: Any) -> Any:
        self.done.append(("create", repo, options))
        return types.SimpleNamespace(repo_id=f"me/{repo.rpartition('/')[2]}")

    def create_branch(self, repo: str, **options: Any) -> None:
        self.done.append(("branch", repo, options))

    def upload_folder(self, **options: Any) -> None:
        self.done.append(("upload", options))


def test_the_card_is_valid_metadata_and_still_quotes_the_config(run: Path) -> None:
    card = ModelCard.load(run / "README.md")
    assert card.data.to_dict() == {
        "base_model": "org/base",
        "datasets": ["org/pairs"],
        "library_name": "diffusers",
        "license": "other",
        "license_name": "as-base-model",
        "pipeline_tag": "text-to-image",
        "tags": ["mmalign", "sft", "text-to-image", "lora"],
    }
    assert is_finished(run) and "| 4 | 0.2500 |" in card.text and "| pairs | 12 |" in card.text
    write_card(config_of(run, model="assets/shapes-sd", data={"pairs": "runs/pairs.parquet"}), run, {})
    assert not {"base_model", "datasets"} & ModelCard.load(run / "README.md").data.to_dict().keys()


def test_what_goes_and_what_stays(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [file.as_posix() for file in files_to_push(run)] == KEPT
    assert main(["push", str(run), "me/dpo", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["5", "evaluation/step_4.png"]
    total = sum((run / name).stat().st_size for name in KEPT)
    assert lines[-1].split()[0] == f"{total:,}" and "5 files would go to me/dpo; nothing was uploaded" in lines[-1]


def test_an_upload_makes_repository_and_branch_and_names_the_files(run: Path) -> None:
    api = FakeApi()
    assert push(run, "dpo", private=True, revision="v1", api=api) == "https://huggingface.co/me/dpo"
    create, branch, (_, upload) = api.done
    assert create == ("create", "dpo", {"private": True, "exist_ok": True})
    assert branch == ("branch", "me/dpo", {"branch": "v1", "exist_ok": True})
    assert upload["allow_patterns"] == KEPT and upload["revision"] == "v1" and upload["repo_id"] == "me/dpo"
    assert upload["commit_message"] == "Upload dpo, trained with mmalign"


def http_error(status: int) -> HfHubHTTPError:
    response = client.Response(status, request=client.Request("GET", "https://huggingface.co/api/whoami-v2"))
    return HfHubHTTPError(f"{status} Client Error\nmore", response=response)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (LocalTokenNotFoundError("no token"), "not logged in to the Hugging Face Hub; run `hf auth login`"),
        (http_error(401), "refuses the login"),
        (http_error(403), "this login may not write to 'me/dpo'"),
        (http_error(500), "refuses the upload: 500 Client Error$"),
        (client.ConnectError("no route to host"), r"cannot be reached \(no route to host\)"),
        (TimeoutError("timed out"), r"cannot be reached \(timed out\)"),
    ],
)
def test_what_goes_wrong_on_the_way_is_one_line(run: Path, error: Exception, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        push(run, "me/dpo", api=FakeApi(error))
    assert "\n" not in str(raised.value)
    with pytest.raises(ZeroDivisionError):
        push(run, "me/dpo", api=FakeApi(ZeroDivisionError()))


def test_what_is_wrong_before(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(run), "me/dpo"]) == 2  # the tests set HF_HUB_OFFLINE
    assert main(["push", str(run), "a/b/c", "--dry-run"]) == 2
    assert main(["push", str(tmp_path / "none"), "me/dpo"]) == 2
    (run / "config.yaml").write_text("model: other\n")
    assert main(["push", str(run), "me/dpo"]) == 2
    offline, name, missing, unfinished = capsys.readouterr().err.splitlines()
    assert "HF_HUB_OFFLINE is set" in offline or "not logged in" in offline
    assert "repository 'a/b/c'" in name and "organisation/name" in name
    assert "no such file or directory; name the output of a training" in missing
    assert "holds no finished run" in unfinished
