"""The oracle of moving Shapes on hand-made clips whose grades are known, and on drawn ones, crisp and degraded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from mmalign.shapes.motion import judge
from mmalign.shapes.motion.check import check_oracle, contradicted
from mmalign.shapes.motion.language import parse, query_of
from mmalign.shapes.motion.oracle import ClipReading, read
from mmalign.shapes.motion.tracks import link
from mmalign.shapes.motion.world import Clip, Mover, frames_of, render, sample_clip
from mmalign.shapes.world import Object, Scene
from mmalign.shapes.world import render as draw
from rewards import load_reward, reward_class
from rewards.errors import RewardError

RED = Object("circle", "red", "small", 16, 32, 8.5)
BLUE = Object("square", "blue", "small", 46, 32, 8.5)
STILL = [[RED]] * 9


def drawn(frames: Sequence[Sequence[Object]], background: str = "white") -> np.ndarray:
    return np.stack([draw(Scene(tuple(things), background)) for things in frames])


def reading(frames: Sequence[Sequence[Object]], background: str = "white") -> ClipReading:
    return read(drawn(frames, background))


def movie(*movers: Mover) -> ClipReading:
    return reading(frames_of(Clip(movers, "white")))


def motion(prompt: str, clip: ClipReading) -> float:
    return judge.motion(parse(prompt), clip)


# -------------------------------------------------------------------------------------------------- motion


def test_a_direction_and_its_speed_are_graded() -> None:
    """24 px in 8 steps are 3 px a frame: fast. The wrong speed loses half, the wrong direction everything."""
    clip = movie(Mover(RED, "right", way=24.0))
    for prompt in ("a red circle moves right", "a red circle moves right fast"):
        assert motion(prompt, clip) == 1.0 and judge.is_strict(parse(prompt), clip)
    assert motion("a red circle moves right slowly", clip) == 0.5
    for deed in ("moves left", "moves up", "moves down", "grows", "shrinks", "stays still", "appears", "turns blue"):
        assert motion(f"a red circle {deed}", clip) == 0.0, deed
    assert judge.dynamic_degree(clip) == pytest.approx(3.0, abs=0.02)


def test_a_diagonal_path_has_part_of_either_direction() -> None:
    """As much across as along is nothing; 0.7 px across for 1 px along is (1 - 0.7) / 0.6 of it."""
    path = [[replace(RED, x=16 + 1.0 * f, y=32 + 0.7 * f)] for f in range(9)]
    assert motion("a red circle moves right", reading(path)) == pytest.approx(0.5, abs=0.03)
    assert motion("a red circle moves down", reading(path)) == 0.0
    assert motion("a red circle moves right", reading([[replace(RED, x=16 + f, y=32 + f)] for f in range(9)])) < 0.05


def test_half_the_pace_is_graded_in_between() -> None:
    """0.4 px a frame lies half-way between 0.15 and 0.65."""
    path = [[replace(RED, x=16 + 0.4 * f)] for f in range(9)]
    assert motion("a red circle moves right", reading(path)) == pytest.approx(0.5, abs=0.05)


def test_growing_is_the_ratio_of_radii() -> None:
    grows, shrinks = (
        movie(Mover(replace(RED, radius=8.0), "grow", end_radius=13.0)),
        movie(Mover(replace(RED, radius=13.0), "shrink", end_radius=8.0)),
    )
    assert motion("a red circle grows", grows) == motion("a red circle shrinks", shrinks) == 1.0
    assert motion("a red circle grows", shrinks) == motion("a red circle shrinks", grows) == 0.0
    assert judge.dynamic_degree(grows) == pytest.approx(5 / 8, abs=0.05)
    assert motion("a red circle stays still", grows) == pytest.approx(0.4)  # it stays, but is not kept as it was


def test_a_new_colour_is_graded() -> None:
    clip = movie(Mover(RED, "recolour", end_colour="blue", at=4))
    assert motion("a red circle turns blue", clip) == motion("a circle turns blue", clip) == 1.0
    assert motion("a red circle turns green", clip) == pytest.approx(1 / 3)  # it changed, to the wrong one
    assert motion("a red circle turns blue", reading(STILL)) == 0.0
    assert judge.dynamic_degree(clip) == pytest.approx(1.0, abs=0.02)


def test_presence_is_graded() -> None:
    appears, disappears = movie(Mover(RED, "appear", at=3)), movie(Mover(RED, "disappear", at=5))
    assert motion("a red circle appears", appears) == motion("a red circle disappears", disappears) == 1.0
    assert motion("a red circle appears", disappears) == motion("a red circle disappears", appears) == 0.0
    assert motion("a red circle appears", reading([[]] * 9)) == 0.0
    assert motion("a red circle appears", reading([[]] * 7 + [[RED]] * 2)) == 0.0  # two frames are a flicker
    assert motion("a red circle appears", reading([[]] * 6 + [[RED]] * 3)) == 1.0


def test_two_things_are_graded_in_the_mean_and_told_apart() -> None:
    clip = movie(Mover(RED, "up", way=20.0), Mover(BLUE, "still"))
    assert motion("a blue square stays still and a red circle moves up", clip) == 1.0
    assert motion("a red circle moves up and a blue square shrinks", clip) == 0.5
    assert motion("a red circle stays still and a blue square moves up", clip) == 0.0
    assert motion("a red circle moves up", clip) == 1.0
    assert not judge.is_strict(parse("a red circle moves up"), clip)  # one thing too many


def test_the_order_of_events_counts_half() -> None:
    clip = movie(Mover(RED, "appear", at=2), Mover(BLUE, "appear", at=5))
    right, wrong = (
        "a red circle appears and then a blue square appears",
        "a blue square appears and then a red circle appears",
    )
    assert (motion(right, clip), motion(wrong, clip)) == (1.0, 0.5)
    assert judge.is_strict(parse(right), clip) and not judge.is_strict(parse(wrong), clip)


def test_what_should_stay_is_weighed() -> None:
    """A circle that goes right and is blue in 4 of 9 frames keeps (5/9 - 0.5) / 0.38 of its colour."""
    path = [[replace(RED, x=16 + 3.0 * f, colour="red" if f < 5 else "blue")] for f in range(9)]
    assert motion("a red circle moves right", reading(path)) == pytest.approx(0.4 + 0.6 * (5 / 9 - 0.5) / 0.38)


# -------------------------------------------------------------------------------------------------- things


def test_things_are_graded_frame_by_frame() -> None:
    """The image grade of a wrong colour is (5/2 + 2) / 7; of something else altogether 2/7; of nothing 0."""
    query = parse("a red circle moves right")
    assert judge.correctness(query, reading(STILL)) == 1.0
    frames = [[RED]] * 3 + [[replace(RED, colour="blue")]] * 2 + [[BLUE]] * 2 + [[]] * 2
    expected = (3 + 2 * 4.5 / 7 + 2 * 2 / 7) / 9
    assert judge.correctness(query, reading(frames)) == pytest.approx(expected)


def test_events_leave_a_choice_of_things() -> None:
    query = parse("a red circle appears")
    assert judge.correctness(query, reading([[]] * 5 + [[RED]] * 4)) == judge.correctness(query, reading(STILL)) == 1.0
    assert judge.correctness(query, reading([[]] * 9)) == pytest.approx(6 / 9)  # it has to be there in the last three
    turned = reading([[RED]] * 5 + [[replace(RED, colour="blue")]] * 4)
    assert judge.correctness(parse("a red circle turns blue"), turned) == 1.0
    assert judge.correctness(parse("a red circle turns green"), turned) == pytest.approx((5 + 4 * 4.5 / 7) / 9)


def test_the_background_counts_if_it_is_named() -> None:
    clip = reading(STILL, "navy")
    assert judge.correctness(parse("a red circle stays still on a navy background"), clip) == 1.0
    query = parse("a red circle stays still on a white background")
    assert judge.correctness(query, clip) == pytest.approx(7 / 8) and not judge.is_strict(query, clip)


# -------------------------------------------------------------------------------------------------- smoothness


def test_each_jump_costs_its_third_of_its_steps() -> None:
    query = parse("a red circle stays still")
    assert judge.smoothness(query, reading(STILL)) == 1.0
    other = reading([[RED]] * 4 + [[replace(RED, colour="blue")]] + [[RED]] * 4)
    assert judge.smoothness(query, other) == pytest.approx(1 - 2 / 24)  # two of eight steps change colour
    jumps = reading([[RED]] * 4 + [[replace(RED, x=30)]] * 5)
    assert judge.smoothness(query, jumps) == pytest.approx(1 - 2 / 24)  # it jumps, and stops again
    gone = reading([[RED]] * 4 + [[]] + [[RED]] * 4)
    assert judge.smoothness(query, gone) == pytest.approx(6 / 8)  # gone, and back
    assert judge.smoothness(query, reading([[]] * 9)) == 0.0


def test_what_is_asked_for_is_no_jump() -> None:
    turned = reading([[RED]] * 4 + [[replace(RED, colour="blue")]] * 5)
    assert judge.smoothness(parse("a red circle turns blue"), turned) == 1.0
    assert judge.smoothness(parse("a red circle stays still"), turned) == pytest.approx(1 - 1 / 24)
    gone = reading([[RED]] * 4 + [[]] * 5)
    assert judge.smoothness(parse("a red circle disappears"), gone) == 1.0
    assert judge.smoothness(parse("a red circle stays still"), gone) == pytest.approx(3 / 4)


def test_flicker_is_no_thing_and_no_motion() -> None:
    clip = reading([[RED, BLUE] if f == 4 else [RED] for f in range(9)])
    assert [track.lasts for track in link(clip)] == [True, False]
    assert judge.dynamic_degree(clip) == pytest.approx(0.0, abs=0.02)
    assert judge.is_strict(parse("a red circle stays still"), clip)


# -------------------------------------------------------------------------------------------------- drawn clips


def test_drawn_clips_have_full_marks_for_what_is_true_of_them_alone() -> None:
    rng = np.random.default_rng(2)
    for _ in range(25):
        clip = sample_clip(rng, held_out=True)
        query, seen = query_of(clip, rng), read(render(clip).permute(0, 2, 3, 1).numpy())
        assert judge.motion(query, seen) == judge.correctness(query, seen) == judge.smoothness(query, seen) == 1.0
        assert judge.is_strict(query, seen)
        assert judge.motion(contradicted(rng, query), seen) < 0.97


@pytest.mark.slow
def test_degraded_clips_are_read_as_the_docs_say() -> None:
    rows = {row.quality: row for row in check_oracle(100, 3)}
    for quality in ("crisp", "blurred", "noisy", "autoencoder"):
        assert min(rows[quality].frames, rows[quality].strict, rows[quality].smooth) >= 0.97, quality
        assert rows[quality].wrong_motion == 0
    assert rows["autoencoder, latents with noise of 0.3"].motion >= 0.9


def test_other_frames_are_refused() -> None:
    with pytest.raises(ValueError, match="64x64"):
        read(np.zeros((9, 32, 32, 3), np.uint8))


# -------------------------------------------------------------------------------------------------- rewards

NAMES = ["correctness", "motion", "strict", "smoothness", "dynamic"]


def media(*clips: Sequence[Sequence[Object]]) -> torch.Tensor:
    return torch.stack([torch.from_numpy(drawn(clip)).permute(0, 3, 1, 2).float() / 255 for clip in clips])


def test_rewards_come_through_the_door_with_the_grades_of_the_oracle() -> None:
    going = frames_of(Clip((Mover(RED, "right", way=24.0),), "white"))
    clips, prompts = media(going, STILL, [[BLUE]] * 9), ["a red circle moves right fast"] * 3
    expected = {
        "correctness": [1, 1, 2 / 7], "motion": [1, 0, 0], "strict": [1, 0, 0],
        "smoothness": [1, 1, 1], "dynamic": [3, 0, 0],
    }  # fmt: skip
    for name in NAMES:
        reward = load_reward(f"shapes-video-{name}")
        given = {"prompts": prompts} if "prompts" in reward.needs else {}
        assert reward(clips, **given).tolist() == pytest.approx(expected[name], abs=0.02), name
        assert reward.modality == "video" and reward.facts.higher_is_better


def test_rewards_refuse_other_media_and_prompts() -> None:
    for shape, told in (((1, 9, 3, 32, 32), "9 of 32x32"), ((1, 2, 3, 64, 64), "2 of 64x64")):
        with pytest.raises(RewardError, match=told):
            load_reward("shapes-video-dynamic")(torch.zeros(shape))
    prompts = ["a red circle moves left", "a red circle", "a giraffe runs"]
    with pytest.raises(RewardError, match="shapes-video-motion cannot score 2 of 3 prompts: what 'circle' does"):
        reward_class("shapes-video-motion").check_prompts(prompts)
    reward_class("shapes-video-dynamic").check_prompts(prompts)


def test_strict_counts_as_trained_on_when_its_parts_were() -> None:
    assert load_reward("shapes-video-strict").facts.derived_from == ("shapes-video-correctness", "shapes-video-motion")
