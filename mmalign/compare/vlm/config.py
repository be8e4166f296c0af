"""A comparison of vision-language models: systems answer questions about videos instead of generating images.

    systems:
      - {name: base, model: assets/shapes-vlm}
      - {name: dpo, train: shapes_vlm/vlm_dpo, overrides: [output=runs/versus/dpo]}
    training_seeds: [0, 1, 2]
    questions: runs/shapes_vlm/test
    output: runs/versus/compare

`questions` takes the place of `prompts` and `rewards`; systems, budget and training seeds mean the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from mmalign.compare.config import CompareConfig
from mmalign.compare.systems.config import SystemsConfig
from mmalign.config.run import Source, expand_short_forms, load_schema
from mmalign.config.yaml import read_tree

Format = Literal["multi-choice", "yes_no", "caption_matching", "captioning"]


class QuestionConfig(SystemsConfig):
    """One comparison of vision-language models."""

    questions: str
    """a folder that `mmalign shapes videos` wrote, TempCompass's with questions/ and videos/, or a set of your own"""
    formats: list[Format] = Field(["multi-choice", "yes_no", "caption_matching"], min_length=1)
    """formats of the questions; captioning needs a set that judges captions, such as Shapes"""
    frames: int | None = Field(None, ge=1)
    """number of frames shown of each video, evenly spaced; null: see fps"""
    fps: float | None = Field(None, gt=0, allow_inf_nan=False)
    """number of frames shown a second; null: all frames, unless `frames` is given"""
    max_new_tokens: int = Field(32, ge=1)
    """longest answer"""
    shuffle_seed: int | None = Field(0, ge=0)
    """seed for showing every video once more with shuffled frames; null: not measured"""

    @field_validator("formats")
    @classmethod
    def _different(cls, formats: list[Format]) -> list[Format]:
        if len(set(formats)) != len(formats):
            raise ValueError(f"given {formats}; allowed: different formats")
        return formats

    @model_validator(mode="after")
    def _consistent_questions(self) -> QuestionConfig:
        if len(self.systems) == 1:
            raise ValueError(f"systems: only '{self.systems[0].name}'; give a second one")
        if self.frames is not None and self.fps is not None:
            raise ValueError("frames and fps: both say which frames are shown; give one")
        for system in self.systems:
            if system.made is not None:
                raise ValueError(f"systems: '{system.name}' is a folder of media, which answers no questions")
            if system.guidance is not None or system.adapter_scale != 1:
                raise ValueError(
                    f"systems: '{system.name}' has guidance or adapter_scale, which only image models use"
                )
        return self


def asks_questions(source: Source, overrides: Sequence[str] = ()) -> bool:
    """Tell whether a comparison is one of vision-language models.

    Raises:
        UserError: the file cannot be read.
    """
    return "questions" in read_tree(source, overrides, expand_short_forms, None).values


def load_comparison(
    source: Source, overrides: Sequence[str] = (), sections: Mapping[str, Any] | None = None
) -> CompareConfig | QuestionConfig:
    """Read a comparison of either kind as `load_config` does; one with `questions` is of vision-language models.

    Raises:
        UserError: the file cannot be read, or anything in it is wrong: one line a fault, all of them.
    """
    if "questions" in read_tree(source, overrides, expand_short_forms, sections).values:
        return load_schema(QuestionConfig, source, overrides, sections)
    return load_schema(CompareConfig, source, overrides, sections)
