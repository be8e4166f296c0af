"""The sections of a training run's configuration, and the base of every schema; `mmalign.config.run` joins them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from mmalign.core.errors import did_you_mean


class StrictModel(BaseModel):
    """Base of every configuration: unknown keys are faults, `1` is no text and `"1"` no number; frozen once read."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


Guidance = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""A scale of classifier-free guidance; 1: none, 0: without the prompt."""
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, lt=1)]
Growth = Annotated[float, Field(gt=1, allow_inf_nan=False)]


class DataConfig(StrictModel):
    """What is learned from: exactly one of `pairs`, `labels` and `prompts`."""

    pairs: str | None = None
    """preference pairs (or, for methods that learn from good images, the chosen ones): a parquet, JSON or JSONL
    file, a folder, or a `datasets` hub id"""
    prompts: str | None = None
    """prompts of an online method: a built-in name or a CSV, TSV, JSONL or TXT file"""
    labels: str | None = None
    """single images, each good or bad: a parquet, JSONL, CSV or TSV file; or pairs (chosen good, rejected bad)"""
    caption_column: str = "caption"
    """the column that holds the prompt"""
    ties: Literal["drop", "keep"] = "drop"
    """pairs without a winner: left out and counted, or kept"""
    min_margin: float | None = Field(None, ge=0)
    """drop pairs whose scores differ by less than this"""
    limit: int | None = Field(None, ge=1)
    """read no more than this many"""
    resolution: int | None = Field(None, ge=8, multiple_of=8)
    """edge in pixels that images are resized and cropped to; null: what the model was made for"""
    crop: Literal["center", "random"] = "center"
    """which part of an image that is not square is kept, the same for both sides of a pair"""
    flip: bool = False
    """mirror half of the pairs, both sides alike; not for prompts that say left and right"""
    caption_dropout: float = Field(0.0, ge=0, lt=1)
    """share of samples trained on the empty prompt, for classifier-free guidance"""
    frames: int | None = Field(None, ge=1)
    """frames taken of each video, spread evenly over it; only for models that answer about videos, null: all"""
    fps: float | None = Field(None, gt=0, allow_inf_nan=False)
    """frames taken of each second of a video, in place of `frames`"""
    cache: str | None = None
    """folder of what is encoded or computed once; null: ~/.cache/mmalign"""

    @model_validator(mode="after")
    def _one_way_of_sampling(self) -> DataConfig:
        if self.frames is not None and self.fps is not None:
            raise ValueError("frames and fps exclude each other; keep one")
        return self

    @model_serializer(mode="wrap")
    def _without_idle_fields(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # What image models are trained on has no frames: neither has the record of how they were trained.
        return {key: value for key, value in write(self).items() if value is not None or key not in ("frames", "fps")}


class AdapterConfig(StrictModel):
    """What is trained: a low-rank adapter, or every weight."""

    kind: Literal["lora", "full"] = "lora"
    """lora: small matrices beside frozen weights; full: all weights (of an image model, of the denoiser)"""
    rank: int = Field(16, ge=1)
    """rank of the LoRA matrices"""
    alpha: float | None = Field(None, gt=0)
    """LoRA scale times rank; null: equal to the rank"""
    targets: list[str] | None = Field(None, min_length=1)
    """names of layers that get LoRA matrices; null: attention projections, or all linear layers of a language model"""

    @model_serializer(mode="wrap")
    def _without_idle_fields(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # `kind: full` beside a rank is a fault when read, so the resolved config must not hold the unused default.
        return {"kind": "full"} if self.kind == "full" else write(self)


class RewardConfig(StrictModel):
    """One reward and its weight in the sum."""

    name: str
    """a name of `mmalign list rewards`, or your own as 'package.module:Class'"""
    weight: float = 1.0
    """factor of this reward in the weighted sum"""
    options: dict[str, Any] = Field(default_factory=dict)
    """what the reward itself takes"""


class BudgetConfig(StrictModel):
    """What a training may cost: it ends with the update that reaches the one limit given."""

    images: int | None = Field(None, ge=1)
    """images seen: through the denoiser, forward or backward each counting one"""
    seconds: float | None = Field(None, gt=0, allow_inf_nan=False)
    """wall time of training, without looks and saving"""
    reward_calls: int | None = Field(None, ge=1)
    """images scored by the rewards that are learned from"""

    @model_validator(mode="after")
    def _one_limit(self) -> BudgetConfig:
        given = self.model_dump(exclude_none=True)
        if len(given) != 1:
            raise ValueError(
                f"given {', '.join(given) or 'no limit'}; give exactly one of images, seconds, reward_calls"
            )
        return self


class TrainerConfig(StrictModel):
    """The training loop."""

    steps: int = Field(1000, ge=1)
    """optimiser steps"""
    budget: BudgetConfig | None = None
    """ends the training earlier than `steps`; null: no budget"""
    batch_size: int = Field(8, ge=1)
    """samples of one forward pass on one device (a pair is one sample)"""
    gradient_accumulation: int = Field(1, ge=1)
    """forward passes per optimiser step"""
    learning_rate: float = Field(1e-4, gt=0)
    """peak of the schedule"""
    optimizer: Literal["adamw"] = "adamw"
    """AdamW of torch"""
    weight_decay: float = Field(0.01, ge=0)
    """decoupled weight decay"""
    betas: tuple[float, float] = (0.9, 0.999)
    """decay of AdamW's two running means"""
    max_grad_norm: float = Field(1.0, gt=0)
    """gradients are scaled down to this norm"""
    warmup: float = Field(0.1, ge=0)
    """rising part of the schedule: a fraction of `steps` if below 1, else a number of steps"""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """course of the learning rate after the warm-up"""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """autocast of the forward pass; trained weights stay fp32"""
    seed: int = Field(0, ge=0)
    """the one seed that every random draw derives from"""
    ema: float | None = Field(None, gt=0, lt=1)
    """decay of a running mean of the trained weights, which is then what is evaluated and saved"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, about a third slower"""
    checkpoint_every: int = Field(500, ge=1)
    """steps between two checkpoints; the end is always saved"""
    keep_checkpoints: int = Field(2, ge=1)
    """older checkpoints are deleted"""
    log_every: int = Field(10, ge=1)
    """steps between two lines of metrics"""
    trackers: list[str] = []
    """where metrics go besides metrics.jsonl: names of accelerate's trackers, such as tensorboard, wandb or trackio"""
    tracker_project: str = Field("mmalign", min_length=1)
    """the project that trackers file the run under"""
    tracker_run: str | None = Field(None, min_length=1)
    """what trackers call the run; null: the name of the output's folder"""

    @field_validator("trackers")
    @classmethod
    def _known_trackers(cls, names: list[str]) -> list[str]:
        if not names:
            return names
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS  # torch comes with it, and few recipes name a tracker

        for name in names:
            if name not in LOGGER_TYPE_TO_CLASS:
                known = sorted(LOGGER_TYPE_TO_CLASS)
                raise ValueError(f"given the text '{name}'; allowed: {', '.join(known)}{did_you_mean(name, known)}")
        return names

    @model_serializer(mode="wrap")
    def _without_idle_fields(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        idle = () if self.trackers else ("tracker_project", "tracker_run")
        return {key: value for key, value in write(self).items() if key not in idle}


class EarlyStop(StrictModel):
    """Stop when a held-out reward rises no more, and export the weights of its best look."""

    reward: str
    """one of `evaluate.rewards`, best one that is not trained on; with `evaluate.questions`: accuracy"""
    patience: int = Field(3, ge=1)
    """looks in a row that are no better than the best before the run stops"""


class EvaluateConfig(StrictModel):
    """A look at a few fixed prompts and seeds, or questions, while training."""

    prompts: str | None = None
    """for models that draw: a built-in name of `mmalign list prompts`, or a file"""
    questions: str | None = None
    """for models that answer: a folder that `mmalign shapes videos` wrote, or TempCompass's with its videos"""
    every: int = Field(ge=1)
    """steps between two looks; step 0 is always looked at"""
    rewards: list[str] = []
    """rewards to report; only beside `prompts`"""
    limit: int = Field(8, ge=1)
    """how many of the prompts, from the first on, or of the questions, spread over all"""
    steps: int = Field(20, ge=1)
    """sampling steps; only beside `prompts`"""
    guidance: Guidance = 7.5
    """classifier-free guidance scale, 1: none; only beside `prompts`"""
    max_new_tokens: int = Field(32, ge=1)
    """longest answer; only beside `questions`"""
    early_stop: EarlyStop | None = None
    """stop when one of the rewards rises no more; null: train to the end"""

    @model_validator(mode="after")
    def _stops_by_what_it_sees(self) -> EvaluateConfig:
        seen = ["accuracy"] if self.questions is not None else self.rewards
        if self.early_stop is not None and self.early_stop.reward not in seen:
            place = "evaluate.rewards" if self.questions is None else "what questions report"
            fix = "add it there" if self.questions is None else "name that"
            raise ValueError(
                f"early_stop.reward '{self.early_stop.reward}' is not among {place} ({', '.join(seen)}); {fix}"
            )
        return self

    def _idle_fields(self) -> tuple[str, ...]:
        """What says nothing about a look of this kind, and is left out where it is written down."""
        return (
            ("questions", "max_new_tokens") if self.questions is None else ("prompts", "rewards", "steps", "guidance")
        )

    @model_serializer(mode="wrap")
    def _without_idle_fields(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in write(self).items() if key not in self._idle_fields()}


class MonitorConfig(StrictModel):
    """What an online run is watched for (docs/guides/monitors.md); a threshold of null switches its alarm off."""

    action: Literal["off", "warn", "stop"] = "warn"
    """off: nothing is measured; warn: an alarm is a sentence on the terminal; stop: and ends the run"""
    patience: int = Field(3, ge=1)
    """lines of metrics (or looks) in a row beyond a threshold that raise its alarm"""
    baseline: int = Field(3, ge=1)
    """first lines of metrics, whose median is the start that later ones are compared with"""
    held_out_drop: Positive | None = 0.2
    """fall of a held-out reward below its best while the training reward is up, in standard deviations over prompts"""
    memorising_share: Share | None = 0.25
    """least share of the training reward's gain that the same reward must gain on held-out prompts"""
    diversity_drop: Share | None = 0.5
    """loss of the distance between images of one prompt, as a share of its start"""
    saturation_rise: Share | None = 0.2
    """rise of the share of channel values that are black or white"""
    high_frequency_growth: Growth | None = 2.0
    """factor by which the share of energy at high spatial frequencies grows"""
    ratio_growth: Growth | None = 5.0
    """growth of the importance ratio's largest |log| over its last ten lines; the KL is allowed the square of it"""
    ratio_limit: Positive | None = 1.0
    """largest |log| of an importance ratio, whatever it was before"""
    kl_limit: Positive | None = None
    """largest distance to the reference, in the method's own units"""


class RoundsConfig(StrictModel):
    """Iterated training: sample with the tuned model, label by rewards, train again."""

    count: int = Field(ge=1)
    """how often"""
    prompts: str
    """a built-in name of `mmalign list prompts`, or a file"""
    reward: str
    """what labels the images, as for `mmalign pairs label`: NAME or NAME,OTHER:0.5"""
    limit: int | None = Field(None, ge=1)
    """use only the first prompts"""
    images_per_prompt: int = Field(4, ge=2)
    """images drawn of each prompt; the best and the worst make a pair"""
    steps: int = Field(50, ge=1)
    """sampling steps"""
    guidance: Guidance = 7.5
    """classifier-free guidance scale; 1: none"""
    solver: Literal["ddim", "dpm++"] = "ddim"
    """sampler"""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """type of the weights while sampling"""
    batch_size: int = Field(8, ge=1)
    """images at once while sampling"""
    real: str | None = None
    """good images, as `data.labels` takes them, mixed into the chosen ones of every round; null: none"""
    real_share: float = Field(0.5, gt=0, lt=1)
    """share of a round's images that are real, where `real` is given"""
