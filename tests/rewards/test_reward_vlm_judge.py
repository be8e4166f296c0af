"""A judge behind a chat endpoint on this machine: scores, aspects, log probabilities, pairs, what cannot be read."""

import math

import pytest
import torch
from chat_server import serve
from contract import check_contract, smooth_images
from PIL import Image, ImageStat

from rewards import RewardError, load_reward


def level(image):
    """The mean level of the red channel, in [0, 1]."""
    return ImageStat.Stat(image).mean[0] / 255


def by_redness(text, images):
    """A judge that likes red, and long captions."""
    caption = text.rpartition("Text Caption: [")[2].removesuffix("]")
    if len(images) == 2:
        first, second = map(level, images)
        better = "Both images are equally good" if abs(first - second) < 0.02 else None
        return f"Well. {better or f'Image {1 + (second > first)} is better than Image {1 + (first >= second)}'}."
    return f"On the whole it is fine.\n**Final Score:** {1 + 3 * level(images[0]) + min(len(caption), 40) / 40:.4f}"


def reds(*levels):
    return torch.stack([torch.tensor([level, 0.0, 0.0]).view(3, 1, 1).expand(3, 4, 4) for level in levels])


def judge(server, **options):
    return load_reward("vlm-judge", endpoint=server.url, model="m", device="cpu", **options)


def saying(*answers):
    """A server that gives these answers one after the other, to one question at a time."""
    left = list(answers)
    return serve(lambda text, images: left.pop(0))


def test_scores_are_a_fifth_of_what_is_said():
    with serve(by_redness) as server:
        reward = judge(server)
        # levels 0, 102 / 255 and 1; captions of 20, 40 and 0 letters
        scores = reward(reds(0.0, 0.4, 1.0), prompts=["x" * 20, "x" * 99, ""])
        assert scores.tolist() == pytest.approx([1.5 / 5, 3.2 / 5, 4 / 5], abs=1e-4)
        assert reward.asked == 3 and reward.parse_failures == 0
        assert reward.version.startswith("overall by m, instruction ") and reward.source == f"m at {server.url}"
        assert judge(server, template="Rate: {prompt}").version != reward.version


def test_contract():
    with serve(by_redness) as server:
        check_contract(judge(server), atol=1e-4)


def test_images_go_as_they_are_or_squashed():
    sizes = []
    with serve(lambda text, images: sizes.append(images[0].size) or "Final Score: 3") as server:
        wide = smooth_images(1, 20, 30)
        assert judge(server)(wide, prompts=["a"]).item() == pytest.approx(0.6)
        judge(server, resize=16)(wide, prompts=["a"])
    assert sizes == [(30, 20), (16, 16)]


def test_a_prompt_with_braces_is_only_a_prompt():
    with serve(by_redness) as server:
        judge(server, template="{x} {prompt} Text Caption: []")(reds(0.5), prompts=["a {prompt} {0}"])
        assert server.bodies[0]["messages"][0]["content"][1]["text"] == "{x} a {prompt} {0} Text Caption: []"


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("Final Score: 4", 4.0),
        ("final score 2.5/5", 2.5),
        ("I give a Final Score: 1 to 5. Final Score: 4.", 4.0),
        ("**Final Score:** **5**", 5.0),
        ("Final Score: 10", None),
        ("Final Score: 0", None),
        ("Final Score: four", None),
        ("", None),
    ],
)
def test_what_counts_as_an_answer(answer, value):
    with saying(answer) as server:
        reward = judge(server, on_parse_error="raise")
        if value is not None:
            assert reward(reds(0.5), prompts=["a"]).item() == pytest.approx(value / 5)
            return
        with pytest.raises(RewardError, match="1 of 1 answers could not be read.*choose on_parse_error"):
            reward(reds(0.5), prompts=["a"])
        assert reward.parse_failures == 1


def test_aspects():
    good = "Alignment Score (1-5): 4\nCoherence Score (1-5): 3\nStyle Score: 5"
    with saying(good, "Alignment Score: 4\nStyle Score: 5") as server:
        reward = judge(server, form="aspects", concurrency=1)
        with pytest.warns(UserWarning, match="1 of 2 answers could not be read"):
            scores = reward(reds(0.1, 0.2), prompts=["a", "b"])
    assert scores[0].item() == pytest.approx(0.8) and scores[1].isnan()


