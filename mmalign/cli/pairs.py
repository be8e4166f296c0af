"""Build preference data: `sample` images for prompts, `label` them by rewards, or `perturb` images and videos.

`sample` generates several images for each prompt. `label` turns them, or images of one's own, into preference pairs by
rewards, or relabels existing pairs: a parquet file with the columns of Pick-a-Pic. `perturb` writes captions that do
not fit good images, or pairs of answers to original and perturbed videos. Run the same `sample`, or `perturb` of
videos, again to resume it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mmalign.cli.generate import (
    add_geometry_arguments,
    add_image_argument,
    add_sampling_arguments,
    not_negative,
    positive,
    read_sampling,
    seconds,
)
from mmalign.cli.pair_source import add_source_arguments, read_source
from mmalign.cli.perturb_videos import add_video_arguments, perturb_videos, refuse_video_options
from mmalign.cli.real_media import add_real_arguments, read_prompts_or_media
from mmalign.core.errors import UserError
from mmalign.core.files import check_output
from mmalign.core.progress import note, track

if TYPE_CHECKING:
    from mmalign.scoring.pictures import Picture


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `mmalign pairs sample`, `label` and `perturb`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="sample|label|perturb")
    sample = actions.add_parser("sample", help="generate several images or videos a prompt, in DIR/images.parquet")
    add_sampling_arguments(sample, needs_prompts=False)
    add_image_argument(add_geometry_arguments(sample))
    add_real_arguments(sample)
    sample.add_argument(
        "--images-per-prompt",
        type=positive,
        default=4,
        metavar="N",
        help="images for each prompt (default %(default)s)",
    )
    sample.add_argument(
        "--seed",
        type=not_negative,
        default=0,
        help="seed from which all image seeds are derived (default %(default)s)",
    )
    label = actions.add_parser("label", help="score images and write preference pairs, or relabel existing pairs")
    label.add_argument(
        "source",
        metavar="DIR|FILE|HUB ID",
        help="output folder of `mmalign pairs sample`, existing pairs as data.pairs takes them, or a folder of images",
    )
    add_source_arguments(label)
    label.add_argument(
        "--folder-prompts", action="store_true", help="the names of the folders are the prompts of the images in them"
    )
    label.add_argument(
        "--reward", required=True, metavar="R,R2:0.5", help="rewards, each with an optional weight (default 1)"
    )
    label.add_argument("--out", required=True, type=Path, metavar="FILE.parquet", help="file to write the pairs to")
    label.add_argument(
        "--segments",
        type=seconds,
        metavar="SECONDS",
        help="score and label segments of videos of this length apart, for `diffusion_dpo` (DenseDPO: 1)",
    )
    modes = ("best-worst", "bradley-terry", "calibrated")
    label.add_argument(
        "--mode",
        choices=modes,
        default="best-worst",
        help="how winners are chosen; calibrated: scores are win rates (default %(default)s)",
    )
    label.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="temperature of the modes other than best-worst (default %(default)s)",
    )
    label.add_argument(
        "--label-noise", type=float, default=0.0, metavar="P", help="flip each label with probability P"
    )
    label.add_argument(
        "--min-margin",
        type=float,
        default=0.0,
        metavar="M",
        help="drop pairs whose scores differ by less than M; of segments, make them ties (default %(default)s)",
    )
    label.add_argument(
        "--pairs-per-prompt", type=positive, default=1, metavar="K", help="pairs for each prompt (default %(default)s)"
    )
    label.add_argument(
        "--seed", type=not_negative, default=0, help="seed of sampling, label noise and sides (default %(default)s)"
    )
    _add_perturb_arguments(
        actions.add_parser("perturb", help="write captions that do not fit images, or pairs of answers about videos")
    )


def _add_perturb_arguments(perturb: argparse.ArgumentParser) -> None:
    perturb.add_argument(
        "source",
        metavar="FILE|DIR",
        help="preference pairs (of which the chosen images are used), labelled images, or videos with questions: a "
        "folder of them, or a CSV, JSONL, parquet or TSV file with a column video",
    )
    perturb.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="FILE.parquet",
        help="file to write, for data.labels (captions) or data.pairs (answers)",
    )
    perturb.add_argument("--answers", metavar="DIR", help="folder in which the model's answers are cached")
    perturb.add_argument("--limit", type=positive, metavar="N", help="use only the first N images, or questions")
    perturb.add_argument("--seed", type=not_negative, default=0, help="seed of all random draws (default %(default)s)")
    add_video_arguments(perturb)
    captions = perturb.add_argument_group("captions of images")
    captions.add_argument(
        "--contrast",
        metavar="shapes|rules|FILE",
        help="source of the edited captions: the rules of Shapes, which check that no edited caption is true "
        "(default), rules of "
        "English, or a JSON file",
    )
    captions.add_argument(
        "--endpoint",
        metavar="URL",
        help="language model endpoint that writes the captions instead, such as http://localhost:8000/v1",
    )
    captions.add_argument("--llm", metavar="NAME", help="name of the model at the endpoint")
    captions.add_argument(
        "--api-key-env", metavar="VARIABLE", help="environment variable that holds the endpoint's key"
    )


def run(args: argparse.Namespace) -> int:
    """Run the chosen action."""
    return {"sample": _sample, "label": _label, "perturb": _perturb}[args.action](args)


def _sample(args: argparse.Namespace) -> int:
    sampling = read_sampling(args)
    videos = sampling.makes_videos()
    prompts, unusable = read_prompts_or_media(args, sampling)
    prompts = sampling.with_first_frames(prompts, args.image)
    model, fingerprint = sampling.identity()
    from mmalign.data.building.sampling import IMAGES_FILE, SampleSettings, sample_images

    settings = SampleSettings(
        model=model,
        fingerprint=fingerprint,
        steps=sampling.steps,
        guidance=sampling.guidance,
        eta=sampling.eta,
        solver=sampling.solver,
        precision=sampling.precision,
        adapter_scale=sampling.adapter_scale,
        image_size=sampling.image_size,
        video=None if sampling.video is None else sampling.video.sampling,
        seed=args.seed,
        strength=args.strength,
        first_frames=any(prompt.first_frame is not None for prompt in prompts) or None,
    )
    counts = sample_images(
        sampling.open,
        prompts,
        args.out,
        settings,
        images_per_prompt=args.images_per_prompt,
        batch_size=args.batch_size,
        unusable=unusable,
    )
    repeated = f" ({counts.repeated_prompts} repeated ones left out)" if counts.repeated_prompts else ""
    made = "videos" if videos else "images"
    of = "prompts" if args.real is None else f"real {made}"
    lost = f" ({counts.unusable} that cannot be used left out)" if counts.unusable else ""
    print(
        f"{counts.images} {made} ({counts.new} new) of {counts.prompts} {of}{repeated}{lost}: {args.out / IMAGES_FILE}"
    )
    return 0


def _check_out(out: Path) -> None:
    if out.suffix != ".parquet":
        raise UserError(f"--out {out}: pairs are written as parquet; name the file {out.stem}.parquet")
    check_output(out, folder=False)


def _label(args: argparse.Namespace) -> int:
    _check_out(args.out)
    if args.mode == "best-worst" and args.temperature != 1.0:
        raise UserError("--temperature applies to --mode bradley-terry or calibrated only; best-worst does not sample")

    from mmalign.scoring import labelling
    from mmalign.scoring.chosen import load_weighted_rewards, parse_rewards
    from rewards.registry import reward_class

    settings = labelling.LabelSettings(
        mode=args.mode,
        temperature=args.temperature,
        label_noise=args.label_noise,
        min_margin=args.min_margin,
        pairs_per_prompt=args.pairs_per_prompt,
        seed=args.seed,
    )
    weights = parse_rewards(args.reward)
    source = _to_label(args, lambda: reward_class(next(iter(weights))).modality == "video")
    pictures = iter(source.pictures)
    label: Callable[..., Any] = labelling.label_pictures
    if args.segments is not None:
        from mmalign.scoring.segments import check_segments, label_segments

        for first in islice(pictures, 1):
            check_segments(first, settings, list(weights), args.segments)
            pictures = chain([first], pictures)
        label = partial(label_segments, seconds=args.segments)
    rewards = load_weighted_rewards(weights, source.prompts)
    with track(source.images, "label") as job:
        counts = label(
            pictures,
            rewards,
            args.out,
            settings,
            source=args.source,
            metadata=source.metadata,
            progress=job.advance,
        )
    print(f"{counts}: {args.out}")
    return 0


class _ToLabel(NamedTuple):
    """Pictures to label, their number and prompts, and what the pairs record about them."""

    pictures: Iterable[Picture]
    images: int
    prompts: list[str]
    metadata: dict[str, Any]


def _to_label(args: argparse.Namespace, of_videos: Callable[[], bool]) -> _ToLabel:
    """Return the pictures of sampled images, of a folder of one's own, or of existing pairs.

    Pairs have their first frames if they are `of_videos`, which is asked when they are read.
    """
    from mmalign.core.io.images import find_images
    from mmalign.core.io.parquet import open_parquet, read_metadata
    from mmalign.scoring import pictures as of

    path = Path(args.source)
    if (path / "images.parquet").is_file() or (path / "parts").is_dir() or (path.is_file() and of.is_sampled(path)):
        images = find_images(path)
        _refuse_source_options(args, "the images of `mmalign pairs sample`")
        rows, settings = open_parquet(images).metadata.num_rows, read_metadata(images).get("settings", {})
        return _ToLabel(of.sampled_pictures(images), rows, of.sampled_prompts(images), {"sampling": settings})
    metadata = {"source": args.source}
    if path.is_dir() and of.holds_pictures(path) and args.columns is None and not _lists_pairs(path):
        pictures = of.own_pictures(args.source, args.prompt, folder_prompts=args.folder_prompts)[: args.limit]
        return _ToLabel(pictures, len(pictures), of.distinct_prompts(pictures), metadata)
    if args.folder_prompts:
        raise UserError("--folder-prompts applies to a folder of images, and this source holds pairs; remove it")

    from mmalign.data.pairs import read_pairs

    table = read_pairs(args.source, read_source(args, ties="keep"))
    note(f"{args.source}: {table.counts}")
    both = of.pictures_of_pairs(table, lambda index: table.first_frame(index) if of_videos() else None)
    return _ToLabel(both, 2 * len(table), table.prompts, metadata)


def _lists_pairs(folder: Path) -> bool:
    """Tell whether the metadata in a folder of images lists pairs of them."""
    from mmalign.config.sections import DataConfig
    from mmalign.core.files import visible
    from mmalign.core.io.tables import TABLE_SUFFIXES, Table
    from mmalign.data.readers.layouts import holds_pairs

    tables = [path for path in visible(folder, "**/metadata.*") if path.suffix.lower() in TABLE_SUFFIXES]
    return bool(tables) and holds_pairs(Table(tables[0]).columns, DataConfig())


def _refuse_source_options(args: argparse.Namespace, what: str) -> None:
    given = [name for name in ("columns", "limit", "prompt") if getattr(args, name) is not None]
    given += ["folder-prompts"] if args.folder_prompts else []
    if given:
        raise UserError(f"--{given[0]} does not apply to {what}; remove it")


def _perturb(args: argparse.Namespace) -> int:
    _check_out(args.out)

    from mmalign.data.video.items import is_video_source

    if is_video_source(args.source):
        return perturb_videos(args)
    refuse_video_options(args)
    source = _contrast(args)

    from mmalign.config.sections import DataConfig
    from mmalign.data.building.captions import perturb_captions
    from mmalign.data.labels import read_labels

    table = read_labels(args.source, DataConfig(labels=args.source, limit=args.limit))
    with track(len(table), "perturb") as job:
        counts = perturb_captions(table, args.out, source, seed=args.seed, progress=job.advance)
    print(f"{counts}: {args.out}")
    return 0


def _contrast(args: argparse.Namespace) -> str | dict[str, object]:
    """Return the source of the rejected captions, in the form that `edits_of` takes."""
    if args.endpoint is None:
        given = [f"--{name}" for name in ("llm", "api_key_env", "answers") if getattr(args, name) is not None]
        if given:
            raise UserError(f"{given[0].replace('_', '-')} applies to --endpoint only; give both or neither")
        return args.contrast or "shapes"
    if args.contrast is not None or args.llm is None:
        raise UserError("--endpoint needs the name of its model: give --llm, and remove --contrast")
    options = {"api_key_env": args.api_key_env, "cache": args.answers}
    return {"endpoint": args.endpoint, "model": args.llm, **{k: v for k, v in options.items() if v is not None}}
