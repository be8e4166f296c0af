"""What can be chosen for a flow model: the density of its training levels, its size, text length and guidance.

The densities are those of SD3 (arXiv 2403.03206, section 3.1) as diffusers' training scripts draw them
(``compute_density_for_timestep_sampling``): a number u in 0..1 picks ``levels[int(u * T)]`` of the scheduler's T
levels, which DESCEND, so that a small u is a noisy level.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pipelines.errors import PipelineError, choose

DENSITIES = ("uniform", "logit_normal", "mode")
MODE_SCALE_LIMIT = 2.0 / (math.pi - 2.0)


@dataclass(frozen=True)
class Density:
    """How training levels are drawn from the scheduler's grid.

    kind
        "uniform"; "logit_normal": u is the sigmoid of a normal number; "mode": ``u = 1 - q - scale (cos^2(pi q / 2) -
        1 + q)`` with a uniform q.
    mean, std
        Of the normal number; a mean below 0 prefers noisy levels.
    scale
        Of "mode", in -1..1.75: above 0 prefers the middle, below 0 the ends.

    >>> weights = Density("logit_normal").weights(1000)
    >>> float(weights[400:600].sum())  # 2 Phi(ln 1.5) - 1
    0.3148...
    """

    kind: str = "uniform"
    mean: float = 0.0
    std: float = 1.0
    scale: float = 1.29

    def __post_init__(self) -> None:
        """Raise `PipelineError` for an unknown kind or a number out of its range."""
        choose("density", self.kind, DENSITIES)
        if not (math.isfinite(self.mean) and 0.0 < self.std < math.inf):
            raise PipelineError(f"density logit_normal needs a std above 0, got mean {self.mean} and std {self.std}.")
        if not -1.0 <= self.scale <= MODE_SCALE_LIMIT:
            raise PipelineError(f"density mode needs a scale in -1..{MODE_SCALE_LIMIT:.2f}, got {self.scale}.")

    def __str__(self) -> str:
        """Return it as a log line names it."""
        given = {"logit_normal": f"({self.mean:g}, {self.std:g})", "mode": f"({self.scale:g})"}
        return self.kind + given.get(self.kind, "")

    def weights(self, levels: int) -> Float[Tensor, " levels"]:
        """Return the probability of each of so many levels, counted from clean; float64."""
        below = self._below(torch.linspace(0.0, 1.0, levels + 1, dtype=torch.float64))
        return below.diff().flip(0).clamp_min(0.0)

    def _below(self, u: Tensor) -> Tensor:
        """Return the probability of a number below each of `u`."""
        if self.kind == "logit_normal":
            return torch.special.ndtr((torch.logit(u) - self.mean) / self.std)
        if self.kind == "mode":
            return 1.0 - self._mode_inverse(u)
        return u

    def _mode_inverse(self, u: Tensor) -> Tensor:
        """Return the q for each u, by bisection: u falls from 1 to 0 as q rises."""
        low, high = torch.zeros_like(u), torch.ones_like(u)
        for _ in range(60):
            q = (low + high) / 2.0
            found = 1.0 - q - self.scale * (torch.cos(math.pi * q / 2.0).square() - 1.0 + q)
            low, high = torch.where(found > u, q, low), torch.where(found > u, high, q)
        return (low + high) / 2.0


@dataclass(frozen=True)
class FlowOptions:
    """What the user chooses for a flow model; None is the family's default.

    image_size
        Side of the images in pixels. It sets the shape of samples and, where the family shifts its levels by the size
        of the latents, that shift.
    text_length
        Tokens of the longest text encoder.
    embedded_guidance
        The scale that a guidance-distilled network takes as an input, the same in every call of it.
    density
        Of the training levels.
    low_noise_guidance
        The scale of classifier-free guidance below the boundary of a model of two experts (diffusers'
        ``guidance_scale_2``); None: the same as above it.
    """

    image_size: int | None = None
    text_length: int | None = None
    embedded_guidance: float | None = None
    density: Density = Density()
    low_noise_guidance: float | None = None

    @property
    def sampling(self) -> str:
        """What of it decides how samples look, as text; "default" where nothing was chosen."""
        names = ("image_size", "text_length", "embedded_guidance", "low_noise_guidance")
        chosen = [f"{name} {getattr(self, name)}" for name in names if getattr(self, name) is not None]
        return ", ".join(chosen) or "default"
