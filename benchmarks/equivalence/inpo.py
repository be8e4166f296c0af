"""DDIM-InPO's inversion and loss against the authors' training script (--diffusers DIR: with its scheduler)."""

from __future__ import annotations

from benchmarks.equivalence.checkout import Checkout
from benchmarks.equivalence.comparing import Comparison
from benchmarks.equivalence.inverted import Script, scheduler_of

REPOSITORY = "JaydenLyh/InPO"
STEPS, ETA = 10, 0.1


def compare(checkout: Checkout) -> list[Comparison]:
    """Run the script's inversion, without and with its noise, and its loss, with the installed diffusers."""
    return compare_with_diffusers(checkout, None)


def compare_with_diffusers(checkout: Checkout, diffusers: Checkout | None) -> list[Comparison]:
    """Run the script's inversion and loss with the inverse scheduler of a checkout of diffusers."""
    script = Script(checkout, "ddiminpo", scheduler_of(diffusers), STEPS, renoise=0)
    return [*script.compare(weight=1.0), script.added_noise(ETA)]
