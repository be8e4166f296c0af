from __future__ import annotations

import math
import warnings

import pytest
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
from torch import Tensor

from pipelines import (
    Generator,
    PipelineError,
    Segment,
    cps,
    ddim,
    gaussian_log_prob,
    guided_predictor,
    sample,
    seeded_noise,
)
from pipelines.sampling import replay_step

PROMPTS = ["a red circle", "two blue stars above the green square"]


def generators(seeds: list[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture
def pipe(tiny_path: str) -> DiffusionPipeline:
    loaded = DiffusionPipeline.from_pretrained(tiny_path)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.mark.parametrize(("guidance", "eta"), [(7.5, 0.0), (1.0, 0.0), (3.0, 1.0)])
def test_ddim_equals_diffusers(generator: Generator, pipe: DiffusionPipeline, guidance: float, eta: float) -> None:
    options = {"num_inference_steps": 8, "guidance_scale": guidance, "eta": eta, "generator": generators([3, 4])}
    expected = pipe(PROMPTS, output_type="latent", **options).images
    ours = sample(generator, generator.encode_prompts(PROMPTS), steps=8, guidance=guidance, eta=eta, seeds=[3, 4])
    assert (ours.latents - expected).abs().max() < 1e-4
    options["generator"] = generators([3, 4])
    images = pipe(PROMPTS, output_type="pt", **options).images
    assert (generator.decode(ours.latents) - images).abs().max() < 1e-4


def test_negative_prompt_and_given_latents_equal_diffusers(generator: Generator, pipe: DiffusionPipeline) -> None:
    latents = seeded_noise([5, 6], generator.latent_shape)
    expected = pipe(
        PROMPTS, negative_prompt=["blue", "star"], latents=latents, num_inference_steps=5, output_type="latent",
        guidance_scale=4.0,
    ).images  # fmt: skip
    negative = generator.encode_prompts(["blue", "star"])
    cond = generator.encode_prompts(PROMPTS)
    ours = sample(generator, cond, steps=5, guidance=4.0, latents=latents, negative=negative, batch_size=1)
    assert (ours.latents - expected).abs().max() < 1e-4


def test_dpm_solver_equals_diffusers(generator: Generator, pipe: DiffusionPipeline) -> None:
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    options = {"num_inference_steps": 6, "generator": generators([1, 2]), "guidance_scale": 5.0}
    expected = pipe(PROMPTS, output_type="latent", **options).images
    ours = sample(
        generator, generator.encode_prompts(PROMPTS), steps=6, guidance=5.0, seeds=[1, 2], solver="dpm++", batch_size=1
    )
    assert (ours.latents - expected).abs().max() < 1e-4


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_an_image_depends_on_seed_and_prompt_alone(generator: Generator, eta: float) -> None:
    prompts = [*PROMPTS, "a green square", "three stars", "a blue circle"]
    seeds = [11, 12, 2**40 + 5, 14, 15]
    cond = generator.encode_prompts(prompts)
    together = generator.decode(sample(generator, cond, steps=6, eta=eta, seeds=seeds).latents)
    parts = sample(generator, cond, steps=6, eta=eta, seeds=seeds, batch_size=2)
    assert (generator.decode(parts.latents) - together).abs().max() < 1e-5
    for row, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        alone = sample(generator, generator.encode_prompts([prompt]), steps=6, eta=eta, seeds=[seed])
        assert (generator.decode(alone.latents)[0] - together[row]).abs().max() < 1e-5


def test_guidance_is_one_call_and_one_half_of_it_without(sd15: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []
    predict = sd15.predict

    def counted(x_t: Tensor, t: Tensor, cond: object) -> Tensor:
        batches.append(len(x_t))
        return predict(x_t, t, cond)

    monkeypatch.setattr(sd15, "predict", counted)
    cond = sd15.encode_prompts(PROMPTS)
    sample(sd15, cond, steps=3, guidance=2.0, seeds=[1, 2])
    assert batches == [4, 4, 4]
    batches.clear()
    for guidance in (1.0, 0.0):
        sample(sd15, cond, steps=3, guidance=guidance, seeds=[1, 2])
        assert batches == [2, 2, 2]
        batches.clear()


def test_guidance_from_zero_to_one_leads_from_no_prompt_to_the_prompt_alone(generator: Generator) -> None:
    x = seeded_noise([1, 2], generator.latent_shape)
    t = torch.tensor([900, 400])
    cond = generator.encode_prompts(PROMPTS)
    other = generator.encode_prompts(["green", "star"])
    with torch.no_grad():
        zero, half, one, two = (guided_predictor(generator, cond, scale)(x, t) for scale in (0.0, 0.5, 1.0, 2.0))
        against = guided_predictor(generator, cond, 0.0, other)(x, t)
    assert torch.allclose(half, (zero + one) / 2, atol=1e-5) and torch.allclose(two, 2 * one - zero, atol=1e-5)
    assert torch.allclose(one, generator.predict(x, t, cond), atol=1e-5)
    assert torch.allclose(against, generator.predict(x, t, other), atol=1e-5)
    assert (zero - one).abs().max() > 1e-3


def test_record_keeps_a_consistent_trajectory(generator: Generator) -> None:
    cond = generator.encode_prompts(PROMPTS)
    whole = sample(generator, cond, steps=5, guidance=3.0, eta=1.0, seeds=[1, 2], record=True, batch_size=1)
    plain = sample(generator, cond, steps=5, guidance=3.0, eta=1.0, seeds=[1, 2])
    assert torch.allclose(whole.latents, plain.latents, atol=1e-5) and plain.states is None
    assert torch.equal(whole.states[-1], whole.latents) and whole.states.shape == (6, 2, *generator.latent_shape)
    assert torch.equal(whole.states[0], seeded_noise([1, 2], generator.latent_shape))
    predict = guided_predictor(generator, cond, 3.0)
    with torch.no_grad():
        for step, (t, t_next) in enumerate(zip(whole.timesteps, whole.next_timesteps, strict=True)):
            state = whole.states[step]
            output = predict(state, t.expand(2))
            mean, std = ddim(1.0)(generator.process, state, output, t.expand(2), t_next.expand(2))
            assert torch.allclose(mean, whole.means[step], atol=1e-4)
            log_prob = gaussian_log_prob(whole.states[step + 1], whole.means[step], whole.stds[step])
            assert torch.allclose(log_prob, whole.log_probs[step], atol=1e-5)
    assert whole.log_probs.shape == (5, 2) and (whole.stds > 0).all()


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_later_start_goes_on_and_an_early_exit_ends_in_the_predicted_clean_latents(
    generator: Generator, eta: float
) -> None:
    cond = generator.encode_prompts(PROMPTS)
    options = {"steps": 5, "guidance": 3.0, "eta": eta, "seeds": [1, 2], "record": True}
    whole = sample(generator, cond, **options)
    later = sample(generator, cond, segment=Segment(start=3), latents=whole.states[3], **options)
    assert torch.equal(later.latents, whole.latents) and torch.equal(later.timesteps, whole.timesteps[3:])
    assert torch.equal(later.means, whole.means[3:]) and torch.equal(later.stds, whole.stds[3:])
    early = sample(generator, cond, segment=Segment(exit=2), **options)
    output = guided_predictor(generator, cond, 3.0)(whole.states[2], whole.timesteps[2].expand(2))
    clean = generator.process.to_x0(whole.states[2], output, whole.timesteps[2])
    assert torch.allclose(early.latents, clean, atol=1e-5) and torch.equal(early.states[:3], whole.states[:3])
    assert early.next_timesteps.tolist() == [*whole.timesteps[1:3].tolist(), -1]
    assert early.stds[2].tolist() == early.log_probs[2].tolist() == [0, 0]


def test_noise_can_differ_from_step_to_step(generator: Generator) -> None:
    """Random where eta is 1, deterministic from there on: as going on without noise from where the noise ended."""
    cond, options = generator.encode_prompts(PROMPTS), {"steps": 4, "guidance": 2.0, "seeds": [3, 4], "record": True}
    mixed = sample(generator, cond, eta=[1.0, 1.0, 0.0, 0.0], **options)
    random = sample(generator, cond, eta=1.0, **options)
    assert mixed.states is not None and random.states is not None and mixed.stds is not None
    torch.testing.assert_close(mixed.states[:3], random.states[:3], rtol=0, atol=0)
    assert (mixed.stds > 0).all(1).tolist() == [True, True, False, False]
    tail = sample(generator, cond, steps=4, guidance=2.0, latents=mixed.states[2], segment=Segment(2))
    torch.testing.assert_close(mixed.latents, tail.latents, rtol=0, atol=1e-6)


def test_replayed_steps_are_the_recorded_ones(generator: Generator) -> None:
    cond = generator.encode_prompts(PROMPTS)
    recorded = sample(generator, cond, steps=3, guidance=2.0, eta=0.7, seeds=[3, 4], record=True)
    assert recorded.means is not None and recorded.log_probs is not None
    predict = guided_predictor(generator, cond, 2.0)
    with torch.no_grad():
        for index in range(3):
            mean, _, log_prob = replay_step(generator.process, recorded, index, predict)
            assert torch.equal(mean, recorded.means[index]) and torch.equal(log_prob, recorded.log_probs[index])
        second = guided_predictor(generator, cond[[1]], 2.0)
        mean, _, _ = replay_step(generator.process, recorded, 1, second, rows=torch.tensor([1]))
    torch.testing.assert_close(mean, recorded.means[1, [1]], rtol=1e-5, atol=1e-6)


def test_log_prob_is_the_mean_over_dimensions() -> None:
    generator = torch.Generator().manual_seed(0)
    x, mean = (torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    std = torch.tensor([0.5, 2.0], dtype=torch.float64)
    expected = torch.distributions.Normal(mean, std.reshape(2, 1, 1, 1)).log_prob(x).mean((1, 2, 3))
    assert torch.allclose(gaussian_log_prob(x, mean, std), expected)
    assert gaussian_log_prob(mean, mean, std)[0].item() == pytest.approx(-math.log(0.5) - 0.5 * math.log(2 * math.pi))


def test_a_deterministic_step_has_log_prob_zero_and_no_gradient() -> None:
    mean = torch.ones(2, 3, requires_grad=True)
    log_prob = gaussian_log_prob(torch.zeros(2, 3), mean, torch.tensor([0.0, 1.0]))
    log_prob.sum().backward()
    assert log_prob[0] == 0 and torch.equal(mean.grad[0], torch.zeros(3)) and (mean.grad[1] != 0).all()


def test_nothing_carries_a_gradient_by_default(sd15: Generator) -> None:
    assert not sample(sd15, sd15.encode_prompts(PROMPTS), steps=2, seeds=[1, 2], record=True).means.requires_grad


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_gradient_through_chosen_steps_equals_finite_differences(sd15: Generator, guidance: float) -> None:
    """The last step alone keeps its graph; the earlier prediction is a constant and the path to the end is linear."""
    cond = sd15.encode_prompts(PROMPTS[:1])
    bias = sd15.network.conv_out.bias
    weight = torch.randn(1, *sd15.latent_shape, generator=torch.Generator().manual_seed(0))

    def value(steps: tuple[int, ...]) -> Tensor:
        segment = Segment(grad_steps=steps)
        return (sample(sd15, cond, steps=3, guidance=guidance, seeds=[7], segment=segment).latents * weight).sum()

    gradients = {steps: torch.autograd.grad(value(steps), bias)[0] for steps in [(0,), (1,), (2,), (0, 1, 2)]}
    step = 1e-2
    with torch.no_grad():
        bias[1] += step
        above = value(())
        bias[1] -= 2 * step
        below = value(())
        bias[1] += step
    assert gradients[(0, 1, 2)][1] == pytest.approx(((above - below) / (2 * step)).item(), rel=2e-2)
    for one in [(0,), (1,), (2,)]:
        assert gradients[one].abs().max() > 0 and not torch.allclose(gradients[one], gradients[(0, 1, 2)])
    # epsilon prediction: d x_next / d eps at the first step, then scaled by alpha'/alpha to the end, in closed form.
    process = sd15.process
    grid, following = process.schedule(3)
    scale = process.sigma(following[0].item()) - process.sigma(grid[0].item()) * process.alpha(
        following[0].item()
    ) / process.alpha(grid[0].item())
    path = process.alpha(-1) / process.alpha(following[0].item())
    assert torch.allclose(gradients[(0,)], (scale * path * weight).sum((0, 2, 3)).flatten(), rtol=1e-3)


def test_log_probs_of_chosen_steps_carry_gradients(sd15: Generator) -> None:
    trajectory = sample(
        sd15,
        sd15.encode_prompts(PROMPTS),
        steps=3,
        eta=1.0,
        seeds=[1, 2],
        record=True,
        segment=Segment(grad_steps=[2]),
    )
    assert not trajectory.states.requires_grad
    (gradient,) = torch.autograd.grad(trajectory.log_probs[2].sum(), sd15.network.conv_out.bias)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": None}, "needs seeds"),
        ({"seeds": [1]}, "one of seeds for each of 2"),
        ({"solver": "dpm+"}, "Did you mean 'dpm\\+\\+'"),
        ({"solver": "dpm++", "eta": 1.0}, "inference only"),
        ({"segment": Segment(grad_steps=[4])}, r"grad_steps must lie in 0\.\.3"),
        ({"segment": Segment(exit=2, grad_steps=[3])}, r"grad_steps must lie in 0\.\.2"),
        ({"segment": Segment(4), "latents": torch.zeros(2, 4, 8, 8)}, r"start of a segment must lie in 0\.\.3"),
        ({"segment": Segment(1)}, "from step 1 on needs latents"),
        ({"segment": Segment(3, 1), "latents": torch.zeros(2, 4, 8, 8)}, "comes before its start 3"),
        ({"solver": "dpm++", "segment": Segment(exit=1)}, "inference only"),
        ({"solver": "dpm++", "kernel": cps(0.0)}, "inference only"),
        ({"kernel": cps(), "eta": 1.0}, "kernel or eta, not both"),
        ({"kernel": "flow_cps"}, "kernel 'flow_cps' is unknown.*Did you mean"),
        ({"kernel": "flow_sde"}, "for flow matching, and this model predicts 'epsilon'"),
        ({"eta": [1.0, 0.0]}, "ddim must be given one number, or one for each of 4 steps; got 2"),
        ({"eta": -1.0}, "eta must lie"),
        ({"batch_size": 0}, "batch_size"),
        ({"steps": 1001}, "steps must lie"),
        ({"steps": 1001, "solver": "dpm++"}, "steps must lie"),
        ({"steps": 1000, "solver": "dpm++"}, "no 1000 different steps on 1000 levels; take fewer"),
        ({"steps": 0, "solver": "dpm++"}, "steps must lie"),
        ({"guidance": -0.5}, "guidance must be a number of at least 0"),
        ({"guidance": math.nan}, "guidance must be"),
        ({"guidance": math.inf}, "guidance must be"),
        ({"latents": torch.zeros(2, 3, 8, 8)}, "4 channels"),
    ],
)
def test_wrong_arguments_are_one_clear_line(sd15: Generator, options: dict[str, object], message: str) -> None:
    cond = sd15.encode_prompts(PROMPTS)
    with pytest.raises(PipelineError, match=message) as caught:
        sample(sd15, cond, **{"steps": 4, "seeds": [1, 2], **options})
    assert "\n" not in str(caught.value)


def test_low_precision_keeps_float32_latents(tiny_paths: dict[str, str]) -> None:
    from pipelines import load_generator

    exact, low = (load_generator(tiny_paths["sdxl"], dtype=dtype) for dtype in ("fp32", "bf16"))
    results = [sample(model, model.encode_prompts(PROMPTS), steps=4, seeds=[1, 2]).latents for model in (exact, low)]
    assert low.network.dtype == torch.bfloat16 and results[1].dtype == torch.float32
    assert 0 < (results[0] - results[1]).norm() / results[0].norm() < 0.05
    assert low.decode(results[1]).dtype == torch.float32


def test_prompts_that_are_cut_are_counted(sd15: Generator) -> None:
    with pytest.warns(UserWarning, match="1 of 2 prompts exceed 16 tokens"):
        sd15.encode_prompts(["red " * 30, "red"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sd15.encode_prompts(["red " * 14])
