"""Monitor an online run for faults that its own reward does not show: over-optimisation, collapse, divergence.

A policy trained on a reward exploits its errors, and the curve of that reward keeps rising while the images get worse
(Gao et al. 2022, arXiv:2210.10760). So other numbers are watched, all cheap and without a model of their own: held-out
rewards against the training reward, statistics of the sampled images, how many kinds of images there are, the
importance ratios and the distance to the reference. Each is compared with where the run itself started, in units in
which 1 is its threshold; beyond it for `patience` observations in a row, it raises one alarm, and no second one before
it has been less than half way to the threshold for as long. docs/guides/monitors.md says what each alarm means.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.core.progress import note
from mmalign.training.image_kinds import colour_shares, entropy_within, k_means, kinds_entropy, nearest
from mmalign.training.image_statistics import dark, diversity, grid, high_frequency, motion, saturation
from rewards.combining.on_frames import evenly

if TYPE_CHECKING:
    from mmalign.config.sections import MonitorConfig

SMOOTHING = 0.7
"""Decay, for each line of metrics, of the running mean of a training reward or of a statistic of the images."""
WINDOW = 10
"""Lines of metrics that noise is estimated from, and whose median a ratio is compared with."""
LEAST_RATIO = 1e-3
"""A log-ratio below this never counts as diverging: ten times the rounding that a ratio of exactly 1 may have."""
LEAST_HIGH_FREQUENCY = 0.01
"""A rise of the high-frequency share never counts below this, since flat images start near 0."""
FRAMES = 4
"""Frames of a video that the statistics of images are taken of, spread evenly."""
KINDS = 8
"""Clusters of the first images, by which later ones are counted."""
LEAST_IMAGES = 64
"""Images that the kinds are counted over; a line of metrics with fewer leaves them to the next."""
LEAST_BITS = 1.0
"""A fall of the kinds' entropy is taken as a share of at least this: near 0 it is chance."""
NOISE_MARGIN = 3.25
"""A held-out reward must fall by more than this factor of its noise between evaluations."""
PREFIX = "evaluation/"
_ON_EVALUATIONS = ("over_optimisation", "memorising")
_ADVICE = {
    "over_optimisation": "over-optimisation, the policy has found what the reward overlooks; stop earlier (the "
    "checkpoint before the fall is the better model), lower the adapter's scale, or penalise the distance to the "
    "reference",
    "memorising": "the policy learns these prompts by heart; train on more prompts, for fewer epochs, or with a "
    "smaller adapter.rank",
    "diversity": "the policy collapses to one image a prompt; lower trainer.learning_rate, penalise the distance to "
    "the reference, or stop earlier",
    "collapse": "the policy draws ever fewer kinds of images, as of one background for all prompts; penalise the "
    "distance to the reference, make fewer updates on a round, lower trainer.learning_rate, or stop earlier, and look "
    "at the images: rewards do not show it",
    "motion": "the videos of the policy stand still, as they do when a reward likes calm pictures; add a reward for "
    "motion, penalise the distance to the reference, or stop earlier",
    "saturation": "colours run into black and white, as they do when a reward likes contrast or the guidance is "
    "high; lower trainer.learning_rate, add a reward for quality, or stop earlier",
    "high_frequency": "a fine pattern or noise that the reward likes is covering the images; stop earlier, lower "
    "trainer.learning_rate, or add a reward that sees image quality",
    "dark": "images go dark, as they do when a reward likes what stands out on black; add a reward for quality, "
    "penalise the distance to the reference, or stop earlier",
    "grid": "a grid, such as the borders of the model's patches, is covering the images; lower trainer.learning_rate, "
    "penalise the distance to the reference, evaluate at the size that is trained on, or stop earlier",
    "ratio": "the policy has left the samples that it learns from; lower trainer.learning_rate or the number of "
    "updates on each round of samples",
    "kl": "the policy runs away from the reference; lower trainer.learning_rate, or penalise the distance more",
}


