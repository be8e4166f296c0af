"""VLM-RM: the algebra of goal-baseline regularisation, with the projection built as a matrix, and a tiny CLIP."""

import pytest
import torch
from contract import BATCH, check_contract, smooth_images

from rewards import RewardError, load_reward

GOAL, SCENE = ["a red circle", "a photo of a red circle"], "a photo"


def by_matrix(x, goals, baselines, alpha):
    """The definition, literally: the projection as a matrix, in float64."""
    goal, base = (unit.double().mean(0) for unit in (goals, baselines))
    d = (goal - base)[:, None]
    projection = alpha * d @ d.T / d.square().sum() + (1 - alpha) * torch.eye(len(goal), dtype=torch.float64)
    return 1 - 0.5 * ((x.double() - goal) @ projection).square().sum(-1)


@pytest.fixture
def load(clip_directory):
    return lambda **options: load_reward("vlm-rm", weights=clip_directory, **options)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_score_is_that_of_the_projection_as_a_matrix(load, clip_directory, alpha):
    images = smooth_images(4)
    clip = load_reward("clip", weights=clip_directory)
    with torch.no_grad():
        x, goals, scene = clip.media_embeddings(images), clip.prompt_embeddings(GOAL), clip.prompt_embeddings([SCENE])
    reward = load(target=GOAL, baseline=SCENE, alpha=alpha)
    found = reward(images)
    assert torch.allclose(found.double(), by_matrix(x, goals, scene, alpha), atol=1e-6)
    assert found.std() > 1e-4 and reward.needs == frozenset()
    each = load(baseline=SCENE, alpha=alpha)(images, prompts=[GOAL[0]] * 4)
    assert torch.allclose(each.double(), by_matrix(x, goals[:1], scene, alpha), atol=1e-6)


def test_algebra(load):
    """Corners: alpha 0 is the cosine; at the goal the score is 1; alpha 1 sees one direction alone."""
    images, prompts = smooth_images(4), ["a red circle", "a dog", "a cat", "two cats"]
    plain = load()
    cosine = load_reward("clip", weights=plain.source.removeprefix("local-dir:"))(images, prompts=prompts)
    assert torch.allclose(plain(images, prompts=prompts), cosine, atol=1e-6), "for a goal of length 1"
    one = load(baseline=SCENE, alpha=1.0).double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 16, dtype=torch.float64, generator=generator)
    goal = one.prompt_embeddings(["a red circle"])
    away = goal - one.prompt_embeddings([SCENE])
    assert one.closeness(goal, goal).item() == 1.0
    assert one.closeness(goal - away, goal).item() == pytest.approx(1 - away.square().sum().item() / 2, abs=1e-12)
    aside = x - (x @ away.T) * away / away.square().sum()
    assert torch.allclose(one.closeness(x + 5 * aside, goal), one.closeness(x, goal), atol=1e-12)
    half = load(baseline=SCENE, alpha=0.5).double()
    assert (half.closeness(x + 5 * aside, goal) < half.closeness(x, goal)).all()
    low, high = (load(baseline=SCENE, alpha=alpha).double().closeness(x, goal) for alpha in (0.0, 1.0))
    assert (low <= half.closeness(x, goal)).all() and (half.closeness(x, goal) <= high).all()


def test_contract(load):
    check_contract(load(baseline=SCENE, alpha=0.4), half_atol=2e-2, long_prompt="cat " * 15, spread=1e-4)


def test_contract_with_one_goal_for_all(load):
    reward = load(target=GOAL, baseline=[SCENE, "a table"], alpha=0.4)
    check_contract(reward, half_atol=2e-2, spread=1e-4)
    assert reward(smooth_images(), prompts=["whatever"] * BATCH).equal(reward(smooth_images()))
    assert reward.version == f"alpha 0.4, target {GOAL}, baseline {[SCENE, 'a table']}"


def test_wrong_options_are_refused(load):
    for options, message in [
        ({"alpha": 0.5}, "alpha=0.5 needs a baseline"),
        ({"baseline": SCENE}, "a baseline needs alpha="),
        ({"baseline": SCENE, "alpha": 1.5}, "alpha is 1.5; a number from 0 to 1"),
        ({"target": []}, "target is an empty list"),
    ]:
        with pytest.raises(RewardError, match=message):
            load(**options)
    with pytest.raises(RewardError, match="a goal equals the baseline"):
        load(baseline=SCENE, alpha=0.5)(smooth_images(1), prompts=[SCENE])
    with pytest.raises(RewardError, match="needs nothing but media; matrix"):
        load(target=GOAL).matrix(smooth_images(1), ["a"])
