from __future__ import annotations

import io
import sys

import pytest

from mmalign.core import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "memory_used", lambda: "1.0 GB")
    return now


def test_plain_lines_now_and_then_with_rate_rest_and_statistics(clock, capsys) -> None:
    with progress.track(100, "generate [a/b]") as job:
        clock[0] += 10
        job.advance(10, loss=0.123456)
        assert capsys.readouterr().err == ""
        clock[0] += 10
        job.advance(10, loss=0.5, note="x")
        line = capsys.readouterr().err
        assert line == "generate [a/b]: 20/100 images, 1 min 20 s left · 1 images/s · 1.0 GB · loss 0.5 · note x\n"
        clock[0] += 20
        job.advance(80)
        capsys.readouterr()
    assert capsys.readouterr().err.startswith("generate [a/b]: 100/100 images, in 40 s · 2.5 images/s")


def test_a_resumed_job_does_not_count_what_was_done_before(clock, capsys) -> None:
    with progress.track(100, "train", "steps", initial=90) as job:
        clock[0] += 20
        job.advance(2)
        assert job.rate == pytest.approx(0.1)
    assert "92/100 steps" in capsys.readouterr().err


def test_unknown_total_and_failure(clock, capsys) -> None:
    with pytest.raises(RuntimeError), progress.track(None, "read", "rows") as job:
        clock[0] += 4000
        job.advance(3)
        assert "read: 3 rows, 1 h 06 min so far" in capsys.readouterr().err
        raise RuntimeError
    assert "3 rows, in 1 h 06 min" in capsys.readouterr().err


def test_other_ranks_are_silent(monkeypatch, capsys) -> None:
    monkeypatch.setenv("RANK", "1")
    with progress.track(1, "train") as job:
        job.advance(1)
        progress.note("hello")
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal_and_one_inside_the_other(monkeypatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    with progress.track(4, "train [1]", "steps") as outer:
        outer.advance(1, loss=0.25)
        with progress.track(2, "evaluate") as inner:
            inner.advance(2)
            assert len(progress._live[0].tasks) == 2
            progress.note("a [bold]word[/bold]")
        assert len(progress._live[0].tasks) == 1
        progress._live[0].refresh()
    assert progress._live == []
    text = terminal.getvalue()
    assert "train [1]" in text and "loss 0.25" in text and "a [bold]word[/bold]" in text
    assert "evaluate: 2/2 images, in 0 s" in text


def test_memory_is_a_number_of_gigabytes() -> None:
    assert 0 < float(progress.memory_used().split()[0]) < 1000
