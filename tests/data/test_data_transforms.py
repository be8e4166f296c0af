"""Images of every mode become upright RGB; both sides of a pair are cropped and flipped alike."""

from __future__ import annotations

import hashlib
import io

import numpy as np
import pytest
import torch
from PIL import Image

from mmalign.core.errors import UserError
from mmalign.core.hashing import uniform
from mmalign.core.io.images import decode_image, encode_png, image_size, open_image
from mmalign.data.encoded.transforms import Decision, PairTransform
from rewards.media import load_image


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(width: int, height: int) -> Image.Image:
    """An image whose red channel counts columns and whose green channel counts rows."""
    rows, columns = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([columns, rows, 0 * rows], axis=-1).astype(np.uint8))


def test_png_round_trip_keeps_every_level():
    media = torch.arange(256).reshape(1, 16, 16).expand(3, -1, -1).float() / 255
    assert torch.equal(decode_image(encode_png(media)), media)


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    data = encoded(gradient(20, 10), exif=exif)
    image = open_image(data, "x")
    assert image.size == (10, 20) == image_size(data, "x")
    assert image.getpixel((9, 0)) == (0, 0, 0)
    assert image.getpixel((9, 19)) == (19, 0, 0)


def test_transparency_lies_over_white_and_other_modes_become_rgb():
    clear = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    clear.putpixel((1, 0), (200, 10, 20, 255))
    image = open_image(encoded(clear), "x")
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (200, 10, 20)]
    palette = gradient(4, 4).quantize(16)
    assert open_image(encoded(palette), "x").getpixel((3, 1)) == (3, 1, 0)
    assert open_image(encoded(Image.new("L", (2, 2), 77)), "x").getpixel((0, 0)) == (77, 77, 77)
    deep = Image.fromarray(np.full((2, 2), 0x8012, dtype=np.uint16))
    assert open_image(encoded(deep), "x").getpixel((0, 0)) == (128, 128, 128)
    for image in (clear, palette, deep):  # the same rule as that of the rewards
        assert torch.equal(decode_image(encoded(image)), load_image(Image.open(io.BytesIO(encoded(image)))))
    with pytest.raises(UserError, match="32 bits per channel, mode F; save it with 8 or 16"):
        open_image(encoded(Image.new("F", (2, 2)), "TIFF"), "x")


@pytest.mark.parametrize("data", [b"", b"no image", encoded(gradient(32, 32))[:-60]])
def test_damaged_image_is_named(data):
    with pytest.raises(UserError, match=r"^pair 'p7', chosen: unreadable image \(\d+ bytes: .*\)$") as error:
        open_image(data, "pair 'p7', chosen")
    assert "0x" not in str(error.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="record 3: image '.*gone.png' cannot be read"):
        decode_image(tmp_path / "gone.png", "record 3")


def test_center_crop_takes_the_middle_square():
    media = PairTransform(10)(gradient(30, 10), Decision())
    assert media.shape == (3, 10, 10)
    assert (media[0, 0] * 255).round().tolist() == list(range(10, 20))
    assert torch.equal(PairTransform(10)(gradient(30, 10), Decision(), flip=True), media.flip(-1))


def test_resize_is_antialiased_and_keeps_proportions():
    stripes = Image.fromarray((np.indices((64, 128)).sum(0) % 2 * 255).astype(np.uint8)).convert("RGB")
    media = PairTransform(16)(stripes, Decision())
    assert media.shape == (3, 16, 16)
    assert float((media - 0.5).abs().max()) < 0.02  # without antialiasing the stripes would alias to 0 or 1
    assert PairTransform(16).plan((128, 64), Decision()) == (32, 16, 8, 0)
    assert PairTransform(16).plan((64, 640), Decision(0.0, 1.0)) == (16, 160, 0, 144)


def test_random_crop_is_a_function_of_the_pair_alone():
    transform = PairTransform(10, "random")
    decisions = {name: transform.decide(name) for name in map(str, range(200))}
    assert decisions == {name: PairTransform(99, "random").decide(name) for name in decisions}
    across = torch.tensor([decision.across for decision in decisions.values()])
    down = torch.tensor([decision.down for decision in decisions.values()])
    assert 0.4 < float(across.mean()) < 0.6 and float(across.min()) < 0.05 and float(across.max()) > 0.95
    assert abs(float(torch.corrcoef(torch.stack([across, down]))[0, 1])) < 0.2
    media = transform(gradient(110, 10), decisions["3"])
    assert round(float(media[0, 0, 0]) * 255) == round(decisions["3"].across * 100)


def test_uniform_is_the_documented_hash():
    digest = hashlib.blake2b(repr(("flip", 1)).encode(), digest_size=8).digest()
    assert uniform("flip", 1) == (int.from_bytes(digest, "big") >> 1) % 2**53 / 2**53


@pytest.mark.parametrize("size", [(640, 4), (3, 700), (2000, 40), (40, 2000)])
@pytest.mark.parametrize("place", [0.0, 0.3, 0.5, 1.0])
def test_a_strip_is_cropped_as_if_it_were_resized_whole(size, place):
    # Levels that the filter does not drive beyond 0 or 255: Pillow clips between its passes, whose order may differ.
    levels = np.random.default_rng(0).integers(80, 176, (size[1], size[0], 3), dtype=np.uint8)
    strip, transform = Image.fromarray(levels), PairTransform(16)
    width, height, left, top = transform.plan(strip.size, Decision(place, place))
    whole = strip.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + 16, top + 16))
    expected = torch.from_numpy(np.array(whole)).permute(2, 0, 1).float()
    assert (transform(strip, Decision(place, place)) * 255 - expected).abs().max() < 1.01


def test_the_memory_of_a_strip_is_bounded_by_the_crop(monkeypatch):
    sizes, resize = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, to, *a, **k: sizes.append(to) or resize(self, to, *a, **k))
    assert PairTransform(32)(Image.new("RGB", (60_000, 1), "red"), Decision())[0].eq(1).all()
    assert sizes == [(32 + 2 * 65, 32)]  # a bicubic filter reaches 2 old pixels of 32 new ones each, and one more
