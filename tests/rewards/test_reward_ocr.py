"""OCR: scoring of strings, quoted texts, and a rendered sign read by RapidOCR's own models."""

import re

import pytest
import torch
from contract import BATCH, check_contract, smooth_images
from golden_data import golden_file
from PIL import Image, ImageDraw, ImageFont

from rewards import RewardError, load_reward
from rewards.ocr import OcrReward, levenshtein, quoted_text, text_score


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [
        ("kitten", "sitting", 3),
        ("", "abc", 3),
        ("abc", "", 3),
        ("flaw", "lawn", 2),
        ("same", "same", 0),
        ("ab", "ba", 2),
    ],
)
def test_levenshtein(first, second, distance):
    assert levenshtein(first, second) == levenshtein(second, first) == distance


@pytest.mark.parametrize(
    ("read", "wanted", "score"),
    [
        ("Hello World", "hello world", 1.0),
        ("OPEN 24 hours Hel loWorld!", "Hello World", 1.0),
        ("Helo Wrld", "Hello World", 0.8),
        ("", "Hello", 0.0),
        # far more read than wanted costs no more than all of it
        ("completely different words on this sign", "Ox", 0.0),
        ("cab", "cat", 2 / 3),
    ],
)
def test_text_score(read, wanted, score):
    assert text_score(read, wanted) == pytest.approx(score)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('a sign "Stop" and a "Go"', "Stop"),
        ("A storefront with 'Hello World' written on it.", "Hello World"),
        ("the dog's bowl says 'Don't Panic'", "Don't Panic"),
        ("“Café” above a ‘door’", "Café"),
        ("'single' before \"double\"", "double"),
        ("a ‘door’ and “”", "door"),
    ],
)
def test_quoted_text(prompt, text):
    assert quoted_text(prompt) == text


@pytest.mark.parametrize("prompt", ["a dog", "", 'an empty "" sign', "the dog's and the cat's"])
def test_prompts_that_quote_nothing_are_refused_before_anything_is_read(prompt):
    def reader(image):
        raise AssertionError("nothing is to be read")

    reward = load_reward("ocr", reader=reader, device="cpu")
    with pytest.raises(RewardError, match="quotes no text; write it as in"):
        reward(smooth_images(1), prompts=[prompt])
    with pytest.raises(RewardError, match=re.escape(repr(prompt))):
        OcrReward.check_prompts(["a 'sign'", prompt])


def test_all_text_prompts_of_drawbench_are_read():
    import csv

    with golden_file("../prompts/drawbench.csv").open() as file:
        prompts = [row["prompt"] for row in csv.DictReader(file) if row["category"] == "Text"]
    texts = {"Hello World", "Diffusion", "Text to Image", "NeurIPS", "Deep Learning", "Google Brain Toronto"}
    assert len(prompts) == 21 and {quoted_text(prompt) for prompt in prompts} == texts | {"Google Research Pizza Cafe"}


def by_brightness(image):
    """Reads the mean level as letters: a test's reader."""
    return ["a" * round(sum(image.resize((1, 1)).getpixel((0, 0))) / 12), "b"]


def test_contract():
    prompts = [f'a sign "{"a" * (20 + 4 * k)}bb"' for k in range(BATCH)]
    check_contract(load_reward("ocr", reader=by_brightness, device="cpu"), prompts=prompts)


def test_lines_are_put_together_and_read_once():
    calls = []

    def reader(image):
        calls.append(image.size)
        return ["Hel", "lo"]

    reward = load_reward("ocr", reader=reader, device="cpu")
    media = [torch.rand(3, 8, 6), torch.rand(3, 4, 4), torch.rand(3, 8, 6)]
    matrix = reward.matrix(media, ['"hello"', "'help'"])
    # hello to help: one replaced, one deleted
    assert matrix.tolist() == [[1.0, 0.5]] * 3 and calls == [(6, 8), (6, 8), (4, 4)]
    assert reward.observations(media) == ["Hello"] * 3 and reward.version == "reader"
    with pytest.raises(RewardError, match="params apply to RapidOCR only"):
        load_reward("ocr", reader=reader, params={})


def sign(*lines):
    image = Image.new("RGB", (360, 60 + 90 * len(lines)), "white")
    for row, line in enumerate(lines):
        ImageDraw.Draw(image).text((40, 50 + 90 * row), line, fill="navy", font=ImageFont.load_default(44))
    return image


def test_rapidocr_reads_rendered_signs():
    pytest.importorskip("rapidocr", reason="the extra ocr is not installed")
    pytest.importorskip("onnxruntime", reason="the extra ocr is not installed")
    threads = {"EngineConfig.onnxruntime.intra_op_num_threads": 1}
    reward = load_reward("ocr", device="cpu", params=threads)
    media = [sign("Google Brain", "Toronto"), sign("Diffusion"), Image.new("RGB", (96, 64))]
    prompts = [
        "A sign that says 'Google Brain Toronto'.",
        "A sign that says 'Difussion'.",
        "A sign that says 'Diffusion'.",
    ]
    # "difussion" to "diffusion": an f for an s
    assert reward(media, prompts=prompts).tolist() == pytest.approx([1.0, 1 - 2 / 9, 0.0])
    assert reward.observations(media)[1:] == ["Diffusion", ""]
    assert re.fullmatch(r"rapidocr \d+\.\S+, {.*}", reward.version)
    with pytest.raises(RewardError, match="RapidOCR does not accept"):
        load_reward("ocr", params={"Nothing.at_all": 1})


def test_the_extra_is_named_where_rapidocr_is_missing(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(RewardError, match=r'pip install "mmalign\[ocr\]"'):
        load_reward("ocr")