@dataclass(frozen=True)
class Alarm:
    """An alarm; `stop`: it ends the run by the configuration."""

    name: str
    step: int
    sentence: str
    stop: bool


class _Course(NamedTuple):
    """The start of a series, its running mean, and the noise around that; NaN while they are undefined."""

    start: float = math.nan
    now: float = math.nan
    noise: float = math.nan


class _Watched(NamedTuple):
    """When a statistic of images raises its alarm: the threshold's key, how far beyond it is, and the words."""

    threshold: str
    excess: Callable[[float, float, float], float]
    """Of the value at the start, now, and the threshold; the alarm is raised from 1 on."""
    seen: str


def _fallen(start: float, now: float, drop: float) -> float:
    return (start - now) / max(drop * start, 1e-12)


def _risen(start: float, now: float, rise: float) -> float:
    return (now - start) / rise


_WATCHED = {
    "diversity": _Watched(
        "diversity_drop", _fallen, "the images of one prompt differ by {now:.3g}, at the start by {start:.3g}"
    ),
    "motion": _Watched("motion_drop", _fallen, "neighbouring frames differ by {now:.3g}, at the start by {start:.3g}"),
    "saturation": _Watched(
        "saturation_rise", _risen, "{now:.1%} of the channel values are black or white, at the start {start:.1%}"
    ),
    "high_frequency": _Watched(
        "high_frequency_growth",
        lambda start, now, growth: (now - start) / max(start * (growth - 1), LEAST_HIGH_FREQUENCY),
        "{now:.1%} of the energy is above half the Nyquist frequency, at the start {start:.1%}",
    ),
    "dark": _Watched("dark_rise", _risen, "{now:.1%} of the pixels are dark, at the start {start:.1%}"),
    "grid": _Watched(
        "grid_rise",
        _risen,
        "edges are {now:.0%} stronger on the lines of a grid than between them, at the start {start:.0%}",
    ),
}


@dataclass
class _State:
    """The state of a monitor; plain lists and numbers, to be stored as JSON."""

    starts: dict[str, list[float]] = field(default_factory=dict)  # the first observations of each series
    recent: dict[str, list[float]] = field(default_factory=dict)  # the last ones
    smooth: dict[str, float] = field(default_factory=dict)
    evaluations: dict[str, list[float]] = field(default_factory=dict)
    spreads: dict[str, float] = field(default_factory=dict)
    streaks: dict[str, list[int]] = field(default_factory=dict)  # beyond in a row, back in a row, warned
    pending: list[Alarm] = field(default_factory=list)
    colours: list[list[float]] = field(default_factory=list)  # of the first images, until there are centres
    centres: list[list[float]] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)  # of the images since the last line, by their centres
    prompts: list[str] = field(default_factory=list)
    ungrouped: bool = False  # whether the note on unmeasured diversity was printed


