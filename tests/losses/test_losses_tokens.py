"""Sums, divergences and spans of tokens, as numbers worked out by hand, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from mmalign.losses import (
    completion_mean,
    completion_sum,
    sampled_kl,
    sft,
    span_masks,
    token_jsd,
    token_kl,
)

NAN = math.nan


def double(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def logits(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------------------- sums and means


def test_sums_and_means_count_masked_tokens_alone() -> None:
    values = double([[-1.0, -2.0, NAN], [-0.5, -0.25, -4.0], [NAN, NAN, NAN]]).requires_grad_()
    mask = torch.tensor([[True, True, False], [True, False, True], [False, False, False]])
    assert completion_sum(values, mask).tolist() == [-3.0, -4.5, 0.0]
    assert completion_mean(values, mask).tolist() == [-1.5, -2.25, 0.0]
    assert sft(values, mask).tolist() == [1.5, 2.25, 0.0]
    completion_mean(values, mask).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[0.5, 0.5, 0.0], [0.5, 0.0, 0.5], [0.0, 0.0, 0.0]]


def test_neither_padding_nor_its_side_changes_a_sum() -> None:
    values = double([[-1.0, -2.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, False, False]])
    for function in (completion_sum, completion_mean):
        assert (
            function(values, mask)
            == function(values.roll(2, 1), mask.roll(2, 1))
            == function(values[:, :2], mask[:, :2])
        )


# -------------------------------------------------------------------------------------------------------- divergences


def test_kl_of_two_coins() -> None:
    # Logits may be shifted freely; KL((3/4, 1/4) || (1/2, 1/2)) = 3/4 log(3/2) + 1/4 log(1/2).
    reference, policy = double([[[math.log(3) + 7, 7.0]]]), double([[[-2.0, -2.0]]])
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert token_kl(reference, policy).item() == pytest.approx(forward, abs=1e-15)
    assert token_kl(policy, reference).item() == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2), abs=1e-15)


def test_kl_is_zero_at_equal_distributions_alone_with_the_exact_gradient() -> None:
    reference, policy = logits(2, 3, 5), logits(2, 3, 5, seed=1).requires_grad_()
    assert (token_kl(reference, policy) > 1e-3).all()
    torch.testing.assert_close(token_kl(reference, reference + 4.0), double([[0.0] * 3] * 2), rtol=0, atol=1e-14)
    # d KL(ref || policy) / d logits = softmax(policy) - softmax(ref).
    token_kl(reference, policy).sum().backward()
    expected = policy.detach().softmax(-1) - reference.softmax(-1)
    torch.testing.assert_close(policy.grad, expected, rtol=1e-12, atol=1e-14)
    assert gradcheck(lambda x: token_kl(reference, x), policy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_divergences_of_extreme_logits_are_numbers(dtype: torch.dtype) -> None:
    reference = torch.tensor([[[1e4, -1e4, 0.0]]], dtype=dtype)
    policy = torch.tensor([[[-1e4, 1e4, 0.0]]], dtype=dtype, requires_grad=True)
    kl, jsd = token_kl(reference, policy), token_jsd(reference, policy)
    assert kl.item() == pytest.approx(2e4) and jsd.item() == pytest.approx(math.log(2))
    (kl + jsd).sum().backward()
    assert policy.grad is not None and policy.grad.isfinite().all()


def test_jsd_is_symmetric_from_zero_to_log_two() -> None:
    first, second = logits(2, 3, 7), logits(2, 3, 7, seed=1)
    torch.testing.assert_close(token_jsd(first, second), token_jsd(second, first), rtol=1e-13, atol=0)
    assert (token_jsd(first, second) > 0).all() and (token_jsd(9 * first, 9 * second) < math.log(2)).all()
    assert token_jsd(first, first + 3).abs().max() < 1e-14
    # p = (3/4, 1/4), q = (1/4, 3/4), middle (1/2, 1/2): 3/4 log(3/2) + 1/4 log(1/2).
    p, q = double([[[math.log(3), 0.0]]]), double([[[0.0, math.log(3)]]])
    assert token_jsd(p, q).item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-15)
    assert gradcheck(lambda x: token_jsd(first, x), second.requires_grad_())


def test_sampled_kl_is_right_on_average_over_the_policys_own_tokens() -> None:
    policy, reference = logits(1, 1, 6).log_softmax(-1), logits(1, 1, 6, seed=1).log_softmax(-1)
    exact = token_kl(policy, reference).item()
    for estimator in ("k1", "k3"):
        each = sampled_kl(policy[0], reference[0], estimator=estimator)
        assert (policy[0].exp() * each).sum().item() == pytest.approx(exact, rel=1e-12)
        assert sampled_kl(policy[0], policy[0], estimator=estimator).abs().max() == 0
    assert (sampled_kl(policy[0], reference[0]) > 0).all()


def test_an_unknown_estimator_is_refused(unchecked_shapes: None) -> None:
    with pytest.raises(ValueError, match="k2"):
        sampled_kl(logits(1, 2), logits(1, 2), estimator="k2")  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------------------- spans


def spans(chosen: str, rejected: str, pad: int = 0) -> tuple[str, str]:
    """The marked letters of both sides, unmarked ones as dots."""
    sides = [
        torch.tensor([[ord(letter) for letter in side] + [0] * pad], dtype=torch.long) for side in (chosen, rejected)
    ]
    masks = [torch.tensor([[True] * len(side) + [False] * pad], dtype=torch.bool) for side in (chosen, rejected)]
    marks = span_masks(sides[0], masks[0], sides[1], masks[1])
    assert not any(mark[0, len(side) :].any() for mark, side in zip(marks, (chosen, rejected), strict=True))
    return tuple(  # type: ignore[return-value]
        "".join(letter if mark[0, i] else "." for i, letter in enumerate(side))
        for mark, side in zip(marks, (chosen, rejected), strict=True)
    )


@pytest.mark.parametrize("pad", [0, 3])
@pytest.mark.parametrize(
    ("chosen", "rejected", "marked"),
    [
        ("abXcd", "abYZcd", ("..X..", "..YZ..")),  # replaced
        ("abcd", "abNcd", ("....", "..N..")),  # only the rejected side has it
        ("abNcd", "abcd", ("..N..", "....")),  # only the chosen side has it
        ("abcX", "abcY", ("...X", "...Y")),  # at the end
        ("Xab", "Yab", ("X..", "Y..")),  # at the start
        ("aXbcdYe", "aPbcdQRe", (".X...Y.", ".P...QR.")),  # two phrases
        ("abc", "abc", ("...", "...")),
        ("abc", "xyz", ("abc", "xyz")),
        ("ab", "", ("ab", "")),
    ],
)
def test_spans_cover_replaced_inserted_and_deleted_tokens(
    chosen: str, rejected: str, marked: tuple[str, str], pad: int
) -> None:
    assert spans(chosen, rejected, pad) == marked
    assert spans(rejected, chosen, pad) == marked[::-1]


def test_a_frequent_token_in_a_long_completion_is_still_compared() -> None:
    # difflib takes tokens that are frequent in sequences of 200 or more for junk, unless told otherwise.
    assert spans("a" * 300 + "X", "a" * 300 + "Y") == ("." * 300 + "X", "." * 300 + "Y")


def test_spans_are_found_row_by_row_and_on_either_side_of_the_padding() -> None:
    chosen, rejected = torch.tensor([[1, 2, 3], [4, 5, 0]]), torch.tensor([[0, 1, 9, 3], [0, 0, 4, 6]])
    masks = (
        torch.tensor([[True] * 3, [True, True, False]]),
        torch.tensor([[False, *[True] * 3], [False, False, True, True]]),
    )
    marks = span_masks(chosen, masks[0], rejected, masks[1])
    assert marks[0].tolist() == [[False, True, False], [False, True, False]]
    assert marks[1].tolist() == [[False, False, True, False], [False, False, False, True]]
