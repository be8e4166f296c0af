"""TextNorm: its algebra, one embedding an image, ensembles, and where contrast prompts come from."""

import csv
import json
import threading

import pytest
import torch
from contract import PROMPTS, check_contract, smooth_images
from golden_data import golden_file

from mmalign.core.resources import find
from mmalign.shapes import world
from rewards import Reward, RewardError, load_reward
from rewards.bases.cross_encoder import CrossEncoderReward
from rewards.language.contrast import make_contrast, read_contrast

TABLE = {prompt: [f"{prompt} {k}" for k in range(1 + i % 3)] for i, prompt in enumerate(PROMPTS)}


class Joint(Reward):
    """A CLIP that looks at an image and a prompt together, plus an offset for each image."""

    name = "joint"
    needs = {"prompts"}
    differentiable = True

    def __init__(self, clip, times=1.0, offset=0.0, **common):
        super().__init__(**common)
        self.clip, self.times, self.offset = clip, times, offset
        self.calls = []

    def score(self, media, prompts, references):
        self.calls.append(len(media))
        return self.times * self.clip.score(media, prompts, None) + self.offset * media.flatten(1).mean(1)


class Encoded(CrossEncoderReward):
    """The same, but what it makes of an image is kept for further prompts."""

    name = "encoded"
    differentiable = True

    def __init__(self, clip, **common):
        super().__init__(**common)
        self.clip, self.encodings = clip, 0

    def encode_media(self, media):
        self.encodings += 1
        return self.clip.media_embeddings(media)

    def compare(self, encoded, prompts):
        return (encoded * self.clip.prompt_embeddings(prompts)).sum(-1)


class Backwards(Joint):
    """Lower is better."""

    name = "backwards"
    higher_is_better = False


@pytest.fixture(scope="module")
def clip(clip_directory):
    return load_reward("clip", weights=clip_directory, device="cpu")


def text_norm(base, contrast=TABLE, **options):
    return load_reward("text-norm", base=base, contrast=contrast, device="cpu", **options)


def by_hand(clip, media, prompts, scale):
    rows = []
    for i, prompt in enumerate(prompts):
        scores = clip.matrix(media[[i]], [prompt, *TABLE[prompt]])[0].double() * scale
        rows.append((scores[0].exp() / scores.exp().sum()).item())
    return rows


def test_softmax_over_the_true_prompt_and_its_contrasts(clip):
    media = smooth_images()
    scores = text_norm(clip, scale=20.0)(media, prompts=PROMPTS)
    assert scores.tolist() == pytest.approx(by_hand(clip, media, PROMPTS, 20.0), abs=1e-5)
    assert scores.std() > 0.02


def test_a_vanishing_scale_gives_chance_and_a_large_one_the_winner(clip):
    media = smooth_images()
    chance = [1 / (1 + len(TABLE[prompt])) for prompt in PROMPTS]
    assert text_norm(clip, scale=1e-7)(media, prompts=PROMPTS).tolist() == pytest.approx(chance, abs=1e-6)
    sharp = text_norm(clip, scale=1e6)(media, prompts=PROMPTS)
    best = [float(clip.matrix(media[[i]], [p, *TABLE[p]]).argmax() == 0) for i, p in enumerate(PROMPTS)]
    assert sharp.tolist() == pytest.approx(best, abs=1e-3) and 0 < sum(best) < 8


def test_probabilities_of_a_set_add_up_to_one(clip):
    candidates = ["a red circle", "a blue circle", "a red star", "two red circles"]
    table = {prompt: candidates for prompt in candidates}  # each true prompt is in its own list, and taken out
    reward = text_norm(clip, table, scale=30.0)
    assert reward.prompt_set("a red star") == ["a red star", "a red circle", "a blue circle", "two red circles"]
    image = smooth_images(1).expand(4, -1, -1, -1)
    assert reward(image, prompts=candidates).sum().item() == pytest.approx(1.0, abs=1e-6)


def test_what_is_added_to_all_scores_of_an_image_does_not_matter(clip):
    media = smooth_images()
    plain, shifted = text_norm(Joint(clip)), text_norm(Joint(clip, offset=7.0))
    assert torch.allclose(plain(media, prompts=PROMPTS), shifted(media, prompts=PROMPTS), atol=1e-5)


