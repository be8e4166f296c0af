"""Compare vision-language models: same questions, greedy answers, intervals over families of videos, one report.

    <output>/report.html, results.json, summary.csv, config.yaml
    <output>/scores.csv     right or wrong, of every question and system, and the effect of shuffling the frames
    <output>/answers.csv    every answer
    <output>/answers/       answers by model and content, for the next call

A second call trains and asks only what is new.
"""

from __future__ import annotations

from pathlib import Path

from mmalign.compare.results.comparison import Comparison
from mmalign.compare.results.results import build_results
from mmalign.compare.results.training_seeds import gather_scores, merge_systems, replica_names
from mmalign.compare.shared import Outcome, check_config, described, train_and_read, write_outcome
from mmalign.compare.systems.config import Replica
from mmalign.compare.systems.facts import SystemFacts, read_system
from mmalign.compare.vlm.answers import Sheet, answer_questions, choose_questions, write_answers
from mmalign.compare.vlm.config import QuestionConfig
from mmalign.compare.vlm.results import FACTS, families, question_numbers, question_scores
from mmalign.core.lock import locked_output
from mmalign.data.prompts import Prompt
from mmalign.data.video.items import QuestionItem


def compare_questions(config: QuestionConfig, *, train: bool = True, retrain: bool = False) -> Outcome:
    """Train missing systems, ask every system every question, and write report, results, scores and answers.

    For `train` and `retrain` see `mmalign.compare.systems.training.train_systems`.

    Raises:
        UserError, PipelineError: a model or the questions do not fit the config.
    """
    with locked_output(Path(config.output), "output"):
        return _compare(config, train=train, retrain=retrain)


def _compare(config: QuestionConfig, *, train: bool, retrain: bool) -> Outcome:
    from mmalign.compare.vlm.gallery import question_gallery

    check_config(config)
    items = choose_questions(config)
    facts = train_and_read(config, _read, train=train, retrain=retrain)
    sheets = {name: answer_questions(config, name, one.model, items) for name, one in facts.items()}
    comparison = assemble(config, items, facts, sheets)
    results = build_results(comparison)
    results["questions"] = question_numbers(comparison, [item.question for item in items], config.questions)
    for system in results["systems"].values():
        del system["guidance"], system["adapter_scale"]
    write_answers(items, sheets, Path(config.output) / "answers.csv")
    names = replica_names([*comparison.systems], comparison.replicas)
    gallery = question_gallery(config, items, {name: sheets[first] for name, (first, *_) in names.items()})
    return write_outcome(comparison, results, config, gallery)


def assemble(
    config: QuestionConfig, items: list[QuestionItem], facts: dict[str, SystemFacts], sheets: dict[str, Sheet]
) -> Comparison:
    """Combine all measurements; `facts` and `sheets` have the replicas' names as keys."""
    systems, replicas = merge_systems(config, facts)
    names = replica_names([*systems], replicas)
    scores = gather_scores(question_scores(sheets), names)
    questions = [item.question for item in items]
    return Comparison(
        prompts=[Prompt(question.prompt, question.aspect) for question in questions],
        seeds=[0],
        systems=systems,
        replicas=replicas,
        rewards={label: FACTS[label] for label in scores},
        scores=scores,
        image_paths={},
        units=families(questions),
        item="question",
        over="families of videos",
        **described(config, "questions", "formats", "limit", "frames", "fps", "max_new_tokens", "shuffle_seed"),
    )


def _read(replica: Replica, model: str) -> SystemFacts:
    from pipelines import fingerprint_vlm

    return read_system(replica.name, model, 1.0, replica.system.trained_on or [], identify=fingerprint_vlm)
