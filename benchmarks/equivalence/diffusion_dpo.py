"""Diffusion-DPO and SFT against the authors' training script."""

from __future__ import annotations

from types import SimpleNamespace

from torch import Tensor

from benchmarks.equivalence.checkout import Checkout
from benchmarks.equivalence.comparing import Comparison, World, losses
from mmalign.losses import denoising_error, diffusion_dpo

REPOSITORY = "SalesforceAIResearch/DiffusionDPO"
FILE = "train.py"
BETA = 5000.0


def compare(checkout: Checkout) -> list[Comparison]:
    """Run the script from the network's call to the loss, for both of its methods."""
    world = World()
    step = checkout.statements(FILE, r"target = noise", r"if args\.train_method == 'sft'")

    def theirs(method: str, world: World) -> Tensor:
        names = step.run(
            args=SimpleNamespace(train_method=method, beta_dpo=BETA, sdxl=False),
            unet=world.network,
            ref_unet=world.network.reference,
            noise=world.noise,
            noisy_latents=world.noisy,
            timesteps=world.t,
            encoder_hidden_states=world.states,
        )
        loss: Tensor = names["loss"]
        return loss

    chosen = World()
    half = len(chosen.t) // 2
    for name in ("noise", "noisy", "t", "states"):
        setattr(chosen, name, getattr(chosen, name)[:half])

    def fine_tuning() -> Tensor:
        return denoising_error(chosen.network(chosen.noisy, chosen.t, chosen.states).sample, chosen.noise).mean()

    return [
        losses(
            FILE,
            "loss of pairs, from the networks' predictions",
            f"beta = beta_dpo = {BETA:g}, factor 1/2 and means on both sides",
            lambda: theirs("dpo", world),
            lambda: diffusion_dpo(*world.errors(), *world.errors(reference=True), beta=BETA).mean(),
            world.network.inputs(),
        ),
        losses(
            FILE,
            "sft: denoising error of the chosen images",
            "none",
            lambda: theirs("sft", chosen),
            fine_tuning,
            chosen.network.inputs(),
        ),
    ]
