"""Flow-GRPO: what is drawn and dropped, the ratio, and its gradient against the objective written out by hand.

The toy is the ideal denoiser of Gaussian data in float64: its one weight scales the mean that the prompt names.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ideal_denoiser import IdealGenerator
from pydantic import ValidationError
from tiny_models import build_tiny_flux, build_tiny_sd
from tiny_runs import ExactReference, ExactRun, exact_run, losses, online_config
from torch import Tensor

from mmalign.core.errors import UserError
from mmalign.data.batches import PromptBatch
from mmalign.methods.advantages import weigh_samples_alike, without_zeros
from mmalign.methods.flow_grpo import FlowGRPO
from mmalign.methods.flow_grpo_config import FlowGRPOConfig
from mmalign.methods.rollout import RatioError, Rollout
from mmalign.methods.run import Run
from mmalign.scoring.choice import WeightedReward
from mmalign.training.train import train
from pipelines import PipelineError, load_generator
from rewards import Reward

SHAPE = (3, 2, 2)
SMALL: dict[str, Any] = {"sampling_steps": 6, "images_per_prompt": 4, "mini_batches": 1, "clip": 2e-3}
EVEN_GRID = [1, 0.9643, 0.9231, 0.8750, 0.8182, 0.75, 0.6667, 0.5625, 0.4286, 0.25]


class Bounded(IdealGenerator):
    """Images are latents squashed to 0..1."""

    def decode(self, latents: Tensor) -> Tensor:
        return latents.sigmoid()


class Curved(Reward):
    """The square of a mean; the same for all images whose prompt is 0."""

    name = "curved"
    needs = ("prompts",)

    def score(self, media: Any, prompts: Any, references: Any) -> Any:
        wanted = torch.tensor([float(prompt) != 0 for prompt in prompts])
        return media.mean((1, 2, 3)).square() * wanted


def toy(prediction: str = "flow", **options: Any) -> Run:
    generator = Bounded(prediction, SHAPE, **({"shift": 3.0} if prediction == "flow" else {}), **options)
    return ExactRun(
        generator, reference=ExactReference(generator, "copy"), rewards=[WeightedReward("curved", 1.0, Curved())]
    )


def method(**options: Any) -> FlowGRPO:
    return FlowGRPO(FlowGRPOConfig(**{**SMALL, **options}))


def prompts(run: Run, *texts: str) -> PromptBatch:
    return PromptBatch(list(texts), run.generator.encode_prompts(texts), [f"{text}#0" for text in texts])


def move(run: Run, scale: float = 1.05) -> None:
    """Let the policy move on, as an update would."""
    with torch.no_grad():
        run.generator.network.weight.mul_(scale)
    run.step += 1


# The window


def windows(rounds: int, **window: Any) -> list[range]:
    run, chosen = toy(), method(sampling_steps=10, window=window)
    found = []
    for number in range(rounds):
        run.step = number * chosen.updates_per_round
        found.append(chosen.window(run))
    return found


def test_windows_are_drawn_uniformly_from_the_runs_seed() -> None:
    found = windows(600, size=3, range=[0, 8])
    assert found == windows(600, size=3, range=[0, 8]) and {len(window) for window in found} == {3}
    counts = Counter(window.start for window in found)
    assert set(counts) == set(range(6))
    assert sum((count - 100) ** 2 / 100 for count in counts.values()) < 20.5  # chi squared, 5 degrees: p = 0.001


def test_progressive_windows_move_on_and_come_back() -> None:
    found = windows(12, size=4, range=[0, 8], order="progressive", stride=2, every=2)
    assert [window.start for window in found] == [0, 0, 2, 2, 4, 4, 1, 1, 3, 3, 0, 0]  # modulo 5 places
    assert {window.start for window in windows(5, order="progressive", stride=0, every=1)} == {0}


@pytest.mark.parametrize("steps", [6, 10, 20, 25])
def test_size_0_is_all_steps_but_the_last_as_in_the_published_code(steps: int) -> None:
    config = FlowGRPOConfig(sampling_steps=steps, window={"size": 0})
    window = config.window.of_round(3, steps, torch.Generator())
    assert list(window) == list(range(int(steps * 0.99)))


def test_default_windows_lie_in_the_first_half_or_where_they_fit() -> None:
    assert FlowGRPOConfig().window.candidates(10) == range(5)
    assert FlowGRPOConfig().window.candidates(4) == range(3)


def test_a_round_has_one_window_and_keeps_nothing_else() -> None:
    run, chosen = toy(), method(window={"size": 2, "range": [1, 5]})
    rollouts = chosen.collect(run, [prompts(run, "1", "-2"), prompts(run, "0.5", "2")])
    start = chosen.window(run).start
    levels = run.process.schedule(6).levels[start : start + 2]
    for rollout in rollouts:
        assert torch.equal(rollout.trajectory.timesteps, levels) and rollout.learned_steps() == [0, 1]
        assert rollout.trajectory.states.shape == (3, 8, *SHAPE) and bool((rollout.stds > 0).all())
    run.step = 1  # the next round has its own
    assert len({method(window={"size": 2, "range": [1, 5]}).window(toy_at(step)).start for step in range(8)}) > 1


def toy_at(step: int) -> Run:
    run = toy()
    run.step = step
    return run


# Sampling


def test_images_of_a_group_can_start_from_one_noise() -> None:
    run = toy()
    first_step = {"size": 1, "range": [0, 1]}
    for same in (False, True):
        (rollout,) = method(window=first_step, same_noise=same).collect(run, [prompts(run, "1", "-2")])
        start, after = rollout.trajectory.states
        groups = start.view(2, 4, -1)
        assert bool((groups == groups[:, :1]).all()) == same and not torch.equal(groups[0, 0], groups[1, 0])
        assert len(after.flatten(1).unique(dim=0)) == 8


def test_the_even_grid_and_the_shift_reach_the_sampler() -> None:
    run = toy()
    options: dict[str, Any] = {"sampling_steps": 10, "window": {"size": 0}}
    (even,) = method(**options, grid="even").collect(run, [prompts(run, "1")])
    assert [level / 1000 for level in even.trajectory.timesteps.tolist()] == pytest.approx(EVEN_GRID[:9], abs=5e-5)
    by_size = toy(use_dynamic_shifting=True)
    by_size.process.mu = 0.7
    (shifted,) = method(**options, grid="even", shift=3.0).collect(by_size, [prompts(by_size, "1")])
    assert [level / 1000 for level in shifted.trajectory.timesteps.tolist()] == pytest.approx(EVEN_GRID[:9], abs=5e-5)


# The ratio


@pytest.mark.parametrize("ratio", ["ppo", "guard", "dppo"])
@pytest.mark.parametrize("kernel", ["cps", "flow_sde", "dance", "wan_sde", "ddim"])
def test_the_first_update_of_a_round_has_ratio_one(kernel: str, ratio: str) -> None:
    run, chosen = toy(), method(kernel=kernel, ratio=ratio, window={"size": 0})
    ((rollout,),) = chosen.split(run, chosen.collect(run, [prompts(run, "1", "-2")]))
    metrics = chosen.learn(run, rollout, lambda loss: loss.backward())
    assert float(metrics["log_ratio_max"]) == 0.0 and float(metrics["clipped"]) == 0.0
    assert float(run.generator.network.weight.grad.abs()) > 0


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("kernel", ["cps", "ddim"])
def test_diffusion_models_train_with_the_kernels_that_hold_for_them(prediction: str, kernel: str) -> None:
    run, chosen = toy(prediction), method(kernel=kernel, step_weight="flash", log_prob="gaussian")
    chosen.check(run.process)
    ((rollout,),) = chosen.split(run, chosen.collect(run, [prompts(run, "1", "-2")]))
    metrics = chosen.learn(run, rollout, lambda loss: loss.backward())
    assert float(metrics["log_ratio_max"]) == 0.0 and math.isfinite(float(run.generator.network.weight.grad))


def test_a_ratio_that_is_not_one_stops_with_the_causes() -> None:
    run, chosen = toy(), method()
    ((rollout,),) = chosen.split(run, chosen.collect(run, [prompts(run, "1", "-2")]))
    with torch.no_grad():
        run.generator.network.weight.mul_(1.001)
    message = r"off by .* \(allowed 1e-05\).*dropout.*batches of another size.*attention.*quantised.*padding"
    with pytest.raises(RatioError, match=message) as caught:
        chosen.learn(run, rollout, lambda loss: loss.backward())
    assert "\n" not in str(caught.value)


def test_in_half_precision_a_small_difference_is_noted_once(capsys: pytest.CaptureFixture[str]) -> None:
    run, chosen = toy(), method(mini_batches=1)
    (first,) = chosen.collect(run, [prompts(run, "1", "-2")])
    run.autocast = lambda: torch.autocast("cpu", torch.bfloat16)
    old = first.old_log_probs[0]
    for _ in range(2):
        chosen._check_ratio(run, old + 3e-5, old)
    assert capsys.readouterr().err.count("the importance ratio is off by 3e-05, which half precision explains") == 1
    with pytest.raises(RatioError, match="off by 0.002"):
        chosen._check_ratio(run, old + 2e-3, old)


# The objective, written out


def by_hand(run: Run, c: FlowGRPOConfig, batch: Rollout, weight: Tensor) -> Tensor:
    """The whole objective as a function of the toy's weight, from the formulas of the papers."""
    sizes = (-1, 1, 1, 1)
    names = batch.samples.cond.prompt_embeds.flatten()
    terms, held = [], []
    every = torch.cat([run.process.schedule(c.sampling_steps).levels / 1000, torch.zeros(1)]).double()
    pool = [coefficients(c, every, index) for index in c.window.candidates(c.sampling_steps)]
    mean_flash = sum(1 / sensitivity(*one) for one in pool) / len(pool)
    for index, level in enumerate(batch.trajectory.timesteps.tolist()):
        place = int((every * 1000 - level).abs().argmin())
        sigma, dt, std, s = coefficients(c, every, place)
        x, after, old = batch.trajectory.states[index], batch.trajectory.states[index + 1], batch.old_means[index]

        def mean_of(
            scale: Any, x: Tensor = x, sigma: float = sigma, dt: float = dt, std: float = std, s: Any = s
        ) -> Any:
            surprise = (x - (1 - sigma) * (scale * names).view(sizes)) / ((1 - sigma) ** 2 * 0.25 + sigma**2)
            clean, noise = (scale * names).view(sizes) + (1 - sigma) * 0.25 * surprise, sigma * surprise
            if c.kernel == "cps":
                return (1 - sigma + dt) * clean + math.sqrt((sigma - dt) ** 2 - std**2) * noise, noise - clean
            return x - (noise - clean + s**2 / (2 * sigma) * noise) * dt, noise - clean

        (mean, v), (theirs, v_reference) = mean_of(weight), mean_of(1.0)
        over = lambda one: one.flatten(1).mean(1)  # noqa: E731
        kl_old = over((mean - old) ** 2) / (2 * std**2)
        gaussian = over((after - old) ** 2 - (after - mean) ** 2) / (2 * std**2)
        log_ratio = {
            "gaussian": gaussian,
            "cps": 2 * std**2 * gaussian,
            "guard": (gaussian + kl_old) * std,
        }[c.log_prob_kind()]
        ratio, a = log_ratio.exp(), batch.advantages
        if c.ratio == "dppo":
            keep = ~((kl_old >= c.clip) & ((ratio - 1) * a > 0))
            loss = -a * ratio * keep
        else:
            loss = torch.maximum(-a * ratio, -a * ratio.clamp(1 - c.clip, 1 + c.clip))
        flash = 1 / sensitivity(sigma, dt, std, s) / mean_flash
        terms.append({"none": 1.0, "guard": 1 / dt, "temp": 2.25 * std, "flash": flash}[c.step_weight] * loss)
        divided = {"exact": 2 * std**2, "code": 2 * s**2, "x": 1.0, "v": 1.0}[c.kl.form]
        far = (v - v_reference) ** 2 if c.kl.form == "v" else (mean - theirs) ** 2
        held.append(far.mean() / divided)
    return torch.stack(terms).mean() + c.kl.weight * torch.stack(held).mean()


