"""What `mmalign compare` is asked to do: a strict schema, read from YAML or made from the command line.

    systems:
      - {name: base, model: assets/shapes-sd}
      - {name: dpo, model: runs/demo/dpo}
    prompts: shapes-drawbench
    rewards: [shapes-correctness, shapes-quality]
    guidance: 4
    guidance_control: {guidances: [3, 4, 6, 8], prompts: shapes-validation, rewards: [shapes-correctness]}
    output: runs/demo/compare

The first system is the baseline unless `baseline` names another. A system may be trained instead of given, all of
them under one budget:

    systems:
      - {name: base, model: assets/shapes-sd}
      - {name: sft, train: shapes/sft, overrides: [output=runs/versus/sft]}
      - {name: dpo, train: shapes/diffusion_dpo, overrides: [output=runs/versus/dpo]}
    budget: {images: 20000}

With `training_seeds: [0, 1, 2]` each of them is trained once from each seed, and counts as the mean of its replicas.
`diversity: shapes-clip` adds how much the pictures of one prompt differ, measured by that reward's image embeddings.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from mmalign.compare.stats import RESAMPLES
from mmalign.config import BudgetConfig, Guidance, StrictModel, expand_short_forms, load_schema
from mmalign.errors import UserError, did_you_mean

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


class SystemConfig(StrictModel):
    """One model that takes part."""

    name: str
    """what tables and folders call the system: letters, digits and . _ + -"""
    model: str | None = None
    """a model directory (full or LoRA), or a hub id 'organisation/name'; null: what `train` makes"""
    train: str | None = None
    """a training config, file or shipped name, whose output is the system; trained unless it is there already"""
    overrides: list[str] = []
    """changes to that config, each key=value"""
    guidance: Guidance | None = None
    """guidance scale of this system alone; null: that of the comparison"""
    adapter_scale: float = Field(1.0, ge=0, allow_inf_nan=False)
    """how much of its LoRA adapter: 0 the base, 1 as trained, between: interpolated"""
    trained_on: list[str] | None = None
    """rewards that it was trained on; null: read from the model's directory"""

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
        if (self.model is None) == (self.train is None):
            given = "both model and train" if self.model else "neither model nor train"
            raise ValueError(f"'{self.name}' has {given}; give a model that is there, or a config to train one by")
        if self.overrides and self.train is None:
            raise ValueError(f"'{self.name}' has overrides and trains nothing; remove them, or give train")
        return self


@dataclass(frozen=True)
class Replica:
    """A system trained from one of the training seeds; `seed` None: as its config says, or not trained here at all.

    `name` is the system's own for the first replica, and names the folder of the images.
    """

    name: str
    system: SystemConfig
    seed: int | None = None


class RewardEntry(StrictModel):
    """One reward that every image is scored by."""

    name: str
    """a name of `mmalign list rewards`, or your own as 'package.module:Class'"""
    label: str = ""
    """what the report calls it; empty: its name (needed where one reward is used twice with other options)"""
    options: dict[str, Any] = Field(default_factory=dict)
    """what the reward itself takes, such as weights"""

    @property
    def title(self) -> str:
        """The label, or else the name."""
        return self.label or self.name

    def named(self, label: str) -> RewardEntry:
        """Return the same with this label where it has none."""
        return self.model_copy(update={"label": self.label or label})


class GuidanceControl(StrictModel):
    """The control "untouched baseline at its best guidance", chosen on prompts that are not the test's."""

    guidances: list[Guidance] = Field(min_length=2)
    """guidance scales to try"""
    prompts: str
    """validation prompts: a built-in name or a file"""
    rewards: list[str] = Field(min_length=1)
    """rewards of the comparison that choose; of several, the best mean rank"""
    limit: int | None = Field(None, ge=1)
    """use only the first so many validation prompts"""

    @field_validator("guidances")
    @classmethod
    def _different(cls, guidances: list[float]) -> list[float]:
        if len(set(guidances)) != len(guidances):
            raise ValueError(f"given {guidances}; allowed: different numbers")
        return guidances


