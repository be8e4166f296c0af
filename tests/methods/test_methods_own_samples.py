"""Dense-reward DPO, SPO and Diffusion-DRO on tiny real models: what is drawn, what is computed, and the engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from tiny_models import build_tiny_sd
from tiny_runs import Brightness, InMemoryPairs, exact_run, losses, online_config, run_config, write_pairs
from torch import Tensor

from mmalign.core.errors import TrainingDiverged, UserError
from mmalign.data.batches import LabelBatch, PromptBatch
from mmalign.losses import step_preference
from mmalign.methods import methods
from mmalign.methods import spo as spo_method
from mmalign.methods.base import Method
from mmalign.methods.dense_dpo import spaced
from mmalign.methods.run import Run
from mmalign.scoring.choice import WeightedReward
from mmalign.training.train import train
from pipelines import NoiseProcess, PipelineError, Truncation, ddim, sample
from pipelines.branching import Branching, sample_branching


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_sd(tmp_path_factory.mktemp("own") / "sd", vae="tiny")


class Smooth(Brightness):
    """A differentiable reward that is not linear in the image."""

    def score(self, media: Any, prompts: Any, references: Any) -> Any:
        return media.double().square().mean((1, 2, 3))


def make_run(model: str, scale: float = 0.05) -> Run:
    return exact_run(model, scale, rewards=[WeightedReward("brightness", 1.0, Brightness())])


def make_method(name: str, **options: Any) -> Method[Any]:
    chosen = methods.get(name)
    method: Method[Any] = chosen(chosen.Config(**options))
    return method


def prompts(run: Run, *texts: str) -> PromptBatch:
    return PromptBatch(list(texts), run.generator.encode_prompts(texts), [f"{text}#0" for text in texts])


def experts(count: int = 2) -> LabelBatch:
    batch = InMemoryPairs(count).batch(range(count), 1, 0)
    return LabelBatch(batch.chosen.double(), torch.ones(count, dtype=torch.bool), batch.cond, batch.ids, batch.epoch)


DENSE: dict[str, Any] = {
    "sampling_steps": 4,
    "guidance": 1.0,
    "images_per_prompt": 3,
    "steps_per_image": 2,
    "updates_per_round": 2,
}
SPO: dict[str, Any] = {"sampling_steps": 3, "guidance": 1.0, "candidates": 3, "threshold": (0.0, 0.0), "clip": 0.9}
DRO: dict[str, Any] = {"sampling_steps": 3, "updates_per_round": 2}


def drawn(run: Run, name: str) -> tuple[Method[Any], list[Any]]:
    """Return a method and what it has collected; the policy has moved on since, and one update is done."""
    options = {
        "dense_dpo": {**DENSE, "fidelity": "paper"},
        "spo": SPO,
        "spo in segments": {**SPO, "segment": 1},
        "diffusion_dro": {**DRO, "margin": 1.0},
    }
    method = make_method(name.split()[0], **options[name])
    batch = experts() if name == "diffusion_dro" else prompts(run, "a red circle", "a star")
    collected = list(method.collect(run, [batch]))
    with torch.no_grad():
        for parameter in run.generator.trainable_parameters():
            parameter.mul_(1.1)
    run.step = 1
    return method, collected


@pytest.mark.parametrize("name", ["dense_dpo", "spo", "spo in segments", "diffusion_dro"])
def test_gradient_equals_finite_differences(model: str, name: str) -> None:
    run = make_run(model)
    method, collected = drawn(run, name)
    parameters = list(run.generator.trainable_parameters())
    for batch in collected:
        method.learn(run, batch, lambda loss: loss.backward())
    source = torch.Generator().manual_seed(2)
    direction = [torch.randn(p.shape, generator=source, dtype=p.dtype) for p in parameters]
    analytic = sum(float((p.grad * along).sum()) for p, along in zip(parameters, direction, strict=True))

    def value() -> float:
        total = 0.0
        for batch in collected:
            if name == "dense_dpo":
                batch.log_probs = method.replay_all(run, batch)[1]
            total += method.loss(run, batch).loss.item()
        return total

    def moved(step: float) -> float:
        with torch.no_grad():
            for parameter, along in zip(parameters, direction, strict=True):
                parameter.add_(along, alpha=step)
            found = value()
            for parameter, along in zip(parameters, direction, strict=True):
                parameter.sub_(along, alpha=step)
        return found

    assert analytic != 0.0
    assert analytic == pytest.approx((moved(1e-5) - moved(-1e-5)) / 2e-5, rel=1e-5)


# Dense-reward DPO


def test_dense_dpo_starts_at_log_two_and_asks_for_the_drawn_steps_alone(model: str) -> None:
    run = make_run(model, 0.0)
    run.cost.watch(run.generator.network)
    method = make_method("dense_dpo", **{**DENSE, "steps_per_image": 1})
    (rollout,) = method.collect(run, [prompts(run, "a red circle", "a star")])
    metrics = method.learn(run, rollout, lambda loss: loss.backward())
    assert metrics["loss"].item() == pytest.approx(math.log(2), abs=1e-9)
    run.step = 1
    run.cost.start()
    method.learn(run, rollout, lambda loss: loss.backward())
    assert run.cost.images_seen == 2 * 2 * 4  # 2 prompts x 2 images x (reference, policy, forward, backward)


def test_dense_dpo_keeps_images_evenly_spaced_in_the_ranking() -> None:
    rewards = torch.tensor([0.3, 0.9, -1.0, 0.5, 0.4])  # ranking: 2, 0, 4, 3, 1
    assert spaced(rewards, 3).tolist() == [2, 4, 1] and spaced(rewards, 2).tolist() == [2, 1]
    assert spaced(rewards, 5).tolist() == [0, 1, 2, 3, 4]
    twelve = torch.arange(12.0).flip(0)
    assert spaced(twelve, 5).tolist() == [11, 8, 5, 3, 0]  # places 0, 2.75, 5.5, 8.25, 11 of the ranking
    with pytest.raises(ValueError, match="compared 3 of kept 2 of images_per_prompt 4"):
        make_method("dense_dpo", images_per_prompt=4, kept=2, compared=3)


def test_dense_dpo_compares_images_of_a_prompt_at_the_same_steps_drawn_by_the_law(model: str) -> None:
    run, gamma = make_run(model), 0.6
    method: Any = make_method("dense_dpo", **{**DENSE, "gamma": gamma, "random_steps": (0.0, 0.75)})
    (rollout,) = method.collect(run, [prompts(run, "a red circle", "a star")])
    seen, draws = torch.zeros(3), 150
    for run.step in range(draws):
        images, counts = method._drawn(run, rollout)
        assert images.shape == (2, 2) and ((images // 3) == torch.tensor([[0], [1]])).all()
        assert (images[:, 0] != images[:, 1]).all() and not counts[3].any()  # the last step is not random
        for of_prompt, first in zip(images, (0, 3), strict=True):
            assert torch.equal(counts[:, of_prompt[0]], counts[:, of_prompt[1]]) and counts[:, of_prompt[0]].sum() == 2
            left_out = ({first, first + 1, first + 2} - set(of_prompt.tolist())).pop()
            assert not counts[:, left_out].any()
        seen += counts[:3, images[:, 0]].sum(1)
    total = draws * 2 * 2
    expected = torch.tensor([1.0, gamma, gamma**2]) / (1 + gamma + gamma**2) * total
    assert float(seen.sum()) == total
    assert float(((seen - expected).square() / expected).sum()) < 13.8  # chi squared, 2 degrees: p = 0.001


def test_discount_of_one_is_diffusion_dpo_to_the_bit_and_less_prefers_noise(model: str) -> None:
    run, one = make_run(model), InMemoryPairs(3).batch(range(3), 1, 0)
    batch = replace(one, chosen=one.chosen.double(), rejected=one.rejected.double())
    plain = make_method("diffusion_dpo", beta=5.0).loss(run, batch).loss
    assert torch.equal(make_method("diffusion_dpo", beta=5.0, discount=1.0).loss(run, batch).loss, plain)
    assert not torch.equal(make_method("diffusion_dpo", beta=5.0, discount=0.5).loss(run, batch).loss, plain)
    # 0.9 for each of 50 steps over 1000 levels; five equal bands of levels, the noisiest first
    source, total = torch.Generator().manual_seed(0), 5000
    t = run.process.sample_timesteps(total, generator=source, discount=0.9 ** (50 / 1000))
    seen = torch.stack([((999 - t) // 200 == band).sum() for band in range(5)]).double()
    bands = 0.9 ** (10 * torch.arange(5, dtype=torch.float64))
    expected = bands / bands.sum() * total
    assert float(((seen - expected).square() / expected).sum()) < 18.5  # chi squared, 4 degrees: p = 0.001
    assert set(run.process.sample_timesteps(50, generator=source, low=100, high=700, discount=1e-9).tolist()) == {699}


# SPO


def branches(
    run: Run, etas: Sequence[float], candidates: int, guidance: float = 1.0
) -> tuple[Tensor, list[Branching]]:
    seen: list[Branching] = []
    batch = prompts(run, "a red circle", "a star")
    latents = sample_branching(
        run.generator, batch.cond, kernel=ddim(etas), steps=len(etas), candidates=candidates, seeds=[7, 8],
        visit=seen.extend, guidance=guidance,
    )  # fmt: skip
    return latents, seen


def test_one_candidate_is_the_ordinary_sampler(model: str) -> None:
    run, etas = make_run(model), [1.0, 0.5, 0.0, 1.0]
    latents, seen = branches(run, etas, 1, guidance=2.0)
    batch = prompts(run, "a red circle", "a star")
    plain = sample(run.generator, batch.cond, steps=4, guidance=2.0, eta=etas, seeds=[7, 8], record=True)
    torch.testing.assert_close(latents, plain.latents, rtol=0, atol=0)
    stds = ddim(etas).stds(run.process, 4)
    torch.testing.assert_close(torch.tensor(stds, dtype=torch.float64), plain.stds[:, 0].double(), rtol=1e-6, atol=0)
    random_steps = [index for index, std in enumerate(stds) if std > 0]
    assert random_steps[:2] == [0, 1] and 2 not in random_steps
    for index, step in zip(random_steps, seen, strict=True):
        torch.testing.assert_close(step.state, plain.states[index], rtol=0, atol=0)
        assert (step.t, step.kernel) == (plain.timesteps[index].item(), ddim(etas[index]))


def test_candidates_are_draws_of_the_steps_gaussian_and_the_chain_goes_on_from_one_of_them(model: str) -> None:
    run = make_run(model)
    latents, seen = branches(run, [1.0, 1.0, 0.0], 8)
    first, second = seen[:2]
    batch = prompts(run, "a red circle", "a star")
    output = run.generator.predict(first.state, torch.full((2,), first.t), batch.cond)
    mean, std = first.kernel(run.process, first.state, output, first.t, first.t_next)
    z = ((first.candidates - mean) / std).detach()
    assert float(std.detach()) == pytest.approx(first.std, rel=1e-12)
    assert abs(float(z.mean())) < 4 / math.sqrt(z.numel()) and abs(float(z.var()) - 1) < 4 * math.sqrt(2 / z.numel())
    # Kolmogorov-Smirnov against the normal law, p = 0.001
    ordered = z.flatten().sort().values
    law = torch.special.ndtr(ordered)
    steps = torch.arange(len(ordered) + 1) / len(ordered)
    assert float(torch.maximum(steps[1:] - law, law - steps[:-1]).max()) < 1.95 / math.sqrt(len(ordered))
    assert torch.equal(second.state, first.candidates[0])
    t_next = torch.full((2,), second.t)
    third = first.candidates[2]
    clean = run.process.to_x0(third, run.generator.predict(third, t_next, batch.cond), second.t)
    torch.testing.assert_close(first.clean[2], clean, rtol=1e-9, atol=1e-9)


def test_spo_prefers_the_candidate_whose_clean_image_scores_best(model: str) -> None:
    run = make_run(model, 0.0)
    method = make_method("spo", **SPO, images_per_prompt=2)
    collected = list(method.collect(run, [prompts(run, "a red circle", "a star")]))
    _, seen = branches(run, method.kernel().amount, 3)
    assert len(collected) == len(seen) and {len(batch.step.candidates) for batch in collected} == {2}
    for batch in collected:
        best, worst = (run.generator.decode(clean).mean((1, 2, 3)) for clean in batch.step.clean)
        assert (best > worst).all() and batch.valid.all()
    found = [method.loss(run, batch) for batch in collected]
    assert sum(output.loss.item() for output in found) == pytest.approx(math.log(2), rel=1e-12)
    assert all(output.metrics["accuracy"] == 0.5 and output.metrics["kl"] == 0 for output in found)
    strict = make_method("spo", **{**SPO, "threshold": (0.99, 0.99)})
    assert sum(strict.loss(run, b).loss.item() for b in strict.collect(run, [prompts(run, "a star")])) == 0.0


def chains(run: Run, etas: Sequence[float], segment: int, steps: Sequence[int] | None = None) -> list[list[Branching]]:
    seen: list[list[Branching]] = []
    batch = prompts(run, "a red circle", "a star")
    sample_branching(
        run.generator, batch.cond, kernel=ddim(etas), steps=len(etas), candidates=3, seeds=[7, 8],
        visit=seen.append, branch_steps=steps, segment=segment, guidance=1.0,
    )  # fmt: skip
    return seen


def test_candidates_of_a_segment_take_their_further_steps_apart(model: str) -> None:
    """Each chain by hand: its own state, the step's formula, and the draws of its own noise stream."""
    run, etas = make_run(model), [1.0] * 5
    batch = prompts(run, "a red circle", "a star")
    found = chains(run, etas, 1, range(1, 5))
    assert [[step.t for step in segment] for segment in found] == [[601, 401], [201, 1]]
    streams = [torch.Generator().manual_seed(seed) for seed in (7, 8)]

    def draw() -> Tensor:
        return torch.stack([torch.randn(run.generator.latent_shape, generator=one) for one in streams]).double()

    def step(x: Tensor, index: int) -> tuple[Tensor, Tensor]:
        t, t_next = (int(levels[index]) for levels in run.process.schedule(5))
        output = run.generator.predict(x, torch.full((2,), t), batch.cond)
        return ddim(1.0)(run.process, x, output, t, t_next)

    x = draw()
    mean, std = step(x, 0)
    x = mean + std * draw()
    for number, segment in enumerate(found):
        first, second = 1 + 2 * number, 2 + 2 * number
        torch.testing.assert_close(segment[0].states, x.unsqueeze(0), rtol=1e-9, atol=1e-9)
        mean, std = step(x, first)
        branched = torch.stack([mean + std * draw() for _ in range(3)])
        torch.testing.assert_close(segment[0].candidates, branched, rtol=1e-9, atol=1e-9)
        assert torch.equal(segment[1].states, segment[0].candidates) and segment[0].clean is None
        after = torch.stack([mean + std * draw() for mean, std in (step(one, second) for one in branched)])
        torch.testing.assert_close(segment[1].candidates, after, rtol=1e-9, atol=1e-9)
        x = after[0]
        clean = after
        if second + 1 < 5:
            t = int(run.process.schedule(5).levels[second + 1])
            outputs = [run.generator.predict(one, torch.full((2,), t), batch.cond) for one in after]
            clean = torch.stack([run.process.to_x0(one, out, t) for one, out in zip(after, outputs, strict=True)])
        torch.testing.assert_close(segment[1].clean, clean, rtol=1e-8, atol=1e-8)


