"""Supervised fine-tuning of vision-language models on the chosen answers: the baseline, and TEMPLE's second phase."""

from __future__ import annotations

from typing import ClassVar

from mmalign.data.batches import VlmPairBatch
from mmalign.losses import sft
from mmalign.methods.base import LossOutput, Method, MethodConfig, Needs
from mmalign.methods.completions import collate
from mmalign.methods.run import VlmRun


class VlmSFTConfig(MethodConfig):
    """Configuration of `vlm_sft`, which has no options."""


class VlmSFT(Method[VlmSFTConfig]):
    """Maximise the likelihood of the chosen answers; rejected answers are not used."""

    name: ClassVar[str] = "vlm_sft"
    Config = VlmSFTConfig
    needs: ClassVar[Needs] = Needs(source="pairs", modality="vlm")

    def describe(self) -> str:
        """Return the convention of the loss."""
        return "vlm_sft: cross-entropy of the chosen answers, a mean over the tokens of each"

    def loss(self, run: VlmRun, batch: VlmPairBatch) -> LossOutput:
        """Return the mean cross-entropy of the chosen answers."""
        return LossOutput(sft(*run.log_probs(collate(run, batch.chosen))).mean())
