"""The objectives as numbers: every property of Diffusion-DPO that can be computed by hand, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mmalign.losses import denoising_error, diffusion_dpo, diffusion_dpo_logit

BETA = 2000.0
LOSS_TYPES = ("sigmoid", "robust", "ipo", "hinge")


@pytest.fixture
def errors() -> list[Tensor]:
    """Policy chosen, policy rejected, reference chosen, reference rejected: [5] each, near real magnitudes."""
    source = torch.Generator().manual_seed(0)
    return [0.1 + 1e-3 * torch.randn(5, generator=source, dtype=torch.float64) for _ in range(4)]


def test_policy_equal_to_reference_costs_log_two_and_pulls_with_a_quarter_beta() -> None:
    chosen = torch.tensor([0.2, 0.7], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([0.5, 0.1], dtype=torch.float64, requires_grad=True)
    loss = diffusion_dpo(chosen, rejected, chosen.detach(), rejected.detach(), beta=BETA)
    assert loss.tolist() == pytest.approx([math.log(2)] * 2, abs=1e-15)
    loss.sum().backward()
    assert chosen.grad is not None and rejected.grad is not None
    # d/d(error): sigmoid'(0) gives 1/2, the half factor another 1/2.
    assert chosen.grad.tolist() == pytest.approx([BETA / 4] * 2, abs=1e-12)
    assert rejected.grad.tolist() == pytest.approx([-BETA / 4] * 2, abs=1e-12)


def test_logit_by_hand() -> None:
    one = torch.ones(1, dtype=torch.float64)
    # chosen improved by 0.003, rejected worsened by 0.001: margin 0.004, times beta/2.
    logit = diffusion_dpo_logit(0.097 * one, 0.201 * one, 0.1 * one, 0.2 * one, beta=BETA)
    assert logit.item() == pytest.approx(1000 * 0.004, abs=1e-9)
    loss = diffusion_dpo(0.097 * one, 0.201 * one, 0.1 * one, 0.2 * one, beta=BETA)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-4)), abs=1e-9)


def test_swapping_the_sides_turns_the_logit_round(errors: list[Tensor]) -> None:
    policy_c, policy_r, reference_c, reference_r = errors
    z = diffusion_dpo_logit(*errors, beta=BETA)
    loss = diffusion_dpo(*errors, beta=BETA)
    swapped = diffusion_dpo(policy_r, policy_c, reference_r, reference_c, beta=BETA)
    torch.testing.assert_close(swapped - loss, z, rtol=0, atol=1e-12)


def test_sums_with_beta_over_the_dimensions_equal_means() -> None:
    source = torch.Generator().manual_seed(1)
    output, other, target = (torch.randn(3, 4, 8, 8, generator=source, dtype=torch.float64) for _ in range(3))
    means = [denoising_error(x, target, "mean") for x in (output, other, other.flip(0), output.flip(0))]
    sums = [denoising_error(x, target, "sum") for x in (output, other, other.flip(0), output.flip(0))]
    dimensions = 4 * 8 * 8
    for loss_type in ("sigmoid", "hinge"):
        with_means = diffusion_dpo(*means, beta=5.0, loss_type=loss_type)
        with_sums = diffusion_dpo(*sums, beta=5.0 / dimensions, loss_type=loss_type)
        torch.testing.assert_close(with_means, with_sums, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("loss_type", "by_hand"),
    [
        ("sigmoid", lambda z: math.log1p(math.exp(-z))),
        ("hinge", lambda z: max(0.0, 1 - z)),
        ("ipo", lambda z: (z / BETA - 1 / (2 * BETA)) ** 2),
    ],
)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_types_and_label_smoothing_by_hand(errors, loss_type, by_hand, smoothing) -> None:  # type: ignore[no-untyped-def]
    loss = diffusion_dpo(*errors, beta=BETA, loss_type=loss_type, label_smoothing=smoothing)
    z = diffusion_dpo_logit(*errors, beta=BETA).tolist()
    expected = [(1 - smoothing) * by_hand(value) + smoothing * by_hand(-value) for value in z]
    assert loss.tolist() == pytest.approx(expected, rel=1e-10)


def test_ipo_is_least_at_logit_one_half_for_any_beta() -> None:
    zero = torch.zeros(1, dtype=torch.float64)
    for beta in (0.1, 10.0, 5000.0):
        policy = torch.full((1,), -1 / beta, dtype=torch.float64, requires_grad=True)
        assert diffusion_dpo_logit(policy, zero, zero, zero, beta=beta).item() == pytest.approx(0.5)
        loss = diffusion_dpo(policy, zero, zero, zero, beta=beta, loss_type="ipo")
        loss.backward()
        assert policy.grad is not None
        assert loss.item() == pytest.approx(0, abs=1e-12) and policy.grad.item() == pytest.approx(0, abs=1e-12)


def test_robust_loss_is_on_average_over_wrong_labels_the_loss_of_the_right_one(errors: list[Tensor]) -> None:
    policy_c, policy_r, reference_c, reference_r = errors
    swapped = [policy_r, policy_c, reference_r, reference_c]
    options = {"beta": BETA, "loss_type": "robust", "label_smoothing": 0.3}
    mean = 0.7 * diffusion_dpo(*errors, **options) + 0.3 * diffusion_dpo(*swapped, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(mean, diffusion_dpo(*errors, beta=BETA), rtol=1e-12, atol=1e-12)
    # conservative DPO has another mean: it is a different target, not a correction
    options["loss_type"] = "sigmoid"
    mean = 0.7 * diffusion_dpo(*errors, **options) + 0.3 * diffusion_dpo(*swapped, **options)  # type: ignore[arg-type]
    assert (mean - diffusion_dpo(*errors, beta=BETA)).abs().max() > 0.1


def test_robust_loss_by_hand_and_its_slope_never_turns() -> None:
    zero = torch.zeros(1, dtype=torch.float64)
    for z in (-30.0, 0.0, 2.0, 30.0):
        policy = torch.full((1,), -z, dtype=torch.float64, requires_grad=True)  # beta 2: z = -policy
        loss = diffusion_dpo(policy, zero, zero, zero, beta=2.0, loss_type="robust", label_smoothing=0.2)
        right, wrong = math.log1p(math.exp(-z)), math.log1p(math.exp(z))
        assert loss.item() == pytest.approx((0.8 * right - 0.2 * wrong) / 0.6, rel=1e-12)
        loss.backward()
        sigmoid = 1 / (1 + math.exp(-z))
        assert policy.grad is not None
        assert policy.grad.item() == pytest.approx((0.8 * (1 - sigmoid) + 0.2 * sigmoid) / 0.6, rel=1e-12)
    free = diffusion_dpo(zero, zero, zero, zero, beta=2.0, loss_type="robust")
    assert free.item() == pytest.approx(math.log(2))


def test_hinge_has_its_corner_at_logit_one_and_a_constant_slope_below() -> None:
    zero = torch.zeros(1, dtype=torch.float64)
    for z, value, slope in ((-50.0, 51.0, 1.0), (0.0, 1.0, 1.0), (0.999, 0.001, 1.0), (1.001, 0.0, 0.0)):
        policy = torch.full((1,), -z, dtype=torch.float64, requires_grad=True)
        loss = diffusion_dpo(policy, zero, zero, zero, beta=2.0, loss_type="hinge")
        loss.backward()
        assert policy.grad is not None
        assert loss.item() == pytest.approx(value, abs=1e-12) and policy.grad.item() == pytest.approx(slope)


def test_ipo_pushes_back_beyond_its_margin_and_is_finite_far_out() -> None:
    zero = torch.zeros(1, dtype=torch.float64)
    for z in (-1e6, 0.0, 0.25, 0.75, 1e6):
        policy = torch.full((1,), -z, dtype=torch.float64, requires_grad=True)
        loss = diffusion_dpo(policy, zero, zero, zero, beta=2.0, loss_type="ipo")
        loss.backward()
        assert policy.grad is not None
        assert loss.item() == pytest.approx((z / 2 - 1 / 4) ** 2, rel=1e-12)
        assert policy.grad.item() == pytest.approx(-(z / 2 - 1 / 4), rel=1e-12)


def test_smoothed_labels_are_best_fitted_at_the_log_odds() -> None:
    # cDPO: with a share e of wrong labels the loss is least where sigmoid(z) = 1 - e, not at infinity.
    target = math.log(0.9 / 0.1)
    zero = torch.zeros(1, dtype=torch.float64)
    policy = torch.full((1,), -target, dtype=torch.float64, requires_grad=True)
    diffusion_dpo(policy, zero, zero, zero, beta=2.0, label_smoothing=0.1).backward()
    assert policy.grad is not None and policy.grad.item() == pytest.approx(0, abs=1e-12)


def _tiny_unet(seed: int) -> torch.nn.Module:
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=2,
        ).double()


def test_equal_images_with_shared_noise_say_nothing_whatever_the_network() -> None:
    policy, reference = _tiny_unet(0), _tiny_unet(1)
    source = torch.Generator().manual_seed(2)
    x, noise = (torch.randn(2, 4, 8, 8, generator=source, dtype=torch.float64) for _ in range(2))
    text = torch.randn(2, 5, 16, generator=source, dtype=torch.float64)
    t = torch.tensor([10, 900]).repeat(2)
    pair, target, cond = torch.cat([x, x]), torch.cat([noise, noise]), torch.cat([text, text])
    with torch.no_grad():
        ours = denoising_error(policy(0.8 * pair + 0.6 * target, t, cond).sample, target)
        theirs = denoising_error(reference(0.8 * pair + 0.6 * target, t, cond).sample, target)
    assert (ours - theirs).abs().min() > 1e-3  # the networks do differ
    z = diffusion_dpo_logit(*ours.chunk(2), *theirs.chunk(2), beta=BETA)
    assert z.abs().max() < 1e-10 * BETA


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_gradient_through_a_network_equals_finite_differences(loss_type: str) -> None:
    source = torch.Generator().manual_seed(3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 6)).double()
    x_chosen, x_rejected, target = (torch.randn(4, 6, generator=source, dtype=torch.float64) for _ in range(3))
    reference = [denoising_error(x, target) * 0.9 for x in (x_chosen, x_rejected)]
    weights = dict(network.named_parameters())
    direction = {name: torch.randn(p.shape, generator=source, dtype=torch.float64) for name, p in weights.items()}

    def loss(step: float) -> Tensor:
        moved = {name: p + step * direction[name] for name, p in weights.items()}
        outputs = [torch.func.functional_call(network, moved, (x,)) for x in (x_chosen, x_rejected)]
        policy = [denoising_error(output, target) for output in outputs]
        return diffusion_dpo(*policy, *reference, beta=0.7, loss_type=loss_type, label_smoothing=0.1).mean()

    gradients = torch.autograd.grad(loss(0.0), list(weights.values()))
    analytic = sum((g * direction[name]).sum() for name, g in zip(weights, gradients, strict=True))
    numeric = (loss(1e-6) - loss(-1e-6)) / 2e-6
    assert float(analytic) == pytest.approx(numeric.item(), rel=1e-6)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_errors_would_drown_the_preference(half: torch.dtype) -> None:
    # Two predictions near 1 whose errors differ by 1e-5, as policy and reference do early in training.
    target = torch.zeros(2, 4096)
    output = torch.stack([torch.full((4096,), 1.0), torch.full((4096,), 1.0)])
    output[0, :41] = 0.9995
    difference = denoising_error(output, target).diff().item()
    assert difference == pytest.approx(1e-5, rel=0.05)
    in_half = (output.to(half) - target.to(half)).square().mean(dim=1)
    assert in_half.diff().item() == 0
    assert denoising_error(output.to(half), target.to(half)).dtype == torch.float32


def test_denoising_error_reduces_each_sample_and_keeps_the_higher_precision() -> None:
    output = torch.tensor([[[1.0, 2.0]], [[0.0, 4.0]]], dtype=torch.bfloat16)
    target = torch.zeros(2, 1, 2, dtype=torch.float64)
    assert denoising_error(output, target).tolist() == [2.5, 8.0]
    assert denoising_error(output, target, "sum").tolist() == [5.0, 16.0]
    assert denoising_error(output, target).dtype == torch.float64


def test_wrong_arguments_are_named(errors: list[Tensor]) -> None:
    # TypeError where the tests' run-time type checker is quicker than the function's own check.
    with pytest.raises((ValueError, TypeError), match="sigmoid.*ipo.*hinge"):
        diffusion_dpo(*errors, beta=1.0, loss_type="sigmiod")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="beta=0"):
        diffusion_dpo(*errors, beta=0.0)
    with pytest.raises(ValueError, match="label_smoothing=0.5"):
        diffusion_dpo(*errors, beta=1.0, label_smoothing=0.5)
    with pytest.raises((ValueError, TypeError)):
        denoising_error(torch.zeros(2, 3), torch.zeros(1, 3))