def test_two_towers_embed_each_image_once_and_agree_with_joint_scoring(clip, monkeypatch):
    media, calls = smooth_images(), []
    encode = type(clip).encode_media
    monkeypatch.setattr(type(clip), "encode_media", lambda self, m: calls.append(len(m)) or encode(self, m))
    fast = text_norm(clip, scale=20.0)(media, prompts=PROMPTS)
    assert calls == [8]
    joint = Joint(clip)
    slow = text_norm(joint, scale=20.0)(media, prompts=PROMPTS)
    assert torch.allclose(fast, slow, atol=1e-5)
    # sets of 2, 3, 4, 2, 3, 4, 2, 3 candidates: as many passes as the longest has, over those that reach it
    assert joint.calls == [8, 8, 5, 2]


def test_what_reads_encoded_images_encodes_each_once(clip):
    media, base = smooth_images(), Encoded(clip)
    scores = text_norm(base, scale=20.0)(media, prompts=PROMPTS)
    assert scores.tolist() == pytest.approx(by_hand(clip, media, PROMPTS, 20.0), abs=1e-5) and base.encodings == 1


def test_contrasts_are_asked_for_several_at_a_time(clip):
    class Slow:
        concurrency = 4

        def __init__(self):
            self.together = threading.Barrier(2, timeout=30)

        def __call__(self, prompt):
            self.together.wait()  # returns only when two are asked for at a time
            return TABLE[prompt]

    media = smooth_images()
    reward = text_norm(clip, Slow(), scale=20.0)
    assert reward(media, prompts=PROMPTS).tolist() == pytest.approx(by_hand(clip, media, PROMPTS, 20.0), abs=1e-5)


def test_lower_is_better_is_turned(clip):
    media = smooth_images()
    turned = text_norm(Backwards(clip, times=-1.0), scale=20.0)
    assert torch.allclose(
        turned(media, prompts=PROMPTS), text_norm(clip, scale=20.0)(media, prompts=PROMPTS), atol=1e-5
    )


def test_ensembles(clip):
    media = smooth_images()
    members = [clip, Joint(clip, times=-0.5)]
    one, other = (text_norm(member, scale=20.0)(media, prompts=PROMPTS) for member in members)
    mean = text_norm(members, scale=20.0)
    assert torch.allclose(mean(media, prompts=PROMPTS), (one + other) / 2, atol=1e-6)
    # of two members the population variance is the square of half their difference
    half = (one - other).abs() / 2
    careful = text_norm(members, scale=[20.0, 20.0], ensemble="uncertainty", lam=0.5)
    assert torch.allclose(careful(media, prompts=PROMPTS), (one + other) / 2 - 0.5 * half**2, atol=1e-6)
    by_std = text_norm(members, scale=20.0, ensemble="uncertainty", spread="std")
    assert torch.allclose(by_std(media, prompts=PROMPTS), (one + other) / 2 - half, atol=1e-6)
    assert mean.range == (0.0, 1.0) and careful.range == (-0.125, 1.0) and by_std.range == (-0.5, 1.0)
    assert mean.derived_from == {"clip", "joint"} and half.max() > 0.01


def test_contract(clip):
    check_contract(text_norm(clip, scale=20.0), half_atol=0.3, spread=0.02)
    check_contract(text_norm(Joint(clip), scale=20.0), spread=0.02)


def test_gradient_prefers_the_true_prompt(clip):
    reward = text_norm(clip, scale=20.0)
    media = smooth_images(2).requires_grad_()
    reward(media, prompts=PROMPTS[:2]).sum().backward()
    better = (media + 1e-2 * media.grad / media.grad.abs().amax((1, 2, 3), keepdim=True)).detach().clamp(0, 1)
    assert (reward(better, prompts=PROMPTS[:2]) > reward(media.detach(), prompts=PROMPTS[:2])).all()


def test_contrast_by_rules_from_files_and_from_options(clip, tmp_path):
    by_rules = text_norm(clip, "rules").prompt_set("a red circle")
    assert by_rules[0] == "a red circle" and {"a blue circle", "two red circles", "a red square"} <= set(by_rules)
    few = text_norm(clip, {"rules": {"kinds": ["attributes"], "limit": 2}})
    assert few.prompt_set("a red circle") == ["a red circle", "a blue circle", "a green circle"]
    rows = [{"prompt": "a cat", "contrast": ["A cat.", "a dog", "a dog", "two cats"]}]
    lines = tmp_path / "contrast.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert make_contrast(lines)("a cat") == make_contrast(str(lines))("A cat ") == ["a dog", "two cats"]
    whole = tmp_path / "contrast.json"
    whole.write_text(json.dumps({"a cat": ["a dog"]}))
    assert make_contrast({"file": whole, "otherwise": "rules"})("a red circle") == by_rules[1:]
    with pytest.raises(RewardError, match="has no contrast for the prompt 'a cow'.*otherwise: rules"):
        make_contrast(whole)("a cow")


