from __future__ import annotations

import importlib.util
import io
import sys
import types

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


class Notebook:
    """The shell of a kernel, and what it was asked to display: the content of one cell after another."""

    kernel = object()

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shown: list[str] = []
        fake = types.SimpleNamespace(get_ipython=lambda: self)
        place = types.SimpleNamespace(HTML=str, display=self.display)
        monkeypatch.setitem(sys.modules, "IPython", fake)
        monkeypatch.setitem(sys.modules, "IPython.display", place)

    def display(self, content: str, display_id: bool) -> Notebook:
        assert display_id
        return self.update(content)

    def update(self, content: str) -> Notebook:
        self.shown.append(content)
        return self


def test_a_bar_in_a_notebook_is_updated_in_place(clock, capsys, monkeypatch) -> None:
    notebook = Notebook(monkeypatch)
    with progress.track(100, "score <b>", "images") as job:
        clock[0] += 10
        job.advance(40, loss=0.5)
        clock[0] += 0.1
        job.advance(10)  # too soon after the last update
        progress.note("a line")
        clock[0] += 9.9
    assert len(notebook.shown) == 3
    assert '<progress max="100" value="0"></progress> score &lt;b&gt;: 0/100 images' in notebook.shown[0]
    assert 'value="40"' in notebook.shown[1] and "15 s left · 4 images/s · 1.0 GB · loss 0.5" in notebook.shown[1]
    assert notebook.shown[2].startswith("<pre>score &lt;b&gt;: 50/100 images, in 20 s · 2.5 images/s")
    said = capsys.readouterr()
    assert (said.out, said.err) == ("a line\n", "")


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("ipykernel", "nbclient")),
    reason="a kernel needs ipykernel and nbclient",
)
def test_a_bar_in_a_real_kernel_leaves_one_line() -> None:
    import nbformat
    from nbclient import NotebookClient

    code = (
        "import time\nfrom mmalign.core import progress\nprogress.NOTEBOOK_INTERVAL = 0\n"
        "with progress.track(3, 'draw') as job:\n    job.advance(1)\n    progress.note('half')\n    job.advance(2)"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    NotebookClient(notebook, timeout=60).execute()
    outputs = notebook.cells[0].outputs
    (bar,) = [output.data["text/html"] for output in outputs if output.output_type == "display_data"]
    assert bar.startswith("<pre>draw: 3/3 images, in ")
    assert [output.text for output in outputs if output.output_type == "stream"] == ["half\n"]
