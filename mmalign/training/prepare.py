"""From a configuration to the parts of a run, in the order that spares memory: check, encode, free encoders, adapt.

Everything that can be known to fail fails here, the cheap checks before the first weight is read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.core.errors import UserError
from mmalign.core.files import check_output
from mmalign.core.precision import autocast, check_precision
from mmalign.core.progress import note, track
from mmalign.core.resources import resolve_model
from mmalign.data.feed import Feed
from mmalign.methods.base import Method
from mmalign.methods.reference import Reference
from mmalign.methods.run import Run
from mmalign.scoring.checks import check_reward
from mmalign.scoring.choice import WeightedReward
from mmalign.training.early_stopping import Best
from mmalign.training.models import EXPORTS, answers, content_id, load_model, make_trainable
from mmalign.training.monitors import Monitors
from mmalign.training.plan import check_enough
from mmalign.training.recipe import build_method, data_id
from mmalign.training.validation import Validation, check_evaluation
from mmalign.training.vlm_validation import Questioning, choose_questions

if TYPE_CHECKING:
    from mmalign.config.run import RunConfig
    from mmalign.data.encoded.cache import CachedImages
    from mmalign.data.labels import LabelTable
    from mmalign.data.pairs import PairTable
    from mmalign.data.vlm_pairs import VlmPairTable

    Source = PairTable | LabelTable | VlmPairTable | list[str]


@dataclass
class Prepared:
    """The parts of a run, ready for the loop."""

    method: Method[Any]
    run: Run
    feed: Feed
    validation: Validation | Questioning | None
    data_id: str
    """Identifies what is learned from: ids, prompts and images on either side, not the path."""
    model_id: str
    """Identifies the model that training starts from by its content."""

    def make_monitors(self, config: RunConfig) -> Monitors | None:
        """Return what watches the samples of a method that makes its own."""
        if self.method.needs.source != "prompts":
            return None
        looked_at = self.validation.rewards if isinstance(self.validation, Validation) else {}
        # What is learned with a negative weight is meant to fall.
        lower = {name for name, reward in looked_at.items() if not reward.higher_is_better}
        lower ^= {one.name for one in config.rewards if one.weight < 0}
        return Monitors(config.monitors, [one.name for one in config.rewards], lower_is_better=lower)

    def make_best(self, parameters: dict[str, Any]) -> Best | None:
        """Return what keeps the best weights, if the looks are to stop the run early."""
        if self.validation is None or self.validation.config.early_stop is None:
            return None
        stop = self.validation.config.early_stop
        return Best(parameters, stop.reward, stop.patience, self.validation.higher_is_better(stop.reward))


def check(config: RunConfig, method: Method[Any], device: Any) -> None:
    """Refuse what cannot work, before any weight is read.

    Raises:
        UserError: names the key and the fix.
    """
    if config.trainer.steps % method.updates_per_round:
        raise UserError(
            f"trainer.steps {config.trainer.steps} must be a multiple of method.updates_per_round "
            f"{method.updates_per_round}: a round of samples is used up before the run ends"
        )
    output = Path(config.output)
    check_output(output, "output")
    if config.data.cache:
        check_output(Path(config.data.cache).expanduser(), "data.cache")
    check_precision(config.trainer.precision, device)
    resolve_model(config.model)
    if config.evaluate and answers(config):
        choose_questions(config.evaluate)
    elif config.evaluate:
        check_evaluation(config.evaluate)
    other = EXPORTS["answers" if answers(config) else "draws", "full" if config.adapter.kind == "lora" else "lora"]
    if (output / other).exists():
        raise UserError(
            f"output {output} holds {other} of a run with another adapter.kind; choose another output or remove it"
        )


def open_source(config: RunConfig, method: Method[Any]) -> Source:
    """Return what is learned from, not yet encoded: the table of pairs or labels or the prompts; prints the counts."""
    from mmalign.data.labels import read_labels
    from mmalign.data.pairs import read_pairs
    from mmalign.data.prompts import load_prompts
    from mmalign.data.vlm_pairs import read_vlm_pairs

    if method.needs.source == "prompts":
        prompts = [prompt.text for prompt in load_prompts(str(config.data.prompts), limit=config.data.limit)]
        for reward in config.rewards:
            check_reward(reward.name, reward.options, prompts)
        note(f"{config.data.prompts}: {len(prompts)} prompts")
        return prompts
    if method.needs.source in ("labels", "images"):
        given = config.data.labels or config.data.pairs
        labels = read_labels(str(given), config.data, good_only=method.needs.source == "images")
        note(f"{given}: {labels.counts}")
        return labels
    if answers(config):
        answered = read_vlm_pairs(str(config.data.pairs), config.data, method.stages)
        note(f"{config.data.pairs}: {answered.counts}")
        return answered
    pairs = read_pairs(str(config.data.pairs), config.data)
    note(f"{config.data.pairs}: {pairs.counts}")
    return pairs


def open_inputs(config: RunConfig, accelerator: Any) -> tuple[Method[Any], Source, Any]:
    """Check the recipe, cheapest things first, and return method, what it learns from, and generator."""
    method = build_method(config)
    check(config, method, accelerator.device)
    source = open_source(config, method)
    method.check_data(source)
    check_enough(len(source), config, accelerator.num_processes, method.needs.source)
    generator = load_model(config, accelerator.device)
    if not answers(config):
        method.check(generator.process)
    return method, source, generator


def prepare(config: RunConfig, accelerator: Any) -> Prepared:
    """Return the parts of the run; prints what was read and left out."""
    method, source, generator = open_inputs(config, accelerator)
    model_id = content_id(config, generator)  # now, since encoding may take hours in which the files can change
    samples, content = encode(source, generator, config, accelerator, model_id)
    validation = make_validation(config, generator)
    kept: Collection[str] = ()
    if not answers(config):
        generator.unconditional()  # what guidance needs, encoded while the text encoders are there
        kept = generator.vae_names if method.needs.source == "prompts" else ()
        generator.free_encoders(keep=kept)
    rewards = load_rewards(config, accelerator.device)
    make_trainable(generator, config)
    cast = partial(autocast, config.trainer.precision, accelerator.device)
    reference = None
    if method.keeps_reference:
        reference = Reference(
            generator,
            "adapter" if config.adapter.kind == "lora" else "copy",
            precision=config.trainer.precision,
            autocast=cast,
        )
    run = Run(
        generator,
        seed=config.trainer.seed,
        reference=reference,
        rewards=rewards,
        autocast=cast,
        kept=kept,
        samples=samples,
    )
    frozen = [] if reference is None or reference.frozen is None else [reference.frozen]
    for module in [generator.scored] if answers(config) else [generator.network, *frozen]:
        run.cost.watch(module)
    with accelerator.main_process_first():
        method.begin(run)
    feed = Feed(
        samples,
        batch_size=config.trainer.batch_size,
        accumulation=config.trainer.gradient_accumulation,
        seed=config.trainer.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        device=accelerator.device,
    )
    return Prepared(method, run, feed, validation, content, model_id)


def make_validation(config: RunConfig, generator: Any) -> Validation | Questioning | None:
    """Return what looks at the model while it is trained, if anything is to."""
    if config.evaluate is None:
        return None
    if answers(config):
        return Questioning(config.evaluate, config.data)
    return Validation(config.evaluate, generator, config.trainer.seed)


def load_rewards(config: RunConfig, device: Any) -> list[WeightedReward]:
    """Load the rewards that the method learns from."""
    from rewards import load_reward

    return [
        WeightedReward(one.name, one.weight, load_reward(one.name, **{"device": device, **one.options}))
        for one in config.rewards
    ]


def encode(source: Source, generator: Any, config: RunConfig, accelerator: Any, model_id: str) -> tuple[Any, str]:
    """Return what is learned from, encoded, and an identifier of its content.

    On several ranks the first encodes and the others read what it wrote.
    """
    from mmalign.data.encoded.vlm_samples import VlmPairs
    from mmalign.data.vlm_pairs import VlmPairTable

    if isinstance(source, VlmPairTable):
        pairs = VlmPairs(
            source,
            generator,
            config.data,
            model_id=model_id,
            precision=config.trainer.precision,
            batch_size=config.trainer.batch_size,
        )
        return pairs, pairs.data_id
    from mmalign.data.encoded.cache import build_pair_cache
    from mmalign.data.encoded.label_cache import build_label_cache
    from mmalign.data.encoded.prompt_cache import build_prompt_cache
    from mmalign.data.labels import LabelTable

    with accelerator.main_process_first():
        if isinstance(source, list):
            prompts = build_prompt_cache(source, generator, config.data)
            return prompts, hashlib.blake2b(repr(source).encode(), digest_size=16).hexdigest()
        samples: CachedImages
        if isinstance(source, LabelTable):
            with track(len(source), "encode", unit="images") as job:
                samples = build_label_cache(source, generator, config.data, progress=job.advance)
        else:
            with track(len(source), "encode", unit="pairs") as job:
                samples = build_pair_cache(source, generator, config.data, progress=job.advance)
        return samples, data_id(source, samples)
