"""The sections of a training run's configuration, and the base of every schema; `mmalign.config.run` joins them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from mmalign.core.errors import UserError, did_you_mean
from mmalign.core.files import check_names


class StrictModel(BaseModel):
    """Base of every configuration: unknown keys are errors, `1` is no text and `"1"` no number; frozen once read.

    A key that gets another name is declared in `renamed`, old name -> new name; the old one is then still read.
    """

    renamed: ClassVar[Mapping[str, str]] = {}
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


def _check_output(path: str) -> str:
    if not path.strip():
        raise ValueError("the path is empty; name a folder")
    try:
        check_names(Path(path), "given")
    except UserError as error:
        raise ValueError(str(error)) from None
    return path


Output = Annotated[str, AfterValidator(_check_output)]
"""A folder that is written to; empty text is not the working directory."""
Guidance = Annotated[float, Field(ge=0)]
"""A scale of classifier-free guidance; 1: none, 0: without the prompt."""
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1, le=1_000_000_000)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
Growth = Annotated[float, Field(gt=1)]


class ColumnsConfig(StrictModel):
    """Which columns of a table hold what, where their names do not say it; the others are found by their names.

    A pair is a row with `chosen` and `rejected`, or a row with two images and a label each; or it is made of two rows
    with one image each, of the same prompt and a different `rank` or `score`.
    """

    prompt: str | None = None
    """the prompt"""
    chosen: str | None = None
    """the preferred image"""
    rejected: str | None = None
    """the other image"""
    image_0: str | None = None
    """the first image; `label_0` and `label_1` say which one is preferred"""
    image_1: str | None = None
    """the second image"""
    label_0: str | None = None
    """how much the first image is preferred; the larger label wins, equal ones are a tie"""
    label_1: str | None = None
    """how much the second image is preferred"""
    score_0: str | None = None
    """the score of the first, or chosen, image; margins are made of both scores"""
    score_1: str | None = None
    """the score of the other"""
    image: str | None = None
    """the only image of a row; rows of one prompt make pairs"""
    rank: str | None = None
    """its place among the images of its prompt; lower is better"""
    score: str | None = None
    """its rating; higher is better, a list counts as its mean"""
    group: str | None = None
    """what the rows to compare have in common besides their prompt, such as a prompt's id"""
    category: str | None = None
    """the category of the prompt"""
    id: str | None = None
    """the id of the pair"""

    @model_validator(mode="after")
    def _one_kind_of_row(self) -> ColumnsConfig:
        for both in (("chosen", "rejected"), *((f"{kind}_0", f"{kind}_1") for kind in ("image", "label", "score"))):
            if [getattr(self, name) for name in both].count(None) == 1:
                raise ValueError(f"{' and '.join(both)} belong together; give both or neither")
        given = [name for name in ("chosen", "image_0", "image") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other; keep one")
        if self.rank is not None and self.score is not None:
            raise ValueError("rank and score exclude each other; keep one")
        if self.image is not None and self.rank is None and self.score is None:
            raise ValueError("image needs rank or score, the column by which images of one prompt are compared")
        return self

    @model_serializer(mode="wrap")
    def _given_alone(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in write(self).items() if value is not None}


class DataConfig(StrictModel):
    """The training data: exactly one of `pairs`, `labels` and `prompts`."""

    pairs: str | None = None
    """preference pairs (or, for methods that learn from good images, the chosen ones): a table, a folder, a tar, a
    glob or several of them with commas, or a hub id `organisation/name[@revision][:[config/]split]`; pairs of answers:
    a CSV, JSONL, parquet or TSV file"""
    prompts: str | None = None
    """prompts of an online method: a built-in name or a CSV, TSV, JSONL or TXT file"""
    labels: str | None = None
    """single images, each good or bad: a parquet, JSONL, CSV or TSV file; or pairs (chosen good, rejected bad)"""
    caption_column: str = "caption"
    """the column that holds the prompt"""
    columns: ColumnsConfig | None = None
    """which columns of the pairs hold what, {chosen: good_image, ...}; null: known by their names"""
    default_prompt: str | None = None
    """prompt of images in folders and tars that have none of their own; null: that is an error"""
    streaming: bool = False
    """read a data set of the hub over the network as it is needed, without downloading it first"""
    axis: str | None = None
    """which of several judgements counts: VQ, MQ, TA or Overall of VideoAlign, or a rating of VideoFeedback such as
    'dynamic degree' (null: the mean of all)"""
    ties: Literal["drop", "keep"] = "drop"
    """pairs without a winner: dropped and counted, or kept"""
    min_margin: float | None = Field(None, ge=0)
    """drop pairs whose scores differ by less than this"""
    rarity: float | None = Field(None, ge=0)
    """exponent by which pairs of rare scores weigh more, 0.72 in VideoDPO (`mmalign.data.rarity`); null: all alike"""
    limit: Count | None = None
    """read no more than this many"""
    resolution: int | None = Field(None, ge=8, le=16_384, multiple_of=8)
    """edge in pixels that images are resized and cropped to; null: the resolution of the model"""
    crop: Literal["center", "random"] = "center"
    """which part of an image that is not square is kept, the same for both sides of a pair"""
    flip: bool = False
    """mirror half of the pairs, both sides alike; not for prompts that mention left or right"""
    caption_dropout: float = Field(0.0, ge=0, lt=1)
    """share of samples trained on the empty prompt, for classifier-free guidance"""
    frames: Count | None = None
    """frames taken of each video, spread evenly over it; only for vision-language models; null: all"""
    fps: float | None = Field(None, gt=0)
    """frames taken of each second of a video, instead of `frames`"""
    first_frame: bool | None = None
    """give the model the image that each video starts from: that of the column first_frame of a pair, else the first
    frame of its videos, which must then agree; null: where the model makes no videos without (image to video)"""
    on_bad: Literal["error", "skip"] = "error"
    """rows whose media cannot be read or encoded: error ends the run; skip names, counts and leaves them out (of pairs
    of answers, the next one takes its place)"""
    cache: str | None = None
    """folder for encoded and precomputed data; null: ~/.cache/mmalign"""

    @model_validator(mode="after")
    def _one_way_of_sampling(self) -> DataConfig:
        if self.frames is not None and self.fps is not None:
            raise ValueError("frames and fps exclude each other; keep one")
        return self

    @field_validator("pairs", mode="before")
    @classmethod
    def _joined(cls, given: Any) -> Any:
        # A list of files is written as one text, the form that the command line gives.
        return ",".join(given) if isinstance(given, list) and all(isinstance(one, str) for one in given) else given

    @model_validator(mode="after")
    def _one_name_of_the_prompt(self) -> DataConfig:
        if self.columns is not None and self.columns.prompt is not None and self.caption_column != "caption":
            raise ValueError("caption_column and columns.prompt both name the prompt; keep one")
        return self

    @model_serializer(mode="wrap")
    def _without_idle_fields(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # The record of a training leaves out keys that it does not use: those of videos, those of unusual sources.
        idle: dict[str, Any] = {"frames": None, "fps": None, "on_bad": "error"}
        idle |= {"columns": None, "default_prompt": None, "streaming": False, "axis": None, "rarity": None}
        idle |= {"first_frame": None}
        return {key: value for key, value in write(self).items() if key not in idle or value != idle[key]}


class AdapterConfig(StrictModel):
    """Which weights are trained: a low-rank adapter, or all weights."""

    kind: Literal["lora", "full"] = "lora"
    """lora: small matrices beside frozen weights; full: all weights (of an image model: all of the denoiser)"""
    rank: int = Field(16, ge=1, le=65_536)
    """rank of the LoRA matrices"""
    alpha: float | None = Field(None, gt=0, le=1e6)
    """the LoRA scale times the rank; null: equal to the rank"""
    targets: list[Annotated[str, Field(min_length=1)]] | None = Field(None, min_length=1)
    """names of layers with LoRA matrices, or of a family's groups (AnimateDiff: motion, image); null: attention
    projections, or all linear layers of a language model"""
    init: Literal["gaussian", "kaiming"] | None = None
    """how A starts (B is 0): gaussian, with a standard deviation of 1/rank, as in published scripts for image models;
    kaiming, uniform within 1/sqrt(inputs), peft's default, as in those for language models; null: by the kind"""
    start: str | None = Field(None, min_length=1)
    """a LoRA file or directory to train on from; it gives rank, alpha and targets, and the reference is the start"""

    @model_validator(mode="after")
    def _one_shape(self) -> AdapterConfig:
        own = ("rank", "alpha", "targets", "init")
        given = sorted(name for name in own if name in self.model_fields_set and getattr(self, name))
        if self.start is not None and given:
            raise ValueError(f"start gives rank, alpha, targets and init; remove {', '.join(given)}, or start")
        return self

    @model_serializer(mode="wrap")
    def _without_idle_fields(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Reading `kind: full` beside a rank is an error, so the resolved config must not hold the unused default.
        if self.kind == "full":
            return {"kind": "full"}
        return {"kind": "lora", "start": self.start} if self.start else write(self)


class RewardConfig(StrictModel):
    """One reward and its weight in the sum."""

    name: str
    """a name of `mmalign list rewards`, or your own as 'package.module:Class'"""
    weight: float = 1.0
    """factor of this reward in the weighted sum"""
    options: dict[str, Any] = Field(default_factory=dict)
    """options of the reward itself"""
    frames: Count | None = None
    """for an image reward on a video model: the mean over so many frames, spread evenly; it does not see motion"""

    @model_serializer(mode="wrap")
    def _without_idle_fields(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in write(self).items() if key != "frames" or value is not None}


class BudgetConfig(StrictModel):
    """What a training may cost: training ends with the update that reaches the given limit."""

    images: Count | None = None
    """images through the denoiser, where a forward and a backward pass count one each"""
    seconds: float | None = Field(None, gt=0)
    """wall time of training, without evaluation and saving"""
    reward_calls: Count | None = None
    """images scored by the rewards of the training"""

    @model_validator(mode="after")
    def _one_limit(self) -> BudgetConfig:
        given = self.model_dump(exclude_none=True)
        if len(given) != 1:
            raise ValueError(
                f"given {', '.join(given) or 'no limit'}; give exactly one of images, seconds, reward_calls"
            )
        return self


def check_tracker_names(names: list[str]) -> list[str]:
    """Return names of trackers.

    Raises:
        ValueError: accelerate knows none of that name.
    """
    if not names:
        return names
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS  # torch comes with it, and few recipes name a tracker

    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = sorted(LOGGER_TYPE_TO_CLASS)
            raise ValueError(f"given the text '{name}'; allowed: {', '.join(known)}{did_you_mean(name, known)}")
    return names


class TrainerConfig(StrictModel):
    """The training loop."""

    steps: Count = 1000
    """optimiser steps"""
    budget: BudgetConfig | None = None
    """limit on the cost, which can end training before `steps`; null: no budget"""
    batch_size: Count = 8
    """samples per forward pass and device (a pair is one sample)"""
    gradient_accumulation: Count = 1
    """forward passes per optimiser step"""
    learning_rate: float = Field(1e-4, gt=0, le=1e3)
    """peak learning rate of the schedule"""
    optimizer: Literal["adamw"] = "adamw"
    """AdamW of torch"""
    weight_decay: float = Field(0.01, ge=0, le=1e6)
    """decoupled weight decay"""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """decay rates of AdamW's two moving averages"""
    max_grad_norm: float = Field(1.0, gt=0)
    """gradients with a larger norm are scaled down to this norm"""
    warmup: float = Field(0.1, ge=0, le=1e9)
    """warm-up of the learning rate: a fraction of `steps` if below 1, else a number of steps"""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """learning rate schedule after the warm-up"""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """autocast of the forward pass; trained weights stay fp32"""
    seed: int = Field(0, ge=0, lt=2**63)
    """seed from which all random draws are derived"""
    ema: float | None = Field(None, gt=0, lt=1)
    """decay of an exponential moving average of the weights, which is then evaluated and exported; null: none"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, about a third slower"""
    checkpoint_every: Count = 500
    """steps between two checkpoints; the last step is always saved"""
    keep_checkpoints: Count = 2
    """number of checkpoints to keep; older ones are deleted"""
    log_every: Count = 10
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
        return check_tracker_names(names)

    @model_serializer(mode="wrap")
    def _without_idle_fields(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        idle = () if self.trackers else ("tracker_project", "tracker_run")
        return {key: value for key, value in write(self).items() if key not in idle}


class EarlyStop(StrictModel):
    """Stop when a held-out reward no longer improves, and export the weights of its best evaluation."""

    reward: str
    """one of `evaluate.rewards`, preferably one that is not trained on; with `evaluate.questions`: accuracy"""
    patience: Count = 3
    """consecutive evaluations without improvement over the best before the run stops"""


class EvaluateConfig(StrictModel):
    """Evaluation on a few fixed prompts and seeds, or on questions, while training."""

    prompts: str | None = None
    """for generators: a built-in name of `mmalign list prompts`, or a file"""
    questions: str | None = None
    """for vision-language models: a folder written by `mmalign shapes videos`, or TempCompass's with its videos"""
    every: Count
    """steps between two evaluations; step 0 is always evaluated"""
    rewards: list[str] = []
    """rewards to report; only with `prompts`"""
    frames: Count | None = None
    """for image rewards on a video model: their mean over so many frames of each video, spread evenly"""
    limit: Count = 8
    """number of prompts (the first ones), or of questions (spread evenly over all)"""
    steps: Count = 20
    """sampling steps; only with `prompts`"""
    guidance: Guidance = 7.5
    """classifier-free guidance scale, 1: none; only with `prompts`"""
    max_new_tokens: Count = 32
    """longest answer in tokens; only with `questions`"""
    early_stop: EarlyStop | None = None
    """stop when one of the rewards no longer improves; null: train to the end"""

    @model_validator(mode="after")
    def _stops_by_what_it_sees(self) -> EvaluateConfig:
        seen = ["accuracy"] if self.questions is not None else self.rewards
        if self.early_stop is not None and self.early_stop.reward not in seen:
            place = "evaluate.rewards" if self.questions is None else "the metrics of evaluate.questions"
            fix = "add it there" if self.questions is None else "give accuracy"
            raise ValueError(
                f"early_stop.reward '{self.early_stop.reward}' is not among {place} ({', '.join(seen)}); {fix}"
            )
        return self

    def _idle_fields(self) -> tuple[str, ...]:
        """Return the keys that this kind of evaluation does not use; they are left out of the dumped config."""
        frames = ("frames",) if self.frames is None else ()
        if self.questions is None:
            return ("questions", "max_new_tokens", *frames)
        return ("prompts", "rewards", "steps", "guidance", *frames)

    @model_serializer(mode="wrap")
    def _without_idle_fields(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in write(self).items() if key not in self._idle_fields()}


class MonitorConfig(StrictModel):
    """Alarms on the metrics of an online run (docs/guides/monitors.md); a threshold of null switches its alarm off."""

    action: Literal["off", "warn", "stop"] = "warn"
    """off: nothing is measured; warn: an alarm prints a message; stop: an alarm also ends the run"""
    patience: Count = 3
    """consecutive lines of metrics (or evaluations) beyond a threshold that raise its alarm"""
    baseline: Count = 3
    """number of first lines of metrics, whose median later lines are compared with"""
    held_out_drop: Positive | None = 0.2
    """drop of a held-out reward below its best while the training reward rises, in standard deviations over prompts"""
    memorising_share: Share | None = 0.25
    """smallest allowed ratio of the reward's gain on held-out prompts to its gain on training prompts"""
    diversity_drop: Share | None = 0.5
    """drop of the distance between images of one prompt, as a share of its baseline"""
    collapse_drop: Share | None = 0.4
    """drop of the entropy of the kinds of images, over all prompts or for one, as a share of its baseline"""
    motion_drop: Share | None = 0.5
    """drop of the difference between neighbouring frames of videos, as a share of its baseline"""
    saturation_rise: Share | None = 0.2
    """increase of the share of channel values that are black or white"""
    high_frequency_growth: Growth | None = 2.0
    """factor by which the share of energy at high spatial frequencies grows"""
    dark_rise: Share | None = 0.3
    """increase of the share of pixels that are dark"""
    grid_rise: Positive | None = 0.5
    """increase of how much stronger edges are on the lines of a grid than between them"""
    ratio_growth: Growth | None = 5.0
    """growth factor of the largest |log importance ratio| over its last ten lines; that of the KL is its square"""
    ratio_limit: Positive | None = 1.0
    """largest allowed |log importance ratio|, whatever its earlier values"""
    kl_limit: Positive | None = None
    """largest allowed distance to the reference, in the method's own units"""
