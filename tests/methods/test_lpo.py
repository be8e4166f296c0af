"""LPO on tiny real models: who is scored at which level, what is computed and counted, and the engine."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build_tiny_sd, build_tiny_sdxl
from tiny_runs import BRIGHTNESS, exact_run, losses, online_config

from mmalign.core.errors import UserError
from mmalign.data.batches import PromptBatch
from mmalign.methods.lpo import LPO
from mmalign.methods.run import Run
from mmalign.training.latent_reward.config import LatentRewardConfig
from mmalign.training.latent_reward.training import make_parts
from mmalign.training.train import train
from pipelines import ddim, load_generator, sample
from pipelines.branching import Branching, sample_branching
from rewards import RewardError
from rewards.latent import LatentReward

OPTIONS: dict[str, Any] = {"sampling_steps": 3, "guidance": 1.0, "candidates": 3, "threshold": (0.0, 0.0), "clip": 0.9}
KINDS = ("sd15", "sd21", "sdxl")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, Path]]:
    """Each family's model and a latent reward made of it, untrained: its text and visual projections differ."""
    folder = tmp_path_factory.mktemp("lpo")
    built = {
        "sd15": build_tiny_sd(folder / "sd15", vae="tiny"),
        "sd21": build_tiny_sd(folder / "sd21", "v_prediction", seed=1),
        "sdxl": build_tiny_sdxl(folder / "sdxl", seed=2),
    }
    found = {}
    for kind, model in built.items():
        config = LatentRewardConfig(model=model, data={"pairs": "none"}, output="none")
        make_parts(load_generator(model, device="cpu"), config).save(folder / f"reward-{kind}")
        found[kind] = (model, folder / f"reward-{kind}")
    return found


def begun(models: dict[str, tuple[str, Path]], scale: float = 0.05, **options: Any) -> tuple[Run, LPO, PromptBatch]:
    model, reward = models["sd15"]
    run = exact_run(model, scale)
    method = LPO(LPO.Config(latent_reward=str(reward), **{**OPTIONS, **options}))
    method.check(run.process)
    method.begin(run)
    texts = ["a red circle", "a star"]
    return run, method, PromptBatch(texts, run.generator.encode_prompts(texts), [f"{text}#0" for text in texts])


def test_chain_is_the_samplers_and_the_candidates_are_those_of_spo(models: dict[str, tuple[str, Path]]) -> None:
    run, _, batch = begun(models)
    common: dict[str, Any] = {"kernel": ddim(1.0), "steps": 3, "seeds": [3, 4], "guidance": 2.0}
    seen: dict[bool, list[Branching]] = {True: [], False: []}
    ends = {
        clean: sample_branching(
            run.generator, batch.cond, candidates=3, visit=seen[clean].extend, predict_clean=clean, **common
        )
        for clean in seen
    }
    torch.testing.assert_close(ends[False], ends[True], rtol=1e-10, atol=1e-10)
    assert len(seen[True]) == len(seen[False]) == 3
    for with_clean, without in zip(seen[True], seen[False], strict=True):
        assert without.clean is None and with_clean.clean is not None
        assert (without.t, without.t_next, without.std) == (with_clean.t, with_clean.t_next, with_clean.std)
        torch.testing.assert_close(without.candidates, with_clean.candidates, rtol=1e-10, atol=1e-10)
    picked = seen[False][0].pick(torch.tensor([2, 0]), torch.tensor([1, 1]))
    assert picked.clean is None
    assert torch.equal(
        picked.candidates[0], torch.stack([seen[False][0].candidates[2, 0], seen[False][0].candidates[0, 1]])
    )
    whole = sample(run.generator, batch.cond, steps=3, guidance=2.0, eta=1.0, seeds=[3, 4])
    first = sample_branching(
        run.generator, batch.cond, candidates=1, visit=lambda step: None, predict_clean=False, **common
    )
    assert torch.equal(first, whole.latents)


@pytest.mark.parametrize(("fidelity", "level"), [("paper", "t_next"), ("code", "t")])
def test_best_and_worst_by_the_latent_reward_at_the_level(
    models: dict[str, tuple[str, Path]], fidelity: str, level: str
) -> None:
    run, method, batch = begun(models, fidelity=fidelity)
    drawn: list[Branching] = []
    sample_branching(
        run.generator,
        batch.cond,
        kernel=ddim(1.0),
        steps=3,
        candidates=3,
        seeds=run.seeds(batch.repeat(1).ids, 0),
        visit=drawn.extend,
        predict_clean=False,
        guidance=1.0,
    )
    reward = LatentReward(weights=models["sd15"][1], device="cpu")
    found = method.collect(run, [batch])
    assert [pairs.step.t for pairs in found] == [step.t for step in drawn]
    for pairs, step in zip(found, drawn, strict=True):
        at = max(getattr(step, level), 0)
        scores = torch.stack([reward.score_latents(one, at, batch.prompts) for one in step.candidates])
        for row in range(2):
            best, worst = (
                step.candidates[int(pick), row] for pick in (scores[:, row].argmax(), scores[:, row].argmin())
            )
            torch.testing.assert_close(pairs.step.candidates[:, row], torch.stack([best, worst]))
        assert pairs.valid.all()


