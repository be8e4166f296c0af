"""`mmalign.methods.run` under its public name: what a method sees of a training run."""

from mmalign.methods.run import Autocast, BaseRun, Run, VlmRun

__all__ = ["Autocast", "BaseRun", "Run", "VlmRun"]