def coefficients(c: FlowGRPOConfig, levels: Tensor, index: int) -> tuple[float, float, float, float]:
    """sigma, |dt|, std and s of a step; for CPS s is the std, as in Flow-GRPO's code."""
    sigma, after = levels[index].item(), levels[index + 1].item()
    dt = sigma - after
    if c.kernel == "cps":
        std = after * math.sin(c.amount() * math.pi / 2)
        return sigma, dt, std, std
    top = levels[1].item() if sigma == 1 else sigma
    s = c.amount() * (math.sqrt(sigma / (1 - top)) if c.kernel == "flow_sde" else 1.0)
    return sigma, dt, s * math.sqrt(dt), s


def sensitivity(sigma: float, dt: float, std: float, s: float) -> float:
    """Flash-GRPO's denominator; not for CPS, where the test does not use it."""
    return math.sqrt(dt) / s + s * math.sqrt(dt) * (1 - sigma) / (2 * sigma)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel": "cps"},
        {"kernel": "cps", "log_prob": "gaussian", "kl": {"weight": 0.3, "form": "code"}},
        {"kernel": "flow_sde", "kl": {"weight": 0.3, "form": "exact"}},
        {"kernel": "flow_sde", "kl": {"weight": 0.3, "form": "code"}, "step_weight": "temp"},
        {"kernel": "dance", "kl": {"weight": 0.3, "form": "x"}, "step_weight": "flash"},
        {"kernel": "dance", "kl": {"weight": 0.3, "form": "v"}, "log_prob": "cps"},
        {"kernel": "flow_sde", "ratio": "guard", "step_weight": "guard"},
        {"kernel": "cps", "ratio": "guard"},
        {"kernel": "flow_sde", "ratio": "dppo", "clip": 1e-5},
        {"kernel": "flow_sde", "window": {"size": 0}},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_the_gradient_is_that_of_the_objective_written_out(options: dict[str, Any]) -> None:
    run, chosen = toy(), method(**options)
    ((rollout,),) = chosen.split(run, chosen.collect(run, [prompts(run, "1", "-2")]))
    move(run)
    metrics = chosen.learn(run, rollout, lambda loss: loss.backward())
    found = run.generator.network.weight.grad.item()

    weight = torch.tensor(1.05, dtype=torch.float64, requires_grad=True)
    objective = by_hand(run, chosen.config, rollout, weight)
    (expected,) = torch.autograd.grad(objective, weight)
    assert found == pytest.approx(expected.item(), rel=1e-6)
    objective = objective.detach()
    ends = [by_hand(run, chosen.config, rollout, weight.detach() + step).item() for step in (1e-6, -1e-6)]
    assert found == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5)
    held = objective - by_hand(
        run, chosen.config.model_copy(update={"kl": FlowGRPOConfig().kl}), rollout, weight.detach()
    )
    assert metrics["loss"].item() == pytest.approx(float(objective - held), rel=1e-6, abs=1e-9)


