"""Iterated training: the tuned model draws samples, rewards label them, and the next training learns from the pairs.

Round 1 starts from `model`, every later one from the result of the round before. The reference of a round is its
starting model, or that of round 1. Finished parts are kept: the same call again resumes the interrupted round at its
interrupted part.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mmalign.config.run import dump_config
from mmalign.config.sections import AdapterConfig
from mmalign.core.files import write_atomically
from mmalign.core.progress import note
from mmalign.training.accelerator import make_accelerator
from mmalign.training.chain import check_chain, train_once
from mmalign.training.family import check_family
from mmalign.training.models import whole_model
from mmalign.training.output import CHECKPOINTS, CONFIG_FILE
from mmalign.training.prepare import check
from mmalign.training.recipe import build_method, set_aside
from mmalign.training.round_pairs import RoundData

if TYPE_CHECKING:
    from mmalign.config.run import RunConfig

FOLDER = "rounds"
ROUNDING = 1e-9
"""Of a difference of shares: a fall by exactly `trusted_drop` is allowed."""


class _Start(NamedTuple):
    """What a round samples from, and the keys of the recipe by which its training starts from that."""

    model: str
    recipe: dict[str, Any]


def describe_rounds(config: RunConfig) -> str:
    """Return a description of a round's data in one line."""
    rounds = config.rounds
    assert rounds is not None
    limit, media = f" (the first {rounds.limit})" if rounds.limit else "", f"{config.modality}s"
    compared = " in comparisons with each other" if rounds.votes else ""
    return (
        f"{rounds.count} rounds, each from {rounds.images_per_prompt} {media} of the prompts {rounds.prompts}{limit}, "
        f"labelled by {rounds.reward}{compared}"
        + (", reference: that of the first round" if rounds.reference == "base" else "")
        + (f", {100 * rounds.real_share:g} % of the training {media} real ({rounds.real})" if rounds.real else "")
    )


def check_rounds(config: RunConfig) -> RoundData:
    """Check what can be checked before anything is sampled or a weight is read, and return what makes the data.

    Raises:
        UserError, RewardError: the model, the reference, prompts, rewards or real samples cannot be used.
    """
    method = build_method(config)
    check_family(config)
    check(config, method, make_accelerator(config, watched=False).device)
    return RoundData(config)


def train_in_rounds(config: RunConfig, resume: str = "auto") -> Path:
    """Train `config.rounds.count` times and return the folder of the last model, `config.output`.

    Earlier rounds, and the samples and pairs of all, lie in `rounds/N` within it; `rounds/config.yaml`, written last,
    is the whole recipe. `resume` is "auto" or "never".

    Raises:
        UserError: the configuration cannot work; and the errors of `mmalign.training.train.train`.
    """
    rounds, output = config.rounds, Path(config.output)
    assert rounds is not None
    check_chain(resume, "rounds", "sample and label")
    data = check_rounds(config)
    if resume == "never":
        set_aside(output / FOLDER)
    note(describe_rounds(config))
    start, first = _Start(config.model, {}), None
    for number in range(1, rounds.count + 1):
        folder = output / FOLDER / str(number)
        note(f"── round {number} of {rounds.count}, from {start.model}")
        pairs = data.label(data.sample(start.model, folder, number), folder)
        if rounds.trusted:
            share = data.agreement(pairs, folder)
            first = share.value if first is None else first
            note(
                f"{rounds.trusted} orders {100 * share.value:.1f} % (standard error {100 * share.standard_error:.1f}) "
                f"of {share.pairs} pairs as {rounds.reward}"
            )
            if first - share.value > rounds.trusted_drop + ROUNDING:
                note(
                    f"stopped before the training of round {number}: that is {100 * (first - share.value):.1f} points "
                    f"below round 1, and rounds.trusted_drop allows {100 * rounds.trusted_drop:g}; the output is the "
                    f"model of round {number - 1}"
                )
                _keep(output / FOLDER / str(number - 1) / "model", output)
                break
        last = number == rounds.count
        learned = config.data.model_copy(update=data.data(pairs, folder, number))
        place = {"rounds": None, "data": learned, "output": str(output if last else folder / "model")}
        trained = train_once(config.model_copy(update={**place, **start.recipe}), resume if last else "auto")
        if not last:
            start = _start_after(config, trained, folder)
    write_atomically(output / FOLDER / CONFIG_FILE, dump_config(config))
    return output


def _start_after(config: RunConfig, trained: Path, folder: Path) -> _Start:
    """Return how the next round starts.

    Where its reference is the first model, a LoRA is trained on, and is switched off for the reference; otherwise it
    is merged, and a fresh one starts from zero.
    """
    assert config.rounds is not None
    if config.rounds.reference == "previous":
        model = str(whole_model(config, trained, folder / "merged"))
        return _Start(model, {"model": model})
    fixed = {"reference": config.model}
    if config.adapter.kind == "lora":
        return _Start(str(trained), {**fixed, "adapter": AdapterConfig(start=str(trained))})
    return _Start(str(trained), {**fixed, "model": str(trained)})


def _keep(trained: Path, output: Path) -> None:
    """Copy what a finished round exported and recorded, without its checkpoints, to the output."""
    shutil.copytree(trained, output, dirs_exist_ok=True, ignore=shutil.ignore_patterns(CHECKPOINTS, ".*"))