class Monitors:
    """Watches one run; values that are NaN are passed over."""

    def __init__(
        self, config: MonitorConfig, trained_on: Collection[str] = (), *, lower_is_better: Collection[str] = ()
    ) -> None:
        """Start watching; `trained_on` names the rewards that the run maximises, any other counts as held out."""
        self.config, self.trained_on = config, frozenset(trained_on)
        self.lower_is_better = frozenset(lower_is_better)
        self._state = _State()

    def images(self, step: int, images: Float[Tensor, "batch *media"], prompts: Sequence[str]) -> dict[str, float]:
        """Measure a batch of sampled media in [0, 1] and the kinds that `sampled` saw; return the metrics to log.

        Images of equal prompts form a group; of videos, a few frames are measured, each against those of its time, and
        how much moves. Those with a value that is not finite are left out. The cost is a few
        passes over the pixels: 0.2 % of the time that the Shapes model needs to sample the same images in ten steps.
        """
        if self.config.action == "off":
            return {}
        kinds = self._watch_kinds(step)
        images, kept = _finite(images, prompts)
        if not kept:
            return kinds
        moved = {"motion": motion(images)} if images.ndim == 5 and images.shape[1] > 1 else {}
        images, groups = _frames(images, kept, FRAMES)
        spread = diversity(images, groups)
        measured = {
            "diversity": spread,
            **moved,
            **{name: measure(images).mean() for name, measure in _STATISTICS.items()},
        }
        numbers = dict(zip(measured, torch.stack([*measured.values()]).tolist(), strict=True))  # one transfer
        self._watch_images(step, numbers)
        if math.isnan(numbers["diversity"]):
            del numbers["diversity"]
            if not self._state.ungrouped:
                self._state.ungrouped = True
                note("monitors: diversity is not measured, because no prompt of a batch has two images")
        return {f"monitor/{name}": value for name, value in numbers.items()} | kinds

    def sampled(self, images: Float[Tensor, "batch *media"], prompts: Sequence[str]) -> None:
        """Take media in [0, 1] as soon as they are sampled: all, of videos the middle frame, are counted by kind."""
        if self.config.action == "off":
            return
        images, kept = _finite(images, prompts)
        if not kept:
            return
        shares = colour_shares(_frames(images, kept, 1)[0]).cpu()
        self._state.prompts += kept
        if self._state.centres:
            self._state.kinds += nearest(shares, torch.tensor(self._state.centres)).tolist()
        else:
            self._state.colours += shares.tolist()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Take a line of metrics.

        Read are `reward` (what is maximised), `reward/NAME` (a reward by itself), `kl` (or any distance to the
        reference that is quadratic near it) and `log_ratio_max`, the largest |log| of an importance ratio.
        """
        if self.config.action == "off":
            return
        for name in ("reward", *(f"reward/{reward}" for reward in self.trained_on)):
            self._follow(name, values.get(name, math.nan))
        growth = self.config.ratio_growth
        self._watch_update(step, "ratio", values.get("log_ratio_max"), self.config.ratio_limit, growth, LEAST_RATIO)
        square = None if growth is None else growth**2
        self._watch_update(step, "kl", values.get("kl"), self.config.kl_limit, square, LEAST_RATIO**2)

    def evaluation(self, step: int, scores: Mapping[str, float], spreads: Mapping[str, float] | None = None) -> None:
        """Take the mean of each reward on the held-out prompts, as `evaluation/NAME` or `NAME`.

        `spreads`: the standard deviation of each reward over the prompts, which is the unit that falls are measured
        in; where it is not given, a quarter of the largest score stands in for it.
        """
        if self.config.action == "off":
            return
        for key, spread in (spreads or {}).items():
            if math.isfinite(spread):
                name = key.removeprefix(PREFIX)
                self._state.spreads[name] = max(spread, self._state.spreads.get(name, 0.0))
        for key, score in scores.items():
            if math.isfinite(score):
                name = key.removeprefix(PREFIX)
                self._state.evaluations.setdefault(name, []).append(score)
                (self._watch_memorising if name in self.trained_on else self._watch_held_out)(step, name)

    def alarms(self) -> list[Alarm]:
        """Return the alarms since the last call."""
        new, self._state.pending = self._state.pending, []
        return new

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain data for JSON."""
        return asdict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore from `state_dict()`: the same observations raise the same alarms as without the interruption."""
        if "looks" in state:  # the key's name until 0.1
            state = {"evaluations": state["looks"], **{key: state[key] for key in state if key != "looks"}}
        self._state = _State(**{**state, "pending": [Alarm(**alarm) for alarm in state["pending"]]})

    def _watch_images(self, step: int, numbers: Mapping[str, float]) -> None:
        courses = {name: self._follow(name, value) for name, value in numbers.items()}
        for name, (start, now, _) in courses.items():
            watch = _WATCHED[name]
            threshold = getattr(self.config, watch.threshold)
            if threshold is not None:
                seen = watch.seen.format(start=start, now=now)
                self._judge(step, name, watch.excess(start, now, threshold), seen)

    def _watch_kinds(self, step: int) -> dict[str, float]:
        """Count the images since the last line by their kind, once they are enough, and return the entropies."""
        state = self._state
        if len(state.prompts) < LEAST_IMAGES:
            return {}
        if state.colours:  # the first line: its clusters are the kinds
            first = torch.tensor(state.colours)
            centres = k_means(first, KINDS)
            state.centres, state.colours, state.kinds = centres.tolist(), [], nearest(first, centres).tolist()
        bits = {"kinds": kinds_entropy(state.kinds), "kinds_within": entropy_within(state.kinds, state.prompts)}
        state.kinds, state.prompts = [], []
        courses = {name: self._follow(name, value) for name, value in bits.items()}
        drop = self.config.collapse_drop
        falls = {name: (start - now) / max(start, LEAST_BITS) for name, (start, now, _) in courses.items()}
        falls = {name: fall for name, fall in falls.items() if not math.isnan(fall)}
        if drop is not None and falls:
            name = max(falls, key=lambda name: falls[name])
            where = "all prompts" if name == "kinds" else "one prompt"
            start, now, _ = courses[name]
            seen = f"the kinds of images over {where} have {now:.2f} bits, at the start {start:.2f}"
            self._judge(step, "collapse", falls[name] / drop, seen)
        return {f"monitor/{name}": value for name, value in bits.items() if not math.isnan(value)}

    def _watch_update(
        self, step: int, name: str, value: float | None, limit: float | None, growth: float | None, least: float
    ) -> None:
        """Compare with the limit, and with `growth` times the median of the last lines that were not beyond."""
        if value is None or math.isnan(value):
            return
        recent = self._state.recent.get(name, [])
        usual = statistics.median(recent) if len(recent) == WINDOW else math.inf
        allowed = min(math.inf if limit is None else limit, max(growth * usual, least) if growth else math.inf)
        excess = 0.0 if math.isinf(allowed) else value / allowed
        if excess <= 1 and math.isfinite(value):
            self._remember(name, value)
        what = "the largest |log| of an importance ratio" if name == "ratio" else "the distance to the reference"
        self._judge(step, name, excess, f"{what} is {value:.3g}, more than {allowed:.3g}")

    def _watch_held_out(self, step: int, name: str) -> None:
        if self.config.held_out_drop is None:
            return
        start, now, noise = self._course("reward")
        scores = self._evaluations(name)
        # Medians, since the best of many noisy evaluations is biased upwards.
        best = max(statistics.median(scores[max(0, end - 3) : end]) for end in range(1, len(scores) + 1))
        excess = (best - scores[-1]) / self._margin(name) if now - start > noise else 0.0
        sign, fell = (-1, "rose") if name in self.lower_is_better else (1, "fell")
        trained = " + ".join(sorted(self.trained_on)) or "of the run"
        seen = (
            f"the training reward {trained} rose from {start:.3g} to {now:.3g} while the "
            f"held-out {name} {fell} from {sign * best:.3g} to {sign * scores[-1]:.3g}"
        )
        self._judge(step, f"over_optimisation/{name}", excess, seen)

    def _watch_memorising(self, step: int, name: str) -> None:
        own = f"reward/{name}" if f"reward/{name}" in self._state.starts else "reward"
        comparable = own != "reward" or len(self.trained_on) == 1
        if self.config.memorising_share is None or not comparable or name in self.lower_is_better:
            return
        start, now, noise = self._course(own)
        scores = self._evaluations(name)
        missing = (now - start) - (scores[-1] - scores[0])
        excess = 0.0
        if now - start > max(noise, 2 * self._margin(name)):
            excess = missing / ((now - start) * (1 - self.config.memorising_share))
        seen = (
            f"{name} rose from {start:.3g} to {now:.3g} on the training prompts and went from {scores[0]:.3g} to "
            f"{scores[-1]:.3g} on the held-out ones"
        )
        self._judge(step, f"memorising/{name}", excess, seen)

    def _follow(self, name: str, value: float) -> _Course:
        """Take a value of a series that is compared with its start, the median of its first values."""
        if not math.isfinite(value):
            return _Course()
        first = self._state.starts.setdefault(name, [])
        if len(first) < self.config.baseline:
            first.append(value)
        else:
            mean = self._state.smooth.get(name, statistics.median(first))
            self._state.smooth[name] = SMOOTHING * mean + (1 - SMOOTHING) * value
        self._remember(name, value)
        return self._course(name)

    def _course(self, name: str) -> _Course:
        if name not in self._state.smooth:
            return _Course()
        start = statistics.median(self._state.starts[name])
        return _Course(start, self._state.smooth[name], _noise(self._state.recent[name]))

    def _remember(self, name: str, value: float) -> None:
        recent = self._state.recent.setdefault(name, [])
        recent.append(value)
        del recent[:-WINDOW]

    def _evaluations(self, name: str) -> list[float]:
        """Return all scores of a reward with the sign that makes higher better."""
        sign = -1.0 if name in self.lower_is_better else 1.0
        return [sign * score for score in self._state.evaluations[name]]

    def _margin(self, name: str) -> float:
        """Return by how much a held-out reward must fall to count."""
        scores = self._state.evaluations[name]
        spread = self._state.spreads.get(name, max(map(abs, scores)) / 4)
        return max((self.config.held_out_drop or 0.0) * spread, NOISE_MARGIN * _noise(scores), 1e-12)

    def _judge(self, step: int, key: str, excess: float, seen: str) -> None:
        """Count an observation, whose threshold is at excess 1, and raise the alarm `key` when it is due."""
        if math.isnan(excess):
            return
        beyond, back, warned = self._state.streaks.get(key, [0, 0, 0])
        beyond, back = (beyond + 1 if excess > 1 else 0), (back + 1 if excess < 0.5 else 0)
        if not warned and beyond >= self.config.patience:
            name = key.split("/")[0]
            times = f"{beyond} {'evaluation' if name in _ON_EVALUATIONS else 'line'}{'s' * (beyond > 1)} in a row"
            sentence = f"step {step}: {seen} ({times}): {_ADVICE[name]}"
            self._state.pending.append(Alarm(name, step, sentence, self.config.action == "stop"))
            warned = 1
        elif back >= self.config.patience:
            warned = 0
        self._state.streaks[key] = [beyond, back, warned]


_STATISTICS = {"saturation": saturation, "high_frequency": high_frequency, "dark": dark, "grid": grid}


def _frames(media: Tensor, prompts: Sequence[str], count: int) -> tuple[Tensor, list[Hashable]]:
    """Return images with their prompts; of videos `count` frames each, whose group is prompt and time."""
    if media.ndim == 4:
        return media, list(prompts)
    chosen = evenly(media.shape[1], count)
    return media[:, chosen].flatten(0, 1), [(prompt, frame) for prompt in prompts for frame in chosen]


def _finite(images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, list[str]]:
    """Return the media whose values are all finite, detached, and their prompts."""
    images = images.detach()
    finite = images.float().flatten(1).sum(1).isfinite()
    return images[finite], [prompt for prompt, good in zip(prompts, finite.tolist(), strict=True) if good]


def _noise(values: Sequence[float]) -> float:
    """Return the standard deviation of normal noise around a course, the smaller of two estimates.

    From the median step between neighbours, which is robust to a jump, and from the median distance of a value to the
    line between its neighbours, which is robust to a steady fall.
    """
    steps = [abs(b - a) / math.sqrt(2) for a, b in zip(values, values[1:], strict=False)]
    bends = [abs(a - 2 * b + c) / math.sqrt(6) for a, b, c in zip(values, values[1:], values[2:], strict=False)]
    return 1.4826 * min(map(statistics.median, filter(None, (steps, bends))), default=0.0)
