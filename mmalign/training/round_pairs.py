"""The data of a round: samples of the present model, pairs made of them by rewards, and real ones mixed in."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.core.errors import UserError
from mmalign.core.files import write_atomically
from mmalign.core.progress import note, track
from mmalign.core.resources import resolve_model
from mmalign.core.seeds import derive_seed
from mmalign.training.family import flow_options
from mmalign.training.recipe import build_method

if TYPE_CHECKING:
    from mmalign.config.run import RunConfig
    from mmalign.data.labels import LabelTable
    from mmalign.scoring.agreement import Share
    from mmalign.scoring.choice import Choice, WeightedReward

PAIRS_FILE, MIXED_FILE, AGREEMENT_FILE = "pairs.parquet", "mixed.parquet", "agreement.json"
_PAIRS_KEY = {"pairs": "pairs", "images": "pairs", "labels": "labels"}
"""Source of a method's data -> the key of `data` for a round's pairs."""


class RoundData:
    """Makes the data of one round after another, each in a folder of its own; what is finished there is kept."""

    def __init__(self, config: RunConfig) -> None:
        """Check prompts and rewards, and read the real samples, before anything is sampled.

        Raises:
            UserError, RewardError: the prompts, a reward or the real samples cannot be used.
        """
        from mmalign.data.labels import read_labels
        from mmalign.data.prompts import load_prompts

        assert config.rounds is not None
        self.config, self.rounds = config, config.rounds
        self.prompts = load_prompts(self.rounds.prompts, self.rounds.limit)
        self.choices = self._check(self.rounds.reward, "reward")
        self.trusted = self._check(self.rounds.trusted, "trusted") if self.rounds.trusted else []
        unfiltered = config.data.model_copy(update={"min_margin": None})  # which is of the rounds' own pairs
        self.real = read_labels(self.rounds.real, unfiltered, good_only=True) if self.rounds.real else None
        if self.real is not None and not math.isnan(self.real[0].fps[0]):
            raise UserError(
                f"rounds.real {self.rounds.real}: states rates of its videos, which do not go with them into a round; "
                "give files that hold their rates, such as MP4, without the columns of rates"
            )

    def sample(self, model: str, folder: Path, number: int) -> Path:
        """Complete the samples of a round and return their file; `model` is a directory, an adapter's or a Hub id."""
        from mmalign.data.building.sampling import IMAGES_FILE, SampleSettings, sample_images
        from pipelines import fingerprint_model, load_generator

        rounds, config, path = self.rounds, self.config, resolve_model(model)
        flow, video = flow_options(config, path), config.video.options() if config.video else None
        settings = SampleSettings(
            model=model,
            fingerprint=fingerprint_model(path, resolve=resolve_model),
            steps=rounds.steps,
            guidance=rounds.guidance,
            solver=rounds.solver,
            precision=rounds.precision,
            seed=derive_seed(config.trainer.seed, "round", number),
            flow=None if flow is None else flow.sampling,
            video=None if video is None else video.sampling,
        )

        def open_generator() -> Any:
            return load_generator(path, dtype=rounds.precision, resolve=resolve_model, flow=flow, video=video)

        sample_images(
            open_generator,
            self.prompts,
            folder / "samples",
            settings,
            images_per_prompt=rounds.images_per_prompt,
            batch_size=rounds.batch_size,
        )
        return folder / "samples" / IMAGES_FILE

    def label(self, samples: Path, folder: Path) -> Path:
        """Complete the pairs of a round and return their file."""
        from mmalign.core.io.parquet import open_parquet, read_metadata
        from mmalign.scoring.labelling import LabelSettings, label_pictures
        from mmalign.scoring.pictures import sampled_pictures

        pairs, rounds = folder / PAIRS_FILE, self.rounds
        labelling = LabelSettings(mode="votes" if rounds.votes else "best-worst", seed=self.config.trainer.seed)
        sampling, count = read_metadata(samples).get("settings", {}), open_parquet(samples).metadata.num_rows
        told: dict[str, Any] = {"sampling": {key: one for key, one in sampling.items() if one is not None}}
        told |= {"samples": count, **self._choice_of(self.choices)}
        # By names, not labels: `compare` finds here what a model was trained on.
        told["rewards"] = [{"name": one.name, "weight": _weight(one)} for one in self.choices]
        if pairs.is_file():
            _check_same(
                {"samples": count, **read_metadata(pairs)},
                {"labelling": asdict(labelling), **told},
                pairs,
            )
            return pairs
        rewards = self._load(self.choices)
        with track(count, "label") as job:
            counts = label_pictures(
                sampled_pictures(samples),
                rewards,
                pairs,
                labelling,
                source=str(samples),
                metadata=told,
                progress=job.advance,
            )
        note(str(counts))
        return pairs

    def data(self, pairs: Path, folder: Path, number: int) -> dict[str, Any]:
        """Return the keys of `data` that a round learns by: its pairs, or the file with real samples mixed in."""
        source = build_method(self.config).needs.source
        if self.real is None:
            return {_PAIRS_KEY[source]: str(pairs)}
        mixed = str(_mix(self.config, self.real, pairs, folder, number))
        # The pairs were filtered before, and the real ones have no scores.
        return {"pairs" if source == "pairs" else "labels": mixed, "min_margin": None, "limit": None}

    def agreement(self, pairs: Path, folder: Path) -> Share:
        """Return how many of a round's pairs the trusted rewards order alike, and write it beside them."""
        from mmalign.core.io.parquet import read_metadata
        from mmalign.data.pairs import read_pairs
        from mmalign.scoring.agreement import Share, share_in_order

        file, rounds = folder / AGREEMENT_FILE, self.rounds
        table = read_pairs(str(pairs), self.config.data)
        of: dict[str, Any] = {"trusted": rounds.trusted, "pairs": len(table), "made": read_metadata(pairs)}
        of |= self._choice_of(self.trusted)
        if file.is_file() and (found := json.loads(file.read_text(encoding="utf-8")))["of"] == of:
            return Share(found["agreement"], found["scored"])
        with track(2 * len(table), "check") as job:
            share = share_in_order(table, self._load(self.trusted), progress=job.advance)
        if not share.pairs:
            raise UserError(f"rounds.trusted {rounds.trusted}: scores none of the pairs of {pairs}; choose another")
        written = {"agreement": share.value, "standard_error": share.standard_error, "scored": share.pairs, "of": of}
        write_atomically(file, json.dumps(written, indent=1) + "\n")
        return share

    def _check(self, text: str, key: str) -> list[Choice]:
        from mmalign.scoring.checks import check_reward
        from mmalign.scoring.chosen import read_choices
        from rewards import reward_class

        choices, modality = read_choices(text), self.config.modality
        for choice in choices:
            on_frames = (reward_class(choice.name).modality, modality) == ("image", "video")
            if on_frames and self.rounds.frames is None:
                raise UserError(
                    f"rounds.{key}: '{choice.name}' scores images, and the section video trains a video model; give "
                    "rounds.frames, the number of frames of each video that it scores, or a video reward"
                )
            if (
                on_frames
                and self.rounds.votes
                and key == "reward"
                and getattr(reward_class(choice.name), "compares_pairs", False)
            ):
                raise UserError(
                    f"rounds.votes: '{choice.name}' compares images, not videos; remove votes to score frames"
                )
            judged = "image" if on_frames else modality
            check_reward(choice.name, choice.options, [one.text for one in self.prompts], judged)
        return choices

    def _choice_of(self, choices: list[Choice]) -> dict[str, Any]:
        """Return what labels and their names do not say of rewards: frames, classes and options."""
        chosen = {
            one.label: {"name": one.name, **one.options} for one in choices if one.options or one.name != one.label
        }
        frames = {} if self.rounds.frames is None else {"frames": self.rounds.frames}
        return frames | ({"choices": json.loads(json.dumps(chosen, default=str))} if chosen else {})

    def _load(self, choices: list[Choice]) -> list[WeightedReward]:
        from mmalign.scoring.choice import WeightedReward
        from rewards import load_reward
        from rewards.combining.on_frames import on_frames

        def load(choice: Choice) -> Any:
            reward = load_reward(choice.name, **choice.options)
            return on_frames(reward, None if reward.modality == self.config.modality else self.rounds.frames)

        return [WeightedReward(one.label, _weight(one), load(one)) for one in choices]


