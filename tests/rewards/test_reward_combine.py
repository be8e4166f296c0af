"""Combinations of rewards: the modes' numbers, facts, gates, NaN, weights, transforms, and a real CLIP inside."""

import json
import math

import pytest
import torch
import yaml
from contract import PROMPTS, check_contract, smooth_images

from rewards import Reward, RewardError, load_reward
from rewards.combining.combine_modes import MODES, bounds
from rewards.combining.shaping import RunningStats
from rewards.combining.transforms import make_transform


class Channel(Reward):
    """Mean of one channel, times a factor."""

    name = "channel"
    differentiable = True
    range = (0.0, 1.0)
    licence = "Apache-2.0"
    citation = "none"

    def __init__(self, index=0, times=1.0, **common):
        super().__init__(**common)
        self.index, self.times = index, times
        self.range = (0.0, times)

    def score(self, media, prompts, references):
        return self.times * media[:, self.index].flatten(1).mean(1)


class Blank(Channel):
    """NaN where the picture is dark."""

    name = "blank"
    differentiable = False

    def score(self, media, prompts, references):
        scores = super().score(media, prompts, references)
        return torch.where(scores < 0.25, torch.nan, scores)


class Defects(Channel):
    """The third channel, as something to avoid."""

    name = "defects"
    higher_is_better = False
    differentiable = False


class Likeness(Reward):
    """Distance of mean colours to those of the references."""

    name = "likeness"
    needs = {"references"}
    range = (0.0, 1.0)
    citation = "none"

    def score(self, media, prompts, references):
        return torch.stack([1 - (m.mean() - r.mean()).abs() for m, r in zip(media, references, strict=True)])


def pictures(*colours):
    """Pictures of one colour each."""
    return torch.tensor(colours).view(-1, 3, 1, 1).expand(-1, 3, 4, 4).contiguous()


def red_green(mode="weighted-sum", first=None, second=None, **options):
    parts = {"red": {"name": Channel(0), **(first or {})}, "green": {"name": Channel(1), **(second or {})}}
    return load_reward("combine", mode=mode, parts=parts, device="cpu", **options)


TWO = pictures([0.9, 0.6, 0.1], [0.2, 0.8, 0.5])


@pytest.mark.parametrize(
    ("mode", "weights", "scores"),
    [
        ("weighted-sum", (2, -0.5), [1.5, 0.0]),
        ("weighted-sum", (None, None), [1.5, 1.0]),
        ("mean", (None, None), [0.75, 0.5]),
        ("harmonic", (0.3, 0.7), [1 / (0.3 / 0.9 + 0.7 / 0.6), 1 / (0.3 / 0.2 + 0.7 / 0.8)]),
        ("geometric", (0.25, 0.75), [0.9**0.25 * 0.6**0.75, 0.2**0.25 * 0.8**0.75]),
        ("geometric", (None, None), [0.54**0.5, 0.16**0.5]),
        ("product", (None, None), [0.54, 0.16]),
        ("min", (None, None), [0.6, 0.2]),
        ("worst-case", (None, None), [0.6, 0.2]),
    ],
)
def test_modes(mode, weights, scores):
    reward = red_green(mode, {"weight": weights[0]}, {"weight": weights[1]})
    assert reward(TWO).tolist() == pytest.approx(scores, abs=1e-6)
    low, high = reward.range
    assert low <= min(scores) and max(scores) <= high


def test_lambda_harmonic_golden():
    values = torch.tensor([[0.9], [0.6]], dtype=torch.float64)
    score, shares = MODES["harmonic"](values, torch.tensor([0.3, 0.7], dtype=torch.float64), 0.0, False)
    assert score.item() == pytest.approx(0.6666666769547326, abs=1e-15)
    assert shares.sum().item() == pytest.approx(1 / score.item())
    for weight, alone in [((1.0, 0.0), 0.9), ((0.0, 1.0), 0.6)]:
        score, _ = MODES["harmonic"](values, torch.tensor(weight, dtype=torch.float64), 0.0, False)
        assert score.item() == pytest.approx(alone, abs=2e-8)


