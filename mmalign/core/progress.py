"""Progress for every long job: a bar on a terminal or in a notebook, plain lines elsewhere, silence on other ranks."""

from __future__ import annotations

import contextlib
import html
import os
import sys
import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

PLAIN_INTERVAL = 15.0
"""Seconds between two plain lines when standard error is not a terminal."""

NOTEBOOK_INTERVAL = 0.2
"""Seconds between two updates of a bar in a notebook, each of which is a message to the browser."""

_live: list[Progress] = []  # the one rich display; a job inside a job (evaluation while training) adds a line to it


def is_main_process() -> bool:
    """Tell whether this process may speak: rank 0 of a distributed launch, or the only process."""
    return os.environ.get("RANK", "0") == "0"


def note(text: str) -> None:
    """Print one line on standard error without tearing a progress bar that is being drawn."""
    if not is_main_process():
        return
    if _live:
        _live[0].console.print(text, markup=False, highlight=False, soft_wrap=True)
    elif in_notebook():
        print(text, flush=True)  # what goes to standard error is shown on red there
    else:
        print(text, file=sys.stderr, flush=True)


def in_notebook() -> bool:
    """Tell whether this process is the kernel of a notebook, whose output is shown by a browser."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and hasattr(shell, "kernel")


def memory_gigabytes() -> tuple[float, bool]:
    """Return the peak memory so far in GB and whether it is the GPU's (if one is used), else this process's.

    0 where it is unknown.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9, True
    try:
        import resource
    except ImportError:  # not on Windows
        return 0.0, False
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9, False


def reset_peak_memory() -> None:
    """Count the peak memory from now on, as far as the system allows: on a GPU, and for a process on Linux."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # see proc(5): resets the "high water mark" of the resident set


def memory_used() -> str:
    """Return the memory in use as text such as "3.1 GB", empty where it is unknown."""
    gigabytes, on_gpu = memory_gigabytes()
    return f"{gigabytes:.1f} GB{' GPU' * on_gpu}" if gigabytes else ""


def track(total: int | None, label: str, unit: str = "images", *, initial: int = 0) -> Track:
    """Start reporting a job of `total` units (None: unknown), `initial` of which were done before (a resumed run).

    Use as a context and tell it what was done: `with track(200, "generate") as job: job.advance(8, loss=0.7)`.
    The rate (units/s), the remaining time and the memory are reported besides the last values of the statistics.
    """
    return Track(total, label, unit, initial)


class Track:
    """One job being reported; made by `track`."""

    def __init__(self, total: int | None, label: str, unit: str, initial: int = 0) -> None:
        """Prepare the job; nothing is printed before the context is entered."""
        self.total, self.label, self.unit = total, label, unit
        self.initial = self.done = initial
        self.stats: dict[str, str] = {}
        self.started = self._last_line = time.monotonic()
        self._task: TaskID | None = None
        self._owns_display = False
        self._cell: Any = None  # the place of the bar in a notebook

    def __enter__(self) -> Self:
        """Start the clock and, on a terminal, the bar."""
        self.started = self._last_line = time.monotonic()
        if is_main_process() and sys.stderr.isatty():
            if not _live:
                _live.append(_display())
                _live[0].start()
                self._owns_display = True
            self._task = _live[0].add_task(self.label, total=self.total, completed=self.initial, stats="")
        elif is_main_process() and in_notebook():
            from IPython.display import HTML, display

            self._cell = display(HTML(self._bar()), display_id=True)
        return self

    def advance(self, n: int = 1, **stats: float | str) -> None:
        """Say that `n` more units are done; `stats` are the newest values to show (numbers or ready text)."""
        self.done += n
        self.stats |= {name: value if isinstance(value, str) else f"{value:.4g}" for name, value in stats.items()}
        if self._task is not None and _live:
            _live[0].update(self._task, completed=self.done, stats=self._describe())
        elif self._cell is not None:
            if time.monotonic() - self._last_line >= NOTEBOOK_INTERVAL:
                self._update_cell(self._bar())
        elif time.monotonic() - self._last_line >= PLAIN_INTERVAL:
            self._plain_line()

    @property
    def rate(self) -> float:
        """Units per second since the context was entered."""
        return (self.done - self.initial) / max(time.monotonic() - self.started, 1e-9)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the bar and leave one closing line that says how much was done and how fast."""
        if self._task is not None and _live:
            _live[0].remove_task(self._task)
            if self._owns_display:
                _live.pop().stop()
        if self._cell is not None:
            self._update_cell(f"<pre>{html.escape(self._line(closing=True))}</pre>")
        elif self.done > self.initial or kind is None:
            self._plain_line(closing=True)

    def _describe(self) -> str:
        parts = [f"{self.rate:.3g} {self.unit}/s", memory_used(), *(f"{k} {v}" for k, v in self.stats.items())]
        return " · ".join(part for part in parts if part)

    def _bar(self) -> str:
        share = f' max="{self.total}" value="{self.done}"' if self.total is not None else ""
        return f"<div><progress{share}></progress> {html.escape(self._line())}</div>"

    def _update_cell(self, content: str) -> None:
        from IPython.display import HTML

        self._last_line = time.monotonic()
        self._cell.update(HTML(content))

    def _plain_line(self, *, closing: bool = False) -> None:
        self._last_line = time.monotonic()
        note(self._line(closing=closing))

    def _line(self, *, closing: bool = False) -> str:
        now = time.monotonic()
        count = f"{self.done}/{self.total}" if self.total is not None else str(self.done)
        if closing:
            clock = f"in {_duration(now - self.started)}"
        elif self.total is not None and self.rate > 0:
            clock = f"{_duration((self.total - self.done) / self.rate)} left"
        else:
            clock = f"{_duration(now - self.started)} so far"
        return f"{self.label}: {count} {self.unit}, {clock} · {self._describe()}"


class _PlainText(ProgressColumn):
    """The statistics as they are: square brackets in a label or value are no markup."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["stats"], style="dim")


def _display() -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        _PlainText(),
        console=Console(stderr=True),
        transient=True,
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
