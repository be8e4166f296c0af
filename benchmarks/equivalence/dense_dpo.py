"""The dense-reward loss, its law of sampling steps and its clamp against the authors' trainer."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.equivalence.checkout import Checkout
from benchmarks.equivalence.comparing import SCHEDULE, SHAPE, Comparison, World, losses, values
from benchmarks.equivalence.stepping import Steps
from mmalign.losses import dense_logit, discounted_probabilities, list_mle

REPOSITORY = "Shentao-YANG/Dense_Reward_T2I"
TRAINER, SCRIPT, LOSS = "preference_based_policy_learner.py", "train_t2i.py", "reward_loss.py"
PIPELINE, SCHEDULER = "pipeline_stable_diffusion_extended.py", "scheduling_ddim_extended.py"
STEPS, GUIDANCE, GAMMA, SCALE, CLIP = 50, 7.5, 0.9, 10.0, 1e-4
DRAWN = (0, 4, 4)


def compare(checkout: Checkout) -> list[Comparison]:
    """Run the trainer's logits and its ListMLE on two and on three trajectories of one prompt; then its law."""
    return [_loss(checkout, images) for images in (2, 3)] + [_law(checkout)]


def _trainer(checkout: Checkout, world: World, images: int) -> Any:
    """Return what the trainer's method asks of itself, with its own pipeline method, scheduler and clamp."""
    from diffusers import DDIMScheduler

    scheduler = checkout.functions(SCHEDULER, "DDIMSchedulerExtended").run(
        DDIMScheduler=DDIMScheduler,
        Normal=torch.distributions.Normal,
        randn_tensor=lambda shape, **_: torch.zeros(shape),
    )["DDIMSchedulerExtended"](**SCHEDULE)
    for name in ("alphas_cumprod", "final_alpha_cumprod"):
        setattr(scheduler, name, getattr(world.scheduler, name))
    log_probs = checkout.functions(PIPELINE, "StableDiffusionPipelineExtended.forward_calculate_logprob")
    pipe = SimpleNamespace(
        scheduler=scheduler,
        unet=SimpleNamespace(config=SimpleNamespace(sample_size=SHAPE[-1])),
        vae_scale_factor=8,
        _execution_device=torch.device("cpu"),
        prepare_extra_step_kwargs=lambda generator, eta: {"eta": eta},
    )
    pipe.forward_calculate_logprob = functools.partial(log_probs.function("forward_calculate_logprob"), pipe)
    trainer = SimpleNamespace(
        args=SimpleNamespace(
            num_steps_est_logits=len(DRAWN),
            p_batch_size=1,
            pl_loss_num_traj=images,
            use_cfg_in_train=1,
            reg_to_pi_init=1,
            reg_to_pi_old=0,
            pl_loss_temp=SCALE,
            log_ratio_clip=CLIP,
        ),
        np_generator=SimpleNamespace(choice=lambda count, size, replace, p: np.array(DRAWN)),
        policy_loss_weights=None,
        policy_update_steps=1,
        no_reg_pi_init_warmup_steps=-1,
        pipe=pipe,
        wrapped_unet=world.network,
        initial_unet=world.network.reference,
        is_ddp=False,
        generator=None,
        cfg_guide_scale=GUIDANCE,
    )
    checkout.statements(TRAINER, r"self\.clip = ", r"self\.clip = ").run(
        self=trainer, args=trainer.args, partial=functools.partial
    )
    return trainer


def _loss(checkout: Checkout, images: int) -> Comparison:
    world = World(change=2e-4)
    chains = [Steps(world, STEPS, GUIDANCE) for _ in range(images)]
    for chain in chains[1:]:
        chain.prompts, chain.negative = chains[0].prompts, chains[0].negative
    reward = world.draw(1, images)
    trainer = _trainer(checkout, world, images)
    logits = checkout.functions(TRAINER, "PreferenceBasedPolicyTrainer.get_pl_loss_logit").function(
        "get_pl_loss_logit"
    )
    epsilon = checkout.statements(LOSS, r"DEFAULT_EPS = ", r"DEFAULT_EPS = ").run()["DEFAULT_EPS"]
    ranking = checkout.functions(LOSS, "listMLELoss").function("listMLELoss", DEFAULT_EPS=epsilon)
    # One prompt for a whole chain: that of its first step.
    for chain in chains:
        chain.prompts = chain.prompts[:1].expand_as(chain.prompts)
    reference = torch.stack([chain.log_probs(chain.next_states, reference=True) for chain in chains], dim=1)

    def stacked(name: str) -> Tensor:
        return torch.stack([getattr(chain, name) for chain in chains])[None]

    batch = {
        "final_reward": reward,
        "timestep": torch.arange(STEPS).expand(1, images, STEPS),
        "state": stacked("states"),
        "next_state": stacked("next_states"),
        "log_pi_old": reference.T[None],
        "guided_prompt_embeds": chains[0].prompts[:1, None].expand(1, images, 5, 6),
        "unconditional_prompt_embeds": chains[0].negative[:, None].expand(1, images, 5, 6),
    }

    def ratios() -> Tensor:
        return torch.stack([chain.log_probs(chain.next_states) for chain in chains], dim=1) - reference

    def theirs() -> Tensor:
        loss: Tensor = ranking(*logits(trainer, batch))
        return loss

    def ours() -> Tensor:
        counts = torch.bincount(torch.tensor(DRAWN), minlength=STEPS)[:, None].expand(STEPS, images)
        return list_mle(dense_logit(ratios(), counts, scale=SCALE, clip=CLIP)[None], reward).mean()

    drawn = sorted(set(DRAWN))
    beyond = int((ratios().detach()[drawn].abs() > CLIP).sum())
    return losses(
        TRAINER,
        f"loss of {images} chains at steps {', '.join(map(str, DRAWN))}, from the networks' predictions; "
        f"{beyond} of {images * len(drawn)} log-ratios beyond the clamp",
        f"fidelity: code, scale = pl_loss_temp = {SCALE:g}, clip = log_ratio_clip = {CLIP:g}, guidance {GUIDANCE:g}",
        theirs,
        ours,
        world.network.inputs(),
    )


def _law(checkout: Checkout) -> Comparison:
    names = checkout.statements(SCRIPT, r"policy_loss_weights = torch", r"policy_loss_weights = torch").run(
        args=SimpleNamespace(pl_gamma=GAMMA), replay_buffer=SimpleNamespace(num_denosing_steps=STEPS)
    )
    trainer = SimpleNamespace()
    checkout.statements(TRAINER, r"self\.policy_loss_weights = ", r"self\.policy_loss_weights = ").run(
        self=trainer, policy_loss_weights=names["policy_loss_weights"]
    )
    return values(
        TRAINER,
        f"probabilities of the {STEPS} sampling steps",
        f"gamma = pl_gamma = {GAMMA:g}; theirs adds 1e-8 to the sum",
        torch.from_numpy(trainer.policy_loss_weights),
        discounted_probabilities(STEPS, GAMMA),
    )
