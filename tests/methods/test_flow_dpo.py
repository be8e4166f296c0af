"""`diffusion_dpo` on a flow model: shared noise, the value at the reference, anchor, and the beta that follows."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_models import build_tiny_sd
from tiny_runs import InMemoryPairs, exact_run, losses, run_config, write_pairs

from mmalign.data.batches import PairBatch
from mmalign.losses import beta_of_margin, diffusion_dpo, diffusion_dpo_logit
from mmalign.methods.auto_beta import AutoBeta
from mmalign.methods.diffusion_dpo import DiffusionDPO, DiffusionDPOConfig
from mmalign.methods.noising import noise_pairs
from mmalign.methods.run import Run
from mmalign.training.train import train
from pipelines.noise import NoiseProcess


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_sd(tmp_path_factory.mktemp("dpo") / "sd", "v_prediction", vae="tiny")


def flow_run(model: str, scale: float = 0.05) -> Run:
    run = exact_run(model, scale)
    run.generator.process = NoiseProcess.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0))
    return run


def pairs(count: int = 4) -> PairBatch:
    batch = InMemoryPairs(count).batch(range(count), 1, 0)
    return replace(batch, chosen=batch.chosen.double(), rejected=batch.rejected.double())


def test_both_sides_have_the_same_noise_and_level(model: str) -> None:
    run, batch = flow_run(model), pairs()
    noised = noise_pairs(run, batch, DiffusionDPOConfig())
    sigma = (noised.t.double() / 1000).reshape(-1, 1, 1, 1)
    clean = torch.cat([batch.chosen, batch.rejected])
    noise = (noised.x_t - (1 - sigma) * clean) / sigma
    assert torch.equal(noised.t[:4], noised.t[4:]) and len(noised.t.unique()) > 1
    torch.testing.assert_close(noise[:4], noise[4:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(noised.target, noise - clean, rtol=1e-5, atol=1e-5)


def test_at_the_reference_the_loss_is_log_2_and_swapping_sides_mirrors_it(model: str) -> None:
    method = DiffusionDPO(DiffusionDPOConfig(beta=50.0))
    start = method.loss(flow_run(model, scale=0.0), pairs())
    assert start.loss.item() == pytest.approx(math.log(2), abs=1e-12)
    run, batch = flow_run(model), pairs(1)
    swapped = replace(batch, chosen=batch.rejected, rejected=batch.chosen)
    one, other = method.loss(run, batch), method.loss(run, swapped)
    assert float(other.metrics["logit"]) == pytest.approx(-float(one.metrics["logit"]), rel=1e-9)
    assert other.loss.item() - one.loss.item() == pytest.approx(float(one.metrics["logit"]), rel=1e-9)
    assert abs(float(one.metrics["logit"])) > 1e-4


def test_the_anchor_holds_the_prediction_for_the_chosen_image(model: str) -> None:
    run, batch = flow_run(model), pairs()
    plain = DiffusionDPO(DiffusionDPOConfig(beta=50.0)).loss(run, batch)
    held = DiffusionDPO(DiffusionDPOConfig(beta=50.0, anchor_weight=3.0)).loss(run, batch)
    noised = noise_pairs(run, batch, DiffusionDPOConfig())
    policy = run.predict(noised.x_t, noised.t, noised.cond)[:4]
    with run.reference.active():
        reference = run.generator.predict(noised.x_t, noised.t, noised.cond)[:4]
    distance = (policy - reference).square().mean()
    assert (held.loss - plain.loss).item() == pytest.approx(3.0 * distance.item(), rel=1e-9) and distance > 0
    chosen, was = held.metrics["policy_chosen"], held.metrics["reference_chosen"]
    assert float(held.metrics["displacement"]) == pytest.approx(float(chosen) - float(was), rel=1e-6)
    assert "displacement" not in plain.metrics


@pytest.mark.parametrize("margin", [1e-4, 0.02])
def test_beta_reaches_the_share_on_a_constant_margin(margin: float) -> None:
    auto = AutoBeta(target=0.2, decay=0.99, least=1e-6, most=1e9)
    policy = torch.tensor([0.1 - margin, 0.1 + margin]), torch.tensor([0.1, 0.1])  # gains of +- margin
    reference = torch.full((2,), 0.1), torch.full((2,), 0.1)
    assert auto.beta(2000.0) == 2000.0
    for _ in range(5):
        beta = auto.beta(2000.0)
        z = diffusion_dpo_logit(*policy, *reference, beta=beta)
        auto.see(2 / beta * z)
        auto.step()
    z = diffusion_dpo_logit(*policy, *reference, beta=auto.beta(2000.0)).abs()
    assert torch.sigmoid(-z).tolist() == pytest.approx([0.2, 0.2], rel=1e-3)
    assert auto.beta(0.0) == pytest.approx(2.772588722 / margin, rel=1e-3)
    errors = policy[0].double().requires_grad_()
    diffusion_dpo(errors, *(x.double() for x in (policy[1], *reference)), beta=auto.beta(0.0)).sum().backward()
    assert errors.grad is not None  # that of the right pair has the share 0.2 of what it has at z = 0
    assert errors.grad[0].item() == pytest.approx(0.2 * auto.beta(0.0) / 2, rel=1e-3)


def test_the_mean_margin_is_that_of_micro_batches_and_steps() -> None:
    auto = AutoBeta(target=0.2, decay=0.5, least=1.0, most=500.0)
    auto.see(torch.tensor([0.0, 0.0]))
    auto.step()
    assert auto.beta(7.0) == 7.0  # where the policy is the reference there is no margin
    for micro in ([0.1, -0.3], [0.2, 0.2]):
        auto.see(torch.tensor(micro))
    auto.step()
    assert auto.beta(7.0) == pytest.approx(2.772588722 / 0.2)
    auto.see(torch.tensor([-0.8]))
    auto.step()
    assert auto.beta(7.0) == pytest.approx(2.772588722 / ((0.2 * 0.5 + 0.8) / 1.5))
    again = AutoBeta(target=0.2, decay=0.5, least=1.0, most=500.0)
    again.load_state_dict(auto.state_dict())
    assert again.beta(7.0) == auto.beta(7.0)
    auto.see(torch.tensor([1e-6]))
    for _ in range(20):
        auto.see(torch.tensor([1e-9]))
        auto.step()
    assert auto.beta(7.0) == 500.0


def test_a_run_is_resumed_to_the_bit(model: str, tmp_path: Path) -> None:
    method: dict[str, Any] = {"name": "diffusion_dpo", "auto_beta": 0.2, "anchor_weight": 0.1, "beta": 100.0}

    def config(folder: str, steps: int) -> Any:
        options = {"steps": steps, "data": {"resolution": 16}, "gradient_accumulation": 2}
        return run_config(model, write_pairs(tmp_path / "data"), tmp_path / folder, method, **options)

    train(config("whole", 4))
    train(config("halves", 2))
    train(config("halves", 4))
    for key in ("loss", "beta", "displacement"):
        assert losses(tmp_path / "whole", key) == losses(tmp_path / "halves", key), key
    betas = losses(tmp_path / "whole", "beta")
    assert betas[1] == betas[2] == 100.0 and betas[3] != 100.0  # a fresh LoRA has no margin in the first step


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"auto_beta": 0.2, "loss_type": "ipo"}, "auto_beta is for loss_type: sigmoid, not ipo"),
        ({"auto_beta": 0.5}, "less than 0.5"),
        ({"auto_beta_decay": 0.5}, "auto_beta_decay is for auto_beta"),
        ({"auto_beta_bounds": [1, 5]}, "auto_beta_bounds is for auto_beta"),
        ({"auto_beta": 0.2, "auto_beta_bounds": [5, 1]}, "must be positive, the least first"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiffusionDPOConfig(**options)


def test_a_margin_or_a_share_that_has_no_beta_is_refused() -> None:
    with pytest.raises(ValueError, match="margin=0"):
        beta_of_margin(0.0, target=0.2)
    with pytest.raises(ValueError, match="target=0.5"):
        beta_of_margin(1.0, target=0.5)
