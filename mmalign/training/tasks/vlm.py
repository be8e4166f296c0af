"""Training vision-language models: pairs of answers about images and videos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmalign.config.run import RunConfig
from mmalign.core.progress import note
from mmalign.core.resources import resolve_model
from mmalign.data.encoded.vlm_samples import VlmPairs
from mmalign.data.sampler import BatchSampler, Samples
from mmalign.data.vlm_pairs import VlmPairTable, read_vlm_pairs
from mmalign.methods.base import Method
from mmalign.methods.reference import Reference
from mmalign.methods.run import BaseRun, VlmRun
from mmalign.training.tasks.base import CardFacts, Task
from mmalign.training.vlm_evaluation import VlmEvaluation, choose_questions
from pipelines import VisionLanguageModel, VlmSample, fingerprint_vlm, load_vlm


@dataclass
class VlmProbe:
    """One prompt with its media and an answer."""

    sample: VlmSample

    @torch.no_grad()
    def predict(self, model: VisionLanguageModel) -> Float[Tensor, "1 tokens vocabulary"]:
        """Return the logits of every token of the answer."""
        logits: Tensor = model.completion_logits(model.collate([self.sample])).float().cpu()
        return logits


class VlmTask(Task[VisionLanguageModel]):
    """See the module."""

    unit = "answers"
    card = CardFacts(
        library="transformers",
        pipeline_tag="image-text-to-text",
        all_weights="all weights",
        evaluation="Shares of right answers to a few fixed questions",
    )

    def check(self, config: RunConfig) -> None:
        """Check the questions of the evaluation."""
        if config.evaluate:
            choose_questions(config.evaluate)

    def open_source(self, config: RunConfig, method: Method[Any]) -> VlmPairTable:
        """Return the pairs of answers, of the method's stages alone if it has any."""
        pairs = read_vlm_pairs(str(config.data.pairs), config.data, method.stages)
        note(f"{config.data.pairs}: {pairs.counts}")
        return pairs

    def load_model(self, config: RunConfig, path: str, device: Any) -> VisionLanguageModel:
        """Return the model with its processor."""
        return load_vlm(path, dtype="float32", device=device, attention=config.attention, resolve=resolve_model)

    def model_id(self, model: VisionLanguageModel) -> str:
        """Return the fingerprint of the transformers directory."""
        return fingerprint_vlm(model.name_or_path)

    def encode(
        self, source: VlmPairTable, model: VisionLanguageModel, config: RunConfig, accelerator: Any, model_id: str
    ) -> tuple[Samples, str]:
        """Return pairs that read and encode their media on access."""
        pairs = VlmPairs(
            source,
            model,
            config.data,
            model_id=model_id,
            precision=config.trainer.precision,
            batch_size=config.trainer.batch_size,
        )
        return pairs, pairs.data_id

    def evaluator(self, config: RunConfig, model: VisionLanguageModel) -> VlmEvaluation | None:
        """Return the evaluator, which asks fixed questions."""
        return VlmEvaluation(config.evaluate, config.data) if config.evaluate else None

    def set_mode(self, model: VisionLanguageModel) -> None:
        """Leave dropout off: no flag would switch it off for the reference alone."""

    def make_run(self, model: VisionLanguageModel, **parts: Any) -> BaseRun[VisionLanguageModel]:
        """Return a `VlmRun`."""
        return VlmRun(model, **parts)

    def counted(self, model: VisionLanguageModel, reference: Reference | None) -> list[nn.Module]:
        """Return the module whose outputs are scored answers."""
        return [model.scored]

    def probe(self, run: BaseRun[VisionLanguageModel], sampler: BatchSampler) -> VlmProbe:
        """Return the first sample of the data."""
        return VlmProbe(next(sampler.micro_batches(0)).chosen[0])

    def usage(self, base: str, output: Path, *, lora: bool) -> Sequence[str]:
        """Load by transformers alone."""
        source = base if lora else output
        turn = (
            '{"role": "user", "content": [{"type": "video", "path": "clip.mp4"}, '
            '{"type": "text", "text": "What moves?"}]}'
        )
        return [
            "from transformers import AutoModelForImageTextToText, AutoProcessor",
            "",
            f'processor = AutoProcessor.from_pretrained("{source}")',
            f'model = AutoModelForImageTextToText.from_pretrained("{source}")',
            *([f'model.load_adapter("{output}")'] if lora else []),
            f"turns = [{turn}]",
            'options = dict(add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")',
            "answer = model.generate(**processor.apply_chat_template(turns, **options), max_new_tokens=64)",
            "print(processor.batch_decode(answer, skip_special_tokens=True)[0])",
        ]
