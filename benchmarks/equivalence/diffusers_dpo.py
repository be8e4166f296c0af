"""Diffusion-DPO, and its hinge and ipo options, against the scripts of diffusers."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

from torch import Tensor

from benchmarks.equivalence.checkout import Checkout
from benchmarks.equivalence.comparing import Comparison, World, losses
from mmalign.losses import diffusion_dpo
from mmalign.losses.pair_loss import LossType

REPOSITORY = "huggingface/diffusers"
FOLDER = "examples/research_projects/diffusion_dpo"
SD15, SDXL = f"{FOLDER}/train_diffusion_dpo.py", f"{FOLDER}/train_diffusion_dpo_sdxl.py"
BETA = 2500.0
SAME: tuple[LossType, ...] = ("sigmoid", "hinge")


def compare(checkout: Checkout) -> list[Comparison]:
    """Run both scripts from the network's call to the loss; `ipo` with the attribute that the script never defines."""
    world = World()

    def theirs(file: str, **args: object) -> Tensor:
        last = r"if args\.loss_type ==" if file == SD15 else r"loss = -1 \* F\.logsigmoid"
        names = checkout.statements(file, r"model_pred = unet\(", last).run(
            args=SimpleNamespace(**args),
            unet=world.network,
            accelerator=SimpleNamespace(unwrap_model=lambda network: network),
            noise_scheduler=SimpleNamespace(config=SimpleNamespace(prediction_type="epsilon")),
            noise=world.noise,
            noisy_model_input=world.noisy,
            timesteps=world.t,
            encoder_hidden_states=world.states,
            prompt_embeds=world.states,
            unet_added_conditions={},
            time_ids=None,
            add_time_ids=None,
            pooled_prompt_embeds=None,
            bsz=len(world.t),
        )
        loss: Tensor = names["loss"]
        return loss

    def ours(beta: float, loss_type: LossType = "sigmoid", factor: float = 1.0) -> Tensor:
        errors = (*world.errors(), *world.errors(reference=True))
        return factor * diffusion_dpo(*errors, beta=beta, loss_type=loss_type).mean()

    inputs, what = world.network.inputs(), "loss of pairs, from the networks' predictions"
    rows = [
        losses(
            SD15,
            f"{what}, {loss_type}",
            f"beta = 2 beta_dpo = {2 * BETA:g}: no factor 1/2 in this script",
            partial(theirs, SD15, loss_type=loss_type, beta_dpo=BETA),
            partial(ours, 2 * BETA, loss_type),
            inputs,
        )
        for loss_type in SAME
    ]
    # Their ipo is on the margin m itself, (m - 1 / (2 b))^2; ours on m / 2, so b = beta / 2 and a factor 4.
    rows.append(
        losses(
            SD15,
            f"{what}, ipo with args.beta supplied",
            f"beta = 2 args.beta = {2 * BETA:g}, our loss x 4; the script itself defines no args.beta and stops",
            lambda: theirs(SD15, loss_type="ipo", beta_dpo=BETA, beta=BETA),
            lambda: ours(2 * BETA, "ipo", factor=4.0),
            inputs,
        )
    )
    rows.append(
        losses(
            SDXL,
            what,
            f"beta = beta_dpo = {2 * BETA:g}: factor 1/2 on both sides",
            lambda: theirs(SDXL, beta_dpo=2 * BETA),
            lambda: ours(2 * BETA),
            inputs,
        )
    )
    return rows
