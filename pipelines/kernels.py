"""Kernels: how one sampling step goes from a noise level to the next.

A step draws ``x_next = mean + std * noise`` with standard normal noise, and a kernel gives mean and std. The
samplers, replay, branching and inversion call the same kernels, so a recorded step and its log-probability agree by
construction. One kernel a function here, named after its source; `KERNELS` lists them for a choice by name.

>>> ddim(0.5).amount, ddim([1.0, 1.0, 0.0]).random
(0.5, True)
>>> named_kernel("cps") == cps(0.8)
True
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from pipelines.errors import PipelineError, choose
from pipelines.noise import NoiseProcess, Schedule, Timestep

Gaussian = tuple[Tensor, Tensor]
Step = Callable[[NoiseProcess, Tensor, Tensor, Timestep, Timestep, float], Gaussian]


@dataclass(frozen=True)
class Kernel:
    """A transition and how much noise it adds; made by one of the functions of `KERNELS`.

    name
        As in `KERNELS`.
    step
        ``step(process, x, output, level, next_level, amount) -> mean, std``: the formula.
    amount
        How much noise, in the kernel's own unit (0: none, which makes every kernel the ODE step): one number for all
        steps, or one for each.
    flow_only
        Whether it holds for flow matching alone.
    """

    name: str
    step: Step = field(repr=False)
    amount: float | tuple[float, ...] = 0.0
    flow_only: bool = False

    @property
    def random(self) -> bool:
        """Whether any step adds noise."""
        return any(self.amount) if isinstance(self.amount, tuple) else bool(self.amount)

    def for_steps(self, steps: int) -> tuple[Kernel, ...]:
        """Return the kernel of each of `steps` steps; raises `PipelineError` if it was made for another number."""
        amounts = self.amount if isinstance(self.amount, tuple) else (self.amount,) * steps
        if len(amounts) != steps:
            raise PipelineError(
                f"{self.name} must be given one number, or one for each of {steps} steps; got {len(amounts)}."
            )
        return tuple(replace(self, amount=amount) for amount in amounts)

    def check(self, process: NoiseProcess) -> None:
        """Raise `PipelineError` where the kernel does not hold for the process."""
        if self.flow_only and process.prediction != "flow":
            raise PipelineError(
                f"kernel '{self.name}' is for flow matching, and this model predicts '{process.prediction}';"
                " use 'ddim' or 'cps'."
            )

    def __call__(
        self,
        process: NoiseProcess,
        x: Float[Tensor, "batch *latent"],
        output: Float[Tensor, "batch *latent"],
        level: Timestep,
        next_level: Timestep,
    ) -> tuple[Float[Tensor, "batch *latent"], Float[Tensor, "..."]]:
        """Return mean ``[batch, *latent]`` and std ``[batch or 1, 1, ...]`` of the step from `level` down.

        `output` is the network's at `x` and `level`; levels are those of `process`, -1 the end of sampling. Raises
        `PipelineError` for a kernel with a number for each step: take one of `for_steps`.
        """
        if isinstance(self.amount, tuple):
            raise PipelineError(f"kernel '{self.name}' has {len(self.amount)} steps; call one of kernel.for_steps().")
        self.check(process)
        return self.step(process, x, output, level, next_level, self.amount)

    def stds(self, process: NoiseProcess, steps: int | Schedule) -> list[float]:
        """Return the standard deviation of each step of a sampling grid; none depends on the latents."""
        levels, next_levels = process.schedule(steps) if isinstance(steps, int) else steps
        nothing = torch.zeros(1, 1, dtype=torch.float64)
        each = zip(self.for_steps(len(levels)), levels.tolist(), next_levels.tolist(), strict=True)
        return [float(kernel(process, nothing, nothing, t, t_next)[1]) for kernel, t, t_next in each]


def ddim(eta: float | Sequence[float] = 0.0) -> Kernel:
    """eta-DDIM (arXiv 2010.02502, eqs. 12 and 16), for diffusion and for flow matching.

    With ``x = alpha x0 + sigma noise`` at the step's start and primes at its end::

        std  = eta * sigma'/sigma * sqrt(sigma^2 - (alpha/alpha')^2 sigma'^2)
        mean = alpha' * x0 + sqrt(sigma'^2 - std^2) * noise

    `eta` lies in 0..1: 0 deterministic, 1 ancestral sampling as in DDPM. The predicted x0 is clipped where the
    scheduler clips. The noise level after the step is sigma' for every eta.
    """
    return Kernel("ddim", _ddim_step, _amount("eta", eta, "0..1 (0 deterministic DDIM, 1 ancestral)"))


def ode() -> Kernel:
    """Deterministic step: DDIM of eta 0, which for flow matching is Euler's ``x + (sigma' - sigma) v``."""
    return Kernel("ode", _ddim_step)


def flow_sde(a: float | Sequence[float] = 0.7) -> Kernel:
    """Flow-GRPO's stochastic step (arXiv 2505.05470; `sd3_sde_with_logprob.py`), for flow matching.

    With noise level sigma, velocity v and ``dt = sigma' - sigma < 0``::

        s    = a * sqrt(sigma / (1 - sigma))
        mean = x * (1 + s^2 dt / (2 sigma)) + v * (1 + s^2 (1 - sigma) / (2 sigma)) * dt
        std  = s * sqrt(-dt)

    `a` is at least 0: 0.7 for SD3.5 and 0.9 for FLUX in the authors' runs; 0 is Euler's step. The ends: at sigma = 1,
    where s has no bound, the denominator takes sigma' for sigma, as in the authors' code, so that std is `a`
    when sigma' > 0. The last step, to sigma' = 0, keeps its noise as theirs does: give `a` a 0 there for clean
    samples. Euler-Maruyama leaves more noise than sigma' after a long step; `cps` does not.
    """
    return Kernel("flow_sde", _flow_sde_step, _amount("a", a, "0.. (0 is Euler's step)", math.inf), flow_only=True)


def dance(eta: float | Sequence[float] = 0.3) -> Kernel:
    """DanceGRPO's stochastic step (arXiv 2505.07818; `train_grpo_flux.py`), for flow matching.

    The step of `flow_sde` with ``s = eta`` at every level: the authors write its drift as ``v + eta^2 / 2 * (x - (1 -
    sigma) x0) / sigma^2``, which is the same. `eta` is at least 0; 0.3 in their runs, 0 is Euler's step.
    """
    return Kernel("dance", _dance_step, _amount("eta", eta, "0.. (0 is Euler's step)", math.inf), flow_only=True)


def wan_sde(a: float | Sequence[float] = 1.0) -> Kernel:
    """The step of `flow_sde` with ``s = a sigma``, for flow matching.

    Flow-GRPO's code for Wan has the second level of the sampling grid for `a`; Flash-GRPO's (arXiv 2605.15980) has
    that times a factor of its own.
    """
    return Kernel("wan_sde", _wan_sde_step, _amount("a", a, "0.. (0 is Euler's step)", math.inf), flow_only=True)


def cps(eta: float | Sequence[float] = 0.8) -> Kernel:
    """Coefficients-preserving sampling (FlowCPS, arXiv 2509.05952), for flow matching and for diffusion.

    ::

        std  = sigma' * sin(eta * pi / 2)
        mean = alpha' * x0 + sigma' * cos(eta * pi / 2) * noise

    `eta` lies in 0..1; 0.8 in the authors' runs. The squares of the two factors of noise add up to sigma'^2 for every
    eta. That makes it a member of DDIM's family (arXiv 2010.02502, eq. 12), which is why it holds for diffusion too;
    it was published for flow matching, where ``alpha' = 1 - sigma'``. The last step is deterministic. The noise of a
    step does not vanish with its length, so unlike `ddim` and `flow_sde` it does not tend to the data's own spread
    with many short steps: it is made for few.
    """
    return Kernel("cps", _cps_step, _amount("eta", eta, "0..1 (0 deterministic)"))


KERNELS: dict[str, Callable[..., Kernel]] = {
    "ddim": ddim,
    "ode": ode,
    "flow_sde": flow_sde,
    "dance": dance,
    "wan_sde": wan_sde,
    "cps": cps,
}


def named_kernel(name: str, *amount: float | Sequence[float]) -> Kernel:
    """Return a kernel by its name in `KERNELS`, with its default amount of noise or the one given.

    Raises `PipelineError` with the nearest match for an unknown name.
    """
    return KERNELS[choose("kernel", name, KERNELS)](*amount)


def pick_kernel(kernel: Kernel | str | None, eta: float | Sequence[float] | None) -> Kernel:
    """Return the kernel from a sampler's arguments: an object, a name, or ``eta``, short for ``ddim(eta)``."""
    if kernel is None:
        return ddim(0.0 if eta is None else eta)
    if eta is not None:
        raise PipelineError("give kernel or eta, not both; eta=0.5 is short for kernel=ddim(0.5).")
    return named_kernel(kernel) if isinstance(kernel, str) else kernel


