"""What every reward has from its base class: checks, order, gradients, micro-batches."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from rewards import Reward, RewardError
from rewards.base import Facts, check_references, check_strings
from rewards.media import load_image, read_media


class Brightness(Reward):
    """Mean pixel, times an optional weight."""

    name = "brightness"
    differentiable = True
    range = (0.0, 1.0)

    def __init__(self, **common):
        super().__init__(**common)
        self.chunks = []
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(1, 1, bias=False))
        self.head[1].weight.data.fill_(1.0)

    def score(self, media, prompts, references):
        self.chunks.append(len(media))
        return self.head(media.flatten(1).mean(1, keepdim=True))[:, 0]


class Length(Reward):
    """Length of the prompt plus the number of references, read from the host."""

    name = "length"
    needs = {"prompts", "references"}

    def score(self, media, prompts, references):
        return torch.tensor([float(len(p) + 10 * len(r)) for p, r in zip(prompts, references, strict=True)])


class PromptLength(Reward):
    """Length of the prompt plus the mean pixel."""

    name = "prompt-length"
    needs = {"prompts"}
    higher_is_better = False

    def score(self, media, prompts, references):
        return media.flatten(1).mean(1) + torch.tensor([float(len(prompt)) for prompt in prompts])


def ramp(count):
    return torch.linspace(0, 1, count).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).contiguous()


def test_micro_batches_cover_every_sample_in_order():
    reward = Brightness(batch_size=3)
    assert torch.allclose(reward(ramp(8)), torch.linspace(0, 1, 8))
    assert reward.chunks == [3, 3, 2]


def test_a_reward_that_depends_on_its_neighbours_is_never_split():
    class Whole(Brightness):
        name = "whole"
        batch_invariant = False

    reward = Whole(batch_size=3)
    reward(ramp(8))
    assert reward.chunks == [8]


def test_out_of_memory_halves_the_micro_batch_and_says_so():
    class Hungry(Brightness):
        name = "hungry"

        def score(self, media, prompts, references):
            if len(media) > 2:
                raise torch.OutOfMemoryError("too much")
            return super().score(media, prompts, references)

    reward = Hungry(batch_size=8)
    with pytest.warns(UserWarning, match="hungry: out of memory") as caught:
        scores = reward(ramp(8))
    assert [str(warning.message)[-1] for warning in caught] == ["4", "2"]
    assert torch.allclose(scores, torch.linspace(0, 1, 8))
    assert reward.chunks == [2, 2, 2, 2] and reward.batch_size == 2
    with pytest.raises(torch.OutOfMemoryError):
        Hungry(batch_size=8)(ramp(8).requires_grad_())


def test_gradients_reach_the_media_and_never_the_weights():
    reward, media = Brightness(batch_size=2), ramp(5).requires_grad_()
    reward.train()
    reward(media).sum().backward()
    assert torch.allclose(media.grad, torch.full_like(media, 1 / 48))
    assert reward.head[1].weight.grad is None and not reward.head[1].weight.requires_grad
    assert not reward.head[0].training


def test_without_gradients_scores_are_ordinary_tensors():
    scores = Brightness()(ramp(2))
    assert not scores.requires_grad and not scores.is_inference()
    weight = torch.ones(2, requires_grad=True)
    (weight * scores).sum().backward()
    assert torch.allclose(weight.grad, torch.tensor([0.0, 1.0]))
    with torch.no_grad():
        assert not Brightness()(ramp(2).requires_grad_()).requires_grad


def test_gradient_of_a_black_box_is_an_error():
    with pytest.raises(RewardError, match=r"prompt-length is not differentiable; give it media.detach\(\)"):
        PromptLength()(ramp(2).requires_grad_(), prompts=["a", "b"])


def test_surrounding_autocast_changes_nothing():
    media = torch.rand(4, 3, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = Brightness()(media)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, Brightness()(media))


def test_half_precision_media_are_scored_in_float32():
    scores = Brightness()(ramp(3).to(torch.bfloat16))
    assert scores.dtype == torch.float32
    assert torch.allclose(scores, torch.tensor([0.0, 0.5, 1.0]))


def test_lists_mix_sizes_tensors_images_and_paths(tmp_path):
    path = tmp_path / "white.png"
    Image.new("RGB", (5, 7), "white").save(path)
    media = [torch.zeros(3, 4, 4), Image.new("L", (9, 2), 51), path, torch.full((3, 4, 4), 0.25)]
    assert torch.allclose(Brightness()(media), torch.tensor([0.0, 0.2, 1.0, 0.25]))


def test_exif_orientation_and_alpha(tmp_path):
    class TopLeft(Reward):
        """Red of the first pixel."""

        name = "top-left"

        def score(self, media, prompts, references):
            return media[:, 0, 0, 0]

    image = Image.new("RGB", (4, 2), "black")
    image.putpixel((3, 1), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 3  # stored upside down
    path = tmp_path / "turned.png"
    image.save(path, exif=exif)
    half_seen = Image.new("RGBA", (2, 2), (51, 0, 0, 128))  # over white: (51 * 128 + 255 * 127) / 255
    assert TopLeft()([path, image.rotate(180), half_seen]).tolist() == pytest.approx([1.0, 1.0, 153 / 255])
    palette = Image.new("RGB", (2, 2), (255, 0, 0)).convert("P")
    assert TopLeft()([palette, Image.new("I;16", (2, 2), 0x3344)]).tolist() == pytest.approx([1.0, 51 / 255])
    with pytest.raises(RewardError, match="32 bits per channel, mode F; save it with 8 or 16"):
        TopLeft()([Image.new("F", (2, 2))])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "RGB", "L", "1", "CMYK", "YCbCr", "I;16"])
def test_every_mode_becomes_rgb_with_transparency_over_white(mode, tmp_path):
    """An image of a dark and a light pixel, the light one transparent where the mode can say so."""
    image = Image.new("L", (2, 1), 0)
    image.putpixel((1, 0), 200 if mode != "1" else 255)
    expected = [0.0, 200 / 255 if mode != "1" else 1.0]
    options = {}
    if mode in ("RGBA", "LA"):
        image = image.convert(mode)
        image.putalpha(Image.eval(image.getchannel(0), lambda level: 255 - level // 200 * 255))
    elif mode == "PA":
        image = image.convert("P").convert("PA")
        image.putpixel((1, 0), (200, 0))
    elif mode == "I;16":
        image = Image.fromarray(np.array([[0, 200 * 257]], dtype=np.uint16))
    else:
        image = image.convert(mode)
    if mode in ("P", "RGB", "L"):
        options["transparency"] = (200,) * 3 if mode == "RGB" else 200
        image.info |= options
    if mode in ("RGBA", "LA", "PA", "P", "RGB", "L"):
        expected[1] = 1.0
    sources = [image]
    if mode not in ("PA", "CMYK", "YCbCr"):
        image.save(tmp_path / "image.png", **options)
        sources.append(tmp_path / "image.png")
    for source in sources:
        assert load_image(source).flatten().tolist() == pytest.approx(expected * 3, abs=0.01)


@pytest.mark.parametrize(
    ("media", "message"),
    [
        (torch.rand(3, 8, 8), r"\[3, 8, 8\].*\[B, 3, H, W\].*unsqueeze\(0\)"),
        (torch.rand(2, 5, 3, 8, 8), r"scores images \[B, 3, H, W\]"),
        (torch.rand(2, 8, 8, 3), r"channels come before height and width: movedim\(-1, -3\)"),
        (torch.rand(2, 1, 8, 8), "3 channels"),
        (torch.rand(0, 3, 8, 8), "empty"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), r"torch.uint8.*media.float\(\) / 255"),
        (torch.full((1, 3, 8, 8), 255.0), r"from 255 to 255; \[0, 1\]"),
        (torch.full((1, 3, 8, 8), -0.5), r"from -0.5 to -0.5.*media / 2 \+ 0.5"),
        (torch.full((1, 3, 8, 8), float("nan")), "from nan to nan"),
        ([], "media is empty"),
        ("picture.png", "media is a str"),
        (["nowhere.png"], "no such image file: nowhere.png"),
    ],
)
def test_wrong_media_are_refused(media, message):
    with pytest.raises(RewardError, match=message):
        Brightness()(media)


def test_wrong_prompts_and_references_are_refused(tmp_path):
    reward, media, one = Length(), ramp(2), torch.rand(1, 3, 4, 4)
    assert reward(media, prompts=["a", "bcd"], references=[one, one.repeat(2, 1, 1, 1)]).tolist() == [11.0, 23.0]
    assert reward(media, prompts=["a", "b"], references=torch.rand(2, 4, 3, 5, 5)).tolist() == [41.0, 41.0]
    for prompts, references, message in [
        (None, [one, one], r"length needs prompts: reward\(media, prompts=\[...\]\), one for each of 2"),
        (["a"], [one, one], "1 prompts for 2 media"),
        ("ab", [one, one], "prompts is one string"),
        (["a", "b"], None, "length needs references"),
        (["a", "b"], [one], "1 sets of references for 2 media"),
        (["a", "b"], [one, one[0]], r"references\[1\] has shape"),
    ]:
        with pytest.raises(RewardError, match=message):
            reward(media, prompts=prompts, references=references)
    with pytest.raises(TypeError):
        reward(media, ["a", "b"])
    # Directly, for a run-time type checker may stop a wrong item before the reward does.
    with pytest.raises(RewardError, match=r"prompts\[1\] is a NoneType; a string is expected"):
        check_strings(["a", None])
    with pytest.raises(RewardError, match=r"references\[1\] is a str; a tensor is expected"):
        check_references([one, "path"])
    with pytest.raises(RewardError, match=r"media\[1\] is a int; allowed: tensor, PIL image, path"):
        read_media([one[0], 7], "image")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    with pytest.raises(RewardError, match="cannot read .*broken.png"):
        Brightness()([broken])


def test_matrix_and_pairwise_of_a_plain_reward():
    matrix = PromptLength(batch_size=2)(ramp(3), prompts=["a"] * 3)
    assert matrix.tolist() == [1.0, 1.5, 2.0]
    assert PromptLength(batch_size=2).matrix(ramp(3), ["a", "bcd"]).tolist() == [[1, 3], [1.5, 3.5], [2, 4]]
    with pytest.raises(RewardError, match=r"brightness needs nothing but media; matrix\(\)"):
        Brightness().matrix(ramp(2), ["a"])
    assert Brightness().pairwise(ramp(2), ramp(2).flip(0)).tolist() == [-1.0, 1.0]
    # Lower is better here: the shorter prompt's side is the better one.
    assert PromptLength().pairwise(ramp(2), ramp(2).flip(0), prompts=["a", "b"]).tolist() == [1.0, -1.0]


def test_videos_have_a_dimension_more():
    class Motion(Reward):
        """Mean absolute change from frame to frame."""

        name = "motion"
        modality = "video"

        def score(self, media, prompts, references):
            return media.diff(dim=1).abs().flatten(1).mean(1)

    assert torch.allclose(Motion()(ramp(5)[None]), torch.tensor([0.25]))
    with pytest.raises(RewardError, match=r"scores videos \[B, F, 3, H, W\]"):
        Motion()(ramp(5))


def test_a_score_of_the_wrong_shape_is_an_error():
    class Scalar(Brightness):
        name = "scalar"

        def score(self, media, prompts, references):
            return media.mean()

    with pytest.raises(RewardError, match=r"Scalar.score returned \[\] instead of a tensor \[2\]"):
        Scalar()(ramp(2))


def test_facts_and_their_checks():
    facts = Facts.of(Length)
    assert (facts.name, facts.needs, facts.differentiable) == ("length", ("prompts", "references"), False)
    assert facts.summary == "Length of the prompt plus the number of references, read from the host."
    assert Length().facts == facts
    with pytest.raises(RewardError, match="needs has 'prompt'; did you mean 'prompts'"):
        type("Wrong", (Reward,), {"needs": {"prompt"}})
    with pytest.raises(RewardError, match="modality is 'picture'"):
        type("Wrong", (Reward,), {"modality": "picture"})
    with pytest.raises(RewardError, match="dtype 'float31' is unknown; did you mean 'float32'"):
        Brightness(dtype="float31")
    with pytest.raises(RewardError, match="batch_size is 0"):
        Brightness(batch_size=0)
