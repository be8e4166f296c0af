"""Gradients through the sampler in float64: finite differences, closed forms, and the paths that a cut leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from pipelines import (
    Conditioning,
    Generator,
    GradientSample,
    NoiseProcess,
    Segment,
    Truncation,
    guided_predictor,
    load_generator,
    sample,
    sample_with_gradient,
    seeded_noise,
)
from pipelines.truncation import MODES

SEEDS = [3, 4]
Load = Callable[[str], tuple[Generator, Conditioning]]


@pytest.fixture
def load(tiny_paths: dict[str, str]) -> Load:
    """Return a float64 generator of a kind, and two encoded prompts."""

    def build(kind: str) -> tuple[Generator, Conditioning]:
        generator = load_generator(tiny_paths["sd2" if kind == "v_prediction" else "sd15"])
        cond = generator.encode_prompts(["a red circle", "two blue stars"])
        if kind == "flow":
            generator.process = NoiseProcess.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0))
        generator.network.double()
        generator.encoder("vae").double()
        assert generator.process.prediction == kind
        return generator, cond

    return build


def rollout(generator: Generator, cond: Conditioning, mode: str = "full", **options: Any) -> GradientSample:
    settings = {"steps": 4, "guidance": 3.0, "seeds": SEEDS, "rng": torch.Generator().manual_seed(5), **options}
    own = {key: settings.pop(key) for key in ("k", "repeats", "low", "high") if key in settings}
    return sample_with_gradient(generator, cond, truncation=Truncation(mode, **own), **settings)


def reward(latents: Tensor) -> Tensor:
    """A smooth function that every latent enters with another weight."""
    weight = torch.linspace(-1.0, 1.0, latents[0].numel(), dtype=latents.dtype).reshape(latents[0].shape)
    return (weight * latents.tanh() + 0.1 * latents.square()).flatten(1).sum(1).mean()


def weight_gradients(generator: Generator, value: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(value, generator.trainable_parameters()))


def assert_same(found: list[Tensor], expected: list[Tensor], rtol: float = 1e-8) -> None:
    scale = max(gradient.abs().max().item() for gradient in expected)
    assert scale > 1e-4
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=rtol, atol=rtol * scale)


def reward_gradient(latents: Tensor) -> Tensor:
    leaf = latents.detach().requires_grad_()
    return torch.autograd.grad(reward(leaf), leaf)[0]


@pytest.mark.parametrize(
    ("kind", "guidance", "eta"),
    [("epsilon", 3.0, 0.0), ("epsilon", 1.0, 1.0), ("v_prediction", 3.0, 1.0), ("flow", 3.0, 0.0), ("flow", 1.0, 1.0)],
)
def test_the_gradient_of_all_steps_is_the_directional_derivative(
    load: Load, kind: str, guidance: float, eta: float
) -> None:
    """K = N, through the decoder, against a central difference along a random direction of all weights."""
    generator, cond = load(kind)
    weights = generator.trainable_parameters()
    source = torch.Generator().manual_seed(1)
    direction = [torch.randn(weight.shape, generator=source, dtype=torch.float64) for weight in weights]
    length = torch.sqrt(sum((part.square().sum() for part in direction), start=torch.zeros(())))

    def value() -> Tensor:
        result = rollout(generator, cond, guidance=guidance, eta=eta)
        assert result.grad_steps == ((0, 1, 2, 3),) * 2 and result.repeats == 1
        return reward(generator.decode_checkpointed(result.latents, 1))

    def moved(distance: float) -> float:
        with torch.no_grad():
            for weight, part in zip(weights, direction, strict=True):
                weight += distance * part / length
        return value().item()

    gradients = weight_gradients(generator, value())
    slope = sum((g * part).sum() for g, part in zip(gradients, direction, strict=True)) / length
    step = 1e-4
    assert (moved(step) - moved(-2 * step)) / (2 * step) == pytest.approx(slope.item(), rel=1e-5)


def coefficients(generator: Generator, steps: int, eta: float) -> list[tuple[float, float, float]]:
    """Return dx'/dx at a constant epsilon, dx'/d epsilon and the noise's factor of each step, from DDIM's paper."""
    cumulative = torch.cat(
        [generator.scheduler.alphas_cumprod, generator.scheduler.final_alpha_cumprod[None]]
    ).double()
    grid, following = generator.process.schedule(steps)
    found = []
    for t, t_next in zip(grid.tolist(), following.tolist(), strict=True):
        now, after = cumulative[t], cumulative[t_next]
        std = eta * torch.sqrt((1 - after) / (1 - now) * (1 - now / after))
        linear = torch.sqrt(after / now)
        by_epsilon = torch.sqrt(1 - after - std**2) - linear * torch.sqrt(1 - now)
        found.append((linear.item(), by_epsilon.item(), std.item()))
    return found


@pytest.mark.parametrize(
    ("eta", "kept"), [(0.0, (3,)), (0.0, (0,)), (1.0, (0, 2)), (0.0, (1, 2)), (1.0, (0, 1, 2, 3))]
)
def test_the_gradient_is_the_sum_of_the_kept_steps_along_the_linear_path(
    load: Load, eta: float, kept: tuple[int, ...]
) -> None:
    """The adjoint by hand: back through `a` at every step, through the network at the kept ones alone."""
    generator, cond = load("epsilon")
    with torch.no_grad():
        path = sample(generator, cond, steps=4, guidance=3.0, eta=eta, seeds=SEEDS, record=True)
    predict = guided_predictor(generator, cond, 3.0)
    weights = generator.trainable_parameters()
    adjoint = reward_gradient(path.latents)
    expected = [torch.zeros_like(weight) for weight in weights]
    for index in reversed(range(4)):
        linear, by_epsilon, _ = coefficients(generator, 4, eta)[index]
        through = torch.zeros_like(adjoint)
        if index in kept:
            state = path.states[index].requires_grad_()
            output = predict(state, path.timesteps[index].expand(2))
            through, *parts = torch.autograd.grad(output, [state, *weights], by_epsilon * adjoint)
            expected = [total + part for total, part in zip(expected, parts, strict=True)]
        adjoint = linear * adjoint + through
    trained = sample(generator, cond, steps=4, guidance=3.0, eta=eta, seeds=SEEDS, segment=Segment(grad_steps=kept))
    assert torch.equal(trained.latents, path.latents)
    assert_same(weight_gradients(generator, reward(trained.latents)), expected)
    if kept == (3,):
        assert_same(weight_gradients(generator, reward(rollout(generator, cond, "last-k").latents)), expected)


def test_a_constant_reward_has_no_gradient(load: Load) -> None:
    generator, cond = load("epsilon")
    for mode in MODES:
        latents = rollout(generator, cond, mode, steps=2, high=1.0, low=0.5).latents
        constant = latents.clamp(min=1e6).mean()
        assert all(torch.count_nonzero(gradient) == 0 for gradient in weight_gradients(generator, constant))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Return what becomes a list of the network calls: images, and whether there is a graph."""
    from pipelines.families.unet_image import StableDiffusion

    made: list[tuple[int, bool]] = []
    predict = StableDiffusion.predict

    def counted(self: Any, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        made.append((len(x_t), torch.is_grad_enabled()))
        return predict(self, x_t, t, cond)

    monkeypatch.setattr(StableDiffusion, "predict", counted)
    return made


@pytest.mark.parametrize(("guidance", "eta"), [(3.0, 0.0), (1.0, 1.0)])
def test_low_variance_averages_renoised_last_steps(
    load: Load, calls: list[tuple[int, bool]], guidance: float, eta: float
) -> None:
    generator, cond = load("epsilon")
    doubled = 2 if guidance > 1 else 1
    result = rollout(generator, cond, "low-variance", repeats=3, guidance=guidance, eta=eta, checkpoint=False)
    assert calls == [(2 * doubled, False)] * 3 + [(2 * doubled, True), (3 * 2 * doubled, True)]
    assert result.repeats == 4 and result.grad_steps == ((3,),) * 2 and len(result.latents) == 8
    found = weight_gradients(generator, reward(result.latents))

    last = rollout(generator, cond, "last-k", guidance=guidance, eta=eta).latents
    linear, by_epsilon, std = coefficients(generator, 4, eta)[3]
    t = generator.process.schedule(4)[0][-1]
    alpha = generator.scheduler.alphas_cumprod[t].double().sqrt()
    streams = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    drawn = torch.stack([torch.stack([torch.randn(4, 8, 8, generator=one) for one in streams]) for _ in range(8)])
    images = [last]
    for repeat in range(3):
        noisy = alpha * last.detach() + (1 - alpha**2).sqrt() * drawn[5 + repeat]
        output = guided_predictor(generator, cond, guidance)(noisy, t.expand(2))
        images.append(linear * noisy + by_epsilon * output + std * drawn[4])
    for number, image in enumerate(images):
        assert torch.allclose(result.latents[2 * number : 2 * number + 2], image, atol=1e-6)
    each = [weight_gradients(generator, reward(image)) for image in images]
    assert_same(found, [torch.stack(parts).mean(0) for parts in zip(*each, strict=True)], rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "clip"), [("epsilon", None), ("epsilon", 1.5), ("v_prediction", None), ("flow", None)]
)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_refl_scores_the_clean_latents_predicted_at_its_step(
    load: Load, calls: list[tuple[int, bool]], kind: str, clip: float | None, eta: float
) -> None:
    generator, cond = load(kind)
    generator.process.clip_range = clip
    result = rollout(generator, cond, "refl", eta=eta, low=0.25, high=0.75, checkpoint=False)
    (step,) = result.grad_steps[0]
    assert step in (1, 2) and calls == [(4, False)] * step + [(4, True)]
    with torch.no_grad():
        path = sample(generator, cond, steps=4, guidance=3.0, eta=eta, seeds=SEEDS, record=True)
    state, t = path.states[step], path.timesteps[step]
    output = guided_predictor(generator, cond, 3.0)(state, t.expand(2))
    squared = None if kind == "flow" else generator.scheduler.alphas_cumprod.double()[t]
    alpha, sigma = (0.0, t.item() / 1000) if squared is None else (squared.sqrt(), (1 - squared).sqrt())
    clean = {
        "epsilon": lambda: (state - sigma * output) / alpha,
        "v_prediction": lambda: alpha * state - sigma * output,
        "flow": lambda: state - sigma * output,
    }[kind]()
    if clip is not None:
        assert clean.abs().max() > clip
        clean = clean.clamp(-clip, clip)
    assert torch.allclose(result.latents, clean, rtol=1e-6, atol=1e-6)
    expected = weight_gradients(generator, reward(clean))
    assert_same(weight_gradients(generator, reward(result.latents)), expected, rtol=1e-5)


