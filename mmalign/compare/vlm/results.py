"""The numbers of a comparison of vision-language models: accuracies by format, twin accuracy, shuffle sensitivity.

Questions about one video, and about videos that conflict with it, are right or wrong together. The unit of resampling
is therefore the *family*: all questions that are linked by a video or by a group of twins. On Shapes a family is a set
of conflicting videos with all their questions, on TempCompass a video with all videos made from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmalign.compare.results.comparison import Comparison
from mmalign.compare.results.training_seeds import tile_pair
from mmalign.compare.scores import RewardFacts, Scores
from mmalign.compare.stats import category_rows, compare_paired, direction, summarise
from mmalign.compare.vlm.answers import Sheet
from mmalign.core.io.video_questions import ASPECTS, VideoQuestion

ACCURACY, SENSITIVITY, TWINS = "accuracy", "shuffle sensitivity", "twin accuracy"
_RULES = "none: TempCompass's matching rules"
FACTS = {
    ACCURACY: RewardFacts(
        ACCURACY, ACCURACY, "questions", "", "Share of right answers; every question weighs the same.", True, False,
        "", _RULES, "TempCompass, arXiv:2403.00476.",
    ),
    SENSITIVITY: RewardFacts(
        SENSITIVITY, SENSITIVITY, "questions", "",
        "Accuracy minus that on the same videos with shuffled frames: near 0 if order is not used or not needed.",
        True, False, "", _RULES, "", neutral=True,
    ),
}  # fmt: skip


def families(questions: Sequence[VideoQuestion]) -> list[str]:
    """Return for each question the name of its family: the first group in it."""
    parent: dict[tuple[str, str], tuple[str, str]] = {}

    def root(node: tuple[str, str]) -> tuple[str, str]:
        while parent.setdefault(node, node) != node:
            node = parent[node]
        return node

    for question in questions:
        parent[root(("video", question.video))] = root(("group", question.group))
    names: dict[tuple[str, str], str] = {}
    return [names.setdefault(root(("group", question.group)), question.group) for question in questions]


def question_scores(sheets: Mapping[str, Sheet]) -> dict[str, Scores]:
    """Return measure -> model -> value of each question, `[questions, 1]`."""
    scores: dict[str, Scores] = {ACCURACY: {name: _column(sheet.right) for name, sheet in sheets.items()}}
    drops = {
        name: _column(sheet.right) - _column(sheet.right_shuffled)
        for name, sheet in sheets.items()
        if sheet.right_shuffled is not None
    }
    return scores | ({SENSITIVITY: drops} if drops else {})


def _column(values: Sequence[bool]) -> np.ndarray:
    return np.array(values, np.float64)[:, None]


def question_numbers(comparison: Comparison, questions: Sequence[VideoQuestion], source: str) -> dict[str, Any]:
    """Return the entry `questions` of results.json: accuracies besides those over all and by aspect.

    Temporal questions are of TempCompass's aspects; static ones are single-frame questions (colour, shape, count).
    """
    units, scores = comparison.units or [], comparison.scores[ACCURACY]

    def parts(names: Sequence[str]) -> dict[str, Any]:
        by_name = {}
        for name, rows in category_rows(names).items():
            part = {system: values[rows] for system, values in scores.items()}
            by_name[name] = {"count": len(rows), "systems": _measure(comparison, part, [units[row] for row in rows])}
        return by_name

    by_format = parts([question.format for question in questions])
    by_kind = parts(["temporal" if question.aspect in ASPECTS else "static" for question in questions])
    twins = [rows for rows in category_rows([question.group for question in questions]).values() if len(rows) > 1]
    numbers: dict[str, Any] = {"source": source, "families": len(set(units)), "by_format": by_format}
    if len(by_kind) > 1:
        numbers["by_kind"] = by_kind
    if twins:
        # Within a replica all twins must be right; replicas are columns.
        part = {system: np.array([values[rows].min(axis=0) for rows in twins]) for system, values in scores.items()}
        measured = _measure(comparison, part, [units[rows[0]] for rows in twins])
        numbers["twins"] = {"count": len(twins), "systems": measured}
    return numbers


def _measure(comparison: Comparison, scores: Scores, units: Sequence[str]) -> dict[str, Any]:
    """Return mean, interval and difference from the baseline of every system; scores are `[rows, replicas]`."""
    measured = {}
    for name, own in scores.items():
        summary = summarise(own, replicas=own.shape[1], units=units, resamples=comparison.resamples)
        entry: dict[str, Any] = {"mean": summary.mean, "ci95": summary.ci95}
        if name != comparison.baseline:
            pair = tile_pair(own, scores[comparison.baseline])
            replicas = pair[0].shape[1]
            paired = compare_paired(*pair, replicas=replicas, units=units, resamples=comparison.resamples)
            entry["versus_baseline"] = {**vars(paired), "direction": direction(paired)}
        measured[name] = entry
    return measured