def test_segments_end_with_the_steps_that_branch(model: str) -> None:
    run = make_run(model)
    assert [len(one) for one in chains(run, [1.0] * 5, 0)] == [1] * 5
    assert [len(one) for one in chains(run, [1.0] * 5, 3, range(1, 5))] == [4]
    assert [[step.t for step in one] for one in chains(run, [0.0, 1.0, 1.0, 1.0, 0.0], 1)] == [[601, 401], [201]]
    with pytest.raises(PipelineError, match="segment 0, got 3 and -1"):
        chains(run, [1.0] * 5, -1)


def test_all_steps_of_a_segment_take_its_label_in_the_loss(model: str) -> None:
    """Against separate forward passes from each state of the better and of the worse chain."""
    run = make_run(model)
    method = make_method("spo", **{**SPO, "sampling_steps": 5, "segment": 2, "learned_steps": (0.4, 1.0)})
    batch = prompts(run, "a red circle", "a star")
    collected = list(method.collect(run, [batch]))
    assert [pairs.step.t for pairs in collected] == [401, 201, 1] and {pairs.share for pairs in collected} == {1 / 3}
    first, second, third = collected
    assert first.step.states.shape[0] == 1 and second.step.states.shape[0] == 2
    # One best and one worst chain: each step starts from where the step before has led it.
    assert torch.equal(second.step.states, first.step.candidates)
    assert torch.equal(third.step.states, second.step.candidates)
    better, worse = (run.generator.decode(end).mean((1, 2, 3)) for end in third.step.candidates)
    assert (better > worse).all() and all(torch.equal(pairs.valid, third.valid) for pairs in collected)
    with torch.no_grad():
        for parameter in run.generator.trainable_parameters():
            parameter.mul_(1.1)
    for pairs in collected:
        log_ratios = []
        for side in (0, 1):
            state = pairs.step.states[min(side, len(pairs.step.states) - 1)]
            t = torch.full((2,), pairs.step.t)
            squares = []
            for predict in (run.predict, run.reference.predict):
                mean, std = pairs.step.kernel(
                    run.process, state, predict(state, t, batch.cond), pairs.step.t, pairs.step.t_next
                )
                squares.append(
                    (pairs.step.candidates[side] - mean).square().mean((1, 2, 3)) / (2 * std.flatten() ** 2)
                )
            log_ratios.append(squares[1] - squares[0])
        z = 10 * (log_ratios[0].exp().clamp(0.1, 1.9).log() - log_ratios[1].exp().clamp(0.1, 1.9).log())
        expected = torch.log1p((-z).exp()).mean() / 3
        assert method.loss(run, pairs).loss.item() == pytest.approx(expected.item(), rel=1e-8)


