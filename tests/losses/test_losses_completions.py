"""DPO and its descendants on completions: closed values, exact gradients, and where one objective is another."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from mmalign.losses import (
    beta_of_gap,
    chosen_anchor,
    completion_mean,
    completion_sum,
    diffusion_dpo,
    dpo,
    dpo_logit,
    rdpo,
    rrpo,
    rrpo_logit,
    runner_up_log_probs,
    select_by_divergence,
    sft,
    token_jsd,
    token_kl,
    vdpo,
)

LN2 = math.log(2)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def log_probs(seed: int, count: int = 3) -> list[Tensor]:
    return [-random(4, seed=seed + 10 * i).exp() for i in range(count)]


# ---------------------------------------------------------------------------------------------------------------- DPO


def test_dpo_by_hand() -> None:
    # Margin (-3 + 4) - (-5 + 4.5) = 1.5; at beta 0.2, z = 0.3.
    sides = [double(value) for value in (-3.0, -5.0, -4.0, -4.5)]
    z = 0.3
    assert dpo_logit(*sides, beta=0.2).item() == pytest.approx(z, abs=1e-15)
    softplus = lambda x: math.log1p(math.exp(x))  # noqa: E731
    for options, expected in (
        ({}, softplus(-z)),
        ({"loss_type": "hinge"}, 1 - z),
        ({"loss_type": "ipo"}, (1.5 - 1 / 0.4) ** 2),
        ({"label_smoothing": 0.1}, 0.9 * softplus(-z) + 0.1 * softplus(z)),
        ({"loss_type": "robust", "label_smoothing": 0.1}, (0.9 * softplus(-z) - 0.1 * softplus(z)) / 0.8),
        ({"loss_type": "hinge", "label_smoothing": 0.25}, 0.75 * (1 - z) + 0.25 * (1 + z)),
    ):
        assert dpo(*sides, beta=0.2, **options).item() == pytest.approx(expected, rel=1e-14)  # type: ignore[arg-type]


def test_a_beta_a_sample_is_each_samples_own() -> None:
    sides = [value.repeat(2) for value in log_probs(0, 4)]
    betas = torch.cat([double(0.1, 0.2, 0.5, 1.0), double(2.0, 0.3, 0.1, 0.7)])
    for kind in ("sigmoid", "hinge", "ipo", "robust"):
        together = dpo(*sides, beta=betas, loss_type=kind, label_smoothing=0.1)  # type: ignore[arg-type]
        for row, beta in enumerate(betas.tolist()):
            one = dpo(*(side[row : row + 1] for side in sides), beta=beta, loss_type=kind, label_smoothing=0.1)  # type: ignore[arg-type]
            assert together[row].item() == pytest.approx(one.item(), rel=1e-14)
    with pytest.raises(ValueError, match="positive everywhere"):
        dpo(*sides, beta=betas - 0.1)


def test_the_length_normalised_form_ignores_lengths() -> None:
    tokens, mask = double(-1.0, -3.0, 0.0, 0.0)[None], torch.tensor([[True, True, False, False]])
    twice, both = double(-1.0, -3.0, -1.0, -3.0)[None], torch.ones(1, 4, dtype=torch.bool)
    zero = double(0.0)
    values = [
        dpo(completion_mean(*side), zero, zero, zero, beta=2.0).item() for side in ((tokens, mask), (twice, both))
    ]
    assert values == pytest.approx([math.log1p(math.exp(4.0))] * 2, rel=1e-14)
    assert completion_sum(twice, both) == 2 * completion_sum(tokens, mask)


def test_diffusion_dpo_is_this_one_of_negative_errors_at_half_the_beta() -> None:
    errors = [random(5, seed=i).abs() for i in range(4)]
    for kind in ("sigmoid", "hinge", "robust"):
        ours = dpo(*(-error for error in errors), beta=3.0, loss_type=kind, label_smoothing=0.2)  # type: ignore[arg-type]
        theirs = diffusion_dpo(*errors, beta=6.0, loss_type=kind, label_smoothing=0.2)  # type: ignore[arg-type]
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0)


def test_nonsense_is_refused() -> None:
    sides = log_probs(0, 4)
    for options, word in (({"beta": 0.0}, "beta"), ({"beta": 1.0, "label_smoothing": 0.5}, "label_smoothing"),
                          ({"beta": math.nan}, "beta")):  # fmt: skip
        with pytest.raises(ValueError, match=word):
            dpo(*sides, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="anchor_weight=-1"):
        rdpo(tuple(sides[:3]), tuple(sides[:3]), beta=1.0, anchor_weight=-1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="alpha=-0.1"):
        rrpo(sides[0], random(4, 2), torch.ones(4, 2, dtype=torch.bool), alpha=-0.1)


def test_beta_of_gap_rises_from_beta_to_half_more_and_stays_positive() -> None:
    gaps = double(0.0, 2.0, 1e9, -2 * math.log(3) - 1e-3, -1e9)
    values = beta_of_gap(gaps, beta=0.1)
    expected = [0.1, 0.1 * (1 + 0.5 * (1 - math.exp(-1))), 0.15, 1e-3, 1e-3]
    assert values.tolist() == pytest.approx(expected, rel=1e-12)
    assert (beta_of_gap(torch.linspace(-4, 9, 99).double(), beta=0.1).diff() >= 0).all()
    assert beta_of_gap(gaps, beta=0.1, rise=0.0).tolist() == [0.1] * 5


# ------------------------------------------------------------------------------------------- at and near the reference


def _rrpo_of_sums(*sides: Tensor, beta: float) -> Tensor:
    ones = torch.ones_like(sides[0], dtype=torch.bool)[:, None]
    z = rrpo_logit(*(side[:, None] for side in sides), ones, ones, beta=beta)
    return rrpo(z, torch.zeros_like(ones, dtype=torch.float64), ones)


OBJECTIVES: dict[str, tuple[int, int, Callable[[list[Tensor], list[Tensor], float], Tensor]]] = {
    "dpo": (2, 1, lambda p, r, b: dpo(*p, *r, beta=b)),
    "rrpo": (2, 1, lambda p, r, b: _rrpo_of_sums(*p, *r, beta=b)),
    "vdpo": (2, 1, lambda p, r, b: vdpo(*p, *r, beta=b)),
    "anchor": (1, 1, lambda p, r, b: chosen_anchor(*p, *r, beta=b)),
    "rdpo": (3, 2, lambda p, r, b: rdpo(tuple(p), tuple(r), beta=b)),  # type: ignore[arg-type]
    "mdpo": (3, 3, lambda p, r, b: rdpo(tuple(p), tuple(r), beta=b, anchor_weight=1.0)),  # type: ignore[arg-type]
}
MARGINS = {  # d(sum of margins) / d(log-prob of chosen, rejected or perturbed, chosen given other media)
    "dpo": (1, -1),
    "rrpo": (1, -1),
    "vdpo": (1, -1),
    "anchor": (1,),
    "rdpo": (2, -1, -1),
    "mdpo": (3, -1, -1),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_at_the_reference_each_sigmoid_costs_log_two_and_pulls_half_of_beta(name: str) -> None:
    sides, sigmoids, objective = OBJECTIVES[name]
    reference = log_probs(1, sides)
    policy = [value.clone().requires_grad_() for value in reference]
    loss = objective(policy, reference, 0.3)
    assert loss.tolist() == pytest.approx([sigmoids * LN2] * 4, abs=1e-15)
    loss.sum().backward()
    for value, margin in zip(policy, MARGINS[name], strict=True):
        assert value.grad is not None and value.grad.tolist() == pytest.approx([-0.15 * margin] * 4, abs=1e-15)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    sides, _, objective = OBJECTIVES[name]
    reference = log_probs(1, sides)
    policy = [value.requires_grad_() for value in log_probs(2, sides)]
    assert gradcheck(lambda *p: objective(list(p), reference, 0.7), policy)


# --------------------------------------------------------------------------------------------------------------- RRPO


class Toy:
    """A policy that is a table of logits `[batch, tokens, vocabulary]`, with a reference and fixed tokens."""

    def __init__(self) -> None:
        self.chosen, self.rejected = (random(2, 4, 5, seed=seed).requires_grad_() for seed in (0, 1))
        self.reference = [random(2, 4, 5, seed=seed) for seed in (2, 3)]
        rng = torch.Generator().manual_seed(4)
        self.ids = [torch.randint(5, (2, 4), generator=rng) for _ in range(2)]
        self.mask = torch.tensor([[True] * 4, [True, True, True, False]])

    def log_probs(self) -> list[Tensor]:
        both = [*zip((self.chosen, self.rejected), self.ids, strict=True), *zip(self.reference, self.ids, strict=True)]
        return [table.log_softmax(-1).gather(-1, ids[..., None])[..., 0] for table, ids in both]

    def rrpo(self, chosen_differs: Tensor, rejected_differs: Tensor, alpha: float) -> Tensor:
        z = rrpo_logit(*self.log_probs(), chosen_differs, rejected_differs, beta=0.4)
        return rrpo(z, token_kl(self.reference[0], self.chosen), self.mask, alpha=alpha)


def test_rrpo_on_all_tokens_without_the_divergence_is_dpo() -> None:
    toy = Toy()
    sums = [completion_sum(values, toy.mask) for values in toy.log_probs()]
    torch.testing.assert_close(toy.rrpo(toy.mask, toy.mask, 0.0), dpo(*sums, beta=0.4), rtol=1e-13, atol=0)


def test_rrpo_teaches_differing_tokens_and_bounds_the_rest_of_the_chosen() -> None:
    toy = Toy()
    marks = [torch.zeros(2, 4, dtype=torch.bool) for _ in range(2)]
    marks[0][0, 1] = marks[1][0, 2] = True  # the second pair has no mark
    toy.rrpo(*marks, alpha=0.0).sum().backward()
    for table, mark in ((toy.chosen, marks[0]), (toy.rejected, marks[1])):
        assert table.grad is not None and (table.grad[~mark] == 0).all() and (table.grad[mark].abs() > 0).any()
    toy.chosen.grad = toy.rejected.grad = None
    loss = toy.rrpo(*marks, alpha=0.5)
    loss[1].backward()
    assert toy.rejected.grad is not None and (toy.rejected.grad == 0).all()
    # Only alpha * KL is left for a pair without marks: alpha * (softmax(policy) - softmax(reference)) on its tokens.
    expected = 0.5 * (toy.chosen.detach().softmax(-1) - toy.reference[0].softmax(-1)) * toy.mask[..., None]
    assert toy.chosen.grad is not None and (toy.chosen.grad[0] == 0).all()
    torch.testing.assert_close(toy.chosen.grad[1], expected[1], rtol=1e-12, atol=1e-15)
    kl = (toy.reference[0].softmax(-1) * (toy.reference[0].log_softmax(-1) - toy.chosen.log_softmax(-1))).sum(-1)
    assert loss[1].item() == pytest.approx(LN2 + 0.5 * kl[1][:3].sum().item(), rel=1e-13)


def test_rrpo_is_log_two_at_the_reference_and_adds_up_over_any_phrases() -> None:
    toy = Toy()
    toy.chosen, toy.rejected = toy.reference
    assert toy.rrpo(toy.mask, toy.mask, 0.5).tolist() == pytest.approx([LN2] * 2, abs=1e-14)
    values = Toy().log_probs()
    parts = [torch.zeros_like(toy.mask), torch.zeros_like(toy.mask)]
    parts[0][:, :2], parts[1][:, 2:] = toy.mask[:, :2], toy.mask[:, 2:]
    whole = rrpo_logit(*values, toy.mask, toy.mask, beta=0.4)
    apart = sum(rrpo_logit(*values, part, part, beta=0.4) for part in parts)
    torch.testing.assert_close(whole, apart, rtol=1e-13, atol=1e-15)
    twice = rrpo_logit(*(torch.cat([value] * 2, 1) for value in values), *[torch.cat([toy.mask] * 2, 1)] * 2, beta=0.4)
    torch.testing.assert_close(twice, 2 * whole, rtol=1e-13, atol=1e-15)


def test_rrpo_gradients_are_those_of_finite_differences() -> None:
    toy = Toy()

    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        toy.chosen, toy.rejected = chosen, rejected
        return toy.rrpo(toy.mask, toy.mask, 0.3)

    assert gradcheck(loss, (random(2, 4, 5).requires_grad_(), random(2, 4, 5, seed=1).requires_grad_()))


# ------------------------------------------------------------------------------------------------- media as the choice


def test_rdpo_is_dpo_plus_a_visual_term_and_mdpo_adds_the_anchor() -> None:
    policy, reference = tuple(log_probs(1)), tuple(log_probs(2))
    text = dpo(policy[0], policy[1], reference[0], reference[1], beta=0.5)
    visual = dpo(policy[0], policy[2], reference[0], reference[2], beta=0.5)
    torch.testing.assert_close(rdpo(policy, reference, beta=0.5) - text, visual, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(rdpo(policy, reference, beta=0.5, visual_weight=0.0), text, rtol=0, atol=0)
    anchored = rdpo(policy, reference, beta=0.5, anchor_weight=1.0) - rdpo(policy, reference, beta=0.5)
    torch.testing.assert_close(anchored, chosen_anchor(policy[0], reference[0], beta=0.5), rtol=1e-13, atol=1e-15)
    blind = (policy[0], policy[1], policy[0]), (reference[0], reference[1], reference[0])
    torch.testing.assert_close(rdpo(*blind, beta=0.5), text + LN2, rtol=1e-14, atol=0)


def test_the_anchor_always_raises_the_chosen_and_its_margin_raises_the_bar() -> None:
    policy, reference = double(-3.0, 0.0, 3.0).requires_grad_(), double(0.0, 0.0, 0.0)
    chosen_anchor(policy, reference, beta=1.0).sum().backward()
    assert policy.grad is not None and (policy.grad < 0).all()
    assert chosen_anchor(double(0.5), double(0.0), beta=2.0, margin=1.0).item() == pytest.approx(LN2, abs=1e-15)


def test_sft_beside_dpo_is_the_mean_cross_entropy() -> None:
    toy = Toy()
    values = toy.log_probs()[0]
    expected = [-values[0].mean().item(), -values[1][:3].mean().item()]
    assert sft(values, toy.mask).tolist() == pytest.approx(expected, rel=1e-14)


def test_an_unchanged_video_costs_log_two_and_teaches_nothing() -> None:
    table = random(4, seed=5).requires_grad_()
    loss = vdpo(table, table, *log_probs(3, 1) * 2, beta=0.9)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([LN2] * 4, abs=1e-15)
    assert table.grad is not None and (table.grad == 0).all()


def test_swapping_videos_turns_the_margin_round() -> None:
    policy, reference = log_probs(1, 2), log_probs(2, 2)
    z = dpo_logit(*policy, *reference, beta=0.5)
    torch.testing.assert_close(dpo_logit(*policy[::-1], *reference[::-1], beta=0.5), -z, rtol=0, atol=0)


def test_a_weight_scales_the_loss_and_is_not_learnt_from() -> None:
    policy, reference = [value.requires_grad_() for value in log_probs(1, 2)], log_probs(2, 2)
    weight = double(0.0, 0.5, 1.0, 1.0).requires_grad_()
    loss = vdpo(*policy, *reference, beta=0.5, weight=weight)
    torch.testing.assert_close(loss, weight.detach() * vdpo(*policy, *reference, beta=0.5), rtol=0, atol=0)
    loss.sum().backward()
    assert weight.grad is None and policy[0].grad is not None and policy[0].grad[0] == 0


def test_selection_takes_the_most_noticed_of_the_relevant() -> None:
    divergence = torch.stack([double(0.3, 0.02, 0.01), *[double(0.3, 0.2, 0.1)] * 2, double(0.0, 0.0, 0.0)])
    relevance = torch.tensor([[0.4, 0.9, 0.6], [0.9, 0.9, 0.9], [0.1, 0.2, 0.3], [1.0, 1.0, 1.0]]).double()
    index, weight = select_by_divergence(divergence, relevance)
    assert index.tolist()[:2] == [1, 0]
    # 0.02 of the 0.05 that count fully; more than that; nothing relevant; nothing noticed.
    assert weight.tolist() == pytest.approx([0.4, 1.0, 0.0, 0.0], rel=1e-12)
    with pytest.raises(ValueError, match="full_weight_at"):
        select_by_divergence(divergence, relevance, full_weight_at=0.0)


def test_an_oracle_takes_the_operator_that_its_question_is_about() -> None:
    """It knows direction and colour; a perturbation that changes what is asked moves its answer, another does not."""
    right, wrong = double(4.0, -4.0), double(-4.0, 4.0)
    # Candidates: reverse, recolour. Questions: direction, colour.
    given = torch.stack([torch.stack([wrong, right]), torch.stack([right, wrong])])
    divergence = torch.stack([token_jsd(right.expand(2, 1, 2), given[:, k, None])[:, 0] for k in range(2)], 1)
    index, weight = select_by_divergence(divergence, torch.ones(2, 2).double())
    assert index.tolist() == [0, 1] and weight.tolist() == [1.0, 1.0]
    blind = token_jsd(right.expand(2, 1, 2), right.expand(2, 1, 2))[:, 0]
    assert select_by_divergence(torch.stack([blind, blind], 1), torch.ones(2, 2).double())[1].tolist() == [0.0, 0.0]


def test_the_runner_up_is_the_argmax_unless_that_is_the_token_itself() -> None:
    table = random(2, 3, 6, seed=7)
    best = table.argmax(-1)
    values = table.log_softmax(-1)
    second = values.sort(-1, descending=True).values[..., 1]
    torch.testing.assert_close(runner_up_log_probs(table, best), second, rtol=1e-13, atol=0)
    for shift in (1, 2, 3, 4, 5):  # whatever other token is given, the argmax is scored
        other = (best + shift) % 6
        scored = runner_up_log_probs(table, other)
        torch.testing.assert_close(scored, values.max(-1).values, rtol=1e-13, atol=0)
        assert (scored > values.gather(-1, other[..., None])[..., 0]).all()