def test_both_clips_have_work_in_the_test_above() -> None:
    for options in ({"kernel": "flow_sde"}, {"kernel": "flow_sde", "ratio": "dppo", "clip": 1e-5}):
        run, chosen = toy(), method(**options)
        ((rollout,),) = chosen.split(run, chosen.collect(run, [prompts(run, "1", "-2")]))
        move(run)
        assert 0 < float(chosen.learn(run, rollout, lambda loss: None)["clipped"]) < 1


def test_the_kl_is_logged_as_it_is_and_as_the_code_has_it() -> None:
    """With Flow-SDE the code's is the duration times the exact one; with CPS it is the same."""
    for kernel in ("flow_sde", "cps"):
        run = toy()
        move(run)
        run.step = 0
        chosen = method(kernel=kernel, kl={"weight": 0.1}, window={"size": 1, "range": [2, 3]})
        ((rollout,),) = chosen.split(run, chosen.collect(run, [prompts(run, "1", "-2")]))
        metrics = chosen.learn(run, rollout, lambda loss: loss.backward())
        levels = run.process.schedule(6).levels / 1000
        factor = float(levels[2] - levels[3]) if kernel == "flow_sde" else 1.0
        assert float(metrics["kl"]) > 0
        assert float(metrics["kl_code"]) == pytest.approx(factor * float(metrics["kl"]), rel=1e-5)


