"""Noise processes: epsilon, v and sample diffusion, and rectified flow, with one interface.

Every process here is ``x_t = alpha(t) * x0 + sigma(t) * noise``; they differ in the two coefficients and in the
network's prediction. Methods and samplers use `NoiseProcess` alone and do not depend on the family.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from pipelines.errors import PipelineError, choose
from pipelines.flow import Density

Prediction = Literal["epsilon", "v_prediction", "sample", "flow"]
Timestep = int | float | Shaped[Tensor, " batch"] | Shaped[Tensor, ""]
DIFFUSION_SCHEDULERS = tuple(
    f"{name}Scheduler"
    for name in (
        "DDIM DDIMParallel DDPM DDPMParallel PNDM LMSDiscrete EulerDiscrete EulerAncestralDiscrete HeunDiscrete "
        "KDPM2Discrete KDPM2AncestralDiscrete DPMSolverMultistep DPMSolverSinglestep DPMSolverSDE DEISMultistep "
        "UniPCMultistep SASolver LCM TCD"
    ).split()
)
"""diffusers' schedulers that are samplers of one noise process, DDPM's, with its betas in their configuration."""
SHIFTED_SCHEDULERS = ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")
"""Those of DDPM with a shifted signal-to-noise ratio (``snr_shift_scale``); they never clip."""
FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
PLACED_OTHERWISE = (
    *("use_dynamic_shifting", "shift_terminal"),
    *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"),
)
"""Keys of a solver along a flow that place its levels otherwise than by a shift."""
PREDICTIONS: tuple[str, ...] = ("epsilon", "v_prediction", "sample", "flow")


class Schedule(NamedTuple):
    """The levels of a sampling run, on the CPU: step i goes from ``levels[i]`` to ``next_levels[i]``, -1 the end."""

    levels: Shaped[Tensor, " steps"]
    next_levels: Shaped[Tensor, " steps"]


class NoiseProcess(ABC):
    """A noise process, from clean media to noise and back; `from_scheduler` picks the kind.

    Sources: DDPM (arXiv 2006.11239), v-prediction (arXiv 2202.00512), rectified flow (arXiv 2209.03003). A timestep
    is a number, or a tensor ``[batch]`` with one level a sample; ``-1`` means the level at which sampling ends.
    Latents are ``[batch, *latent]``, of any rank. Coefficients have the dtype of the latents, float32 at least.

    >>> from diffusers import FlowMatchEulerDiscreteScheduler
    >>> process = NoiseProcess.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0))
    >>> x0, noise = torch.zeros(1, 16, 3, 8, 8), torch.ones(1, 16, 3, 8, 8)  # a video: channels, frames, height, width
    >>> float(process.add_noise(x0, noise, 250).mean())  # (1 - 0.25) * 0 + 0.25 * 1
    0.25
    >>> process.schedule(2, sigmas=[1.0, 0.5]).levels.tolist()  # 3 * 0.5 / (1 + 2 * 0.5) = 0.75
    [1000.0, 750.0]
    """

    def __init__(self, prediction: str, scheduler: Any, *, clip_range: float | None = None) -> None:
        """Keep what all processes share; `clip_range` bounds the predicted x0 in `clean`."""
        self.prediction = cast(Prediction, choose("prediction type", prediction, PREDICTIONS))
        self.num_train_timesteps = int(scheduler.config.num_train_timesteps)
        self.clip_range = clip_range
        self._scheduler = scheduler
        self._weights: Tensor | None = None

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> NoiseProcess:
        """Build from a scheduler of `DIFFUSION_SCHEDULERS`, `SHIFTED_SCHEDULERS` or `FLOW_SCHEDULERS`, by its config.

        Raises `PipelineError` for any other scheduler (EDM's and consistency models' have another noise process), and
        for settings no sampler of ours reproduces (dynamic thresholding, inverted levels, continuous levels in a
        scheduler of the DDPM kind, epsilon prediction with zero terminal signal).
        """
        from diffusers import CogVideoXDDIMScheduler, DDIMScheduler, FlowMatchEulerDiscreteScheduler

        config = scheduler.config
        for kind in (type(scheduler).__name__, config.get("_class_name") or type(scheduler).__name__):
            if kind not in DIFFUSION_SCHEDULERS + SHIFTED_SCHEDULERS + FLOW_SCHEDULERS:
                raise PipelineError(
                    f"the scheduler is of the class {kind}, whose noise process is not supported; supported are the"
                    " samplers of DDPM models (DDIM, PNDM, Euler, DPM-Solver, ...) and of flow-matching models."
                )
        if type(scheduler).__name__ in FLOW_SCHEDULERS:
            if config.get("invert_sigmas"):
                raise PipelineError("the scheduler counts its noise levels backwards (invert_sigmas); turn it off.")
            return FlowProcess(FlowMatchEulerDiscreteScheduler.from_config(config))
        if config.get("thresholding"):
            raise PipelineError("the scheduler thresholds its predictions, which is for pixel models; turn it off.")
        if config.get("use_flow_sigmas"):
            return FlowProcess.of_solver(config)
        if config.get("timestep_type") == "continuous":
            raise PipelineError(
                "the scheduler has timestep_type = continuous, so its noise levels are not those of its betas; only"
                " models trained on the levels of the betas are supported."
            )
        # Schedulers that never clip (PNDM, Euler) have no clip_sample in their config, and DDIM would turn it on.
        shifted = type(scheduler).__name__ in SHIFTED_SCHEDULERS
        clip = bool(config.get("clip_sample", False)) and not shifted
        ddim = (CogVideoXDDIMScheduler if shifted else DDIMScheduler).from_config(config, clip_sample=clip)
        if ddim.config.prediction_type == "epsilon" and float(ddim.alphas_cumprod[-1]) == 0.0:
            raise PipelineError(
                "the scheduler ends in pure noise (rescale_betas_zero_snr), where an epsilon prediction says nothing"
                " about the image; use prediction_type v_prediction or turn rescale_betas_zero_snr off."
            )
        return DiffusionProcess(ddim, clip_range=float(ddim.config.clip_sample_range) if clip else None)

    def alpha(self, t: Timestep) -> Float[Tensor, " batch"]:
        """Return the factor of the clean media at `t`, ``[batch]`` (float32, on the device of `t`)."""
        return self.coefficients(t, _blank(t))[0]

    def sigma(self, t: Timestep) -> Float[Tensor, " batch"]:
        """Return the standard deviation of the noise at `t`, ``[batch]`` (float32, on the device of `t`)."""
        return self.coefficients(t, _blank(t))[1]

    def add_noise(
        self, x0: Float[Tensor, "batch *latent"], noise: Float[Tensor, "batch *latent"], t: Timestep
    ) -> Float[Tensor, "batch *latent"]:
        """Return ``x_t = alpha(t) * x0 + sigma(t) * noise``."""
        alpha, sigma = self.coefficients(t, x0)
        return alpha * x0 + sigma * noise

    def implied_noise(
        self, x0: Float[Tensor, "batch *latent"], x_t: Float[Tensor, "batch *latent"], t: Timestep
    ) -> Float[Tensor, "batch *latent"]:
        """Return the noise for which ``add_noise(x0, noise, t)`` is `x_t`; `t` must not be clean (sigma > 0)."""
        alpha, sigma = self.coefficients(t, x0)
        return (x_t - alpha * x0) / sigma

    def target(
        self, x0: Float[Tensor, "batch *latent"], noise: Float[Tensor, "batch *latent"], t: Timestep
    ) -> Float[Tensor, "batch *latent"]:
        """Return the network's target for ``add_noise(x0, noise, t)``."""
        match self.prediction:
            case "epsilon":
                return noise
            case "sample":
                return x0
            case "flow":
                return noise - x0
            case "v_prediction":
                alpha, sigma = self.coefficients(t, x0)
                return alpha * noise - sigma * x0

    def to_x0(
        self, x_t: Float[Tensor, "batch *latent"], output: Float[Tensor, "batch *latent"], t: Timestep
    ) -> Float[Tensor, "batch *latent"]:
        """Return the clean media that the network's output implies."""
        alpha, sigma = self.coefficients(t, x_t)
        match self.prediction:
            case "epsilon":
                return (x_t - sigma * output) / alpha
            case "sample":
                return output
            case "flow":
                return x_t - sigma * output
            case "v_prediction":
                return alpha * x_t - sigma * output

    def clean(
        self, x_t: Float[Tensor, "batch *latent"], output: Float[Tensor, "batch *latent"], t: Timestep
    ) -> Float[Tensor, "batch *latent"]:
        """Return `to_x0`, within ``-clip_range..clip_range`` where the scheduler clips, as the sampler takes it."""
        x0 = self.to_x0(x_t, output, t)
        return x0 if self.clip_range is None else x0.clamp(-self.clip_range, self.clip_range)

    def to_noise(
        self, x_t: Float[Tensor, "batch *latent"], output: Float[Tensor, "batch *latent"], t: Timestep
    ) -> Float[Tensor, "batch *latent"]:
        """Return the noise that the network's output implies."""
        alpha, sigma = self.coefficients(t, x_t)
        match self.prediction:
            case "epsilon":
                return output
            case "sample":
                return (x_t - alpha * output) / sigma
            case "flow":
                return x_t + alpha * output
            case "v_prediction":
                return sigma * x_t + alpha * output

    def forward_step(
        self, x_s: Float[Tensor, "batch *latent"], noise: Float[Tensor, "batch *latent"], s: Timestep, t: Timestep
    ) -> Float[Tensor, "batch *latent"]:
        """Move from `s` up to the noisier `t` along the given noise: the inverse of `kernels.ode`."""
        alpha_s, sigma_s = self.coefficients(s, x_s)
        alpha, sigma = self.coefficients(t, x_s)
        return alpha / alpha_s * (x_s - sigma_s * noise) + sigma * noise

    def timesteps(self, steps: int) -> Shaped[Tensor, " steps"]:
        """Return the sampling grid, descending, as diffusers' ``set_timesteps`` places it (on the CPU)."""
        return self.schedule(steps)[0]

    @abstractmethod
    def schedule(
        self,
        steps: int,
        *,
        shift: float | None = None,
        mu: float | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> Schedule:
        """Return the levels of a sampling run of `steps`, descending, as diffusers places them.

        `shift`, `mu` and `sigmas` are for flow matching: see `FlowProcess.schedule`. Raises `PipelineError` for more
        steps than the process has levels.
        """

    def sample_timesteps(
        self,
        n: int,
        *,
        generator: torch.Generator | None = None,
        low: int = 0,
        high: int | None = None,
        discount: float = 1.0,
    ) -> Shaped[Tensor, " n"]:
        """Draw `n` training timesteps from levels ``low <= level < high``, counted from clean.

        Uniformly, or by the density of `FlowProcess.set_density`; with ``discount < 1`` each level is `discount` times
        as likely, relative to that, as the next noisier one. They are on the generator's device.
        """
        high = self.num_train_timesteps if high is None else high
        if not 0 <= low < high <= self.num_train_timesteps:
            raise PipelineError(
                f"timesteps must satisfy 0 <= low < high <= {self.num_train_timesteps}, got low={low}, high={high}."
            )
        if not 0.0 < discount <= 1.0:
            raise PipelineError(f"discount must lie in (0, 1], got {discount}; 1 draws all levels alike.")
        device = generator.device if generator is not None else None
        if discount == 1.0 and self._weights is None:
            return self._timesteps_of(torch.randint(low, high, (n,), generator=generator, device=device))
        weights = discount ** torch.arange(high - 1 - low, -1, -1, dtype=torch.float64, device=device)
        if self._weights is not None:
            weights = weights * self._weights[low:high].to(weights.device)
            if not bool(weights.any()):
                raise PipelineError(f"the density gives no level in {low}..{high - 1} a weight; widen one of them.")
        return self._timesteps_of(low + torch.multinomial(weights, n, replacement=True, generator=generator))

    def _timesteps_of(self, levels: Tensor) -> Tensor:
        """Return the timesteps of integer levels, counted from clean."""
        return levels

    def check_steps(self, steps: int) -> None:
        """Raise `PipelineError` unless a sampling grid of so many steps can be made."""
        if not 1 <= steps <= self.num_train_timesteps:
            raise PipelineError(f"steps must lie in 1..{self.num_train_timesteps}, got {steps}.")

    @abstractmethod
    def coefficients(self, t: Timestep, like: Float[Tensor, "..."]) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma at `t`, each ``[batch or 1, 1, ...]`` to broadcast against latents `like`."""


class DiffusionProcess(NoiseProcess):
    """Variance-preserving diffusion over ``num_train_timesteps`` integer levels: ``alpha^2 + sigma^2 = 1``.

    Level ``-1`` is the scheduler's ``final_alpha_cumprod``. The coefficients are computed in float64 from its table.
    """

    def __init__(self, scheduler: Any, *, clip_range: float | None = None) -> None:
        """Take the coefficients from a ``DDIMScheduler`` or a ``CogVideoXDDIMScheduler``."""
        super().__init__(scheduler.config.prediction_type, scheduler, clip_range=clip_range)
        # The final level sits at the end of the table, so that -1 finds it, on a device too, without a branch.
        squared = torch.cat([scheduler.alphas_cumprod, scheduler.final_alpha_cumprod.reshape(1)]).double().cpu()
        self._table = torch.stack([squared.sqrt(), (1.0 - squared).sqrt()])
        self._placed: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def schedule(
        self,
        steps: int,
        *,
        shift: float | None = None,
        mu: float | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> Schedule:
        """Return the sampling grid and the level each step leads to, ``-1`` for anything below 0.

        As in diffusers' DDIM a step leads ``T // steps`` levels down, whatever the spacing: to the next point of the
        grid for "leading" and (where `steps` divides T) "trailing", to a level near it otherwise.
        """
        if (shift, mu, sigmas) != (None, None, None):
            raise PipelineError(f"shift, mu and sigmas are for flow matching; this model predicts {self.prediction}.")
        self.check_steps(steps)
        self._scheduler.set_timesteps(steps)
        grid = self._scheduler.timesteps.clone()
        return Schedule(grid, (grid - self.num_train_timesteps // steps).clamp_min(-1))

    def coefficients(self, t: Timestep, like: Float[Tensor, "..."]) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma at `t`, to broadcast against `like`."""
        dtype = like.dtype if like.dtype == torch.float64 else torch.float32
        key = (like.device, dtype)
        if key not in self._placed:
            self._placed[key] = self._table.to(dtype).to(like.device)
        # A Python integer makes a view; a zero-dimensional tensor would cost a device synchronisation.
        chosen = self._placed[key][:, t if isinstance(t, Tensor) else int(t)]
        return _shaped(chosen[0], like), _shaped(chosen[1], like)


class FlowProcess(NoiseProcess):
    """Rectified flow: ``x_t = (1 - s) x0 + s noise`` with ``s = t / T``; the network predicts ``noise - x0``.

    arXiv 2209.03003; time shift as in SD3 (arXiv 2403.03206, eq. 23). Timesteps are floats in ``(0, T]``.

    The training levels are those of the scheduler before any ``set_timesteps``, as in diffusers' training scripts:
    shifted where its shift is fixed (SD3), not shifted where it depends on the size of the latents (FLUX.1), although
    such models are sampled with the shift.

    Attributes: `mu`, the shift of a scheduler that shifts by size; `even_sigmas`, whether the levels before the shift
    are by default ``linspace(1, 1 / steps, steps)`` instead of ending at the lowest training level; `density`.
    """

    def __init__(self, scheduler: Any) -> None:
        """Take the (shifted) noise levels from a ``FlowMatchEulerDiscreteScheduler``."""
        super().__init__("flow", scheduler)
        self.mu: float | Callable[[int], float] | None = None
        self.even_sigmas = False
        self.density = Density()
        self._levels = scheduler.timesteps.flip(0).clone()

    @classmethod
    def of_solver(cls, config: Any) -> FlowProcess:
        """Build from a solver of the DDPM kind that steps along a flow (``use_flow_sigmas``), such as Wan ships.

        Its levels, ``shift s / (1 + (shift - 1) s)`` of evenly spaced ones, start 1 / T below ours, which are those of
        ``linspace(1, 1 / steps, steps)``. Raises `PipelineError` for one whose model does not predict the flow, and
        for levels placed otherwise.
        """
        from diffusers import FlowMatchEulerDiscreteScheduler

        if placed := [key for key in PLACED_OTHERWISE if config.get(key)]:
            raise PipelineError(
                f"the scheduler has use_flow_sigmas with {placed[0]}, which is not supported; use a"
                " FlowMatchEulerDiscreteScheduler."
            )

        if config["prediction_type"] != "flow_prediction":
            raise PipelineError(
                f"the scheduler has use_flow_sigmas, and prediction_type {config['prediction_type']!r}; a flow model's"
                " is 'flow_prediction'."
            )
        shift = float(config.get("flow_shift") or 1.0)
        levels = int(config["num_train_timesteps"])
        process = cls(FlowMatchEulerDiscreteScheduler(num_train_timesteps=levels, shift=shift))
        process.even_sigmas = True
        return process

    @property
    def shifts_by_size(self) -> bool:
        """Whether the shift of the sampling levels depends on the size of the latents."""
        return bool(self._scheduler.config.use_dynamic_shifting)

    def set_density(self, density: Density) -> None:
        """Draw training levels by a density over the training grid from now on."""
        self.density = density
        self._weights = None if density.kind == "uniform" else density.weights(self.num_train_timesteps)

    def describe(self) -> str:
        """Return, for the log, how levels are placed in sampling and drawn in training."""
        if self.shifts_by_size:
            shift = f"by size, mu {self.mu:.4g}" if isinstance(self.mu, float) else "by size"
            return f"sampling levels shifted {shift}; training levels {self.density} on the unshifted grid"
        return f"sampling levels shifted by {self._scheduler.shift:g}; training levels {self.density} on that grid"

    def schedule(
        self,
        steps: int,
        *,
        shift: float | None = None,
        mu: float | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> Schedule:
        """Return the scheduler's grid; each step leads to its next point, the last to the end.

        shift
            In place of the scheduler's own: ``s sigma / (1 + (s - 1) sigma)``, above 0.
        mu
            For a scheduler that shifts by the size of the latents (``use_dynamic_shifting``): ``e^mu / (e^mu + 1/sigma
            - 1)``, or with ``time_shift_type: linear`` mu in the place of e^mu. Default: `mu`, which must then be set;
            `mu_for` gives it for a number of tokens. Where it depends on the steps, `mu` is a function.
        sigmas
            The noise levels before the shift, one a step, descending in (0, 1]: by default evenly spaced from the top
            of the training levels to their end, or with `even_sigmas` ``linspace(1, 1 / steps, steps)``, as FLUX.1's
            pipeline gives them.

        The levels equal those of ``FlowMatchEulerDiscreteScheduler.set_timesteps(steps, sigmas=sigmas, mu=mu)``, the
        stretching to a terminal level included. Raises `PipelineError` for arguments that the scheduler cannot take.
        """
        self.check_steps(steps)
        if shift is not None and not shift > 0:
            raise PipelineError(f"shift must be above 0 (1: none), got {shift}.")
        scheduler = self._scheduler
        if shift is not None and mu is None and self.shifts_by_size:
            mu, shift = (shift if scheduler.config.time_shift_type == "linear" else math.log(shift)), None
        if mu is None:
            mu = self.mu(steps) if callable(self.mu) else self.mu
        if sigmas is None and self.even_sigmas:
            sigmas = torch.linspace(1.0, 1.0 / steps, steps, dtype=torch.float64).tolist()
        if sigmas is not None and len(sigmas) != steps:
            raise PipelineError(f"sigmas must be one for each of {steps} steps, got {len(sigmas)}.")
        if steps == 1 and scheduler.config.shift_terminal and sigmas in (None, [1.0]):
            raise PipelineError(
                f"this scheduler ends its levels at {scheduler.config.shift_terminal} (shift_terminal), to which one"
                " step from pure noise cannot be stretched; take 2 steps or more."
            )
        if self.shifts_by_size:
            if mu is None or shift is not None:
                raise PipelineError(
                    "this scheduler shifts its levels by the size of the latents (use_dynamic_shifting): give mu, such"
                    " as process.mu_for(tokens), and no shift."
                )
        elif mu is not None:
            raise PipelineError(
                f"mu is for schedulers with use_dynamic_shifting; this one shifts by {scheduler.shift}: give shift."
            )
        elif shift is not None:
            scheduler = type(scheduler).from_config(scheduler.config, shift=shift)
        scheduler.set_timesteps(steps, sigmas=sigmas, mu=mu)
        grid = scheduler.timesteps.clone()
        return Schedule(grid, torch.cat([grid[1:], grid.new_tensor([-1.0])]))

    def mu_for(self, tokens: int) -> float:
        """Return the shift for latents that the network sees as so many tokens, linear as in FLUX.1's pipeline.

        From ``base_shift`` at ``base_image_seq_len`` to ``max_shift`` at ``max_image_seq_len`` of the scheduler, and
        beyond: 0.5 at 256 to 1.15 at 4096 tokens for FLUX.1, where a token is 16 x 16 pixels.
        """
        config = self._scheduler.config
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        return float(config.base_shift + slope * (tokens - config.base_image_seq_len))

    def _timesteps_of(self, levels: Tensor) -> Tensor:
        return self._levels.to(levels.device)[levels]

    def coefficients(self, t: Timestep, like: Float[Tensor, "..."]) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma at `t`, to broadcast against `like`."""
        dtype = like.dtype if like.dtype == torch.float64 else torch.float32
        level = (
            t.to(like.device, dtype) if isinstance(t, Tensor) else torch.full((), t, dtype=dtype, device=like.device)
        )
        sigma = _shaped(level.clamp_min(0.0) / self.num_train_timesteps, like)
        return 1.0 - sigma, sigma


def _shaped(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 1))


def _blank(t: Timestep) -> Tensor:
    return torch.empty(1, device=t.device if isinstance(t, Tensor) else None)
