"""Methods that learn from stored preferences, on tiny real models: what they compute and that the engine runs them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny_models import build_tiny_sd, build_tiny_sdxl
from tiny_runs import InMemoryPairs, exact_run, losses, run_config, write_pairs
from torch import Tensor

from mmalign.cli import main
from mmalign.core.errors import UserError
from mmalign.core.io.images import encode_png
from mmalign.data.batches import LabelBatch, PairBatch
from mmalign.losses import diffusion_dpo, mapo, smpo_weight
from mmalign.methods import methods
from mmalign.methods.base import Method
from mmalign.methods.noising import InversionConfig, invert_pairs
from mmalign.methods.reference import Reference
from mmalign.methods.run import Run
from mmalign.training.train import train
from pipelines import invert, load_generator
from pipelines.conditioning import Conditioning


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_sd(tmp_path_factory.mktemp("models") / "sd", prediction_type="v_prediction", vae="tiny")


def make_method(name: str, **options: Any) -> Method[Any]:
    chosen = methods.get(name)
    method: Method[Any] = chosen(chosen.Config(**options))
    return method


def make_pairs(count: int = 3) -> PairBatch:
    batch = InMemoryPairs(count).batch(range(count), 1, 0)
    margins = torch.linspace(-0.1, 0.3, count, dtype=torch.float64)
    return replace(batch, chosen=batch.chosen.double(), rejected=batch.rejected.double(), margins=margins)


def make_labels(count: int) -> LabelBatch:
    """The chosen and rejected images of pairs, as good and bad ones in turn."""
    batch = InMemoryPairs(count).batch(range(count), 1, 0)
    rejected = InMemoryPairs(2 * count).batch(range(count, 2 * count), 1, 0).cond
    good = torch.arange(count) % 2 == 0
    return LabelBatch(batch.chosen.double(), good, batch.cond, batch.ids, epoch=1, rejected_cond=rejected)


def errors_by_hand(run: Run, batch: PairBatch, predict: Any, low: int = 0, high: int = 1000) -> list[Tensor]:
    """Errors of the chosen and of the rejected side, each in a forward pass of its own."""
    noise, t = run.noise_like(batch.chosen, batch.ids, batch.epoch), run.timesteps(batch, low, high)
    found = []
    for x in (batch.chosen, batch.rejected):
        predicted = predict(run.process.add_noise(x, noise, t), t, batch.cond)
        found.append((predicted - run.process.target(x, noise, t)).square().mean(dim=(1, 2, 3)))
    return found


def write_png(seed: int) -> bytes:
    return encode_png(Image.fromarray(np.random.default_rng(seed).integers(0, 255, (16, 16, 3), dtype=np.uint8)))


OPTIONS: dict[str, dict[str, Any]] = {
    "capo": {"beta": 5.0, "level_bias": 0.5},
    "diffusion_dpo": {"beta": 5.0},
    "mapo": {},
    "smpo": {"beta": 5.0, "scale": 0.2, "noising": "gaussian"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_gradient_equals_finite_differences(model: str, name: str) -> None:
    run, method = exact_run(model), make_method(name, **OPTIONS[name])
    batch = make_labels(4) if method.needs.source == "labels" else make_pairs()
    parameters = list(run.generator.trainable_parameters())
    source = torch.Generator().manual_seed(2)
    direction = [torch.randn(p.shape, generator=source, dtype=p.dtype) for p in parameters]

    def moved(step: float) -> float:
        with torch.no_grad():
            for parameter, along in zip(parameters, direction, strict=True):
                parameter.add_(along, alpha=step)
        value = method.loss(run, batch).loss.item()
        with torch.no_grad():
            for parameter, along in zip(parameters, direction, strict=True):
                parameter.sub_(along, alpha=step)
        return value

    gradients = torch.autograd.grad(method.loss(run, batch).loss, parameters)
    analytic = sum((g * along).sum() for g, along in zip(gradients, direction, strict=True))
    assert float(analytic) == pytest.approx((moved(1e-5) - moved(-1e-5)) / 2e-5, rel=1e-6)


def test_mapo_is_its_formula_on_separate_forward_passes_and_keeps_no_reference(model: str) -> None:
    run, batch = exact_run(model), make_pairs()
    method = make_method("mapo", beta=0.3, snr=0.7, timesteps=(0.2, 0.9))
    output = method.loss(run, batch)
    chosen, rejected = errors_by_hand(run, batch, run.predict, 200, 900)
    expected = mapo(chosen, rejected, beta=0.3, snr=0.7, scale=1000.0).mean()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-10)
    assert float(output.metrics["accuracy"]) == pytest.approx((chosen < rejected).double().mean().item())
    assert not method.needs.reference and "no reference" in method.describe()


def test_smpo_with_gaussian_noise_and_weight_one_is_diffusion_dpo(model: str) -> None:
    run, batch = exact_run(model), replace(make_pairs(), margins=torch.tensor([1.0, 0.2, 3.0]))
    ours = make_method("smpo", beta=5.0, gamma=1.0, scale=1e-9, noising="gaussian").loss(run, batch)
    theirs = make_method("diffusion_dpo", beta=5.0).loss(run, batch)
    assert ours.loss.item() == theirs.loss.item() != pytest.approx(math.log(2), abs=1e-3)
    assert ours.metrics["logit"] == theirs.metrics["logit"]
    parameters = list(run.generator.trainable_parameters())
    grads = [torch.autograd.grad(output.loss, parameters) for output in (ours, theirs)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_smpo_pairs_of_equal_scores_have_no_gradient_whatever_the_noise(model: str) -> None:
    run, batch = exact_run(model), replace(make_pairs(), margins=torch.zeros(3))
    for noising in ("gaussian", "inversion"):
        output = make_method("smpo", scale=0.2, noising=noising, inversion_steps=2).loss(run, batch)
        assert output.loss.item() == pytest.approx(math.log(2), abs=1e-15) and output.metrics["weight"] == 0
        gradients = torch.autograd.grad(output.loss, list(run.generator.trainable_parameters()))
        assert all(not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("fidelity", ["paper", "code"])
def test_inverted_pairs_learn_the_noise_of_their_own_trajectory(model: str, fidelity: Any) -> None:
    run, batch = exact_run(model), make_pairs()
    noised = invert_pairs(run, batch, InversionConfig(inversion_steps=3, fidelity=fidelity), renoise=1)
    t, latents = noised.t, torch.cat([batch.chosen, batch.rejected])
    assert torch.equal(t[:3], run.timesteps(batch)) and torch.equal(t[:3], t[3:])
    assert not noised.x_t.requires_grad
    # v-prediction: x0 and noise are rotations of x_t and target, at the timestep that the network is told
    alpha, sigma = run.process.coefficients(t, latents)
    torch.testing.assert_close(alpha * noised.x_t - sigma * noised.target, latents, rtol=0, atol=1e-5)
    grid, start = ("exact", "clean") if fidelity == "paper" else ("floor", "sampler")
    cond = Conditioning.cat([batch.cond, batch.cond])
    x_t = invert(run.generator, cond, latents, t=t, steps=3, renoise=1, grid=grid, start=start)
    assert torch.equal(x_t, noised.x_t)


def test_inpo_is_dpo_of_the_inverted_pairs_and_repeats_itself(model: str) -> None:
    run, batch = exact_run(model), make_pairs()
    method = make_method("inpo", beta=5.0, inversion_steps=3)
    noised = invert_pairs(run, batch, method.config)
    policy, reference = noised.pair_errors(run.predict), noised.pair_errors(run.reference.predict)
    expected = diffusion_dpo(*policy, *reference, beta=5.0).mean()
    first, second = method.loss(run, batch), method.loss(run, batch)
    assert first.loss.item() == second.loss.item() == expected.item()
    random = make_method("inpo", beta=5.0, inversion_steps=3, inversion_eta=0.5)
    assert random.loss(run, batch).loss.item() == random.loss(run, batch).loss.item() != first.loss.item()
    assert method.config.eta == 0 and make_method("inpo", fidelity="code").config.eta == 0.1
    assert make_method("inpo", fidelity="code", inversion_eta=0.0).config.eta == 0


@pytest.mark.parametrize(("name", "options"), [("smpo", {"scale": 0.2}), ("inpo", {})])
def test_policy_equal_to_reference_costs_log_two(model: str, name: str, options: dict[str, Any]) -> None:
    output = make_method(name, inversion_steps=2, **options).loss(exact_run(model, 0.0), make_pairs())
    assert output.loss.item() == pytest.approx(math.log(2), abs=1e-15) and output.metrics["logit"] == 0


def test_smpo_needs_scores_and_says_so_before_anything_is_read(model: str, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs", 4)
    with pytest.raises(UserError, match="4 of 4 pairs of .* have none .*pairs label --reward"):
        train(run_config("no/such-model", pairs, tmp_path / "out", "smpo"))


def test_capo_is_its_formula_and_takes_calibrated_scores_alone(model: str, tmp_path: Path) -> None:
    run, batch = exact_run(model), make_pairs()
    output = make_method("capo", beta=5.0, level_bias=0.5).loss(run, batch)
    policy, reference = (errors_by_hand(run, batch, predict) for predict in (run.predict, run.reference.predict))
    t = run.timesteps(batch)
    snr = (run.process.alpha(t) / run.process.sigma(t)).double() ** 2
    z = 2.5 * ((reference[0] - policy[0]) - (reference[1] - policy[1])) / (1 + snr * math.exp(-0.5))
    assert output.loss.item() == pytest.approx((batch.margins - z).square().mean().item(), rel=1e-6)
    plain = make_method("capo").loss(exact_run(model, 0.0), batch)
    assert plain.loss.item() == pytest.approx(batch.margins.square().mean().item(), rel=1e-12)
    # beyond 1, as PickScore's; all below 0.5, as those of HPS
    for score, found in ((-1.5, "-1.5 to 0.2"), (0.25, "0.2 to 0.25")):
        write_scored_pairs(tmp_path / "pairs.parquet", [0.2, score])
        with pytest.raises(UserError, match=f"win rates around 0.5, .* lie in {found}; .*--mode calibrated"):
            train(run_config("no/such-model", tmp_path / "pairs.parquet", tmp_path / "out", "capo"))


def write_scored_pairs(path: Path, rejected: list[float]) -> None:
    """Pairs in Pick-a-Pic's columns whose chosen image scores 0.2."""
    rows = []
    for index, score in enumerate(rejected):
        sides = {f"jpg_{side}": write_png(seed=2 * index + side) for side in (0, 1)}
        labels = {"label_0": 1.0, "label_1": 0.0, "score_0": 0.2, "score_1": score}
        rows.append({"caption": "a red circle", **labels, **sides})
    pq.write_table(pa.Table.from_pylist(rows), path)


