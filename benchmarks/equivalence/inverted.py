"""What the scripts of SmPO and InPO share: images led to their level by inversion, then the loss, on one pair.

Where the inversion ends depends on the version of diffusers: up to 0.2x the scheduler's step at `t` leads from `t` up
to the next level of its grid, later to `t` from the level below. `scheduler_of` takes the class from a checkout.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.equivalence.checkout import Checkout, Fragment
from benchmarks.equivalence.comparing import SCHEDULE, Comparison, World, losses, values
from mmalign.losses import denoising_error, smpo
from pipelines import ddim, invert
from pipelines.conditioning import Conditioning

FILE = "train.py"
SCHEDULER_FILE = "src/diffusers/schedulers/scheduling_ddim_inverse.py"
BETA = 2000.0
TIMESTEPS = (150, 500, 850)


def scheduler_of(diffusers: Checkout | None) -> type:
    """Return the inverse scheduler of a checkout of diffusers, or the installed one."""
    from dataclasses import dataclass as dataclass_decorator

    from diffusers import DDIMInverseScheduler
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.schedulers.scheduling_utils import SchedulerMixin
    from diffusers.utils import BaseOutput, deprecate

    if diffusers is None:
        return DDIMInverseScheduler
    found: type = diffusers.functions(SCHEDULER_FILE, "DDIMSchedulerOutput", "DDIMInverseScheduler").run(
        dataclass=dataclass_decorator,
        ConfigMixin=ConfigMixin,
        register_to_config=register_to_config,
        SchedulerMixin=SchedulerMixin,
        BaseOutput=BaseOutput,
        deprecate=deprecate,
    )["DDIMInverseScheduler"]
    return found


@dataclass
class Script:
    """One of the two training scripts, with `steps` of inversion; `renoise` is what ours is told, to do the same."""

    checkout: Checkout
    method: str
    scheduler: type
    steps: int
    renoise: int

    def __post_init__(self) -> None:
        """Find the statements from the inversion to the loss."""
        start = r"(?s)with torch\.no_grad\(\):\n\s+start_latents = "
        self.step: Fragment = self.checkout.statements(FILE, start, r"if args\.train_method == 'sft'")

    def inverse(self) -> Any:
        """Return the inverse scheduler of Stable Diffusion 1.5 with its coefficients in float64."""
        inverse: Any = self.scheduler(**SCHEDULE)
        inverse.set_timesteps(self.steps)
        inverse.alphas_cumprod = inverse.alphas_cumprod.double()
        inverse.initial_alpha_cumprod = inverse.alphas_cumprod[0]
        return inverse

    def run(self, world: World, share: float, network: Any = None, noise: Any = torch.zeros_like) -> dict[str, Any]:
        """Return the names after a step; `noise` takes the place of `torch.randn_like`, `network` of the policy."""
        names = {name: getattr(torch, name) for name in ("no_grad", "tensor")}
        return self.step.run(
            torch=SimpleNamespace(**names, randn_like=lambda like, dtype=None: noise(like)),
            args=SimpleNamespace(train_method=self.method, beta_dpo=BETA, sdxl=False),
            inverse_scheduler=self.inverse(),
            noise_scheduler=world.scheduler,
            latents=world.latents,
            timesteps=world.t,
            encoder_hidden_states=world.states,
            bsz=len(world.t),
            weight_dtype=torch.float64,
            batch={"probs": [share]},
            unet=network or world.network,
            ref_unet=world.network.reference,
        )

    def compare(self, weight: float) -> list[Comparison]:
        """Compare the noised images and the loss of one pair at several timesteps."""
        rows = []
        for t in TIMESTEPS:
            world = World(pairs=1, change=2e-2)
            world.t = torch.tensor([t, t])
            rows += self._rows(world, weight, t)
        return rows

    def _rows(self, world: World, weight: float, t: int) -> list[Comparison]:
        share = (weight / 10 + 1) / 2

        def ours() -> tuple[Tensor, Tensor]:
            x = invert(
                world,  # type: ignore[arg-type]
                Conditioning(world.states),
                world.latents,
                t=world.t,
                steps=self.steps,
                renoise=self.renoise,
                grid="floor",
            )
            return x, world.process.implied_noise(world.latents, x, world.t)

        def our_loss() -> Tensor:
            x, target = ours()
            policy = denoising_error(world.network(x, world.t, world.states).sample, target).chunk(2)
            with torch.no_grad():
                reference = denoising_error(world.network.reference(x, world.t, world.states).sample, target).chunk(2)
            return smpo(*policy, *reference, torch.full((1,), weight, dtype=torch.float64), beta=BETA).mean()

        settings = f"fidelity: code, inversion_steps: {self.steps}, renoise: {self.renoise}"
        world.network.seen.clear()
        theirs = self.run(world, share)
        told = sorted({int(seen[0]) for seen in world.network.seen[:-2]})
        return [
            values(
                FILE, f"images inverted to t = {t}, networks told {told}", settings, theirs["noisy_latents"], ours()[0]
            ),
            losses(
                FILE,
                f"loss of a pair at t = {t}, inversion included",
                f"{settings}; beta = beta_dpo = {BETA:g}, weight {weight:g}",
                lambda: self.run(world, share)["loss"],
                our_loss,
                world.network.inputs(),
            ),
        ]

    def added_noise(self, eta: float) -> Comparison:
        """Compare the noise that a script adds where its inversion ends: what becomes of a draw of ones there."""
        theirs, ours = [], []
        for t in TIMESTEPS:
            world = World(pairs=1)
            world.latents, world.t = torch.zeros_like(world.latents), torch.tensor([t, t])
            told = [int(level) for level in self.inverse().timesteps if level < t]
            draws: list[Tensor] = []

            def draw(like: Tensor, draws: list[Tensor] = draws, steps: int = len(told)) -> Tensor:
                draws.append(torch.full_like(like, float(len(draws) == steps - 1)))
                return draws[-1]

            theirs.append(self.run(world, 1.0, _nothing, draw)["noisy_latents"].max())
            # Schedulers that begin below 0 are told where a step begins, the others where it ends.
            end = told[-1] + (1000 // self.steps if told[0] < 0 else 0)
            below = max(end - 1000 // self.steps, -1)
            ours.append(eta * ddim(1.0)(world.process, world.latents, world.latents, end, below)[1].max())
        what = f"noise added where the inversion to t = {', '.join(map(str, TIMESTEPS))} ends, in standard deviations"
        return values(FILE, what, f"inversion_eta: {eta:g}", torch.stack(theirs), torch.stack(ours))


def _nothing(x: Tensor, t: Tensor, states: Tensor, **_: Any) -> SimpleNamespace:
    return SimpleNamespace(sample=torch.zeros_like(x))
