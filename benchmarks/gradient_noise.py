"""How noisy a method's gradient is: `python -m benchmarks.gradient_noise CONFIG ... [--draws N] [key=value ...]`.

For each config, at the start of its training, the gradient of its loss on one batch of data is taken `draws` times:
with the same samples, but new noise and timesteps; and with new samples each time, as in training. With g such a
gradient, |E g|² is estimated without bias as |mean|² − var/draws, var being the trace of their covariance. The ratio
|E g|² / var does not change with the scale of the loss, such as beta; its inverse is the number of batches whose mean
has as much noise as signal.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign.core.files import write_atomically


@dataclass(frozen=True)
class GradientNoise:
    """Moments of a gradient over draws."""

    signal: float
    """|E g|², estimated without bias; may come out below zero where there is next to none"""
    variance: float
    """trace of the covariance"""

    @property
    def ratio(self) -> float:
        """Return signal over noise of one batch."""
        return self.signal / self.variance if self.variance > 0 else float("inf")


def estimate(gradients: Callable[[int], Tensor], draws: int) -> GradientNoise:
    """Return the moments of `gradients(0)`, ..., `gradients(draws - 1)`, flat vectors, holding one at a time."""
    if draws < 2:
        raise ValueError(f"{draws} draws; a variance needs at least 2")
    total, squares = torch.zeros(1, dtype=torch.float64), 0.0
    for draw in range(draws):
        gradient = gradients(draw).double()
        total, squares = total + gradient, squares + float(gradient.square().sum())
    mean_square = float((total / draws).square().sum())
    variance = (squares - draws * mean_square) / (draws - 1)
    return GradientNoise(mean_square - variance / draws, variance)


def measure_config(path: str, overrides: list[str], draws: int) -> dict[str, GradientNoise]:
    """Return the noise of a training config's gradient, "same samples" and "new samples"."""
    from mmalign.config.run import load_config
    from mmalign.training.accelerator import make_accelerator
    from mmalign.training.prepare import prepare

    config = load_config(path, overrides)
    parts = prepare(config, make_accelerator(config))
    parameters, size = parts.run.generator.trainable_parameters(), config.trainer.batch_size

    def gradient(batch: Any) -> Tensor:
        parts.run.step = 0  # a round of one update
        for one in parts.method.collect(parts.run, [batch]):
            parts.method.loss(parts.run, one).loss.backward()
        flat = torch.cat([parameter.grad.flatten().float() for parameter in parameters if parameter.grad is not None])
        for parameter in parameters:
            parameter.grad = None
        return flat

    count = len(parts.feed.samples)

    def batch_of(first: int, epoch: int) -> Any:
        indices = [(first + i) % count for i in range(size)]
        return parts.feed.samples.batch(indices, epoch, config.trainer.seed).to(parts.feed.device)

    return {
        "same samples": estimate(lambda draw: gradient(batch_of(0, draw)), draws),
        "new samples": estimate(lambda draw: gradient(batch_of(draw * size, draw * size // count)), draws),
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure the configs and print a table; 2 means that the arguments are wrong."""
    from rich.console import Console
    from rich.table import Table

    from mmalign.core.errors import UserError

    parser = argparse.ArgumentParser(prog="python -m benchmarks.gradient_noise", description=__doc__)
    parser.add_argument("configs", nargs="+", metavar="CONFIG | key=value", help="training configs, then overrides")
    parser.add_argument(
        "--draws", type=int, default=40, metavar="N", help="gradients of each kind (default %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    options = parser.parse_args(arguments)
    if options.draws < 2:
        parser.error(f"--draws {options.draws}: a variance needs at least 2")
    configs = [text for text in options.configs if "=" not in text]
    overrides = [text for text in options.configs if "=" in text]
    table = Table(title=f"gradient noise over {options.draws} draws", title_justify="left")
    for heading in ("config", "samples"):
        table.add_column(heading, no_wrap=True)
    for heading in ("|E g|²", "trace of covariance", "signal / noise", "batches until equal"):
        table.add_column(heading, justify="right")
    results: dict[str, Any] = {}
    try:
        for config in configs:
            found = measure_config(config, overrides, options.draws)
            results[config] = {kind: asdict(noise) | {"ratio": noise.ratio} for kind, noise in found.items()}
            for kind, noise in found.items():
                batches = f"{1 / noise.ratio:.3g}" if noise.ratio > 0 else "more than the draws can tell"
                table.add_row(
                    config, kind, f"{noise.signal:.3g}", f"{noise.variance:.3g}", f"{noise.ratio:.3g}", batches
                )
    except UserError as error:
        parser.error(str(error))
    Console().print(table)
    if options.json:
        write_atomically(options.json, json.dumps({"draws": options.draws, "configs": results}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
