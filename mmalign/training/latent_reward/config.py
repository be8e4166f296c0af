"""The configuration of `mmalign train-reward`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from mmalign.config.run import load_schema
from mmalign.config.sections import DataConfig, Guidance, Output, Share, StrictModel, check_tracker_names
from mmalign.core.errors import UserError


class RewardTrainerConfig(StrictModel):
    """The training loop; its keys have the meaning of those of `mmalign train`."""

    steps: int = Field(1000, ge=1)
    """optimiser steps"""
    batch_size: int = Field(16, ge=1)
    """pairs of one forward pass"""
    gradient_accumulation: int = Field(1, ge=1)
    """forward passes per optimiser step"""
    learning_rate: float = Field(1e-5, gt=0)
    """peak of the schedule"""
    weight_decay: float = Field(0.01, ge=0)
    """decoupled weight decay"""
    max_grad_norm: float = Field(1.0, gt=0)
    """gradients are scaled down to this norm"""
    warmup: float = Field(0.1, ge=0)
    """rising part of the schedule: a fraction of `steps` if below 1, else a number of steps"""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """course of the learning rate after the warm-up"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """autocast of the forward pass; trained weights stay fp32"""
    seed: int = Field(0, ge=0)
    """the seed of all random draws"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, about a third slower"""
    checkpoint_every: int = Field(500, ge=1)
    """steps between two checkpoints"""
    keep_checkpoints: int = Field(1, ge=1)
    """older checkpoints are deleted"""
    log_every: int = Field(10, ge=1)
    """steps between two lines of metrics"""
    trackers: list[str] = []
    """where metrics go besides metrics.jsonl, as for `mmalign train`"""
    tracker_project: str = Field("mmalign", min_length=1)
    """the project that trackers file the run under"""
    tracker_run: str | None = Field(None, min_length=1)
    """what trackers call the run; null: the name of the output's folder"""

    @field_validator("trackers")
    @classmethod
    def _known_trackers(cls, names: list[str]) -> list[str]:
        return check_tracker_names(names)


class LatentRewardConfig(StrictModel):
    """One training of a latent reward model."""

    model: str
    """the generator that the reward is built from: a model directory, or a hub id 'organisation/name'"""
    data: DataConfig
    """the training pairs"""
    output: Output
    """folder of the reward"""
    guidance: Guidance = 7.5
    """visual feature enhancement: guidance of the middle block's features; 1: none, and half the cost"""
    features: int | None = Field(None, ge=1)
    """width of the space in which text and latents are compared; null: that of the pooled text"""
    levels: int = Field(20, ge=1, le=1000)
    """evenly spaced noise levels to train on: 20 are the timesteps 1, 51, ..., 951"""
    held_out: Share = 0.1
    """share of the prompts held out for measuring"""
    trainer: RewardTrainerConfig = RewardTrainerConfig()
    """the training loop"""

    @field_validator("data")
    @classmethod
    def _pairs_with_their_prompts(cls, data: DataConfig) -> DataConfig:
        if data.pairs is None or data.labels is not None or data.prompts is not None:
            raise ValueError("a reward is trained on pairs; give data.pairs, and neither labels nor prompts")
        if data.caption_dropout:
            raise ValueError("a reward always needs the prompt; remove data.caption_dropout")
        return data


def load_reward_config(path: str | Path, overrides: list[str] | None = None) -> LatentRewardConfig:
    """Read, merge and check the configuration of a reward's training.

    Raises:
        UserError: anything in it is wrong: one line a fault, all of them.
    """
    config = load_schema(LatentRewardConfig, path, overrides)
    trainer = config.trainer
    if trainer.warmup > trainer.steps:
        raise UserError(
            f"trainer.warmup: given {trainer.warmup:g} steps of warm-up in a run of {trainer.steps}; give fewer"
        )
    return config
