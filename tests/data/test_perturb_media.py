"""Perturbations: which frames remain, what is changed and what never is, and label maps that re-rendering confirms."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from mmalign.core.errors import UserError
from mmalign.core.io.video_questions import TOPICS
from mmalign.data.video.operators import OPERATORS, Effect, get_operator, perturb
from mmalign.shapes.facts import truth
from mmalign.shapes.tracking import follow
from mmalign.shapes.twins import sample_families
from mmalign.shapes.video import render, unroll

TIME = [name for name, operator in OPERATORS.items() if operator.temporal]
PICTURE = [name for name, operator in OPERATORS.items() if not operator.temporal]
DTYPES = [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64]


def video_of(dtype: torch.dtype = torch.float32, frames: int = 8) -> Tensor:
    levels = torch.rand(frames, 3, 20, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (levels * 255).to(dtype) if dtype == torch.uint8 else levels.to(dtype)


def options_of(name: str, media: Tensor) -> dict:
    return {"bank": [media, media.flip(-2), media.flip(-1)]} if name == "neighbour" else {}


def indices(name: str, count: int, seed: int = 0, **options: object) -> list[int]:
    return get_operator(name).indices(count, seed=seed, **options)


# ------------------------------------------------------------------------------------------------ time


@pytest.mark.parametrize(
    ("count", "ratio", "kept"), [(16, 4, 4), (16, 2, 8), (10, 4, 2), (8, 16, 1), (8, 8, 1), (8, 1, 8)]
)
def test_drop_keeps_one_in_ratio_in_order(count: int, ratio: int, kept: int) -> None:
    seen = set()
    for seed in range(40):
        order = indices("drop", count, seed, ratio=ratio)
        assert len(order) == kept and order == sorted(set(order))
        seen |= set(order)
    assert seen == set(range(count))


@pytest.mark.parametrize(("count", "ratio", "length"), [(16, 2, 8), (16, 4, 4), (9, 2, 4), (8, 16, 1), (10, 4, 2)])
def test_block_shuffle_moves_whole_blocks(count: int, ratio: int, length: int) -> None:
    for seed in range(20):
        order = indices("block_shuffle", count, seed, ratio=ratio)
        assert sorted(order) == list(range(count)) != order
        starts = [i for i in order if i % length == 0]
        assert order == [i for start in starts for i in range(start, min(start + length, count))]


def test_the_identity_is_a_shuffle_only_if_asked_for() -> None:
    same = list(range(8))
    fair = [indices("block_shuffle", 8, seed, ratio=2, avoid_identity=False) == same for seed in range(400)]
    assert abs(sum(fair) / 400 - 0.5) < 0.09
    assert all(indices("block_shuffle", 8, seed, ratio=2) == [4, 5, 6, 7, 0, 1, 2, 3] for seed in range(20))
    assert indices("block_shuffle", 8, ratio=1, avoid_identity=False) == same
    for name in ("block_shuffle", "block_reverse"):
        with pytest.raises(UserError, match="8 frames at ratio=1 are one block"):
            indices(name, 8, ratio=1)


def test_shuffles_reach_every_order_alike() -> None:
    orders = Counter(tuple(indices("block_shuffle", 3, seed, ratio=16)) for seed in range(1000))
    assert len(orders) == 5 and min(orders.values()) > 150


def test_block_reverse_is_exact() -> None:
    assert indices("block_reverse", 8, ratio=4) == [6, 7, 4, 5, 2, 3, 0, 1]
    assert indices("block_reverse", 9, ratio=2) == [8, 4, 5, 6, 7, 0, 1, 2, 3]
    assert indices("block_reverse", 8, ratio=16) == indices("reverse", 8) == [7, 6, 5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize(("count", "ratio"), [(8, 4), (8, 2), (9, 3), (9, 2), (10, 4), (11, 4), (5, 16)])
def test_block_reverse_undoes_itself_only_if_blocks_are_even(count: int, ratio: int) -> None:
    order = indices("block_reverse", count, ratio=ratio)
    length = max(1, count // ratio)
    assert ([order[i] for i in order] == list(range(count))) == (count % length == 0)


def test_the_other_orders_are_exact() -> None:
    assert indices("freeze", 5, frame=-2) == [3] * 5
    assert {indices("freeze", 5, seed)[0] for seed in range(60)} == set(range(5))
    assert indices("subsample", 9, stride=4) == [0, 4, 8]
    assert indices("event_swap", 9) == [4, 5, 6, 7, 8, 0, 1, 2, 3]
    assert indices("event_swap", 5, cut=1) == [1, 2, 3, 4, 0]
    for seed in range(20):
        order = indices("local_shuffle", 10, seed, window=4)
        assert order != list(range(10))
        assert [sorted(order[i : i + 4]) for i in (0, 4, 8)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


@pytest.mark.parametrize("name", TIME)
def test_captions_are_re_ordered_as_frames_are(name: str) -> None:
    captions = [f"clip {index}" for index in range(8)]
    video = torch.arange(8.0).reshape(8, 1, 1, 1).expand(8, 3, 2, 2)
    order = indices(name, 8, seed=5)
    assert perturb(name, captions, seed=5) == [captions[index] for index in order]
    assert perturb(name, tuple(captions), seed=5) == perturb(name, captions, seed=5)
    assert perturb(name, video, seed=5)[:, 0, 0, 0].tolist() == order
    assert captions == [f"clip {index}" for index in range(8)]


# --------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_dtype_and_shape_stay_and_the_input_does_too(name: str, dtype: torch.dtype) -> None:
    video = video_of(dtype)
    before, options = video.clone(), options_of(name, video)
    changed = perturb(name, video, seed=1, **options)
    assert changed.dtype == dtype and changed.shape[1:] == video.shape[1:]
    if not get_operator(name).temporal or name not in ("drop", "subsample"):
        assert changed.shape == video.shape
    assert not torch.equal(changed, video) and torch.equal(video, before)
    assert changed.double().min() >= 0 and changed.double().max() <= (255 if dtype == torch.uint8 else 1)
    changed.zero_()
    assert torch.equal(video, before)
    assert torch.equal(perturb(name, video, seed=1, **options), perturb(name, video, seed=1, **options))


@pytest.mark.parametrize(
    "name",
    sorted({*OPERATORS} - {"reverse", "event_swap", "block_reverse", "subsample", "flip", "black", "neighbour"}),
)
def test_seeds_differ(name: str) -> None:
    results = {perturb(name, video_of(), seed=seed).numpy().tobytes() for seed in range(6)}
    assert len(results) > 3 or (name == "drop" and len(results) > 1)


@pytest.mark.parametrize("name", PICTURE)
def test_an_image_is_a_video_of_one_frame(name: str) -> None:
    image = video_of()[0]
    changed = perturb(name, image, seed=2, **options_of(name, image))
    assert changed.shape == image.shape
    if name != "neighbour":
        assert torch.allclose(changed, perturb(name, image[None], seed=2)[0], atol=1e-6)


def test_a_mask_is_one_grey_rectangle_of_the_asked_share() -> None:
    for seed in range(30):
        masked = perturb("mask", torch.zeros(4, 3, 48, 48), seed=seed, area=(0.25, 0.5))
        covered = masked[0, 0] > 0
        assert torch.equal(masked, masked[:1].expand_as(masked)) and masked.max() == pytest.approx(0.83)
        rows, columns = covered.any(1), covered.any(0)
        assert covered.sum() == rows.sum() * columns.sum()
        assert 0.23 < covered.double().mean() < 0.53
    assert perturb("mask", torch.zeros(2, 3, 8, 8, dtype=torch.uint8)).max() == 212


def test_a_crop_enlarges_one_window_of_every_frame() -> None:
    ramp = torch.linspace(0, 1, 48).expand(2, 3, 48, 48)
    for seed in range(10):
        cropped = perturb("crop", ramp, seed=seed, area=(0.25, 0.25))
        across = cropped[0, 0, 24]
        assert torch.allclose(cropped, across.expand_as(cropped), atol=1e-5)
        assert 0.2 < float(across[-1] - across[0]) < 0.75  # the window's width, a quarter of the area


def test_flip_hue_black_and_noise_do_what_they_say() -> None:
    video = video_of()
    assert torch.equal(perturb("flip", perturb("flip", video)), video)
    assert perturb("black", video).abs().max() == 0
    red = torch.tensor([1.0, 0, 0]).reshape(1, 3, 1, 1)
    turned = perturb("hue", red, turn=(1 / 3, 1 / 3)).flatten()
    assert sorted(turned.tolist()) == pytest.approx([0, 0, 1], abs=1e-5) and turned[0] < 0.5
    grey = torch.full((1, 3, 2, 2), 0.4)
    assert torch.allclose(perturb("hue", grey), grey)
    noisy = perturb("frame_noise", torch.full((8, 3, 40, 40), 0.5), share=0.25, std=0.1)
    deviations = (noisy - 0.5).flatten(1).std(1)
    assert (deviations > 0).sum() == 2 and deviations.max() == pytest.approx(0.1, rel=0.05)


def test_diffusion_noise_is_ddpms() -> None:
    kept = 1.0
    for step in range(201):
        kept *= 1 - (1e-4 + (0.02 - 1e-4) * step / 999)
    noisy = perturb("diffusion_noise", torch.full((3, 200, 200), 0.5, dtype=torch.float64), step=200)
    # A mid-grey picture is 0 on [-1, 1]; halved back to [0, 1], deviation sqrt(1 - kept) / 2, before clipping at 2 sd.
    inside = (noisy - 0.5).abs() < 0.3
    wanted = torch.distributions.Normal(0.0, (1 - kept) ** 0.5 / 2).cdf(torch.tensor(0.3)) * 2 - 1
    assert inside.double().mean() == pytest.approx(float(wanted), abs=0.005)


def test_the_neighbour_is_the_most_similar_other() -> None:
    bank = [video_of() * scale + offset for scale, offset in ((1.0, 0.0), (0.9, 0.05))] + [video_of().flip(-1)]
    assert torch.equal(perturb("neighbour", bank[0], bank=bank), bank[1])
    assert torch.equal(perturb("neighbour", bank[0], bank=bank, rank=1), bank[2])
    by_sum = perturb(
        "neighbour", bank[0], bank=bank, embed=lambda x: torch.stack([x[..., :5].sum(), x[..., 5:].sum()])
    )
    assert any(torch.equal(by_sum, other) for other in bank[1:])
    with pytest.raises(UserError, match="rank=2: the bank holds 2 other media"):
        perturb("neighbour", bank[0], bank=bank, rank=2)


# ----------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(("frames", "size"), [(8, 48), (11, 32), (16, 48)])
def test_label_maps_of_time_hold_for_the_scene_graph(frames: int, size: int) -> None:
    checked: Counter[str] = Counter()
    for number, family in enumerate(sample_families(3 * len(TOPICS), "test", 21, frames=frames, size=size)):
        for scene, value in zip(family.scenes, family.values, strict=True):
            tracks = unroll(scene)
            for name in TIME:
                effect = get_operator(name).effect(family.topic, value)
                order = indices(name, frames, seed=number)
                after = truth(family.topic, family.subject, [tuple(t[i] for i in order) for t in tracks], size)
                if effect != Effect.DEPENDS:
                    assert (after == value) == (effect == Effect.KEEPS), (name, family.topic, value, after)
                    checked[name] += 1
    assert set(checked) == set(TIME) - {"drop"}


def test_label_maps_hold_for_re_rendered_pixels() -> None:
    names = ("reverse", "event_swap", "freeze", "hue", "flip", "black")
    for number, family in enumerate(sample_families(len(TOPICS), "train", 22)):
        for scene, value in zip(family.scenes[number % 2 :: 2], family.values[number % 2 :: 2], strict=True):
            video = render(scene)
            for name in names:
                effect = get_operator(name).effect(family.topic, value)
                if effect != Effect.DEPENDS:
                    after = truth(family.topic, family.subject, follow(perturb(name, video, seed=number)), scene.size)
                    assert (after == value) == (effect == Effect.KEEPS), (name, family.topic, value, after)


def test_effects_are_looked_up_by_topic_and_answer() -> None:
    reverse = get_operator("reverse")
    assert reverse.effect("colour") == Effect.KEEPS and reverse.effect("first") == Effect.CHANGES
    assert reverse.effect("direction") == Effect.DEPENDS
    assert reverse.effect("direction", "left") == Effect.CHANGES
    assert reverse.effect("direction", "still") == Effect.KEEPS
    assert {effect for effect in get_operator("black").effects.values()} == {Effect.CHANGES}
    assert set(TOPICS) == {key for key in reverse.effects if isinstance(key, str)}


# ----------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("name", "media", "options", "message"),
    [
        ("revers", torch.zeros(4, 3, 8, 8), {}, "unknown operator 'revers'; did you mean 'reverse'"),
        ("drop", torch.zeros(4, 3, 8, 8), {"ratoi": 2}, "drop has no option 'ratoi'; did you mean 'ratio'"),
        ("flip", torch.zeros(4, 3, 8, 8), {"axis": 2}, "it takes no options"),
        ("drop", torch.zeros(4, 3, 8, 8), {"ratio": 0}, "ratio=0: must be 1 or more"),
        ("drop", torch.zeros(3, 8, 8), {}, "drop re-orders the frames of a video"),
        ("mask", torch.zeros(4, 1, 8, 8), {}, r"not \[4, 1, 8, 8\]"),
        ("mask", torch.zeros(3, 8, 8, dtype=torch.int64), {}, "floats in \\[0, 1\\] or uint8, not torch.int64"),
        ("mask", ["a caption"], {}, "mask changes frames"),
        ("mask", torch.zeros(3, 8, 8), {"area": (0.5, 0.2)}, "0 < least <= most <= 1"),
        ("event_swap", ["one"], {}, "both parts of 1 frames must hold a frame"),
        ("freeze", [], {}, "no frame is given"),
        ("diffusion_noise", torch.zeros(3, 8, 8), {"step": 1000}, "step=1000: must be 0 to 999"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(name: str, media: object, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        perturb(name, media, **options)  # type: ignore[type-var]


def test_every_operator_says_what_it_does() -> None:
    assert all(len(operator.about) > 10 and operator.about.endswith(".") for operator in OPERATORS.values())


def test_options_written_after_a_name_are_those_of_a_call() -> None:
    media = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    for spec, name, options in (
        ("crop:area=0.3..0.4", "crop", {"area": (0.3, 0.4)}),
        ("frame_noise:share=1:std=0.1", "frame_noise", {"share": 1.0, "std": 0.1}),
        ("freeze:frame=-1", "freeze", {"frame": -1}),
        ("block_shuffle:ratio=2:avoid_identity=false", "block_shuffle", {"ratio": 2, "avoid_identity": False}),
    ):
        assert torch.equal(torch.as_tensor(get_operator(spec)(media, seed=3)), perturb(name, media, seed=3, **options))
    # Label maps hold for the defaults alone.
    assert get_operator("hue").effect("colour") is Effect.CHANGES
    assert get_operator("hue:turn=0.01..0.02").effect("colour") is Effect.DEPENDS


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("corp:area=1..2", "unknown operator 'corp'.*did you mean 'crop'"),
        ("crop:aera=0.1..0.2", "crop has no option 'aera'"),
        ("crop:area=0.1", "crop: area=0.1; give a range, such as 0.1..0.3"),
        ("crop:area=0.5..2", "must be two shares"),
        ("frame_noise:std=much", "frame_noise: std=much; give a number"),
        ("drop:ratio=2.5", "drop: ratio=2.5; give a whole number"),
        ("drop:ratio=0", "ratio=0: must be 1 or more"),
        ("block_shuffle:avoid_identity=perhaps", "give true or false"),
    ],
)
def test_wrong_options_are_named(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        get_operator(spec)


def test_a_crop_shows_a_fifth_at_most_by_default() -> None:
    # Every pixel names its place, so the smallest and the largest tell the window.
    place = (torch.arange(64.0).expand(64, 64) / 64)[None].expand(3, -1, -1)
    for seed in range(20):
        across, down = (perturb("crop", media, seed=seed) for media in (place, place.transpose(-1, -2)))
        sides = [float(one.max() - one.min()) + 1 / 64 for one in (across, down)]
        assert sides[0] * sides[1] < 0.25