def test_steps_that_are_not_learned_from_stay_random(model: str) -> None:
    """SPO's code draws its first steps with eta 1 and compares nothing there."""
    run = make_run(model)
    method = make_method("spo", **{**SPO, "sampling_steps": 4, "learned_steps": (0.5, 1.0)})
    batch = prompts(run, "a red circle", "a star")
    collected = list(method.collect(run, [batch]))
    seeds = run.seeds([f"{name}/0" for name in batch.ids], 0)
    path = sample(run.generator, batch.cond, steps=4, guidance=1.0, eta=1.0, seeds=seeds, record=True)
    assert [pairs.step.t for pairs in collected] == path.timesteps[2:].tolist()
    torch.testing.assert_close(collected[0].step.state, path.states[2], rtol=1e-9, atol=1e-9)
    with pytest.raises(
        UserError, match=r"method.learned_steps \[0.5, 0.5\] holds none of the 4 steps that have noise"
    ):
        make_method("spo", sampling_steps=4, learned_steps=(0.5, 0.5)).check(run.process)


def test_a_truncation_is_drawn_by_the_samples_id_whatever_the_batches(model: str) -> None:
    run = exact_run(model, rewards=[WeightedReward("brightness", 1.0, Smooth())])
    method = make_method("align_prop", sampling_steps=4, guidance=2.0, eta=0.0)
    texts = ["a red circle", "a star", "two blue squares", "red"]
    parameters = list(run.generator.trainable_parameters())
    outputs = {size: [] for size in (4, 1)}
    for size, found in outputs.items():
        for start in range(0, 4, size):
            found.append(method.loss(run, prompts(run, *texts[start : start + size])))
    found, apart = (
        torch.autograd.grad(sum(one.loss for one in each) / len(each), parameters) for each in outputs.values()
    )
    for ours, theirs in zip(found, apart, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)
    trained = [one.metrics["trained_steps"] for one in outputs[1]]
    assert outputs[4][0].metrics["trained_steps"] == sum(trained) / 4 and len(set(trained)) > 1


