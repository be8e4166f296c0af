"""Compare models that answer: same questions, greedy answers, intervals over families of videos, one report.

    <output>/report.html, results.json, config.yaml
    <output>/scores.csv     right or wrong, of every question and system, and how shuffling the frames changed that
    <output>/answers.csv    every answer
    <output>/answers/       answers by model and content, for the next call

Run again, it trains and asks only what is new.
"""

from __future__ import annotations

import shlex
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mmalign.compare.results.results import Comparison, build_results, write_results, write_scores
from mmalign.compare.results.training_seeds import gather_scores, merge_systems, replica_names
from mmalign.compare.run import Outcome, describe_machine
from mmalign.compare.systems.facts import SystemFacts, read_system
from mmalign.compare.systems.training import train_systems
from mmalign.compare.vlm.answers import Sheet, answer_questions, choose_questions, write_answers
from mmalign.compare.vlm.config import QuestionConfig
from mmalign.compare.vlm.results import FACTS, families, question_numbers, question_scores
from mmalign.config.run import dump_config
from mmalign.core.files import check_output, write_atomically
from mmalign.core.precision import check_precision
from mmalign.data.prompts import Prompt
from mmalign.data.video.items import QuestionItem


def compare_questions(config: QuestionConfig, *, train: bool = True, retrain: bool = False) -> Outcome:
    """Train what is missing, ask every system every question, and write report, results, scores and answers.

    For `train` and `retrain` see `mmalign.compare.systems.training.train_systems`.

    Raises:
        UserError, PipelineError: a model or the questions are not what the config takes them for.
    """
    from mmalign.compare.report.page import write_report
    from mmalign.compare.vlm.gallery import question_gallery

    output = Path(config.output)
    check_output(output, "output")
    check_precision(config.precision, key="precision")
    items = choose_questions(config)
    facts = _read_systems(config, train_systems(config, train=train, retrain=retrain))
    sheets = {name: answer_questions(config, name, one.model, items) for name, one in facts.items()}
    comparison = assemble(config, items, facts, sheets)
    results = build_results(comparison)
    results["questions"] = question_numbers(comparison, [item.question for item in items], config.questions)
    for system in results["systems"].values():
        del system["guidance"], system["adapter_scale"]
    write_scores(comparison, output / "scores.csv")
    write_answers(items, sheets, output / "answers.csv")
    write_atomically(output / "config.yaml", dump_config(config))
    names = replica_names([*comparison.systems], comparison.replicas)
    gallery = question_gallery(config, items, {name: sheets[first] for name, (first, *_) in names.items()})
    write_report(comparison, results, dump_config(config), output / "report.html", gallery=gallery)
    write_results(results, output / "results.json")
    return Outcome(results, output / "report.html")


def assemble(
    config: QuestionConfig, items: list[QuestionItem], facts: dict[str, SystemFacts], sheets: dict[str, Sheet]
) -> Comparison:
    """Put everything that was measured together; `facts` and `sheets` are by the names of replicas."""
    systems, replicas = merge_systems(config, facts)
    names = replica_names([*systems], replicas)
    scores = gather_scores(question_scores(sheets), names)
    questions = [item.question for item in items]
    return Comparison(
        prompts=[Prompt(question.prompt, question.aspect) for question in questions],
        seeds=[0],
        baseline=config.baseline_name,
        systems=systems,
        replicas=replicas,
        rewards={label: FACTS[label] for label in scores},
        scores=scores,
        image_paths={},
        settings=describe_settings(config),
        command=f"mmalign compare {shlex.quote(str(Path(config.output) / 'config.yaml'))}",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        resamples=config.resamples,
        units=families(questions),
        item="question",
        over="families of videos",
    )


def describe_settings(config: QuestionConfig) -> dict[str, Any]:
    """Return what besides the models decides the numbers, as the report's header and results.json show it."""
    return {
        "questions": config.questions,
        "formats": config.formats,
        "limit": config.limit,
        "frames": config.frames,
        "fps": config.fps,
        "max_new_tokens": config.max_new_tokens,
        "shuffle_seed": config.shuffle_seed,
        "budget": config.budget.model_dump(exclude_none=True) if config.budget else None,
        "precision": config.precision,
        "resamples": config.resamples,
        **describe_machine(),
    }


def _read_systems(config: QuestionConfig, models: dict[str, str]) -> dict[str, SystemFacts]:
    """Read the facts of all replicas, whose models are given by name; those of the baseline come first."""
    from pipelines import fingerprint_vlm

    ordered = sorted(config.replicas, key=lambda one: one.system.name != config.baseline_name)
    return {
        one.name: read_system(one.name, models[one.name], 1.0, one.system.trained_on or [], identify=fingerprint_vlm)
        for one in ordered
    }
