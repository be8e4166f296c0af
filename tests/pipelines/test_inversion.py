from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipelines import Generator, PipelineError, invert, ode, sample
from pipelines.inversion import inversion_grid

PROMPTS = ["a red circle", "two blue stars"]


@pytest.fixture
def clean(generator: Generator) -> Tensor:
    return sample(generator, generator.encode_prompts(PROMPTS), steps=20, guidance=1.0, seeds=[1, 2]).latents


def round_trip(generator: Generator, clean: Tensor, steps: int, renoise: int = 0) -> float:
    cond = generator.encode_prompts(PROMPTS)
    noisy = invert(generator, cond, clean, steps=steps, renoise=renoise)
    again = sample(generator, cond, steps=steps, guidance=1.0, latents=noisy).latents
    return ((again - clean).norm() / clean.norm()).item()


def test_round_trip_error_falls_with_steps(generator: Generator, clean: Tensor) -> None:
    errors = [round_trip(generator, clean, steps) for steps in (10, 40, 160)]
    assert errors[0] > 1.8 * errors[1] > 1.8 * 3.5 * errors[2] and errors[2] < 0.01  # first order: a quarter, at last


def test_renoise_lowers_the_error(generator: Generator, clean: Tensor) -> None:
    errors = [round_trip(generator, clean, 10, renoise) for renoise in (0, 1, 8)]
    assert errors[0] > errors[1] > errors[2]


def test_grid_ends_exactly_at_each_timestep(sd15: Generator) -> None:
    sources, targets = inversion_grid(sd15.process, 10, torch.tensor([999, 137]))
    assert targets[-1].tolist() == [999, 137] and sources[0].tolist() == [-1, -1]
    assert torch.equal(sources[1:], targets[:-1]) and (targets > sources).all()
    default = inversion_grid(sd15.process, 10)
    assert torch.equal(default[1].flip(0), sd15.process.timesteps(10)) and default[0][0] == -1


def test_partial_inversion_comes_back_along_its_own_grid(generator: Generator, clean: Tensor) -> None:
    cond, t = generator.encode_prompts(PROMPTS), torch.tensor([700, 301])
    errors = []
    for steps in (5, 40):
        x = invert(generator, cond, clean, t=t, steps=steps)
        sources, targets = inversion_grid(generator.process, steps, t)
        with torch.no_grad():
            for source, target in zip(sources.flip(0), targets.flip(0), strict=True):
                x, _ = ode()(generator.process, x, generator.predict(x, target, cond), target, source)
        errors.append(((x - clean).norm() / clean.norm()).item())
    assert errors[1] < errors[0] / 3


def test_per_sample_timesteps_equal_one_at_a_time(sd15: Generator) -> None:
    cond = sd15.encode_prompts(PROMPTS)
    clean = torch.randn(2, *sd15.latent_shape, generator=torch.Generator().manual_seed(0))
    both = invert(sd15, cond, clean, t=torch.tensor([900, 200]), steps=4, renoise=1)
    for row, t in enumerate((900, 200)):
        alone = invert(sd15, cond[row], clean[row : row + 1], t=t, steps=4, renoise=1)
        assert torch.allclose(alone[0], both[row], atol=1e-5)


def test_clean_images_get_the_noise_of_their_timestep(sd15: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    cond, random = sd15.encode_prompts(PROMPTS), torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(2, *sd15.latent_shape, generator=random) for _ in range(2))
    monkeypatch.setattr(type(sd15), "predict", lambda self, x, t, cond: noise)  # the same wherever it is asked
    t = torch.tensor([20, 700])
    square = (sd15.process.alpha(t) ** 2).reshape(2, 1, 1, 1)
    last = torch.tensor(1 - 0.00085)  # of Stable Diffusion's betas, the first
    wanted = square.sqrt() * clean + (1 - square).sqrt() * noise
    found = invert(sd15, cond, clean, t=t, steps=4, renoise=1, start="clean")
    assert torch.allclose(found, wanted, atol=1e-5)
    implied = sd15.process.implied_noise(clean, invert(sd15, cond, clean, t=t, steps=4), t)
    share = 1 - (square / last).sqrt() * (1 - last).sqrt() / (1 - square).sqrt()
    image = ((square / last).sqrt() - square.sqrt()) / (1 - square).sqrt()
    assert torch.allclose(implied, share * noise + image * clean, atol=1e-4)
    assert share.flatten()[0].item() == pytest.approx(0.79, abs=0.005)  # of noise at timestep 20, where 1 belongs


