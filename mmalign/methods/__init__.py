"""Fine-tuning methods, one a file: how a batch becomes a loss. Others join by the entry point `mmalign.methods`."""

from mmalign.core.registry import methods

__all__ = ["methods"]
