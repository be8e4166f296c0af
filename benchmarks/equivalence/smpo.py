"""SmPO's inversion, weights and loss against the authors' training script (--diffusers DIR: with its scheduler)."""

from __future__ import annotations

import torch

from benchmarks.equivalence.checkout import Checkout
from benchmarks.equivalence.comparing import Comparison, values
from benchmarks.equivalence.inverted import FILE, Script, scheduler_of
from mmalign.losses import smpo_weight

REPOSITORY = "JaydenLyh/SmPO"
STEPS = 5


def compare(checkout: Checkout) -> list[Comparison]:
    """Run the script's inversion and loss as for SD1.5, with the installed diffusers."""
    return compare_with_diffusers(checkout, None)


def compare_with_diffusers(checkout: Checkout, diffusers: Checkout | None) -> list[Comparison]:
    """Run the script's inversion and loss as for SD1.5, with the inverse scheduler of a checkout of diffusers."""
    script = Script(checkout, "smpo", scheduler_of(diffusers), STEPS, renoise=1)
    return [weights(checkout), *script.compare(weight=-0.8)]


def weights(checkout: Checkout) -> Comparison:
    """Compare the weights of pairs over the range of PickScore; the script keeps them as probabilities in float32."""
    statements = checkout.statements(FILE, r"score_0 = examples\['ps_score_0'\]", r"examples\['probs'\] = ")
    scores = [(0.20, 0.20 + gap / 1000) for gap in range(-80, 81, 10)]
    shares = []
    for chosen, rejected in scores:
        examples = {"ps_label_0": [1], "ps_score_0": [[chosen]], "ps_score_1": [[rejected]]}
        shares.append(statements.run(examples=examples)["examples"]["probs"][0])
    margins = torch.tensor([chosen - rejected for chosen, rejected in scores])
    return values(
        FILE,
        "weights of pairs whose PickScores differ by up to 0.08",
        "gamma 10, scale 0.16658",
        10 * (2 * torch.stack(shares) - 1),
        smpo_weight(margins),
    )
