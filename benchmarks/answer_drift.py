"""How far fine-tuning moved a vision-language model: `python -m benchmarks.answer_drift BASE QUESTIONS MODEL...`.

Every model reads the right answer (its label) to every question of a folder (`mmalign shapes videos`, or
TempCompass's). Printed are means over questions with their standard errors: the divergence KL(base || model) summed
over an answer's tokens and the vocabulary, in nats, and the change of the right answer's log-probability, for temporal
and static questions.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from mmalign.core.io.decode import Frames
from mmalign.core.io.video_questions import ASPECTS, READ_BY_RULES
from mmalign.core.progress import track
from mmalign.core.resources import resolve_model
from mmalign.data.encoded.vlm_samples import read_media
from mmalign.data.video.items import QuestionItem, load_video_questions
from mmalign.losses import completion_sum, token_kl
from mmalign.methods.completions import token_log_probs
from pipelines import VisionLanguageModel, load_vlm

AT_ONCE = 32


@torch.no_grad()
def measure(base: VisionLanguageModel, model: VisionLanguageModel, asked: Sequence[QuestionItem]) -> np.ndarray:
    """Return `[questions, 2]`: divergence from the base on the right answer, and the rise of its log-probability."""
    rows = []
    with track(len(asked), "read answers", "questions") as job:
        for start in range(0, len(asked), AT_ONCE):
            part = asked[start : start + AT_ONCE]
            media = [read_media([one.file], "video", Frames(), None, one.question.id).media for one in part]
            questions = [one.question for one in part]
            batch = base.encode([one.prompt for one in questions], media, [one.label for one in questions])
            before, after = base.completion_logits(batch), model.completion_logits(batch)
            risen = token_log_probs(after, batch) - token_log_probs(before, batch)
            mask = batch.token_mask
            rows.append(
                torch.stack([completion_sum(token_kl(before, after), mask), completion_sum(risen, mask)], 1).double()
            )
            job.advance(len(part))
    return torch.cat(rows).numpy()


def main() -> None:
    """Print a row for each model."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.answer_drift", description=__doc__)
    parser.add_argument("base", help="the model that all others were trained from")
    parser.add_argument("questions", help="a folder of videos with questions")
    parser.add_argument("models", nargs="+", help="what training made of it")
    args = parser.parse_args()

    asked = load_video_questions(args.questions, READ_BY_RULES)
    temporal = np.array([one.question.aspect in ASPECTS for one in asked])
    base = load_vlm(resolve_model(args.base), device="cpu", resolve=resolve_model)
    table = Table(box=SIMPLE_HEAD)
    for head in ("model", "KL, temporal", "KL, static", "log-prob, temporal", "log-prob, static"):
        table.add_column(head, justify="left" if head == "model" else "right", no_wrap=True)
    for name in args.models:
        found = measure(base, load_vlm(resolve_model(name), device="cpu", resolve=resolve_model), asked)
        cells = [_mean(found[rows, column]) for column in (0, 1) for rows in (temporal, ~temporal)]
        table.add_row(name, *cells)
    Console(width=140).print(table)


def _mean(values: np.ndarray) -> str:
    return f"{values.mean():+.3f} ± {values.std(ddof=1) / len(values) ** 0.5:.3f}" if len(values) > 1 else "-"


if __name__ == "__main__":
    main()
