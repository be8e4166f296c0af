"""group-diversity: values by hand, the limit of far clusters, groups apart, and its gradient."""

from __future__ import annotations

import math

import pytest
import torch

from rewards import RewardError, load_reward


def flat(*values: float) -> torch.Tensor:
    """Images of one grey each."""
    return torch.tensor(values).reshape(-1, 1, 1, 1).expand(-1, 3, 16, 16).contiguous()


def test_values_by_hand() -> None:
    found = load_reward("group-diversity", scale=0.1)(flat(0.2, 0.3, 0.6), prompts=["a"] * 3)
    near, far, farther = (1 - math.exp(-((d / 0.1) ** 2) / 2) for d in (0.1, 0.3, 0.4))
    assert found.tolist() == pytest.approx([(near + farther) / 2, (near + far) / 2, (far + farther) / 2], abs=1e-6)


def test_of_far_clusters_it_is_the_share_of_the_others() -> None:
    found = load_reward("group-diversity", scale=0.01)(flat(0, 0, 0, 0.5, 0.5, 1), prompts=["a"] * 6)
    assert found.tolist() == pytest.approx([3 / 5, 3 / 5, 3 / 5, 4 / 5, 4 / 5, 5 / 5])
    gini = 1 - (0.5**2 + (1 / 3) ** 2 + (1 / 6) ** 2)
    assert found.mean().item() == pytest.approx(gini * 6 / 5)


def test_other_prompts_do_not_count_and_order_does_not_matter() -> None:
    reward = load_reward("group-diversity")
    mixed = reward(flat(0.1, 0.9, 0.15, 0.9), prompts=["a", "b", "a", "b"])
    assert mixed[[0, 2]].tolist() == pytest.approx(reward(flat(0.1, 0.15), prompts=["a", "a"]).tolist())
    assert mixed[[1, 3]].tolist() == [0.0, 0.0]


def test_a_coarse_grid_sees_the_palette_alone() -> None:
    left, right = torch.zeros(2, 1, 3, 16, 16).unbind()
    left[..., :8], right[..., 8:] = 1.0, 1.0
    images = torch.cat([left, right])
    assert load_reward("group-diversity")(images, prompts=["a"] * 2).tolist() == pytest.approx([0, 0])
    assert load_reward("group-diversity", grid=16)(images, prompts=["a"] * 2).tolist() == pytest.approx([1, 1])


def test_the_gradient_is_that_of_finite_differences() -> None:
    reward = load_reward("group-diversity", dtype="float64", grid=2)
    images = torch.rand(3, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)

    def total(x: torch.Tensor) -> torch.Tensor:
        return (reward(x, prompts=["a"] * 3).double() * weights).sum()

    moved = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(total(moved), moved)
    step = torch.zeros_like(images)
    step[1, 2, 3, 4] = 1e-2
    difference = (total(images + step) - total(images - step)) / 2e-2
    assert gradient[1, 2, 3, 4].item() == pytest.approx(difference.item(), rel=2e-2)


@pytest.mark.parametrize(
    ("options", "said"), [({"grid": 0}, "grid is 0"), ({"scale": 0.0}, "scale is 0"), ({"scale": 2.0}, "scale is 2")]
)
def test_bad_options_are_refused(options: dict[str, float], said: str) -> None:
    with pytest.raises(RewardError, match=said):
        load_reward("group-diversity", **options)


def test_a_single_image_is_refused() -> None:
    with pytest.raises(RewardError, match="there is one of 'b' in this batch"):
        load_reward("group-diversity")(flat(0.1, 0.2, 0.3), prompts=["a", "a", "b"])
