"""Methods that learn from their own samples: the loop around them, the ratio, the budget, the early stop, the cost."""

from __future__ import annotations

import json
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build_tiny_sd
from tiny_runs import BRIGHTNESS, Brightness, losses, online_config

from mmalign.config.run import RunConfig, load_config
from mmalign.config.sections import DataConfig
from mmalign.config.yaml import ConfigIssues
from mmalign.core.cost import Cost
from mmalign.core.errors import TrainingDiverged, UserError
from mmalign.data.batches import PromptBatch
from mmalign.data.encoded.prompt_cache import build_prompt_cache
from mmalign.methods.advantages import drawn_steps
from mmalign.methods.ddpo import DDPO, DDPOConfig
from mmalign.methods.prdp import PRDP, PRDPConfig
from mmalign.methods.reference import Reference
from mmalign.methods.run import Run
from mmalign.methods.trajectory import RatioError
from mmalign.scoring.checks import check_reward
from mmalign.scoring.choice import WeightedReward
from mmalign.scoring.live import LiveRewards
from mmalign.training import single
from mmalign.training.single import make_early_stopping
from mmalign.training.train import train
from pipelines import load_generator
from rewards import Reward, load_reward


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_sd(tmp_path_factory.mktemp("online") / "sd", vae="tiny")


def make_run(model: str, *, dtype: str = "float32", **options: Any) -> Run:
    generator = load_generator(model, device="cpu", dtype=dtype)
    generator.unconditional()
    generator.add_adapter(4, seed=1)
    with torch.no_grad():  # a fresh LoRA is the identity, at which gradients of A vanish
        for parameter in generator.trainable_parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    generator.network.train()
    rewards = options.pop("rewards", [WeightedReward("brightness", 1.0, Brightness())])
    return Run(generator, reference=Reference(generator, "adapter"), rewards=rewards, **options)


def prompts(run: Run, *texts: str) -> PromptBatch:
    return PromptBatch(list(texts), run.generator.encode_prompts(texts), [f"{text}#0" for text in texts])


PRDP_OPTIONS = {"sampling_steps": 3, "guidance": 2.0, "images_per_prompt": 3, "beta": 1.0, "clip": 0.01}


def test_gradient_in_parts_is_that_of_the_whole_objective(model: str) -> None:
    """The step-by-step replay adds up to the gradient of one graph over all steps, PRDP's squared sums included."""
    from pipelines.guidance import guided_predictor
    from pipelines.sampling import replay_step

    run = make_run(model)
    method = PRDP(PRDPConfig(**PRDP_OPTIONS, kl_weight=0.3))
    (rollout,) = method.collect(run, [prompts(run, "a red circle", "two blue stars")])
    parameters = run.generator.trainable_parameters()
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(1.1)
    run.step = 1  # the policy has moved on: log-probs are computed anew
    method.learn(run, rollout, lambda loss: loss.backward())
    found = [parameter.grad.clone() for parameter in parameters]

    predict = guided_predictor(run.generator, rollout.samples.cond, 2.0)
    steps = [replay_step(run.process, rollout.trajectory, i, predict) for i in range(3)]
    rollout.log_probs = torch.stack([log_prob for _, _, log_prob in steps])
    whole = method.loss(run, rollout).loss
    kl = torch.stack(
        [
            ((mean - rollout.reference_means[i]).square().flatten(1).mean(1) / (2 * std.square())).mean()
            for i, (mean, std, _) in enumerate(steps)
        ]
    ).mean()
    expected = torch.autograd.grad(whole + 0.3 * kl, parameters)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=1e-7)


def test_distance_to_the_references_predictions_is_that_of_dpoks_code(model: str) -> None:
    """Without advantages: the mean square of the difference of guided predictions, over the learned steps."""
    from pipelines.guidance import guided_predictor

    run = make_run(model)
    options: dict[str, Any] = {"sampling_steps": 3, "guidance": 2.0, "images_per_prompt": 2, "advantage": "group"}
    method = DDPO(DDPOConfig(**options, distance_weight=0.7, learned_steps=(0.0, 0.67)))
    (rollout,) = method.collect(run, [prompts(run, "a red circle", "two blue stars")])
    rollout.advantages = torch.zeros(4)
    parameters = run.generator.trainable_parameters()
    method.learn(run, rollout, lambda loss: loss.backward())
    found = [parameter.grad.clone() for parameter in parameters]
    squares = []
    for index in (0, 1):
        x, t = rollout.trajectory.states[index], rollout.trajectory.timesteps[index].expand(4)
        predict = guided_predictor(run.generator, rollout.samples.cond, 2.0)
        ours = predict(x, t)
        with torch.no_grad(), run.reference.active():
            theirs = predict(x, t)
        squares.append((ours - theirs).square().mean())
    expected = torch.autograd.grad(0.7 * torch.stack(squares).mean(), parameters)
    assert max(float(one.abs().max()) for one in found) > 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=1e-7)


