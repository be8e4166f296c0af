"""Fine-tune a model by a YAML config.

Training resumes from the last checkpoint in the output folder, if there is one. Ctrl-C saves a checkpoint and stops.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from mmalign.config.run import RunConfig, load_config
from mmalign.config.yaml import find_config
from mmalign.core.errors import MissingPath, UserError
from mmalign.core.resources import resource_root


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of a shipped config")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="change a value, such as method.beta=2000")
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="auto: resume from the last checkpoint in the output folder, if any (default); never: start from the "
        "beginning; "
        "PATH: resume from this checkpoint",
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything and print the plan, without training")


def run(args: argparse.Namespace) -> int:
    """Train; return 0, 1 for a failed run, or 130 after Ctrl-C."""
    config = load_config(args.config, args.overrides)
    try:
        return _train(config, args)
    except MissingPath as error:
        recipe = find_config(args.config)
        if not recipe.is_relative_to(resource_root() / "configs") or any(
            error.path in override for override in args.overrides
        ):
            raise
        raise UserError(f"{error}; the first lines of {recipe} describe how to make it") from None


def _train(config: RunConfig, args: argparse.Namespace) -> int:
    from mmalign.core.lock import locked_output

    # Imported after the config has been checked, so that errors in it are reported without waiting for torch.
    from mmalign.training.train import plan, train

    _check_evaluation_prompts(config)
    if args.dry_run and config.rounds is not None:
        from mmalign.training.recipe import complete
        from mmalign.training.rounds import check_rounds, describe_rounds

        check_rounds(complete(config))
        print(f"would train, nothing was written:\n  {describe_rounds(config)}\n  output     {config.output}")
        return 0
    if args.dry_run:
        print(f"would train, nothing was written:\n{plan(config)}\n  output     {config.output}")
        return 0

    def do() -> None:
        # Each training locks its own folder; rounds also sample and label, in the folder around them.
        alone = config.rounds is not None and os.environ.get("RANK", "0") == "0"
        with locked_output(Path(config.output), "output") if alone else nullcontext():
            train(config, resume=args.resume)

    return end_training_well(do)


def _check_evaluation_prompts(config: RunConfig) -> None:
    """Refuse prompts of the evaluation that cannot be read, with both ways to go on.

    Raises:
        UserError: see above; shipped configs name a file of the user's own.
    """
    from mmalign.data.prompts import load_prompts

    if config.evaluate is None or config.evaluate.prompts is None:
        return
    try:
        load_prompts(config.evaluate.prompts, 1)
    except UserError as error:
        raise UserError(
            f"evaluate.prompts: {error}; give evaluate.prompts=FILE, or evaluate=null to train without evaluation"
        ) from None


def end_training_well(do: Callable[[], object]) -> int:
    """Run a training and return the exit code: 0, 1 for a failed run, or 130 after Ctrl-C."""
    from mmalign.core.errors import TrainingDiverged, TrainingInterrupted
    from mmalign.training.checkpoint import DiskFull
    from mmalign.training.export import ExportError

    try:
        do()
    except (TrainingDiverged, DiskFull, ExportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except TrainingInterrupted as stopped:
        print(stopped, file=sys.stderr)
        return 130
    return 0
