"""Compare generators of images or videos on the same prompts and seeds, by several rewards with paired intervals.

Give a YAML config, or the models themselves; the first one is the baseline. Options and `key.path=value` override the
config. A folder of images or videos made elsewhere is a system too. A system of the config names its `model`, its
`images` or `videos`, or the training config that makes it (`train`, `overrides`). `budget` limits the cost of each
training: {images: N} seen, {seconds: S} or {reward_calls: R}. `training_seeds: [0, 1]` trains each system once from
every seed. `diversity: REWARD` measures how much the images of a prompt differ.
Video models are sampled at their own geometry unless --frames, --fps, --height and --width say otherwise; an image
reward scores --reward-frames of each video.
Vision-language models are compared by `questions` (a folder of videos with questions) instead of `prompts` and
`rewards`; --frames or --fps then say which frames they see. Run the same command again to train, sample and score
only what is missing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from mmalign.cli.generate import add_geometry_arguments, positive
from mmalign.cli.train import end_training_well
from mmalign.core.errors import UserError

if TYPE_CHECKING:
    from mmalign.compare.config import CompareConfig
    from mmalign.compare.vlm.config import QuestionConfig

_CONFIG_KEYS = {
    "questions": "questions",
    "prompts": "prompts",
    "rewards": "rewards",
    "out": "output",
    "baseline": "baseline",
    "seeds": "seeds",
    "steps": "steps",
    "guidance": "guidance",
    "solver": "solver",
    "image_size": "image_size",
    "precision": "precision",
    "limit": "limit",
    "batch_size": "batch_size",
}
_VIDEO_KEYS = ("frames", "fps", "height", "width")
_CONTROL_KEYS = {
    "guidance_control": "guidances",
    "control_prompts": "prompts",
    "control_reward": "rewards",
    "control_limit": "limit",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `mmalign compare`; without one, the config or its default applies."""
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="CONFIG | MODEL",
        help="one YAML config, or two or more models or folders of images or videos",
    )
    parser.add_argument("--prompts", metavar="NAME|FILE", help="test prompts: a built-in set or a file")
    parser.add_argument(
        "--questions",
        metavar="DIR",
        help="videos with questions, for vision-language models; replaces --prompts and --rewards",
    )
    parser.add_argument("--rewards", type=_words, metavar="A,B", help="rewards that score what is made")
    parser.add_argument(
        "--reward-frames",
        type=positive,
        metavar="K",
        help="of videos, image rewards score K frames, and the mean counts",
    )
    parser.add_argument("--out", metavar="DIR", help="folder for report.html, results.json and what is made")
    parser.add_argument("--names", type=_words, metavar="A,B", help="names of the models (default: folder names)")
    parser.add_argument(
        "--baseline", metavar="NAME", help="the system to compare the others with (default: the first)"
    )
    parser.add_argument(
        "--seeds", type=_integers, metavar="0,1", help="seeds to sample for every prompt (default: 0,1)"
    )
    parser.add_argument("--steps", type=int, help="sampling steps (default: 50)")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance scale (default: 7.5)")
    parser.add_argument("--solver", choices=("ddim", "dpm++"), help="sampler (default: ddim)")
    parser.add_argument(
        "--image-size", type=int, metavar="N", help="side of the images in pixels (default: each model's own)"
    )
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="type of the weights (default: fp32)")
    parser.add_argument("--limit", type=int, metavar="N", help="use only the first N prompts, or questions")
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="images or questions per batch (default: 8; 1 video)"
    )
    add_geometry_arguments(parser)
    training = parser.add_argument_group("systems that the config trains").add_mutually_exclusive_group()
    training.add_argument("--no-train", action="store_true", help="do not train; all systems must be trained already")
    training.add_argument(
        "--retrain",
        action="store_true",
        help="train systems again whose config has changed, and keep the old results aside",
    )
    control = parser.add_argument_group(
        "guidance control", "adds the baseline with its best guidance scale as one more system"
    )
    control.add_argument("--guidance-control", type=_numbers, metavar="3,4,6,8", help="guidance scales to try")
    control.add_argument("--control-prompts", metavar="NAME|FILE", help="validation prompts for choosing the scale")
    control.add_argument(
        "--control-reward", type=_words, metavar="R", help="reward for choosing the scale (default: the first)"
    )
    control.add_argument("--control-limit", type=int, metavar="N", help="use only the first N validation prompts")