def test_each_image_is_trained_on_steps_of_its_own_whatever_the_batches(model: str) -> None:
    run = make_run(model)
    options: dict[str, Any] = {"sampling_steps": 6, "guidance": 1.0, "images_per_prompt": 2, "timestep_fraction": 0.5}
    method = DDPO(DDPOConfig(**options, advantage="group", clip=0.5))
    texts = ["a red circle", "two blue stars", "a star", "red"]
    parameters = run.generator.trainable_parameters()
    found, wanted = [], []
    for size in (4, 2):
        batches = [prompts(run, *texts[start : start + size]) for start in range(0, 4, size)]
        for parameter in parameters:
            parameter.grad = None
        rollouts = method.collect(run, batches)
        for rollout in rollouts:
            metrics = method.learn(run, rollout, lambda loss: loss.backward())
            assert float(metrics["log_ratio_max"]) == 0.0
        wanted.append(torch.cat([rollout.wanted for rollout in rollouts], dim=1))
        found.append([parameter.grad / len(batches) for parameter in parameters])
    assert torch.equal(*wanted) and wanted[0].sum(0).tolist() == [3] * 8
    assert len({tuple(column.tolist()) for column in wanted[0].T}) > 3  # not one draw for all
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    run.step = 1
    assert not torch.equal(drawn_steps(run, rollouts[0], 0.5), rollouts[0].wanted)  # redrawn at every update


def test_learned_steps_may_be_a_part_of_the_random_ones(model: str) -> None:
    run = make_run(model)
    method = DDPO(DDPOConfig(sampling_steps=4, guidance=1.0, images_per_prompt=3, learned_steps=(0.5, 1.0)))
    (rollout,) = method.collect(run, [prompts(run, "a red circle")])
    assert (rollout.stds > 0).all() and rollout.learned_steps() == [2, 3]
    rollout.log_probs = rollout.old_log_probs.clone().requires_grad_()
    rollout.advantages = torch.tensor([1.0, -2.0, 0.5])
    (weights,) = torch.autograd.grad(method.loss(run, rollout).loss, rollout.log_probs)
    expected = torch.tensor([[0.0, 0.0, 0.0]] * 2 + [[-1.0, 2.0, -0.5]] * 2) / 6
    torch.testing.assert_close(weights, expected)


def test_ratio_is_one_before_the_first_update(model: str) -> None:
    run = make_run(model)
    method = DDPO(DDPOConfig(sampling_steps=3, guidance=2.0, images_per_prompt=3))
    (rollout,) = method.collect(run, [prompts(run, "a red circle", "a star")])
    metrics = method.learn(run, rollout, lambda loss: loss.backward())
    assert float(metrics["log_ratio_max"]) == 0.0
    assert float(metrics["clipped"]) == 0.0


