"""The two preprocessing modes: against open_clip's own transforms, and against each other."""

import math

import pytest
import torch
from PIL import Image, ImageDraw

from rewards import Preprocess, RewardError
from rewards.backbones.preprocess import IMAGENET, OPENAI, SIGLIP
from rewards.media import load_image


def picture(width, height):
    """Draw a scene with what makes resampling hard: gradients, fine texture, hard edges and lettering."""
    image = Image.new("RGB", (width, height))
    for y in range(height):
        for x in range(width):
            wave = 18 * math.sin(x / 3 + y / 7) + 9 * math.sin(x * y / 900)
            image.putpixel(
                (x, y), tuple(int(min(max(v + wave, 0), 255)) for v in (60 + x / 4, 190 - y / 3, 90 + y / 4))
            )
    draw = ImageDraw.Draw(image)
    draw.ellipse((width * 0.3, height * 0.2, width * 0.6, height * 0.8), fill=(220, 40, 40))
    draw.rectangle((width * 0.55, height * 0.5, width * 0.8, height * 0.9), fill=(245, 245, 245))
    draw.text((width * 0.4, height * 0.45), "a photo of a cat", fill="black")
    return image


@pytest.fixture(scope="module")
def photo():
    return picture(500, 335)


@pytest.mark.parametrize("resize", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("size", [224, (192, 256)])
def test_reference_mode_is_open_clips_own_bit_for_bit(photo, resize, turned, size):
    import open_clip

    image = photo.transpose(Image.Transpose.ROTATE_90) if turned else photo
    transform = open_clip.image_transform(size, is_train=False, resize_mode=resize, fill_color=0)
    ours = Preprocess(size=size, resize=resize)(load_image(image)[None], "reference")[0]
    assert ours.shape[1:] == ((size, size) if isinstance(size, int) else size)
    assert torch.allclose(ours, transform(image), atol=1e-6)


@pytest.mark.parametrize("resize", ["shortest", "longest", "squash"])
def test_modes_agree_on_a_picture(photo, resize):
    preprocess = Preprocess(resize=resize, mean=(0.0,) * 3, std=(1.0,) * 3)
    media = load_image(photo)[None]
    steps = (preprocess(media) - preprocess(media, "reference")).abs() * 255
    # Stated bounds for a 500 x 335 photograph: 0.16 on average, 8 at most, in 8-bit steps.
    assert steps.mean() < 0.16
    assert steps.max() < 8.01
    levels = preprocess(media) * 255
    assert torch.allclose(levels, levels.round(), atol=1e-3)


def test_without_antialiasing_the_bound_would_not_hold(photo):
    media = load_image(photo)[None]
    reference = Preprocess(mean=(0.0,) * 3, std=(1.0,) * 3)(media, "reference")
    plain = torch.nn.functional.interpolate(media, size=(224, 334), mode="bicubic")[..., 55:279]
    assert (plain - reference).abs().mean() * 255 > 3 * 0.16


PROCESSORS = {
    "CLIPImageProcessor": {},
    "SiglipImageProcessor": {"size": {"height": 96, "width": 96}},
    "ViTImageProcessor": {"image_mean": IMAGENET[0], "image_std": IMAGENET[1]},
    # ALIGN and DINOv2 resize to more than they crop
    "EfficientNetImageProcessor": {
        "do_center_crop": True, "rescale_factor": 1 / 127.5, "rescale_offset": True, "do_normalize": False,
        "include_top": False, "resample": 2,
    },
    "BitImageProcessor": {"size": {"shortest_edge": 256}, "image_mean": IMAGENET[0], "image_std": IMAGENET[1]},
}  # fmt: skip


@pytest.mark.parametrize("name", PROCESSORS)
def test_settings_of_transformers_give_what_its_own_processor_gives(photo, name, tmp_path):
    import transformers

    from rewards.backbones.hf import image_preprocessing

    # Since version 5 the processor that works through PIL has a name of its own.
    processor = getattr(transformers, name + "Pil", None) or getattr(transformers, name)
    processor = processor(**PROCESSORS[name])
    processor.save_pretrained(tmp_path)
    expected = torch.as_tensor(processor(photo, return_tensors="np")["pixel_values"])
    ours = image_preprocessing(tmp_path)(load_image(photo)[None], "reference")
    assert ours.shape == expected.shape and torch.allclose(ours, expected, atol=1e-5)


def test_old_settings_of_transformers():
    clip = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 224, "resample": 3}
    assert Preprocess.from_transformers(clip | {"image_mean": OPENAI[0], "image_std": OPENAI[1]}) == Preprocess(
        resize_to=224
    )
    dino = {"feature_extractor_type": "ViTFeatureExtractor", "size": 224, "resample": 2, "do_normalize": True}
    dino |= {"image_mean": list(IMAGENET[0]), "image_std": list(IMAGENET[1])}
    assert Preprocess.from_transformers(dino) == Preprocess(
        224, *IMAGENET, "squash", interpolation="bilinear", resize_to=224
    )
    for change, message in [
        ({"resample": 1}, "ViTFeatureExtractor with resample=1"),
        ({"do_resize": False}, "only resizing by"),
        ({"size": {"shortest_edge": 224}}, "without a crop"),
    ]:
        with pytest.raises(RewardError, match=message):
            Preprocess.from_transformers(dino | change)
    with pytest.raises(RewardError, match="lacks image_mean, image_std"):
        Preprocess.from_transformers({"size": 224})


