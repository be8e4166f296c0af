"""The folder of a run: its export, and whether the run is finished."""

from __future__ import annotations

from pathlib import Path

CONFIG_FILE, CARD_FILE, CHECKPOINTS = "config.yaml", "README.md", "checkpoints"
EXPORT_FILES = {
    ("image", "full"): "model_index.json",
    ("image", "lora"): "pytorch_lora_weights.safetensors",
    ("video", "full"): "model_index.json",
    ("video", "lora"): "pytorch_lora_weights.safetensors",
    ("vlm", "full"): "config.json",
    ("vlm", "lora"): "adapter_config.json",
}
"""(modality, adapter.kind) -> the file that marks an export."""


def has_export(output: Path) -> bool:
    """Tell whether a folder holds exported weights of any training."""
    return any((output / name).is_file() for name in EXPORT_FILES.values())


def is_finished(output: Path) -> bool:
    """Tell whether a run's weights are those of the configuration beside them.

    The configuration is written when a run starts and the card, which quotes it, after the weights: while a run
    continues in the folder of an earlier one, the two disagree.
    """
    config, card = output / CONFIG_FILE, output / CARD_FILE
    if not (config.is_file() and card.is_file() and has_export(output)):
        return False
    return config.read_text(encoding="utf-8").rstrip() in card.read_text(encoding="utf-8")
