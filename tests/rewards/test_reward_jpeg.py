"""JPEG sizes of Pillow, and the differentiable JPEG against Pillow's own decoder."""

import io

import numpy as np
import PIL
import pytest
import torch
from contract import check_contract, smooth_images
from golden_data import golden_file
from PIL import Image

from rewards import RewardError, load_reward
from rewards.jpeg import jpeg_round_trip, round_smoothly
from rewards.media import load_image


def pixels(array):
    return torch.from_numpy(array).permute(2, 0, 1)[None].float() / 255


NOISE = pixels(np.random.RandomState(0).randint(0, 256, (512, 512, 3), dtype=np.uint8))
BLACK = torch.zeros(1, 3, 512, 512)
ROWS = np.arange(512) * 255 // 511
GRADIENT = pixels(np.broadcast_to(ROWS.astype(np.uint8)[:, None, None], (512, 512, 3)).copy())


@pytest.mark.parametrize(("image", "size"), [(NOISE, 308188), (BLACK, 4723), (GRADIENT, 17010)])
def test_golden_sizes(image, size):
    assert load_reward("jpeg-incompressibility")(image).item() == pytest.approx(size / 1000, rel=0.01)
    assert load_reward("jpeg-compressibility")(image).item() == pytest.approx(-size / 1000, rel=0.01)
    assert load_reward("jpeg-compressibility", unit=500_000.0)(image).item() == pytest.approx(-size / 5e5, rel=0.01)


def test_it_is_the_size_of_pillows_file():
    image = smooth_images(1, 50, 37)
    picture = Image.fromarray((image[0] * 255).round().byte().permute(1, 2, 0).numpy())
    for options in [{}, {"quality": 30}, {"quality": 80, "subsampling": "4:4:4"}]:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", **{"quality": 95, **options})
        found = load_reward("jpeg-incompressibility", **options)(image).item()
        assert found == pytest.approx(len(buffer.getvalue()) / 1000)


def test_version_names_what_the_size_depends_on():
    assert load_reward("jpeg-compressibility").version == f"bytes at quality 95, 4:2:0, Pillow {PIL.__version__}"
    assert load_reward("jpeg-compressibility", form="distance").version == "distance at quality 50, 4:2:0"


def rms(values):
    return values.square().mean().sqrt().item()


def decoded(image, quality, subsampling):
    buffer = io.BytesIO()
    picture = Image.fromarray(image[0].byte().permute(1, 2, 0).numpy())
    picture.save(buffer, "JPEG", quality=quality, subsampling=subsampling)
    return torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1)[None].double()


@pytest.mark.parametrize(("quality", "apart"), [(10, 0.12), (50, 0.25), (90, 0.4)])
@pytest.mark.parametrize("subsampling", ["4:2:0", "4:4:4"])
def test_round_trip_is_that_of_libjpeg(quality, apart, subsampling):
    noise = torch.rand(1, 3, 50, 37, generator=torch.Generator().manual_seed(0)) * 0.3
    image = ((smooth_images(1, 50, 37) * 0.7 + noise) * 255).round().double()
    theirs = decoded(image, quality, subsampling)
    ours = jpeg_round_trip(image, quality, subsampling)
    lost = rms(theirs - image)
    # libjpeg rounds planes to 8 bits and computes in integers, so that now and then a coefficient is one step off:
    # the more, the smaller the steps.
    assert rms(ours - theirs) < apart * lost
    assert rms(ours - image) == pytest.approx(lost, rel=0.01)


def test_round_trip_of_a_photograph():
    image = (load_image(golden_file("hpsv2_demo_image.jpg"))[None] * 255).round().double()
    # 40, for the photograph is a JPEG of quality 75, whose coefficients lie half-way between the steps of quality 50
    theirs = decoded(image, 40, "4:2:0")
    ours = jpeg_round_trip(image, 40)
    lost = rms(theirs - image)
    assert rms(ours - theirs) < 0.2 * lost
    assert rms(ours - image) == pytest.approx(lost, rel=0.01)
    # the smoothed one takes less away, in the same order of size
    soft = load_reward("jpeg-incompressibility", form="distance", quality=40)(image / 255).item()
    assert 0.6 * lost < soft < lost


def test_smooth_rounding():
    values = torch.tensor([0.0, 1.4, -2.5, 3.6], dtype=torch.float64, requires_grad=True)
    rounded = round_smoothly(values)
    assert rounded.tolist() == pytest.approx([0.0, 1 + 0.4**3, -2 - 0.5**3, 4 - 0.4**3])
    rounded.sum().backward()
    assert values.grad.tolist() == pytest.approx([0.0, 3 * 0.16, 0.75, 3 * 0.16])


def test_distance_orders_images_and_climbing_it_changes_the_file():
    reward = load_reward("jpeg-compressibility", form="distance")
    flat, smooth, noisy = torch.full((1, 3, 48, 48), 128 / 255), smooth_images(1, 48, 48), NOISE[..., :48, :48]
    scores = torch.cat([reward(image) for image in (flat, smooth, noisy)]).tolist()
    assert scores[0] == pytest.approx(0, abs=1e-3) and scores[0] > scores[1] > scores[2]
    size = load_reward("jpeg-compressibility", quality=50)
    image = noisy.clone()
    for _ in range(20):
        image.requires_grad_()
        (slope,) = torch.autograd.grad(reward(image).sum(), image)
        image = (image.detach() + 0.01 * slope.sign()).clamp(0, 1)
    assert size(image).item() > 0.97 * size(noisy).item(), "sizes are negative: the file has become smaller"


def test_nothing_lost_has_no_slope():
    image = torch.full((1, 3, 16, 16), 128 / 255, dtype=torch.float64, requires_grad=True)
    load_reward("jpeg-compressibility", form="distance")(image).sum().backward()
    assert image.grad.isfinite().all()


@pytest.mark.parametrize("name", ["jpeg-compressibility", "jpeg-incompressibility"])
@pytest.mark.parametrize("form", ["bytes", "distance"])
def test_contract(name, form):
    check_contract(load_reward(name, form=form, device="cpu"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "size"}, "form 'size' is unknown; .*allowed: bytes, distance"),
        ({"quality": 100}, "quality is 100; 1 to 95"),
        ({"subsampling": "4:2:2"}, "subsampling '4:2:2' is unknown"),
        ({"unit": 0.0}, "unit is 0; a positive number"),
        ({"form": "distance", "unit": 500.0}, "only with form='bytes'"),
        ({"weights": "x"}, "has no weights to choose"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(RewardError, match=message):
        load_reward("jpeg-compressibility", **options)