def _check_same(found: dict[str, Any], asked: dict[str, Any], pairs: Path) -> None:
    """Refuse pairs that were labelled otherwise: models may have been trained on them, and would be kept.

    Raises:
        UserError: see above.
    """
    different = [key for key in sorted({*found, *asked}) if found.get(key) != asked.get(key)]
    if different:
        raise UserError(
            f"{pairs} was made with other settings ({', '.join(different)}); choose another output, start again with "
            "--resume never, or go back to them"
        )


def _weight(choice: Choice) -> float:
    return 1.0 if choice.weight is None else choice.weight


def _mix(config: RunConfig, real: LabelTable, pairs: Path, folder: Path, number: int) -> Path:
    """Write a round's pairs, or their chosen images, with the share of real ones, and return the file."""
    from mmalign.core.io.parquet import read_metadata
    from mmalign.data.building.mixing import mix_real, mix_real_pairs
    from mmalign.data.labels import read_labels
    from mmalign.data.pairs import read_pairs

    assert config.rounds is not None
    mixed, share, seed = (
        folder / MIXED_FILE,
        config.rounds.real_share,
        derive_seed(config.trainer.seed, "real", number),
    )
    made: dict[str, Any] = {"seed": seed, "metadata": {"rewards": read_metadata(pairs)["rewards"]}}
    if build_method(config).needs.source == "pairs":
        table = read_pairs(str(pairs), config.data)
        count = mix_real_pairs(table, real, share, mixed, **made)
        note(f"{len(table)} pairs and {count} real ones: {mixed}")
        return mixed
    own = read_labels(str(pairs), config.data, good_only=True)
    count = mix_real(own, real, share, mixed, **made)
    note(f"{len(own)} chosen ones and {count} real ones: {mixed}")
    return mixed