def test_uncertainty_weighted_ensemble():
    members = {f"m{i}": Channel(i) for i in range(3)}
    media = pictures([0.1, 0.4, 0.7], [0.5, 0.5, 0.5])
    # mean 0.4, population variance (0.09 + 0 + 0.09) / 3 = 0.06; and no disagreement at all
    by_variance = load_reward("combine", mode="uncertainty-weighted", parts=members, lam=2.0)
    assert by_variance(media).tolist() == pytest.approx([0.4 - 0.12, 0.5])
    by_std = load_reward("combine", mode="uncertainty-weighted", parts=members, lam=0.5, spread="std")
    assert by_std(media).tolist() == pytest.approx([0.4 - 0.5 * 0.06**0.5, 0.5])
    assert by_variance.range == pytest.approx((-0.5, 1.0)) and by_std.range == pytest.approx((-0.25, 1.0))
    leaf = media.clone().requires_grad_()
    by_std(leaf).sum().backward()
    assert leaf.grad.isfinite().all() and leaf.grad[1].flatten().tolist() == pytest.approx([1 / 48] * 48)


@pytest.mark.parametrize("mode", sorted(MODES))
@pytest.mark.parametrize("std", [False, True])
def test_contributions_add_up_in_the_modes_own_terms(mode, std):
    values = torch.rand(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.1
    weights = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    score, shares = MODES[mode](values, weights, 0.7, std)
    own = {"harmonic": lambda s: 1 / s, "geometric": torch.log, "product": torch.log}.get(mode, lambda s: s)
    assert torch.allclose(shares.sum(0), own(score))


def test_contributions_and_part_scores_by_label():
    reward = red_green(first={"weight": 2, "factor": 0.5, "offset": 1.0}, second={"weight": -1})
    assert {k: v.tolist() for k, v in reward.contributions(TWO).items()} == {
        "red": pytest.approx([2.9, 2.2]),
        "green": pytest.approx([-0.6, -0.8]),
    }
    assert reward.part_scores(TWO)["red"].tolist() == pytest.approx([0.9, 0.2])
    assert reward(TWO).tolist() == pytest.approx([2.3, 1.4])
    assert red_green("min").contributions(TWO)["green"].tolist() == pytest.approx([0.6, 0.0])


def test_weights_are_never_rescaled_in_silence():
    with pytest.raises(RewardError, match="the weights add up to 2; harmonic needs 1, or normalise=True"):
        red_green("harmonic", {"weight": 0.6}, {"weight": 1.4})
    scores = red_green("harmonic", {"weight": 0.6}, {"weight": 1.4}, normalise=True)(TWO)
    assert scores[0].item() == pytest.approx(1 / (0.3 / 0.9 + 0.7 / 0.6))
    assert red_green(first={"weight": 3}, second={"weight": 1}, normalise=True)(TWO)[0].item() == pytest.approx(0.825)
    with pytest.raises(RewardError, match="no weight for green; give every part a weight, or none"):
        red_green("geometric", {"weight": 0.7})
    with pytest.raises(RewardError, match="mode 'harmonic' needs them positive"):
        red_green("harmonic", {"weight": -1}, {"weight": 2})
    with pytest.raises(RewardError, match="mode 'min' takes no weights"):
        red_green("min", {"weight": 1.0})


def test_positive_modes_refuse_what_is_not_unless_given_a_floor():
    zero = pictures([0.0, 0.5, 0.0], [0.5, 0.5, 0.5])
    with pytest.raises(RewardError, match="part 'red' has a score of 0, and mode 'harmonic' needs all above 0"):
        red_green("harmonic")(zero)
    assert red_green("product")(zero).tolist() == pytest.approx([0.0, 0.25])
    with pytest.raises(RewardError, match="'red' has a score of -0.5, and mode 'product' needs none below 0"):
        red_green("product", {"offset": -0.5})(zero)
    assert red_green("geometric", floor=0.02)(zero).tolist() == pytest.approx([0.1, 0.5])


def test_gates_close_on_either_side_and_need_no_gradient():
    parts = {
        "red": Channel(0),
        "defects": {"name": Defects(2), "gate": 0.4},
        "bright": {"name": Channel(1), "gate": 0.6},
    }
    reward = load_reward("combine", parts=parts, closed=-1.0)
    media = pictures([0.3, 0.7, 0.3], [0.3, 0.7, 0.5], [0.3, 0.5, 0.3])
    assert reward(media).tolist() == pytest.approx([0.3, -1.0, -1.0])
    assert reward.contributions(media)["defects"].tolist() == [1.0, 0.0, 1.0]
    assert reward.contributions(media)["bright"].tolist() == [1.0, 1.0, 0.0]
    assert reward.range == (-1.0, 1.0) and reward.differentiable
    leaf = media.clone().requires_grad_()
    reward(leaf).sum().backward()
    assert leaf.grad[0].sum() > 0 and leaf.grad[1:].eq(0).all() and leaf.grad[:, 1:].eq(0).all()
    with pytest.raises(RewardError, match="part 'x' is a gate, which takes no weight"):
        load_reward("combine", parts={"x": {"name": Channel(), "gate": 0.5, "weight": 1}})
    with pytest.raises(RewardError, match="all parts are gates"):
        load_reward("combine", parts={"x": {"name": Channel(), "gate": 0.5}})


def test_nan_policy():
    media, parts = pictures([0.1, 0.4, 0.0], [0.5, 0.5, 0.5]), {"blank": Blank(), "green": Channel(1)}
    with pytest.raises(RewardError, match="part 'blank' gave NaN for 1 of 2 media; set nan='propagate'"):
        load_reward("combine", parts=parts)(media)
    spread = load_reward("combine", parts=parts, nan="propagate")(media)
    assert spread[0].isnan() and spread[1].item() == pytest.approx(1.0)
    assert load_reward("combine", parts=parts, nan=-2.0)(media).tolist() == pytest.approx([-1.6, 1.0])
    gated = {"blank": {"name": Blank(), "gate": 0.0}, "green": Channel(1)}
    assert load_reward("combine", parts=gated, nan=0.0)(media).tolist() == pytest.approx([0.0, 0.5])
    assert load_reward("combine", parts=gated, nan="propagate")(media).isnan().tolist() == [True, False]


def test_facts_follow_from_the_parts():
    reward = load_reward("combine", parts={"red": Channel(), "blank": {"name": Blank(), "weight": 0.5}})
    assert reward.derived_from == {"channel", "blank"} and not reward.differentiable and reward.needs == set()
    assert reward.range == (0.0, 1.5) and reward.licence == "channel: Apache-2.0; blank: Apache-2.0"
    outer = load_reward("combine", mode="min", parts={"inner": reward, "like": Likeness()})
    assert outer.derived_from == {"combine", "channel", "blank", "likeness"} and outer.needs == {"references"}
    assert "likeness (1)" in outer.version and "0.5 * [1 * blank (1) + 0]" in outer.version
    zscored = red_green(first={"transform": "group-zscore"})
    assert zscored.needs == {"prompts"} and not zscored.batch_invariant
    with pytest.raises(RewardError, match="not differentiable because its part 'blank' is not"):
        reward(TWO.clone().requires_grad_())

    class Motion(Channel):
        """A video's."""

        name = "motion"
        modality = "video"

    with pytest.raises(RewardError, match="its rewards score images and videos"):
        load_reward("combine", parts={"a": Channel(), "b": Motion()})


def test_lower_is_better_must_be_turned():
    with pytest.raises(RewardError, match="lower is better for defects.* give it factor: -1 or a negative weight"):
        load_reward("combine", parts={"defects": Defects(2)})
    turned = load_reward("combine", mode="min", parts={"d": {"name": Defects(2), "factor": -1, "offset": 1}})
    assert turned(TWO).tolist() == pytest.approx([0.9, 0.5])
    assert load_reward("combine", parts={"d": {"name": Defects(2), "weight": -1}})(TWO)[0].item() == pytest.approx(
        -0.1
    )


def test_transforms_of_parts(tmp_path):
    level = 0.375 + 1.0364333894937898 * 0.546875**0.5
    references = [0.5, -0.5, 1.5, 0.0]
    lsc = red_green(first={"transform": {"name": "log-sigmoid", "references": references}})
    expected = [math.log(1 / (1 + math.exp(level - r))) + g for r, g in ((0.9, 0.6), (0.2, 0.8))]
    assert lsc(TWO).tolist() == pytest.approx(expected, abs=1e-6)
    fitted = {"name": "log-sigmoid", "mean": 0.375, "std": 0.546875**0.5}
    assert red_green(first={"transform": fitted})(TWO).tolist() == pytest.approx(expected, abs=1e-6)
    path = tmp_path / "references.json"
    path.write_text(json.dumps({"a": references, "b": [0.2]}))
    by_prompt = red_green(first={"transform": {"name": "par", "references": str(path)}}, second={"factor": 0.5})
    par_of_a = sum(1 / (1 + math.exp(r - 0.9)) for r in references) / 4
    assert by_prompt(TWO, prompts=["a", "b"]).tolist() == pytest.approx([par_of_a + 0.3, 0.5 + 0.4], abs=1e-6)
    with pytest.raises(RewardError, match="no references for the prompt 'c'"):
        by_prompt(TWO, prompts=["a", "c"])
    with pytest.raises(RewardError, match="combine needs prompts"):
        by_prompt(TWO)
    joint = red_green(first={"transform": "log"}, second={"transform": "log"})
    assert joint(TWO).exp().tolist() == pytest.approx([0.54, 0.16])
    assert joint.range == (-math.inf, 0.0)


def test_group_and_running_zscores():
    media = pictures([0.1, 0.4, 0.0], [0.5, 0.4, 0.0], [0.2, 0.4, 0.0], [0.2, 0.4, 0.0])
    group = red_green(first={"transform": {"name": "group-zscore", "eps": 0.0}})
    assert group(media, prompts=["a", "a", "b", "b"]).tolist() == pytest.approx([-0.6, 1.4, 0.4, 0.4], abs=1e-5)
    # pictures of other sizes are of the same group
    mixed = [media[0], media[1].repeat(1, 2, 2)]
    assert group(mixed, prompts=["a", "a"]).tolist() == pytest.approx([-0.6, 1.4], abs=1e-5)

    running = red_green(first={"transform": {"name": "running-zscore", "update_before": False}})
    assert running(media[:2]).tolist() == pytest.approx([0.5, 0.9]), "nothing seen yet: unchanged"
    assert running.contributions(media[:1])["red"].item() == pytest.approx(-1.0, abs=1e-4)
    assert running(media[2:]).tolist() == pytest.approx([0.4 - 0.5] * 2, abs=1e-4), "contributions() learnt nothing"
    other = red_green(first={"transform": {"name": "running-zscore", "frozen": True}})
    other.load_state_dict(running.state_dict())
    assert other(media[:1]).item() == pytest.approx(0.4 + (0.1 - 0.25) / 0.15, abs=1e-4)


NESTED = """
name: combine
mode: min
parts:
  green: {name: channel, index: 1}
  both:
    name: combine
    parts:
      red: {name: channel, weight: 2, transform: {name: running-zscore, update_before: false}}
      defects: {gate: 0.45, index: 2}
"""


@pytest.fixture
def registered(monkeypatch):
    import rewards.registry

    monkeypatch.setattr(rewards.registry._LOOKUP, "_registered", {"channel": Channel, "defects": Defects})


def test_combinations_nest_in_yaml_and_reports_teach_them_nothing(registered):
    spec = yaml.safe_load(NESTED)
    reward = load_reward(device="cpu", **spec)
    media = pictures([0.1, 0.4, 0.0], [0.5, 0.4, 0.0], [0.2, 0.4, 0.9])
    (stats,) = [module for module in reward.modules() if isinstance(module, RunningStats)]
    for report in (reward.contributions, reward.part_scores):
        report(media)
        assert stats.moments == {} and not stats.frozen
    # nothing seen yet, and so 2 * red, closed where there are defects
    assert reward(media).tolist() == pytest.approx([0.2, 0.4, 0.0])
    assert stats.moments["*"].count == 3
    # of 0.1, 0.5 and 0.2: mean 0.8 / 3, variance 0.3 / 3 - mean^2
    z = [2 * (red - 0.8 / 3) / (0.1 - 0.64 / 9) ** 0.5 for red in (0.1, 0.5)]
    assert reward.part_scores(media)["both"].tolist() == pytest.approx([*z, 0.0], abs=1e-4)
    assert reward.contributions(media)["both"].tolist() == pytest.approx([z[0], 0.0, 0.0], abs=1e-4)
    assert stats.moments["*"].count == 3
    other = load_reward(device="cpu", **spec)
    other.load_state_dict(reward.state_dict())
    assert other(media[:2]).tolist() == pytest.approx([z[0], 0.4], abs=1e-4)


def test_pairs_are_normalised_together():
    first, second = pictures([0.1, 0.0, 0.0], [0.9, 0.2, 0.0]), pictures([0.5, 0.0, 0.0], [0.3, 0.2, 0.0])
    group = red_green(first={"transform": {"name": "group-zscore", "eps": 0.0}}, second={"weight": 0.0})
    # two of a prompt: one deviation below their mean, one above
    assert group.pairwise(first, second, prompts=["a", "b"]).tolist() == pytest.approx([-2.0, 2.0], abs=1e-5)
    with pytest.raises(RewardError, match="2 first and 1 second media"):
        group.pairwise(first, second[:1], prompts=["a", "b"])
    assert red_green().pairwise(first, second).tolist() == pytest.approx([-0.4, 0.6])


@pytest.mark.parametrize("mode", sorted(MODES))
@pytest.mark.parametrize("std", [False, True])
def test_gradients_of_the_modes(mode, std):
    values = torch.rand(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.1
    weights = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    values.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: MODES[mode](v, weights, 0.7, std)[0], values)


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "log-sigmoid", "references": [0.5, -0.5, 1.5]},
        {"name": "par", "references": {"a": [0.5, 0.1], "b": [0.3]}},
        *({"name": name} for name in ("sigmoid", "log", "group-zscore", "running-zscore")),
    ],
)
def test_gradients_of_the_transforms(spec):
    transform = make_transform(spec, "red")
    scores = torch.rand(4, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) + 0.1
    transform.shape(scores, ["a", "a", "b", "a"], True)
    scores.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: transform.shape(s, ["a", "a", "b", "a"], False), scores)


