"""`mmalign pairs perturb` for videos: preference pairs of answers to videos and to perturbed videos."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.cli.generate import positive
from mmalign.core.errors import UserError
from mmalign.core.resources import find

if TYPE_CHECKING:
    from mmalign.data.video.answering import Answerer
    from mmalign.data.video.pairs import VideoPairSettings

_OPTIONS = (
    "model", "mode", "instruction", "perturb", "compose", "operators", "difficulty", "chosen", "rejected",
    "min_events", "length_ratio", "min_effect", "mirrored", "frames", "fps", "max_new_tokens", "temperature", "top_p",
    "precision", "batch_size",
)  # fmt: skip
_NEW_TOKENS = {"questions": 32, "answers": 256}


def add_video_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of video sources; an option that is not given is None, to tell it from a default."""
    group = parser.add_argument_group(
        "videos", "pairs of answers of a vision-language model, to videos and to perturbed videos"
    )
    group.add_argument("--model", metavar="DIR|ID", help="vision-language model that answers: a directory or a hub id")
    group.add_argument(
        "--mode",
        choices=("questions", "answers"),
        help="questions: ask those of the source (default); answers: ask for descriptions",
    )
    group.add_argument(
        "--instruction",
        action="append",
        metavar="TEXT",
        help="instruction for descriptions, if the source has none; repeatable (default: six built-in ones)",
    )
    group.add_argument(
        "--operators",
        type=_words,
        metavar="A,B+C:X=1",
        help="perturbations, with options after the name, such as crop:area=0.1..0.3 (default: "
        "drop,block-shuffle,block-reverse)",
    )
    group.add_argument(
        "--difficulty",
        type=_integers,
        metavar="16,8,4,2",
        help="difficulties (ratios) of the perturbations that have one (default: %(metavar)s)",
    )
    group.add_argument(
        "--perturb", choices=("video", "captions"), help="perturb the frames (default), or captions of the clips"
    )
    group.add_argument(
        "--compose",
        choices=("model", "join"),
        help="how captions are combined: written by the model (default), or joined",
    )
    group.add_argument(
        "--chosen", choices=("model", "truth"), help="the chosen answer: the model's (default) or the true one"
    )
    group.add_argument(
        "--rejected",
        choices=("answers", "videos", "both"),
        help="rejected side: answers to perturbed videos (default), perturbed videos with the chosen answer, or both",
    )
    group.add_argument(
        "--min-events",
        type=positive,
        metavar="N",
        help="least number of events in a video (default: 1 for questions, 2 for descriptions)",
    )
    group.add_argument(
        "--length-ratio",
        type=float,
        metavar="R",
        help="largest allowed ratio of the lengths of two descriptions (default: 1.5; 0: any)",
    )
    group.add_argument(
        "--min-effect",
        type=float,
        metavar="NATS",
        help="least drop of log p(chosen) - log p(rejected) caused by the perturbation (default: any)",
    )
    group.add_argument(
        "--mirrored",
        action="store_const",
        const=True,
        help="keep a pair only together with its opposite, so that the text alone does not reveal the answer",
    )
    frames = group.add_mutually_exclusive_group()
    frames.add_argument("--frames", type=positive, metavar="N", help="show N frames of a video (default: all)")
    frames.add_argument("--fps", type=float, metavar="X", help="show X frames a second of a video")
    group.add_argument(
        "--max-new-tokens",
        type=positive,
        metavar="N",
        help="longest answer (default: 32 for questions, 256 otherwise)",
    )
    group.add_argument(
        "--temperature", type=float, metavar="T", help="sampling temperature of the answers (default: 0, greedy)"
    )
    group.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="nucleus sampling: probability mass of the tokens that are sampled from (default: 1)",
    )
    group.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="type of the weights (default: fp32)")
    group.add_argument("--batch-size", type=positive, metavar="N", help="answers per batch (default: 8)")


def refuse_video_options(args: argparse.Namespace) -> None:
    """Refuse video options for a source without videos.

    Raises:
        UserError: such an option was given, or the source does not exist.
    """
    given = [name for name in _OPTIONS if getattr(args, name) is not None]
    if given:
        find(args.source)  # so that a mistyped path is reported as missing
        raise UserError(
            f"--{given[0].replace('_', '-')} applies to videos only, and {args.source} holds none; give a folder "
            "written "
            "by `mmalign shapes videos`, or a table with a column 'video'"
        )


