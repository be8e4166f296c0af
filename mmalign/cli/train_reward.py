"""Train a latent reward model on preference pairs, as a YAML config says: the weights of reward `latent`.

Goes on from the last checkpoint in the output if there is one; Ctrl-C saves a checkpoint and stops. Reports the
accuracy on held-out prompts by noise level, and writes it to accuracy.json in the output.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of a shipped config")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="change a value, such as trainer.steps=100")
    parser.add_argument(
        "--resume",
        default="auto",
        choices=("auto", "never"),
        help="auto: from the last checkpoint in the output, if any; never: from the start",
    )


def run(args: argparse.Namespace) -> int:
    """Train; returns 0, 1 for a run that broke off, 130 after Ctrl-C."""
    from mmalign.training.latent_reward.config import load_reward_config

    config = load_reward_config(args.config, args.overrides)
    # After the config has been checked, so that a mistake in it is told before the seconds that these imports take.
    from mmalign.cli.train import end_training_well
    from mmalign.training.latent_reward.training import train_reward

    return end_training_well(lambda: train_reward(config, resume=args.resume))