def test_only_the_random_part_of_the_sampling_is_learned_from(model: str) -> None:
    run = make_run(model)
    run.cost.watch(run.generator.network)
    method = DDPO(DDPOConfig(sampling_steps=4, guidance=1.0, images_per_prompt=3, random_steps=(0.0, 0.5)))
    (rollout,) = method.collect(run, [prompts(run, "a red circle")])
    assert (rollout.stds > 0).all(1).tolist() == [True, True, False, False]
    run.cost.start()
    method.learn(run, rollout, lambda loss: loss.backward())
    assert run.cost.images_seen == 2 * 3 + 2 * 3 + 3  # two steps forward and backward, one for the KL
    rollout.log_probs = rollout.old_log_probs.clone().requires_grad_()
    rollout.advantages = torch.tensor([1.0, -2.0, 0.5])
    (weights,) = torch.autograd.grad(method.loss(run, rollout).loss, rollout.log_probs)
    # -A rho has the derivative -A at rho = 1; the mean is over two steps of three images.
    expected = torch.tensor([[-1.0, 2.0, -0.5]] * 2 + [[0.0, 0.0, 0.0]] * 2) / 6
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eta": 0.0}, "method.eta is 0"),
        ({"random_steps": (0.5, 0.5)}, "random_steps .* holds none of the 4 steps that have noise"),
        ({"random_steps": (0.0, 0.5), "learned_steps": (0.5, 1.0)}, "learned_steps .* holds none of the 4 steps"),
    ],
)
def test_sampler_without_randomness_is_refused(model: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DDPO(DDPOConfig(sampling_steps=4, **options)).check(make_run(model).process)


def test_clamped_ratio_learns_nothing_beyond_the_clip_on_either_side(model: str) -> None:
    """Ratios e^0.02 with a clip of 0.01, advantages -1 and 1: PPO keeps the gradient of the first, DPOK of none."""
    run, weights = make_run(model), {}
    for ratio in ("clipped", "clamped"):
        method = DDPO(DDPOConfig(sampling_steps=2, guidance=1.0, images_per_prompt=2, clip=0.01, ratio=ratio))
        (rollout,) = method.collect(run, [prompts(run, "a red circle")])
        rollout.advantages = torch.tensor([-1.0, 1.0])
        rollout.log_probs = (rollout.old_log_probs + 0.02).requires_grad_()
        (weights[ratio],) = torch.autograd.grad(method.loss(run, rollout).loss, rollout.log_probs)
    assert (weights["clipped"] != 0).tolist() == [[True, False], [True, False]]
    assert not weights["clamped"].any()


def test_ratio_that_is_not_one_is_refused_with_the_reason(model: str) -> None:
    run = make_run(model)
    method = DDPO(DDPOConfig(sampling_steps=3, guidance=2.0, images_per_prompt=3))
    (rollout,) = method.collect(run, [prompts(run, "a red circle")])
    with torch.no_grad():
        for parameter in run.generator.trainable_parameters():
            parameter.mul_(1.5)
    with pytest.raises(RatioError, match="must be 1, and it is off by .* dropout"):
        method.learn(run, rollout, lambda loss: loss.backward())


def test_offline_prdp_draws_from_the_reference_and_asks_the_policy(model: str) -> None:
    run = make_run(model)
    online, offline = (PRDP(PRDPConfig(**PRDP_OPTIONS, mode=mode)) for mode in ("online", "offline"))
    batch = prompts(run, "a red circle")
    (drawn,) = offline.collect(run, [batch])
    with run.reference.active():
        (by_reference,) = online.collect(run, [batch])
    torch.testing.assert_close(drawn.trajectory.latents, by_reference.trajectory.latents, rtol=0, atol=0)
    torch.testing.assert_close(drawn.reference_log_probs, drawn.trajectory.log_probs, rtol=0, atol=1e-6)
    assert float((drawn.old_log_probs - drawn.reference_log_probs).abs().max()) > 1e-4
    metrics = offline.learn(run, drawn, lambda loss: loss.backward())  # the ratio to the policy's own log-probs is 1
    assert float(metrics["kl"]) > 1e-6  # of the policy, which is not the reference


def test_cost_counts_every_pass_through_the_denoiser(model: str) -> None:
    """DDPO: B images, N steps, guided (2): 2BN to draw, 2B for the KL of one step, 2BN forward and 2BN backward."""
    run = make_run(model)
    run.cost.watch(run.generator.network)
    run.cost.start()
    method = DDPO(DDPOConfig(sampling_steps=3, guidance=2.0, images_per_prompt=2))
    (rollout,) = method.collect(run, [prompts(run, "a red circle", "a star")])
    assert run.cost.counts()["images_seen"] == 2 * 4 * 3
    method.learn(run, rollout, lambda loss: loss.backward())
    assert run.cost.counts()["images_seen"] == 3 * (2 * 4 * 3) + 2 * 4
    assert (run.cost.images_sampled, run.cost.reward_calls) == (4, 4)
    with run.cost.paused():
        method.collect(run, [prompts(run, "a red circle")])
    assert run.cost.images_sampled == 4


def test_cost_is_shared_out_among_the_processes_of_a_resumed_run() -> None:
    totals = {"images_seen": 25.0, "images_sampled": 8.0, "reward_calls": 8.0, "seconds": 3.5}
    ranks = [Cost() for _ in range(4)]
    for rank, cost in enumerate(ranks):
        cost.load(totals, rank, 4)
    assert [cost.images_seen for cost in ranks] == [7, 6, 6, 6]
    assert {cost.counts()["seconds"] for cost in ranks} == {3.5}


class Counting(Reward):
    """Counts the images it is shown."""

    name = "counting"
    shown = 0

    def score(self, media: torch.Tensor, prompts: Sequence[str] | None, references: Any) -> torch.Tensor:
        self.shown += len(media)
        return media.mean((1, 2, 3))


def test_an_image_is_scored_once() -> None:
    reward, cost = Counting(), Cost()
    cost.start()
    live = LiveRewards([WeightedReward("counting", 2.0, reward)], cost)
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    first = live(images[[0, 1, 0]], ["a", "b", "a"])
    again = live(images, ["a", "b", "a"])
    assert (reward.shown, cost.reward_calls) == (3, 3)
    torch.testing.assert_close(first.total[[0, 1]], again.total[[0, 1]])
    torch.testing.assert_close(again.total, 2 * images.mean((1, 2, 3)))
    live(images[:1], ["another prompt"])
    assert reward.shown == 4


def test_a_reward_that_depends_on_its_neighbours_is_called_with_all_of_them() -> None:
    live = LiveRewards([WeightedReward("group-diversity", 1.0, load_reward("group-diversity", scale=0.01))], Cost())
    white, black = torch.ones(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)
    assert live(torch.cat([white, black, black]), ["a"] * 3).total.tolist() == pytest.approx([1, 0.5, 0.5])
    assert live(torch.cat([white, black, white]), ["a"] * 3).total.tolist() == pytest.approx([0.5, 1, 0.5])


def test_a_reward_of_groups_needs_several_images_of_a_prompt(model: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"name": "ddpo", "sampling_steps": 2, "guidance": 1.0}
    rewards = [{"name": BRIGHTNESS}, {"name": "group-diversity", "weight": 0.1}]
    with pytest.raises(UserError, match="reward 'group-diversity' compares the images of a prompt with each other"):
        train(online_config(model, tmp_path / "one", options, rewards=rewards))
    train(online_config(model, tmp_path / "two", {**options, "images_per_prompt": 2}, rewards=rewards))
    with pytest.raises(UserError, match="reward 'group-diversity' compares"):
        check_reward("group-diversity", {}, ["a star"])


@pytest.mark.parametrize("method", ["prdp", "ddpo"])
def test_resumed_run_logs_the_same_losses(model: str, tmp_path: Path, method: str) -> None:
    options = {"name": method, "sampling_steps": 2, "images_per_prompt": 2, "guidance": 1.0, "updates_per_round": 2}
    whole = online_config(model, tmp_path / "whole", options)
    train(whole)
    halves = online_config(model, tmp_path / "halves", options)
    train(halves.model_copy(update={"trainer": halves.trainer.model_copy(update={"steps": 2})}))
    train(halves)
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")
    counted = [losses(tmp_path / name, "images_seen")[4] for name in ("halves", "whole")]
    assert counted[0] == counted[1] > 0


def test_budget_ends_the_run_with_the_update_that_reaches_it(model: str, tmp_path: Path) -> None:
    options = {"name": "ddpo", "sampling_steps": 2, "images_per_prompt": 2, "guidance": 1.0}
    # A step: 2 prompts x 2 images x 2 steps drawn, 4 for the KL, 8 forward and 8 backward.
    per_step = 8 + 4 + 8 + 8
    train(online_config(model, tmp_path / "run", options, budget={"images": per_step + 1}))
    assert losses(tmp_path / "run", "images_seen") == {1: per_step, 2: 2 * per_step}
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").exists()
    train(online_config(model, tmp_path / "calls", options, budget={"reward_calls": 4}))
    assert list(losses(tmp_path / "calls")) == [1]


def test_steps_must_use_up_the_last_round(model: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="multiple of the 3 steps of a round"):
        train(online_config(model, tmp_path, {"name": "prdp", "updates_per_round": 3}))


@pytest.mark.parametrize(
    "method",
    [
        DDPO(DDPOConfig(sampling_steps=3, guidance=2.0, images_per_prompt=6, advantage="group")),
        PRDP(PRDPConfig(sampling_steps=3, guidance=2.0, images_per_prompt=6, beta=1e-3, clip=1.0)),
    ],
    ids=lambda method: method.name,
)
def test_small_step_makes_the_better_images_of_a_prompt_likelier(model: str, method: Any) -> None:
    run = make_run(model)
    (rollout,) = method.collect(run, [prompts(run, "a red circle", "two blue stars")])
    method.learn(run, rollout, lambda loss: loss.backward())
    gradients = torch.cat([parameter.grad.flatten() for parameter in run.generator.trainable_parameters()])
    with torch.no_grad():
        for parameter in run.generator.trainable_parameters():
            parameter.sub_(1e-3 * parameter.grad / gradients.norm())
    change = (method.replay_all(run, rollout)[1] - rollout.old_log_probs).sum(0).view(2, 6)
    rewards = rollout.rewards.view(2, 6)
    gain = ((rewards - rewards.mean(1, keepdim=True)) * change).sum(1)
    assert float(gain.sum()) > 0.0


def test_align_prop_raises_its_reward(model: str, tmp_path: Path) -> None:
    options = {"name": "align_prop", "truncation": "last-k", "k": 2, "sampling_steps": 4, "guidance": 1.0}
    train(online_config(model, tmp_path, {**options, "images_per_prompt": 4}, steps=12, learning_rate=1e-2))
    rewards = list(losses(tmp_path, "reward").values())
    assert sum(rewards[-4:]) > 1.05 * sum(rewards[:4])


def test_best_weights_are_exported_when_the_held_out_reward_falls(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that darkens its images on purpose: by brightness, step 0 stays the best and two looks later it ends."""
    config = online_config(
        model,
        tmp_path,
        {"name": "align_prop", "truncation": "last-k", "k": 2, "sampling_steps": 4, "guidance": 1.0},
        steps=12,
        learning_rate=1e-2,
        rewards=[{"name": BRIGHTNESS, "weight": -1.0}],
        evaluate={
            "prompts": str(_prompt_file(tmp_path)),
            "every": 2,
            "rewards": [BRIGHTNESS],
            "steps": 4,
            "guidance": 1.0,
            "early_stop": {"reward": BRIGHTNESS, "patience": 2},
        },
    )
    kept, alive = [], []

    def remember(*arguments: Any) -> Any:
        early = make_early_stopping(*arguments)
        assert early is not None
        kept.append(early)
        return early

    def check(*arguments: Any) -> None:
        early = kept.pop()
        weights = weakref.ref(next(iter(early.weights.values())))
        early.weights = {}
        alive.append(weights())

    monkeypatch.setattr(single, "make_early_stopping", remember)
    monkeypatch.setattr(single, "verify", check)
    train(config)
    assert alive == [None]  # nothing but `kept` held the best weights while the export was read back
    assert list(losses(tmp_path, f"evaluation/{BRIGHTNESS}")) == [0, 2, 4]
    generator = load_generator(str(tmp_path), device="cpu")
    biggest = max(float(p.detach().abs().max()) for n, p in generator.network.named_parameters() if "lora_B" in n)
    assert biggest == 0.0  # the adapter of step 0
    assert "best by" in (tmp_path / "README.md").read_text()


def test_alarm_ends_the_run_when_the_config_says_so(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The KL is 0 at the first step and above any small limit at the second."""
    options = {"name": "ddpo", "sampling_steps": 2, "images_per_prompt": 2, "guidance": 1.0}
    monitors = {"action": "stop", "patience": 1, "kl_limit": 1e-12}
    train(online_config(model, tmp_path, options, monitors=monitors, learning_rate=1e-2))
    assert list(losses(tmp_path)) == [1, 2]
    assert "warning: step 2: the distance to the reference is" in capsys.readouterr().err
    assert set(losses(tmp_path, "monitor/saturation")) == {1, 2}


def test_early_stop_in_the_middle_of_a_round_waits_for_its_end(model: str, tmp_path: Path) -> None:
    """An unchanged model cannot get better than its first look: step 3 is a miss, and step 4 ends the round."""
    options = {"name": "ddpo", "sampling_steps": 2, "images_per_prompt": 2, "guidance": 1.0, "updates_per_round": 2}
    looks = {"prompts": str(_prompt_file(tmp_path)), "every": 3, "rewards": [BRIGHTNESS], "steps": 2}
    stop = {"early_stop": {"reward": BRIGHTNESS, "patience": 1}}
    config = online_config(
        model, tmp_path / "run", options, steps=8, learning_rate=1e-12, evaluate={**looks, **stop, "guidance": 1.0}
    )
    train(config)
    assert max(losses(tmp_path / "run")) == 4


def test_early_stop_may_be_asked_for_when_resuming(model: str, tmp_path: Path) -> None:
    options = {"name": "ddpo", "sampling_steps": 2, "images_per_prompt": 2, "guidance": 1.0}
    looks = {"prompts": str(_prompt_file(tmp_path)), "every": 2, "rewards": [BRIGHTNESS], "steps": 2, "guidance": 1.0}
    train(online_config(model, tmp_path, options, steps=2, evaluate=looks))
    seen = losses(tmp_path, "images_seen")[2]
    assert f"{int(seen):,}" in (tmp_path / "README.md").read_text()
    stop = {"early_stop": {"reward": BRIGHTNESS, "patience": 9}}
    train(online_config(model, tmp_path, options, steps=4, evaluate={**looks, **stop}))
    assert max(losses(tmp_path)) == 4


def test_samples_that_are_not_finite_break_the_run_off(model: str) -> None:
    run = make_run(model)
    with pytest.raises(TrainingDiverged, match="after step 0 the model samples what is not finite"):
        run.decode(torch.full((1, 4, 8, 8), float("nan")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_count": 32}, "min_count 32 must not be larger than buffer_size 16"),
        ({"advantage": "group"}, "set images_per_prompt to at least 2"),
    ],
)
def test_advantages_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DDPOConfig(**options)


def test_ratio_of_a_rounds_later_updates_is_watched(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first update's ratio is 1; only the second line of a round, which shows no new picture, can tell."""
    options = {"name": "ddpo", "sampling_steps": 2, "images_per_prompt": 2, "guidance": 1.0, "updates_per_round": 2}
    monitors = {"patience": 1, "ratio_limit": 1e-9, "kl_limit": None}
    train(online_config(model, tmp_path, options, steps=2, monitors=monitors, learning_rate=1e-2))
    assert "warning: step 2: the largest |log| of an importance ratio is" in capsys.readouterr().err
    assert set(losses(tmp_path, "monitor/saturation")) == {1}


def test_repeated_prompts_get_noise_of_their_own(model: str, tmp_path: Path) -> None:
    generator = load_generator(model, device="cpu")
    data = DataConfig(prompts="unused", cache=str(tmp_path))
    cached = build_prompt_cache(["a star", "a red circle", "a star"], generator, data)
    batch = cached.batch([2, 0, 1], epoch=3, seed=0)
    assert batch.prompts == ["a star", "a star", "a red circle"]
    assert batch.ids == ["a star#1", "a star#0", "a red circle#0"]
    expected = generator.encode_prompts(batch.prompts).prompt_embeds
    torch.testing.assert_close(batch.cond.prompt_embeds, expected, rtol=1e-5, atol=1e-5)
    seeds = Run(generator).seeds(batch.repeat(2).ids, batch.epoch)
    assert len(set(seeds)) == 6


def _prompt_file(folder: Path) -> Path:
    path = folder / "held-out.txt"
    path.write_text("a green square\ntwo red stars\n")
    return path


def test_reward_without_a_gradient_is_refused_before_anything_loads(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        json.dumps(
            {
                "model": "no/such-model",
                "method": "align_prop",
                "data": {"prompts": "shapes-train"},
                "rewards": ["shapes-correctness"],
                "output": str(tmp_path / "out"),
            }
        )
    )
    with pytest.raises(ConfigIssues, match="'shapes-correctness' has no gradient, which method 'align_prop' needs"):
        load_config(path)


def test_early_stop_needs_a_reward_that_is_looked_at() -> None:
    with pytest.raises(ValueError, match=r"early_stop.reward 'clip' is not among evaluate.rewards \(aesthetic\)"):
        RunConfig.model_validate(
            {
                "model": "m",
                "method": {"name": "sft"},
                "data": {"pairs": "p"},
                "output": "o",
                "evaluate": {
                    "prompts": "shapes-validation",
                    "every": 1,
                    "rewards": ["aesthetic"],
                    "early_stop": {"reward": "clip"},
                },
            }
        )
