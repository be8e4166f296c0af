"""Generate images from prompts: PNG files named INDEX-SEED.png, and metadata.jsonl (prompt, category, seed, file).

A video model writes INDEX-SEED.mp4 instead, and frames.png, a contact sheet with a row of frames for each video:

  mmalign generate Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompts "a cat runs" --out out --guidance 5 --steps 50 \\
    --frames 33 --height 240 --width 416 --precision bf16

An image-to-video model starts from `--image FILE`, or from the image in the column first_frame of the prompts' table.

Run the same command again to generate only what is missing.
"""

from __future__ import annotations

import argparse
import math
import os
import re
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.cli.generated import ImageFolder, VideoFolder
from mmalign.core.errors import UserError
from mmalign.core.files import check_output, exists
from mmalign.core.progress import track

if TYPE_CHECKING:
    from mmalign.api.generate import Sampling
    from mmalign.data.prompts import Prompt
    from pipelines import VideoOptions

_DIGITS = re.compile("[0-9]{1,18}")  # of at most 64 bits
TEXT_PREFIX = "text:"
MOST_FPS = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `mmalign generate`."""
    add_sampling_arguments(parser)
    parser.set_defaults(batch_size=None)
    parser.add_argument(
        "--seeds", type=_integers, default=[0], metavar="0,1", help="seeds to sample for every prompt (default: 0)"
    )
    videos = add_geometry_arguments(parser)
    second = "guidance of the expert for low noise, in a model of two (Wan 2.2 A14B; default: as --guidance)"
    videos.add_argument("--low-noise-guidance", type=float, metavar="S", help=second)
    add_image_argument(videos)
    parser.add_argument(
        "--grid", action="store_true", help="also write grid.png with a row for each prompt and a column for each seed"
    )


def add_geometry_arguments(parser: argparse.ArgumentParser) -> Any:
    """Declare the arguments of the geometry of videos, and return their group."""
    videos = parser.add_argument_group("video models", "sizes that a family does not take name the nearest one")
    videos.add_argument("--frames", type=positive, metavar="N", help="frames of a video, most often 4k + 1")
    videos.add_argument("--fps", type=_rate, metavar="N", help="frames a second (default for all: the model's own)")
    for side in ("height", "width"):
        videos.add_argument(f"--{side}", type=positive, metavar="N", help=f"{side} of a frame in pixels")
    return videos


def add_image_argument(videos: Any) -> None:
    """Declare `--image` among the options of videos."""
    start = "first frame of the videos (image to video); a column first_frame of the prompts gives each its own"
    videos.add_argument("--image", type=Path, metavar="FILE", help=start)


def add_sampling_arguments(parser: argparse.ArgumentParser, *, needs_prompts: bool = True) -> None:
    """Declare the arguments of all commands that sample images from one model."""
    parser.add_argument("model", metavar="MODEL", help="model directory, directory of a training run, or hub id")
    parser.add_argument(
        "--prompts",
        required=needs_prompts,
        metavar="NAME|FILE|TEXT",
        help="a built-in set, a file, or the prompt itself",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write to")
    parser.add_argument("--limit", type=positive, metavar="N", help="use only the first N prompts")
    parser.add_argument("--steps", type=positive, default=50, help="sampling steps (default %(default)s)")
    parser.add_argument(
        "--guidance", type=float, default=7.5, help="classifier-free guidance scale; 1: none (default %(default)s)"
    )
    parser.add_argument(
        "--eta",
        type=float,
        default=0.0,
        help="noise of the DDIM sampler, from 0 (deterministic) to 1 (default %(default)s)",
    )
    parser.add_argument("--solver", choices=("ddim", "dpm++"), default="ddim", help="sampler (default %(default)s)")
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16", "fp16"),
        default="fp32",
        help="type of the weights (default %(default)s)",
    )
    parser.add_argument(
        "--batch-size", type=positive, default=8, metavar="N", help="images per batch (default: 8; 1 video)"
    )
    parser.add_argument(
        "--image-size", type=positive, metavar="N", help="side of the images in pixels (default: the model's own)"
    )
    add_adapter_argument(parser)
    how_much = "strength of the adapter: 0: the base model, 1: as trained (default), between: interpolated"
    parser.add_argument("--adapter-scale", type=float, default=1.0, metavar="S", help=how_much)


def add_adapter_argument(parser: argparse.ArgumentParser) -> None:
    """Declare `--adapter`, which may be given several times."""
    parser.add_argument(
        "--adapter",
        action="append",
        metavar="PATH[:WEIGHT]",
        help="LoRA file or directory to load on top of MODEL, from mmalign, diffusers, kohya or ComfyUI; repeated, "
        "several add up by their weights (default 1)",
    )


def read_prompts(given: str, limit: int | None) -> list[Prompt]:
    """Return the prompts of a built-in set or a file, or one prompt: text with a space in it, or after "text:".

    Raises:
        UserError: a single word that is neither a file nor a set, or an unreadable file.
    """
    from mmalign.data.prompts import Prompt, load_prompts

    if given.startswith(TEXT_PREFIX):
        given = given.removeprefix(TEXT_PREFIX).strip()
        if not given:
            raise UserError(f"--prompts {TEXT_PREFIX}: no prompt follows; write --prompts '{TEXT_PREFIX}a red circle'")
        return [Prompt(given)]
    if any(letter.isspace() for letter in given.strip()) and not exists(given):
        return [Prompt(given.strip())]
    try:
        return load_prompts(given, limit)
    except UserError as error:
        if Path(given).suffix or os.sep in given:
            raise
        raise UserError(f"{error}; for a prompt of one word write --prompts {TEXT_PREFIX}{given}") from None


def read_sampling(args: argparse.Namespace) -> Sampling:
    """Return which model draws, and how, after refusing what cannot work before a model is read.

    Raises:
        UserError: options are out of range or exclude each other.
    """
    from mmalign.api.generate import Sampling

    given = {field.name: getattr(args, field.name) for field in fields(Sampling) if hasattr(args, field.name)}
    sampling = Sampling(**given, video=_video_options(args))
    sampling.check(lambda name: f"--{name.replace('_', '-')}")
    check_output(args.out)
    return sampling


def _video_options(args: argparse.Namespace) -> VideoOptions | None:
    from pipelines import VideoOptions

    video = VideoOptions(*(getattr(args, name, None) for name in ("height", "width", "frames", "fps")))
    return video if video.given() else None


def run(args: argparse.Namespace) -> int:
    """Make the images and say where they lie."""
    from mmalign.core.lock import locked_output

    sampling = read_sampling(args)
    prompts = sampling.with_first_frames(read_prompts(args.prompts, args.limit), args.image)
    with locked_output(Path(args.out)):
        _complete(args, sampling, prompts)
    return 0


def _complete(args: argparse.Namespace, sampling: Sampling, prompts: list[Prompt]) -> None:
    videos = sampling.makes_videos()
    folder = (VideoFolder if videos else ImageFolder)(args.out, prompts, args.seeds)
    folder.check_settings(_settings(sampling))
    missing = folder.missing()
    total, new = len(prompts) * len(args.seeds), sum(map(len, missing.values()))
    if new:
        _draw(sampling, args.batch_size or (1 if videos else 8), folder, missing, total)
    folder.write_metadata()
    print(f"{total} {'videos' if videos else 'images'} ({new} new) of {len(prompts)} prompts: {args.out}")
    if args.grid or videos:
        print(f"{'frames' if videos else 'grid'}: {folder.write_grid()}")


def _settings(sampling: Sampling) -> dict[str, Any]:
    names = ("steps", "guidance", "eta", "solver", "precision", "adapter_scale", "image_size")
    model, identity = sampling.identity()
    chosen = {name: getattr(sampling, name) for name in names}
    if sampling.video is not None:
        chosen["video"] = sampling.video.sampling
    if sampling.low_noise_guidance is not None:
        chosen["low_noise_guidance"] = sampling.low_noise_guidance
    return {"model": model, "fingerprint": identity, **chosen}


def _draw(sampling: Sampling, batch_size: int, folder: ImageFolder, missing: dict[int, list[int]], total: int) -> None:
    made = total - sum(map(len, missing.values()))
    with track(total, "generate", unit=folder.unit, initial=made) as job:
        generator = sampling.open()
        folder.rate = getattr(generator, "fps", None)
        indices = list(missing)
        images = sampling.draw(
            generator, [folder.prompts[index] for index in indices], list(missing.values()), batch_size, job.advance
        )
        for item in images:
            folder.put(indices[item.prompt_index], item.seed, item.image)


def _integers(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no list of whole numbers; write 0,1,2") from None
    if len(set(seeds)) < len(seeds) or min(seeds) < 0 or max(seeds) >= 2**63:
        raise argparse.ArgumentTypeError(f"'{text}': seeds must be different, not negative, and below 2^63")
    return seeds


def positive(text: str) -> int:
    """Read a whole number above 0, as an argument type."""
    if not _DIGITS.fullmatch(text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number above 0")
    return int(text)


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate <= MOST_FPS:
        raise argparse.ArgumentTypeError(
            f"'{text}' is not a number of frames a second, above 0 and at most {MOST_FPS}"
        )
    return rate


def not_negative(text: str) -> int:
    """Read a whole number of at least 0, as an argument type."""
    if not _DIGITS.fullmatch(text):
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 0")
    return int(text)


def seconds(text: str) -> float:
    """Read a number of seconds above 0, as an argument type."""
    try:
        length = float(text)
    except ValueError:
        length = 0.0
    if not 0 < length < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of seconds above 0")
    return length
