"""Evaluate a vision-language model while it trains: greedy answers to fixed questions, marked by rules."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mmalign.core.errors import UserError
from mmalign.core.io.answers import accuracy_by, micro_accuracy, rate
from mmalign.core.io.decode import Frames
from mmalign.core.io.video_questions import READ_BY_RULES
from mmalign.data.encoded.vlm_samples import read_media
from mmalign.data.video.items import QuestionItem, load_video_questions
from mmalign.training.evaluation import Evaluated

if TYPE_CHECKING:
    from mmalign.config.sections import DataConfig, EvaluateConfig
    from mmalign.methods.run import VlmRun

AT_ONCE = 8


def choose_questions(config: EvaluateConfig) -> list[QuestionItem]:
    """Return `config.limit` questions spread evenly over all that rules can mark (captions would need a judge).

    Raises:
        UserError: there are none.
    """
    if config.questions is None:
        raise UserError("evaluate.questions: missing; give a folder of videos with questions")
    asked = load_video_questions(config.questions, READ_BY_RULES)
    return [asked[index] for index in Frames(count=config.limit).choose(len(asked), None)]


class VlmEvaluation:
    """Asks the same questions every time, so that two evaluations differ by the weights alone."""

    def __init__(self, config: EvaluateConfig, data: DataConfig) -> None:
        """Read the questions; `data` says how videos are sampled."""
        self.config = config
        self.asked = choose_questions(config)
        self.frames = Frames(data.frames, data.fps)

    def higher_is_better(self, name: str) -> bool:
        """Return True: more accuracy is better."""
        return True

    def lower_is_better(self) -> set[str]:
        """Return no name: less accuracy is never better."""
        return set()

    @torch.no_grad()
    def evaluate(self, run: VlmRun) -> Evaluated:
        """Return the share of right answers, as "evaluation/accuracy", and by aspect."""
        right = []
        for start in range(0, len(self.asked), AT_ONCE):
            part = self.asked[start : start + AT_ONCE]
            media = [read_media([one.file], "video", self.frames, None, one.question.id) for one in part]
            with run.autocast():
                answers = run.model.generate(
                    [one.question.prompt for one in part],
                    [one.media for one in media],
                    max_new_tokens=self.config.max_new_tokens,
                    fps=[one.fps for one in media],
                )
            right += [rate(one.question, answer).right for one, answer in zip(part, answers, strict=True)]
        questions = [one.question for one in self.asked]
        by_aspect = accuracy_by(questions, right, lambda question: question.aspect)
        scores = {f"evaluation/accuracy/{aspect}": value for aspect, value in sorted(by_aspect.items(), key=str)}
        return Evaluated({"evaluation/accuracy": micro_accuracy(right), **scores}, {})