@pytest.mark.parametrize(
    "options", [{"kernel": "cps"}, {"kernel": "flow_sde"}, {"kernel": "flow_sde", "ratio": "guard"}]
)
def test_it_climbs_the_reward(options: dict[str, Any]) -> None:
    """The prompt's mean is positive and the reward grows with the image: a larger weight is better.

    Over 20 rounds of 64 images the gradient points that way by three standard errors.
    """
    gradients = []
    for seed in range(20):
        run, chosen = toy(), method(**options, images_per_prompt=64, advantage_std="group", window={"size": 0})
        run.seed = seed
        ((rollout,),) = chosen.split(run, chosen.collect(run, [prompts(run, "1")]))
        chosen.learn(run, rollout, lambda loss: loss.backward())
        gradients.append(run.generator.network.weight.grad.item())
    found = torch.tensor(gradients)
    assert float(found.mean()) < -3 * float(found.std()) / math.sqrt(len(found))


# Groups without a spread


def test_groups_of_equal_rewards_are_dropped_and_the_mean_is_over_the_others() -> None:
    run, chosen = toy(), method()
    full = chosen.collect(run, [prompts(run, "1", "0"), prompts(run, "0", "-2")])
    step = chosen.split(run, full)[0]
    assert [one.samples.prompts for one in step] == [["1"] * 4, ["-2"] * 4] and [one.share for one in step] == [1, 1]
    lone = chosen.collect(run, [prompts(run, "1", "2"), prompts(run, "0", "0")])
    ((kept,),) = chosen.split(run, lone)
    assert len(kept.rewards) == 8 and kept.share == 2.0  # the loop halves it: the mean over the samples that are left
    uneven = chosen.collect(run, [prompts(run, "1", "2"), prompts(run, "0", "3")])
    assert [one.share for one in chosen.split(run, uneven)[0]] == pytest.approx([8 / 6, 4 / 6])
    metrics = chosen.learn(run, kept, lambda loss: loss.backward())
    rewards = torch.cat([one.rewards for one in uneven])
    assert float(metrics["flat"]) == 0.25 and float(metrics["reward"]) == pytest.approx(rewards.mean().item())
    assert float(metrics["reward/curved"]) == pytest.approx(rewards.mean().item())


