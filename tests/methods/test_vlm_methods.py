"""Methods on pairs of answers, held to their formulas on one forward pass a sample, in float64 away from the start."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_vlms
import torch
from tiny_runs import write_answer_pairs
from tiny_vlms import build_llava_onevision
from torch import Tensor

from mmalign.config.sections import DataConfig
from mmalign.core.errors import UserError
from mmalign.core.precision import autocast, round_frozen
from mmalign.data.batches import TimedMedia, VlmPairBatch
from mmalign.data.encoded.vlm_samples import VlmPairs
from mmalign.data.video.operators import perturb
from mmalign.data.vlm_pairs import read_vlm_pairs
from mmalign.methods import methods
from mmalign.methods.base import Method
from mmalign.methods.rdpo import nearest_others
from mmalign.methods.reference import Reference
from mmalign.methods.run import VlmRun
from pipelines import VisionLanguageModel, load_vlm

Video = Tensor
CHOSEN, REJECTED = ("it falls", "red"), ("it rises", "rad!")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> VlmRun:
    """A policy that has moved away from its reference."""
    folder = build_llava_onevision(tmp_path_factory.mktemp("models") / "vlm")
    model = load_vlm(folder, device="cpu", dtype=torch.float64)
    model.add_adapter(2, seed=1)
    model.network.double()
    source = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=source))
    return VlmRun(model, reference=Reference(model, "adapter"), seed=7)


def video(seed: int) -> Video:
    source = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (4, 3, 16, 16), generator=source).to(torch.uint8)


def media(seed: int) -> Callable[[], TimedMedia]:
    return lambda: TimedMedia((video(seed),), 1.0)


def make_batch(model: VisionLanguageModel, others: tuple[int, int] = (0, 1)) -> VlmPairBatch:
    """Two pairs about videos 0 and 1; the rejected answers are about `others`."""
    asked = [model.encode_prompt("what?", [video(index)]) for index in (0, 1)]
    other = [model.encode_prompt("what?", [video(index)]) for index in others]
    return VlmPairBatch(
        prompts=["what?", "what?"],
        chosen=[model.complete(one, text) for one, text in zip(asked, CHOSEN, strict=True)],
        rejected=[model.complete(one, text) for one, text in zip(other, REJECTED, strict=True)],
        media=[media(0), media(1)],
        ids=["a", "b"],
        epoch=3,
        margins=torch.tensor([0.5, 3.0], dtype=torch.float64),
    )


def make(name: str, **options: Any) -> Method[Any]:
    chosen = methods.get(name)
    method: Method[Any] = chosen(chosen.Config(**options))
    return method


def alone(run: VlmRun, shown: Video, answer: str) -> tuple[Tensor, Tensor]:
    """Logits and log-probs of one answer's tokens in a batch of its own, under (policy, reference), stacked."""
    model = run.model
    batch = model.encode(["what?"], [[shown]], [answer])
    logits = [model.completion_logits(batch)[0]]
    with model.adapter_disabled():
        logits.append(model.completion_logits(batch)[0])
    stacked = torch.stack(logits)
    probabilities = stacked.exp() / stacked.exp().sum(-1, keepdim=True)
    return probabilities, probabilities.log()[:, torch.arange(stacked.shape[1]), batch.completion_ids[0]]


def delta(run: VlmRun, shown: Video, answer: str) -> float:
    """The log-probability of an answer under the policy minus that under the reference."""
    policy, reference = alone(run, shown, answer)[1].sum(1).tolist()
    return policy - reference


def log_sigmoid(z: float) -> float:
    return -math.log(1 + math.exp(-z))


def text_margins(run: VlmRun) -> list[float]:
    return [delta(run, video(i), CHOSEN[i]) - delta(run, video(i), REJECTED[i]) for i in (0, 1)]


