"""Claims about online RL of flow models in miniature: `python -m benchmarks.flow_claims [NAME ...] [--seed N]`.

Each claim is one function, measured on a toy in seconds, and printed as a line: a number with a 95 % interval, and
whether the claim holds. The toy has an exact velocity: latents of 64 dimensions that are one of eight patterns of +-1
with a little spread, so that what is left over after sampling is the sampler's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mmalign.core.files import write_atomically
from mmalign.losses import flash_weights, gaussian_kl, guard_log_ratio, temp_weights
from mmalign.methods.step_weights import Step, slopes_and_stds, steps_of
from mmalign.methods.window import WindowConfig
from pipelines import Kernel, NoiseProcess, cps, dance, flow_sde, gaussian_log_prob

DIMENSIONS, PATTERNS, SPREAD, STEPS = 64, 8, 0.05, 10


@dataclass(frozen=True)
class Finding:
    """What a claim came to: a sentence, its number, the interval, and the number that the claim is about."""

    sentence: str
    value: float
    low: float
    high: float
    above: float

    def __str__(self) -> str:
        """Return one line; a claim holds if its whole interval is above the threshold, and fails if below."""
        verdict = "yes" if self.low > self.above else "no" if self.high <= self.above else "open"
        return (
            f"{verdict:4s} {self.sentence}: {self.value:.3g} [{self.low:.3g}, {self.high:.3g}], above {self.above:g}"
        )


class Toy:
    """Mixture data with its exact velocity, on SD3's levels of 10 steps."""

    def __init__(self, seed: int) -> None:
        """Draw the patterns."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        self.source = torch.Generator().manual_seed(seed)
        self.process = NoiseProcess.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0))
        self.patterns = self.noise(PATTERNS).sign()

    def noise(self, count: int) -> Tensor:
        """Return standard normal latents."""
        return torch.randn(count, DIMENSIONS, generator=self.source, dtype=torch.float64)

    def velocity(self, x: Tensor, level: float) -> Tensor:
        """Return E[noise - x0 | x]."""
        sigma = level / 1000
        variance = (1 - sigma) ** 2 * SPREAD**2 + sigma**2
        gaps = x.unsqueeze(1) - (1 - sigma) * self.patterns
        weights = (-gaps.square().sum(2) / (2 * variance)).softmax(1).unsqueeze(2)
        clean = (weights * (self.patterns + (1 - sigma) * SPREAD**2 / variance * gaps)).sum(1)
        return (x - clean) / sigma

    def steps(self, kernel: Kernel) -> list[Step]:
        """Return the steps of a sampling."""
        return steps_of(self.process, kernel, STEPS, range(STEPS))

    def sample(self, steps: list[Step], x: Tensor) -> Tensor:
        """Return samples from initial noise."""
        for kernel, level, after in steps:
            mean, std = kernel(self.process, x, self.velocity(x, level), level, after)
            x = mean + std * self.noise(len(x))
        return x


def of_draws(sentence: str, draws: Tensor, above: float) -> Finding:
    """Return a finding whose number is the mean of independent draws."""
    mean, error = float(draws.mean()), float(draws.std()) / len(draws) ** 0.5
    return Finding(sentence, mean, mean - 1.96 * error, mean + 1.96 * error, above)


def but_last(kernel: Callable[[list[float]], Kernel], amount: float) -> Kernel:
    """Return a kernel with noise at all steps but the last."""
    return kernel([amount] * (STEPS - 1) + [0.0])


def cleaner(toy: Toy) -> list[Finding]:
    """FlowCPS: its rollouts are cleaner than those of Flow-SDE."""
    residual = []
    for kernel in (but_last(flow_sde, 0.7), but_last(cps, 0.8)):
        x = toy.sample(toy.steps(kernel), toy.noise(1000))
        residual.append((x.unsqueeze(1) - toy.patterns).square().mean(2).min(1).values.sqrt())
    return [of_draws("noise left in a sample, Flow-SDE 0.7 over CPS 0.8", residual[0] / residual[1].mean(), 1)]


def shared_window(toy: Toy) -> list[Finding]:
    """verl-omni: windows of single samples add to the variance of rewards within a group."""
    window, groups, size = WindowConfig(size=2), 200, 24
    direction = toy.noise(1)[0] / DIMENSIONS**0.5
    ratios = []
    kernels = [cps([0.8 if s <= i < s + 2 else 0.0 for i in range(STEPS)]) for s in range(4)]
    starts = len(window.candidates(STEPS)) - window.size + 1
    for _ in range(groups):
        start = toy.noise(1).expand(size, -1)
        rewards = torch.stack([toy.sample(toy.steps(kernel), start) @ direction for kernel in kernels[:starts]])
        drawn = torch.randint(starts, (size,), generator=toy.source)
        own = rewards[drawn, torch.arange(size)]
        ratios.append(own.var() / rewards.var(1).mean())
    return [of_draws("variance of rewards in a group, own windows over a shared one", torch.stack(ratios), 1.5)]


def ratio_bias(toy: Toy) -> list[Finding]:
    """GRPO-Guard: the Gaussian ratio is biased below 1, the more the later the step; its own is not."""
    found = []
    kernel = flow_sde(0.7)
    change = 0.3 * toy.noise(1)
    for index in (1, 7):
        step, level, after = toy.steps(kernel)[index]
        x = toy.process.add_noise(toy.patterns[torch.arange(4000) % PATTERNS], toy.noise(4000), level)
        old, std = step(toy.process, x, toy.velocity(x, level), level, after)
        mean, _ = step(toy.process, x, toy.velocity(x, level) + change, level, after)
        x_next, std = old + std * toy.noise(4000), std.flatten().expand(4000)
        ratio = gaussian_log_prob(x_next, mean, std) - gaussian_log_prob(x_next, old, std)
        guard = guard_log_ratio(x_next, mean, old, std)
        bias = float(gaussian_kl(mean, old, std).mean())
        found += [
            of_draws(f"step {index}: how far the mean log-ratio is below 0, in units of the KL", -ratio / bias, 0),
            of_draws(f"step {index}: the same for Guard's log-ratio", -guard / std / bias, 0),
        ]
    return found


def flat_gradients(toy: Toy) -> list[Finding]:
    """TempFlow-GRPO, Flash-GRPO: their weights make the gradients of the steps alike."""
    steps = toy.steps(flow_sde(0.7))[: STEPS - 1]
    slopes, stds = slopes_and_stds(toy.process, steps)
    weights = {
        "no weights": torch.ones_like(stds),
        "TempFlow's": temp_weights(stds),
        "Flash's": flash_weights(stds, slopes, stds / slopes),
    }
    norms = []
    for kernel, level, after in steps:
        x = toy.process.add_noise(toy.patterns[torch.arange(1000) % PATTERNS], toy.noise(1000), level)
        velocity = toy.velocity(x, level).requires_grad_()
        mean, std = kernel(toy.process, x, velocity, level, after)
        log_prob = gaussian_log_prob(mean.detach() + std * toy.noise(1000), mean, std)
        norms.append(torch.autograd.grad(log_prob.sum(), velocity)[0].norm(dim=1))
    plain = torch.stack(norms)
    found = []
    for name, weight in weights.items():
        weighted = plain * weight.unsqueeze(1)
        largest, least = weighted.mean(1).argmax(), weighted.mean(1).argmin()
        spread = weighted[least] / weighted[largest].mean()
        found.append(of_draws(f"least over largest gradient of 9 steps, {name}", spread, 0.8))
    return found


def excess_noise(toy: Toy, kernel: Kernel) -> list[float]:
    """Return the noise after each step but the last, in units of the schedule's, where the prediction is exact."""
    found = []
    for step, level, after in toy.steps(kernel)[: STEPS - 1]:
        noise = torch.ones(1, 1, dtype=torch.float64)  # of clean latents 0, so that x = sigma and v = 1
        kept, std = step(toy.process, noise * level / 1000, noise, level, after)
        found.append(float(torch.hypot(kept, std)) * 1000 / after)
    return found