def test_same_size_is_untouched_and_constants_are_the_published_ones():
    media = torch.randint(0, 256, (2, 3, 32, 32)).float() / 255
    assert torch.allclose(Preprocess(32, (0.0,) * 3, (1.0,) * 3)(media), media, atol=1e-6)
    for mean, std in (OPENAI, IMAGENET, SIGLIP):
        normalised = Preprocess(32, mean, std)(torch.tensor(mean).view(1, 3, 1, 1).expand(1, 3, 32, 32))
        assert normalised.abs().max() < 0.5 / 255 / min(std) + 1e-6
    assert OPENAI[0] == (0.48145466, 0.4578275, 0.40821073) and OPENAI[1] == (0.26862954, 0.26130258, 0.27577711)
    assert IMAGENET == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) and SIGLIP == ((0.5,) * 3, (0.5,) * 3)


def test_rounding_passes_the_gradient_of_the_identity():
    media = torch.rand(1, 3, 48, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    media = media * 0.6 + 0.2
    gradients = []
    for rounding in (True, False):
        leaf = media.clone().requires_grad_()
        weight = torch.linspace(-1, 1, 3 * 32 * 32, dtype=torch.float64).view(3, 32, 32)
        (Preprocess(32, rounding=rounding)(leaf) * weight).sum().backward()
        gradients.append(leaf.grad)
    assert torch.allclose(*gradients) and gradients[0].abs().max() > 0.01


def test_wrong_settings_are_refused():
    with pytest.raises(RewardError, match="resize 'longst' is unknown; did you mean 'longest'"):
        Preprocess(resize="longst")
    with pytest.raises(RewardError, match="interpolation 'nearest'"):
        Preprocess(interpolation="nearest")
    media = torch.rand(1, 3, 8, 8)
    with pytest.raises(RewardError, match="preprocessing 'pil' is unknown"):
        Preprocess()(media, "pil")
    with pytest.raises(RewardError, match="has no gradient"):
        Preprocess()(media.requires_grad_(), "reference")


@pytest.mark.parametrize("size", [(2, 60_000), (60_000, 1)])
@pytest.mark.parametrize("mode", ["reference", "differentiable"])
def test_of_a_long_strip_only_the_part_near_the_crop_is_resized(size, mode):
    preprocess = Preprocess(32, mean=(0.0,) * 3, std=(1.0,) * 3)
    media = torch.zeros(1, 3, *size)
    middle = media.narrow(2 if size[0] > size[1] else 3, 30_000, 30_000)
    middle.fill_(1)  # the edge lies in the middle of the crop
    shown = preprocess(media, mode)[0, 0]
    line = shown.mean(1 if size[0] > size[1] else 0)
    assert shown.shape == (32, 32) and line[0] < 0.05 and line[-1] > 0.95
    assert torch.allclose(line + line.flip(0), torch.ones(32), atol=0.01)


def test_a_strip_is_nearly_what_it_is_when_resized_whole(monkeypatch):
    preprocess = Preprocess(32, mean=(0.0,) * 3, std=(1.0,) * 3)
    media = torch.linspace(0, 40, 3 * 1000).sin().mul(0.5).add(0.5).reshape(3, 1, 1000).expand(1, 3, 50, 1000)
    near = preprocess(media)
    monkeypatch.setattr(Preprocess, "_near_crop", lambda self, media: media)
    assert (preprocess(media) - near).abs().max() < 0.02


@pytest.mark.parametrize("mode", ["reference", "differentiable"])
def test_a_line_keeps_one_pixel_when_it_is_fitted_in(mode):
    preprocess = Preprocess(32, mean=(0.0,) * 3, std=(1.0,) * 3, resize="longest")
    assert preprocess(torch.ones(1, 3, 1, 5000), mode).sum() == 3 * 32