def test_fewer_pairs_count_the_higher_the_threshold(models: dict[str, tuple[str, Path]]) -> None:
    counts = []
    for threshold in (0.0, 0.02, 0.1, 0.9):
        run, method, batch = begun(models, threshold=(threshold, threshold), images_per_prompt=4)
        counts.append(sum(int(pairs.valid.sum()) for pairs in method.collect(run, [batch])))
    assert counts == sorted(counts, reverse=True) and counts[0] == 24 and counts[-1] == 0


def test_loss_starts_at_log_two_and_its_logit_is_bounded(models: dict[str, tuple[str, Path]]) -> None:
    run, method, batch = begun(models, scale=0.0, clip=0.1, beta=500.0)
    for pairs in method.collect(run, [batch]):
        assert method.loss(run, pairs).loss.item() == pytest.approx(math.log(2) * pairs.share, rel=1e-9)
    moved, method, batch = begun(models, scale=3.0, clip=0.1, beta=500.0)
    bound = 500 * math.log(1.1 / 0.9)
    assert bound == pytest.approx(100.335, abs=1e-3)
    largest = max(float(method.loss(moved, pairs).metrics["loss"]) for pairs in method.collect(moved, [batch]))
    assert math.log(2) != largest <= bound + 1e-6  # -log sigmoid(-z) < z + 1e-43


def test_images_seen_are_calls_of_the_denoiser_and_of_the_reward(models: dict[str, tuple[str, Path]]) -> None:
    """2 chains: 3 steps of the sampler, 3 candidates scored at each, and the finished latents."""
    run, method, batch = begun(models)
    run.cost.watch(run.generator.network)
    decoded: list[int] = []
    run.generator.encoder("vae").decoder.register_forward_hook(lambda *_: decoded.append(1))
    run.cost.start()
    found = method.collect(run, [batch])
    assert run.cost.images_seen == 2 * 3 + 2 * 3 * 3 + 2 and run.cost.images_sampled == 2
    assert run.cost.reward_calls == 2 * 3 * 3 + 2
    assert not decoded and run.shown is None
    method.learn(run, found[0], lambda loss: loss.backward())
    assert run.cost.images_seen == 26 + 2 * 3  # reference, policy forward and backward


def test_a_reward_of_another_autoencoder_is_refused(models: dict[str, tuple[str, Path]]) -> None:
    run, method, _ = begun(models)
    other = LPO(LPO.Config(latent_reward=str(models["sdxl"][1]), **OPTIONS))
    with pytest.raises(UserError, match="latents of another autoencoder") as refused:
        other.begin(run)
    assert "\n" not in str(refused.value) and "mmalign train-reward" in str(refused.value)
    nothing = LPO(LPO.Config(latent_reward=str(models["sdxl"][0]), **OPTIONS))
    with pytest.raises(RewardError, match="holds no latent reward"):
        nothing.check(run.process)


QUICK = (("sd15", "lora"), ("sd15", "full"), ("sdxl", "lora"))
SLOW = (("sd21", "lora"), ("sd21", "full"), ("sdxl", "full"))


@pytest.mark.parametrize(("kind", "adapter"), [*QUICK, *(pytest.param(*one, marks=pytest.mark.slow) for one in SLOW)])
def test_trains_every_family_and_goes_on(
    models: dict[str, tuple[str, Path]], tmp_path: Path, kind: str, adapter: str
) -> None:
    model, reward = models[kind]
    options = {"name": "lpo", "latent_reward": str(reward), "sampling_steps": 2, "guidance": 2.0, "candidates": 2}
    options["threshold"] = [0.0, 0.0]

    def config(folder: str) -> Any:
        given: dict[str, Any] = {"rewards": [] if adapter == "lora" else [{"name": BRIGHTNESS}]}
        if adapter == "full":
            given["adapter"] = {"kind": "full"}
        return online_config(model, tmp_path / folder, options, **given)

    train(config("whole"))
    halves = config("halves")
    train(replace_steps(halves, 2))
    train(halves)
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")
    assert len(set(losses(tmp_path / "whole").values())) > 1
    seen = losses(tmp_path / "whole", "images_seen")
    # 2 guided chains of 2 steps; 2 candidates at each and the end scored; 2 learned steps: reference, there and back.
    ends = 2 if adapter == "lora" else 0
    assert seen[1] == 2 * 2 * 2 + 2 * 2 * 2 + ends + 2 * (2 * 2 * 3)


def replace_steps(config: Any, steps: int) -> Any:
    return config.model_copy(update={"trainer": config.trainer.model_copy(update={"steps": steps})})
