"""The configuration of `mmalign compare`: a strict schema, read from YAML or made from the command line.

    systems:
      - {name: base, model: assets/shapes-sd}
      - {name: dpo, model: runs/demo-pairs/dpo}
    prompts: shapes-drawbench
    rewards: [shapes-correctness, shapes-quality]
    guidance: 4
    guidance_control: {guidances: [3, 4, 6, 8], prompts: shapes-validation, rewards: [shapes-correctness]}
    output: runs/demo-pairs/compare

The first system is the baseline unless `baseline` names another. A system may be trained instead of given, all of
them under one budget:

    systems:
      - {name: base, model: assets/shapes-sd}
      - {name: sft, train: shapes/sft, overrides: [output=runs/versus/sft]}
      - {name: dpo, train: shapes/diffusion_dpo, overrides: [output=runs/versus/dpo]}
    budget: {images: 20000}

A system may also be a folder of images made elsewhere, `{name: other, images: pictures/other}`, or of `videos`.

Of video models, `video` gives the geometry, and an image reward scores `frames` of each video:

    video: {frames: 33, height: 240, width: 416}
    rewards: [vbench-temporal-flickering, {name: pickscore, frames: 4}]

With `training_seeds: [0, 1, 2]` each of them is trained once from each seed, and counts as the mean of its replicas.
`diversity: shapes-clip` adds how much the images of one prompt differ, measured by that reward's image embeddings.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from mmalign.compare.systems.config import SystemsConfig, check_values, different_seeds, no_duplicates
from mmalign.config.run import load_schema
from mmalign.config.sections import Guidance, StrictModel
from mmalign.config.video import VideoConfig
from mmalign.config.yaml import list_configs
from mmalign.core.errors import UserError, did_you_mean


class RewardEntry(StrictModel):
    """A reward that scores every image."""

    name: str
    """a name of `mmalign list rewards`, or your own as 'package.module:Class'"""
    label: str = ""
    """its label in the report; empty: its name (needed where one reward is used twice with other options)"""
    options: dict[str, Any] = Field(default_factory=dict)
    """options of the reward, such as weights"""
    frames: int | None = Field(None, ge=1)
    """for an image reward on videos: the mean over so many frames, spread evenly; it does not see motion"""

    @property
    def title(self) -> str:
        """The label; the name where there is none."""
        return self.label or self.name

    def named(self, label: str) -> RewardEntry:
        """Return a copy with this label if it has none."""
        return self.model_copy(update={"label": self.label or label})


class GuidanceControl(StrictModel):
    """The control "untouched baseline at its best guidance", chosen on validation prompts."""

    guidances: list[Guidance] = Field(min_length=2)
    """guidance scales to try"""
    prompts: str
    """validation prompts: a built-in name or a file"""
    rewards: list[str] = Field(min_length=1)
    """rewards of the comparison that choose the guidance; of several, the best mean rank"""
    limit: int | None = Field(None, ge=1)
    """use only the first so many validation prompts"""

    @field_validator("guidances")
    @classmethod
    def _different(cls, guidances: list[float]) -> list[float]:
        if len(set(guidances)) != len(guidances):
            raise ValueError(f"given {guidances}; allowed: different numbers")
        return guidances


class CompareConfig(SystemsConfig):
    """One comparison of generators of images, or of videos."""

    prompts: str
    """test prompts: a built-in name of `mmalign list prompts` or a file"""
    rewards: list[RewardEntry] = Field(min_length=1)
    """rewards that score what is made"""
    seeds: list[int] = Field([0, 1], min_length=1)
    """every system generates one image or video for each prompt and seed"""
    steps: int = Field(50, ge=1)
    """sampling steps"""
    guidance: Guidance = 7.5
    """classifier-free guidance scale; 1: none"""
    solver: Literal["ddim", "dpm++"] = "ddim"
    """sampler"""
    image_size: int | None = Field(None, ge=1)
    """side of the images in pixels, for every system; null: each model's own"""
    video: VideoConfig | None = None
    """frames, rate and size of the videos of video models; null: each model's own"""
    guidance_control: GuidanceControl | None = None
    """adds the baseline at its best guidance as a system; null: no control"""
    diversity: RewardEntry | None = None
    """a reward whose embeddings measure how much what is made of a prompt differs; null: not measured"""
    category_apart: str | None = None
    """a category that the report also shows all others together against, such as held-out combinations; null: none"""
    open_attributes: bool = True
    """report the entropy of what prompts leave open, such as the background, where a registered reader knows them"""

    @field_validator("seeds")
    @classmethod
    def _different_drawn(cls, seeds: list[int]) -> list[int]:
        different_seeds(seeds)
        return seeds

    @model_validator(mode="after")
    def _consistent(self) -> CompareConfig:
        names = [system.name for system in self.systems]
        titles = [reward.title for reward in self.rewards]
        no_duplicates("rewards", "label", titles)
        self._check_diversity(titles)
        if self.guidance_control and next(one for one in self.systems if one.name == self.baseline_name).made:
            raise ValueError(
                f"guidance_control: the baseline '{self.baseline_name}' is a folder, which cannot be redrawn"
            )
        if len(names) == 1 and self.guidance_control is None:
            raise ValueError(f"systems: only '{names[0]}'; give a second one, or guidance_control to compare it with")
        for reward in self.guidance_control.rewards if self.guidance_control else []:
            if reward not in titles:
                hint = did_you_mean(reward, titles)
                raise ValueError(f"guidance_control.rewards: '{reward}' is not among the rewards compared{hint}")
        return self

    def _check_diversity(self, titles: list[str]) -> None:
        if self.diversity is None:
            return
        if len(self.seeds) < 2:
            raise ValueError(f"diversity: compares the seeds of a prompt, and seeds has only {self.seeds[0]}; add one")
        label = self.diversity.named("diversity").label
        if label in titles:
            raise ValueError(f"diversity: a reward is called '{label}' too; give either another label")