def test_vlm_dpo_is_its_formula(run: VlmRun) -> None:
    batch = make_batch(run.model)
    margins = text_margins(run)
    assert max(map(abs, margins)) > 0.1  # the policy has moved
    output = make("vlm_dpo", beta=0.3).loss(run, batch)
    assert output.loss.item() == pytest.approx(sum(-log_sigmoid(0.3 * one) for one in margins) / 2, abs=1e-9)
    assert float(output.metrics["logit"]) == pytest.approx(0.3 * sum(margins) / 2, abs=1e-9)

    options = {"beta": 0.3, "label_smoothing": 0.1, "sft_weight": 0.2, "anchor_weight": 0.5, "dynamic_beta_scale": 0.5}
    expected = 0.0
    for i, gap in enumerate((0.5, 3.0)):
        beta = 0.3 * (1 + 0.5 * (1 - math.exp(-0.5 * gap)))
        z = beta * margins[i]
        policy = alone(run, video(i), CHOSEN[i])[1][0]
        expected += -0.9 * log_sigmoid(z) - 0.1 * log_sigmoid(-z) - 0.2 * policy.mean().item()
        expected -= 0.5 * log_sigmoid(beta * delta(run, video(i), CHOSEN[i]))
    assert make("vlm_dpo", **options).loss(run, batch).loss.item() == pytest.approx(expected / 2, abs=1e-9)

    # Tokens are bytes, and the end is one.
    expected = 0.0
    for i in (0, 1):
        per_token = delta(run, video(i), CHOSEN[i]) / (len(CHOSEN[i]) + 1)
        expected -= log_sigmoid(2.0 * (per_token - delta(run, video(i), REJECTED[i]) / (len(REJECTED[i]) + 1)))
    output = make("vlm_dpo", beta=2.0, length_normalised=True).loss(run, batch)
    assert output.loss.item() == pytest.approx(expected / 2, abs=1e-9)


def test_vlm_sft_is_the_cross_entropy_of_chosen_answers(run: VlmRun) -> None:
    means = [alone(run, video(i), CHOSEN[i])[1][0].mean().item() for i in (0, 1)]
    found = make("vlm_sft").loss(run, make_batch(run.model)).loss
    assert found.item() == pytest.approx(-sum(means) / 2, abs=1e-9)


def test_the_rejected_side_may_have_media_of_its_own(run: VlmRun) -> None:
    z = [0.3 * (delta(run, video(i), CHOSEN[i]) - delta(run, video(5 + i), REJECTED[i])) for i in (0, 1)]
    found = make("vlm_dpo", beta=0.3).loss(run, make_batch(run.model, others=(5, 6))).loss
    assert found.item() == pytest.approx(sum(map(lambda one: -log_sigmoid(one), z)) / 2, abs=1e-9)


def test_rrpo_is_its_formula(run: VlmRun) -> None:
    # "it falls" / "it rises": "fall" against "rise" at bytes 3 to 6; "red" / "rad!": byte 1, and an insertion at 3.
    spans = [(slice(3, 7), slice(3, 7)), ([1], [1, 3])]
    expected, bounds = 0.0, []
    for i, (own, other) in enumerate(spans):
        probabilities, chosen = alone(run, video(i), CHOSEN[i])
        rejected = alone(run, video(i), REJECTED[i])[1]
        u = float((chosen[0] - chosen[1])[own].sum() - (rejected[0] - rejected[1])[other].sum())
        policy, reference = probabilities
        bounds.append(float((reference * (reference.log() - policy.log())).sum()))
        expected += -log_sigmoid(0.3 * u) + 0.05 * bounds[-1]
    output = make("rrpo", beta=0.3, alpha=0.05).loss(run, make_batch(run.model))
    assert output.loss.item() == pytest.approx(expected / 2, abs=1e-9)
    assert float(output.metrics["distance"]) == pytest.approx(sum(bounds) / 2, abs=1e-9)
    assert float(output.metrics["differing_tokens"]) == (4 + 4 + 1 + 2) / 4