def figure(toy: Toy) -> str:
    """Return an SVG of the excess noise of three kernels, cut at 2."""
    kernels = {
        "Flow-SDE 0.7": (flow_sde(0.7), "#c53030"),
        "Dance 0.3": (dance(0.3), "#b7791f"),
        "CPS 0.8": (cps(0.8), "#2b6cb0"),
    }
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 420 210" width="420" height="210" font-size="11" '
        'font-family="sans-serif"><rect width="100%" height="100%" fill="#fff"/><text x="45" y="16" '
        'font-weight="bold">noise after a step, in units of the schedule\'s</text>'
    ]
    for tick in (1.0, 1.25, 1.5, 1.75, 2.0):
        down = 180 - 150 * (tick - 0.9) / 1.1
        parts.append(
            f'<path d="M45 {down:.1f}H310" stroke="#ddd"/><text x="10" y="{down + 4:.1f}" fill="#555">{tick:g}</text>'
        )
    for place, (name, (kernel, colour)) in enumerate(kernels.items()):
        points = [
            f"{50 + 32 * index},{180 - 150 * (min(value, 2.0) - 0.9) / 1.1:.1f}"
            for index, value in enumerate(excess_noise(toy, kernel))
        ]
        parts.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="320" y="{50 + 20 * place}" fill="{colour}">{name}</text>')
    labels = "".join(f'<text x="{47 + 32 * index}" y="198" fill="#555">{index}</text>' for index in range(STEPS - 1))
    return "".join([*parts, labels, '<text x="318" y="198" fill="#555">step of 10</text></svg>\n'])


CLAIMS: dict[str, Callable[[Toy], list[Finding]]] = {
    "cleaner": cleaner,
    "shared_window": shared_window,
    "ratio_bias": ratio_bias,
    "flat_gradients": flat_gradients,
}


def main(arguments: list[str] | None = None) -> int:
    """Measure the claims that were asked for, by default all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.flow_claims", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which: {', '.join(CLAIMS)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, metavar="SVG", help="draw the excess noise of kernels, and no more")
    options = parser.parse_args(arguments)
    if options.figure:
        write_atomically(options.figure, figure(Toy(options.seed)))
        return 0
    for name in options.names or CLAIMS:
        if name not in CLAIMS:
            parser.error(f"unknown claim {name!r}; there are {', '.join(CLAIMS)}")
        print(f"{name}: {(CLAIMS[name].__doc__ or '').splitlines()[0]}")
        for finding in CLAIMS[name](Toy(options.seed)):
            print(f"  {finding}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
