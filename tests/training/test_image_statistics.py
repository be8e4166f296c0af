"""Diversity, saturation and high frequencies of images whose numbers are known in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mmalign.training.image_statistics import dark, diversity, grid, high_frequency, saturation


def flat(value: float, size: int = 32) -> Tensor:
    return torch.full((3, size, size), value)


def wave(cycles: int, amplitude: float, height: int, width: int, *, across: bool = True) -> Tensor:
    """A cosine of so many cycles along the width (or the height); its variance is amplitude^2 / 2."""
    length = width if across else height
    line = amplitude * torch.cos(2 * math.pi * cycles * torch.arange(length) / length)
    return (line[None, :] if across else line[:, None]).expand(3, height, width)


def checkerboard(size: int = 32) -> Tensor:
    index = torch.arange(size)
    return ((index[:, None] + index[None, :]) % 2).float().expand(3, size, size)


def test_diversity_of_two_groups_by_hand() -> None:
    half = flat(0.0)
    half[:, :, :16] = 1.0
    images = torch.stack([flat(0.0), half, flat(0.5), flat(0.0), flat(0.9), flat(1.0)])
    groups = ["a", "b", "a", "b", "alone", "a"]
    of_a = (0.5 + 0.5 + 1.0) / 3
    of_b = math.sqrt(0.5)  # half of the values differ by 1
    assert diversity(images, groups).item() == pytest.approx((of_a + of_b) / 2, rel=1e-6)
    order = [3, 5, 0, 2, 1, 4]
    assert diversity(images[order], [groups[i] for i in order]).item() == pytest.approx((of_a + of_b) / 2, rel=1e-6)
    assert diversity(1 - images, groups).item() == pytest.approx((of_a + of_b) / 2, rel=1e-6)
    assert diversity(images / 2, groups).item() == pytest.approx((of_a + of_b) / 4, rel=1e-6)


def test_diversity_sees_no_texture_takes_any_size_and_needs_two_of_a_group() -> None:
    assert diversity(torch.stack([checkerboard(), flat(0.5)]), [0, 0]).item() == pytest.approx(0, abs=1e-6)
    assert diversity(torch.stack([flat(0.2, 20), flat(0.6, 20)]), [0, 0]).item() == pytest.approx(0.4, rel=1e-6)
    assert math.isnan(diversity(torch.rand(3, 3, 32, 32), ["a", "b", "c"]).item())
    with pytest.raises(ValueError, match="3 images and 2 groups"):
        diversity(torch.rand(3, 3, 32, 32), ["a", "b"])


def test_saturation_counts_the_two_outermost_steps_of_eight_bits() -> None:
    steps = torch.tensor([0, 1, 2, 3, 100, 252, 253, 254, 255, 128, 128, 128], dtype=torch.float32) / 255
    image = steps.view(1, 3, 2, 2)
    assert saturation(image).tolist() == pytest.approx([4 / 12])
    assert saturation(1 - image).tolist() == pytest.approx([4 / 12])
    beyond = torch.tensor([-0.2, 1.3, 0.4]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    assert saturation(torch.cat([beyond, beyond * 0 + 0.5])).tolist() == pytest.approx([2 / 3, 0])


def test_high_frequency_of_flat_images_and_of_a_checkerboard() -> None:
    images = torch.stack([flat(0.0), flat(0.3), flat(1.0), checkerboard(), 0.2 + 0.1 * checkerboard()])
    assert high_frequency(images).tolist() == pytest.approx([0, 0, 0, 1, 1], abs=1e-6)
    assert high_frequency(torch.rand(1, 3, 1, 1)).tolist() == [0]


@pytest.mark.parametrize("size", [(32, 32), (33, 35), (36, 33)])
@pytest.mark.parametrize("across", [True, False])
def test_high_frequency_weighs_waves_by_their_energy(size: tuple[int, int], across: bool) -> None:
    low, high = wave(4, 0.2, *size, across=across), wave(12, 0.1, *size, across=across)
    other = wave(5, 0.1, *size, across=not across)
    shares = high_frequency(0.5 + torch.stack([low, high, low + high, high + other]))
    assert shares.tolist() == pytest.approx([0, 1, 1 / 5, 1 / 2], abs=1e-5)


def test_high_frequency_counts_the_last_column_once_and_exactly_half_the_nyquist_as_low() -> None:
    stripes = wave(16, 0.1, 32, 32)  # alternating columns: variance 0.1^2, not half of it
    images = 0.5 + torch.stack([stripes + wave(4, 0.1, 32, 32), wave(8, 0.1, 32, 32), wave(9, 0.1, 32, 32)])
    assert high_frequency(images).tolist() == pytest.approx([1 / 1.5, 0, 1], abs=1e-5)


def test_high_frequency_of_white_noise_is_the_area_of_its_band() -> None:
    noise = 0.5 + 0.1 * torch.randn(32, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    low_lines = 64 // 2 + 1
    expected = 1 - (low_lines**2 - 1) / (64**2 - 1)  # each frequency but the mean has the same energy
    assert high_frequency(noise).mean().item() == pytest.approx(expected, abs=0.005)


def test_high_frequency_ignores_brightness_contrast_orientation_and_place() -> None:
    images = torch.rand(4, 3, 24, 30, generator=torch.Generator().manual_seed(1))
    share = high_frequency(images)
    for same in (0.1 + 0.5 * images, 1 - images, images.flip(3), images.mT, images.roll((5, 7), (2, 3))):
        torch.testing.assert_close(high_frequency(same), share, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat([high_frequency(image[None]) for image in images]), share)
    grey = torch.einsum("bchw,c->bhw", images, torch.tensor([0.299, 0.587, 0.114]))[:, None].expand(-1, 3, -1, -1)
    torch.testing.assert_close(high_frequency(grey), share, rtol=1e-4, atol=1e-5)


def test_half_precision_is_measured_in_single() -> None:
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    groups = [0, 0, 1, 1]
    assert torch.equal(diversity(images, groups), diversity(images.float(), groups))
    assert torch.equal(high_frequency(images), high_frequency(images.float()))
    assert torch.equal(saturation(images), saturation(images.float()))


def test_dark_pixels_by_their_luma() -> None:
    image = torch.zeros(3, 4, 4)
    image[1, :2] = 0.2  # luma 0.117
    image[2, 2] = 0.8  # luma 0.091
    assert dark(torch.stack([image, flat(0.1, 4) + 1e-4, flat(0.05, 4)])).tolist() == pytest.approx([0.5, 0.0, 1.0])


def stairs(period: int, height: float, size: int = 64) -> Tensor:
    """A step up by `height` at every `period`-th column, on a slope of 0.004 a pixel."""
    columns = torch.arange(size)
    return (0.3 + 0.004 * columns + height * (columns // period)).expand(3, size, size)


@pytest.mark.parametrize("period", [4, 8, 16])
def test_a_grid_is_measured_against_the_steps_between_its_lines(period: int) -> None:
    image = stairs(period, 0.01)  # steps of 0.014 on the lines, of 0.004 between them
    assert grid(image[None]).item() == pytest.approx(0.01 / 0.004, rel=1e-3)
    assert grid(image.transpose(1, 2)[None]).item() == pytest.approx(0.01 / 0.004, rel=1e-3)
    assert grid(torch.stack([image, stairs(64, 0.0)])).item() == pytest.approx(0.005 / 0.004, rel=1e-3)
    # Strong steps count as 0.02, weak ones as 0.002.
    assert grid(stairs(period, 0.5)[None]).item() == pytest.approx((0.02 - 0.004) / 0.004, rel=1e-3)
    alone = (0.01 * (torch.arange(64) // period)).expand(1, 3, 64, 64)
    assert grid(alone).item() == pytest.approx(0.01 / 0.002, rel=1e-3)


def test_content_flat_images_and_noise_are_no_grid() -> None:
    draw = torch.Generator().manual_seed(0)
    assert grid(torch.rand(64, 3, 64, 64, generator=draw)).item() < 0.05
    assert grid(torch.stack([flat(0.0, 64), flat(0.5, 64)])).item() == 0
    slope = (torch.arange(64) / 64).expand(3, 64, 64)
    assert grid(slope[None]).item() == pytest.approx(0, abs=1e-3)
    # Too small for any period.
    assert grid(torch.rand(2, 3, 8, 8, generator=draw)).item() == 0
    # The same lines in other places of each image are content.
    images = torch.stack([stairs(8, 0.01).roll(k, 2) for k in range(8)])
    assert grid(images).item() < 0.6
