"""The configuration of a training run: a strict schema, read from YAML with `extends` and overrides."""

from mmalign.config.rounds import RoundsConfig
from mmalign.config.run import RunConfig, dump_config, expand_short_forms, load_config, load_schema, load_with_tree
from mmalign.config.sections import (
    AdapterConfig,
    BudgetConfig,
    DataConfig,
    EarlyStop,
    EvaluateConfig,
    Guidance,
    MonitorConfig,
    RewardConfig,
    StrictModel,
    TrainerConfig,
)

__all__ = [
    "AdapterConfig",
    "BudgetConfig",
    "DataConfig",
    "EarlyStop",
    "EvaluateConfig",
    "Guidance",
    "MonitorConfig",
    "RewardConfig",
    "RoundsConfig",
    "RunConfig",
    "StrictModel",
    "TrainerConfig",
    "dump_config",
    "expand_short_forms",
    "load_config",
    "load_schema",
    "load_with_tree",
]
