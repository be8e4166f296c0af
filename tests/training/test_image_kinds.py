"""Kinds of images: clusters and entropies by hand, and the collapse that distances within a prompt do not see."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from mmalign.config.sections import MonitorConfig
from mmalign.training.image_kinds import colour_shares, entropy_within, k_means, kinds_entropy, nearest
from mmalign.training.monitors import Alarm, Monitors

COLOURS = torch.tensor([[0.1, 0.1, 0.3], [0.95, 0.95, 0.95], [0.45, 0.45, 0.45], [0.9, 0.6, 0.1]])


def picture(background: int, source: torch.Generator) -> Tensor:
    """A dark square somewhere on one of four backgrounds."""
    image = COLOURS[background].view(3, 1, 1).expand(3, 32, 32).clone()
    x, y = torch.randint(0, 20, (2,), generator=source).tolist()
    image[:, y : y + 12, x : x + 12] = torch.tensor([0.8, 0.1, 0.1]).view(3, 1, 1)
    return image


def round_of(shares: Sequence[float], seed: int, prompts: int = 16, each: int = 4) -> tuple[Tensor, list[str]]:
    """Images of a round whose backgrounds are drawn with these probabilities."""
    source = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(torch.tensor(shares), prompts * each, replacement=True, generator=source)
    texts = [f"prompt {index // each}" for index in range(prompts * each)]
    return torch.stack([picture(int(one), source) for one in drawn]), texts


def test_shares_are_those_of_64_colours_and_know_no_layout() -> None:
    half = torch.zeros(3, 8, 8)
    half[0, :, :2] = 1.0  # a quarter of pure red on black
    shares = colour_shares(half[None])[0]
    assert shares.square().sum().item() == pytest.approx(1.0)
    assert shares[0].item() ** 2 == pytest.approx(0.75)
    assert shares[3 * 16].item() ** 2 == pytest.approx(0.25)
    torch.testing.assert_close(colour_shares(half.flip(2)[None])[0], shares)
    large = half.repeat_interleave(16, 1).repeat_interleave(16, 2)  # averaged to 64 x 64
    torch.testing.assert_close(colour_shares(large[None])[0], shares)
    assert colour_shares(torch.full((1, 3, 4, 4), 1.0))[0, 63] == 1.0


def test_clusters_are_found_and_are_the_same_every_time() -> None:
    source = torch.Generator().manual_seed(1)
    middles = torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0]])
    points = (middles[:, None] + 0.1 * torch.randn(3, 20, 2, generator=source)).flatten(0, 1)
    centres = k_means(points, 3)
    torch.testing.assert_close(centres[nearest(middles, centres)], points.view(3, 20, 2).mean(1))
    assert torch.equal(centres, k_means(points, 3))
    # No more clusters than different points, and none is empty.
    assert len(k_means(torch.ones(6, 2), 4)) == 1
    assert sorted(k_means(torch.tensor([[0.0], [0.0], [1.0]]), 3).flatten().tolist()) == [0.0, 1.0]


def test_entropies_by_hand() -> None:
    assert kinds_entropy([2] * 9) == 0.0
    assert kinds_entropy([0, 1, 0, 1]) == pytest.approx(1 + 1 / (8 * math.log(2)))
    kinds, groups = [0, 0, 0, 1, 5], ["a", "a", "b", "b", "alone"]
    assert entropy_within(kinds, groups) == pytest.approx((0 + 1 + 1 / (4 * math.log(2))) / 2)
    assert math.isnan(entropy_within([0, 1], ["a", "b"]))


def observe(monitors: Monitors, step: int, images: Tensor, prompts: list[str], batch: int = 16) -> dict[str, float]:
    for start in range(0, len(images), batch):
        monitors.sampled(images[start : start + batch], prompts[start : start + batch])
    return monitors.images(step, images[-batch:], prompts[-batch:])


def collapsing(step: int) -> list[float]:
    """One background takes over from line 8 on; before, they are equally likely."""
    rest = max(0.02, 0.25 - 0.04 * max(0, step - 8))
    return [1 - 3 * rest, rest, rest, rest]


def test_one_background_for_all_prompts_is_a_collapse() -> None:
    monitors, alarms = Monitors(MonitorConfig()), list[Alarm]()
    for step in range(24):
        values = observe(monitors, step, *round_of(collapsing(step), step))
        alarms += monitors.alarms()
        if step == 2:
            assert values["monitor/kinds"] == pytest.approx(2.0, abs=0.15)
    assert values["monitor/kinds"] < 0.8  # of 0.94, 0.02, 0.02, 0.02: 0.42 bits, but for the chance of 64 images
    (alarm,) = alarms
    assert alarm.name == "collapse" and 12 <= alarm.step <= 20
    assert "the kinds of images over " in alarm.sentence and "at the start" in alarm.sentence


def test_no_alarm_where_every_prompt_keeps_its_choices() -> None:
    for seed in range(6):
        monitors = Monitors(MonitorConfig())
        for step in range(30):
            observe(monitors, step, *round_of([0.4, 0.3, 0.2, 0.1], 100 * seed + step))
        assert monitors.alarms() == [], seed


def test_a_model_of_one_kind_has_nothing_to_lose() -> None:
    monitors = Monitors(MonitorConfig())
    for step in range(20):
        observe(monitors, step, *round_of([1.0 if step > 3 else 0.98, 0.02 * (step <= 3), 0, 0], step))
    assert monitors.alarms() == []


def test_one_image_a_prompt_is_judged_over_all_prompts() -> None:
    monitors, alarms = Monitors(MonitorConfig()), list[Alarm]()
    for step in range(24):
        values = observe(monitors, step, *round_of(collapsing(step), step, prompts=64, each=1))
        assert "monitor/kinds_within" not in values
        alarms += monitors.alarms()
    assert [alarm.name for alarm in alarms] == ["collapse"]


def test_small_lines_are_counted_together() -> None:
    monitors = Monitors(MonitorConfig())
    images, prompts = round_of([0.25] * 4, 0)
    found = [observe(monitors, step, images[:24], prompts[:24], 8) for step in range(6)]
    assert ["monitor/kinds" in values for values in found] == [False, False, True, False, False, True]


def test_a_resumed_run_counts_the_same() -> None:
    def alarms_of(cut: int | None) -> tuple[list[Alarm], dict]:
        monitors, raised = Monitors(MonitorConfig()), list[Alarm]()
        for step in range(22):
            images, prompts = round_of(collapsing(step), step)
            for start in range(0, 64, 16):
                if cut == 4 * step + start // 16:
                    saved = json.loads(json.dumps(monitors.state_dict()))
                    monitors = Monitors(MonitorConfig())
                    monitors.load_state_dict(saved)
                monitors.sampled(images[start : start + 16], prompts[start : start + 16])
            monitors.images(step, images[-16:], prompts[-16:])
            raised += monitors.alarms()
        return raised, monitors.state_dict()

    whole = alarms_of(None)
    assert [alarm.name for alarm in whole[0]] == ["collapse"]
    for cut in (1, 2, 4, 23, 61):  # within the first line, at its end, and later
        assert alarms_of(cut) == whole, cut


def test_nothing_is_counted_when_off_or_not_finite() -> None:
    off, on = Monitors(MonitorConfig(action="off")), Monitors(MonitorConfig())
    images, prompts = round_of([0.25] * 4, 0)
    off.sampled(images, prompts)
    on.sampled(torch.full_like(images, float("nan")), prompts)
    assert off.state_dict() == on.state_dict() == Monitors(MonitorConfig()).state_dict()
