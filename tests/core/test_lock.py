"""Two processes never share an output."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mmalign.cli import main
from mmalign.core.errors import UserError
from mmalign.core.lock import locked_output

HOLD = (
    "import sys, time; from pathlib import Path; from mmalign.core.lock import locked_output\n"
    "with locked_output(Path(sys.argv[1]), folder=sys.argv[2] == 'folder'):\n"
    "    print('held', flush=True); time.sleep(60)"
)


def held_by_another(path: Path, kind: str) -> subprocess.Popen[str]:
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(path), kind], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    return other


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_second_process_is_refused_and_a_killed_one_is_named(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "deep" / "out"
    lock = path / ".lock" if kind == "folder" else path.with_name(".out.lock")
    other = held_by_another(path, kind)
    try:
        with pytest.raises(UserError) as caught, locked_output(path, "output", folder=kind == "folder"):
            pass
        message = str(caught.value)
        assert f"output {path}: process {other.pid} on {socket.gethostname()} writes there since 20" in message
        assert str(lock) in message and "\n" not in message
        assert json.loads(lock.read_text())["pid"] == other.pid  # the one who was refused changed nothing
    finally:
        other.kill()
        other.wait()
    with locked_output(path, folder=kind == "folder"):
        assert json.loads(lock.read_text())["pid"] == os.getpid()
    assert not lock.exists()
    said = "".join(capsys.readouterr())
    assert f"process {other.pid}" in said and str(lock) in said and "has ended" in said


def test_the_same_process_may_hold_it_twice_and_an_error_gives_it_back(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), locked_output(tmp_path), locked_output(tmp_path):
        assert (tmp_path / ".lock").is_file()
        raise ZeroDivisionError
    assert not (tmp_path / ".lock").exists()
    with locked_output(tmp_path):
        with locked_output(tmp_path):
            pass
        assert (tmp_path / ".lock").is_file()


def test_a_run_that_wrote_nothing_leaves_no_folder(tmp_path: Path) -> None:
    with locked_output(tmp_path / "a" / "b"):
        pass
    assert list(tmp_path.iterdir()) == []
    with locked_output(tmp_path / "a" / "b"):
        (tmp_path / "a" / "result").write_text("x")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["result"]


def test_a_lock_of_another_host_is_not_taken(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 7, "started": "2026-01-01T00:00:00+00:00"}))
    with (
        pytest.raises(UserError, match="process 7 on elsewhere writes there since 2026"),
        locked_output(tmp_path),
    ):
        pass
    lock.unlink()
    with locked_output(tmp_path):
        pass


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b'{"host": 1, "pid": "x"}', b'{"host": "h", "pid": -1}'])
def test_a_damaged_lock_is_replaced(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".lock").write_bytes(content)
    with locked_output(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["host"] == socket.gethostname()


def test_many_processes_take_turns(tmp_path: Path) -> None:
    """Each adds one to a number, which no two of them may read at once; who is refused tries again."""
    add = (
        "import sys, time; from pathlib import Path; from mmalign.core.lock import locked_output\n"
        "from mmalign.core.errors import UserError\n"
        "count, done = Path(sys.argv[1], 'n'), 0\n"
        "while done < 20:\n"
        "    try:\n"
        "        with locked_output(Path(sys.argv[1])):\n"
        "            n = int(count.read_text()); time.sleep(0.001); count.write_text(str(n + 1)); done += 1\n"
        "    except UserError:\n"
        "        time.sleep(0.001)\n"
    )
    (tmp_path / "n").write_text("0")
    several = [subprocess.Popen([sys.executable, "-c", add, str(tmp_path)]) for _ in range(4)]
    assert [one.wait(60) for one in several] == [0] * 4
    assert (tmp_path / "n").read_text() == "80"


def test_without_file_locks_of_the_system_the_content_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmalign.core.lock.fcntl", None)
    with locked_output(tmp_path, "output"):
        owner = json.loads((tmp_path / ".lock").read_text())
        assert owner["pid"] == os.getpid()
    assert not (tmp_path / ".lock").exists()
    (tmp_path / ".lock").write_text(json.dumps({**owner, "pid": os.getppid()}))  # a process that is alive
    with pytest.raises(UserError, match=f"process {os.getppid()} on"), locked_output(tmp_path, "output"):
        pass


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "assets/shapes-sd", "--prompts", "text:star", "--steps", "2"],
        ["pairs", "sample", "assets/shapes-sd", "--prompts", "text:star", "--steps", "2"],
    ],
)
def test_commands_that_draw_refuse_a_folder_that_another_process_holds(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    held = {"host": "elsewhere", "pid": 7, "started": "2026-01-01T00:00:00+00:00"}
    (tmp_path / ".lock").write_text(json.dumps(held))
    assert main([*command, "--out", str(tmp_path)]) == 2
    assert "process 7 on elsewhere writes there" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
