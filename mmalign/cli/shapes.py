"""The Shapes world: draw its images and videos, read images with its oracle, train its models again.

mmalign shapes draw --count 48 --out world.png
mmalign shapes scenes --count 500 --out runs/shapes/experts.parquet
mmalign shapes read image.png --prompt "a red circle above a blue square"
mmalign shapes check-oracle --count 5000
mmalign shapes videos --count 200 --split test --out runs/shapes-videos
mmalign shapes train-base --out runs/shapes-sd
mmalign shapes train-base --video --start assets/shapes-flow --out runs/shapes-video
mmalign shapes train-vlm --out runs/shapes-vlm
mmalign shapes agreement runs/samples --rewards shapes-clip
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mmalign.cli import shapes_video
from mmalign.cli.generate import not_negative
from mmalign.core.errors import UserError
from mmalign.core.files import check_output

SEED = "seed of all random draws (default %(default)s)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions and their options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    draw = actions.add_parser("draw", help="draw random scenes with their captions as one image")
    draw.add_argument("--count", type=int, default=48, help="number of scenes (default %(default)s)")
    draw.add_argument("--video", action="store_true", help="draw clips of moving Shapes, a row of frames each")
    draw.add_argument("--seed", type=not_negative, default=0, help=SEED)
    draw.add_argument("--out", type=Path, required=True, metavar="FILE.png")
    scenes = actions.add_parser("scenes", help="draw scenes with true captions as good images, for data.labels")
    scenes.add_argument("--count", type=int, default=500, metavar="N", help="number of scenes (default %(default)s)")
    scenes.add_argument("--seed", type=not_negative, default=0, help=SEED)
    scenes.add_argument(
        "--crisp", type=float, default=1.0, help="share of images that are not degraded (default %(default)s)"
    )
    scenes.add_argument("--out", type=Path, required=True, metavar="FILE.parquet")
    read = actions.add_parser(
        "read", help="print what the oracle reads in a 64x64 image, and score the image against a prompt"
    )
    read.add_argument("image", type=Path, help="image file of 64x64 pixels")
    read.add_argument("--prompt", help="prompt to score the image against")
    check = actions.add_parser("check-oracle", help="measure how often the oracle reads newly drawn scenes correctly")
    check.add_argument("--count", type=int, default=4000, help="number of scenes (default %(default)s)")
    check.add_argument("--seed", type=not_negative, default=7, help=SEED)
    check.add_argument("--video", action="store_true", help="on clips of moving Shapes, crisp and degraded")
    _add_videos(actions)
    actions.add_parser("words", help="print every word that prompts may use")
    prompts = actions.add_parser("prompts", help="write the test, validation and training prompt sets again")
    prompts.add_argument("--out", type=Path, required=True, metavar="DIR")
    base = actions.add_parser(
        "train-base", help="train the text-to-image pipeline from scratch (about 50 min on 2 cores)"
    )
    base.add_argument("--out", type=Path, required=True, metavar="DIR")
    base.add_argument("--scenes", type=int, default=60_000, help="number of training images (default %(default)s)")
    base.add_argument("--vae-steps", type=int, default=3600, help="autoencoder steps (default %(default)s)")
    base.add_argument(
        "--images",
        type=int,
        default=270_000,
        help="number of images that the denoiser is trained on (default %(default)s)",
    )
    base.add_argument("--start", type=Path, metavar="DIR", help="start from the weights of this pipeline")
    base.add_argument("--flow", action="store_true", help="train a flow model, such as assets/shapes-flow")
    shapes_video.add_training(base)
    clip = actions.add_parser("train-clip", help="train the CLIP from scratch (half an hour on one CPU core)")
    clip.add_argument("--out", type=Path, required=True, metavar="DIR")
    clip.add_argument("--scenes", type=int, default=50_000, help="number of training scenes (default %(default)s)")
    clip.add_argument("--steps", type=int, default=5000, help="contrastive steps (default %(default)s)")
    clip.add_argument(
        "--samples",
        type=Path,
        nargs="+",
        default=(),
        metavar="DIR",
        help="then train on these images (output folders of `mmalign pairs sample`)",
    )
    clip.add_argument(
        "--preference-steps",
        type=int,
        default=4000,
        metavar="N",
        help="steps on --samples (default %(default)s: 40 min)",
    )
    clip.add_argument("--start", type=Path, metavar="DIR", help="start from these weights, without contrastive steps")
    clip.add_argument("--anchor", type=Path, metavar="DIR", help="average with the weights of this first stage")
    _add_train_vlm(actions)
    agreement = actions.add_parser(
        "agreement", help="measure how often rewards agree with the oracle on generated images"
    )
    agreement.add_argument("samples", type=Path, metavar="DIR", help="output folder of `mmalign pairs sample`")
    agreement.add_argument("--rewards", required=True, metavar="A,B|FILE.yaml", help="rewards, as for `mmalign score`")
    agreement.add_argument(
        "--option", action="append", default=[], metavar="REWARD.KEY=VALUE", help="option of a reward; repeatable"
    )


def _add_train_vlm(actions: argparse._SubParsersAction) -> None:
    vlm = actions.add_parser(
        "train-vlm", help="train the vision-language model from scratch (40 to 50 min on 2 cores), and evaluate it"
    )
    vlm.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of the model; results go to DIR-validation.json beside it",
    )
    vlm.add_argument(
        "--samples",
        type=int,
        default=84_000,
        metavar="N",
        help="number of answers about videos to train on (default %(default)s)",
    )
    vlm.add_argument("--read-steps", type=int, metavar="N", help="first stage: steps on text only (default 1200)")
    vlm.add_argument("--see-steps", type=int, metavar="N", help="second stage: steps on single frames (default 3000)")
    vlm.add_argument("--look-steps", type=int, metavar="N", help="third stage: steps on names (default 600)")
    vlm.add_argument("--seed", type=not_negative, default=0, help=SEED)
    vlm.add_argument(
        "--start",
        type=Path,
        metavar="DIR",
        help="start from these weights and train only on answers and prior, without the first three stages; give "
        "another --seed",
    )
    vlm.add_argument(
        "--prior",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="share of temporal questions that a last stage trains to answer by the first option, or yes, whatever "
        "the video: the error that preference learning is to correct; 0: none (default %(default)s)",
    )
    vlm.add_argument(
        "--measure",
        type=int,
        default=110,
        metavar="N",
        help="number of families of validation videos; 0: no evaluation (default %(default)s)",
    )


def _add_videos(actions: argparse._SubParsersAction) -> None:
    videos = actions.add_parser("videos", help="draw videos with questions: files, videos.parquet, questions.parquet")
    videos.add_argument(
        "--count",
        type=int,
        default=100,
        metavar="N",
        help="least number of videos; twins are kept together (default %(default)s)",
    )
    videos.add_argument("--split", default="train", help="train, validation or test (default %(default)s)")
    videos.add_argument("--seed", type=not_negative, default=0, help=SEED)
    videos.add_argument(
        "--frames",
        default="8",
        metavar="N|A,B",
        help="frames per video, 8 to 16; sampled from a list (default %(default)s)",
    )
    videos.add_argument(
        "--size", type=int, default=48, help="height and width in pixels, 32 to 48 (default %(default)s)"
    )
    videos.add_argument("--fps", type=float, default=4.0, help="frames per second in the files (default %(default)s)")
    videos.add_argument(
        "--format", default="mkv", help="mkv (FFV1, lossless) or mp4 (H.264, plays everywhere); default %(default)s"
    )
    videos.add_argument(
        "--scramble", action="store_true", help="shuffle the frames but keep the answers, which nobody can know then"
    )
    videos.add_argument(
        "--sheet", type=Path, metavar="FILE.png", help="also draw a family of every topic as one image"
    )
    videos.add_argument("--out", type=Path, required=True, metavar="DIR")


def run(args: argparse.Namespace) -> int:
    """Run the chosen action."""
    if hasattr(args, "out"):
        check_output(args.out, folder=args.action not in ("draw", "scenes"))
    video = getattr(args, "video", False)
    return {
        "draw": shapes_video.draw if video else _draw, "scenes": _scenes, "read": _read, "words": _words,
        "check-oracle": shapes_video.check_oracle if video else _check_oracle,
        "prompts": _prompts, "train-base": shapes_video.train if video else _train_base, "train-clip": _train_clip,
        "train-vlm": _train_vlm, "agreement": _agreement, "videos": _videos,
    }[args.action](args)  # fmt: skip


def _draw(args: argparse.Namespace) -> int:
    import numpy as np
    from PIL import Image

    from mmalign.core.io.grid import labelled_grid
    from mmalign.shapes.language import caption
    from mmalign.shapes.world import render, sample_scene

    rng = np.random.default_rng(args.seed)
    scenes = [sample_scene(rng) for _ in range(args.count)]
    pictures = [Image.fromarray(render(scene)) for scene in scenes]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    labelled_grid(pictures, [caption(rng, scene) for scene in scenes]).save(args.out)
    print(f"{args.count} scenes: {args.out}")
    return 0


def _scenes(args: argparse.Namespace) -> int:
    from mmalign.shapes.scene_set import write_scenes

    if args.count < 1 or not 0 <= args.crisp <= 1:
        raise UserError(f"--count {args.count} must be at least 1, and --crisp {args.crisp:g} between 0 and 1")
    write_scenes(args.out, args.count, seed=args.seed, crisp=args.crisp)
    print(f"{args.count} scenes with their captions: {args.out}")
    return 0


def _read(args: argparse.Namespace) -> int:
    import numpy as np

    from mmalign.core.io.images import open_image, read_bytes
    from mmalign.shapes import oracle
    from mmalign.shapes.language import parse

    name = str(args.image)
    try:
        reading = oracle.read(np.asarray(open_image(read_bytes(args.image, name), name)))
    except ValueError as error:
        raise UserError(f"{args.image}: {error}") from None
    print(
        f"background {reading.background}; quality {reading.quality:.2f} = sharpness {reading.sharpness:.2f}", end=""
    )
    print(f" x cleanness {reading.cleanness:.2f} x contrast {reading.contrast:.2f}")
    for thing in reading.objects:
        place = f"at ({thing.x:.0f}, {thing.y:.0f}), radius {thing.radius:.1f} px, fit {thing.fit:.2f}"
        print(f"  {thing.size} {thing.colour} {thing.shape} {place}")
    if args.prompt:
        score = oracle.judge(parse(args.prompt), reading)
        strict = "strictly correct" if score > 1 - 1e-6 else "not strictly correct"
        print(f"correctness {score:.3f} ({strict}): {args.prompt}")
    return 0


def _check_oracle(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from mmalign.shapes.check import check_oracle

    table = Table(title=f"oracle on {args.count} freshly drawn scenes, seed {args.seed}")
    for name in ("render quality", "scene", "scenes", "read strictly right"):
        table.add_column(name, justify="left" if name in ("render quality", "scene") else "right")
    for row in check_oracle(args.count, args.seed):
        table.add_row(row.quality, row.scene, str(row.scenes), f"{100 * row.right / row.scenes:.1f} %")
    Console().print(table)
    return 0


def _videos(args: argparse.Namespace) -> int:
    from mmalign.shapes.contact_sheet import contact_sheet
    from mmalign.shapes.video_set import check_request, write_video_set

    frames = check_request(args.count, args.split, args.frames, args.size, args.format, args.fps)
    if args.sheet:
        check_output(args.sheet, "--sheet", folder=False)
    videos, questions = write_video_set(
        args.out, args.count, split=args.split, seed=args.seed, frames=frames, size=args.size, suffix=args.format,
        fps=args.fps, scramble=args.scramble,
    )  # fmt: skip
    if args.sheet:
        args.sheet.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(split=args.split, seed=args.seed, size=args.size).save(args.sheet)
    print(f"{videos} videos, {questions} questions: {args.out}")
    return 0


def _words(args: argparse.Namespace) -> int:
    from mmalign.shapes import language

    for title, table in (
        ("shapes", language.SHAPE_WORDS), ("colours", language.COLOUR_WORDS), ("sizes", language.SIZE_WORDS),
        ("backgrounds", language.BACKGROUND_WORDS), ("relations", language.RELATION_WORDS),
    ):  # fmt: skip
        print(title)
        for meaning, words in table.items():
            print(f"  {meaning:10} {', '.join(words)}")
    print(f"numbers\n  {', '.join(language.NUMBERS)}")
    shapes_video.words()
    return 0


def _prompts(args: argparse.Namespace) -> int:
    from mmalign.shapes.motion.prompts import write_motion_prompt_sets
    from mmalign.shapes.prompts import write_prompt_sets

    write_prompt_sets(args.out)
    write_motion_prompt_sets(args.out)
    print(f"shapes-*.csv, and shapes-motion-*.csv for videos: {args.out}")
    return 0


def _train_base(args: argparse.Namespace) -> int:
    from mmalign.shapes.train_base import train_base

    sizes = {"scenes": args.scenes, "vae_steps": args.vae_steps, "images": args.images}
    train_base(args.out, **sizes, start=args.start, flow=args.flow)
    print(f"a diffusers pipeline: {args.out}")
    return 0


def _train_clip(args: argparse.Namespace) -> int:
    from mmalign.shapes.train_clip import train_clip

    if args.start and not args.samples:
        raise UserError("--start needs --samples, the images to train on")
    train_clip(
        args.out,
        scenes=args.scenes,
        steps=args.steps,
        samples=args.samples,
        preference_steps=args.preference_steps,
        start=args.start,
        anchor=args.anchor,
    )
    print(f"an open_clip model: {args.out}")
    return 0


def _train_vlm(args: argparse.Namespace) -> int:
    from rich.console import Console

    from mmalign.shapes.train_vlm import train_vlm
    from mmalign.shapes.vlm_report import as_table, measure, write_report

    if args.measure < 0:
        raise UserError(f"--measure {args.measure}: must be 0 (no evaluation) or more")
    names = ("read_steps", "see_steps", "look_steps")
    steps = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.start and steps:
        option = next(iter(steps)).replace("_", "-")
        raise UserError(f"--{option} belongs to a stage that --start skips; remove one of them")
    report = Path(f"{args.out.resolve()}-validation.json")
    model = train_vlm(args.out, samples=args.samples, seed=args.seed, start=args.start, prior=args.prior, **steps)
    print(f"a vision-language model in transformers' layout: {args.out}")
    if args.measure:
        lines = measure(model, args.measure)
        write_report(lines, report)
        Console().print(as_table(lines))
        print(f"the same as JSON: {report}")
    return 0


def _agreement(args: argparse.Namespace) -> int:
    import torch
    from rich.console import Console
    from rich.table import Table

    from mmalign.core.progress import track
    from mmalign.scoring.chosen import load_choices, read_choices
    from mmalign.shapes.agreement import agreement, read_samples

    choices = read_choices(args.rewards, args.option)
    samples = read_samples(args.samples)
    rewards = {entry.name: entry.reward for entry in load_choices(choices, samples.prompts)}
    table = Table(title=f"agreement with the oracle on {len(samples.images)} images")
    for column in ("reward", "correctness differs", "pairs", "equal, quality differs", "pairs"):
        table.add_column(column, justify="left" if column == "reward" else "right")
    media = torch.from_numpy(samples.images).permute(0, 3, 1, 2)
    for name, reward in rewards.items():
        scores = []
        with track(len(media), f"score {name}") as job:
            for start in range(0, len(media), 64):
                part = media[start : start + 64].float() / 255
                prompts = samples.prompts[start : start + 64] if "prompts" in reward.needs else None
                scores.append(reward(part, prompts=prompts))
                job.advance(len(part))
        values = torch.cat(scores).numpy() * (1 if reward.higher_is_better else -1)
        found = agreement(name, values, samples)
        table.add_row(
            name, f"{100 * found.correctness:.1f} %", str(found.correctness_pairs),
            f"{100 * found.quality:.1f} %", str(found.quality_pairs),
        )  # fmt: skip
    Console().print(table)
    return 0
