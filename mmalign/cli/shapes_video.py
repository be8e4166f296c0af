"""`mmalign shapes ... --video`: the actions of moving Shapes, for generators of videos."""

from __future__ import annotations

import argparse

from mmalign.core.errors import UserError
from mmalign.core.progress import note


def add_training(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `train-base --video`."""
    parser.add_argument(
        "--video", action="store_true",
        help="train the text-to-video model of moving Shapes, from the flow model of pictures at --start",
    )  # fmt: skip
    parser.add_argument(
        "--clips", type=int, default=10_000, metavar="N",
        help="with --video: number of training clips that are drawn (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--glimpses", type=int, default=30_000, metavar="N",
        help="with --video: number of clips that the model first sees three frames of (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--videos", type=int, default=6_000, metavar="N",
        help="with --video: number of clips that the model then sees whole (default %(default)s)",
    )  # fmt: skip


def draw(args: argparse.Namespace) -> int:
    """Draw random clips as rows of frames."""
    from mmalign.shapes.motion.strips import random_strips

    args.out.parent.mkdir(parents=True, exist_ok=True)
    random_strips(args.count, args.seed).save(args.out)
    print(f"{args.count} clips: {args.out}")
    return 0


def check_oracle(args: argparse.Namespace) -> int:
    """Print how often the oracle of clips agrees with the scene graph."""
    from rich.console import Console
    from rich.table import Table

    from mmalign.shapes.motion.check import check_oracle

    table = Table(title=f"oracle on {args.count} freshly drawn clips, seed {args.seed}")
    table.add_column("clips")
    for name in ("frames right", "motion full", "strict", "smooth full", "wrong: full", "wrong: strict", "ms a clip"):
        table.add_column(name, justify="right")
    for row in check_oracle(args.count, args.seed):
        shares = (row.frames, row.motion, row.strict, row.smooth, row.wrong_motion, row.wrong_strict)
        table.add_row(row.quality, *(f"{100 * share:.1f} %" for share in shares), f"{1000 * row.seconds:.0f}")
    Console().print(table)
    return 0


def words() -> None:
    """Print the words of what things do."""
    from mmalign.shapes.motion import language

    spoken = {m: [w.split("~")[0] for w in words] for m, words in language.ACTION_WORDS.items()}
    print("motions, in videos")
    for meaning, spellings in {**language.DIRECTION_WORDS, **spoken}.items():
        print(f"  {meaning:10} {', '.join(spellings)}")
    print("speeds, in videos")
    for meaning, spellings in language.SPEED_WORDS.items():
        print(f"  {meaning:10} {', '.join(spellings)}")


def train(args: argparse.Namespace) -> int:
    """Train the text-to-video base.

    Raises:
        UserError: there is no model to start from.
    """
    from mmalign.shapes.motion.train_base import train_video_base

    if args.start is None or not (args.start / "unet" / "config.json").is_file():
        raise UserError("--video needs --start, a flow model of pictures such as assets/shapes-flow")
    if args.clips < 1 or args.videos < 1 or args.glimpses < 0:
        fix = "must be at least 1, and --glimpses at least 0"
        raise UserError(f"--clips {args.clips} and --videos {args.videos} {fix}, not {args.glimpses}")
    train_video_base(
        args.out, start=args.start, clips=args.clips, glimpses=args.glimpses, videos=args.videos, log=note
    )
    print(f"a diffusers AnimateDiffPipeline: {args.out}")
    return 0
