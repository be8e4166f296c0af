"""DGPO's loss with clip and reference term, and its moving reference, against the authors' training script."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from benchmarks.equivalence.checkout import Checkout
from benchmarks.equivalence.comparing import SHAPE, Comparison, World, losses, values
from mmalign.core.ema import Shadow
from mmalign.losses import denoising_error, dgpo, moved_enough, old_policy_decay

REPOSITORY = "Luo-Yihong/DGPO"
SCRIPT, AVERAGE = "scripts/train_sd3_dgpo.py", "flow_grpo/ema.py"
GROUP, GROUPS, CLIP, REFERENCE = 4, 2, 5.0, 0.02


def compare(checkout: Checkout) -> list[Comparison]:
    """Run the script from the predictions to the loss, and ten updates of its moving reference."""
    rows = [_objective(checkout, beta, clip, old) for beta, clip, old in ((100.0, 1e-2, False), (2000.0, 1e-3, True))]
    return [*rows, _objective(checkout, 100.0, None, False), _moving_reference(checkout)]


def _objective(checkout: Checkout, beta: float, clip: float | None, to_old: bool) -> Comparison:
    step = checkout.statements(SCRIPT, r"ref_dgpo_v = ref_old_v", r"if config\.train\.beta > 0")
    alone = SimpleNamespace(all_reduce=lambda *_, **__: None, ReduceOp=SimpleNamespace(SUM=None))
    functions = checkout.functions(SCRIPT, "precompute_group_info", "compute_group_dgpo_loss_allreduce").run(
        dist=alone
    )
    accelerator = SimpleNamespace(gather=lambda tensor: tensor, process_index=0)
    world, rows = World(pairs=GROUP * GROUPS), GROUP * GROUPS
    x0, noise, moved = (world.draw(rows, *SHAPE) for _ in range(3))
    advantages, level = 3 * world.draw(rows), torch.full((rows,), 0.7).double()
    x_t, states = 0.3 * x0 + 0.7 * noise, world.states[:rows]
    with torch.no_grad():
        reference = world.network.reference(x_t, 1000 * level, states).sample
        old = world.network(x_t, 1000 * level, states).sample + 0.1 * moved
    owners = torch.arange(GROUPS).repeat_interleave(GROUP)[:, None]

    def theirs() -> Tensor:
        train = SimpleNamespace(adv_clip_max=CLIP, beta=REFERENCE, beta_dpo=beta)
        model = world.network(x_t, 1000 * level, states).sample
        loss: Tensor = step.run(
            config=SimpleNamespace(
                train=train,
                use_ema_ref=to_old,
                clip_range=clip,
                clip_dsm=True,
                clip_kl=False,
                sample=SimpleNamespace(num_image_per_prompt=GROUP),
            ),
            sample={"advantages": advantages[:, None]},
            j=0,
            x0=x0,
            model_v=model,
            target_v=noise - x0,
            ref_old_v=reference,
            old_v=old,
            use_old=clip is not None,
            group_info=functions["precompute_group_info"](owners, accelerator),
            accelerator=accelerator,
            info=defaultdict(list),
            compute_group_dgpo_loss_allreduce=functions["compute_group_dgpo_loss_allreduce"],
        )["loss"]
        return loss

    def ours() -> Tensor:
        policy = world.network(x_t, 1000 * level, states).sample
        errors, before = denoising_error(policy, noise - x0), denoising_error(old, noise - x0)
        a = advantages.clamp(-CLIP, CLIP)
        if clip is not None:
            errors = torch.where(moved_enough(errors, before, a, clip=clip), errors.detach(), errors)
        compared = before if to_old else denoising_error(reference, noise - x0)
        loss = dgpo(errors, compared, a, group=GROUP, beta=beta).mean()
        return loss + REFERENCE * denoising_error(policy, reference).mean()

    return losses(
        SCRIPT,
        f"loss of {GROUPS} groups of {GROUP}, beta {beta:g}, {'no clip' if clip is None else f'clip {clip:g}'}",
        f"compare_to {'old' if to_old else 'reference'}, reference_weight {REFERENCE:g}, advantage_clip {CLIP:g}",
        theirs,
        ours,
        world.network.inputs(),
    )


def _moving_reference(checkout: Checkout) -> Comparison:
    made = checkout.functions(AVERAGE, "EMAModuleWrapper").run(Iterable=Iterable)["EMAModuleWrapper"]
    world = World()
    weight = nn.Parameter(world.draw(5))
    theirs, ours = made([weight], decay=0.3, update_step_interval=1), Shadow({"weight": weight})
    for step in range(0, 1000, 100):
        weight.data = weight.data + world.draw(5)
        theirs.step([weight], step, decay=min(0.3, 0.001 * step))
        ours.follow(old_policy_decay(step, rate=0.001, limit=0.3))
    (found,) = theirs.ema_parameters
    return values(
        AVERAGE, "the moving reference at ten of its steps", "old_decay [0, 0.001, 0.3]", found, ours.shadow["weight"]
    )