def _clean_step(
    process: NoiseProcess, x: Tensor, output: Tensor, level: Timestep, next_level: Timestep, amount: float
) -> Gaussian:
    return process.clean(x, output, level), x.new_zeros((1,) * x.ndim)


CLEAN = Kernel("clean", _clean_step)
"""Ends the sampling at once, in the clean latents that the prediction implies."""


def _ddim_step(
    process: NoiseProcess, x: Tensor, output: Tensor, level: Timestep, next_level: Timestep, eta: float
) -> Gaussian:
    alpha, sigma = process.coefficients(level, x)
    alpha_next, sigma_next = process.coefficients(next_level, x)
    removed = (sigma.square() - (alpha / alpha_next * sigma_next).square()).clamp_min(0.0)
    std = eta * sigma_next / sigma * removed.sqrt()
    direction = (sigma_next.square() - std.square()).clamp_min(0.0).sqrt()
    return alpha_next * process.clean(x, output, level) + direction * process.to_noise(x, output, level), std


def _flow_sde_step(
    process: NoiseProcess, x: Tensor, output: Tensor, level: Timestep, next_level: Timestep, a: float
) -> Gaussian:
    alpha, sigma = process.coefficients(level, x)
    alpha_next, _ = process.coefficients(next_level, x)
    return _diffuse(process, x, output, level, next_level, a**2 * sigma / torch.where(alpha > 0, alpha, alpha_next))