def test_trained_steps_of_an_update_spread_as_the_mean_of_its_images(model: str) -> None:
    """K uniform in 1..50 has deviation sqrt((50^2 - 1) / 12) = 14.4; the mean of 16 images 3.6, not 14.4."""
    run, truncation = make_run(model), Truncation("uniform")
    means = []
    for step in range(400):
        seeds = run.seeds([f"{step}/{image}" for image in range(16)], 0, "truncation")
        draws = [truncation.draw(50, torch.Generator().manual_seed(seed)) for seed in seeds]
        means.append(sum(map(len, draws)) / 16)
    spread = torch.tensor(means, dtype=torch.float64)
    assert spread.mean().item() == pytest.approx(25.5, abs=4 * 3.608 / 20)
    assert spread.std().item() == pytest.approx(math.sqrt(2499 / 12 / 16), rel=4 / math.sqrt(800))


def test_lpo_threshold_is_that_of_the_whole_table_of_levels(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Golden values of LPO's code, from its table of deviations of 20 DDIM steps: t = 951, 751, 1."""
    at: dict[int, float] = {}
    run = make_run(model)
    run.generator.process = NoiseProcess.from_scheduler(
        DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
            set_alpha_to_one=False, steps_offset=1,
        )
    )  # fmt: skip
    for part in ((0.0, 0.25), (0.0, 1.0), (0.9, 1.0)):
        method: Any = make_method(
            "spo", sampling_steps=20, guidance=1.0, candidates=2, threshold=(0.35, 0.5), learned_steps=part
        )
        steps: list[Branching] = []

        def scores(run: Run, samples: PromptBatch, step: Branching, seen: list[Branching] = steps) -> Tensor:
            seen.append(step)
            return torch.zeros(2, len(samples))

        monkeypatch.setattr(method, "step_scores", scores)
        limits: list[float] = []
        monkeypatch.setattr(spo_method, "step_preference", lambda s, limit, kept=limits: (
            kept.append(limit), step_preference(s, 0.0)
        )[1])  # fmt: skip
        method.collect(run, [prompts(run, "a star")])
        for step, limit in zip(steps, limits, strict=True):
            assert at.setdefault(int(step.t), limit) == limit
    assert at[951] == pytest.approx(0.5, abs=1e-6) and at[1] == pytest.approx(0.35, abs=1e-6)
    assert at[751] == pytest.approx(0.35 + 0.15 * (0.5576 - 0.0206) / (0.6444 - 0.0206), abs=5e-5)
    assert at[751] == pytest.approx(0.4791, abs=5e-5)


