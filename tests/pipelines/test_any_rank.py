"""Latents of any rank: images, videos [batch, C, F, H, W] and tokens [batch, N, C], against arithmetic by hand."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from ideal_denoiser import IdealGenerator, level, posterior
from torch import Tensor

from pipelines import (
    PipelineError,
    Truncation,
    ddim,
    guided_predictor,
    invert,
    sample,
    sample_with_gradient,
    seeded_noise,
)
from pipelines.branching import Branching, sample_branching
from pipelines.sampling import noise_stream, replay_step

SHAPES = {"tokens": (6, 3), "image": (3, 4, 2), "video": (2, 3, 2, 4)}
KINDS = ["epsilon", "v_prediction", "flow"]
SEEDS = [5, 6]
STEPS = 4

shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
kinds = pytest.mark.parametrize("kind", KINDS)


def means(shape: tuple[int, ...]) -> Tensor:
    return torch.tensor([1.0, -2.0]).double().reshape(2, *[1] * len(shape))


def by_hand(
    generator: IdealGenerator, x: Tensor, eta: float, scale: float = 1.0
) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """Return states, means and stds of eta-DDIM by eqs. 12 and 16 of arXiv 2010.02502, one step after another.

    For flow matching they are the same equations with (1 - t, t) in the place of (sqrt(a), sqrt(1 - a)).
    """
    draws = noise_stream(SEEDS, generator.latent_shape)
    next(draws)
    grid, following = generator.process.schedule(STEPS)
    states, centres, stds = [x], [], []
    for t, t_next in zip(grid.tolist(), following.tolist(), strict=True):
        (alpha, sigma), (alpha_next, sigma_next) = level(generator.scheduler, t), level(generator.scheduler, t_next)
        mean = scale * means(generator.latent_shape)
        clean, noise = posterior(states[-1], mean, *(torch.tensor(one).double() for one in (alpha, sigma)))
        std = eta * sigma_next / sigma * max(sigma**2 - (alpha / alpha_next * sigma_next) ** 2, 0) ** 0.5
        centres.append(alpha_next * clean + (sigma_next**2 - std**2) ** 0.5 * noise)
        stds.append(std)
        states.append(centres[-1] + std * next(draws))
    return states, centres, stds


@shapes
@kinds
@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_recorded_trajectories_are_the_published_steps(shape: tuple[int, ...], kind: str, eta: float) -> None:
    generator = IdealGenerator(kind, shape)
    cond = generator.encode_prompts(["1", "-2"])
    found = sample(generator, cond, steps=STEPS, guidance=1.0, eta=eta, seeds=SEEDS, record=True)
    states, centres, stds = by_hand(generator, seeded_noise(SEEDS, shape).double(), eta)
    assert found.latents.shape == (2, *shape)
    torch.testing.assert_close(found.states, torch.stack(states), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.means, torch.stack(centres), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.stds, torch.tensor(stds).double().reshape(-1, 1).expand(-1, 2), rtol=1e-5, atol=0)
    density = torch.distributions.Normal(found.means[0], stds[0] or 1.0).log_prob(found.states[1]).flatten(1).mean(1)
    expected = density if eta else torch.zeros(2).double()
    torch.testing.assert_close(found.log_probs[0], expected, rtol=1e-5, atol=1e-6)


@shapes
@kinds
def test_noise_goes_on_and_comes_off(shape: tuple[int, ...], kind: str) -> None:
    process, t = IdealGenerator(kind, shape).process, torch.tensor([300, 900])
    x0, noise = (torch.randn(2, *shape, generator=torch.Generator().manual_seed(i)).double() for i in range(2))
    x_t = process.add_noise(x0, noise, t)
    for row in range(2):
        alpha, sigma = level(process._scheduler, t[row].item())
        torch.testing.assert_close(x_t[row], alpha * x0[row] + sigma * noise[row], rtol=1e-6, atol=1e-6)
    output = process.target(x0, noise, t)
    torch.testing.assert_close(process.to_x0(x_t, output, t), x0)
    torch.testing.assert_close(process.to_noise(x_t, output, t), noise)
    torch.testing.assert_close(process.implied_noise(x0, x_t, t), noise)


@shapes
@kinds
def test_inversion_climbs_by_the_noise_predicted_where_it_stands(shape: tuple[int, ...], kind: str) -> None:
    """Each step keeps the clean part and changes the noise level: a'/a (x - s noise) + s' noise."""
    generator = IdealGenerator(kind, shape)
    x = clean = means(shape) + 0.5 * seeded_noise(SEEDS, shape).double()
    grid, following = (levels.flip(0).tolist() for levels in generator.process.schedule(STEPS))
    for t, t_next in zip(following, grid, strict=True):
        (alpha, sigma), (alpha_next, sigma_next) = level(generator.scheduler, t), level(generator.scheduler, t_next)
        noise = posterior(x, means(shape), *(torch.tensor(one).double() for one in (alpha_next, sigma_next)))[1]
        x = alpha_next / alpha * (x - sigma * noise) + sigma_next * noise
    found = invert(generator, generator.encode_prompts(["1", "-2"]), clean, steps=STEPS)
    torch.testing.assert_close(found, x, rtol=1e-5, atol=1e-5)


@shapes
@kinds
def test_candidates_differ_by_their_noise_alone(shape: tuple[int, ...], kind: str) -> None:
    generator = IdealGenerator(kind, shape)
    seen: list[Branching] = []
    latents = sample_branching(
        generator, generator.encode_prompts(["1", "-2"]), kernel=ddim(1.0), steps=STEPS, candidates=2, seeds=SEEDS,
        visit=seen.extend, guidance=1.0,
    )  # fmt: skip
    assert latents.shape == (2, *shape) and seen[0].candidates.shape == (2, 2, *shape)
    first, second = islice(noise_stream(SEEDS, shape), 1, 3)
    gap = seen[0].candidates[0] - seen[0].candidates[1]
    torch.testing.assert_close(gap, seen[0].std * (first - second).double(), rtol=1e-5, atol=1e-6)
    alpha, sigma = (torch.tensor(one).double() for one in level(generator.scheduler, seen[0].t_next))
    clean = posterior(seen[0].candidates[1], means(shape), alpha, sigma)[0]
    torch.testing.assert_close(seen[0].clean[1], clean, rtol=1e-5, atol=1e-6)


@shapes
@kinds
@pytest.mark.parametrize("mode", ["full", "refl", "low-variance"])
def test_gradient_is_the_slope_of_the_latents_in_the_weight(shape: tuple[int, ...], kind: str, mode: str) -> None:
    generator = IdealGenerator(kind, shape)
    cond = generator.encode_prompts(["1", "-2"])
    found = sample_with_gradient(
        generator, cond, truncation=Truncation(mode), rng=torch.Generator().manual_seed(0), seeds=SEEDS, steps=STEPS,
        guidance=1.0,
    )  # fmt: skip
    assert found.latents.shape == (2 * found.repeats, *shape)
    (slope,) = torch.autograd.grad(found.latents.sum(), generator.network.weight)
    if mode == "full":
        noise = seeded_noise(SEEDS, shape).double()
        above, below = (by_hand(generator, noise, 0.0, 1 + step)[0][-1].sum() for step in (1e-3, -1e-3))
        assert slope.item() == pytest.approx((above - below).item() / 2e-3, rel=1e-5)
    else:
        assert slope.abs() > 0


@shapes
@kinds
def test_replayed_steps_are_the_recorded_ones(shape: tuple[int, ...], kind: str) -> None:
    generator = IdealGenerator(kind, shape)
    cond = generator.encode_prompts(["1", "-2"])
    recorded = sample(generator, cond, steps=STEPS, guidance=2.0, eta=0.7, seeds=SEEDS, record=True)
    predict = guided_predictor(generator, cond, 2.0)
    for index in range(STEPS):
        mean, std, log_prob = replay_step(generator.process, recorded, index, predict)
        assert torch.equal(mean, recorded.means[index]) and torch.equal(std, recorded.stds[index])
        assert torch.equal(log_prob, recorded.log_probs[index])


def test_latents_of_another_rank_are_refused() -> None:
    generator = IdealGenerator("flow", SHAPES["video"])
    cond = generator.encode_prompts(["1", "-2"])
    with pytest.raises(PipelineError, match=r"latents of this model are \[batch, 2, 3, 2, 4\], got \[2, 2, 3, 2\]"):
        sample(generator, cond, latents=torch.zeros(2, 2, 3, 2))
    with pytest.raises(PipelineError, match="2 channels"):
        sample(generator, cond, latents=torch.zeros(2, 3, 3, 2, 4))
