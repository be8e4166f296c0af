from __future__ import annotations

import errno
import importlib
import json
import subprocess
import sys
import types
from collections.abc import Callable

import pytest

from mmalign.core.errors import UserError

cli = importlib.import_module("mmalign.cli.main")  # the name `mmalign.cli.main` is the function in it


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable], None]:
    """Replace the work of `mmalign list` by a function of the parsed arguments."""

    def replace(work: Callable) -> None:
        def add_arguments(parser):
            parser.add_argument("config")
            parser.add_argument("overrides", nargs="*")
            parser.add_argument("--steps", type=int)

        module = types.SimpleNamespace(__doc__="Do it.", add_arguments=add_arguments, run=work)
        monkeypatch.setattr(cli.importlib, "import_module", lambda name: module)

    return replace


def failing(error: BaseException) -> Callable:
    def work(args):
        raise error

    return work


def test_help_is_quick_and_teaches_every_verb() -> None:
    code = "import sys; from mmalign.cli import main; main(['--help']); print(sorted(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for verb in cli.VERBS:
        assert f"$ mmalign {verb}" in output
    for heavy in ("torch", "diffusers", "transformers", "pydantic", "rich", "numpy", "yaml"):
        assert f"'{heavy}'" not in output


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help_without_loading_torch(verb: str) -> None:
    run = f"from mmalign.cli import main\ntry: main(['{verb}', '--help'])"
    code = f"import sys\n{run}\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: mmalign {verb}") and "example:" in done.stdout
    assert done.stdout.endswith("False\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "unknown command 'trian'; did you mean 'train'?"),
        (["list", "mehods"], "did you mean 'methods'?"),
        (["list", "methods", "--jsn"], "unknown argument '--jsn'"),
        (["doctor", "--jsn"], "did you mean '--json'?"),
        (["show-config"], "the following arguments are required: config"),
        (["show-config", "x", "--method.beta", "3"], "write an override without dashes: method.beta=VALUE"),
        (["show-config", "no/such"], "config no/such: no such file"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(arguments, message, capsys) -> None:
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "no-model", "--prompts", "text:x"],
        ["pairs", "sample", "no-model", "--prompts", "text:x"],
        ["pairs", "label", "no-images", "--reward", "no-reward"],
        ["compare", "no-model", "no-model-2", "--prompts", "no-prompts", "--rewards", "no-reward"],
        ["demo"],
        ["shapes", "draw"],
        ["shapes", "train-base"],
    ],
)
def test_an_output_under_a_file_is_refused_before_anything_else(arguments, tmp_path, capsys) -> None:
    (tmp_path / "file").touch()
    assert cli.main([*arguments, "--out", str(tmp_path / "file" / "x" / "y.parquet")]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'file'} on the way there is a file" in error and error.count("\n") == 1


def test_overrides_may_stand_on_both_sides_of_an_option(verb) -> None:
    seen = []
    verb(lambda args: seen.append(args) or 0)
    assert cli.main(["list", "c.yaml", "a=1", "--steps", "3", "b=2"]) == 0
    assert seen[0].overrides == ["a=1", "b=2"] and seen[0].steps == 3


def test_errors_of_all_three_packages_are_the_users(verb, capsys) -> None:
    from pipelines.errors import PipelineError
    from rewards.errors import RewardError

    for error in (UserError("first\nsecond"), PipelineError("first\nsecond"), RewardError("first\nsecond")):
        verb(failing(error))
        assert cli.main(["list", "x"]) == 2
        assert capsys.readouterr().err == "error: first\nerror: second\n"
        assert cli.main(["--debug", "list", "x"]) == 2
        assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_full_disk_and_bugs(verb, capsys) -> None:
    verb(failing(KeyboardInterrupt()))
    assert cli.main(["list", "x"]) == 130
    assert capsys.readouterr().err.strip() == "stopped by Ctrl-C"

    verb(failing(OSError(errno.ENOSPC, "No space left on device", "runs/model.safetensors")))
    assert cli.main(["list", "x"]) == 1
    error = capsys.readouterr().err
    assert (
        error.startswith("error: the disk is full while writing runs/model.safetensors") and "Traceback" not in error
    )

    verb(failing(NotADirectoryError(errno.ENOTDIR, "Not a directory", "file/run")))
    assert cli.main(["list", "x"]) == 2
    assert capsys.readouterr().err == "error: file/run: Not a directory; name another file or folder\n"

    verb(failing(ValueError("oops")))
    assert cli.main(["list", "x"]) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error and "ValueError: oops" in error and "mmalign doctor" in error