def test_smpo_learns_from_the_scores_of_labelled_pairs(model: str, tmp_path: Path) -> None:
    write_scored_pairs(tmp_path / "pairs.parquet", [0.0, -0.1, -0.2, -0.3])
    method = {"name": "smpo", "inversion_steps": 2, "scale": 0.5, "gamma": 1.0}
    output = train(run_config(model, tmp_path / "pairs.parquet", tmp_path / "out", method, steps=2, batch_size=4))
    # margins 0.2, 0.3, 0.4, 0.5, each once a step; weight tanh(margin)
    mean = sum(math.tanh(margin) for margin in (0.2, 0.3, 0.4, 0.5)) / 4
    assert losses(output, "weight") == pytest.approx({1: mean, 2: mean}, rel=1e-6)


def test_smpo_takes_its_scale_from_the_data_and_refuses_one_that_saturates(tmp_path: Path) -> None:
    # PickScore as a cosine in the authors' data spans 0.28202 - 0.11544; ours is 100 times that
    for factor in (1, 100):
        scores = [(factor * high, factor * low) for high, low in ((0.22, 0.21), (0.28202, 0.11544), (0.2, 0.19))]
        table = SimpleNamespace(
            name="pairs",
            require_margins=lambda _, scores=scores: [high - low for high, low in scores],
            score_range=(factor * 0.11544, factor * 0.28202),
        )
        method = make_method("smpo")
        method.check_data(table)
        weight = smpo_weight(torch.tensor([factor * 0.01]), scale=method.scale)
        assert weight.item() == pytest.approx(0.30, abs=0.001)
    with pytest.raises(
        UserError, match="method.scale 0.16658 .* median margin of their scores is 1, and they span 16.7"
    ):
        make_method("smpo", scale=0.16658).check_data(table)
    table.score_range = (3.0, 3.0)
    with pytest.raises(UserError, match="all scores of pairs are 3"):
        make_method("smpo").check_data(table)


