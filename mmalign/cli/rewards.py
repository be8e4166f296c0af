"""Check rewards against published numbers (`mmalign rewards verify`) and against human labels (`rewards agree`).

`verify` compares with the numbers that the authors of rewards published. Checks that need weights or files which are
not here are skipped, with the reason. Nothing is downloaded without --download. The exit code is 1 if a number differs
or a checkpoint does not load.

`agree` says how often rewards prefer the image that people preferred, over all pairs and by category. PAIRS is any
source that data.pairs takes. Ties of the labels are left out, ties of a reward count one half. The exit code is 3 if
some pairs have no score.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mmalign.cli.generate import positive
from mmalign.cli.pair_source import add_source_arguments, read_source
from mmalign.cli.score import INCOMPLETE
from mmalign.core.errors import UserError

if TYPE_CHECKING:
    from mmalign.compare.agreement import Agreement
    from rewards.goldens import Verdict

SHOWN = 3
REASON = 110


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `mmalign rewards verify` and `agree`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="verify|agree")
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
    _add_agree_arguments(actions.add_parser("agree", help="pairwise accuracy of rewards on human labels"))


def _add_agree_arguments(agree: argparse.ArgumentParser) -> None:
    agree.add_argument("pairs", metavar="PAIRS", help="labelled pairs: a table, a folder, a glob or a hub id")
    agree.add_argument("--reward", required=True, metavar="A,B|FILE.yaml", help="rewards, each measured by itself")
    agree.add_argument("--out", type=Path, metavar="FILE", help="file to write: .json or .csv")
    add_source_arguments(agree)
    agree.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="REWARD.KEY=VALUE",
        help="option of a reward, such as clip.weights=DIR; repeatable",
    )
    agree.add_argument(
        "--batch-size", type=positive, default=32, metavar="N", help="images per batch (default %(default)s)"
    )
    agree.add_argument("--device", help="device of the rewards (default: cuda if available, else cpu)")


def run(args: argparse.Namespace) -> int:
    """Print a table on standard output."""
    return {"verify": _verify, "agree": _agree}[args.action](args)


def _agree(args: argparse.Namespace) -> int:
    from mmalign.compare import agreement as measured
    from mmalign.core.progress import note, track
    from mmalign.data.pairs import read_pairs
    from mmalign.scoring.checks import check_device
    from mmalign.scoring.chosen import load_choices, read_choices

    if args.out is not None:
        measured.check_format(args.out)
    chosen = read_choices(args.reward, args.option)
    weighted = next((choice.label for choice in chosen if choice.weight is not None), None)
    if weighted is not None:
        raise UserError(f"--reward: '{weighted}' has a weight, and each reward is measured by itself; remove it")
    device = check_device(args.device, "--device")
    table = read_pairs(args.pairs, read_source(args))
    note(f"{args.pairs}: {table.counts}")
    rewards = load_choices(chosen, table.prompts, device=device)
    with track(2 * len(table), "score") as job:
        found = measured.measure_agreement(table, rewards, batch_size=args.batch_size, progress=job.advance)
    _print_agreement(found)
    unscored = max(one.unscored for one in found)
    print(
        f"{len(table)} pairs of {len(table.prompts)} prompts; ties of the labels left out: "
        f"{table.counts.ties_dropped}; ties of a reward count one half; intervals: 95 %, bootstrap over prompts"
    )
    if args.out is not None:
        about = {"pairs": args.pairs, "counts": str(table.counts)}
        measured.write_agreement(found, args.out, about)
        print(args.out)
    return INCOMPLETE if unscored else 0


def _print_agreement(agreements: list[Agreement]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("reward", "category", box=None, pad_edge=False, header_style="bold")
    for heading in ("accuracy", "95 % interval", "right", "wrong", "ties", "pairs", "no score"):
        table.add_column(heading, justify="right")
    for one in agreements:
        unscored = str(one.unscored or "")
        if one.overall is None:
            table.add_row(Text(one.label), "all", *[""] * 5, "0", unscored)
        for name, line in one.lines():
            interval = "" if line.ci95 is None else f"[{line.ci95[0]:.3f}, {line.ci95[1]:.3f}]"
            counts = (line.right, line.wrong, line.ties, line.pairs)
            last = unscored if line is one.overall else ""
            table.add_row(Text(one.label), Text(name), f"{line.accuracy:.3f}", Text(interval), *map(str, counts), last)
    Console(width=None if sys.stdout.isatty() else 2000, highlight=False).print(table)


def _verify(args: argparse.Namespace) -> int:
    if args.weights is not None and args.name is None:
        raise UserError("--weights applies to one reward; name it, as in `mmalign rewards verify hps --weights DIR`")
    if not args.download:
        os.environ["HF_HUB_OFFLINE"] = "1"  # the hub's client reads it when it is imported

    from mmalign.core.progress import note
    from rewards.goldens import golden_folder, goldens_of, verify
    from rewards.held_to import held_to

    if (line := held_to(args.name or "")) is not None:
        if args.weights is not None:
            raise UserError(f"--weights {args.weights} has no published number to be compared with; {line}")
        print(line)
        return 0
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
