"""Shapes videos: what is drawn where, scene graph and pixels that agree, families that no single frame solves."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from mmalign.core.io.video_questions import STATIC, TOPICS
from mmalign.shapes.facts import truth
from mmalign.shapes.language import split_of
from mmalign.shapes.tracking import follow
from mmalign.shapes.twins import Family, kinds_of, sample_families, sample_family
from mmalign.shapes.video import Actor, Sighting, VideoScene, draw, render, reverse, unroll
from mmalign.shapes.world import BACKGROUNDS, COLOURS, HELD_OUT_OBJECTS

SQUARE = Actor("square", "red", 5.0, 10.0, 20.0, "right", 2.0)
TEMPORAL_TOPICS = [topic for topic, aspect in TOPICS.items() if aspect not in STATIC]


def scene_of(*actors: Actor, frames: int = 8, size: int = 48) -> VideoScene:
    return VideoScene(actors, "white", frames, size)


def test_a_shape_is_drawn_where_the_scene_graph_has_it() -> None:
    video = render(scene_of(SQUARE))
    assert video.shape == (8, 3, 48, 48) and video.dtype == torch.uint8
    for frame in range(8):
        inked = (video[frame] != torch.tensor(BACKGROUNDS["white"], dtype=torch.uint8)[:, None, None]).any(0)
        rows, columns = torch.nonzero(inked, as_tuple=True)
        assert columns.double().mean() + 0.5 == pytest.approx(10.0 + 2.0 * frame, abs=0.3)
        assert rows.double().mean() + 0.5 == pytest.approx(20.0, abs=0.3)
        assert tuple(video[frame, :, 20, 10 + 2 * frame].tolist()) == COLOURS["red"]


def test_what_leaves_at_one_edge_comes_in_at_the_other() -> None:
    middle = draw([(Sighting("star", "blue", 24.0, 24.0, 6.0),)], "black", 48)
    edge = draw([(Sighting("star", "blue", 0.0, 47.0, 6.0),)], "black", 48)
    assert torch.equal(torch.roll(middle, (23, -24), dims=(2, 3)), edge)


@pytest.mark.parametrize("frames", [8, 11])
@pytest.mark.parametrize(
    "actor",
    [
        SQUARE,
        replace(SQUARE, direction="up", speed=2.546875),
        replace(SQUARE, manner="bounces"),
        replace(SQUARE, manner="shakes", speed=3.0),
        replace(SQUARE, end_radius=7.5, speed=0.0),
        replace(SQUARE, end_colour="cyan", switch=4),
        replace(SQUARE, shown=((0, 2), (5, 7))),
    ],
)
def test_the_reverse_of_a_scene_shows_the_same_bytes_backwards(actor: Actor, frames: int) -> None:
    scene = scene_of(actor, frames=frames)
    assert torch.equal(render(reverse(scene)), render(scene).flip(0))


def test_frames_sizes_and_casts_beyond_the_world_are_refused() -> None:
    with pytest.raises(ValueError, match="8 to 16 frames, not 7"):
        scene_of(SQUARE, frames=7)
    with pytest.raises(ValueError, match="32 to 48 pixels wide, not 64"):
        scene_of(SQUARE, size=64)
    with pytest.raises(ValueError, match="one to three actors, not 0"):
        scene_of()


@pytest.mark.parametrize(("frames", "size"), [(8, 48), (11, 32)])
def test_scene_graph_and_pixels_tell_the_same_truths(frames: int, size: int) -> None:
    for family in sample_families(len(TOPICS), "test", 3, frames=frames, size=size):
        for scene, value in zip(family.scenes, family.values, strict=True):
            assert truth(family.topic, family.subject, unroll(scene), size) == value
            assert truth(family.topic, family.subject, follow(render(scene)), size) == value


def test_tracks_of_pixels_are_the_tracks_of_the_scene() -> None:
    scene = scene_of(SQUARE, Actor("ring", "green", 5.5, 45.0, 40.0, "left", 1.5, "bounces"))
    drawn, seen = unroll(scene), follow(render(scene))
    for wanted, got in zip(drawn, seen, strict=True):
        for a, b in zip(wanted, got, strict=True):
            assert a is not None and b is not None and (a.shape, a.colour) == (b.shape, b.colour)
            apart = [(p - q + 24) % 48 - 24 for p, q in ((a.x, b.x), (a.y, b.y))]
            assert np.hypot(*apart) < 0.15 and b.radius == pytest.approx(a.radius, rel=0.05)


@pytest.mark.parametrize(
    ("order", "direction"),
    [([0, 1, 2, 3], "right"), ([3, 2, 1, 0], "left"), ([0, 3], "right"), ([2, 3, 0, 1], None), ([1, 1, 1], "still")],
)
def test_a_path_has_a_direction_only_if_every_step_has_it(order: list[int], direction: str | None) -> None:
    track = unroll(scene_of(SQUARE))[0]
    assert truth("direction", ["square"], [tuple(track[i] for i in order)], 48) == direction


def test_families_depend_on_the_seed_alone_and_keep_to_their_split() -> None:
    for split in ("train", "validation", "test"):
        families = list(sample_families(22, split, 5))
        assert families[:6] == list(sample_families(6, split, 5)) != list(sample_families(6, split, 6))
        assert {split_of(family.shown) for family in families} == {split}
        kinds = [kind for family in families for kind in kinds_of(family.scenes)]
        assert (split != "train") == bool(HELD_OUT_OBJECTS.intersection(kinds))
        assert any(family.held_out for family in families) == (split != "train")
    with pytest.raises(ValueError, match="no split 'dev'; there are train, validation, test"):
        sample_family(np.random.default_rng(0), "speed", "dev")


def test_members_of_a_family_conflict_and_never_touch() -> None:
    for family in sample_families(33, "train", 7):
        assert len(set(family.values)) == len(family.values) == len(family.scenes) >= 2
        for scene in family.scenes:
            for moment in zip(*unroll(scene), strict=True):
                seen = [s for s in moment if s]
                for i, a in enumerate(seen):
                    for b in seen[:i]:
                        apart = np.hypot(*((p - q + 24) % 48 - 24 for p, q in ((a.x, b.x), (a.y, b.y))))
                        assert apart > a.radius + b.radius


@pytest.mark.parametrize("topic", ["direction", "growth", "recolouring", "first", "presence"])
def test_conflicting_members_show_the_same_frames(topic: str) -> None:
    """A frame of one member is, byte for byte, a frame of another, so it cannot be known whose it is."""
    for family in sample_families(4, "train", 9, topics=[topic]):
        frames = [Counter(bytes(f) for f in render(scene).numpy()) for scene in family.scenes]
        everywhere = topic in ("first", "presence")
        partners = [sum(a == b for b in frames) for a in frames]
        assert min(partners[:2]) >= (len(frames) if everywhere else 2)


Features = Callable[[VideoScene, Family, int], np.ndarray]


def features_of(scene: VideoScene, family: Family, frame: int) -> np.ndarray:
    """What one frame says about the subject: place on the torus (two harmonics), size, whether seen, by axis."""
    tracks = {next(s.shape for s in t if s): t for t in unroll(scene)}
    row: list[float] = []
    for shape in family.subject[:2]:
        seen = tracks[shape][frame]
        turns = [2 * np.pi * at / scene.size for at in (seen.x, seen.y)] if seen else [0.0, 0.0]
        row += [float(bool(seen)), (seen.radius - 6.0) / 2 if seen else 0.0]
        row += [f(k * turn) for turn in turns for k in (1, 2) for f in (np.sin, np.cos)]
    return np.array([1.0, *row, *np.outer(row[-8:], row[-8:]).ravel()])


def probe_accuracy(topic: str, moment: int | None) -> tuple[float, float, int]:
    """Accuracy of a ridge classifier from single frames on families it was not fitted to, chance, and their number."""
    rows: dict[int, list[tuple[np.ndarray, int]]] = defaultdict(list)
    rng = np.random.default_rng(1)
    for number, family in enumerate(sample_families(500, "train", 11, topics=[topic])):
        if len(family.scenes) != (4 if topic in ("motion", "presence") else 3):
            continue
        # Answers by role: either way along the axis, faster subject, event: names would differ between families.
        for role, scene in enumerate(family.scenes):
            frame = int(rng.integers(scene.frames)) if moment is None else moment
            rows[number % 2].append((features_of(scene, family, frame), role))
    fit, held = rows[0], rows[1]
    x, y = np.stack([f for f, _ in fit]), np.eye(4)[[r for _, r in fit]]
    weights = np.linalg.solve(x.T @ x + 3.0 * np.eye(x.shape[1]), x.T @ y)
    guesses = (np.stack([f for f, _ in held]) @ weights).argmax(1)
    right = float(np.mean(guesses == np.array([r for _, r in held])))
    return right, 1 / len({r for _, r in held}), len(held)


@pytest.mark.parametrize("topic", ["direction", "speed", "growth", "motion", "presence"])
def test_a_frame_without_its_place_in_time_scores_chance(topic: str) -> None:
    right, chance, number = probe_accuracy(topic, None)
    assert right < chance + 3.5 * (chance * (1 - chance) / number) ** 0.5


@pytest.mark.parametrize("moment", [0, 4, 7])
@pytest.mark.parametrize("topic", ["direction", "speed", "motion"])
def test_not_even_the_place_in_time_helps_where_things_move(topic: str, moment: int) -> None:
    right, chance, number = probe_accuracy(topic, moment)
    assert right < chance + 3.5 * (chance * (1 - chance) / number) ** 0.5


def test_the_probe_would_see_a_leak() -> None:
    right, chance, _ = probe_accuracy("presence", 0)
    assert right > chance + 0.15  # who is there in the first frame cannot be about to appear