def test_vdpo_with_one_perturbation_is_its_formula(run: VlmRun) -> None:
    z = [0.3 * (delta(run, video(i), CHOSEN[i]) - delta(run, video(i).flip(0), CHOSEN[i])) for i in (0, 1)]
    method = make("vdpo", beta=0.3, selection="random", operators=["reverse"], anchor_weight=0.5)
    expected = sum(-log_sigmoid(one) for one in z)
    expected -= 0.5 * sum(log_sigmoid(0.3 * delta(run, video(i), CHOSEN[i])) for i in (0, 1))
    assert method.loss(run, make_batch(run.model)).loss.item() == pytest.approx(expected / 2, abs=1e-9)

    frozen = [video(i)[:1].repeat(4, 1, 1, 1) for i in (0, 1)]
    still = replace(make_batch(run.model), media=[partial(TimedMedia, (one,), 1.0) for one in frozen])
    still.chosen = [
        run.model.complete(run.model.encode_prompt("what?", [one]), text)
        for one, text in zip(frozen, CHOSEN, strict=True)
    ]
    loss = make("vdpo", selection="random", operators=["reverse"]).loss(run, still).loss
    assert loss.item() == pytest.approx(math.log(2), abs=1e-9)
    gradients = torch.autograd.grad(loss, run.model.trainable_parameters())
    assert max(float(one.abs().max()) for one in gradients) < 1e-12


def test_vdpo_takes_what_the_prompt_notices_most(run: VlmRun) -> None:
    options: dict[str, Any] = {
        "beta": 0.3,
        "operators": ["reverse", "black"],
        "candidates": 2,
        "least_relevance": -1.0,
    }
    expected, weights = 0.0, []
    for i in (0, 1):
        shown = {"reverse": video(i).flip(0), "black": torch.zeros_like(video(i))}
        clean = alone(run, video(i), CHOSEN[i])[0][0]
        found = {}
        for name, other in shown.items():
            moved = alone(run, other, CHOSEN[i])[0][0]
            middle = (clean + moved) / 2
            terms = clean * (clean / middle).log() + moved * (moved / middle).log()
            found[name] = float(terms.sum(-1).mean() / 2)
        best = max(found, key=lambda name: found[name])
        weights.append(min(found[best] / 0.5, 1.0))
        z = 0.3 * (delta(run, video(i), CHOSEN[i]) - delta(run, shown[best], CHOSEN[i]))
        expected -= weights[-1] * log_sigmoid(z)
    output = make("vdpo", **options, full_weight_at=0.5).loss(run, make_batch(run.model))
    assert output.loss.item() == pytest.approx(expected / 2, abs=1e-6)  # features are compared in float32
    assert float(output.metrics["weight"]) == pytest.approx(sum(weights) / 2, abs=1e-9)
    # Media that look like nothing of the scene are passed over, and where none stays a pair counts for nothing.
    output = make("vdpo", **{**options, "operators": ["black"], "least_relevance": 1.0}).loss(
        run, make_batch(run.model)
    )
    assert output.loss.item() == 0


def test_what_vdpo_draws_depends_on_seed_id_and_epoch_alone(run: VlmRun) -> None:
    method = make("vdpo", selection="random", operators=["crop", "mask", "hue", "block_shuffle"])
    batch = make_batch(run.model)
    first = method._perturbed(run, batch)[0][1].vision["pixel_values_videos"]
    rest = replace(batch, prompts=["what?"], chosen=batch.chosen[1:], media=batch.media[1:], ids=["b"])
    again = method._perturbed(run, rest)[0][0].vision["pixel_values_videos"]
    later = method._perturbed(run, replace(rest, epoch=4))[0][0].vision["pixel_values_videos"]
    assert torch.equal(first, again) and not torch.equal(first, later)


def test_rdpo_with_a_column_is_its_formula(run: VlmRun) -> None:
    method = make("rdpo", beta=0.3, unseen="column", visual_weight=0.7, anchor_weight=0.5)
    expected = 0.0
    for i, margin in enumerate(text_margins(run)):
        own = delta(run, video(i), CHOSEN[i])
        visual = own - delta(run, video(5 + i), CHOSEN[i])
        expected -= log_sigmoid(0.3 * margin) + 0.7 * log_sigmoid(0.3 * visual) + 0.5 * log_sigmoid(0.3 * own)
    found = method.loss(run, make_batch(run.model, others=(5, 6))).loss
    assert found.item() == pytest.approx(expected / 2, abs=1e-9)