def test_a_line_of_thresholds_may_begin_below_zero() -> None:
    assert make_method("spo", threshold=(-0.5, 0.5)).config.threshold == (-0.5, 0.5)
    with pytest.raises(ValueError, match="must satisfy -1 < gap < 1"):
        make_method("spo", threshold=(-1.0, 0.5))


def test_spo_threshold_follows_the_noise_of_the_step(model: str) -> None:
    """Score gaps are the same at every step; only those of the quietest steps pass a threshold that rises."""
    run = make_run(model)
    method: Any = make_method("spo", sampling_steps=5, guidance=1.0, candidates=2, threshold=(0.2, 0.6))
    gap = 0.85  # a softmax gap of tanh(0.425) = 0.401: half way up
    method.step_scores = lambda run, samples, step: torch.tensor([[gap], [0.0]]).expand(2, len(samples))
    collected = method.collect(run, [prompts(run, "a star")])
    stds = [batch.step.std for batch in collected]
    low, high = min(stds), max(stds)
    allowed = [0.2 + 0.4 * (std - low) / (high - low) < math.tanh(gap / 2) for std in stds]
    assert [bool(batch.valid.all()) for batch in collected] == allowed and {True, False} == set(allowed)


def test_spo_breaks_off_where_the_policy_is_not_finite(model: str) -> None:
    run = make_run(model)
    with torch.no_grad():
        next(iter(run.generator.trainable_parameters())).fill_(float("nan"))
    with pytest.raises(TrainingDiverged, match="after step 0 the model samples what is not finite"):
        make_method("spo", **SPO).collect(run, [prompts(run, "a star")])


