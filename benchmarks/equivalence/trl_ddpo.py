"""DDPO's clipped objective and running advantages against TRL, which had a trainer for it until version 0.23."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

from torch import Tensor

from benchmarks.equivalence.checkout import Checkout
from benchmarks.equivalence.comparing import Comparison
from benchmarks.equivalence.ddpo import CLIP, CUT, GUIDANCE, advantages, objective
from benchmarks.equivalence.stepping import Steps

REPOSITORY = "huggingface/trl"
TRAINER, STEP, TRACKER = "trl/trainer/ddpo_trainer.py", "trl/models/modeling_sd_base.py", "trl/trainer/utils.py"


def compare(checkout: Checkout) -> list[Comparison]:
    """Run the trainer's `calculate_loss` on one step of each of 50 chains, and its statistics."""
    scheduler_step = checkout.functions(STEP, "_left_broadcast", "_get_variance", "scheduler_step").function(
        "scheduler_step",
        DDPOSchedulerOutput=lambda latents, log_probs: SimpleNamespace(latents=latents, log_probs=log_probs),
    )
    methods = checkout.functions(TRAINER, "DDPOTrainer.loss", "DDPOTrainer.calculate_loss")
    names = methods.run()

    def theirs(steps: Steps, advantage: Tensor) -> Tensor:
        scheduler = steps.world.scheduler
        trainer = SimpleNamespace(
            config=SimpleNamespace(
                train_cfg=True,
                sample_guidance_scale=GUIDANCE,
                sample_eta=1.0,
                train_adv_clip_max=CUT,
                train_clip_range=CLIP,
            ),
            autocast=nullcontext,
            sd_pipeline=SimpleNamespace(
                unet=steps.world.network, scheduler_step=lambda *a, **k: scheduler_step(scheduler, *a, **k)
            ),
            loss=lambda *a: names["loss"](None, *a),
        )
        calculate = methods.function("calculate_loss")
        loss: Tensor = calculate(
            trainer,
            steps.states,
            steps.t,
            steps.next_states,
            steps.old_log_probs,
            advantage,
            steps.both_prompts,
        )[0]
        return loss

    return [objective(TRAINER, theirs), advantages(checkout, TRACKER)]
