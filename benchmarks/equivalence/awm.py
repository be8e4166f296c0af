"""AWM's log-likelihoods and its loss, with anchor and reference, against the authors' training script."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from benchmarks.equivalence.checkout import Checkout
from benchmarks.equivalence.comparing import SHAPE, Comparison, World, losses, values
from mmalign.losses import awm_log_prob, clipped_policy_gradient, denoising_error
from mmalign.losses.awm import Weighting

REPOSITORY = "scxue/advantage_weighted_matching"
SCRIPT = "advantage_weighted_matching/scripts/train_sd3_awm.py"
LEVELS, IMAGES, CLIP = 2, 4, 5.0
WEIGHTINGS: dict[str, Weighting] = {"Uniform": "uniform", "t": "t", "t**2": "t2", "huber": "huber", "ghuber": "ghuber"}


def compare(checkout: Checkout) -> list[Comparison]:
    """Run the script's function of the log-likelihood, and its statements from log-likelihoods to the loss."""
    rows = [_log_likelihood(checkout, *names) for names in WEIGHTINGS.items()]
    return [*rows, _objective(checkout, 1.0, 0.0), _objective(checkout, 0.02, 0.05)]


class _Drawn:
    """Images noised to a few levels, and what the networks predict for them."""

    def __init__(self) -> None:
        self.world = World(pairs=LEVELS * IMAGES)
        draw, rows = self.world.draw, LEVELS * IMAGES
        self.x0, self.noise, moved = draw(rows, *SHAPE), draw(rows, *SHAPE), draw(rows, *SHAPE)
        self.level, self.advantages = torch.linspace(0.1, 0.9, rows).double(), 3 * draw(IMAGES)
        sigma = self.level.reshape(-1, 1, 1, 1)
        self.x_t, self.states = (1 - sigma) * self.x0 + sigma * self.noise, self.world.states[:rows]
        with torch.no_grad():
            self.reference = self.world.network.reference(self.x_t, 1000 * self.level, self.states).sample
            self.anchor = self.policy() + 0.05 * moved

    def policy(self) -> Tensor:
        found: Tensor = self.world.network(self.x_t, 1000 * self.level, self.states).sample
        return found

    def log_prob(self, velocity: Tensor, weighting: Weighting = "ghuber") -> Tensor:
        return awm_log_prob(velocity, self.noise - self.x0, self.level, weighting=weighting)

    def their_log_prob(self, checkout: Checkout, weighting: str) -> Tensor:
        function = checkout.functions(SCRIPT, "compute_log_prob_awm").function("compute_log_prob_awm")
        config = SimpleNamespace(train=SimpleNamespace(cfg=False, ghuber_power=0.25))
        called = lambda **_: (self.policy(),)  # noqa: E731
        level = self.level.reshape(-1, 1, 1, 1)
        given = (called, None, None, level, None, None, config, self.x_t, self.x0, self.noise)
        found: Tensor = function(*given, weighting=weighting)[0]
        return found


def _log_likelihood(checkout: Checkout, theirs: str, ours: Weighting) -> Comparison:
    drawn = _Drawn()
    with torch.no_grad():
        found = drawn.their_log_prob(checkout, theirs)
        return values(
            SCRIPT, f"log-likelihoods, {theirs}", f"weighting {ours}", found, drawn.log_prob(drawn.policy(), ours)
        )


def _objective(checkout: Checkout, clip: float, moved: float) -> Comparison:
    step = checkout.statements(SCRIPT, r"advantages = torch\.clamp", r"if config\.train\.beta > 0")
    drawn = _Drawn()
    with torch.no_grad():
        old = drawn.log_prob(drawn.policy()) + moved * drawn.world.draw(LEVELS * IMAGES)

    def theirs() -> Tensor:
        train = SimpleNamespace(
            adv_clip_max=CLIP,
            advantage_max=1,
            loss_type="exp_first",
            clip_range=clip,
            train_timesteps=LEVELS,
            beta=0.1,
            ema_beta=0.7,
            kl_weight="Uniform",
            kl_ema_weight="Uniform",
        )
        shape = (LEVELS, IMAGES, *SHAPE)
        loss: Tensor = step.run(
            config=SimpleNamespace(train=train),
            accelerator=SimpleNamespace(is_main_process=False),
            sample={
                "advantages": drawn.advantages[:, None],
                "log_probs": drawn.their_log_prob(checkout, "ghuber").reshape(LEVELS, IMAGES),
                "old_log_probs": old.reshape(LEVELS, IMAGES),
                "model_output": drawn.policy().reshape(shape),
                "model_output_ref": drawn.reference.reshape(shape),
                "model_output_ema": drawn.anchor.reshape(shape),
                "std_dev_t": None,
            },
        )["loss"]
        return loss

    def ours() -> Tensor:
        policy, advantages = drawn.policy(), (drawn.advantages.clamp(-CLIP, CLIP) / CLIP).repeat(LEVELS)
        loss = clipped_policy_gradient(drawn.log_prob(policy), old, advantages, clip=clip).mean()
        loss = loss + 0.1 * denoising_error(policy, drawn.reference).mean()
        return loss + 0.7 * denoising_error(policy, drawn.anchor).mean()

    moved_by = "ratio 1" if not moved else f"ratios moved by {moved:g}"
    return losses(
        SCRIPT,
        f"loss of {IMAGES} images at {LEVELS} levels with both terms, {moved_by}",
        f"clip {clip:g}, advantage_clip {CLIP:g}, anchor_weight 0.7, reference_weight 0.1",
        theirs,
        ours,
        drawn.world.network.inputs(),
    )