def perturb_videos(args: argparse.Namespace) -> int:
    """Make pairs of answers about videos and print how many were kept and why others were dropped."""
    captions = [name for name in ("contrast", "endpoint", "llm", "api_key_env") if getattr(args, name) is not None]
    if captions:
        raise UserError(
            f"--{captions[0].replace('_', '-')} applies to captions of images only, and {args.source} holds videos; "
            "remove it"
        )
    values = _with_defaults(args)

    from mmalign.data.video.items import INSTRUCTIONS, read_video_items
    from mmalign.data.video.pairs import write_video_pairs

    settings = _settings(values, args.seed)
    items = read_video_items(
        args.source,
        questions=settings.questions,
        seed=args.seed,
        limit=args.limit,
        instructions=values.get("instruction") or INSTRUCTIONS,
    )
    answerer = _answerer(values, Path(args.answers) if args.answers else args.out.with_suffix(".answers"))
    counts = write_video_pairs(items, args.out, settings, answerer, source=args.source)
    print(f"{counts}: {args.out}")
    return 0


def _with_defaults(args: argparse.Namespace) -> dict[str, Any]:
    mode, perturb = args.mode or "questions", args.perturb or "video"
    if args.compose is not None and perturb == "video":
        raise UserError("--compose applies to --perturb captions only; remove it or set --perturb captions")
    if args.instruction is not None and (mode == "questions" or not all(map(str.strip, args.instruction))):
        raise UserError("--instruction: must not be empty, and needs --mode answers")
    if args.length_ratio is not None and (mode == "questions" or 0 < args.length_ratio < 1 or args.length_ratio < 0):
        raise UserError("--length-ratio: must be 1 or more (0: any), and needs --mode answers")
    top_p = 1.0 if args.top_p is None else args.top_p
    if (args.temperature or 0) < 0 or (args.fps is not None and args.fps <= 0) or not 0 < top_p <= 1:
        raise UserError("--temperature must be 0 or more, --fps above 0, and --top-p above 0 and at most 1")
    defaults = {
        "mode": mode, "perturb": perturb, "compose": "model", "operators": ["drop", "block_shuffle", "block_reverse"],
        "difficulty": [16, 8, 4, 2], "chosen": "model", "rejected": "answers", "length_ratio": 1.5, "mirrored": False,
        "min_events": 1 if mode == "questions" else 2, "max_new_tokens": _NEW_TOKENS[mode], "temperature": 0.0,
        "top_p": 1.0, "precision": "fp32", "batch_size": 8,
    }  # fmt: skip
    return defaults | {name: getattr(args, name) for name in _OPTIONS if getattr(args, name) is not None}


def _settings(values: dict[str, Any], seed: int) -> VideoPairSettings:
    from mmalign.core.io.decode import Frames
    from mmalign.data.video.pairs import VideoPairSettings
    from mmalign.data.video.perturbations import parse_perturbations

    return VideoPairSettings(
        perturbations=tuple(parse_perturbations(values["operators"], values["difficulty"])),
        questions=values["mode"] == "questions",
        captions=values["compose"] if values["perturb"] == "captions" else "",
        chosen=values["chosen"],
        rejected=values["rejected"],
        min_events=values["min_events"],
        length_ratio=values["length_ratio"] or None,
        min_effect=values.get("min_effect"),
        mirrored=values["mirrored"],
        frames=Frames(values.get("frames"), values.get("fps")),
        seed=seed,
    )


def _answerer(values: dict[str, Any], folder: Path) -> Answerer | None:
    """Return the vision-language model, if one is needed; its answers are cached in `folder`."""
    model = values.get("model")
    if model is None:
        if values["chosen"] == "truth" and values["rejected"] == "videos":
            return None
        raise UserError("--model is missing; only --chosen truth with --rejected videos needs no model")

    from mmalign.core.precision import check_precision
    from mmalign.data.video.answering import Answerer, Decoding

    check_precision(values["precision"], key="--precision")
    decoding = Decoding(values["max_new_tokens"], values["temperature"], values["top_p"], values["precision"])
    return Answerer(model, decoding, folder, batch_size=values["batch_size"])


def _words(text: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise argparse.ArgumentTypeError(f"'{text}': give names separated by commas")
    return words


def _integers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}': give whole numbers separated by commas, such as 16,8") from None