def _dance_step(
    process: NoiseProcess, x: Tensor, output: Tensor, level: Timestep, next_level: Timestep, eta: float
) -> Gaussian:
    return _diffuse(process, x, output, level, next_level, eta**2)


def _wan_sde_step(
    process: NoiseProcess, x: Tensor, output: Tensor, level: Timestep, next_level: Timestep, a: float
) -> Gaussian:
    sigma = process.coefficients(level, x)[1]
    return _diffuse(process, x, output, level, next_level, (a * sigma).square())


def _diffuse(
    process: NoiseProcess,
    x: Tensor,
    output: Tensor,
    level: Timestep,
    next_level: Timestep,
    squared: Tensor | float,
) -> Gaussian:
    """Return the Euler-Maruyama step of the flow's SDE with diffusion coefficient s, given its square."""
    alpha, sigma = process.coefficients(level, x)
    dt = process.coefficients(next_level, x)[1] - sigma
    mean = x * (1.0 + squared * dt / (2.0 * sigma)) + output * (1.0 + squared * alpha / (2.0 * sigma)) * dt
    return mean, (squared * -dt).sqrt()


def _cps_step(
    process: NoiseProcess, x: Tensor, output: Tensor, level: Timestep, next_level: Timestep, eta: float
) -> Gaussian:
    alpha_next, sigma_next = process.coefficients(next_level, x)
    angle = eta * math.pi / 2.0
    noise = sigma_next * math.cos(angle) * process.to_noise(x, output, level)
    return alpha_next * process.clean(x, output, level) + noise, sigma_next * math.sin(angle)


def _amount(
    name: str, given: float | Sequence[float], allowed: str, highest: float = 1.0
) -> float | tuple[float, ...]:
    """Return one number, or a tuple of one for each step, all in ``0..highest`` and finite."""
    amounts = (given,) if isinstance(given, int | float) else tuple(given)
    for amount in amounts:
        if not (0.0 <= amount <= highest and math.isfinite(amount)):
            raise PipelineError(f"{name} must lie in {allowed}, got {amount}.")
    return float(given) if isinstance(given, int | float) else tuple(map(float, amounts))
