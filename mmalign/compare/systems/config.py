"""The systems of a comparison: existing models, or models that it trains, once or from several seeds."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError, field_validator, model_validator

from mmalign.compare.stats import RESAMPLES
from mmalign.config.run import expand_short_forms
from mmalign.config.sections import BudgetConfig, Guidance, Output, StrictModel
from mmalign.core.errors import UserError, did_you_mean

ConfigT = TypeVar("ConfigT", bound="SystemsConfig")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


class SystemConfig(StrictModel):
    """One model of a comparison."""

    name: str
    """name of the system in tables and folders: letters, digits and . _ + -"""
    model: str | None = None
    """a model directory (full or LoRA), or a hub id 'organisation/name'; null: the output of `train`"""
    images: str | None = None
    """a folder of images made elsewhere, matched by prompt or name; nothing is generated"""
    videos: str | None = None
    """the same of videos: a folder that `mmalign generate` wrote, or any that is matched by prompt or name"""
    train: str | None = None
    """a training config, file or shipped name, whose output is the system; trained unless it is finished"""
    overrides: list[str] = []
    """changes to that config, each key=value"""
    guidance: Guidance | None = None
    """guidance scale of this system; null: that of the comparison"""
    adapter_scale: float = Field(1.0, ge=0, allow_inf_nan=False)
    """scale of its LoRA adapter: 0 the base, 1 as trained, between: interpolated"""
    trained_on: list[str] | None = None
    """rewards of its training; null: read from the model's directory"""

    @field_validator("name")
    @classmethod
    def _usable_as_folder(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"'{name}' cannot name a folder; use letters, digits and . _ + -, a letter or digit first"
            )
        return name

    @model_validator(mode="after")
    def _one_origin(self) -> SystemConfig:
        given = [key for key in ("model", "images", "videos", "train") if getattr(self, key) is not None]
        if len(given) != 1:
            which = f"both {' and '.join(given)}" if given else "neither model nor train"
            raise ValueError(
                f"'{self.name}' has {which}; give an existing model, images or videos of one, or a config that "
                "trains one"
            )
        if self.made is not None and (self.guidance is not None or self.adapter_scale != 1):
            raise ValueError(f"'{self.name}' has {given[0]}, and guidance and adapter_scale change none; remove them")
        if self.overrides and self.train is None:
            raise ValueError(f"'{self.name}' has overrides but no train; remove them, or give train")
        return self

    @property
    def made(self) -> str | None:
        """The folder of what was made elsewhere, where the system is one."""
        return self.images or self.videos


@dataclass(frozen=True)
class Replica:
    """A system trained from one of the training seeds; `seed` None: the seed of its config, or not trained here.

    `name` is the system's for the first replica, and names the folder of the images.
    """

    name: str
    system: SystemConfig
    seed: int | None = None


class SystemsConfig(StrictModel):
    """The settings that all comparisons share."""

    systems: list[SystemConfig] = Field(min_length=1)
    """the models to compare"""
    output: Output
    """folder for report.html, results.json and all outputs of the systems"""
    baseline: str | None = None
    """name of the system to compare the others with; null: the first"""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """type of the weights"""
    batch_size: int | None = Field(None, ge=1)
    """images or videos generated, or questions answered, at once; null: 8 images or questions, 1 video"""
    limit: int | None = Field(None, ge=1)
    """use only this many prompts or questions, from the first"""
    budget: BudgetConfig | None = None
    """`trainer.budget` of each system trained here; null: that of its config"""
    training_seeds: list[int] | None = Field(None, min_length=1)
    """train every system with `train` once from each seed; null: once, from the seed of its config"""
    resamples: int = Field(RESAMPLES, ge=100)
    """bootstrap resamples behind every interval"""

    @field_validator("training_seeds")
    @classmethod
    def _different_seeds(cls, seeds: list[int] | None) -> list[int] | None:
        return different_seeds(seeds)

    @model_validator(mode="after")
    def _consistent_systems(self) -> SystemsConfig:
        names = [system.name for system in self.systems]
        no_duplicates("systems", "name", names)
        self._check_budget()
        self._check_training_seeds()
        if self.baseline is not None and self.baseline not in names:
            hint = did_you_mean(self.baseline, names)
            raise ValueError(f"baseline: no system is called '{self.baseline}' (systems: {', '.join(names)}){hint}")
        return self

    def _check_budget(self) -> None:
        if self.budget is None:
            return
        if all(system.train is None for system in self.systems):
            raise ValueError("budget: no system is trained here; remove it, or give systems a config to `train`")
        for system in self.systems:
            own = next((text for text in system.overrides if text.startswith("trainer.budget")), None)
            if own is not None:
                raise ValueError(f"systems: '{system.name}' overrides {own}, and budget applies to all; remove one")

    def _check_training_seeds(self) -> None:
        if self.training_seeds is None:
            return
        if all(system.train is None for system in self.systems):
            raise ValueError("training_seeds: no system is trained here; remove them, or give systems a `train`")
        for system in self.systems:
            own = next((text for text in system.overrides if text.partition("=")[0].strip() == "trainer.seed"), None)
            if own is not None:
                raise ValueError(f"systems: '{system.name}' overrides {own}, and training_seeds sets it; remove one")
        counts = Counter(replica.name for replica in self.replicas)
        for replica in self.replicas:
            if replica.name != replica.system.name and counts[replica.name] > 1:
                raise ValueError(
                    f"systems: '{replica.name}' is what training seed {replica.seed} of '{replica.system.name}' is "
                    "called; give the other system of that name another"
                )

    @property
    def baseline_name(self) -> str:
        """The name of the baseline system."""
        return self.baseline or self.systems[0].name

    @property
    def replicas(self) -> list[Replica]:
        """The replicas of the comparison: the systems in order, the trained ones once a training seed."""
        return [replica for system in self.systems for replica in self.replicas_of(system)]

    def replicas_of(self, system: SystemConfig) -> list[Replica]:
        """Return the replicas of one system, in the order of the training seeds."""
        if system.train is None or self.training_seeds is None:
            return [Replica(system.name, system)]
        first, *others = self.training_seeds
        return [
            Replica(system.name, system, first),
            *(Replica(f"{system.name}-seed{seed}", system, seed) for seed in others),
        ]


def no_duplicates(what: str, key: str, values: list[str]) -> None:
    """Raise a validation error for values that occur twice."""
    twice = [value for value, count in Counter(values).items() if count > 1]
    if twice:
        raise ValueError(f"{what}: {', '.join(twice)} occurs more than once; give each its own {key}")


def different_seeds(seeds: list[int] | None) -> list[int] | None:
    """Raise a validation error for seeds that are negative or occur twice."""
    if seeds is not None and (min(seeds) < 0 or len(set(seeds)) != len(seeds)):
        raise ValueError(f"given {seeds}; allowed: different whole numbers of at least 0")
    return seeds


def check_values(schema: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """Check a comparison made in code or from command line options; None means the default.

    Raises:
        UserError: something in it is wrong.
    """
    given = {key: value for key, value in values.items() if value is not None}
    expand_short_forms(given)
    try:
        return schema.model_validate(given)
    except ValidationError as error:
        faults = (f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors(include_url=False))
        raise UserError("; ".join(fault.removeprefix(": ").replace("Value error, ", "") for fault in faults)) from None
