"""LPO's step loss and its threshold that follows the noise against the authors' training script."""

from __future__ import annotations

import torch

from benchmarks.equivalence.checkout import Checkout
from benchmarks.equivalence.comparing import Comparison, World, values
from benchmarks.equivalence.spo import STEPS, step_loss
from mmalign.losses import dynamic_threshold, step_preference
from pipelines import ddim

REPOSITORY = "Kwai-Kolors/LPO"
FILE = "lpo/lpo/preference_models/compare_funcs.py"
THRESHOLDS = (0.35, 0.5)


def compare(checkout: Checkout) -> list[Comparison]:
    """Run the script from the networks' calls to the loss; then its table of thresholds and its choice of pairs."""
    tables = checkout.statements(FILE, r"sigma_tensor = ", r"max_timesteps = ").run()
    functions = checkout.functions(FILE, "dynamic_threshold_sigma", "preference_score_compare")
    world = World()
    stds = ddim(1.0).stds(world.process, STEPS)
    ours = [dynamic_threshold(std, (min(stds), max(stds)), THRESHOLDS) for std in stds]
    t = world.process.timesteps(STEPS)
    low, high = THRESHOLDS
    theirs = functions.function("dynamic_threshold_sigma", **tables)(low, high, t)

    scores = world.draw(4, STEPS)
    bounds = {"dynamic_threshold": "sigma", "threshold_min": low, "threshold_max": high}
    indices, valid = functions.function("preference_score_compare", **tables)(scores, 0.3, t, **bounds)
    picked = [step_preference(scores[:, i : i + 1], threshold) for i, threshold in enumerate(ours)]
    return [
        step_loss(checkout, "lpo/train_scripts/train_lpo.py", "lpo/lpo", beta=500.0),
        values(
            FILE,
            "thresholds of the 20 steps",
            f"threshold: [{low:g}, {high:g}]; theirs from deviations typed in with four digits",
            theirs,
            torch.tensor(ours),
        ),
        values(
            FILE,
            "best, worst and validity of 20 steps with 4 candidates",
            "the same",
            torch.stack([*indices, valid]),
            torch.stack([torch.cat(part) for part in zip(*picked, strict=True)]),
        ),
    ]
