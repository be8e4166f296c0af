"""`mmalign.data.batches` under its public name: what a method learns from in one forward pass, encoded."""

from mmalign.data.batches import ComparisonBatch, LabelBatch, PairBatch, PromptBatch, TimedMedia, VlmPairBatch

__all__ = ["ComparisonBatch", "LabelBatch", "PairBatch", "PromptBatch", "TimedMedia", "VlmPairBatch"]