def test_sum_of_log_sigmoids_is_the_logarithm_of_being_good_in_all():
    level = {"red": (0.4, 0.2), "green": (0.1, 0.3)}
    parts = {
        label: {"name": Channel(i), "transform": {"name": "log-sigmoid", "mean": mean, "std": std}}
        for i, (label, (mean, std)) in enumerate(level.items())
    }
    chances = [
        1 / (1 + math.exp(mean + 1.0364333894937898 * std - score))
        for (mean, std), score in zip(level.values(), (0.9, 0.6), strict=True)
    ]
    reward = load_reward("combine", parts=parts, device="cpu")
    assert reward(TWO)[0].exp().item() == pytest.approx(chances[0] * chances[1]) and reward.range == (-math.inf, 0.0)


def test_wrong_options_are_refused_with_the_fix():
    for options, message in [
        ({"parts": {"red": Channel()}, "mode": "harmonics"}, "mode 'harmonics' is unknown; did you mean 'harmonic'"),
        ({"parts": {"red": Channel()}, "nan": "skip"}, "nan is 'skip'; .*propagate, raise, or a number"),
        ({"parts": {"red": Channel()}, "spread": "var"}, "spread is 'var'"),
        ({"parts": {}}, "all parts are gates"),
        ({"parts": {"clop": {}}}, "part 'clop': unknown reward 'clop'; did you mean 'clip'"),
        ({"parts": {"clip": {"knid": 1}}}, "part 'clip': reward 'clip' has no option 'knid'; did you mean 'kind'"),
        ({"parts": {"red": {"name": Channel(), "weight": "0.5"}}}, "part 'red': weight is '0.5'; a finite number"),
        ({"parts": {"red": {"name": Channel(), "factor": 0}}}, "factor is 0; remove the part"),
        ({"parts": {"red": {"name": Channel(), "index": 1}}}, r"cannot take the options \['index'\]"),
        ({"parts": {"red": "clip"}}, "part 'red' is 'clip'; give its options as a mapping, or a weight"),
        ({"parts": {"red": {"name": Channel(), "transform": "zscore"}}}, "transform 'zscore' is unknown"),
    ]:
        with pytest.raises(RewardError, match=message):
            load_reward("combine", **options)
    for spec, message in [
        ({"name": "par"}, "transform par needs references"),
        ({"name": "par", "reference": [1]}, "par has no option 'reference'; did you mean 'references'"),
        ({"name": "par", "references": []}, "at least one number"),
        ({"name": "par", "references": "nowhere.json"}, "'nowhere.json': not readable as JSON"),
        ({"name": "log-sigmoid", "mean": 1.0}, "either references, or mean and std"),
        ({"name": "running-zscore", "warmup": 3}, "no option 'warmup'; did you mean 'warm_up'"),
    ]:
        with pytest.raises(RewardError, match=message):
            make_transform(spec, "red")
    with pytest.raises(RewardError, match="log of a score of 0"):
        red_green(first={"transform": "log"})(pictures([0.0, 0.0, 0.0]))


