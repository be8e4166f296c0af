from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipelines import Generator, PipelineError, invert, sample
from pipelines.sampling import inversion_grid

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
                x, _ = generator.process.reverse_step(x, generator.predict(x, target, cond), target, source)
        errors.append(((x - clean).norm() / clean.norm()).item())
    assert errors[1] < errors[0] / 3


def test_per_sample_timesteps_equal_one_at_a_time(sd15: Generator) -> None:
    cond = sd15.encode_prompts(PROMPTS)
    clean = torch.randn(2, *sd15.latent_shape, generator=torch.Generator().manual_seed(0))
    both = invert(sd15, cond, clean, t=torch.tensor([900, 200]), steps=4, renoise=1)
    for row, t in enumerate((900, 200)):
        alone = invert(sd15, cond[row], clean[row : row + 1], t=t, steps=4, renoise=1)
        assert torch.allclose(alone[0], both[row], atol=1e-5)


def test_wrong_arguments(sd15: Generator) -> None:
    cond, clean = sd15.encode_prompts(PROMPTS), torch.zeros(2, *sd15.latent_shape)
    with pytest.raises(PipelineError, match="t must lie in 0..999"):
        invert(sd15, cond, clean, t=1000, steps=3)
    with pytest.raises(PipelineError, match="renoise"):
        invert(sd15, cond, clean, renoise=-1, steps=3)
    with pytest.raises(PipelineError, match="1 latents but 2 prompts"):
        invert(sd15, cond, clean[:1], steps=3)