def test_failures_to_read_are_nan_and_counted():
    def sulky(text, images):
        return "I would rather not." if level(images[0]) > 0.5 else by_redness(text, images)

    with serve(sulky) as server:
        reward = judge(server)
        media = reds(0.2, 0.7, 0.8)
        for asked in (3, 6):
            with pytest.warns(UserWarning, match="2 of 3 answers could not be read, such as 'I would rather not.'"):
                scores = reward(media, prompts=["a", "b", "c"])
            assert scores.isnan().tolist() == [False, True, True]
            assert (reward.asked, reward.parse_failures) == (asked, asked * 2 // 3)
        with pytest.warns(UserWarning):
            lowest = judge(server, on_parse_error="min")(media, prompts=["a", "b", "c"])
        assert lowest.tolist()[1:] == pytest.approx([0.2, 0.2])
        # a combination says which part has no score
        parts = {"judge": {"name": "vlm-judge", "endpoint": server.url, "model": "m"}}
        with pytest.warns(UserWarning), pytest.raises(RewardError, match="part 'judge' gave NaN for 2 of 3 media"):
            load_reward("combine", parts=parts)(media, prompts=["a", "b", "c"])


def token(text, **chances):
    others = [{"token": name.replace("_", " "), "logprob": math.log(chance)} for name, chance in chances.items()]
    return {"token": text, "logprob": -0.1, "top_logprobs": others}


def test_expected_score_under_the_models_probabilities():
    numbers = {"4": 0.5, "_4": 0.1, "5": 0.2, "3": 0.1, "Four": 0.05, "9": 0.05}
    tokens = [token("So 3. Final"), token(" Score: "), token("4", **numbers), token(".")]
    answer = {"message": {"content": "So 3. Final Score: 4."}, "logprobs": {"content": tokens}}
    with serve(lambda text, images: answer) as server:
        reward = judge(server, expected=True)
        # 4 with and without a blank before it, 5 and 3: (4 * 0.6 + 5 * 0.2 + 3 * 0.1) / 0.9
        assert reward(reds(0.5), prompts=["a"]).item() == pytest.approx(3.7 / 0.9 / 5)
        assert server.bodies[0]["logprobs"] is True and server.bodies[0]["top_logprobs"] == 20
        assert judge(server)(reds(0.5), prompts=["a"]).item() == pytest.approx(0.8)
    with saying("Final Score: 3.5", "Final Score: 4") as server:
        reward = judge(server, expected=True)
        assert reward(reds(0.5), prompts=["a"]).item() == pytest.approx(0.7), "no digit, and so as it is written"
        with pytest.raises(RewardError, match="no log probabilities of the score; remove expected=True"):
            reward(reds(0.5), prompts=["a"])


def test_pairs_are_asked_in_both_orders():
    with serve(by_redness) as server:
        reward = judge(server)
        preferred = reward.pairwise(reds(0.8, 0.2, 0.5), reds(0.1, 0.9, 0.5), prompts=["a", "b", "c"])
        assert preferred.tolist() == [1.0, -1.0, 0.0] and preferred.dtype == torch.float32
        assert len(server.bodies) == 6 - 1, "twice the same picture is one question"
        assert reward.range == (0.2, 1.0) and reward.asked == 6
        mixed = [Image.new("RGB", (4, 4), (255, 0, 0)), torch.zeros(3, 6, 2)]
        assert reward.pairwise(mixed, mixed[::-1], prompts=["a", "b"]).tolist() == [1.0, -1.0]
        with pytest.raises(RewardError, match="2 first and 1 second images"):
            reward.pairwise(mixed, mixed[:1], prompts=["a", "b"])
        with pytest.raises(RewardError, match="needs prompts"):
            reward.pairwise(mixed, mixed)


@pytest.mark.parametrize(
    ("forth", "back", "value"),
    [
        ("Image 1 is better than Image 2.", "Image 1 is better than Image 2.", 0.0),  # always the first place
        ("Image 2 is better than Image 1.", "Both images are equally good.", -0.5),
        ("Is Image 2 better? No: image 1 is better than image 2", "Image 2 is better than Image 1", 1.0),
        ("Who knows?", "Image 2 is better than Image 1.", math.nan),
    ],
)
def test_orders_that_disagree(forth, back, value):
    def answer(text, images):
        return forth if level(images[0]) > level(images[1]) else back

    with serve(answer) as server:
        reward = judge(server)
        if math.isnan(value):
            with pytest.warns(UserWarning, match="1 of 2 answers could not be read"):
                assert reward.pairwise(reds(0.8), reds(0.1), prompts=["a"]).isnan().all()
            assert reward.parse_failures == 1
        else:
            assert reward.pairwise(reds(0.8), reds(0.1), prompts=["a"]).tolist() == [value]


def test_nothing_is_asked_twice_with_a_cache(tmp_path):
    with serve(by_redness) as server:
        media, prompts = reds(0.1, 0.5), ["a", "b"]
        first = judge(server, cache=tmp_path)(media, prompts=prompts)
        assert judge(server, cache=tmp_path)(media, prompts=prompts).equal(first) and len(server.bodies) == 2
        judge(server, cache=tmp_path, template="Other. Text Caption: [{prompt}]")(media, prompts=prompts)
        assert len(server.bodies) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "overal"}, "form 'overal' is unknown; did you mean 'overall'"),
        ({"on_parse_error": "zero"}, "on_parse_error 'zero' is unknown; allowed: min, nan, raise"),
        ({"template": "Rate this."}, "template lacks the placeholder {prompt}"),
        ({"pair_template": "Which?"}, "pair_template lacks the placeholder {prompt}"),
        ({"endpoint": "localhost"}, "an address like http"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(RewardError, match=message):
        load_reward("vlm-judge", **{"endpoint": "http://127.0.0.1:9/v1", "model": "m", **options})


def test_win_rates_of_a_group_over_a_real_connection():
    from mmalign.core.cost import Cost
    from mmalign.scoring.choice import WeightedReward
    from mmalign.scoring.live import LiveRewards

    with serve(by_redness) as server:
        live = LiveRewards([WeightedReward("judge", 1.0, judge(server))], Cost())
        found = live.win_rates(reds(0.8, 0.1, 0.5), ["a", "a", "a"], 3, 0.0)
        assert found.total.tolist() == pytest.approx([1.0, 0.0, 0.5]) and len(server.bodies) == 6
    with saying("no idea", "no idea") as server:
        live = LiveRewards([WeightedReward("judge", 1.0, judge(server))], Cost())
        with pytest.warns(UserWarning, match="could not be read"):
            assert live.win_rates(reds(0.8, 0.1), ["a", "a"], 2, 0.0).total.tolist() == [0.5, 0.5]