def test_bounds_of_unbounded_parts():
    everything = (-math.inf, math.inf)
    assert bounds("weighted-sum", [everything, (0.0, 1.0)], [0.0, 2.0], 0.0, False) == (0.0, 2.0)
    assert bounds("weighted-sum", [(0.0, math.inf), (0.0, 1.0)], [-1.0, 1.0], 0.0, False) == (-math.inf, 1.0)
    assert bounds("uncertainty-weighted", [everything, (0.0, 1.0)], [1.0, 1.0], 1.0, False) == everything
    assert bounds("min", [everything, (0.0, 1.0)], [1.0, 1.0], 0.0, False) == (-math.inf, 1.0)


YAML = """
name: combine
mode: harmonic
parts:
  clip: {weight: 0.7, factor: 0.5, offset: 0.5, weights: DIRECTORY}
  hundred: {name: clip, weight: 0.3, kind: clipscore, scale: 50.0, weights: DIRECTORY, offset: 1}
"""


@pytest.fixture
def from_yaml(clip_directory):
    return load_reward(device="cpu", **yaml.safe_load(YAML.replace("DIRECTORY", str(clip_directory))))


def test_contract(from_yaml):
    check_contract(from_yaml, half_atol=2e-1, spread=1e-4)


def test_from_yaml_with_a_real_clip(from_yaml, clip_directory):
    media = smooth_images()
    cosine = load_reward("clip", weights=clip_directory, device="cpu")(media, prompts=PROMPTS).double()
    expected = 1 / (0.7 / (cosine / 2 + 0.5) + 0.3 / (50 * cosine.clamp(min=0) + 1))
    assert torch.allclose(from_yaml(media, prompts=PROMPTS).double(), expected, atol=1e-5)
    assert from_yaml.needs == {"prompts"} and from_yaml.derived_from == {"clip"}
    assert [part.reward.dtype for part in from_yaml.parts] == [torch.float32] * 2
    assert (
        load_reward("combine", dtype="bf16", parts={"clip": {"weights": clip_directory}}).parts[0].reward.dtype
        == torch.bfloat16
    )


def test_references_and_prompts_go_to_the_parts_that_take_them(clip_directory):
    reward = load_reward("combine", parts={"like": Likeness(), "clip": {"weights": clip_directory, "weight": 0.5}})
    media, references = smooth_images(2), smooth_images(4, seed=1).split(2)
    both = reward(media, prompts=PROMPTS[:2], references=references)
    alone = Likeness()(media, references=references)
    clip = load_reward("clip", weights=clip_directory)(media, prompts=PROMPTS[:2])
    assert torch.allclose(both, alone + 0.5 * clip, atol=1e-6)
    assert torch.allclose(reward.score(media, PROMPTS[:2], list(references)), both, atol=1e-6)


def test_files_are_read_once(tmp_path, monkeypatch):
    from PIL import Image

    import rewards.media

    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path, size in zip(paths, [(4, 4), (6, 2)], strict=True):
        Image.new("RGB", size, (51, 102, 153)).save(path)
    opened = []
    load = rewards.media.read_levels
    monkeypatch.setattr(rewards.media, "read_levels", lambda source: opened.append(source) or load(source))
    assert red_green()(paths).tolist() == pytest.approx([0.6, 0.6])
    assert opened == paths
