"""A vision-language model as judge, at any OpenAI-compatible endpoint (vLLM, SGLang, a vendor's).

Sources: the judge of Flow-GRPO (Liu et al. 2025, arXiv:2505.05470), one score from 1 to 5 divided by 5, and
UnifiedReward (Wang et al. 2025, arXiv:2503.05236), three aspects and comparisons of pairs. Forms:

* `overall`  the number after "Final Score:", for agreement with the caption and quality together;
* `aspects`  the mean of the numbers after "Alignment Score:", "Coherence Score:" and "Style Score:".

Deviations: the instructions are worded anew, so that a model trained on an exact wording, such as UnifiedReward,
should be given its own by `template` and `pair_template`; images keep their size and aspect ratio unless `resize`
squashes them (Flow-GRPO: 512); of several matches the last counts, after the model's reasoning; a number outside 1 to
5 is no answer; an answer without a number is NaN and counted, not 0. In pairs both orders are asked, for models favour
a place.
"""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from collections.abc import Sequence
from os import PathLike
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from rewards.backbones.chat import ChatClient, Reply
from rewards.base import Reward
from rewards.errors import RewardError, choices
from rewards.media import Media, pil_images, read_media


class Form(NamedTuple):
    """An instruction, with `{prompt}` for the prompt, and the words that precede its scores in an answer."""

    template: str
    labels: tuple[str, ...]


FORMS = {
    "overall": Form(
        "Here is an image that was generated for a text caption. Judge two things: how well the image shows what the "
        "caption says, with the right objects, attributes and relations, and how good the image itself is, in "
        "clarity, detail, colours and appeal. Give one score from 1 (bad) to 5 (excellent) for both together, at the "
        "end, after 'Final Score:'.\nText Caption: [{prompt}]",
        ("Final Score",),
    ),
    "aspects": Form(
        "Here is an image that was generated for a text caption. Score it from 1 (bad) to 5 (excellent) in three "
        "respects, one line each:\nAlignment Score: how well it shows what the caption says\nCoherence Score: whether "
        "it makes sense, without defects and distortions\nStyle Score: how appealing it is, whatever the caption "
        "says\nText Caption: [{prompt}]",
        ("Alignment Score", "Coherence Score", "Style Score"),
    ),
}
PAIR = (
    "Here are two images, Image 1 and Image 2, generated for the same text caption. Which of them shows better what "
    "the caption says, and is the better image? End with exactly one of these sentences: 'Image 1 is better than "
    "Image 2.', 'Image 2 is better than Image 1.', 'Both images are equally good.'\nText Caption: [{prompt}]"
)
LOW, HIGH = 1, 5
ON_PARSE_ERROR = ("min", "nan", "raise")
_VERDICT = re.compile(r"image ([12]) is better|images are equally good", re.I)


