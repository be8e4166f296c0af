"""TextNorm: how much better an image fits its prompt than contrasting captions.

Source: Kim et al. 2024, "Confidence-aware Reward Optimization for Fine-tuning Text-to-Image Models" (ICLR, openreview
Let8OMe20n). For a base reward r, a prompt y and contrast prompts Y

    score = exp(s r(x, y)) / sum over y' in {y} and Y of exp(s r(x, y'))

and for several bases the mean of their scores, or that mean minus `lam` times their variance (or deviation), which the
paper calls uncertainty-regularised. The authors published the contrast prompts and their results, no code: the formula
is UNVERIFIED beyond the parameters that the results name (`scale` 0.1 to 10, chosen for each prompt there; `lambda`),
and so is which of variance and deviation is meant.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rewards.base import Reward
from rewards.bases.cross_encoder import CrossEncoderReward
from rewards.bases.derived import inherit_facts, load_inner
from rewards.bases.two_tower import TwoTowerReward
from rewards.combining.combine_modes import uncertainty_weighted
from rewards.errors import RewardError, choices
from rewards.language.contrast import make_contrast
from rewards.language.contrast_rules import without_duplicates

ENSEMBLES = ("mean", "uncertainty")
SPREADS = ("variance", "std")


class TextNorm(Reward):
    """Softmax of any reward of prompts over the true prompt and contrast prompts, in [0, 1].

    base: a reward's name, its options as a mapping with `name`, a reward, or a list of these (an ensemble). contrast:
    where contrast prompts come from, see `rewards.language.contrast.make_contrast`; the true prompt is taken out of
    its own list. scale: s, one for all bases or one each; scores differ in width, a cosine needs about 100 times the
    scale of a logit. ensemble: `mean` or `uncertainty`, with `lam` and `spread` (`variance` over the population, or
    `std`).

    A base encodes each image once if it can (two towers, or a model that reads an encoded image with a prompt); the
    rest of it runs once for each contrast prompt.
    """

    name: ClassVar[str] = "text-norm"
    needs = frozenset({"prompts"})
    differentiable = True
    range = (0.0, 1.0)
    licence = "Apache-2.0; base: its own"
    source = "its base"
    citation = "Kim et al. 2024, Confidence-aware Reward Optimization (ICLR), openreview Let8OMe20n"

    def __init__(
        self,
        *,
        base: Any,
        contrast: Any = "rules",
        scale: float | int | Sequence[float | int] = 1.0,
        ensemble: str = "mean",
        lam: float | int = 1.0,
        spread: str = "variance",
        **options: Any,
    ) -> None:
        """Load the bases, with this reward's device and dtype unless their own options differ."""
        super().__init__(**options)
        if ensemble not in ENSEMBLES:
            raise RewardError(f"text-norm: ensemble {ensemble!r} is unknown; {choices(ensemble, ENSEMBLES)}")
        if spread not in SPREADS:
            raise RewardError(f"text-norm: spread {spread!r} is unknown; {choices(spread, SPREADS)}")
        specs = base if isinstance(base, (list, tuple)) else [base]
        self.bases: list[Reward] = [self._load(spec) for spec in specs]
        self._modules_of_bases = nn.ModuleList(self.bases)
        self.scales = [float(scale)] * len(specs) if isinstance(scale, (int, float)) else list(map(float, scale))
        if len(self.scales) != len(specs) or not specs or not min(self.scales) > 0:
            raise RewardError(
                f"text-norm: scale is {scale} for {len(specs)} bases; give one above 0 for each, or for all"
            )
        self.ensemble, self.lam, self.spread = ensemble, lam, spread
        self._contrast, self._sets = make_contrast(contrast), dict[str, list[str]]()
        self._state_facts(contrast)

    def score(
        self, media: Tensor, prompts: Sequence[str] | None, references: Sequence[Tensor] | None
    ) -> Float[Tensor, " batch"]:
        """Return the probability of each prompt among its contrasts, averaged over the bases."""
        self._ask_for(prompts or ())
        sets = [self.prompt_set(prompt) for prompt in prompts or ()]
        each = []
        for base, scale in zip(self.bases, self.scales, strict=True):
            scores = _scores(base, media, sets, references)
            # Unused entries get probability 0.
            logits = (scale if base.higher_is_better else -scale) * scores
            used = torch.tensor([[k < len(found) for k in range(scores.shape[1])] for found in sets])
            each.append(logits.masked_fill(~used.to(logits.device), float("-inf")).softmax(1)[:, 0])
        if self.ensemble == "mean":
            return torch.stack(each).mean(0)
        return uncertainty_weighted(torch.stack(each), self.lam, self.spread == "std")[0]

    def prompt_set(self, prompt: str) -> list[str]:
        """Return the true prompt followed by its contrast prompts; cached for each prompt.

        Raises:
            RewardError: there is no contrast, so that every image would score 1.
        """
        if prompt not in self._sets:
            contrast = without_duplicates(prompt, self._contrast(prompt))
            if not contrast:
                raise RewardError(
                    f"no contrast prompts for {prompt!r}, so that every image would score 1; give a file that has "
                    "them, as contrast={'file': PATH, 'otherwise': 'rules'}"
                )
            self._sets[prompt] = [prompt, *contrast]
        return self._sets[prompt]

    def _ask_for(self, prompts: Sequence[str]) -> None:
        """Fill the cache of contrast prompts, several at a time if their source supports it, as an endpoint does."""
        workers = getattr(self._contrast, "concurrency", 1)
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._sets]
        if workers > 1 and len(missing) > 1:
            with ThreadPoolExecutor(workers) as pool:
                list(pool.map(self.prompt_set, missing))

    def _load(self, spec: Any) -> Reward:
        try:
            found = load_inner(spec, {"device": self.device, "dtype": self.dtype})
        except RewardError as error:
            raise RewardError(f"text-norm: base: {error}") from error
        if "prompts" not in found.needs:
            raise RewardError(f"text-norm: base {found.name!r} does not use prompts; choose a reward that does")
        return found

    def _state_facts(self, contrast: Any) -> None:
        inherit_facts(self, self.bases)
        of = ", ".join(
            f"{scale:g} * {base.name} ({base.version})" for base, scale in zip(self.bases, self.scales, strict=True)
        )
        said = json.dumps(contrast, sort_keys=True, default=str)
        said = said if len(said) <= 60 else hashlib.sha256(said.encode()).hexdigest()[:12]
        mode = self.ensemble if self.ensemble == "mean" else f"mean - {self.lam:g} {self.spread}"
        self.version = f"{mode} of {of}; contrast {said}"
        if self.ensemble == "uncertainty":
            most = 0.5 if self.spread == "std" else 0.25
            self.range = (min(0.0, -self.lam * most), max(1.0, 1.0 - self.lam * most))


