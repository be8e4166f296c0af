"""Claims about forward-process RL in miniature: `python -m benchmarks.flow_claims_forward [NAME ...] [--seeds N]`.

Each claim is one function and prints a number with a 95 % interval, and whether the claim holds: yes where the whole
interval is above the threshold, no where it is below, open otherwise. The toy is a small network that was trained by
flow matching on points of the plane: a prompt is one of eight directions, and its points lie around +2 and -2 along
it, half each. The reward likes the + side. `--curves DIR` draws how nft, awm and dgpo learn it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.flow_claims import Finding
from benchmarks.flow_toy import (
    PROMPTS,
    STEPS,
    UPDATES,
    Rule,
    Velocity,
    awm_loss,
    data,
    dgpo_loss,
    directions,
    distance_to_data,
    draw,
    learn,
    liking,
    nft_loss,
    pretrained,
    quality,
)
from mmalign.losses import awm_log_prob, clipped_policy_gradient, denoising_error, diffusion_dpo_logit
from mmalign.losses.advantages import Spread, each_group_advantages, group_advantages, win_rates


def over_seeds(sentence: str, values: Sequence[float], above: float) -> Finding:
    """Return the mean of a number over trainings with Student's interval."""
    quantile = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}[len(values)]
    mean, half = float(np.mean(values)), quantile * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Finding(sentence, mean, mean - half, mean + half, above)


