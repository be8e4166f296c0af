"""lambda-Harmonic: numbers by hand, a tiny ALIGN, other rewards in its place, labels and early stopping."""

import math

import pytest
import torch
from contract import check_contract, smooth_images
from tiny_towers import write_align, write_hf_clip, write_vit

from rewards import RewardError, load_reward
from rewards.lambda_harmonic import harmonic, without_token

CAPTIONS = ["a red circle", "two blue square", "a cat", "a dog on a table", "", "a photo of a dog", "red", "two cat"]


@pytest.fixture(scope="module")
def align(tmp_path_factory):
    path = tmp_path_factory.mktemp("align")
    write_align(path)
    return path


@pytest.fixture
def references():
    return [smooth_images(count, 40, 52, seed=count) for count in (1, 2, 3)]


def number(image, text, lam):
    return harmonic(torch.tensor(image, dtype=torch.float64), torch.tensor(text, dtype=torch.float64), lam).item()


def test_formula():
    assert number(0.9, 0.6, 0.3) == pytest.approx(0.6666666769547326, abs=1e-15)
    assert number(0.9, 0.6, 1.0) == pytest.approx(0.9, abs=2e-8)
    assert number(0.9, 0.6, 0.0) == pytest.approx(0.6, abs=2e-8)
    assert number(0.0, 1.0, 0.5) < 1e-7, "no likeness cannot be made up for"
    assert number(0.9, 0.7, 0.3) > number(0.9, 0.6, 0.3) < number(0.95, 0.6, 0.3)
    for lam in (0.0, 0.3, 0.7, 1.0):
        assert number(0.9, 0.6, lam) <= lam * 0.9 + (1 - lam) * 0.6 + 2e-8
    assert number(0.5, 0.5, 0.7) == pytest.approx(0.5, abs=2e-8)


def test_score_is_the_mean_of_likeness_and_agreement(align, references):
    images, prompts = smooth_images(3), ["a [V] red circle", "two cat", "[V] dog"]
    agreement = load_reward("clip", weights=align)(images, prompts=["a red circle", "two cat", "dog"]) / 2 + 0.5
    likeness = load_reward("clip-i", weights=align)(images, references=references) / 2 + 0.5
    for lam in (0.0, 0.3, 0.5, 1.0):
        reward = load_reward("lambda-harmonic", weights=align, lambda_validation=lam)
        found = reward(images, prompts=prompts, references=references)
        expected = 1 / (lam / likeness + (1 - lam) / agreement)
        assert torch.allclose(found, expected, atol=1e-6) and found.std() > 1e-4
        assert reward.version == f"lambda {lam:g}" and reward.derived_from == frozenset()
    kept = load_reward("lambda-harmonic", weights=align, token=None)(images, prompts=prompts, references=references)
    default = load_reward("lambda-harmonic", weights=align)(images, prompts=prompts, references=references)
    assert kept[1] == default[1] and kept[0] != default[0]


def test_contract(align):
    reward = load_reward("lambda-harmonic", weights=align)
    check_contract(reward, prompts=CAPTIONS, half_atol=0.02, spread=1e-4)


def test_other_similarities(tmp_path, references):
    write_hf_clip(tmp_path / "clip")
    (tmp_path / "dino").mkdir()
    write_vit(tmp_path / "dino")
    text = {"name": "clip", "weights": tmp_path / "clip", "kind": "clipscore"}
    image = {"name": "dino-i", "weights": tmp_path / "dino"}
    reward = load_reward("lambda-harmonic", image=image, text=text)
    images, prompts = smooth_images(3), ["a red circle", "a cat", "a dog"]
    agreement = load_reward(**text)(images, prompts=prompts) / 100
    likeness = load_reward(**image)(images, references=references) / 2 + 0.5
    found = reward(images, prompts=prompts, references=references)
    assert torch.allclose(found, 1 / (0.3 / likeness + 0.7 / agreement), atol=1e-5)
    assert reward.derived_from == {"clip", "dino-i"} and "dino-i" in reward.version and reward.towers is None
    half = load_reward("lambda-harmonic", image=image, weights=tmp_path / "clip")
    agreement = load_reward("clip", weights=tmp_path / "clip")(images, prompts=prompts) / 2 + 0.5
    found = half(images, prompts=prompts, references=references)
    assert torch.allclose(found, 1 / (0.3 / likeness + 0.7 / agreement), atol=1e-5)
    check_contract(reward, spread=1e-4, atol=2e-5)


def test_labels_have_a_lambda_of_their_own(align, references):
    images, prompts = smooth_images(6, seed=5), ["a red circle", "two cat", "a dog"]
    reward = load_reward("lambda-harmonic", weights=align, lambda_labels=0.0)
    pair = {"first": images[:3], "second": images[3:], "prompts": prompts, "references": references}
    text = load_reward("clip", weights=align)
    margin = (text(images[:3], prompts=prompts) - text(images[3:], prompts=prompts)).double() / 2
    expected = [1 / (1 + math.exp(-value)) for value in margin.tolist()]
    assert reward.label_probabilities(**pair).tolist() == pytest.approx(expected, abs=1e-6)
    swapped = pair | {"first": images[3:], "second": images[:3]}
    assert (reward.label_probabilities(**pair) + reward.label_probabilities(**swapped)).tolist() == pytest.approx(
        [1] * 3
    )
    same = load_reward("lambda-harmonic", weights=align)
    margin = same.pairwise(images[:3], images[3:], prompts=prompts, references=references)
    assert torch.allclose(same.label_probabilities(**pair), margin.sigmoid()), "by default the lambda of validation"
    assert same.at(0.0).version == "lambda 0" and same.version == "lambda 0.3"


def test_labels_are_bernoulli(align, monkeypatch):
    reward = load_reward("lambda-harmonic", weights=align)
    count, images = 20000, smooth_images(1)
    monkeypatch.setattr(type(reward), "label_probabilities", lambda self, *a, **k: torch.full((count,), 0.3))

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return reward.labels(images, images, prompts=[], references=[], generator=generator)

    labels = draw(1)
    assert labels.dtype == torch.bool and torch.equal(labels, draw(1)) and not torch.equal(labels, draw(2))
    assert abs(labels.double().mean().item() - 0.3) < 4 * math.sqrt(0.3 * 0.7 / count)


def test_placeholders_are_taken_out():
    assert without_token("a photo of [V] dog", "[V]") == "a photo of dog"
    assert without_token("[V] dog", "[V]") == "dog" and without_token("a  dog", "[V]") == "a  dog"
    assert without_token("a sks dog", "sks") == "a dog" and without_token("[V] dog", None) == "[V] dog"


def test_wrong_options_are_refused(align):
    with pytest.raises(RewardError, match="lambda_validation is 1.2; a number from 0"):
        load_reward("lambda-harmonic", weights=align, lambda_validation=1.2)
    with pytest.raises(RewardError, match="lambda_labels is -1"):
        load_reward("lambda-harmonic", weights=align, lambda_labels=-1.0)
    clip = load_reward("clip", weights=align)
    with pytest.raises(RewardError, match=r"image='clip' needs \['prompts'\]; it may need references"):
        load_reward("lambda-harmonic", image=clip, weights=align)
    clip.range = (0.0, float("inf"))
    with pytest.raises(RewardError, match=r"text='clip' has the range \(0.0, inf\)"):
        load_reward("lambda-harmonic", text=clip, weights=align)
    with pytest.raises(RewardError, match="so weights= is not used"):
        load_reward("lambda-harmonic", image=clip, text=clip, weights=align)