def test_noise_is_of_the_seeds_and_the_steps_of_the_other_generator(load: Load) -> None:
    generator, cond = load("epsilon")
    rng = torch.Generator().manual_seed(0)
    first, second = (rollout(generator, cond, "uniform", steps=8, rng=rng) for _ in range(2))
    assert first.grad_steps != second.grad_steps and torch.equal(first.latents, second.latents)
    apart = rollout(generator, cond[1], "low-variance", seeds=SEEDS[1:], eta=1.0).latents
    together = rollout(generator, cond, "low-variance", eta=1.0).latents
    assert torch.allclose(together[1::2], apart, atol=1e-10)
    assert seeded_noise(SEEDS, (4,)).dtype == torch.float32 and together.dtype == torch.float64


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize(("mode", "eta"), [("uniform", 0.0), ("bernoulli", 1.0), ("refl", 1.0), ("gaussian", 0.0)])
def test_each_sample_is_truncated_by_its_own_draw(load: Load, mode: str, eta: float, checkpoint: bool) -> None:
    """A batch is what its samples are alone: latents, trained steps, and the sum of the gradients."""
    generator, cond = load("epsilon")
    sources = [5, 1] if mode == "gaussian" else [5, 6]
    options: dict[str, Any] = {"steps": 8, "eta": eta, "checkpoint": checkpoint}

    def rngs(numbers: list[int]) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(number) for number in numbers]

    together = rollout(generator, cond, mode, rng=rngs(sources), **options)
    apart = [
        rollout(generator, cond[row], mode, rng=rngs(sources[row : row + 1]), seeds=SEEDS[row : row + 1], **options)
        for row in range(2)
    ]
    assert together.grad_steps == apart[0].grad_steps + apart[1].grad_steps
    assert together.grad_steps[0] != together.grad_steps[1]
    torch.testing.assert_close(together.latents, torch.cat([one.latents for one in apart]), rtol=1e-9, atol=1e-9)
    found = weight_gradients(generator, reward(together.latents))
    each = [weight_gradients(generator, reward(one.latents)) for one in apart]
    assert_same(found, [torch.stack(parts).mean(0) for parts in zip(*each, strict=True)])


def test_batches_of_a_batch_keep_the_samples_own_steps(load: Load) -> None:
    generator, cond = load("epsilon")
    segment = Segment.of_each([(3,), (1, 2, 3)])
    whole, cut = (
        sample(generator, cond, steps=4, guidance=3.0, seeds=SEEDS, segment=segment, batch_size=size)
        for size in (None, 1)
    )
    torch.testing.assert_close(whole.latents, cut.latents, rtol=1e-9, atol=1e-9)
    found, expected = (weight_gradients(generator, reward(one.latents)) for one in (whole, cut))
    assert_same(found, expected)
