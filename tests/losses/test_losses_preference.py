"""The objectives of the preference methods beside Diffusion-DPO as numbers worked out by hand, in float64."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from mmalign.losses import (
    capo,
    capo_logit,
    diffusion_dpo,
    diffusion_dpo_logit,
    diffusion_kto,
    kto_reference_point,
    mapo,
    mapo_likelihood,
    mapo_logit,
    noise_level_weight,
    smpo,
    smpo_weight,
    tdpo,
    tdpo_logit,
)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------------- MaPO


@pytest.mark.parametrize("error", [0.0, 1e-300, 1e-12, 1e-4, 0.19, 0.2, 0.21, 1.0, 50.0, 5000.0])
def test_mapo_likelihood_and_its_slope_are_exact_everywhere(error: float) -> None:
    x = double(error).requires_grad_()
    value = mapo_likelihood(x, snr=0.5)
    value.backward()
    expected, slope = _mapo_likelihood_in_many_digits(error) if error > 1e-200 else (1.0, -0.25)
    assert value.item() == pytest.approx(expected, rel=1e-13, abs=1e-300)
    assert x.grad is not None and x.grad.item() == pytest.approx(slope, rel=1e-11, abs=1e-300)


def _mapo_likelihood_in_many_digits(error: float) -> tuple[float, float]:
    """f(e) = x / (exp(x) - 1) with x = e/2, and df/de = 1/2 * (1 / (exp(x) - 1) - x exp(x) / (exp(x) - 1)^2)."""
    with localcontext() as context:
        context.prec = 80
        x = Decimal(error) / 2
        rest = x.exp() - 1
        return float(x / rest), float((1 / rest - x * x.exp() / rest**2) / 2)


def test_mapo_likelihood_falls_from_one_to_zero() -> None:
    errors = torch.linspace(0, 20, 2001, dtype=torch.float64)
    values = mapo_likelihood(errors)
    assert values[0] == 1 and (values.diff() < 0).all() and 0 < values[-1] < 1e-3
    single = mapo_likelihood(errors.float())
    torch.testing.assert_close(single.double(), values, rtol=1e-5, atol=1e-9)


def test_mapo_of_equal_errors_is_the_error_and_beta_log_two() -> None:
    chosen, rejected = double(0.3, 0.02).requires_grad_(), double(0.3, 0.02).requires_grad_()
    loss = mapo(chosen, rejected, beta=0.1, snr=0.5, scale=1000.0)
    assert loss.tolist() == pytest.approx([0.3 + 0.1 * math.log(2), 0.02 + 0.1 * math.log(2)], rel=1e-14)
    loss.sum().backward()
    # d/d(error) of -beta log sigmoid(z) at z = 0 is -beta/2 * scale * f'(error), f' = d/de [e/2 / (exp(e/2) - 1)].
    slope = [1 / 2 * (1 / math.expm1(e / 2) - e / 2 * math.exp(e / 2) / math.expm1(e / 2) ** 2) for e in (0.3, 0.02)]
    assert chosen.grad is not None and rejected.grad is not None
    assert chosen.grad.tolist() == pytest.approx([1 - 50 * s for s in slope], rel=1e-9)
    assert rejected.grad.tolist() == pytest.approx([50 * s for s in slope], rel=1e-9)


def test_mapo_logit_turns_round_with_the_sides_and_prefers_the_smaller_error() -> None:
    better, worse = double(0.1, 0.05), double(0.12, 0.5)
    z = mapo_logit(better, worse)
    assert (z > 0).all()
    torch.testing.assert_close(mapo_logit(worse, better), -z, rtol=1e-14, atol=0)
    f = lambda e: 0.5 * e / math.expm1(0.5 * e)  # noqa: E731
    assert z.tolist() == pytest.approx([1000 * (f(0.1) - f(0.12)), 1000 * (f(0.05) - f(0.5))], rel=1e-10)
    expected = [e + 0.3 * math.log1p(math.exp(-v)) for e, v in zip((0.1, 0.05), z.tolist(), strict=True)]
    assert mapo(better, worse, beta=0.3).tolist() == pytest.approx(expected, rel=1e-12)


def test_mapo_refuses_nonsense() -> None:
    for options in ({"beta": 0.0}, {"scale": -1.0}, {"snr": 0.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            mapo(double(0.1), double(0.2), **options)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------- SmPO


def test_smpo_weight_is_ten_tanh_of_the_pickscore_gap() -> None:
    gaps = double(-0.05, 0.0, 0.01, 0.02, 0.05, 10.0)
    weights = smpo_weight(gaps)
    assert weights.tolist() == pytest.approx([10 * math.tanh(g / (2 * 0.16658)) for g in gaps.tolist()], rel=1e-12)
    # 2 p - 1 for p the first of the softmax of both scores, rescaled to 0..1 over the data, times ten
    scores = (0.21 + gaps[2:5] - 0.11544) / (0.28202 - 0.11544), (0.21 - 0.11544) / (0.28202 - 0.11544)
    p = [math.exp(s) / (math.exp(s) + math.exp(scores[1])) for s in scores[0].tolist()]
    assert weights[2:5].tolist() == pytest.approx([10 * (2 * one - 1) for one in p], rel=1e-12)
    assert weights[2:5].tolist() == pytest.approx([0.30, 0.60, 1.49], abs=0.005)
    assert weights[0] == -weights[4] and weights[1] == 0 and weights[5] == pytest.approx(10)


def test_smpo_of_equal_scores_costs_log_two_and_teaches_nothing() -> None:
    errors = [double(e).requires_grad_() for e in (0.1, 0.3, 0.2, 0.25)]
    loss = smpo(*errors, smpo_weight(double(0.0)), beta=2000.0)
    loss.sum().backward()
    assert loss.item() == pytest.approx(math.log(2), abs=1e-15)
    assert all(error.grad is not None and error.grad.item() == 0 for error in errors)


def test_smpo_at_weight_one_is_dpo_and_at_minus_one_dpo_of_the_swapped_pair() -> None:
    errors = [double(e, e / 2) for e in (0.1, 0.103, 0.101, 0.102)]
    swapped = [errors[1], errors[0], errors[3], errors[2]]
    one = smpo_weight(double(1.0, 0.2), gamma=1.0, scale=1e-9)
    assert one.tolist() == [1.0, 1.0]
    torch.testing.assert_close(smpo(*errors, one, beta=700.0), diffusion_dpo(*errors, beta=700.0), rtol=0, atol=0)
    torch.testing.assert_close(
        smpo(*errors, -one, beta=700.0), diffusion_dpo(*swapped, beta=700.0), rtol=1e-14, atol=0
    )


def test_smpo_refuses_nonsense() -> None:
    one = double(1.0)
    with pytest.raises(ValueError, match="beta"):
        smpo(one, one, one, one, one, beta=0.0)
    with pytest.raises(ValueError, match="scale"):
        smpo_weight(one, scale=0.0)


# ---------------------------------------------------------------------------------------------------- Diffusion-KTO

UTILITIES = {
    "kahneman-tversky": lambda v: 1 / (1 + math.exp(-v)),
    "loss-averse": lambda v: -math.log1p(math.exp(-v)),
    "risk-seeking": lambda v: math.log1p(math.exp(v)),
}


@pytest.mark.parametrize("utility", UTILITIES)
def test_kto_by_hand(utility: Any) -> None:
    gains, good = double(0.002, -0.001, 0.004, 0.003), torch.tensor([True, True, False, False])
    point = kto_reference_point(gains)
    assert point.item() == pytest.approx(0.002, rel=1e-14)
    loss = diffusion_kto(
        gains, good, point, beta=1000.0, utility=utility, desirable_weight=1.5, undesirable_weight=0.5
    )
    u = UTILITIES[utility]
    v = [0.0, -3.0, -2.0, -1.0]  # +-1000 (gain - 0.002)
    expected = [weight * (1 - u(one)) for weight, one in zip((1.5, 1.5, 0.5, 0.5), v, strict=True)]
    assert loss.tolist() == pytest.approx(expected, rel=1e-10)


def test_kto_weights_are_as_precise_as_the_gains() -> None:
    # 0.7 in float32 is off by 1e-8.
    gains, good = double(0.0, 0.0), torch.tensor([True, False])
    loss = diffusion_kto(gains, good, gains.mean(), beta=1.0, desirable_weight=0.3, undesirable_weight=0.7)
    assert loss.tolist() == pytest.approx([0.15, 0.35], rel=1e-15)


@pytest.mark.parametrize(
    ("utility", "value"),
    [("kahneman-tversky", 0.5), ("loss-averse", 1 + math.log(2)), ("risk-seeking", 1 - math.log(2))],
)
def test_kto_of_policy_equal_to_reference(utility: Any, value: float) -> None:
    gain = double(0.0, 0.0).requires_grad_()
    loss = diffusion_kto(gain, torch.tensor([True, False]), kto_reference_point(gain), beta=1000.0, utility=utility)
    assert loss.tolist() == pytest.approx([value] * 2, abs=1e-15)
    loss.sum().backward()
    assert gain.grad is not None  # U'(0) is 1/4 for the sigmoid and 1/2 for the others; the label turns the sign
    slope = 250.0 if utility == "kahneman-tversky" else 500.0
    assert gain.grad.tolist() == pytest.approx([-slope, slope], rel=1e-12)


def test_kto_reference_point_is_never_below_zero_and_has_no_gradient() -> None:
    gain = double(-0.004, -0.002).requires_grad_()
    good = torch.tensor([True, True])
    point = kto_reference_point(gain)
    assert point.item() == pytest.approx(-0.003) and not point.requires_grad
    loss = diffusion_kto(gain, good, point, beta=500.0)
    assert loss.tolist() == pytest.approx([1 - 1 / (1 + math.exp(2)), 1 - 1 / (1 + math.exp(1))], rel=1e-12)
    # a point that the caller forgot to detach has none either: the slope is U' alone, not U' (1 - 1/B)
    leaky = diffusion_kto(gain, good, gain.mean() + 1.0, beta=500.0).sum()
    v = [500 * (g - 0.997) for g in (-0.004, -0.002)]
    (slope,) = torch.autograd.grad(leaky, gain)
    assert slope.tolist() == pytest.approx([-500 * math.exp(one) / (1 + math.exp(one)) ** 2 for one in v], rel=1e-9)


def test_kto_of_good_images_alone_pulls_hardest_at_the_average() -> None:
    gain = double(0.001, 0.003, 0.002).requires_grad_()
    loss = diffusion_kto(gain, torch.tensor([True] * 3), kto_reference_point(gain), beta=3000.0)
    loss.sum().backward()
    assert loss[2].item() == pytest.approx(0.5) and loss[0] > 0.5 > loss[1]
    assert gain.grad is not None and gain.grad.abs().argmax() == 2 and gain.grad[0] == pytest.approx(gain.grad[1])


def test_kto_refuses_nonsense() -> None:
    gain, good = double(0.0), torch.tensor([True])
    with pytest.raises(ValueError, match="beta"):
        diffusion_kto(gain, good, gain.mean(), beta=0.0)
    with pytest.raises((ValueError, TypeError), match="kahneman-tversky"):
        diffusion_kto(gain, good, gain.mean(), beta=1.0, utility="greedy")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------- TDPO


def test_tdpo_without_a_bound_is_dpo_of_the_two_captions_errors() -> None:
    errors = [double(e, e / 3) for e in (0.1, 0.104, 0.101, 0.103)]
    torch.testing.assert_close(tdpo(*errors, beta=900.0), diffusion_dpo(*errors, beta=900.0), rtol=0, atol=0)
    same = tdpo(errors[0], errors[0], errors[2], errors[2], beta=900.0)
    assert same.tolist() == [math.log(2)] * 2


def test_tdpo_bound_stops_the_rejected_caption_and_it_alone() -> None:
    reference = double(0.1, 0.1, 0.1)
    chosen, rejected = double(0.1, 0.1, 0.1).requires_grad_(), double(0.105, 0.125, 5.0).requires_grad_()
    z = tdpo_logit(chosen, rejected, reference, reference, beta=1000.0, rejected_rise=0.02)
    assert z.tolist() == pytest.approx([2.5, 10.0, 10.0], rel=1e-12)  # 500 times the rise, at most 500 * 0.02
    tdpo(chosen, rejected, reference, reference, beta=1000.0, rejected_rise=0.02).sum().backward()
    assert chosen.grad is not None and rejected.grad is not None
    pull = [500 / (1 + math.exp(one)) for one in (2.5, 10.0, 10.0)]
    assert chosen.grad.tolist() == pytest.approx(pull, rel=1e-10)
    assert rejected.grad.tolist() == pytest.approx([-pull[0], 0.0, 0.0], rel=1e-10)


def test_tdpo_refuses_nonsense() -> None:
    one = double(1.0)
    for options in ({"beta": 0.0}, {"beta": 1.0, "rejected_rise": 0.0}):
        with pytest.raises(ValueError, match="positive"):
            tdpo(one, one, one, one, **options)


# ------------------------------------------------------------------------------------------------------------- CaPO


def test_capo_is_zero_exactly_where_the_implicit_rewards_fit() -> None:
    reference = double(0.2, 0.2, 0.2)
    margin = double(0.3, -0.4, 1.0)
    chosen = (reference - margin / 500.0).requires_grad_()  # beta 1000: z = 500 * (reference - policy) of chosen
    loss = capo(chosen, reference, reference, reference, margin, beta=1000.0)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([0.0] * 3, abs=1e-20)
    assert chosen.grad is not None and chosen.grad.abs().max() < 1e-8
    start = double(0.2, 0.2, 0.2).requires_grad_()
    loss = capo(start, reference, reference, reference, margin, beta=1000.0)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([0.09, 0.16, 1.0], rel=1e-12)
    assert start.grad is not None and start.grad.tolist() == pytest.approx([300.0, -400.0, 1000.0], rel=1e-12)


def test_capo_of_certain_labels_is_ipo() -> None:
    errors = [double(e, e / 2) for e in (0.1, 0.1003, 0.1001, 0.1002)]
    ipo = diffusion_dpo(*errors, beta=350.0, loss_type="ipo")
    torch.testing.assert_close(capo(*errors, double(1.0, 1.0), beta=700.0), 700.0**2 * ipo, rtol=1e-12, atol=0)


def test_capo_weight_of_the_noise_level() -> None:
    alpha, sigma = double(0.6, 0.8, 2**-0.5), double(0.8, 0.6, 2**-0.5)
    weight = noise_level_weight(alpha, sigma, bias=0.5)
    # sigmoid(b - log(a^2/s^2)) = s^2 e^b / (s^2 e^b + a^2)
    expected = [s * s * math.exp(0.5) / (s * s * math.exp(0.5) + a * a) for a, s in ((0.6, 0.8), (0.8, 0.6), (1, 1))]
    assert weight.tolist() == pytest.approx(expected, rel=1e-12) and weight[0] > weight[2] > weight[1]
    errors = [double(e, e, e) for e in (0.1, 0.1003, 0.1001, 0.1002)]
    z = diffusion_dpo_logit(*errors, beta=700.0)
    torch.testing.assert_close(capo_logit(*errors, beta=700.0, weight=weight), weight * z)
    loss = capo(*errors, double(0.5, 0.5, 0.5), beta=700.0, weight=weight)
    torch.testing.assert_close(loss, (0.5 - weight * z) ** 2)
    with pytest.raises(ValueError, match="beta"):
        capo(*errors, z, beta=0.0)
