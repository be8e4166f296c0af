"""TPO: preference between captions of one image (arXiv 2509.25771); objectives: `mmalign.losses.tpo`, `diffusion_kto`.

The image, its noise and its timestep are the same on both sides; what differs is the caption, one that fits and one
that does not (`mmalign pairs perturb` writes them). TDPO compares the two, TKTO takes each by itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from mmalign.core.errors import UserError
from mmalign.losses import diffusion_kto, tdpo, tdpo_logit
from mmalign.methods.base import LabelBatch, LossOutput, Method, Needs, TimestepRange
from mmalign.methods.noising import Noised, noise_images, pair_metrics
from mmalign.methods.reference_point import Centred, centred
from mmalign.methods.run import Run
from pipelines.conditioning import Conditioning

if TYPE_CHECKING:
    from mmalign.data.labels import LabelTable


LOGIT_BOUND = 3.0
"""What the rejected caption may add to the logit by default, as with the setting measured on Shapes."""


class TPOConfig(TimestepRange):
    """Configuration of `tpo`; errors are means over latent dimensions."""

    beta: float = Field(2000.0, gt=0)
    """how closely the policy is held to the reference; tdpo has the half factor of diffusion_dpo, tkto has none"""
    objective: Literal["tdpo", "tkto"] = "tdpo"
    """tdpo: compare the fitting caption with the other; tkto: a good and a bad sample, each by itself"""
    rejected_rise: float | None = Field(None, gt=0)
    """tdpo: bound on the rise of the error under the rejected caption, without a gradient beyond; null: 6 / beta, by
    which that side adds 3 to the logit at most; .inf: no bound, and the images fall apart"""

    @model_validator(mode="before")
    @classmethod
    def _with_its_bound(cls, values: Any) -> Any:
        # Written out, so that the record of a run says which bound it had.
        beta = values.get("beta", 2000.0) if isinstance(values, dict) else None
        if isinstance(beta, int | float) and beta > 0 and values.get("rejected_rise") is None:
            return {**values, "rejected_rise": LOGIT_BOUND * 2 / beta}
        return values

    @property
    def bound(self) -> float:
        """The bound on the rise."""
        assert self.rejected_rise is not None, "the validator has filled it in"
        return self.rejected_rise


class TPO(Method[TPOConfig]):
    """Lower the denoising error of an image under its caption, relative to a caption that does not fit."""

    name: ClassVar[str] = "tpo"
    Config = TPOConfig
    needs: ClassVar[Needs] = Needs(source="labels", reference=True)
    images_per_sample = 2

    def check_data(self, source: LabelTable) -> None:
        """Refuse images that have no rejected caption or are labelled bad."""
        lacking, bad = sum(index < 0 for index in source.rejected_indices()), source.labels().count(False)
        if lacking or bad:
            raise UserError(
                f"method 'tpo' compares two captions of good images, and of {len(source)} images of {source.name} "
                f"{lacking} have no caption_rejected and {bad} are bad; write them by `mmalign pairs perturb "
                f"{source.name} --out FILE.parquet` and give data.labels=FILE.parquet"
            )

    def describe(self) -> str:
        """Return the conventions: the objective and the scale of beta."""
        c = self.config
        if c.objective == "tkto":
            return f"tpo: tkto, beta={c.beta:g}, mean-reduced, no half factor, kahneman-tversky"
        bound = "no bound" if math.isinf(c.bound) else f"bound {c.bound:g}"
        return f"tpo: tdpo, beta={c.beta:g}, mean-reduced, half factor on, {bound} on the rejected caption's error"

    def collect(self, run: Run, batches: Iterable[LabelBatch]) -> Iterable[LabelBatch] | list[Centred]:
        """For tkto, find the reference point of the step: the mean gain of all its captions on all processes."""
        if self.config.objective == "tdpo":
            return batches
        return centred(batches, lambda batch: _gain(*self._errors(run, batch)))

    def _errors(self, run: Run, batch: LabelBatch) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return the errors of the policy and of the reference, each under the fitting caption and the other."""
        assert batch.rejected_cond is not None, "check_data has seen a rejected caption for every image"
        one = noise_images(run, batch, self.config)
        both = Noised(
            torch.cat([one.x_t, one.x_t]),
            torch.cat([one.t, one.t]),
            torch.cat([one.target, one.target]),
            Conditioning.cat([batch.cond, batch.rejected_cond]),
        )
        return both.pair_errors(run.predict), both.pair_errors(run.reference.predict)

    def loss(self, run: Run, batch: LabelBatch | Centred) -> LossOutput:
        """Return the mean loss of the images; in the metrics chosen and rejected are the two captions."""
        c, batch = self.config, Centred.of(batch)
        policy, reference = self._errors(run, batch.labels)
        logit = tdpo_logit(*policy, *reference, beta=c.beta, rejected_rise=c.bound)
        if c.objective == "tkto":
            gain = _gain(policy, reference)
            good = torch.arange(len(gain), device=gain.device) < len(gain) // 2
            loss = diffusion_kto(gain, good, batch.reference_point(gain), beta=c.beta).mean()
        else:
            loss = tdpo(*policy, *reference, beta=c.beta, rejected_rise=c.bound).mean()
        return LossOutput(loss, pair_metrics(policy, reference, logit))


def _gain(policy: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor]) -> Tensor:
    return torch.cat(reference) - torch.cat(policy)