def test_the_weights_of_dropped_rounds_are_those_of_a_round_without_them() -> None:
    run, chosen = toy(), method(advantage_std="group")
    gradients = []
    for texts in (("1", "2", "0", "-2"), ("1", "2", "-2")):
        batches = [prompts(run, *texts[:2]), prompts(run, *texts[2:])]
        run.generator.network.weight.grad = None
        for one in chosen.split(run, chosen.collect(run, batches))[0]:
            chosen.learn(run, one, lambda loss: (loss / 2).backward())
        gradients.append(run.generator.network.weight.grad.item())
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-9)


def test_a_round_without_any_spread_still_makes_its_steps() -> None:
    run, chosen = toy(), method(mini_batches=3)
    steps = chosen.split(run, chosen.collect(run, [prompts(run, "0", "0")]))
    assert [sum(len(one.rewards) for one in step) for step in steps] == [1, 1, 1]
    chosen.learn(run, steps[0][0], lambda loss: loss.backward())
    assert run.generator.network.weight.grad.item() == 0.0
    collected = method().collect(run, [prompts(run, "1", "0")])
    assert [len(one.rewards) for one in without_zeros(collected, 6)] == [6]


@pytest.mark.parametrize("taught", [[[1, 0, 2], [3]], [[0, 0], [1]], [[0, 0], [0]]])
def test_the_processes_of_a_step_add_up_to_the_mean_of_what_teaches(
    monkeypatch: pytest.MonkeyPatch, taught: list[list[int]]
) -> None:
    """Micro-batches of each process, with so many samples that teach; one without any keeps a sample of advantage 0.

    The loop takes the mean over micro-batches, here 4, then that over processes. A loss of 1 for each that teaches
    comes to 1; where none does, so does the term of the reference, which the samples kept still have.
    """
    worlds = [[_held(count or 1, count) for count in counts] for counts in taught]
    counts = [[(sum(own), sum(max(one, 1) for one in own))] for own in taught]
    monkeypatch.setattr("mmalign.methods.advantages.gather", lambda mine: counts)
    steps = [weigh_samples_alike([held], 4)[0] for held in worlds]
    some = any(map(any, taught))
    loss = sum(one.share / 4 * float(one.advantages.mean() if some else 1) for step in steps for one in step)
    assert loss / len(taught) == pytest.approx(1.0)