def _scores(
    base: Reward, media: Tensor, sets: list[list[str]], references: Sequence[Tensor] | None
) -> Float[Tensor, "batch candidates"]:
    """Score every medium against its own candidates; entries beyond the length of a set are undefined."""
    if isinstance(base, TwoTowerReward) and type(base).score is TwoTowerReward.score:
        texts = {text: place for place, text in enumerate(dict.fromkeys(text for found in sets for text in found))}
        every = base.compare(base.media_embeddings(media) @ base.prompt_embeddings(list(texts)).T)
        longest = max(map(len, sets))
        places = [[texts[text] for text in found] + [0] * (longest - len(found)) for found in sets]
        return every.gather(1, torch.tensor(places, device=every.device))
    if isinstance(base, CrossEncoderReward) and type(base).score is CrossEncoderReward.score:
        encoded = base.encode_media(media)
        places_in_all = range(max(map(len, sets)))
        texts_at = [[found[k] if k < len(found) else found[0] for found in sets] for k in places_in_all]
        return torch.stack([base.compare(encoded, texts) for texts in texts_at], dim=1)
    own = None if references is None else base.prepare_references(list(references))
    columns = []
    for place in range(max(map(len, sets))):
        rows = [i for i, found in enumerate(sets) if place < len(found)]
        texts_here = [sets[i][place] for i in rows]
        found = base.score(media[rows], texts_here, None if own is None else [own[i] for i in rows])
        columns.append(found.new_zeros(len(sets)).index_put((torch.tensor(rows, device=found.device),), found))
    return torch.stack(columns, dim=1)
