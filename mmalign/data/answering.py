"""Let a vision-language model answer many requests in batches, and keep every answer by what it was given for.

    <folder>/<model>-<settings>.jsonl     {"key": ..., "answer": ...}, a line an answer

A key holds the prompt, what identifies the media, and the seed; the name of the file the model's fingerprint and how
it answers. An interrupted job therefore goes on, and nothing is answered twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from mmalign.batches import TimedMedia
from mmalign.data.store import content_key
from mmalign.progress import track
from mmalign.resources import resolve_model


@dataclass(frozen=True)
class Decoding:
    """How a model answers: greedily at temperature 0, else by chance, from a seed a request."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    precision: str = "fp32"


@dataclass(frozen=True)
class Request:
    """A prompt about media that `show` returns when their turn comes; `media_id` identifies them before that, and
    begins alike for all that is made of one file.

    seed: for answers by chance; None for greedy ones.
    """

    prompt: str
    media_id: str
    show: Callable[[], TimedMedia]
    seed: int | None = None

    @property
    def key(self) -> str:
        """What the answer depends on besides model and decoding."""
        return content_key(self.prompt, self.media_id, -1 if self.seed is None else self.seed)


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

    def answer(self, requests: Sequence[Request], label: str) -> list[str]:
        """Return an answer to each request, stripped; those that are kept already cost nothing.

        Raises:
            UserError: media cannot be read. PipelineError: the model cannot take them.
        """
        missing = list({one.key: one for one in requests if one.key not in self._kept}.values())
        missing.sort(key=lambda one: one.media_id)  # what is about one video comes together, to be decoded once
        if missing:
            self._loaded = self._loaded or self._open()
            with track(len(missing), label, unit="answers") as job:
                for start in range(0, len(missing), self.batch_size):
                    part = missing[start : start + self.batch_size]
                    self._keep(part, self._generate(part))
                    job.advance(len(part))
        return [self._kept[one.key] for one in requests]

    def close(self) -> None:
        """Drop the model."""
        self._loaded = None

    def _generate(self, part: Sequence[Request]) -> list[str]:
        shown, how = [one.show() for one in part], self.decoding
        answers: list[str] = self._loaded.generate(
            [one.prompt for one in part],
            [one.media for one in shown],
            max_new_tokens=how.max_new_tokens,
            temperature=how.temperature,
            top_p=how.top_p,
            seeds=[one.seed for one in part] if how.temperature > 0 else None,
            fps=[one.fps for one in shown],
        )
        return answers

    def _keep(self, part: Sequence[Request], answers: Sequence[str]) -> None:
        new = {one.key: answer for one, answer in zip(part, answers, strict=True)}
        self._kept |= new
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8") as file:
                # The first line feed ends what a killed process may have left of its last line.
                file.write("".join(f"\n{json.dumps({'key': key, 'answer': text})}" for key, text in new.items()))


def open_vlm(model: str, precision: str) -> Any:
    """Return a vision-language model, or base and adapter, by path or hub id, in this precision."""
    from pipelines import load_vlm

    return load_vlm(resolve_model(model), dtype=precision, resolve=resolve_model)


def _read(path: Path) -> dict[str, str]:
    """Return the answers of a file; a line that a killed process left half-written is none."""
    kept: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
            kept[entry["key"]] = entry["answer"]
        except (ValueError, KeyError, TypeError):
            continue
    return kept
