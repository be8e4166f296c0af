"""Methods on tiny real models: what they compute, and what their random draws depend on."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny_models import build_tiny_sd
from tiny_runs import InMemoryPairs

from mmalign.core.errors import UserError
from mmalign.core.precision import autocast, round_frozen
from mmalign.data.batches import LabelBatch
from mmalign.data.sampler import BatchSampler
from mmalign.losses import diffusion_dpo
from mmalign.methods import methods
from mmalign.methods.base import MethodConfig, TimestepRange
from mmalign.methods.diffusion_dpo import DiffusionDPO, DiffusionDPOConfig
from mmalign.methods.noising import pair_metrics
from mmalign.methods.reference import Reference
from mmalign.methods.run import Run
from mmalign.methods.sft import SFT, SFTConfig
from pipelines import load_generator
from pipelines.conditioning import Conditioning

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_sd(tmp_path_factory.mktemp("models") / "sd", prediction_type="v_prediction")


def make_run(model: str, kind: str, precision: Any = "fp32", seed: int = 0) -> Run:
    """A run over a fresh copy of the model: `kind` is "lora" or "full"."""
    generator = load_generator(model, device="cpu")
    if kind == "lora":
        generator.add_adapter(4)
    else:
        generator.network.requires_grad_(True)
    round_frozen(generator.network, precision)
    generator.network.train()

    def cast() -> Any:
        return autocast(precision, CPU)

    reference = Reference(generator, "adapter" if kind == "lora" else "copy", precision=precision, autocast=cast)
    return Run(generator, seed=seed, reference=reference, autocast=cast)


def disturb(run: Run, scale: float = 0.05) -> None:
    """Move the policy away from the reference."""
    source = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in run.generator.trainable_parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=source))


def test_registry_knows_them_and_they_say_what_they_need() -> None:
    assert methods.get("diffusion_dpo") is DiffusionDPO and methods.get("sft") is SFT
    assert (DiffusionDPO.needs.source, SFT.needs.source) == ("pairs", "images")
    assert DiffusionDPO.needs.reference and not SFT.needs.reference
    with pytest.raises(UserError, match="did you mean 'diffusion_dpo'"):
        methods.get("difusion_dpo")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_dpo_starts_at_log_two_exactly(model: str, kind: str, precision: str) -> None:
    run = make_run(model, kind, precision)
    output = DiffusionDPO(DiffusionDPOConfig()).loss(run, InMemoryPairs(4).batch(range(4), 0, 0))
    assert output.metrics["logit"] == 0 and output.metrics["accuracy"] == 0.5
    assert output.loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert output.metrics["policy_chosen"] == output.metrics["reference_chosen"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_both_references_are_the_base_model_whatever_became_of_the_policy(model: str, precision: str) -> None:
    batch = InMemoryPairs(3).batch(range(3), 0, 0)
    t = torch.tensor([5, 400, 990])
    untrained = load_generator(model, device="cpu")
    for kind in ("lora", "full"):
        untrained.network.requires_grad_(kind == "full")
        with torch.no_grad(), autocast(precision, CPU):  # type: ignore[arg-type]
            base = untrained.predict(batch.chosen, t, batch.cond)
        run = make_run(model, kind, precision)
        disturb(run)
        assert torch.equal(run.reference.predict(batch.chosen, t, batch.cond), base), kind
        with run.reference.active():
            assert not run.predict(batch.chosen, t, batch.cond).requires_grad
        policy = run.predict(batch.chosen, t, batch.cond)
        assert policy.requires_grad and not torch.equal(policy, base), kind


def test_reference_has_no_dropout_and_leaves_the_policy_its_own(model: str) -> None:
    run = make_run(model, "lora")
    dropouts = [layer for layer in run.generator.network.modules() if isinstance(layer, torch.nn.Dropout)]
    for layer in dropouts:
        layer.p = 0.5
    run = Run(run.generator, reference=Reference(run.generator, "adapter"))
    batch = InMemoryPairs(2).batch(range(2), 0, 0)
    t = torch.tensor([100, 500])
    assert torch.equal(*(run.reference.predict(batch.chosen, t, batch.cond) for _ in range(2)))
    assert not torch.equal(*(run.predict(batch.chosen, t, batch.cond) for _ in range(2)))
    assert dropouts and all(layer.training for layer in dropouts)


def test_adapter_reference_needs_an_adapter_and_a_missing_reference_is_named(model: str) -> None:
    generator = load_generator(model, device="cpu")
    with pytest.raises(ValueError, match="use kind 'copy'"):
        Reference(generator, "adapter")
    with pytest.raises(RuntimeError, match="needs = Needs"):
        _ = Run(generator).reference


def test_dpo_loss_equals_the_formula_on_separate_forward_passes(model: str) -> None:
    run = make_run(model, "lora")
    disturb(run)
    batch = InMemoryPairs(3).batch(range(3), 2, 0)
    config = DiffusionDPOConfig(
        beta=50.0, loss_type="hinge", label_smoothing=0.2, sft_weight=0.3, timesteps=(0.2, 0.9)
    )
    output = DiffusionDPO(config).loss(run, batch)

    noise, t = run.noise_like(batch.chosen, batch.ids, 2), run.timesteps(batch, 200, 900)
    errors = []
    for predict in (run.predict, run.reference.predict):
        for x in (batch.chosen, batch.rejected):
            predicted = predict(run.process.add_noise(x, noise, t), t, batch.cond)
            errors.append((predicted - run.process.target(x, noise, t)).square().mean(dim=(1, 2, 3)))
    expected = (
        diffusion_dpo(*errors, beta=50.0, loss_type="hinge", label_smoothing=0.2).mean() + 0.3 * errors[0].mean()
    )
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert float(output.metrics["policy_rejected"]) == pytest.approx(errors[1].mean().item(), rel=1e-5)
    assert float(output.metrics["reference_chosen"]) == pytest.approx(errors[2].mean().item(), rel=1e-5)


def test_equal_sides_teach_nothing(model: str) -> None:
    run = make_run(model, "full")
    disturb(run, 0.01)
    batch = InMemoryPairs(4).batch(range(4), 0, 0)
    output = DiffusionDPO(DiffusionDPOConfig(beta=1.0)).loss(run, replace(batch, rejected=batch.chosen))
    assert abs(float(output.metrics["logit"])) < 1e-6
    assert output.loss.item() == pytest.approx(math.log(2), abs=1e-6)


def test_sft_is_the_denoising_error(model: str) -> None:
    run = make_run(model, "lora")
    batch = InMemoryPairs(3).batch(range(3), 0, 0)
    noise, t = run.noise_like(batch.chosen, batch.ids, 0), run.timesteps(batch)
    predicted = run.predict(run.process.add_noise(batch.chosen, noise, t), t, batch.cond)
    expected = torch.nn.functional.mse_loss(predicted, run.process.target(batch.chosen, noise, t))
    images = LabelBatch(batch.chosen, torch.ones(3, dtype=torch.bool), batch.cond, batch.ids)
    assert SFT(SFTConfig()).loss(run, images).loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_training_makes_the_policy_prefer_the_chosen_side(model: str, kind: str) -> None:
    run, pairs = make_run(model, kind), InMemoryPairs(24)
    pairs.chosen, pairs.rejected = pairs.chosen * 0.5 + 1, pairs.rejected * 0.5 - 1
    feed = BatchSampler(pairs, batch_size=8)
    method = DiffusionDPO(DiffusionDPOConfig(beta=100.0))
    optimizer = torch.optim.AdamW(run.generator.trainable_parameters(), lr=3e-3 if kind == "full" else 3e-2)
    seen = []
    for step in range(30):
        (batch,) = feed.micro_batches(step)
        output = method.loss(run, batch)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append((output.loss.item(), float(output.metrics["accuracy"])))
    late = torch.tensor(seen[-6:]).mean(dim=0)
    assert late[0] < 0.5 < math.log(2) and late[1] > 0.8


def test_draws_depend_on_seed_sample_and_epoch_alone(model: str) -> None:
    generator = load_generator(model, device="cpu")
    run, other_seed = Run(generator, seed=0), Run(generator, seed=1)
    pairs = InMemoryPairs(6)
    whole, part = pairs.batch(range(6), 1, 0), pairs.batch([4, 2], 1, 0)
    noise = run.noise_like(whole.chosen, whole.ids, 1)
    assert torch.equal(run.noise_like(part.chosen, part.ids, 1), noise[[4, 2]])
    assert torch.equal(run.timesteps(part), run.timesteps(whole)[[4, 2]])
    assert noise.std() == pytest.approx(1, abs=0.05)
    for changed in (run.noise_like(whole.chosen, whole.ids, 2), other_seed.noise_like(whole.chosen, whole.ids, 1)):
        assert not torch.isclose(changed, noise).any(dim=-1).all()
    assert not torch.equal(run.timesteps(replace(whole, epoch=2)), run.timesteps(whole))


def test_timesteps_stay_in_their_range_and_fill_it(model: str) -> None:
    run = Run(load_generator(model, device="cpu"))
    batch = InMemoryPairs(40).batch(range(40), 0, 0)
    drawn = torch.cat([run.timesteps(replace(batch, epoch=epoch), 500, 520) for epoch in range(10)])
    assert set(drawn.tolist()) == set(range(500, 520))


def test_timestep_range_is_read_as_fractions_or_integers() -> None:
    assert TimestepRange().timestep_bounds(1000) == (0, 1000)
    assert TimestepRange(timesteps=(0.25, 0.5)).timestep_bounds(1000) == (250, 500)
    assert TimestepRange(timesteps=(250, 500)).timestep_bounds(1000) == (250, 500)
    assert TimestepRange(timesteps=[0.0, 1.0]).timestep_bounds(1000) == (0, 1000)  # type: ignore[arg-type]
    for wrong in ((0.5, 0.2), (500, 100), (0.0, 1.5), (-1, 5), (0, 1)):
        with pytest.raises(ValidationError):
            TimestepRange(timesteps=wrong)
    with pytest.raises(UserError, match=r"\[500, 1001\)"):
        TimestepRange(timesteps=(500, 1001)).timestep_bounds(1000)
    with pytest.raises(UserError, match="at least one step"):
        TimestepRange(timesteps=(0.1, 0.1001)).timestep_bounds(1000)


def test_config_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValidationError, match="bta"):
        DiffusionDPOConfig(bta=3.0)  # type: ignore[call-arg]
    assert all(field.description for field in DiffusionDPOConfig.model_fields.values())
    assert issubclass(SFTConfig, MethodConfig)


def test_log_line_states_the_convention_of_beta() -> None:
    assert "beta=2000, mean-reduced, half factor on" in DiffusionDPO(DiffusionDPOConfig(beta=2000.0)).describe()
    described = DiffusionDPO(DiffusionDPOConfig(loss_type="ipo", label_smoothing=0.1, sft_weight=2.0)).describe()
    assert all(part in described for part in ("ipo", "label_smoothing=0.1", "sft_weight=2"))


def test_accuracy_counts_a_tie_as_one_half() -> None:
    errors = (torch.zeros(4), torch.zeros(4))
    metrics = pair_metrics(errors, errors, torch.tensor([1.0, -1.0, 0.0, 2.0]))
    assert metrics["accuracy"] == pytest.approx(0.625) and metrics["logit"] == pytest.approx(0.5)


def test_offline_method_learns_from_what_is_dealt(model: str) -> None:
    dealt = [object(), object()]
    assert SFT(SFTConfig()).collect(Run(load_generator(model, device="cpu")), dealt) is dealt


def test_run_predicts_in_float32_under_autocast(model: str) -> None:
    run = make_run(model, "full", "bf16")
    batch = InMemoryPairs(2).batch(range(2), 0, 0)
    cond = Conditioning(batch.cond.prompt_embeds)
    output = run.predict(batch.chosen, torch.tensor([3, 4]), cond)
    run.autocast = nullcontext
    exact = run.predict(batch.chosen, torch.tensor([3, 4]), cond)
    assert output.dtype == torch.float32
    assert 0 < (output - exact).abs().max() < 0.1
