"""MaPO against the authors' loss function, and where the two divide differently."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor

from benchmarks.equivalence.checkout import Checkout
from benchmarks.equivalence.comparing import Comparison, World, losses
from mmalign.losses import mapo

REPOSITORY = "mapo-t2i/mapo"
FILE = "utils.py"
BETA, SNR, STEPS = 0.1, 0.5, 1000


def compare(checkout: Checkout) -> list[Comparison]:
    """Run their function on a network's predictions, then on errors so small that its quotient loses digits."""
    function = checkout.functions(FILE, "compute_loss").function("compute_loss")
    args = SimpleNamespace(snr_value=SNR, beta_mapo=BETA)
    schedule = SimpleNamespace(config=SimpleNamespace(num_train_timesteps=STEPS))
    world = World(change=1e-2)
    settings = f"beta = beta_mapo = {BETA:g}, snr = snr_value = {SNR:g}, T = {STEPS}"

    def predicted() -> Tensor:
        output: Tensor = world.network(world.noisy, world.t, world.states).sample
        return output

    def theirs(prediction: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = function(args, schedule, prediction, target)[0]
        return loss

    def ours(prediction: Tensor, target: Tensor) -> Tensor:
        chosen, rejected = (prediction - target).square().mean((1, 2, 3)).chunk(2)
        return mapo(chosen, rejected, beta=BETA, snr=SNR, scale=float(STEPS)).mean()

    rows = [
        losses(
            FILE,
            "loss of pairs, from the network's predictions",
            settings,
            lambda: theirs(predicted(), world.noise),
            lambda: ours(predicted(), world.noise),
            world.network.inputs(),
        )
    ]
    for dtype, size in ((torch.float32, 1e-1), (torch.float32, 1e-3)):
        prediction = (size * world.draw(6, 4, 8, 8)).to(dtype).requires_grad_()
        zero = torch.zeros_like(prediction)
        rows.append(
            losses(
                FILE,
                f"the same in float32 where the errors are near {size**2:.0e}",
                settings,
                partial(theirs, prediction, zero),
                partial(ours, prediction, zero),
                {"the prediction": prediction},
            )
        )
    return rows