class VlmJudge(Reward):
    """Score of an image for its prompt by a vision-language model at an OpenAI-compatible endpoint.

    endpoint, model: such as `http://localhost:8000/v1` and the name that the server knows. form: `overall` (default)
    or `aspects`, see above; template: an instruction of your own with `{prompt}`, for the form's numbers;
    pair_template: that of `pairwise`. expected: take the mean of 1 to 5 under the model's probabilities instead of the
    digit that it wrote (needs log probabilities). on_parse_error: `nan` (default), `raise`, or `min`, the lowest
    score; the failures are counted in `parse_failures`. resize: squash images to squares of that many pixels. The
    other options are those of `rewards.backbones.chat.ChatClient`: answers are cached in the directory `cache`.
    """

    name: ClassVar[str] = "vlm-judge"
    compares_pairs: ClassVar[bool] = True  # `pairwise` looks at two images together
    version = "overall"
    needs = frozenset({"prompts"})
    range = (LOW / HIGH, 1.0)
    licence = "code Apache-2.0; that of the model behind the endpoint"
    source = "an endpoint of yours"
    citation = "Liu et al. 2025, arXiv:2505.05470; Wang et al. 2025, arXiv:2503.05236"

    def __init__(
        self,
        *,
        endpoint: str,
        model: str,
        form: str = "overall",
        template: str | None = None,
        pair_template: str = PAIR,
        expected: bool = False,
        on_parse_error: str = "nan",
        resize: int | None = None,
        api_key_env: str | None = None,
        cache: str | PathLike[str] | None = None,
        concurrency: int = 8,
        retries: int = 5,
        timeout: float = 120.0,
        max_tokens: int = 1024,
        params: dict[str, Any] | None = None,
        **common: Any,
    ) -> None:
        """Check the options; no request is sent."""
        super().__init__(**common)
        if form not in FORMS:
            raise RewardError(f"vlm-judge: form {form!r} is unknown; {choices(form, FORMS)}")
        if on_parse_error not in ON_PARSE_ERROR:
            raise RewardError(
                f"vlm-judge: on_parse_error {on_parse_error!r} is unknown; {choices(on_parse_error, ON_PARSE_ERROR)}"
            )
        self.template, self.pair_template = template or FORMS[form].template, pair_template
        for option, text in (("template", self.template), ("pair_template", pair_template)):
            if "{prompt}" not in text:
                raise RewardError(f"vlm-judge: {option} lacks the placeholder {{prompt}}: {text[:60]!r}")
        self.form, self.expected, self.on_parse_error, self.resize = form, expected, on_parse_error, resize
        # "Style Score (1-5): **4**" is an answer, too.
        self.patterns = [
            re.compile(rf"{label}(?:\s*\([^)]*\))?[\s:*]*(\d+(?:\.\d+)?)", re.I) for label in FORMS[form].labels
        ]
        self.client = ChatClient(
            endpoint=endpoint, model=model, api_key_env=api_key_env, cache=cache, concurrency=concurrency,
            retries=retries, timeout=timeout, max_tokens=max_tokens, params=params,
        )  # fmt: skip
        self.parse_failures = self.asked = 0
        told = hashlib.sha256(f"{self.template}\n{pair_template}\n{params}\n{resize}".encode()).hexdigest()[:12]
        self.version = f"{form}{', expected' * expected} by {model}, instruction {told}"
        self.source = f"{model} at {endpoint}"

    def score(
        self, media: Tensor, prompts: Sequence[str] | None, references: Sequence[Tensor] | None
    ) -> Float[Tensor, " batch"]:
        """Ask about each image, with several requests at a time."""
        asked = [self.template.replace("{prompt}", prompt) for prompt in prompts or ()]
        extra = {"logprobs": True, "top_logprobs": 20} if self.expected else {}
        questions = [(text, [image]) for text, image in zip(asked, self._images(media), strict=True)]
        values = [self._read(reply) for reply in self.client.ask(questions, **extra)]
        return media.new_tensor(self._settled(values, float(LOW))) / HIGH

    def pairwise(
        self,
        first: Media,
        second: Media,
        *,
        prompts: Sequence[str] | None = None,
        references: Sequence[Tensor] | Tensor | None = None,
    ) -> Float[Tensor, " batch"]:
        """Ask which of two images is better, in both orders: `[B]`, 1 the first, -1 the second, 0 neither.

        Where the two orders disagree, the mean of both answers: 0 if each time the same place won, a half in favour
        where one says equally good. An answer that cannot be read makes NaN (or, with `on_parse_error="min"`, counts
        as equally good).
        """
        pairs = [self._whole(media) for media in (first, second)]
        if len(pairs[0]) != len(pairs[1]):
            raise RewardError(f"vlm-judge: {len(pairs[0])} first and {len(pairs[1])} second images; give one each")
        checked = self._check_prompts(prompts, len(pairs[0])) or []
        texts = [self.pair_template.replace("{prompt}", prompt) for prompt in checked]
        forth = [(text, [a, b]) for text, a, b in zip(texts, *pairs, strict=True)]
        back = [(text, [b, a]) for text, (a, b) in zip(texts, (images for _, images in forth), strict=True)]
        values = self._settled([_preference(reply.text) for reply in self.client.ask([*forth, *back])], 0.0)
        ahead, behind = torch.tensor(values, dtype=torch.float32).split(len(texts))
        return ((ahead - behind) / 2).to(first.device if isinstance(first, Tensor) else "cpu")

    def _whole(self, media: Media) -> list[Image.Image]:
        found: dict[int, Image.Image] = {}
        for positions, group in read_media(media, self.modality):
            found.update(zip(positions, self._images(group), strict=True))
        return [found[position] for position in range(len(found))]

    def _images(self, media: Tensor) -> list[Image.Image]:
        images = pil_images(media)
        if self.resize is None:
            return images
        return [image.resize((self.resize, self.resize), Image.Resampling.BICUBIC) for image in images]

    def _read(self, reply: Reply) -> float | str:
        """Return the mean of the scores in an answer, or the answer itself if it has none."""
        values = []
        for pattern in self.patterns:
            matches = list(pattern.finditer(reply.text))
            if not matches or not LOW <= float(matches[-1][1]) <= HIGH:
                return reply.text
            match = matches[-1]
            whole = match[1].isdigit()
            values.append(self._expectation(reply, match.start(1)) if self.expected and whole else float(match[1]))
        return sum(values) / len(values)

    def _expectation(self, reply: Reply, place: int) -> float:
        """Return the mean score under the token probabilities at a position of the text."""
        start = 0
        for token, others in reply.tokens:
            if start <= place < start + len(token):
                chances = {other.strip(): 0.0 for other in others}
                for other, logprob in others.items():
                    chances[other.strip()] += math.exp(logprob)
                digits = {k: chances[str(k)] for k in range(LOW, HIGH + 1) if str(k) in chances}
                if digits:
                    return sum(k * chance for k, chance in digits.items()) / sum(digits.values())
            start += len(token)
        raise RewardError(f"{self.client.url} returns no log probabilities of the score; remove expected=True")

    def _settled(self, values: Sequence[float | str], least: float) -> list[float]:
        """Count answers that could not be parsed, and replace them by NaN or the lowest score."""
        failed = [value for value in values if isinstance(value, str)]
        self.asked += len(values)
        self.parse_failures += len(failed)
        if failed:
            said = f"vlm-judge: {len(failed)} of {len(values)} answers could not be read, such as {failed[0][:100]!r}"
            if self.on_parse_error == "raise":
                raise RewardError(f"{said}; choose on_parse_error='nan' or 'min', or another template")
            warnings.warn(said, stacklevel=2)
        other = least if self.on_parse_error == "min" else math.nan
        return [other if isinstance(value, str) else value for value in values]


def _preference(text: str) -> float | str:
    """Return 1 if the first is better, -1 if the second is, 0 if neither; or the text if it cannot be parsed."""
    matches = list(_VERDICT.finditer(text))
    return {"1": 1.0, "2": -1.0, None: 0.0}[matches[-1][1]] if matches else text
