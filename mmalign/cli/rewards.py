"""Check rewards against the numbers that their authors published: `mmalign rewards verify [NAME]`.

Checks that need weights or files which are not here are skipped, with the reason. Nothing is downloaded without
--download. The exit code is 1 if a number differs or a checkpoint does not load.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from typing import TYPE_CHECKING

from mmalign.core.errors import UserError

if TYPE_CHECKING:
    from rewards.goldens import Verdict

SHOWN = 3
REASON = 110


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `mmalign rewards verify`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="verify")
    verify = actions.add_parser("verify", help="compare rewards with published scores")
    verify.add_argument(
        "name", nargs="?", metavar="NAME", help="a reward, or one published score such as clip/vit-b-32"
    )
    verify.add_argument("--weights", metavar="PATH", help="weights of the reward or published score that NAME gives")
    verify.add_argument(
        "--golden", metavar="DIR", help="folder with the images of the published scores (default: $MMALIGN_GOLDEN)"
    )
    verify.add_argument("--download", action="store_true", help="download missing weights (gigabytes)")
    verify.add_argument("--device", help="device of the rewards (default: cuda if available, else cpu)")


def run(args: argparse.Namespace) -> int:
    """Print a table on standard output."""
    if args.weights is not None and args.name is None:
        raise UserError("--weights applies to one reward; name it, as in `mmalign rewards verify hps --weights DIR`")
    if not args.download:
        os.environ["HF_HUB_OFFLINE"] = "1"  # the hub's client reads it when it is imported

    from mmalign.core.progress import note
    from rewards.goldens import golden_folder, goldens_of, verify

    chosen, folder = goldens_of(args.name), golden_folder(args.golden)
    verdicts = []
    for golden in chosen:
        note(f"{golden.name} ...")
        verdicts.append(verify(golden, folder, weights=args.weights, device=args.device))
    _print(verdicts)
    bad = [verdict.golden.name for verdict in verdicts if verdict.status in ("differs", "error")]
    counts = ", ".join(
        f"{number} {status}"
        for status in ("ok", "differs", "error", "skipped")
        if (number := sum(verdict.status == status for verdict in verdicts))
    )
    print(f"\n{counts}" + (f": {', '.join(bad)}" if bad else ""))
    return 1 if bad else 0


def _print(verdicts: list[Verdict]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("golden", "input", "expected", "got", "difference", "verdict", box=None, pad_edge=False)
    for verdict in verdicts:
        golden = verdict.golden
        apart = f"{verdict.difference:.1e} of {golden.tolerance:.1g}" + " relative" * golden.relative
        difference = "" if math.isnan(verdict.difference) else apart
        reason = verdict.reason if len(verdict.reason) <= REASON else f"{verdict.reason[:REASON]}…"
        status = f"{verdict.status}: {reason}" if reason else verdict.status
        cells = [golden.name, golden.given, _numbers(golden.expected), _numbers(verdict.got), difference, status]
        table.add_row(*map(Text, cells))
    # In a pipe there is no width to fit: one line per row, for grep.
    Console(width=None if sys.stdout.isatty() else 2000, highlight=False).print(table)


def _numbers(values: tuple[float | int, ...]) -> str:
    shown = [f"{value:.6g}" for value in values[:SHOWN]]
    return ", ".join([*shown, f"... ({len(values)})"] if len(values) > SHOWN else shown)
