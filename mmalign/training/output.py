"""What lies in the folder of a run, and whether the run is finished."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mmalign.config.run import dump_config
from mmalign.core.files import write_atomically
from mmalign.training.models import EXPORTS

if TYPE_CHECKING:
    from mmalign.config.run import RunConfig


CONFIG_FILE, CARD_FILE = "config.yaml", "README.md"


def write_config(config: RunConfig, output: Path) -> None:
    """Write the resolved configuration, from which the run can be repeated."""
    write_atomically(output / CONFIG_FILE, dump_config(config))


def has_export(output: Path) -> bool:
    """Tell whether a folder holds exported weights, whatever they were trained by."""
    return any((output / name).is_file() for name in EXPORTS.values())


def is_finished(output: Path) -> bool:
    """Tell whether a run's weights are those of the configuration beside them.

    The configuration is written when a run starts and the card, which quotes it, after the weights: as long as a run
    goes on that began in the folder of an earlier one, the two disagree.
    """
    config, card = output / CONFIG_FILE, output / CARD_FILE
    if not (config.is_file() and card.is_file() and has_export(output)):
        return False
    return config.read_text(encoding="utf-8").rstrip() in card.read_text(encoding="utf-8")
