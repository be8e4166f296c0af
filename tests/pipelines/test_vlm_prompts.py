"""Media stand where the text names them; videos of one frame, and of unequal lengths in one prompt."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny_vlms
import torch
from torch import Tensor

from pipelines.errors import PipelineError
from pipelines.vlm.load import load_vlm
from pipelines.vlm.model import VisionLanguageModel
from pipelines.vlm.prompts import content_of

FAMILIES = tuple(tiny_vlms.BUILDERS)
MEDIA_FIRST = (
    "{% for message in messages %}{% for part in message['content'] if part['type'] != 'text' %}<{{ part['type'] }}>\n"
    "{% endfor %}{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endfor %}"
)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VisionLanguageModel:
    folder = tiny_vlms.BUILDERS[request.param](tmp_path_factory.mktemp("vlm") / request.param)
    return load_vlm(folder, device="cpu")


def video(frames: int, side: int = 16, seed: int = 0) -> Tensor:
    return torch.rand(frames, 3, side, side, generator=torch.Generator().manual_seed(seed))


def text_around_vision(model: VisionLanguageModel, ids: Tensor) -> list[str]:
    """The texts of a prompt between its tokens that stand for vision."""
    words = [None if int(i) in model.vision_ids else model.tokenizer.decode([int(i)]) for i in ids]
    text = "".join("\0" if word is None else word for word in words)
    return re.split("\0+", text)


def test_parts_of_a_prompt() -> None:
    image, clip, what = {"type": "image"}, {"type": "video"}, {"type": "text", "text": "What?"}
    assert content_of("What?", ["video", "image"]) == [clip, image, what]
    assert content_of("<video>\nWhat?", ["video"]) == [clip, what]
    assert content_of("What?\n<image>", ["image"]) == [what, image]
    compared = content_of("Compare <image> and <image>.", ["image", "image"])
    assert [part.get("text", "*") for part in compared] == ["Compare ", "*", " and ", "*", "."]


def test_media_stand_where_the_text_names_them(model: VisionLanguageModel) -> None:
    first, second = video(1)[0], video(1, seed=1)[0]
    leading = model.encode_prompt("<image>\n<image>\nSame?", [first, second])
    plain = model.encode_prompt("Same?", [first, second])
    assert torch.equal(leading.prompt_ids, plain.prompt_ids)
    between = model.encode_prompt("Is <image> like <image> here?", [first, second])
    before, *middle, after = text_around_vision(model, between.prompt_ids)  # tiles of SmolVLM stand in lines
    assert before.endswith("Is ") and "".join(middle).strip() == "like" and after.strip().startswith("here?")
    assert all(torch.equal(between.vision[name], value) for name, value in plain.vision.items())

    clip = video(4)
    assert torch.equal(
        model.encode_prompt("<video>\nWhat moves?", [clip]).prompt_ids,
        model.encode_prompt("What moves?", [clip]).prompt_ids,
    )
    # The data of LLaVA-Video name a video <image>.
    assert torch.equal(
        model.encode_prompt("In <image> what moves?", [clip]).prompt_ids,
        model.encode_prompt("In <video> what moves?", [clip]).prompt_ids,
    )
    for text, media in (("<image> and <image>?", [first]), ("<video>?", [first]), ("<video>?", []), ("<image>", [])):
        with pytest.raises(PipelineError, match="give a tag for each of them, or no tag"):
            model.encode_prompt(text, media)


def test_a_chat_format_that_puts_media_first_is_given_the_text_with_placeholders(tmp_path: Path) -> None:
    model = load_vlm(tiny_vlms.build_llava_onevision(tmp_path), device="cpu")
    model.processor.chat_template = MEDIA_FIRST
    image = video(1)[0]
    first = model.encode_prompt("<image>\nWhat is it?", [image])
    inside = model.encode_prompt("See\n<image>\nWhat is it?", [image])
    assert text_around_vision(model, first.prompt_ids) == ["", "\nWhat is it?"]
    assert text_around_vision(model, inside.prompt_ids) == ["See\n", "\nWhat is it?"]


@torch.no_grad()
def test_one_frame_is_a_video_for_every_family(model: VisionLanguageModel) -> None:
    one, other = video(1), video(1, seed=1)
    values, _ = model.log_probs(model.encode(["what?"] * 2, [[one], [other]], ["red", "red"]))
    assert values.isfinite().all() and (values[0] - values[1]).abs().max() > 1e-3
    assert len(model.generate(["what?"], [[one]], max_new_tokens=2)) == 1


@torch.no_grad()
def test_two_videos_of_unequal_size_work_and_of_unequal_length_work_or_are_refused(
    model: VisionLanguageModel,
) -> None:
    small, large = video(4), video(4, side=32, seed=1)
    for media in ([small, large], [large, small]):
        values, _ = model.log_probs(model.encode(["what?"], [media], ["red"]))
        assert values.isfinite().all()
    uneven = [small, video(6, seed=2)]
    if not model.family.mixes_lengths:
        with pytest.raises(PipelineError, match="equally many frames in one prompt, not of 4 and 6; take the same"):
            model.encode_prompt("what?", uneven)
        return
    values, _ = model.log_probs(model.encode(["what?"] * 2, [uneven, [small, small]], ["red", "red"]))
    alone, _ = model.log_probs(model.encode(["what?"], [uneven], ["red"]))
    torch.testing.assert_close(values[0], alone[0], rtol=1e-5, atol=2e-5)
