"""Whether an image shows the text that its prompt puts in quotation marks, by optical character recognition.

Source: the text rendering reward of Flow-GRPO (Liu et al. 2025, arXiv:2505.05470): the text read, without spaces and
in lower case, is compared with the quoted one; the score is 1 where that is contained, else 1 - distance / length,
with the Levenshtein distance or, where that is less, the length of the quoted text.

Deviations: the reader is RapidOCR (PP-OCR models on onnxruntime, in the package) and not PaddleOCR 2; single and
typographic quotation marks count too, as DrawBench has them, double ones first; a prompt without any is an error, and
so is a reader that fails, where the original code crashes or gives 0.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from PIL import Image

from rewards.bases.observed import ObservedReward
from rewards.errors import RewardError

Reader = Callable[[Image.Image], Sequence[str]]

_QUOTED = tuple(re.compile(form) for form in (r'"([^"]*)"', r"“([^”]*)”", r"‘(.+?)’(?!\w)", r"(?<!\w)'(.+?)'(?!\w)"))


class OcrReward(ObservedReward):
    """Quoted text of the prompt found in the image, by optical character recognition and Levenshtein distance.

    reader: a function from an RGB image to its lines of text, instead of RapidOCR; params: RapidOCR's own parameters,
    such as `{"Rec.lang_type": "ch"}`, which may make it fetch other models. `observations(media)` returns the text
    that was read.
    """

    name: ClassVar[str] = "ocr"
    version = "rapidocr"
    range = (0.0, 1.0)
    licence = "Apache-2.0; RapidOCR and its PP-OCR models Apache-2.0"
    source = "models in the package rapidocr"
    citation = "Liu et al. 2025, arXiv:2505.05470"

    def __init__(
        self, *, reader: Reader | None = None, params: Mapping[str, Any] | None = None, **common: Any
    ) -> None:
        """Load RapidOCR unless there is another reader.

        Raises:
            RewardError: RapidOCR or onnxruntime is not installed, or cannot be set up with these parameters.
        """
        super().__init__(**common)
        if reader is not None and params is not None:
            raise RewardError("ocr: params apply to RapidOCR only; remove params or reader")
        if reader is None:
            reader, version = _rapidocr(params or {})
            self.version = f"rapidocr {version}" + (f", {dict(params)}" if params else "")
        else:
            self.version = self.source = getattr(reader, "__name__", type(reader).__name__)
        self.reader: Reader = reader

    @classmethod
    def check_prompts(cls, prompts: Sequence[str]) -> None:
        """Raise `RewardError` if a prompt has no quoted text."""
        for prompt in prompts:
            quoted_text(prompt)

    def observe(self, images: list[Image.Image]) -> list[str]:
        """Read the text of each image, with its lines joined."""
        return ["".join(self.reader(image)) for image in images]

    def rate(self, observed: str, prompt: str) -> float:
        """Compare the text that was read with the quoted text."""
        return text_score(observed, quoted_text(prompt))

    def _check_prompts(self, prompts: Sequence[str] | None, count: int) -> list[str] | None:
        """Check the quoted texts before any image is read."""
        checked = super()._check_prompts(prompts, count)
        self.check_prompts(checked or ())
        return checked


def quoted_text(prompt: str) -> str:
    """Return the text in the first pair of quotation marks, double ones first.

    Raises:
        RewardError: there is no quoted text, or it holds only spaces.
    """
    for form in _QUOTED:
        found = form.search(prompt)
        if found and found[1].strip():
            return found[1]
    raise RewardError(f'ocr: the prompt {prompt!r} quotes no text; write it as in: a sign that says "Hello World"')


def text_score(read: str, wanted: str) -> float:
    """Score a text that was read against the expected one, without spaces and in lower case: in [0, 1]."""
    read, wanted = (text.replace(" ", "").lower() for text in (read, wanted))
    if wanted in read:
        return 1.0
    return 1 - min(levenshtein(read, wanted), len(wanted)) / len(wanted)


def levenshtein(first: str, second: str) -> int:
    """Return the Levenshtein distance: the least number of characters to insert, delete or replace."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        above, row[0] = row[0], i
        for j, b in enumerate(second, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (a != b))
    return row[-1]


def _rapidocr(params: Mapping[str, Any]) -> tuple[Reader, str]:
    try:
        import onnxruntime  # noqa: F401
        from rapidocr import RapidOCR
    except ImportError as error:
        raise RewardError('ocr needs RapidOCR and onnxruntime: pip install "mmalign[ocr]"') from error
    from importlib.metadata import version

    # Keep lines of any confidence, and do not warn about images without text.
    try:
        engine: Any = RapidOCR(params={"Global.log_level": "error", "Global.text_score": 0.0, **params})
    except Exception as error:  # omegaconf's and its own
        raise RewardError(
            f"ocr: RapidOCR does not accept {dict(params)}: {' '.join(str(error).split())[:200]}"
        ) from error
    return lambda image: engine(image).txts or (), version("rapidocr")
