"""Score images or videos by one or several rewards in one pass; writes parquet, CSV or JSONL.

INPUT is a folder, a glob, a file, a table (JSONL, CSV, TSV, parquet) with a column image or video and a column prompt,
or a webdataset tar. Prompts of files come from metadata.jsonl beside them (as `mmalign generate` writes it), from
NAME.txt or NAME.caption, or from --prompt. Run the same command again to resume, and to score only new or changed
files.

Exit code 3: done, but some items have no score (their column `error` says why).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mmalign.cli.generate import positive
from mmalign.core.errors import UserError

if TYPE_CHECKING:
    from mmalign.scoring.run import Outcome

INCOMPLETE = 3
"""Exit code where items have no score."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `mmalign score`."""
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="folder, glob, file, table or webdataset tar")
    parser.add_argument(
        "--rewards",
        required=True,
        metavar="A,B:0.5|FILE.yaml",
        help="rewards; with weights, a column 'total' holds the weighted sum",
    )
    parser.add_argument(
        "--out", required=True, type=Path, metavar="FILE", help="file to write: .parquet, .csv or .jsonl"
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="REWARD.KEY=VALUE",
        help="option of a reward, such as clip.weights=DIR; repeatable",
    )
    parser.add_argument("--prompt", metavar="TEXT", help="one prompt for all files, instead of any other prompts")
    parser.add_argument("--skip-bad", action="store_true", help="skip items that cannot be scored, with exit code 3")
    parser.add_argument(
        "--grid",
        type=Path,
        metavar="FILE.png",
        help="write an image of the best and the worst items with their scores",
    )
    parser.add_argument(
        "--batch-size", type=positive, default=32, metavar="N", help="items per batch (default %(default)s)"
    )
    parser.add_argument(
        "--workers", type=positive, metavar="N", help="decoding threads (default: number of cores, at most 8)"
    )
    parser.add_argument("--device", help="device of the rewards (default: cuda if available, else cpu)")
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), help="type of the weights (default: each reward's own)"
    )
    frames = parser.add_mutually_exclusive_group()
    frames.add_argument("--frames", type=positive, metavar="N", help="score N frames of each video, spread evenly")
    frames.add_argument("--fps", type=float, metavar="R", help="score R frames a second of each video (default: all)")


def run(args: argparse.Namespace) -> int:
    """Score, then print the statistics and the path of the scores."""
    from mmalign.scoring.results import check_format

    check_format(args.out)
    if args.grid is not None and args.grid.suffix.lower() != ".png":
        raise UserError(f"--grid {args.grid}: is written as PNG; name the file {args.grid.stem}.png")
    if args.fps is not None and not 0 < args.fps < float("inf"):
        raise UserError(f"--fps {args.fps}: must be a number above 0")

    from mmalign.core.io.decode import Frames
    from mmalign.scoring.checks import check_device
    from mmalign.scoring.chosen import read_choices
    from mmalign.scoring.run import ScoreSettings, score_files

    settings = ScoreSettings(
        prompt=args.prompt,
        skip_bad=args.skip_bad,
        batch_size=args.batch_size,
        workers=args.workers,
        device=check_device(args.device, "--device"),
        dtype=args.dtype,
        frames=Frames(args.frames, args.fps),
    )
    outcome = score_files(args.inputs, read_choices(args.rewards, args.option), args.out, settings)
    _print_summary(outcome)
    bad = f", {outcome.bad} bad" if outcome.bad else ""
    print(f"{len(outcome.rows)} {outcome.modality}s ({outcome.new} new{bad}): {args.out}")
    if args.grid is not None:
        from mmalign.scoring.picture import write_picture

        write_picture(outcome, args.grid, settings.frames)
        print(f"best and worst: {args.grid}")
    return 0 if all(row.is_complete for row in outcome.rows) else INCOMPLETE


def _print_summary(outcome: Outcome) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    versions = {reward["label"]: reward["version"] for reward in outcome.metadata["rewards"]}
    table = Table("reward", "version", box=None, pad_edge=False, header_style="bold")
    for heading in ("mean", "std", "min", "max", "no score"):
        table.add_column(heading, justify="right")
    for column in outcome.columns:
        *numbers, missing = outcome.summary(column)
        version = Text(versions.get(column, "weighted sum"))
        table.add_row(Text(column), version, *(f"{value:.4g}" for value in numbers), str(missing or ""))
    Console(width=120, highlight=False).print(table)