def test_kto_is_its_formula_and_starts_at_one_half(model: str) -> None:
    run, batch = exact_run(model), make_labels(4)
    method = make_method(
        "diffusion_kto", beta=5.0, utility="loss-averse", undesirable_weight=2.0, timesteps=(0.2, 0.9)
    )
    output = method.loss(run, batch)
    noise, t = run.noise_like(batch.images, batch.ids, 1), run.timesteps(batch, 200, 900)
    x_t, target = run.process.add_noise(batch.images, noise, t), run.process.target(batch.images, noise, t)
    policy, reference = (
        (predict(x_t, t, batch.cond) - target).square().mean(dim=(1, 2, 3))
        for predict in (run.predict, run.reference.predict)
    )
    gain = reference - policy
    centred = 5.0 * (gain - max(gain.mean().item(), 0.0)) * torch.tensor([1, -1, 1, -1])
    expected = (torch.tensor([1, 2, 1, 2]) * (1 - torch.nn.functional.logsigmoid(centred))).mean()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-10)
    assert float(output.metrics["gain"]) == pytest.approx(gain.mean().item())
    start = make_method("diffusion_kto").loss(exact_run(model, 0.0), batch)
    assert start.loss.item() == 0.5 and start.metrics["reference_point"] == 0 and start.metrics["accuracy"] == 0.5


