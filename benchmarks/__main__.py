"""`python -m benchmarks [NAME ...]`: run the benchmarks and print tables of times with their ratios, and of memory.

`python -m benchmarks equivalence` is a command of its own: our objectives against published code.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import platform
import sys
import warnings
from pathlib import Path
from typing import Any

from benchmarks import BENCHMARKS
from mmalign.core.errors import UserError, did_you_mean
from mmalign.core.files import write_atomically


def main(arguments: list[str] | None = None) -> int:
    """Run what was asked for; 2 means that the arguments are wrong."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["equivalence"]:
        from benchmarks.equivalence.command import main as equivalence

        return equivalence(arguments[1:])
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="which benchmarks (default: all)")
    parser.add_argument("--list", action="store_true", help="print the names and what they measure")
    parser.add_argument("--quick", action="store_true", help="a few small rounds, to see that it works")
    parser.add_argument("--repeats", type=int, metavar="N", help="timed rounds")
    parser.add_argument("--batch", type=int, metavar="N", help="pairs of a training step, images otherwise")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's, OMP_NUM_THREADS)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything, the single times too")
    options = parser.parse_args(arguments)
    for name in options.names:
        if name not in BENCHMARKS:
            parser.error(f"no benchmark '{name}'; there are {', '.join(BENCHMARKS)}{did_you_mean(name, BENCHMARKS)}")
    for option in ("repeats", "batch", "threads"):
        if (value := getattr(options, option)) is not None and value < 1:
            parser.error(f"--{option} is {value}; at least 1 is allowed")
    if options.json and not options.json.absolute().parent.is_dir():
        parser.error(f"--json {options.json}: there is no directory {options.json.absolute().parent}; make it first")
    if options.list:
        for name in BENCHMARKS:
            print(f"{name:15} {(_benchmark(name).__doc__ or '').splitlines()[0]}")
        return 0
    try:
        return _run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    import torch
    from diffusers.utils import logging as diffusers_logging
    from rich.console import Console
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.disable_progress_bar()
        logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    if options.threads:
        torch.set_num_threads(options.threads)

    from benchmarks.timing import Settings

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = Settings.quick(device) if options.quick else Settings(device)
    given = {"repeats": options.repeats, "batch": options.batch}
    settings = dataclasses.replace(settings, **{key: value for key, value in given.items() if value})
    console, machine = Console(), _machine(device)
    console.print(", ".join(f"{key} {value}" for key, value in machine.items()), highlight=False, soft_wrap=True)
    console.print(f"{settings.repeats} rounds after {settings.warmup} for warming up", highlight=False)
    results: dict[str, Any] = {}
    for name in options.names or BENCHMARKS:
        reports = _benchmark(name).measure(settings)
        results[name] = [report.as_json() for report in reports]
        for report in reports:
            _print(console, name, report)
    if options.json:
        values = {"machine": machine, "settings": {**dataclasses.asdict(settings), "device": str(device)}}
        write_atomically(options.json, json.dumps({**values, "benchmarks": results}, indent=2) + "\n")
    return 0


def _benchmark(name: str) -> Any:
    return importlib.import_module(f"benchmarks.{name}")


def _machine(device: Any) -> dict[str, str]:
    import torch

    load = f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores" if hasattr(os, "getloadavg") else "unknown"
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "load at the start": load,
    }


def _print(console: Any, name: str, report: Any) -> None:
    from rich.table import Table

    console.print()
    if report.skipped:
        console.print(f"{name}: skipped, {report.skipped}", highlight=False)
        return
    (first, *headings), rows = report.table()
    table = Table(first, title=f"{name}: {report.title}", title_justify="left", title_style="bold")
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for note in report.notes():
        console.print(f"  {note}", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
