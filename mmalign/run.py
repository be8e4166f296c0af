"""`mmalign.methods.run` under its public name: what a method sees of a training run."""

from mmalign.methods.run import Autocast, Run

__all__ = ["Autocast", "Run"]
