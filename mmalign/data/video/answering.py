"""Let a vision-language model answer many requests in batches, and keep every answer by its request.

    <folder>/<model>-<settings>.jsonl     {"key": ..., "answer": ...}, a line an answer

A key holds the prompt, an identifier of the media, and the seed; the name of the file holds the model's fingerprint
and the decoding settings. An interrupted job can therefore be resumed, and nothing is answered twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch

from mmalign.core.errors import UserError
from mmalign.core.hashing import content_key
from mmalign.core.progress import track
from mmalign.core.resources import resolve_model
from mmalign.data.batches import TimedMedia
from mmalign.losses import completion_sum
from pipelines.errors import PipelineError


@dataclass(frozen=True)
class Decoding:
    """Decoding settings: greedy at temperature 0, else sampling, from a seed a request."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    precision: str = "fp32"


@dataclass(frozen=True)
class Request:
    """A prompt about media, which `show` returns when needed; `media_id` identifies them before that, and all media
    made from one file share its beginning.

    seed: for sampled answers; None for greedy ones.
    """

    prompt: str
    media_id: str
    show: Callable[[], TimedMedia]
    seed: int | None = None

    @property
    def key(self) -> str:
        """Everything that determines the answer besides model and decoding."""
        return content_key(self.prompt, self.media_id, -1 if self.seed is None else self.seed)


_Job = tuple[str, Request, tuple[str, ...]]
"""The key of an answer, its request, and the two answers to compare, if any."""
_Work = Callable[[Sequence[_Job]], list[str]]


class Answerer:
    """One model that answers requests; it is loaded only if an answer is missing."""

    def __init__(
        self,
        model: str,
        decoding: Decoding,
        folder: Path | None,
        *,
        batch_size: int = 8,
        open_model: Callable[[], Any] | None = None,
    ) -> None:
        """Read the answers kept in `folder` (None: none are kept); `open_model` is another way to load the model.

        Raises:
            PipelineError: no such model.
        """
        from pipelines import fingerprint_vlm

        self.model, self.decoding, self.batch_size = model, decoding, batch_size
        self.fingerprint = fingerprint_vlm(resolve_model(model), resolve=resolve_model)
        self._open = open_model or (lambda: open_vlm(model, decoding.precision))
        self._loaded: Any = None
        name = f"{self.fingerprint[:16]}-{content_key(repr(astuple(decoding)))[:8]}.jsonl"
        self._file = None if folder is None else folder / name
        self._kept: dict[str, str] = {} if self._file is None else _read(self._file)

    def answer(self, requests: Sequence[Request], label: str, *, failed: dict[str, str] | None = None) -> list[str]:
        """Return an answer to each request, stripped; stored ones are not computed again.

        `failed` takes the reason of each request that cannot be answered, by its key; its answer is then empty.

        Raises:
            UserError: media cannot be read. PipelineError: the model cannot take them. Both only without `failed`.
        """
        return self._look_up([(one.key, one, ()) for one in requests], self._generate, label, "answers", failed)

    def margins(self, requests: Sequence[tuple[Request, str, str]], label: str) -> list[float]:
        """Return log p(one) - log p(other) of two answers to each request, in nats; kept like answers.

        Raises:
            UserError: media cannot be read. PipelineError: the model cannot take them.
        """
        keyed = [(content_key("margin", one.key, *pair), one, tuple(pair)) for one, *pair in requests]
        return [float(text) for text in self._look_up(keyed, self._margins, label, "pairs")]

    def _look_up(
        self, jobs: Sequence[_Job], work: _Work, label: str, unit: str, failed: dict[str, str] | None = None
    ) -> list[str]:
        missing = list({job[0]: job for job in jobs if job[0] not in self._kept}.values())
        missing.sort(key=lambda job: job[1].media_id)  # decode each video once
        if missing:
            self._loaded = self._loaded or self._open()
            with track(len(missing), label, unit=unit) as progress:
                for start in range(0, len(missing), self.batch_size):
                    part = missing[start : start + self.batch_size]
                    self._keep(_each_alone(part, work, failed))
                    progress.advance(len(part))
        return [self._kept.get(key, "") for key, *_ in jobs]

    def close(self) -> None:
        """Drop the model."""
        self._loaded = None

    def _generate(self, part: Sequence[_Job]) -> list[str]:
        asked = [request for _, request, _ in part]
        shown, how = [one.show() for one in asked], self.decoding
        answers: list[str] = self._loaded.generate(
            [one.prompt for one in asked],
            [one.media for one in shown],
            max_new_tokens=how.max_new_tokens,
            temperature=how.temperature,
            top_p=how.top_p,
            seeds=[one.seed for one in asked] if how.temperature > 0 else None,
            fps=[one.fps for one in shown],
        )
        return answers

    @torch.no_grad()
    def _margins(self, part: Sequence[_Job]) -> list[str]:
        samples = []
        for _, request, pair in part:
            shown = request.show()
            asked = self._loaded.encode_prompt(request.prompt, shown.media, fps=shown.fps)
            samples += [self._loaded.complete(asked, answer) for answer in pair]
        sums = completion_sum(*self._loaded.log_probs(self._loaded.collate(samples)))
        return [repr(margin) for margin in (sums[::2] - sums[1::2]).tolist()]

    def _keep(self, new: dict[str, str]) -> None:
        self._kept |= new
        if self._file is not None and new:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8") as file:
                # The first line feed ends a last line that a killed process may have left incomplete.
                file.write("".join(f"\n{json.dumps({'key': key, 'answer': text})}" for key, text in new.items()))


def _each_alone(part: Sequence[_Job], work: _Work, failed: dict[str, str] | None) -> dict[str, str]:
    """Return the results of a batch by key; if it fails and `failed` takes the reasons, of each job by itself."""
    try:
        return dict(zip([key for key, *_ in part], work(part), strict=True))
    except (UserError, PipelineError, MemoryError) as error:
        if failed is None:
            raise
        if len(part) > 1:
            return {key: text for job in part for key, text in _each_alone([job], work, failed).items()}
        failed[part[0][0]] = str(error) or "out of memory"
        return {}


def open_vlm(model: str, precision: str) -> Any:
    """Return a vision-language model, or base and adapter, by path or hub id, in this precision."""
    from pipelines import load_vlm

    return load_vlm(resolve_model(model), dtype=precision, resolve=resolve_model)


def _read(path: Path) -> dict[str, str]:
    """Return the answers of a file; a half-written line of a killed process is left out."""
    kept: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
            kept[entry["key"]] = entry["answer"]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return kept
