"""Diffusion-KTO, all three utilities, against the authors' training script."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from benchmarks.equivalence.checkout import Checkout, Fragment
from benchmarks.equivalence.comparing import Comparison, World, losses
from mmalign.losses import diffusion_kto, kto_reference_point
from mmalign.losses.diffusion_kto import Utility

REPOSITORY = "jacklishufan/diffusion-kto"
FILE = "train_kto_sd_v1.5.py"
BETA = 1000.0
UTILITIES: dict[Utility, str] = {
    "kahneman-tversky": "sigmoid",
    "loss-averse": "loss_averse",
    "risk-seeking": "risk_seeking_3",
}


def compare(checkout: Checkout) -> list[Comparison]:
    """Run the script from the errors of policy and reference to the weighted loss, one process."""
    step = checkout.statements(FILE, r"policy_KL_logps = ", r"l_kto = ")
    rows = []
    for sign in (1.0, -1.0):
        world = World(pairs=4, change=sign * 1e-3)
        policy, reference = (torch.cat(world.errors(reference=frozen)) for frozen in (False, True))
        gain_is_positive = bool((reference - policy).mean() > 0)
        good = torch.arange(len(world.t)) % 3 > 0
        for utility, halo in UTILITIES.items():
            rows.append(_row(step, world, good, utility, halo, gain_is_positive))
    return rows


def _row(
    step: Fragment, world: World, good: Tensor, utility: Utility, halo: str, gain_is_positive: bool
) -> Comparison:
    def errors() -> tuple[Tensor, Tensor]:
        return torch.cat(world.errors()), torch.cat(world.errors(reference=True))

    def theirs() -> Tensor:
        policy, reference = errors()
        names = step.run(
            args=SimpleNamespace(beta_dpo=BETA, bce_offset="none", halo=halo, lambda_d_kto=1.0, lambda_u_kto=0.7),
            accelerator=SimpleNamespace(reduce=lambda value, reduction: value),
            model_losses=policy,
            ref_loss=reference,
            batch={"labels": good.long()},
        )
        loss: Tensor = names["l_kto"].mean()
        return loss

    def ours() -> Tensor:
        policy, reference = errors()
        gain = reference - policy
        weights = {"desirable_weight": 1.0, "undesirable_weight": 0.7}
        return diffusion_kto(gain, good, kto_reference_point(gain), beta=BETA, utility=utility, **weights).mean()

    point = "reference point above 0" if gain_is_positive else "reference point held at 0"
    return losses(
        FILE,
        f"loss of labelled images from their errors, {utility}, {point}",
        f"--halo {halo}; beta = beta_dpo = {BETA:g}, no factor 1/2",
        theirs,
        ours,
        world.network.inputs(),
    )
