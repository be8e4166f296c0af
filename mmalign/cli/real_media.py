"""The options of `mmalign pairs sample` that start from real images or videos."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from mmalign.cli.generate import read_prompts
from mmalign.core.errors import UserError

if TYPE_CHECKING:
    from mmalign.api.generate import Sampling
    from mmalign.data.building.real_media import Unusable
    from mmalign.data.prompts import Prompt

STRENGTH = (0.65, 0.8)
"""DenseDPO's bounds (arXiv 2506.03517)."""


def add_real_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare `--from` and `--strength`."""
    real = parser.add_argument_group("samples that start from real media", "as in DenseDPO: one motion, other details")
    real.add_argument(
        "--from",
        dest="real",
        metavar="DIR|FILE",
        help="real images or videos with captions, in the place of --prompts: a folder, a table or a tar",
    )
    real.add_argument(
        "--strength",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        help="how much noise they get, from 0 (none) to 1 (nothing of them is left); drawn between the two, once for "
        f"each medium (default {STRENGTH[0]} {STRENGTH[1]})",
    )


def read_prompts_or_media(args: argparse.Namespace, sampling: Sampling) -> tuple[list[Prompt], Unusable]:
    """Return the prompts, or with `--from` real media with their captions, and counts of those that cannot be used.

    Sets `args.strength` to its bounds, None without `--from`.

    Raises:
        UserError: options exclude each other or are out of range, the model only starts from noise, or there are no
            media.
    """
    from mmalign.data.building.real_media import Unusable, real_media

    unusable = Unusable()
    if (args.real is None) == (args.prompts is None):
        raise UserError("give --prompts, or --from for real media with captions" + (", not both" if args.real else ""))
    if args.real is None:
        if args.strength is not None:
            raise UserError("--strength applies to --from; give both or neither")
        return read_prompts(args.prompts, args.limit), unusable
    if args.image is not None:
        raise UserError("--image applies to --prompts: with --from videos start from real ones; remove it")
    low, high = args.strength or STRENGTH
    if not 0 <= low <= high <= 1:
        raise UserError(f"--strength {low:g} {high:g}: give two numbers with 0 <= LOW <= HIGH <= 1")
    if args.solver != "ddim":
        raise UserError(f"--solver {args.solver} starts from noise only; with --from take ddim")
    if sampling.only_draws():
        raise UserError(
            f"--from: {args.model} is drawn by diffusers' own pipeline, which starts from noise; choose a model of "
            "the families"
        )
    args.strength = (low, high)

    from mmalign.scoring.inputs import find_items

    items = find_items([args.real], "video" if sampling.makes_videos() else "image").items
    return [*real_media(items, unusable, args.limit)], unusable
