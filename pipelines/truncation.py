"""The trained steps of a sampled image: ways of truncating backpropagation in papers and code.

AlignProp: arXiv 2310.03739; DRaFT: arXiv 2309.17400; ReFL: arXiv 2304.05977.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from pipelines.errors import PipelineError, choose

MODES = {
    "full": "every step (DRaFT)",
    "last-k": "the last k steps (DRaFT-K)",
    "uniform": "the last K steps, K uniform in 1..N for each rollout (AlignProp, the paper)",
    "gaussian": "from a Gaussian cut on, one for each rollout (AlignProp, its second code)",
    "bernoulli": "each step by chance, the later the likelier (AlignProp, its first code, and TRL)",
    "low-variance": "the last step, of the image and of n re-noised copies of it (DRaFT-LV)",
    "refl": "one random late step, whose prediction of the clean image is scored (ReFL)",
}


@dataclass(frozen=True)
class Truncation:
    """A truncation of the gradient through the sampler: `mode`, one of `MODES`, and its options.

    A step that is cut keeps the linear path of the sampler (``d x_next / d x`` of the update formula) and loses the
    network's prediction, which becomes a constant.

    uniform
        The paper draws K from U[0, T]. K = 0 would train nothing, so that it is read as 1..N with N sampling steps.
    gaussian
        The first trained step is ``floor(c)`` of a normal `c` with mean ``mean * N`` and deviation ``std * N``, drawn
        again unless it is in 1..N-1 (step 0 where N is 1). The authors' N(42, 5) of 50 steps is the default.
    bernoulli
        Step i is trained with probability (i + 1) / (N + 1), independently, as if a uniform integer 0..N were drawn at
        every step and the prediction detached if i is below it. A rollout of which no step is trained is
        drawn again: 1 in 65 at 5 steps, 1 in 7000 at 10.
    low-variance
        ``1 + repeats`` images a prompt; the paper's n is `repeats`, and 2.
    refl
        The step is uniform between the fractions `low` and `high` of the steps: 30..39 of 40 by default. The network
        is given the timestep of that step, as in the paper; the authors' code gives it the index.

    Raises `PipelineError` for an unknown mode or an option out of range.
    """

    mode: str = "uniform"
    k: int = 1
    mean: float = 0.84
    std: float = 0.1
    repeats: int = 2
    low: float = 0.75
    high: float = 1.0

    def __post_init__(self) -> None:
        """Check mode and options."""
        choose("truncation", self.mode, MODES)
        for name, value in (("k", self.k), ("repeats", self.repeats)):
            if value < 1:
                raise PipelineError(f"{name} of a truncation must be at least 1, got {value}.")
        if not (math.isfinite(self.mean) and 0.0 < self.std < math.inf):
            raise PipelineError(f"a gaussian truncation needs a finite mean and std > 0, got {self.mean}, {self.std}.")
        if not 0.0 <= self.low < self.high <= 1.0:
            raise PipelineError(
                f"low and high of a truncation are fractions of the steps, 0 <= low < high <= 1; got {self.low} and"
                f" {self.high}."
            )

    def draw(self, steps: int, rng: torch.Generator) -> tuple[int, ...]:
        """Return the indices of the trained steps of one rollout of `steps`, ascending, at least one.

        Every draw comes from `rng`, which is on the CPU.
        """
        if self.mode == "last-k" and self.k > steps:
            raise PipelineError(f"truncation 'last-k' keeps {self.k} steps of {steps}; lower k or take more steps.")
        match self.mode:
            case "full":
                first = 0
            case "last-k":
                first = steps - self.k
            case "uniform":
                first = _integer(0, steps, rng)
            case "gaussian":
                first = self._gaussian_cut(steps, rng)
            case "bernoulli":
                return _independent(steps, rng)
            case "low-variance":
                first = steps - 1
            case "refl":
                # Fractions such as 0.29 of 100 steps must not fall a step short by rounding.
                low, high = math.floor(self.low * steps + 1e-9), math.ceil(self.high * steps - 1e-9)
                return (_integer(low, high, rng),)
        return tuple(range(first, steps))

    def _gaussian_cut(self, steps: int, rng: torch.Generator) -> int:
        lowest = min(1, steps - 1)
        edges = torch.arange(lowest, steps + 1, dtype=torch.float64)
        below = torch.special.ndtr((edges - self.mean * steps) / (self.std * steps))
        chances = below.diff()
        if not chances.sum() > 0:
            raise PipelineError(
                f"a gaussian truncation of mean {self.mean} and std {self.std} (fractions of the steps) never cuts"
                f" within {steps} steps; the default is 0.84 and 0.1."
            )
        return lowest + int(torch.multinomial(chances, 1, generator=rng))


def _integer(low: int, high: int, rng: torch.Generator) -> int:
    return int(torch.randint(low, high, (1,), generator=rng))


def _independent(steps: int, rng: torch.Generator) -> tuple[int, ...]:
    while True:
        drawn = torch.randint(0, steps + 1, (steps,), generator=rng)
        if kept := (drawn <= torch.arange(steps)).nonzero().flatten().tolist():
            return tuple(kept)