# Diffusion-DRO


def test_dro_costs_the_margin_at_the_start(model: str) -> None:
    run = make_run(model, 0.0)
    method = make_method("diffusion_dro", **DRO)
    (ranking,) = method.collect(run, [experts()])
    for run.step in (0, 1):
        assert method.loss(run, ranking).loss.item() == pytest.approx(1e-3, rel=1e-9)


def test_dro_is_its_formula_on_separate_forward_passes(model: str) -> None:
    run, batch = make_run(model), experts(3)
    method = make_method("diffusion_dro", **DRO, margin=0.5)
    (ranking,) = method.collect(run, [batch])
    trajectory = sample(
        run.generator, batch.cond, steps=3, guidance=1.0, seeds=run.seeds(batch.ids, batch.epoch), record=True
    )
    t = ranking.timesteps[1]
    index = [trajectory.timesteps.tolist().index(level) for level in t.tolist()]
    x_t = trajectory.states[index, torch.arange(3)]
    with torch.no_grad():
        old = run.predict(x_t, t, batch.cond)
        for parameter in run.generator.trainable_parameters():
            parameter.mul_(1.3)
    run.step = 1
    noise = run.noise_like(batch.images, batch.ids, 1, "noise 1")
    expert = run.process.add_noise(batch.images, noise, t)
    gaps = []
    for predict in (run.predict, run.reference.predict):
        on_expert = (predict(expert, t, batch.cond) - noise).square().mean(dim=(1, 2, 3))
        gaps.append(on_expert - (predict(x_t, t, batch.cond) - old).square().mean(dim=(1, 2, 3)))
    expected = (gaps[0] - gaps[1] + 0.5).clamp_min(0).mean()
    output = method.loss(run, ranking)
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-9) and expected > 0