def test_rdpo_retrieves_the_nearest_other_media(run: VlmRun, tmp_path: Path) -> None:
    from mmalign.core.io.video_files import write_video

    path = write_answer_pairs(tmp_path, 4)
    # Video 2 is nearly video 0; video 3 is video 1 in another file, and so no other medium.
    near = (video(10).int() + perturb("frame_noise", torch.zeros(4, 3, 16, 16), seed=1).mul(20).int()).clamp(0, 255)
    for index, frames in enumerate((video(10), video(11), near.to(torch.uint8), video(11))):
        write_video(tmp_path / f"{index}.mkv", frames, 4.0)
    data = DataConfig(pairs=str(path), cache=str(tmp_path))
    pairs = VlmPairs(read_vlm_pairs(str(path), data), run.model, data, model_id="m", precision="fp32")
    nearest = nearest_others(run, pairs)
    assert nearest[0] == 2 and nearest[2] == 0
    assert nearest[1] in (0, 2) and nearest[3] == nearest[1]
    exact = VlmRun(run.model, reference=run.reference, samples=pairs)
    method = make("rdpo", beta=0.3)
    method.begin(exact)
    batch = pairs.batch([0], 0, 0)
    (unseen,) = method._unseen(exact, batch)
    assert torch.equal(
        unseen.vision["pixel_values_videos"], pairs.batch([2], 0, 0).chosen[0].vision["pixel_values_videos"]
    )
    assert torch.equal(unseen.completion_ids, batch.chosen[0].completion_ids)
    assert torch.equal(unseen.prompt_ids, batch.chosen[0].prompt_ids)


@pytest.mark.parametrize(
    ("name", "options", "columns", "message"),
    [
        ("vlm_dpo", {"dynamic_beta_scale": 0.5}, {"margin": [1.0, None]}, "1 of 2 pairs .* lack \\('pair-1' first\\)"),
        ("vdpo", {"operators": ["revers"]}, {}, "did you mean 'reverse'"),
        ("vdpo", {"operators": ["neighbour"]}, {}, "rdpo with unseen: retrieved"),
        ("rdpo", {"unseen": "column"}, {}, "2 of 2 pairs"),
        ("temple", {}, {"difficulty": [16, 8]}, "no pair of difficulty 4, 2"),
    ],
)
def test_data_that_a_method_cannot_learn_from(
    tmp_path: Path, name: str, options: dict[str, Any], columns: dict[str, Any], message: str
) -> None:
    path = write_answer_pairs(tmp_path, 2, **columns)
    with pytest.raises(UserError, match=message):
        make(name, **options).check_data(read_vlm_pairs(str(path), DataConfig(pairs=str(path))))


@pytest.mark.parametrize("name", tiny_vlms.BUILDERS)
def test_rounding_frozen_layers_changes_no_answer_of_a_tied_model(name: str, tmp_path: Path) -> None:
    model = load_vlm(tiny_vlms.tie(tiny_vlms.BUILDERS[name](tmp_path / "a"), tmp_path / "b"), device="cpu")
    head, embeddings = model.network.get_output_embeddings(), model.network.get_input_embeddings()
    assert head.weight is embeddings.weight
    model.add_adapter(2)
    batch = model.encode(["what?", "and?"], [[video(0)], [video(1)]], ["red", "a blue one"])
    with torch.no_grad(), autocast("bf16", torch.device("cpu")):
        before, _ = model.log_probs(batch)
        round_frozen(model.network, "bf16")
        after, _ = model.log_probs(batch)
    assert torch.equal(after, before)
    assert head.weight is embeddings.weight and embeddings.weight.dtype == torch.float32
    layers = [one for one in model.network.modules() if isinstance(one, torch.nn.Linear) and one is not head]
    assert sum(one.weight.dtype == torch.bfloat16 for one in layers) > 7  # the others are stored rounded
