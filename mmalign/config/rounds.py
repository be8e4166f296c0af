"""The section of a run's configuration for iterated training."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from mmalign.config.sections import Count, Guidance, StrictModel


class RoundsConfig(StrictModel):
    """Iterated training: sample with the fine-tuned model, label by rewards, train again."""

    count: Count
    """number of rounds"""
    prompts: str
    """a built-in name of `mmalign list prompts`, or a file"""
    reward: str
    """rewards that label the samples: NAME or NAME,OTHER:0.5, or a YAML file as for `mmalign score --rewards`"""
    limit: Count | None = None
    """use only this many prompts, from the first on; null: all"""
    images_per_prompt: int = Field(4, ge=2)
    """images or videos sampled for each prompt; the best and the worst make a pair"""
    steps: Count = 50
    """sampling steps"""
    guidance: Guidance = 7.5
    """classifier-free guidance scale; 1: none"""
    solver: Literal["ddim", "dpm++"] = "ddim"
    """sampler"""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """type of the weights while sampling"""
    batch_size: Count = 8
    """images or videos per batch while sampling"""
    frames: Count | None = None
    """for image rewards on a video model: their mean over so many frames of each video, spread evenly"""
    votes: bool = False
    """score by the share of won comparisons with the other samples of the prompt, for rewards that compare pairs"""
    reference: Literal["previous", "base"] = "previous"
    """what a round's method compares with: the model that the round starts from, or that of the first round"""
    trusted: str | None = None
    """rewards, given as `reward` is, that check it: the share of a round's pairs that they order alike; null: none"""
    trusted_drop: float = Field(0.03, ge=0, lt=1)
    """the rounds end when that share falls by more than this below that of the first round"""
    real: str | None = None
    """real images or videos, in a file as for `data.labels`, mixed into every round; null: none"""
    real_share: float = Field(0.5, gt=0, lt=1)
    """share of a round's training samples that are real, where `real` is given"""

    @model_validator(mode="after")
    def _drop_is_of_a_trusted_reward(self) -> RoundsConfig:
        if self.trusted is None and self.trusted_drop != type(self).model_fields["trusted_drop"].default:
            raise ValueError("trusted_drop is for a trusted reward; give trusted, or remove it")
        return self