def run(args: argparse.Namespace) -> int:
    """Compare, then print the table and the path of the report."""
    config = read_arguments(args)

    from mmalign.compare.report.console import print_summary
    from mmalign.compare.run import compare
    from mmalign.compare.vlm.config import QuestionConfig
    from mmalign.compare.vlm.run import compare_questions

    def do() -> None:
        options = {"train": not args.no_train, "retrain": args.retrain}
        if isinstance(config, QuestionConfig):
            outcome = compare_questions(config, **options)
        else:
            outcome = compare(config, **options)
        print_summary(outcome.results, outcome.report)

    return end_training_well(do)


def read_arguments(args: argparse.Namespace) -> CompareConfig | QuestionConfig:
    """Turn the command line into a checked config.

    Raises:
        UserError: options are missing or contradict each other.
    """
    from mmalign.compare.config import is_comparison, make_compare_config, name_models
    from mmalign.compare.images.made import as_system
    from mmalign.compare.systems.config import check_values
    from mmalign.compare.vlm.config import QuestionConfig, asks_questions, load_comparison

    options, video = _given(args, _CONFIG_KEYS), _given(args, {key: key for key in _VIDEO_KEYS})
    control = _given(args, _CONTROL_KEYS)
    if is_comparison(args.inputs[0]):
        if args.names:
            raise UserError(
                "--names applies to models given one by one; a config names its systems itself; remove --names"
            )
        if args.reward_frames:
            raise UserError("--reward-frames applies to models given one by one; set `frames` of a config's rewards")
        asks = args.questions or asks_questions(args.inputs[0], args.inputs[1:])
        options |= {key if asks else f"video.{key}": value for key, value in video.items()}
        options |= {f"guidance_control.{key}": value for key, value in control.items()}
        overrides = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in options.items()]
        return load_comparison(args.inputs[0], [*args.inputs[1:], *overrides])
    for key in ("out",) if args.questions else ("prompts", "rewards", "out"):
        if getattr(args, key) is None:
            raise UserError(f"--{key} is missing: it is needed when models are given instead of a config")
    if args.questions:
        options |= video
        _refuse_drawing(
            [
                *options,
                *("reward_frames",) * bool(args.reward_frames),
                *(key for key in _CONTROL_KEYS if getattr(args, key) is not None),
            ]
        )
    if control:
        if args.guidance_control is None or args.control_prompts is None:
            raise UserError(
                "a guidance control needs both --guidance-control, the scales to try, and --control-prompts, "
                "the validation prompts for choosing the scale"
            )
        options["guidance_control"] = {"rewards": options["rewards"][:1], **control}
    names = args.names or name_models(args.inputs)
    if len(names) != len(args.inputs):
        raise UserError(
            f"--names gives {len(names)} names for {len(args.inputs)} models; give one name for each model"
        )
    if args.questions:
        systems = [{"name": name, "model": model} for name, model in zip(names, args.inputs, strict=True)]
        return check_values(QuestionConfig, {"systems": systems, **options})
    given = [as_system(name, model) for name, model in zip(names, args.inputs, strict=True)]
    options |= {"video": video} if video else {}
    options["rewards"] = [_on_frames(reward, args.reward_frames) for reward in options["rewards"]]
    return make_compare_config(systems=given, **options)


def _on_frames(reward: str, frames: int | None) -> str | dict[str, Any]:
    """Return a reward of the command line as the config names it; image rewards alone score frames."""
    from rewards import reward_class

    if frames is None or reward_class(reward).modality != "image":
        return reward
    return {"name": reward, "frames": frames}


def _refuse_drawing(options: Iterable[str]) -> None:
    from mmalign.compare.vlm.config import QuestionConfig

    drawing = [key for key in options if key not in QuestionConfig.model_fields]
    if drawing:
        option = drawing[0].replace("_", "-")
        raise UserError(
            f"--{option} applies to image generators, and --questions to vision-language models; remove one of them"
        )


def _given(args: argparse.Namespace, keys: dict[str, str]) -> dict[str, Any]:
    values = {key: getattr(args, argument) for argument, key in keys.items()}
    return {key: value for key, value in values.items() if value is not None}


def _words(text: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise argparse.ArgumentTypeError(f"'{text}': give names separated by commas")
    return words


def _integers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}': give whole numbers separated by commas, such as 0,1") from None


def _numbers(text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}': give numbers separated by commas, such as 3,4,6,8") from None