def test_dro_with_one_update_a_round_has_the_gradient_of_the_expert_side_alone(model: str) -> None:
    """The policy's own error is a square that is 0 where the samples are fresh: it opens the hinge, no more."""
    run = make_run(model)
    method = make_method("diffusion_dro", sampling_steps=3, margin=1.0)
    (ranking,) = method.collect(run, [experts()])
    parameters = list(run.generator.trainable_parameters())
    found = torch.autograd.grad(method.loss(run, ranking).loss, parameters)
    t, batch = ranking.timesteps[0], ranking.experts
    noise = run.noise_like(batch.images, batch.ids, 1, "noise 0")
    predicted = run.predict(run.process.add_noise(batch.images, noise, t), t, batch.cond)
    expected = torch.autograd.grad((predicted - noise).square().mean(), parameters)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-12)


# The engine

ENGINE: dict[str, dict[str, Any]] = {
    "dense_dpo": {"sampling_steps": 2, "images_per_prompt": 2, "guidance": 1.0, "updates_per_round": 2, "clip": 1.0},
    "spo": {"sampling_steps": 2, "guidance": 1.0, "candidates": 2, "threshold": [0.0, 0.0]},
    "diffusion_dro": {"sampling_steps": 2, "updates_per_round": 2},
}


@pytest.mark.parametrize("name", ENGINE)
def test_resumed_run_logs_the_same_losses(model: str, tmp_path: Path, name: str) -> None:
    options = {"name": name, **ENGINE[name]}

    def config(folder: str) -> Any:
        if name == "diffusion_dro":
            return run_config(model, write_pairs(tmp_path / "pairs", 4), tmp_path / folder, options)
        return online_config(model, tmp_path / folder, options)

    train(config("whole"))
    halves = config("halves")
    train(halves.model_copy(update={"trainer": halves.trainer.model_copy(update={"steps": 2})}))
    train(halves)
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")
    assert len(set(losses(tmp_path / "whole").values())) > 1
    counted = [losses(tmp_path / folder, "images_sampled")[4] for folder in ("halves", "whole")]
    assert counted[0] == counted[1] > 0
