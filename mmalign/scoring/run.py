"""Score files by rewards into one table: find, check, load, resume an earlier run, score, write."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmalign.core.errors import UserError
from mmalign.core.io.decode import ALL_FRAMES, Frames
from mmalign.core.io.items import Item
from mmalign.core.lock import locked_output
from mmalign.core.progress import note, track
from mmalign.core.version import __version__
from mmalign.scoring.checks import check_reward, check_sizes
from mmalign.scoring.choice import TOTAL, Choice, WeightedReward, weighted_total
from mmalign.scoring.chosen import fingerprint_reward, load_choices
from mmalign.scoring.engine import Scored, score_items
from mmalign.scoring.inputs import find_items
from mmalign.scoring.results import Results, Row

SHOWN_FAULTS = 20


@dataclass(frozen=True)
class ScoreSettings:
    """Settings for scoring; only `dtype` and `frames` change a score."""

    prompt: str | None = None
    skip_bad: bool = False
    batch_size: int = 32
    workers: int | None = None
    device: str | None = None
    dtype: str | None = None
    frames: Frames = ALL_FRAMES


@dataclass
class Outcome:
    """The result: the rows in the order of the items, and the number of new ones."""

    modality: str
    items: list[Item]
    rows: list[Row]
    columns: list[str]
    rewards: list[WeightedReward]
    new: int
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def bad(self) -> int:
        """The number of items that could not be scored."""
        return sum(bool(row.error) for row in self.rows)

    def values(self, column: str) -> list[float]:
        """Return the scores of one column, without the missing ones."""
        index = self.columns.index(column)
        return [row.scores[index] for row in self.rows if math.isfinite(row.scores[index])]

    def summary(self, column: str) -> tuple[float, float, float, float, int]:
        """Return mean, standard deviation (population), minimum and maximum of a column, and how many are missing."""
        values = self.values(column)
        if not values:
            return math.nan, math.nan, math.nan, math.nan, len(self.rows)
        spread = statistics.pstdev(values)
        return statistics.fmean(values), spread, min(values), max(values), len(self.rows) - len(values)


def score_files(inputs: Sequence[str], chosen: Sequence[Choice], out: Path, settings: ScoreSettings) -> Outcome:
    """Score all items of the inputs and write `out`; stored scores are not computed again.

    Raises:
        UserError, RewardError: an input, a reward or an option is wrong, `out` is written by another process or holds
            the scores of other rewards, or an item cannot be scored and `skip_bad` is off; earlier scores are kept
            for the next run.
    """
    from rewards import reward_class

    modality = common_modality(chosen)
    items = find_items(inputs, modality, settings.prompt).items
    needing = [choice.label for choice in chosen if "prompts" in reward_class(choice.name).needs]
    fix = "give a column 'prompt', metadata.jsonl, NAME.txt or NAME.caption beside the files, or --prompt TEXT"
    _check_prompts(items, needing, settings.skip_bad, fix)
    if modality == "image":
        check_sizes(chosen, items, settings.skip_bad)
    prompts = list(dict.fromkeys(item.prompt for item in items if item.prompt is not None))
    rewards = load_choices(chosen, prompts, modality=modality, device=settings.device, dtype=settings.dtype)
    with locked_output(out, folder=False):
        return _complete(items, chosen, rewards, modality, out, settings)


def _complete(
    items: list[Item],
    chosen: Sequence[Choice],
    rewards: list[WeightedReward],
    modality: str,
    out: Path,
    settings: ScoreSettings,
) -> Outcome:
    """Score the items that `out` does not hold yet, and write it whole."""
    results = Results(out, _columns(chosen), _metadata(chosen, rewards, settings))
    results.check_items(items)
    todo = [item for item in items if results.find(item) is None]

    def advice(done: int) -> str:
        return (
            f"{done} are scored and kept in {results.parts}; mend it, or add --skip-bad to the same command to leave "
            "out such items"
        )

    if todo:
        try:
            for row in _score(todo, len(items), rewards, results.columns, modality, settings, advice):
                results.add(row)
        finally:  # scores are kept on an error or Ctrl-C too
            results.flush()
    rows = results.finish(items)
    return Outcome(modality, items, rows, results.columns, rewards, len(todo), results.metadata)


def score_in_memory(
    items: Sequence[Item],
    chosen: Sequence[Choice],
    rewards: Sequence[WeightedReward],
    modality: str,
    settings: ScoreSettings,
) -> Outcome:
    """Score items by loaded rewards, `chosen` in the same order; nothing is written or looked up.

    Raises:
        UserError, RewardError: an item lacks the prompt that a reward needs, or cannot be scored; unless `skip_bad`.
    """
    needing = [entry.name for entry in rewards if "prompts" in entry.reward.needs]
    _check_prompts(items, needing, settings.skip_bad, "give prompts, one for all or one for each")
    columns = _columns(chosen)
    advice = "mend it, or give skip_bad=True to leave out such items"
    rows = list(_score(items, len(items), rewards, columns, modality, settings, lambda done: advice))
    return Outcome(
        modality, list(items), rows, columns, list(rewards), len(rows), _metadata(chosen, rewards, settings)
    )


def _columns(chosen: Sequence[Choice]) -> list[str]:
    return [choice.label for choice in chosen] + [TOTAL] * _has_total(chosen)


def common_modality(chosen: Sequence[Choice]) -> str:
    """Return the modality of all rewards, after checking that they exist and take their options.

    Raises:
        UserError, RewardError: one cannot score single media, or two judge different kinds.
    """
    from rewards import check_options

    kinds = {choice.label: check_options(choice.name, choice.options).modality for choice in chosen}
    modality = next(iter(kinds.values()))
    other = next((label for label, kind in kinds.items() if kind != modality), None)
    if other is not None:
        first = next(iter(kinds))
        raise UserError(f"'{first}' judges {modality}s and '{other}' {kinds[other]}s; score them in two runs")
    for choice in chosen:
        check_reward(choice.name, choice.options, [], modality)
    return modality


def _check_prompts(items: Sequence[Item], needing: Sequence[str], skip_bad: bool, fix: str) -> None:
    """Refuse items without a prompt if any rewards are `needing` one; `fix` tells how to give prompts."""
    lacking = [item.name for item in items if item.prompt is None and not item.fault]
    if lacking and needing and (not skip_bad or len(lacking) == len(items)):
        raise UserError(
            f"{len(lacking)} of {len(items)} inputs have no prompt, and reward '{needing[0]}' needs one (first: "
            f"{lacking[0]}); {fix}"
        )


def _has_total(chosen: Sequence[Choice]) -> bool:
    return any(choice.weight is not None for choice in chosen)


def _metadata(chosen: Sequence[Choice], rewards: Sequence[WeightedReward], settings: ScoreSettings) -> dict[str, Any]:
    """Return the facts that the scores depend on."""
    from rewards import Facts

    described = []
    for choice, entry in zip(chosen, rewards, strict=True):
        facts = Facts.of(entry.reward)
        low, high = (bound if math.isfinite(bound) else None for bound in facts.range)
        described.append(
            {
                "label": choice.label,
                "name": choice.name,
                "version": facts.version,
                "weight": (entry.weight if _has_total(chosen) else None),
                "options": {key: _plain(value) for key, value in choice.options.items()},
                "range": [low, high],
                "higher_is_better": facts.higher_is_better,
                "source": facts.source,
                "files": [str(file) for file in facts.files],
                "licence": facts.licence,
                "citation": facts.citation,
                "fingerprint": fingerprint_reward(entry.reward),
            }
        )
    dtypes = sorted({str(entry.reward.dtype).removeprefix("torch.") for entry in rewards})
    return {
        "rewards": described,
        "settings": {"dtype": dtypes, "frames": settings.frames.count, "fps": settings.frames.fps},
        "mmalign": __version__,
    }


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | list | dict | None) else str(value)


def _score(
    todo: Sequence[Item],
    total: int,
    rewards: Sequence[WeightedReward],
    columns: Sequence[str],
    modality: str,
    settings: ScoreSettings,
    advice: Callable[[int], str],
) -> Iterator[Row]:
    """Yield the rows of `todo` in order; `advice` gives the fix for a bad item by the number of finished ones."""
    if (done := total - len(todo)) > 0:
        note(f"{done} of {total} {modality}s are scored already")
    stream = score_items(
        todo,
        rewards,
        modality=modality,
        batch_size=settings.batch_size,
        workers=settings.workers,
        frames=settings.frames,
    )
    faults = 0
    with track(total, "score", f"{modality}s", initial=done) as job:
        try:
            for scored in stream:
                if scored.error:
                    faults += 1
                    _report(scored, faults, advice(job.done), settings.skip_bad)
                yield _row(scored, rewards, columns)
                job.advance(1, **({"bad": faults} if faults else {}))
        finally:
            stream.close()


def _report(scored: Scored, faults: int, advice: str, skip_bad: bool) -> None:
    """Report a bad item; raise unless bad items are skipped."""
    if not skip_bad:
        raise UserError(f"{scored.item.name}: {scored.error}; {advice}")
    if faults <= SHOWN_FAULTS:
        note(f"bad: {scored.item.name}: {scored.error}")
    elif faults == SHOWN_FAULTS + 1:
        note("bad: more of them; all are named in the output's column 'error'")


def _row(scored: Scored, rewards: Sequence[WeightedReward], columns: Sequence[str]) -> Row:
    item = scored.item
    scores = {entry.name: scored.scores.get(entry.name, math.nan) for entry in rewards}
    if TOTAL in columns:
        scores[TOTAL] = weighted_total(scores, rewards)
    return Row(item.name, item.path, item.prompt, tuple(scores[name] for name in columns), scored.error, item.stamp)