def test_kto_learns_from_pairs_and_from_a_table_of_labels(model: str, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs", 4)
    table = pairs.parent / "labels.csv"
    table.write_text("image,caption,label\n0-chosen.png,a red circle,good\n1-rejected.png,a red circle,bad\n")
    for index, source in enumerate((pairs, table)):
        config = run_config(model, pairs, tmp_path / f"out{index}", "diffusion_kto", steps=2, data=labels_of(source))
        assert set(losses(train(config), "reference_point")) == {1, 2}


def labels_of(source: Path) -> dict[str, Any]:
    return {"pairs": None, "labels": str(source)}


def caption_errors(run: Run, batch: LabelBatch, predict: Any) -> list[Tensor]:
    """Errors under the fitting and under the other caption, each in a forward pass of its own."""
    noise, t = run.noise_like(batch.images, batch.ids, 1), run.timesteps(batch)
    x_t, target = run.process.add_noise(batch.images, noise, t), run.process.target(batch.images, noise, t)
    return [(predict(x_t, t, c) - target).square().mean(dim=(1, 2, 3)) for c in (batch.cond, batch.rejected_cond)]


def test_tpo_objectives_on_separate_forward_passes(model: str) -> None:
    run, batch = exact_run(model), make_labels(3)
    policy, reference = (caption_errors(run, batch, predict) for predict in (run.predict, run.reference.predict))
    output = make_method("tpo", beta=5.0).loss(run, batch)
    assert output.loss.item() == pytest.approx(diffusion_dpo(*policy, *reference, beta=5.0).mean().item(), rel=1e-10)
    gain = torch.cat(reference) - torch.cat(policy)
    signed = (gain - max(gain.mean().item(), 0.0)) * torch.tensor([1, 1, 1, -1, -1, -1])
    output = make_method("tpo", beta=5.0, objective="tkto").loss(run, batch)
    assert output.loss.item() == pytest.approx((1 - torch.sigmoid(5.0 * signed)).mean().item(), rel=1e-10)
    start = exact_run(model, 0.0)
    assert make_method("tpo").loss(start, batch).loss.item() == pytest.approx(math.log(2), abs=1e-15)
    assert make_method("tpo", objective="tkto").loss(start, batch).loss.item() == 0.5


def test_tpo_bounds_the_rejected_caption_by_default(model: str) -> None:
    """The rejected side adds 3 to the logit at most: beta / 2 times 6 / beta; Shapes' own 0.03 is that of beta 200."""
    assert [make_method("tpo", beta=beta).config.bound for beta in (200.0, 5000.0)] == [0.03, 0.0012]
    assert "bound 0.0012 on" in make_method("tpo", beta=5000.0).describe()
    run, batch = exact_run(model, 0.3), make_labels(3)
    policy, reference = (caption_errors(run, batch, predict) for predict in (run.predict, run.reference.predict))
    beta = 1e5
    assert (policy[1] - reference[1] > 6 / beta).any()
    z = beta / 2 * ((reference[0] - policy[0]) + torch.minimum(policy[1] - reference[1], torch.tensor(6 / beta)))
    output = make_method("tpo", beta=beta).loss(run, batch)
    assert output.loss.item() == pytest.approx(torch.nn.functional.softplus(-z).mean().item(), rel=1e-9)
    free = make_method("tpo", beta=beta, rejected_rise=math.inf)
    assert "no bound" in free.describe()
    expected = diffusion_dpo(*policy, *reference, beta=beta).mean().item()
    assert free.loss(run, batch).loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_equal_captions_teach_nothing(model: str) -> None:
    run, batch = exact_run(model), make_labels(3)
    output = make_method("tpo", beta=2000.0).loss(run, replace(batch, rejected_cond=batch.cond))
    assert output.metrics["logit"] == 0 and output.loss.item() == pytest.approx(math.log(2), abs=1e-15)
    gradients = torch.autograd.grad(output.loss, list(run.generator.trainable_parameters()))
    # Both sides' gradients are opposite to the bit, and add up in an order that torch chooses.
    assert max(gradient.abs().max().item() for gradient in gradients) < 1e-12


def test_tpo_trains_on_perturbed_captions_and_refuses_labels_without_them(model: str, tmp_path: Path) -> None:
    pairs, captions = write_pairs(tmp_path / "pairs", 4), tmp_path / "captions.parquet"
    with pytest.raises(UserError, match="8 images .* 8 have no caption_rejected and 4 are bad.*pairs perturb"):
        train(run_config("no/such-model", pairs, tmp_path / "out", "tpo", data=labels_of(pairs)))
    assert main(["pairs", "perturb", str(pairs), "--out", str(captions)]) == 0
    output = train(run_config(model, pairs, tmp_path / "out", "tpo", steps=2, data=labels_of(captions)))
    assert set(losses(output, "policy_rejected")) == {1, 2}


@pytest.mark.parametrize("family", ["epsilon, full", "xl, lora"])
def test_every_method_trains_every_family(family: str, tmp_path: Path) -> None:
    xl = family.startswith("xl")
    generator = load_generator((build_tiny_sdxl if xl else build_tiny_sd)(tmp_path / "model"), device="cpu")
    texts = generator.encode_prompts(["a red circle", "two blue stars", "a square"])
    if xl:
        generator.add_adapter(4, seed=1)
    else:
        generator.network.requires_grad_(True)
    run = Run(generator, reference=Reference(generator, "adapter" if xl else "copy"))
    pairs, labels = InMemoryPairs(3).batch(range(3), 0, 0), make_labels(3)
    pairs = replace(pairs, cond=texts, margins=torch.tensor([0.1, 0.2, 0.3]))
    labels = replace(labels, images=labels.images.float(), cond=texts, rejected_cond=texts[[1, 2, 0]])
    for name in ("capo", "diffusion_kto", "inpo", "mapo", "smpo", "tpo"):
        inverts = {"inpo": {"inversion_steps": 2}, "smpo": {"inversion_steps": 2, "scale": 0.2}}
        method = make_method(name, **inverts.get(name, {}))
        output = method.loss(run, labels if method.needs.source == "labels" else pairs)
        output.loss.backward()
        parameters = list(generator.trainable_parameters())
        assert output.loss.isfinite() and any(p.grad is not None and p.grad.any() for p in parameters), name
        generator.network.zero_grad(set_to_none=True)


RUNS: dict[str, dict[str, Any]] = {
    "robust": {"name": "diffusion_dpo", "loss_type": "robust", "label_smoothing": 0.1},
    "mapo": {"name": "mapo"},
    "inpo": {"name": "inpo", "inversion_steps": 2},
}


@pytest.mark.parametrize("method", RUNS.values(), ids=RUNS)
def test_the_engine_runs_it(model: str, method: dict[str, Any], tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs", 4)
    output = train(run_config(model, pairs, tmp_path / "out", method, steps=2))
    assert set(losses(output)) == {1, 2}