class CompareConfig(StrictModel):
    """One comparison, as `mmalign compare` takes it."""

    systems: list[SystemConfig] = Field(min_length=1)
    """the models that take part"""
    prompts: str
    """test prompts: a built-in name of `mmalign list prompts` or a file"""
    rewards: list[RewardEntry] = Field(min_length=1)
    """what the images are scored by"""
    output: str
    """folder for report.html, results.json and the images"""
    baseline: str | None = None
    """name of the system that the others are compared with; null: the first"""
    seeds: list[int] = Field([0, 1], min_length=1)
    """every prompt is drawn once from each seed, by every system"""
    steps: int = Field(50, ge=1)
    """sampling steps"""
    guidance: Guidance = 7.5
    """classifier-free guidance scale; 1: none"""
    solver: Literal["ddim", "dpm++"] = "ddim"
    """sampler"""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """type of the weights while sampling"""
    batch_size: int = Field(8, ge=1)
    """images drawn at once; does not change them"""
    limit: int | None = Field(None, ge=1)
    """use only the first so many prompts"""
    budget: BudgetConfig | None = None
    """what each of the systems trained here may cost, as their `trainer.budget`; null: what their configs say"""
    training_seeds: list[int] | None = Field(None, min_length=1)
    """every system with `train` is trained once from each; null: once, from the seed that its config says"""
    resamples: int = Field(RESAMPLES, ge=100)
    """bootstrap resamples behind every interval"""
    guidance_control: GuidanceControl | None = None
    """adds the baseline at its best guidance as a system; null: no such control"""
    diversity: RewardEntry | None = None
    """a reward whose image embeddings say how much the images of a prompt differ; null: that is not measured"""

    @field_validator("seeds", "training_seeds")
    @classmethod
    def _different_seeds(cls, seeds: list[int] | None) -> list[int] | None:
        if seeds is not None and (min(seeds) < 0 or len(set(seeds)) != len(seeds)):
            raise ValueError(f"given {seeds}; allowed: different whole numbers of at least 0")
        return seeds

    @model_validator(mode="after")
    def _consistent(self) -> CompareConfig:
        names = [system.name for system in self.systems]
        titles = [reward.title for reward in self.rewards]
        _no_duplicates("systems", "name", names)
        _no_duplicates("rewards", "label", titles)
        self._check_budget()
        self._check_training_seeds()
        self._check_diversity(titles)
        if len(names) == 1 and self.guidance_control is None:
            raise ValueError(f"systems: only '{names[0]}'; give a second one, or guidance_control to compare it with")
        if self.baseline is not None and self.baseline not in names:
            hint = did_you_mean(self.baseline, names)
            raise ValueError(f"baseline: no system is called '{self.baseline}' (systems: {', '.join(names)}){hint}")
        for reward in self.guidance_control.rewards if self.guidance_control else []:
            if reward not in titles:
                hint = did_you_mean(reward, titles)
                raise ValueError(f"guidance_control.rewards: '{reward}' is not among the rewards compared{hint}")
        return self

    def _check_budget(self) -> None:
        if self.budget is None:
            return
        if all(system.train is None for system in self.systems):
            raise ValueError("budget: no system is trained here; remove it, or give systems a config to `train`")
        for system in self.systems:
            own = next((text for text in system.overrides if text.startswith("trainer.budget")), None)
            if own is not None:
                raise ValueError(f"systems: '{system.name}' overrides {own}, and budget holds for all; remove one")

    def _check_training_seeds(self) -> None:
        if self.training_seeds is None:
            return
        if all(system.train is None for system in self.systems):
            raise ValueError("training_seeds: no system is trained here; remove them, or give systems a `train`")
        for system in self.systems:
            own = next((text for text in system.overrides if text.partition("=")[0].strip() == "trainer.seed"), None)
            if own is not None:
                raise ValueError(f"systems: '{system.name}' overrides {own}, and training_seeds say it; remove one")
        counts = Counter(replica.name for replica in self.replicas)
        for replica in self.replicas:
            if replica.name != replica.system.name and counts[replica.name] > 1:
                raise ValueError(
                    f"systems: '{replica.name}' is what training seed {replica.seed} of '{replica.system.name}' is "
                    "called; give the other system of that name another"
                )

    def _check_diversity(self, titles: list[str]) -> None:
        if self.diversity is None:
            return
        if len(self.seeds) < 2:
            raise ValueError(f"diversity: compares the seeds of a prompt, and seeds has only {self.seeds[0]}; add one")
        label = self.diversity.named("diversity").label
        if label in titles:
            raise ValueError(f"diversity: a reward is called '{label}' too; give either another label")

    @property
    def baseline_name(self) -> str:
        """The name of the baseline system."""
        return self.baseline or self.systems[0].name

    @property
    def replicas(self) -> list[Replica]:
        """What is trained, drawn and scored: the systems in their order, the trained ones once a training seed."""
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


def load_compare_config(path: str | Path, overrides: Sequence[str] = ()) -> CompareConfig:
    """Read a comparison from YAML (`extends:` and overrides `key.path=value` as for training).

    Raises:
        UserError: the file cannot be read, or anything in it is wrong: one line a fault, all of them.
    """
    return load_schema(CompareConfig, path, list(overrides))


def make_compare_config(**values: Any) -> CompareConfig:
    """Check a comparison put together in code or from command line options; None means the default.

    Raises:
        UserError: something in it is wrong.
    """
    given = {key: value for key, value in values.items() if value is not None}
    expand_short_forms(given)
    try:
        return CompareConfig.model_validate(given)
    except ValidationError as error:
        faults = (f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors(include_url=False))
        raise UserError("; ".join(fault.removeprefix(": ").replace("Value error, ", "") for fault in faults)) from None


def _no_duplicates(what: str, key: str, values: list[str]) -> None:
    twice = [value for value, count in Counter(values).items() if count > 1]
    if twice:
        raise ValueError(f"{what}: {', '.join(twice)} occurs more than once; give each its own {key}")
