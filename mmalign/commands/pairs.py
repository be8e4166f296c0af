"""Build preference data: `sample` draws several images for each prompt, `label` turns them into pairs by a reward.

An interrupted `sample` goes on where it stopped; the pairs are a parquet file with the columns of Pick-a-Pic.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mmalign.commands.generate import (
    add_sampling_arguments,
    check_sampling,
    model_identity,
    open_generator,
    positive,
    read_prompts,
)
from mmalign.errors import UserError
from mmalign.files import check_output
from mmalign.progress import track


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `mmalign pairs sample` and `mmalign pairs label`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="sample|label")
    sample = actions.add_parser("sample", help="draw images: DIR/images.parquet")
    add_sampling_arguments(sample)
    sample.add_argument("--images-per-prompt", type=positive, default=4, metavar="N", help="default %(default)s")
    sample.add_argument("--seed", type=int, default=0, help="all image seeds derive from it (default %(default)s)")
    label = actions.add_parser("label", help="score the images and write pairs")
    label.add_argument("images", metavar="DIR", help="what `mmalign pairs sample` wrote")
    label.add_argument("--reward", required=True, metavar="R,R2:0.5", help="rewards, with weights other than 1")
    label.add_argument("--out", required=True, type=Path, metavar="FILE.parquet", help="the pairs")
    label.add_argument("--mode", choices=("best-worst", "bradley-terry"), default="best-worst", help="who wins")
    label.add_argument("--temperature", type=float, default=1.0, help="of Bradley-Terry (default %(default)s)")
    label.add_argument("--label-noise", type=float, default=0.0, metavar="P", help="flip labels with probability P")
    label.add_argument("--min-margin", type=float, default=0.0, metavar="M", help="leave out pairs closer than this")
    label.add_argument("--pairs-per-prompt", type=positive, default=1, metavar="K", help="default %(default)s")
    label.add_argument("--seed", type=int, default=0, help="of draws, noise and sides (default %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Do the action that was asked for."""
    return _sample(args) if args.action == "sample" else _label(args)


def _sample(args: argparse.Namespace) -> int:
    check_sampling(args)
    prompts = read_prompts(args.prompts, args.limit)
    model, fingerprint = model_identity(args)

    from mmalign.data.build import IMAGES_FILE, SampleSettings, sample_images

    settings = SampleSettings(
        model=model,
        fingerprint=fingerprint,
        steps=args.steps,
        guidance=args.guidance,
        eta=args.eta,
        solver=args.solver,
        precision=args.precision,
        adapter_scale=args.adapter_scale,
        seed=args.seed,
    )
    counts = sample_images(
        lambda: open_generator(args),
        prompts,
        args.out,
        settings,
        images_per_prompt=args.images_per_prompt,
        batch_size=args.batch_size,
    )
    repeated = f" ({counts.repeated_prompts} repeated ones left out)" if counts.repeated_prompts else ""
    print(f"{counts.images} images ({counts.new} new) of {counts.prompts} prompts{repeated}: {args.out / IMAGES_FILE}")
    return 0


def _label(args: argparse.Namespace) -> int:
    if args.out.suffix != ".parquet":
        raise UserError(f"--out {args.out}: pairs are written as parquet; name the file {args.out.stem}.parquet")
    check_output(args.out, folder=False)
    if args.mode == "best-worst" and args.temperature != 1.0:
        raise UserError("--temperature belongs to --mode bradley-terry; best-worst draws nothing")

    from mmalign.data import labelling
    from mmalign.data.parquet import open_parquet
    from mmalign.scoring.chosen import load_weighted_rewards, parse_rewards

    settings = labelling.LabelSettings(
        mode=args.mode,
        temperature=args.temperature,
        label_noise=args.label_noise,
        min_margin=args.min_margin,
        pairs_per_prompt=args.pairs_per_prompt,
        seed=args.seed,
    )
    weights = parse_rewards(args.reward)
    images = labelling.find_images(args.images)
    rewards = load_weighted_rewards(weights, labelling.image_prompts(images))
    with track(open_parquet(images).metadata.num_rows, "label") as job:
        counts = labelling.label_pairs(images, rewards, args.out, settings, progress=job.advance)
    print(f"{counts}: {args.out}")
    return 0