def bootstrap(sentence: str, statistic: Callable[[np.ndarray], float], count: int, above: float) -> Finding:
    """Return a statistic of rows, given their numbers, with the interval of 1,000 resamples of them."""
    source = np.random.default_rng(0)
    drawn = [statistic(source.integers(0, count, count)) for _ in range(1000)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Finding(sentence, statistic(np.arange(count)), float(low), float(high), above)


def noise_over_signal(gradients: np.ndarray, rows: np.ndarray) -> float:
    """Return tr Cov(g) / |E g|^2 of gradients [draws, weights], the latter without bias."""
    chosen = gradients[rows]
    variance = float(chosen.var(0, ddof=1).sum())
    return variance / max(float(np.square(chosen.mean(0)).sum()) - variance / len(chosen), 1e-12)


def gradient_noise(start: Velocity, seeds: int) -> list[Finding]:
    """AWM's gradient is less noisy than Flow-GRPO's, at 16 network calls for an image against 19."""
    prompt = directions().repeat_interleave(8, 0)
    owners = [str(row // 8) for row in range(len(prompt))]

    def flat(loss: Tensor) -> np.ndarray:
        found = torch.autograd.grad(loss, list(start.parameters()))
        return torch.cat([one.flatten() for one in found]).numpy()

    def forward() -> np.ndarray:
        x0, losses = draw(start, prompt), []
        advantages = group_advantages(owners, liking(x0, prompt), spread=Spread("batch"))
        for level in range(6):
            t, noise = ((level + torch.rand(1)) / 6).expand(len(x0)), torch.randn_like(x0)
            policy = start((1 - t[:, None]) * x0 + t[:, None] * noise, t, prompt)
            log_prob = awm_log_prob(policy, noise - x0, t)
            losses.append(clipped_policy_gradient(log_prob, log_prob.detach(), advantages, clip=1.0).mean())
        return flat(torch.stack(losses).mean())

    def reverse() -> np.ndarray:
        x, levels, log_probs = torch.randn_like(prompt), torch.linspace(1, 0, STEPS + 1), []
        for now, after in zip(levels[:-2], levels[1:-1], strict=True):
            dt, limited = after - now, min(float(now), float(levels[1]))
            scale = 0.7 * math.sqrt(float(now) / (1 - limited))
            v = start(x, now.expand(len(x)), prompt)
            mean = x * (1 + scale**2 * dt / (2 * now)) + v * (1 + scale**2 * (1 - now) / (2 * now)) * dt
            std = scale * torch.sqrt(-dt)
            x = (mean + std * torch.randn_like(x)).detach()
            log_probs.append(-((x - mean).square() / (2 * std**2)).mean(1))
        with torch.no_grad():
            x0 = x - start(x, levels[-2].expand(len(x)), prompt) * levels[-2]
        advantages = group_advantages(owners, liking(x0, prompt), spread=Spread("batch"))
        return flat(-(advantages * torch.stack(log_probs)).mean())

    torch.manual_seed(1)
    ours, theirs = (np.stack([one() for _ in range(200 * seeds)]) for one in (forward, reverse))
    return [
        bootstrap(
            "noise over signal of the gradient, Flow-GRPO's over AWM's",
            lambda rows: noise_over_signal(theirs, rows) / noise_over_signal(ours, rows),
            len(ours),
            1.0,
        )
    ]


def anchor(start: Velocity, seeds: int) -> list[Finding]:
    """AWM without its anchor collapses."""
    lost = []
    for seed in range(seeds):
        for weight in (1.0, 0.0):
            net = learn(start, partial(awm_loss, anchor=weight), seed, Rule(), updates=200)
            lost.append(float(distance_to_data(*quality(net)).median()))
    free = [without - with_it for with_it, without in zip(lost[::2], lost[1::2], strict=True)]
    begun = float(distance_to_data(*quality(start)).median())
    return [
        over_seeds("added median distance to the data without the anchor, 200 updates", free, 0.0),
        over_seeds(f"median distance with the anchor, {begun:.2f} before training", lost[::2], 1.0),
    ]


def groups(start: Velocity, seeds: int) -> list[Finding]:
    """DGPO learns more by groups of 8 than of 2, from as many images."""
    gains = []
    for seed in range(seeds):
        nets = [learn(start, dgpo_loss, seed, Rule(size, 64 // size), shared=True) for size in (8, 2)]
        scores = [float(liking(*quality(net)).mean()) for net in nets]
        gains.append(scores[0] - scores[1])
    return [over_seeds("reward after 60 updates, groups of 8 minus groups of 2", gains, 0.0)]


def decoupled(start: Velocity, seeds: int) -> list[Finding]:
    """GDPO raises both of two rewards with spreads 1 to 100; normalising their sum starves the small one."""

    def both(x: Tensor, prompt: Tensor) -> Tensor:
        across = torch.stack([-prompt[:, 1], prompt[:, 0]], dim=1)
        return torch.stack([liking(x, prompt), 100 * torch.tanh((x * across).sum(1))], dim=1)

    def summed(owners: list[str], x: Tensor, prompt: Tensor) -> Tensor:
        return group_advantages(owners, both(x, prompt).sum(1), spread=Spread("group"))

    def each(owners: list[str], x: Tensor, prompt: Tensor) -> Tensor:
        return each_group_advantages(owners, both(x, prompt), [1.0, 1.0])

    before = both(*quality(start)).mean(0)
    rises = {"sum": [], "each": []}  # type: dict[str, list[list[float]]]
    for seed in range(seeds):
        for name, rule in (("sum", summed), ("each", each)):
            net = learn(start, awm_loss, seed, Rule(advantages=rule))
            rises[name].append((both(*quality(net)).mean(0) - before).tolist())
    return [
        over_seeds("rise of the small reward, each by itself", [one[0] for one in rises["each"]], 0.0),
        over_seeds("rise of the large reward, each by itself", [one[1] for one in rises["each"]], 0.0),
        over_seeds(
            "rise of the small reward, each by itself minus sum",
            [a[0] - b[0] for a, b in zip(rises["each"], rises["sum"], strict=True)],
            0.0,
        ),
    ]


def illusion(start: Velocity, seeds: int) -> list[Finding]:
    """Gaps of a millionth are unit advantages for scores, and none for win rates with a margin."""
    torch.manual_seed(2)
    scores = 0.5 + 1e-6 * torch.randn(200 * seeds, 24, dtype=torch.float64)
    owners = [str(row // 24) for row in range(24 * 200 * seeds)]

    def sizes(values: Tensor, spread: Spread) -> np.ndarray:
        found = group_advantages(owners, values.flatten(), spread=spread).abs().reshape(-1, 24)
        return found.mean(1).numpy()

    margins = scores.unsqueeze(2) - scores.unsqueeze(1)
    plain = sizes(scores, Spread("group", 1e-8, 0.0))
    floored = sizes(scores, Spread("group"))
    rated = sizes(win_rates(margins, tie_margin=1e-3), Spread("group"))
    count = len(plain)
    return [
        bootstrap("mean |A| of scores, epsilon 1e-8", lambda rows: float(plain[rows].mean()), count, 0.5),
        bootstrap(
            "1 - mean |A| of scores, our epsilon and floor", lambda rows: 1 - float(floored[rows].mean()), count, 0.5
        ),
        bootstrap("1 - mean |A| of win rates, margin 1e-3", lambda rows: 1 - float(rated[rows].mean()), count, 0.99),
    ]


def shared_noise(start: Velocity, seeds: int) -> list[Finding]:
    """Flow-DPO's margin varies less over the noise where both sides share it."""
    policy = learn(start, awm_loss, 0, Rule(), updates=5)
    torch.manual_seed(3)
    count, draws = 100 * seeds, 64
    prompt = directions()[torch.randint(0, PROMPTS, (count,))].repeat_interleave(draws, 0)
    sides = [data(prompt[::draws]).repeat_interleave(draws, 0) for _ in range(2)]
    t = torch.rand(count).clamp(0.05, 0.95).repeat_interleave(draws)

    @torch.no_grad()
    def spread_of(noises: list[Tensor]) -> np.ndarray:
        errors = []
        for net in (policy, start):
            for x0, noise in zip(sides, noises, strict=True):
                x = (1 - t[:, None]) * x0 + t[:, None] * noise
                errors.append(denoising_error(net(x, t, prompt), noise - x0))
        return diffusion_dpo_logit(*errors, beta=2.0).reshape(count, draws).var(1).numpy()

    one, other = torch.randn_like(sides[0]), torch.randn_like(sides[0])
    together, apart = spread_of([one, one]), spread_of([one, other])
    return [
        bootstrap(
            "variance of a pair's margin over the noise, independent over shared",
            lambda rows: float(apart[rows].mean() / together[rows].mean()),
            count,
            1.0,
        )
    ]


def curves(start: Velocity, seeds: int, folder: Path) -> None:
    """Draw the reward against images sampled, for nft, awm and dgpo."""
    from benchmarks.curves import Curve
    from benchmarks.curves import draw as svg
    from mmalign.compare.report.charts import Axis

    found: dict[str, Curve] = {}
    for name, objective in (("nft", nft_loss), ("awm", awm_loss), ("dgpo", dgpo_loss)):
        rows = []
        for seed in range(seeds):
            seen: list[float] = []
            learn(
                start,
                objective,
                seed,
                Rule(),
                shared=name == "dgpo",
                evaluate=lambda net, seen=seen: seen.append(float(liking(*quality(net)).mean())),  # type: ignore[misc]
            )
            rows.append(seen)
        changes = np.array(rows) - np.array(rows)[:, :1]
        found[f"{name}: reward"] = [
            (64.0 * step, float(one.mean()), float(one.min()), float(one.max())) for step, one in enumerate(changes.T)
        ]
    points = [value for curve in found.values() for point in curve for value in point[1:]]
    axes = dict.fromkeys(found, Axis.over(points, zero=True))
    text = svg("reward of the toy", found, axes, Axis.over([64.0 * step for step in range(UPDATES + 1)], zero=True))
    (folder / "flow-claims-forward.svg").write_text(text, encoding="utf-8")


CLAIMS = {
    "gradient_noise": gradient_noise,
    "anchor": anchor,
    "groups": groups,
    "decoupled": decoupled,
    "illusion": illusion,
    "shared_noise": shared_noise,
}


def main(arguments: list[str] | None = None) -> int:
    """Print a line or more for each claim."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.flow_claims_forward", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(CLAIMS)} (default: all)")
    parser.add_argument("--seeds", type=int, default=5, help="trainings of each side (default %(default)s)")
    parser.add_argument("--curves", type=Path, metavar="DIR", help="draw the learning curves into DIR instead")
    given = parser.parse_args(arguments)
    if unknown := [name for name in given.names if name not in CLAIMS]:
        parser.error(f"unknown claim {unknown[0]}; there are {', '.join(CLAIMS)}")
    if not 2 <= given.seeds <= 8:
        parser.error(f"--seeds {given.seeds}: 2 to 8")
    start = pretrained()
    if given.curves:
        curves(start, given.seeds, given.curves)
        return 0
    for name in given.names or CLAIMS:
        for finding in CLAIMS[name](start, given.seeds):
            print(f"{name:15s} {finding}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
