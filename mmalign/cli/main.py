"""The command line: `mmalign VERB ...`. Each verb is a module of `mmalign.cli`, imported only when it is used.

Exit codes: 0 done; 2 the user's input is wrong (one line for each error, no traceback); 3 `score` is done but some
items have no score; 130 stopped by Ctrl-C; 1 any other error.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import io
import re
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any, NoReturn

from mmalign.core.errors import UserError, did_you_mean, plain
from mmalign.core.version import __version__

VERBS: dict[str, tuple[str, str]] = {
    "demo": ("the whole story on Shapes: online training, comparison, report", "mmalign demo"),
    "train": (
        "fine-tune a model as a config says; goes on from the last checkpoint",
        "mmalign train shapes/diffusion_dpo trainer.steps=200 output=runs/first",
    ),
    "train-reward": (
        "train a latent reward, which reads noisy latents, on preference pairs",
        "mmalign train-reward shapes/latent_reward trainer.steps=200 output=runs/reward",
    ),
    "generate": (
        "make images from prompts",
        "mmalign generate assets/shapes-sd --prompts shapes-validation --out runs/images",
    ),
    "score": (
        "score images or videos by any rewards, in one pass over the files",
        "mmalign score runs/images --rewards shapes-clip,shapes-quality --out runs/scores.parquet",
    ),
    "compare": (
        "compare models on the same prompts and seeds, with intervals and a report",
        "mmalign compare assets/shapes-sd runs/first --prompts shapes-drawbench --rewards shapes-correctness "
        "--out runs/compare",
    ),
    "merge": (
        "merge an adapter into its base: one model, to train further or to share",
        "mmalign merge runs/first --out runs/first-merged",
    ),
    "push": (
        "upload a finished run to the Hugging Face Hub",
        "mmalign push runs/first my-name/first --private --dry-run",
    ),
    "pairs": (
        "build preference data: sample images, label them or existing pairs",
        "mmalign pairs sample assets/shapes-sd --prompts shapes-train --out runs/samples",
    ),
    "rewards": (
        "check rewards against published numbers, or against human labels",
        "mmalign rewards verify aesthetic",
    ),
    "list": ("what there is: methods, rewards, families, configs, prompts", "mmalign list methods"),
    "show-config": (
        "print a config as it will be used, with the origin of every value",
        "mmalign show-config shapes/diffusion_dpo method.beta=500",
    ),
    "shapes": ("draw the Shapes world and train its base models again", "mmalign shapes --help"),
    "doctor": ("check this installation: versions, devices, kernels, assets, disk", "mmalign doctor"),
}
"""verb -> (what it does, an example to copy), in the order of the help."""

_BAD_PATH = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)


def main(argv: list[str] | None = None) -> int:
    """Run one command and return the exit code; `argv` without the program's name, by default the process's own."""
    arguments = sys.argv[1:] if argv is None else argv
    debug = "--debug" in arguments
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # the name of a file need not be UTF-8
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not debug:
        warnings.showwarning = _show_warning  # type: ignore[assignment]
    try:
        return _dispatch(arguments)
    except KeyboardInterrupt:
        print("\nstopped by Ctrl-C", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `mmalign list methods | head`
        sys.stderr.close()
        return 1
    except Exception as error:
        return _report(error, debug)


def _show_warning(message: Warning | str, *_: Any) -> None:
    """Show a warning in one line, without the line of code that it came from."""
    from mmalign.core.progress import note

    note(f"warning: {plain(' '.join(str(message).split()))}")


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if arguments[0] in ("-V", "--version", "version"):
        print(f"mmalign {__version__}")
        return 0
    verb = arguments[0]
    if verb not in VERBS:
        raise UserError(f"unknown command '{verb}'{did_you_mean(verb, VERBS)} (commands: {', '.join(VERBS)})")
    command = importlib.import_module(f"mmalign.cli.{verb.replace('-', '_')}")
    about, example = VERBS[verb]
    parser = _Parser(
        prog=f"mmalign {verb}",
        description=command.__doc__ or about,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser)
    return int(command.run(parser.parse_args(arguments[1:])))


class _Parser(argparse.ArgumentParser):
    """ArgumentParser whose errors look like all other errors of mmalign; abbreviated options are refused."""

    def __init__(self, **options: object) -> None:
        super().__init__(**{"allow_abbrev": False, **options})  # type: ignore[arg-type]

    def parse_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        """Parse all arguments; an unknown option is reported with the nearest known one."""
        subparsers = [action for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        # Intermixed, so that `train CONFIG a=1 --option b=2` takes both overrides; argparse has it without subparsers.
        parse = self.parse_known_args if subparsers else self.parse_known_intermixed_args
        parsed, unknown = parse(args, namespace)
        if unknown:
            parsers = [self, *(parser for action in subparsers for parser in action.choices.values())]
            name = unknown[0].partition("=")[0]
            hint = did_you_mean(name, {option for parser in parsers for option in parser._option_string_actions})
            if not hint and name.startswith("--") and "." in name:
                hint = f"; write an override without dashes: {name[2:]}=VALUE"
            self.error(f"unknown argument '{unknown[0]}'{hint}")
        return parsed

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """Refuse an empty path, which `Path` takes for the working directory."""
        if (action.type is Path or action.dest == "out") and not arg_string.strip():
            raise argparse.ArgumentError(action, "the path is empty; name a file or folder")
        return super()._get_value(action, arg_string)

    def error(self, message: str) -> NoReturn:
        """Raise a UserError instead of printing the usage and exiting."""
        choice = re.search(r"invalid choice: '(.+?)' \(choose from (.+)\)", message)
        if choice:
            message += did_you_mean(choice[1], re.findall(r"[^', ]+", choice[2]))
        raise UserError(f"{message} (see `{self.prog} --help`)")


def _report(error: Exception, debug: bool) -> int:
    """Print an exception, with a traceback only if it is a bug, and return the exit code."""
    if isinstance(error, _user_errors()):
        if debug:
            traceback.print_exception(error)
        for line in str(error).splitlines() or [type(error).__name__]:
            print(f"error: {plain(line)}", file=sys.stderr)
        return 2
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT) and not debug:
        where = f" while writing {error.filename}" if error.filename else ""
        print(f"error: the disk is full{where}; free some space and run the same command again", file=sys.stderr)
        return 1
    if isinstance(error, OSError) and error.errno in _BAD_PATH and error.filename and not debug:
        line = plain(f"{error.filename}: {error.strerror}; name another file or folder")
        print(f"error: {line}", file=sys.stderr)
        return 2
    if type(error).__name__ == "OutOfMemoryError" and not debug:
        print(f"error: {str(error).splitlines()[0]} Use a smaller batch, a lower precision or LoRA.", file=sys.stderr)
        return 1
    traceback.print_exception(error)
    print("error: this is a bug in mmalign; please report it with the output of `mmalign doctor`", file=sys.stderr)
    return 1


def _user_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions for wrong input; packages that were never imported cannot have raised any."""
    named = [("pipelines.errors", "PipelineError"), ("rewards.errors", "RewardError")]
    return UserError, *(getattr(sys.modules[module], name) for module, name in named if module in sys.modules)


def _help() -> str:
    lines = [
        "mmalign: align image, video and vision-language models to preferences, and compare them fairly",
        "",
        "usage: mmalign COMMAND ...        mmalign COMMAND --help        mmalign --version",
        "",
    ]
    for verb, (about, example) in VERBS.items():
        lines += [f"  {verb:<12} {about}", f"  {'':<12}   $ {example}"]
    lines += [
        "",
        "MODEL is a model directory of diffusers (for vision-language models: of transformers), the output of",
        "`mmalign train`, or a hub id. Names such as assets/shapes-sd and shapes/diffusion_dpo are found wherever",
        "mmalign is installed.",
        "--debug shows the traceback of an error. Exit codes: 0 done, 2 wrong input, 3 some items have no score,",
        "130 stopped by Ctrl-C, 1 any other error.",
    ]
    return "\n".join(lines)
