"""Fine-tuning methods, one per file. Other packages add methods through the entry point `mmalign.methods`."""

from mmalign.core.registry import methods

__all__ = ["methods"]
