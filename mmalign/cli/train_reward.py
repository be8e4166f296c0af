"""Train a latent reward model on preference pairs by a YAML config; the result is the weights of reward `latent`.

Training resumes from the last checkpoint in the output folder, if there is one. Ctrl-C saves a checkpoint and stops.
The accuracy on held-out prompts by noise level is printed and written to accuracy.json in the output folder.
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
        help="auto: resume from the last checkpoint in the output folder, if any (default); never: start from the "
        "beginning",
    )


def run(args: argparse.Namespace) -> int:
    """Train; return 0, 1 for a failed run, or 130 after Ctrl-C."""
    from mmalign.training.latent_reward.config import load_reward_config

    config = load_reward_config(args.config, args.overrides)
    # Imported after the config has been checked, so that errors in it are reported without waiting for torch.
    from mmalign.cli.train import end_training_well
    from mmalign.training.latent_reward.training import train_reward

    return end_training_well(lambda: train_reward(config, resume=args.resume))