def test_wrong_options_are_refused_with_the_fix(clip, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a"}\n')
    listed = tmp_path / "listed.json"
    listed.write_text('{"a": "b"}')
    for options, message in [
        ({"base": "clop"}, "text-norm: base: unknown reward 'clop'; did you mean 'clip'"),
        ({"base": {"weights": "x"}}, "is not a reward"),
        ({"base": load_reward("combine", parts={"x": {"name": Silent()}})}, "base 'combine' does not use prompts"),
        ({"base": clip, "ensemble": "ur"}, "ensemble 'ur' is unknown; .*mean, uncertainty"),
        ({"base": clip, "spread": "var"}, "spread 'var' is unknown"),
        ({"base": clip, "scale": [1.0, 2.0]}, r"scale is \[1.0, 2.0\] for 1 bases"),
        ({"base": clip, "scale": 0}, "one above 0"),
        ({"base": clip, "contrast": {"rules": {"kinds": ["colour"]}}}, "kind 'colour' is unknown"),
        ({"base": clip, "contrast": {"file": listed, "else": 1}}, "'a' has 'b'|no option 'else'"),
        (
            {"base": clip, "contrast": {"endpoint": "http://x", "modle": "m"}},
            "no option 'modle'; did you mean 'model'",
        ),
        ({"base": clip, "contrast": {"endpoint": "http://x"}}, "endpoint needs model: NAME"),
        ({"base": clip, "contrast": {"endpoint": "http://x", "model": "m", "count": 0}}, "count is 0"),
        ({"base": clip, "contrast": "nowhere.json"}, "contrast file 'nowhere.json': No such file"),
        ({"base": clip, "contrast": broken}, "'contrast'; give JSON"),
        ({"base": clip, "contrast": listed}, "'a' has 'b'; a list of prompts"),
        ({"base": clip, "contrast": []}, r"contrast is \[\]; give 'rules'"),
    ]:
        with pytest.raises(RewardError, match=message):
            load_reward("text-norm", **options)
    with pytest.raises(RewardError, match="no contrast prompts for 'nothing known', so that every image"):
        text_norm(clip, "rules")(smooth_images(1), prompts=["nothing known"])


class Silent(Reward):
    """Sees no prompts."""

    name = "silent"

    def score(self, media, prompts, references):
        return media.flatten(1).mean(1)


def test_published_contrast_sets():
    sets = {
        name: read_contrast(golden_file(f"../prompts/textnorm/prompt_set_{name}.json"))
        for name in ("composition", "counting", "comprehensive")
    }
    assert [len(table) for table in sets.values()][0::2] == [300, 100]
    repeated = [prompt for name, table in sets.items() for prompt, contrast in table.items() if prompt in contrast]
    assert len(repeated) == 1, "one true prompt is in its own list"
    found = {prompt: make_contrast(table)(prompt) for table in sets.values() for prompt in table}
    assert repeated[0] not in found[repeated[0]]
    assert {len(contrast) for contrast in sets["composition"].values()} == {32}


def test_shapes_clip_under_rules_tells_true_prompts_from_their_contrasts():
    prompts = [row["Prompts"] for row in csv.DictReader(find("assets/prompts/shapes-drawbench.csv").open())]
    reward = text_norm("shapes-clip", "rules", scale=100.0)
    assert min(len(reward.prompt_set(prompt)) for prompt in prompts) > 3, (
        "every prompt has contrasts, misspelt ones too"
    )
    things = [("circle", "red"), ("square", "green"), ("triangle", "blue"), ("star", "yellow")]
    shapes = [world.Object(shape, colour, "large", 32.0, 32.0, 12.0) for shape, colour in things]
    pictures = torch.stack([torch.from_numpy(world.render(world.Scene((thing,), "white"))) for thing in shapes])
    scores = reward.matrix(
        pictures.movedim(-1, 1).float() / 255, [f"a large {colour} {shape}" for shape, colour in things]
    )
    assert scores.diagonal().min() > 0.8 and scores[~torch.eye(4, dtype=torch.bool)].max() < 0.7