def _held(size: int, taught: int) -> Any:
    advantages = torch.tensor([1.0] * taught + [0.0] * (size - taught))
    return SimpleNamespace(rewards=torch.zeros(size), advantages=advantages, share=1.0)


def test_mini_batches_hold_every_kept_sample_once() -> None:
    run, chosen = toy(), method(mini_batches=4)
    steps = chosen.split(run, chosen.collect(run, [prompts(run, "1", "0"), prompts(run, "0", "-2")]))
    ids = [name for step in steps for one in step for name in one.samples.ids]
    assert len(ids) == len(set(ids)) == 8 and len(steps) == 4
    assert all(sum(one.share for one in step) == pytest.approx(2.0) for step in steps)


def test_few_groups_are_warned_of_once(capsys: pytest.CaptureFixture[str]) -> None:
    run, chosen = toy(), method()
    for _ in range(2):
        chosen.collect(run, [prompts(run, "1", "2")])
    assert capsys.readouterr().err.count("warning: a round of 2 prompts; with fewer than 16") == 1
    chosen = method()
    chosen.collect(run, [prompts(run, *(str(number / 7) for number in range(1, 17)))])
    assert "warning" not in capsys.readouterr().err


# What cannot work


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "ode"}, "Input should be 'cps', 'flow_sde', 'dance', 'wan_sde' or 'ddim'"),
        ({"images_per_prompt": 1}, "greater than or equal to 2"),
        ({"sampling_steps": 1}, "greater than or equal to 2"),
        ({"window": {"size": 3, "range": [4, 6]}}, r"range \[4, 6\] must .* hold 3 steps"),
        ({"window": {"size": 0, "range": [0, 3]}}, "range is for windows of a size above 0"),
        ({"window": {"size": 3, "range": [3, 6]}}, "steps 3 to 6 of 6 sampling_steps; .* end at 5 or before"),
        ({"window": {"size": 6}}, "end at 5 or before"),
        ({"ratio": "guard", "log_prob": "cps"}, "guard has a log-ratio of its own"),
        ({"step_weight": "guard"}, "step_weight: guard is for ratio: guard"),
        ({"step_weight": "temp"}, "temp is for Gaussian log-probabilities, and these are cps"),
        ({"noise": 2.0}, r"noise 2 of kernel cps: eta must lie in 0\.\.1"),
        ({"window": {"stride": 2}}, "stride and every are for order: progressive"),
        ({"window": {"width": 2}}, "Extra inputs are not permitted"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        method(**options)


def test_what_does_not_hold_for_the_model_is_refused() -> None:
    for kernel in ("flow_sde", "dance", "wan_sde"):
        with pytest.raises(PipelineError, match=f"kernel '{kernel}' is for flow matching, .* 'ddim' or 'cps'"):
            method(kernel=kernel).check(toy("epsilon").process)
    with pytest.raises(UserError, match="grid and method.shift are for flow models"):
        method(grid="even").check(toy("epsilon").process)


# Real models


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_real_model_computes_the_ratio_to_the_bit(tmp_path: Path, guidance: float) -> None:
    run = exact_run(build_tiny_sd(tmp_path / "sd", vae="tiny"), rewards=[WeightedReward("brightness", 1.0, Mean())])
    chosen = method(sampling_steps=4, guidance=guidance)
    ((rollout,),) = chosen.split(run, chosen.collect(run, [prompts(run, "a red circle", "a star")]))
    metrics = chosen.learn(run, rollout, lambda loss: loss.backward())
    assert float(metrics["log_ratio_max"]) == 0.0 and "window" in metrics
    assert any(float(one.grad.abs().max()) > 0 for one in run.generator.trainable_parameters())


def test_the_prediction_without_the_prompt_can_be_kept_out_of_the_gradient(tmp_path: Path) -> None:
    model, gradients = build_tiny_sd(tmp_path / "sd", vae="tiny"), []
    for choice in ("flows", "detached"):
        run = exact_run(model, rewards=[WeightedReward("brightness", 1.0, Mean())])
        chosen = method(sampling_steps=4, guidance=3.0, uncond_grad=choice, window={"size": 1})
        ((rollout,),) = chosen.split(run, chosen.collect(run, [prompts(run, "a red circle")]))
        assert float(chosen.learn(run, rollout, lambda loss: loss.backward())["log_ratio_max"]) == 0.0
        gradients.append(torch.cat([one.grad.flatten() for one in run.generator.trainable_parameters()]))
    assert float(gradients[0].norm()) > 0 and float((gradients[0] - gradients[1]).norm() / gradients[0].norm()) > 1e-3


class Mean(Reward):
    """The mean of all pixels."""

    name = "brightness"

    def score(self, media: Any, prompts: Any, references: Any) -> Any:
        return media.mean((1, 2, 3))


def test_flux_is_drawn_on_dance_grpos_levels(tmp_path: Path) -> None:
    """FLUX.1 shifts by size; a shift of 3 on the even grid is what DanceGRPO's code has."""
    generator = load_generator(build_tiny_flux(tmp_path / "flux"), device="cpu")
    config = FlowGRPOConfig(sampling_steps=10, grid="even", shift=3.0, kernel="dance")
    levels = config.schedule(generator.process).levels / 1000
    assert levels.tolist() == pytest.approx(EVEN_GRID, abs=5e-5)


def test_a_stopped_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    model = build_tiny_sd(tmp_path / "sd", vae="tiny")
    options = {"name": "flow_grpo", "sampling_steps": 6, "images_per_prompt": 2, "window": {"size": 1}}

    def config(folder: str, steps: int) -> Any:
        return online_config(model, tmp_path / folder, options, steps=steps)

    train(config("whole", 6))
    train(config("halves", 2))
    train(config("halves", 6))
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")
    assert len(set(losses(tmp_path / "whole").values())) > 1
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    logged = {key for line in lines for key in line}
    assert {"reward", "reward_std", "flat", "window", "kl", "kl_code", "clipped", "log_ratio_max"} <= logged