def is_comparison(text: str) -> bool:
    """Tell whether text names a config (a YAML file or a shipped name) rather than a model."""
    return Path(text).suffix in (".yaml", ".yml") or (not Path(text).exists() and text in list_configs())


def name_models(models: Sequence[str]) -> list[str]:
    """Name models by their last path component, as a folder can be called; where that is not unique, by the last two.

    Raises:
        UserError: two names are still the same, or nothing of one is left; `--names` gives others.
    """
    parts = [_last_parts(model) for model in models]
    count = Counter(as_folder_name(short) for _, short in parts)
    names = [
        as_folder_name(f"{parent}-{short}" if parent and count[as_folder_name(short)] > 1 else short)
        for parent, short in parts
    ]
    for name, number in Counter(names).items():
        if number > 1 or not name:
            which = ", ".join(model for model, made in zip(models, names, strict=True) if made == name)
            problem = f"would all be named '{name}'" if name else "has no letters or digits to be named by"
            raise UserError(f"{which}: {problem}; name the models by --names A,B")
    return names


def _last_parts(model: str) -> tuple[str, str]:
    """Return the last two components of a folder's path, or nothing and the last one of a hub id."""
    if not Path(model).exists():
        return "", model.rpartition("/")[2]
    path = Path(model).resolve()
    return path.parent.name, path.name


def as_folder_name(text: str) -> str:
    """Return a name of letters, digits and . _ + - that is made of any text: accents are dropped, the rest is "-"."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", plain).strip("-").lstrip("._+-")


def load_compare_config(path: str | Path, overrides: Sequence[str] = ()) -> CompareConfig:
    """Read a comparison from YAML (`extends:` and overrides `key.path=value` as for training).

    Raises:
        UserError: the file cannot be read, or anything in it is wrong: one line a fault, all of them.
    """
    return load_schema(CompareConfig, path, list(overrides))


def make_compare_config(**values: Any) -> CompareConfig:
    """Check a comparison made in code or from command line options; None means the default.

    Raises:
        UserError: something in it is wrong.
    """
    return check_values(CompareConfig, values)
