"""Diffusion-DRO's hinge against the authors' training script."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from benchmarks.equivalence.checkout import Checkout
from benchmarks.equivalence.comparing import SHAPE, Comparison, World, losses
from mmalign.losses import denoising_error, diffusion_dro

REPOSITORY = "basiclab/DiffusionDRO"
FILE = "train.py"
MARGIN, BATCH = 1e-3, 6


def compare(checkout: Checkout) -> list[Comparison]:
    """Run the script from what its buffer gives to the loss, with the policy's own predictions old and present."""
    return [_row(checkout, moved) for moved in (True, False)]


def _row(checkout: Checkout, moved: bool) -> Comparison:
    step = checkout.statements(FILE, r"samples = replay_buffer\.sample", r"loss = torch\.maximum\(diff")
    world = World(pairs=BATCH)
    clean, noise, own = (world.draw(BATCH, *SHAPE) for _ in range(3))
    t, states = world.t[:BATCH], world.states[:BATCH]
    with torch.no_grad():
        predicted = world.network(own, t, states).sample
    if moved:
        predicted = predicted + 0.05 * world.draw(BATCH, *SHAPE)

    def theirs() -> Tensor:
        samples = SimpleNamespace(t=t, c=states, x0=clean, xt=own, eps=predicted)
        loss: Tensor = step.run(
            args=SimpleNamespace(batch_size=BATCH, sdxl=False, margin=MARGIN),
            device=world.device,
            dtype=torch.float64,
            replay_buffer=SimpleNamespace(sample=lambda count, device: samples),
            torch=_with_noise(noise),
            noise_scheduler=world.scheduler,
            unet=world.network,
            unet_ref=_without_graph(world),
        )["loss"]
        return loss

    def ours() -> Tensor:
        expert = world.process.add_noise(clean, noise, t)
        errors = []
        for x, target in ((expert, noise), (own, predicted)):
            errors.append(denoising_error(world.network(x, t, states).sample, target))
            errors.append(denoising_error(world.network.reference(x, t, states).sample, target).detach())
        return diffusion_dro(*errors, margin=MARGIN).mean()

    which = "of an earlier policy" if moved else "of the present policy"
    return losses(
        FILE,
        f"hinge of expert and own images, from the networks' predictions; own predictions {which}",
        f"margin {MARGIN:g}, means, no beta",
        theirs,
        ours,
        world.network.inputs(),
    )


def _without_graph(world: World) -> object:
    def call(*args: Tensor, **kwargs: object) -> SimpleNamespace:
        with torch.no_grad():
            return world.network.reference(*args, **kwargs)

    return call


def _with_noise(noise: Tensor) -> SimpleNamespace:
    """Return torch, as far as the script needs it, drawing this noise."""
    return SimpleNamespace(
        cat=torch.cat, maximum=torch.maximum, zeros_like=torch.zeros_like, randn_like=lambda like: noise
    )
