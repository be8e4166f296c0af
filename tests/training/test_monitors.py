"""Monitors on series whose right answer is known: alarms at the expected observation, and none on noise."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from mmalign.config.run import load_config
from mmalign.config.sections import MonitorConfig
from mmalign.core.errors import UserError
from mmalign.training.monitors import Alarm, Monitors
from mmalign.training.recipe import recipe

TRAINED, HELD_OUT = "shapes-clip", "shapes-correctness"
PROMPTS = ["a red circle", "a blue star", "a red circle", "a blue star"]


def make(**options: Any) -> Monitors:
    return Monitors(MonitorConfig(**options), {TRAINED})


def learn(monitors: Monitors, reward: float = 0.8, lines: int = 20) -> None:
    """Lines of metrics of a training reward that starts at 0.6 and then stays at `reward`."""
    for step in range(lines):
        monitors.metrics(step, {"reward": 0.6 if step < 3 else reward})


def fire(monitors: Monitors, observe: Callable[[int, float], Any], values: list[float]) -> list[tuple[int, str]]:
    """BatchSampler values one by one and return (index, name) of every alarm."""
    raised = []
    for index, value in enumerate(values):
        observe(index, value)
        raised += [(index, alarm.name) for alarm in monitors.alarms()]
    return raised


def held_out(monitors: Monitors, name: str = HELD_OUT) -> Callable[[int, float], None]:
    return lambda step, score: monitors.evaluation(step, {f"evaluation/{name}": score})


def grey(distance: float) -> Tensor:
    """Two prompts with two flat images each, that differ by `distance`."""
    levels = torch.tensor([0.5 - distance / 2, 0.4 - distance / 2, 0.5 + distance / 2, 0.4 + distance / 2])
    return levels.view(4, 1, 1, 1).expand(4, 3, 32, 32)


def test_over_optimisation_is_said_at_the_third_evaluation_below() -> None:
    monitors = make(action="stop")
    learn(monitors)
    # The margin is 0.2 of a quarter of 0.78, so 0.039; the median step of the looks is 0.
    looks = [0.78, 0.78, 0.77, 0.74, 0.74, 0.73]
    for index, score in enumerate([*looks, 0.73]):
        monitors.evaluation(20 * index, {f"evaluation/{HELD_OUT}": score})
        alarms = monitors.alarms()
        assert bool(alarms) == (index == 5), index
        if alarms:
            assert alarms[0].name == "over_optimisation" and alarms[0].stop
            # 17 lines of 0.8 after a start of 0.6: the running mean is 0.8 - 0.2 * 0.7^17 = 0.7995.
            assert alarms[0].sentence.startswith(
                "step 100: the training reward shapes-clip rose from 0.6 to 0.8 while the held-out "
                "shapes-correctness fell from 0.78 to 0.73 (3 evaluations in a row): over-optimisation"
            )


def test_a_steady_fall_is_no_noise() -> None:
    monitors = make()
    learn(monitors)
    # Every look lies on the line between its neighbours, so 0.2 of the spread (0.8 / 4) counts: beyond from look 2.
    falling = [0.8 - 0.03 * k for k in range(9)]
    assert fire(monitors, held_out(monitors), falling) == [(4, "over_optimisation")]


def test_the_spread_over_prompts_sets_the_margin() -> None:
    for spread, expected in ((0.5, []), (0.3, [(5, "over_optimisation")])):
        monitors = make()
        learn(monitors)

        def observe(step: int, score: float, monitors: Monitors = monitors, spread: float = spread) -> None:
            monitors.evaluation(step, {HELD_OUT: score}, {HELD_OUT: spread})

        assert fire(monitors, observe, [0.8, 0.8, 0.8, 0.72, 0.72, 0.72]) == expected  # margins 0.1 and 0.06


def test_a_fall_without_a_gain_in_training_is_no_over_optimisation() -> None:
    for reward in (0.6, 0.5):
        monitors = make()
        learn(monitors, reward)
        assert fire(monitors, held_out(monitors), [0.8, 0.8, 0.5, 0.5, 0.5, 0.5]) == []


def test_lower_may_be_better() -> None:
    monitors = Monitors(MonitorConfig(), {TRAINED}, lower_is_better={"fid"})
    learn(monitors)
    assert fire(monitors, held_out(monitors, "fid"), [20.0, 20.0, 10.0, 10.0, 10.0]) == []
    assert fire(monitors, held_out(monitors, "fid"), [20.0, 20.0, 20.0]) == [(2, "over_optimisation")]


def test_memorising_is_another_sentence() -> None:
    monitors = make()
    learn(monitors)
    alarms: list[Alarm] = []
    for step, score in enumerate([0.60, 0.61, 0.60, 0.62]):  # the training gain is 0.1995, a quarter of it 0.05
        monitors.evaluation(step, {TRAINED: score, HELD_OUT: 0.8})
        alarms += monitors.alarms()
    assert [alarm.name for alarm in alarms] == ["memorising"]
    assert "shapes-clip rose from 0.6 to 0.8 on the training prompts and went from 0.6 to 0.6" in alarms[0].sentence
    learning = make()
    learn(learning)
    assert fire(learning, held_out(learning, TRAINED), [0.60, 0.66, 0.66, 0.70, 0.70]) == []


def test_with_several_rewards_each_is_compared_with_itself_or_not_at_all() -> None:
    sums = Monitors(MonitorConfig(), {TRAINED, "clip"})
    learn(sums)
    assert fire(sums, held_out(sums, "clip"), [0.3] * 6) == []  # the sum says nothing about one of its parts
    parts = Monitors(MonitorConfig(), {TRAINED, "clip"})
    for step in range(20):
        parts.metrics(step, {"reward": 1.0, "reward/clip": 0.3 if step < 3 else 0.5})
    assert fire(parts, held_out(parts, "clip"), [0.3] * 6) == [(2, "memorising")]


@pytest.mark.parametrize("noise", [0.005, 0.02, 0.08])
def test_noise_raises_no_alarm_and_a_fall_in_it_does(noise: float) -> None:
    def runs_with_alarm(fall: float) -> int:
        count = 0
        for seed in range(200):
            draw, monitors = random.Random(seed), make()
            raised: list[Alarm] = []
            for step in range(61):
                gain = 0.2 * step / 60
                monitors.metrics(step, {"reward": 0.6 + gain + draw.gauss(0, 0.03)})
                if step % 3 == 0:
                    score = 0.78 - fall * max(0, step - 20) / 40 + draw.gauss(0, noise)
                    monitors.evaluation(step, {HELD_OUT: score, TRAINED: 0.6 + 0.6 * gain + draw.gauss(0, noise)})
                raised += monitors.alarms()
            count += any(alarm.name == "over_optimisation" for alarm in raised)
        return count

    assert runs_with_alarm(0.0) <= 10  # 5 % of the runs, of 21 looks each
    assert runs_with_alarm(max(0.15, 8 * noise)) >= 190


def test_collapse_warns_once_until_it_has_recovered() -> None:
    monitors = make()

    def observe(step: int, distance: float) -> None:
        values = monitors.images(step, grey(distance), PROMPTS)
        assert values["monitor/diversity"] == pytest.approx(distance, rel=1e-5)

    # The running mean after n lines at 0.1 is 0.1 + 0.3 * 0.7^n, below half the start from n = 4 on.
    assert fire(monitors, observe, [0.42, 0.38, 0.4, 0.1, 0.1, 0.1]) == []
    assert fire(monitors, observe, [0.1] * 4) == [(2, "diversity")]
    assert fire(monitors, observe, [0.25] * 12 + [0.1] * 8) == []  # 0.25 is within bounds, but no recovery
    assert fire(monitors, observe, [0.4] * 8) == []
    # From 0.4 - 0.3 * 0.7^8 = 0.383 it needs n = 3: 0.1 + 0.283 * 0.7^3 = 0.197, and then two more.
    assert fire(monitors, observe, [0.1] * 8) == [(4, "diversity")]


def test_a_few_bad_batches_are_no_collapse() -> None:
    usual = [0.34, 0.22, 0.32, 0.25, 0.17, 0.42, 0.34, 0.19, 0.39, 0.34]  # ten batches of Shapes, four prompts each
    draw = random.Random(0)
    for run in range(40):
        monitors = make()
        for step, distance in enumerate(draw.choices(usual, k=60)):
            monitors.images(step, grey(distance), PROMPTS)
        assert monitors.alarms() == [], run


def test_saturation_and_high_frequency() -> None:
    smooth = (0.5 + 0.3 * torch.cos(2 * torch.pi * torch.arange(32) / 32)).expand(4, 3, 32, 32)
    clipped = torch.where(torch.arange(32) < 10, 1.0, smooth)  # 10 / 32 (1 - 0.7^n) passes 0.2 at n = 3
    board = (torch.arange(32)[:, None] + torch.arange(32)) % 2 - 0.5
    # Variances 0.1^2 and 0.3^2 / 2 make 18.2 %, of which 30 % are above the threshold of 1 % at n = 1.
    for name, bad, due in (("saturation", clipped, 7), ("high_frequency", smooth + 0.2 * board, 5)):
        monitors = make(action="stop")

        def observe(step: int, level: float, bad: Tensor = bad, monitors: Monitors = monitors) -> None:
            monitors.images(step, bad if level else smooth, PROMPTS)

        raised = [alarm for alarm in fire(monitors, observe, [0.0] * 3 + [1.0] * 8) if alarm[1] == name]
        assert raised == [(due, name)]
    values = monitors.images(11, smooth + 0.2 * board, PROMPTS)
    assert values["monitor/high_frequency"] == pytest.approx(0.01 / 0.055, rel=1e-4)


def test_dark_images_and_grids() -> None:
    draw = torch.Generator().manual_seed(0)
    noise = 0.5 + 0.02 * torch.rand(4, 3, 64, 64, generator=draw)
    lines = torch.zeros(64)
    lines[::8] = 0.05
    gone = torch.cat([noise[:2] * 0.1, noise[2:]])  # half of the pixels: 0.5 (1 - 0.7^n) passes 0.3 at n = 3
    for name, bad, due in (("dark", gone, 7), ("grid", noise + lines, 5)):
        monitors = make()

        def observe(step: int, level: float, bad: Tensor = bad, monitors: Monitors = monitors) -> None:
            monitors.images(step, bad if level else noise, PROMPTS)

        raised = [alarm for alarm in fire(monitors, observe, [0.0] * 3 + [1.0] * 8) if alarm[1] == name]
        assert raised == [(due, name)]


def test_runaway_updates() -> None:
    monitors = make()
    usual = [0.02, 0.03] * 5  # median 0.025 and, one line later, 0.03; a ratio may grow to 5 times that, a KL to 25
    ratio = fire(monitors, lambda s, v: monitors.metrics(s, {"log_ratio_max": v}), [*usual, 0.12, *[0.2] * 5])
    assert ratio == [(13, "ratio")]
    kl = fire(monitors, lambda s, v: monitors.metrics(s, {"kl": v}), [*usual, 0.6, 0.8, 0.8, float("inf"), 0.8])
    assert kl == [(13, "kl")]
    limits = make(kl_limit=0.1, patience=1)
    assert fire(limits, lambda s, v: limits.metrics(s, {"kl": v}), [0.05, 0.09, 0.11]) == [(2, "kl")]
    limits.metrics(7, {"log_ratio_max": 0.9})
    limits.metrics(8, {"log_ratio_max": 1.1})
    (alarm,) = limits.alarms()
    assert alarm.sentence.startswith(
        "step 8: the largest |log| of an importance ratio is 1.1, more than 1 (1 line in a row): the policy has left"
    )


def test_the_growth_of_a_warm_up_and_the_noise_of_a_maximum_are_no_runaway() -> None:
    for seed in range(200):
        draw, monitors = random.Random(seed), make()
        for step in range(1, 61):
            # A learning rate that rises linearly moves the weights as t^2 and the KL as t^4; the first ratios are 1.
            rate = min(step, 20)
            moved = sum(min(k, 20) for k in range(1, step + 1))
            line = {"kl": 1e-6 * moved**2, "log_ratio_max": 1e-4 * rate * draw.lognormvariate(0, 0.4)}
            monitors.metrics(step, line)
        assert monitors.alarms() == [], seed
    exact = make()
    assert fire(exact, lambda s, v: exact.metrics(s, {"log_ratio_max": v}), [0.0] * 12 + [1e-4] * 5) == []


def story(monitors: Monitors, step: int) -> None:
    """A run in which everything goes wrong, one thing after the other."""
    monitors.metrics(step, {"reward": 0.6 + 0.01 * step, "kl": 1e-3 if step < 20 else 1.0, "log_ratio_max": 0.1})
    monitors.images(step, grey(0.4 if step < 12 else 0.1), PROMPTS)
    monitors.evaluation(step, {HELD_OUT: 0.8 if step < 9 else 0.6, TRAINED: 0.6}, {HELD_OUT: 0.2, TRAINED: 0.2})


def test_a_resumed_run_raises_the_same_alarms() -> None:
    whole = make()
    expected = []
    for step in range(30):
        story(whole, step)
        expected.append(whole.alarms())
    names = [alarm.name for alarms in expected for alarm in alarms]
    assert sorted(names) == ["diversity", "kl", "memorising", "over_optimisation"]
    for cut in range(30):
        first, second = make(), make()
        for step in range(cut):
            story(first, step)
            first.alarms()
        story(first, cut)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        for step in range(cut, 30):
            if step > cut:
                story(second, step)
            assert second.alarms() == expected[step], (cut, step)


def test_what_is_not_a_number_is_passed_over() -> None:
    nan = float("nan")
    monitors, plain = make(), make()
    for step in range(20):
        story(monitors, step)
        monitors.metrics(step, {"reward": nan, "kl": nan, "log_ratio_max": nan})
        monitors.evaluation(step, {HELD_OUT: nan}, {HELD_OUT: nan})
        assert monitors.images(step, torch.full((4, 3, 8, 8), nan), PROMPTS) == {}
        story(plain, step)
    raised = monitors.alarms()
    assert raised == plain.alarms() and raised and not raised[0].stop
    assert monitors.state_dict() == plain.state_dict()
    broken = grey(0.4).clone()
    broken[0] = nan
    values = monitors.images(21, broken, PROMPTS)
    assert values["monitor/diversity"] == pytest.approx(0.4, rel=1e-5)  # of the other prompt


def test_without_two_images_of_a_prompt_diversity_is_not_measured_and_that_is_said_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    monitors = make()
    for step in range(2):
        values = monitors.images(step, grey(0.4), ["a", "b", "c", "d"])
        assert sorted(values) == [f"monitor/{name}" for name in ("dark", "grid", "high_frequency", "saturation")]
    assert capsys.readouterr().err.count("diversity is not measured") == 1


def test_off_measures_nothing_and_null_switches_one_alarm_off() -> None:
    off = make(action="off")
    assert off.images(0, grey(0.4), PROMPTS) == {}
    nothing = off.state_dict()
    fields = MonitorConfig.model_fields.items()
    thresholds = [name for name, field in fields if type(None) in get_args(field.annotation)]
    silent = make(**dict.fromkeys(thresholds))
    for step in range(30):
        story(off, step)
        story(silent, step)
    assert off.alarms() == silent.alarms() == []
    assert off.state_dict() == nothing


def test_the_configuration_of_a_run_holds_them_and_a_resumed_run_may_change_them() -> None:
    given = ["data.pairs=x.parquet", "output=runs/x"]
    config = load_config("shapes/diffusion_dpo", [*given, "monitors={action: stop, patience: 2}"])
    assert config.monitors.action == "stop" and config.monitors.patience == 2
    other = load_config("shapes/diffusion_dpo", given)
    assert other.monitors == MonitorConfig()
    assert recipe(config, "data", "model", 1) == recipe(other, "data", "model", 1)
    with pytest.raises(UserError, match="monitors.action: given the text 'stopp'; allowed: .*did you mean 'stop'"):
        load_config("shapes/diffusion_dpo", [*given, "monitors.action=stopp"])
