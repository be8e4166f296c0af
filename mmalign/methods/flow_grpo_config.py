"""The options of `flow_grpo`; docs/methods/flow_grpo.md says which publication has which."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mmalign.core.errors import UserError
from mmalign.methods.advantages import AdvantageConfig
from mmalign.methods.base import MethodConfig
from mmalign.methods.sampling import RoundConfig
from mmalign.methods.step_weights import Step, slopes_and_stds, steps_of
from mmalign.methods.window import WindowConfig
from pipelines import Schedule, named_kernel
from pipelines.errors import PipelineError
from pipelines.noise import FlowProcess, NoiseProcess

NOISE = {"cps": 0.8, "flow_sde": 0.7, "dance": 0.3, "wan_sde": 1.0, "ddim": 1.0}
"""The noise of each kernel by default, in its own unit."""


class KLConfig(MethodConfig):
    """How the policy is held to the reference."""

    weight: float = Field(0.0, ge=0, allow_inf_nan=False)
    """adds this many times the divergence, a mean over the window's steps and over dimensions"""
    form: Literal["exact", "code", "x", "v"] = "exact"
    """exact: the KL of a step; code: without its duration; x: squared difference of means; v: of predictions"""


class FlowGRPOConfig(RoundConfig, AdvantageConfig):
    """Configuration of `flow_grpo`; log-ratios and KL are means over latent dimensions, as in the published codes."""

    sampling_steps: int = Field(10, ge=2)
    """steps of the sampler while training"""
    guidance: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """classifier-free guidance scale while sampling and learning; 1: none, at half the cost"""
    images_per_prompt: int = Field(24, ge=2)
    """images sampled for each prompt, which are compared with each other"""
    mini_batches: int = Field(2, ge=1)
    """parts that each pass over a round is shuffled and cut into, one optimiser step each; 1: all of it at once"""
    kernel: Literal["cps", "flow_sde", "dance", "wan_sde", "ddim"] = "cps"
    """the random step; cps and ddim hold for diffusion models too"""
    noise: float | None = Field(None, gt=0, allow_inf_nan=False)
    """noise of the kernel in its own unit; null: cps 0.8, flow_sde 0.7, dance 0.3, wan_sde and ddim 1"""
    window: WindowConfig = WindowConfig()
    """the random steps of a round, which are those trained on"""
    same_noise: bool = False
    """whether all images of a prompt start from the same noise"""
    grid: Literal["scheduler", "even"] = "scheduler"
    """noise levels before the shift: the scheduler's, or evenly spaced from 1 to 1 / steps, as in DanceGRPO's code"""
    shift: float | None = Field(None, gt=0, allow_inf_nan=False)
    """shift of the noise levels of flow models while training; null: the model's own"""
    log_prob: Literal["gaussian", "cps"] | None = None
    """log-probability of a step: its Gaussian's, or minus the squared error (FlowCPS); null: cps for the kernel cps"""
    ratio: Literal["ppo", "guard", "dppo"] = "ppo"
    """ppo: the clipped ratio; guard: GRPO-Guard's, without its bias; dppo: no clip but a trust region (Flow-DPPO)"""
    clip: float = Field(1e-5, gt=0)
    """ppo, guard: ratios are clipped to 1 +- clip; dppo: KL to the old policy from which a step learns no further"""
    step_weight: Literal["none", "guard", "temp", "flash"] = "none"
    """weight of a step's loss: guard 1 / its duration; temp 2.25 std; flash the inverse of its gradient's scale"""
    kl: KLConfig = KLConfig()
    """the hold of the reference"""
    advantage_std: Literal["group", "batch", "none"] = "batch"
    """an advantage is in units of the spread of: group, the prompt's rewards; batch, the round's; none: of 1"""
    uncond_grad: Literal["flows", "detached"] = "flows"
    """whether guidance's prediction without the prompt has a gradient; detached in the Flow-GRPO code of July 2025"""

    @model_validator(mode="after")
    def _agrees(self) -> FlowGRPOConfig:
        self.window.candidates(self.sampling_steps)
        try:
            named_kernel(self.kernel, self.amount())
        except PipelineError as error:
            raise ValueError(f"noise {self.amount():g} of kernel {self.kernel}: {error}") from error
        if self.ratio == "guard" and self.log_prob:
            raise ValueError("ratio: guard has a log-ratio of its own; remove log_prob")
        if self.step_weight == "guard" and self.ratio != "guard":
            raise ValueError("step_weight: guard is for ratio: guard")
        if self.step_weight in ("temp", "flash") and self.log_prob_kind() != "gaussian":
            raise ValueError(
                f"step_weight: {self.step_weight} is for Gaussian log-probabilities, and these are "
                f"{self.log_prob_kind()}: set log_prob: gaussian with ratio: ppo or dppo"
            )
        return self

    def amount(self) -> float:
        """Return the noise of the kernel."""
        return NOISE[self.kernel] if self.noise is None else self.noise

    def log_prob_kind(self) -> str:
        """Return what the objective is a function of: gaussian, cps or guard."""
        if self.ratio == "guard":
            return "guard"
        return self.log_prob or ("cps" if self.kernel == "cps" else "gaussian")

    def schedule(self, process: NoiseProcess) -> int | Schedule:
        """Return the steps of the sampling, an argument of `sample`.

        Raises:
            UserError: a grid or shift for a diffusion model.
        """
        steps = self.sampling_steps
        if self.grid == "scheduler" and self.shift is None:
            return steps
        if not isinstance(process, FlowProcess):
            raise UserError("method.grid and method.shift are for flow models, and this is none; remove them")
        even = [1 - step / steps for step in range(steps)]
        return process.schedule(steps, shift=self.shift, sigmas=even if self.grid == "even" else None)

    def pool(self, process: NoiseProcess) -> list[Step]:
        """Return the steps that may be random, with the kernel that they have then."""
        candidates = self.window.candidates(self.sampling_steps)
        return steps_of(process, named_kernel(self.kernel, self.amount()), self.schedule(process), candidates)

    def check(self, process: NoiseProcess) -> None:
        """Raise an error for a kernel that does not hold, or without noise at a step that may be random."""
        stds = slopes_and_stds(process, self.pool(process))[1]
        for index, std in zip(self.window.candidates(self.sampling_steps), stds.tolist(), strict=True):
            if not std > 0:
                raise UserError(f"method.window may hold step {index}, where {self.kernel} adds none; end before it")

    def describe(self) -> str:
        """Return kernel, window, sampling, ratio with its units, and KL."""
        pool = self.window.candidates(self.sampling_steps)
        shift = "" if self.shift is None else f" shifted by {self.shift:g}"
        grid = f" on {self.grid} levels{shift}" if self.grid != "scheduler" or shift else ""
        return (
            f"{self.kernel}({self.amount():g}) at {self.window.size or len(pool)} of steps {pool[0]} to {pool[-1]} of "
            f"{self.sampling_steps}{grid}, guidance {self.guidance:g}, {self.images_per_prompt} images per prompt, "
            f"{self.ratio} with clip={self.clip:g} on {self.log_prob_kind()} log-probs per dimension, "
            f"KL {self.kl.form} x {self.kl.weight:g}"
        )