@pytest.mark.parametrize(("steps", "noise", "image"), [(5, 0.76, 0.13), (10, 0.865, 0.068)])
def test_floor_grid_is_that_of_the_published_codes(sd15: Generator, steps: int, noise: float, image: float) -> None:
    t = torch.arange(2, 1000)
    sources, targets = inversion_grid(sd15.process, steps, t, "floor")
    # diffusers' inverse scheduler goes to 1, 1 + T/steps, ...; the codes take its levels below t and stop
    assert targets[-1].tolist() == [1 + (level - 2) // (1000 // steps) * (1000 // steps) for level in t.tolist()]
    assert torch.equal(sources[1:], targets[:-1]) and (sources[0] == -1).all()
    # what is labelled t is a' x0 + b' noise with these means over t
    alpha, sigma = sd15.process.alpha(t).double(), sd15.process.sigma(t).double()
    reached = targets[-1]
    at, st = sd15.process.alpha(reached).double(), sd15.process.sigma(reached).double()
    assert (st / sigma).mean().item() == pytest.approx(noise, abs=0.006)
    assert ((at - alpha) / sigma).mean().item() == pytest.approx(image, abs=0.006)


def test_floor_grid_leaves_alone_what_is_below_its_first_level(sd15: Generator) -> None:
    cond = sd15.encode_prompts(PROMPTS)
    clean = torch.randn(2, *sd15.latent_shape, generator=torch.Generator().manual_seed(0))
    x = invert(sd15, cond, clean, t=torch.tensor([1, 700]), steps=5, grid="floor")
    assert torch.equal(x[0], clean[0])
    alone = invert(sd15, cond[1], clean[1:], t=601, steps=4, grid="floor")  # 1, 251, 501
    assert not torch.allclose(alone[0], x[1])
    whole = invert(sd15, cond[1], clean[1:], steps=5)  # 1, 201, 401, 601, 801
    cut = invert(sd15, cond[1], clean[1:], t=802, steps=5, grid="floor")
    assert torch.equal(whole, cut)


def test_noise_in_the_inversion_has_the_spread_of_the_sampler_s_own(sd15: Generator) -> None:
    cond, clean = sd15.encode_prompts(PROMPTS), torch.zeros(2, *sd15.latent_shape)
    plain = invert(sd15, cond, clean, t=500, steps=1)
    noisy = invert(sd15, cond, clean, t=500, steps=1, eta=0.5, seeds=[3, 4])
    drawn = torch.randn(sd15.latent_shape, generator=torch.Generator().manual_seed(4))
    # eq. 16 of arXiv 2010.02502 between level 500 and the clean one
    a, s = float(sd15.process.alpha(500)), float(sd15.process.sigma(500))
    a0, s0 = float(sd15.process.alpha(-1)), float(sd15.process.sigma(-1))
    std = 0.5 * s0 / s * (1 - (a / a0) ** 2) ** 0.5
    torch.testing.assert_close(noisy[1] - plain[1], std * drawn, rtol=1e-3, atol=1e-5)
    with pytest.raises(PipelineError, match="needs seeds"):
        invert(sd15, cond, clean, t=500, steps=1, eta=0.5)


def test_wrong_arguments(sd15: Generator) -> None:
    cond, clean = sd15.encode_prompts(PROMPTS), torch.zeros(2, *sd15.latent_shape)
    with pytest.raises(PipelineError, match="t must lie in 0..999"):
        invert(sd15, cond, clean, t=1000, steps=3)
    with pytest.raises(PipelineError, match="renoise"):
        invert(sd15, cond, clean, renoise=-1, steps=3)
    with pytest.raises(PipelineError, match="1 latents but 2 prompts"):
        invert(sd15, cond, clean[:1], steps=3)