def test_out_of_gpu_memory_says_what_to_do(verb, capsys) -> None:
    import torch

    verb(failing(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")))
    assert cli.main(["list", "x"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: CUDA out of memory. Tried to allocate 2 GiB. Use a smaller batch")


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("methods", ["diffusion_dpo", "pairs", "2311.12908"]),
        ("rewards", ["clip", "prompts", "-1 .. 1"]),
        ("families", ["sdxl", "StableDiffusionXLPipeline", "FluxPipeline", "every image method but lpo"]),
        ("configs", ["config"]),
        ("prompts", ["shapes-drawbench", "200", "Counting"]),
    ],
)
def test_list(what: str, expected: list[str], capsys) -> None:
    assert cli.main(["list", what]) == 0
    output = capsys.readouterr().out
    for text in expected:
        assert text in output


def test_doctor_tries_things_out(capsys, tmp_path, monkeypatch) -> None:
    from mmalign.cli import doctor

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "ASSETS", ("assets/prompts",))
    assert cli.main(["doctor", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert findings["attention"]["cpu sdpa (auto)"] == "works"
    assert findings["packages"]["torch"] != "not installed"
    assert "GB free" in findings["folders"][str(tmp_path)]
    assert list(tmp_path.iterdir()) == []

    monkeypatch.setattr(doctor, "REQUIRED", ("torch", "no-such-package"))
    monkeypatch.setattr(doctor, "ASSETS", ("assets/no-such-model",))
    assert cli.main(["doctor"]) == 1
    output = capsys.readouterr().out
    assert "problem: package no-such-package is missing; run `pip install no-such-package`" in output
    assert "problem: assets/no-such-model is missing" in output


def test_doctor_finds_a_folder_that_cannot_be_written_to(monkeypatch, tmp_path) -> None:
    from mmalign.cli import doctor

    def refuse(*args):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(doctor.os, "replace", refuse)
    assert doctor._write_test(tmp_path) == "cannot be written to (Read-only file system)"


def test_show_config_prints_origins_or_a_plain_file(tmp_path, capsys) -> None:
    from mmalign.config.run import load_config

    path = tmp_path / "a.yaml"
    path.write_text("model: m\nmethod: sft\ndata: {pairs: p}\noutput: o\n")
    assert cli.main(["show-config", str(path), "trainer.steps=5"]) == 0
    lines = {line.split("#")[0].strip(): line.partition("# ")[2] for line in capsys.readouterr().out.splitlines()}
    assert lines["steps: 5"] == "the command line"
    assert lines["name: sft"] == f"{path}:2"
    assert lines["batch_size: 8"] == "default"
    assert lines["trainer:"] == ""

    assert cli.main(["show-config", str(path), "trainer.steps=5", "--plain"]) == 0
    plain = tmp_path / "plain.yaml"
    plain.write_text(capsys.readouterr().out)
    assert load_config(plain) == load_config(path, ["trainer.steps=5"])


def test_doctor_counts_whole_models() -> None:
    from mmalign.cli import doctor

    found = {name: doctor._asset(doctor.resource_root() / name) for name in doctor.ASSETS}
    files = [path for path in (doctor.resource_root() / "assets/shapes-sd").rglob("*") if path.is_file()]
    assert found["assets/shapes-sd"].startswith(f"{len(files)} files, ") and "assets/shapes-vlm" in found
    assert float(found["assets/shapes-sd"].split()[2]) > 5


@pytest.mark.parametrize("out", ["", "  "])
def test_an_empty_output_is_not_the_working_directory(out, capsys) -> None:
    for verb in (
        ["generate", "assets/shapes-sd", "--prompts", "text:a"],
        ["pairs", "sample", "assets/shapes-sd", "--prompts", "text:a"],
        ["score", ".", "--rewards", "jpeg-compressibility"],
        ["compare", "assets/shapes-sd", "x", "--prompts", "shapes-validation", "--rewards", "shapes-quality"],
    ):
        assert cli.main([*verb, "--out", out]) == 2
        error = capsys.readouterr().err
        assert "the path is empty" in error and error.count("\n") == 1


@pytest.mark.parametrize("seeds", ["1,x", "", "18446744073709551616", "9" * 5000, "-1", "1,1"])
def test_seeds_that_are_none(seeds, capsys) -> None:
    assert cli.main(["generate", "assets/shapes-sd", "--prompts", "text:a", "--out", "g", f"--seeds={seeds}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and len(error) < 1000


def test_a_warning_is_one_line_without_its_source(verb, capsys) -> None:
    import warnings

    def warn(_: object) -> int:
        warnings.warn("3 of 8 prompts\nwere cut", stacklevel=1)
        return 0

    verb(warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert cli.main(["list", "x"]) == 0
    assert capsys.readouterr().err == "warning: 3 of 8 prompts were cut\n"
