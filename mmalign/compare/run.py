"""Compare systems fairly: same prompts, same seeds, every reward, paired intervals, one report.

    <output>/report.html, results.json, summary.csv, scores.csv, images/<system>/<prompt>-<seed>.png
    <output>/images/<system>-seed<k>/   those of the further training seeds, if there are several
    <output>/videos/        instead of images, of video models: <system>/<prompt>-<seed>.mkv, lossless
    <output>/config.yaml    this comparison, to run it again
    <output>/control/       the guidance sweep on the validation prompts, if there is a guidance control
    <output>/cache/         scores by image content

Systems that are trained here lie in their configs' output. A second run trains, generates and scores only what is new.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from mmalign.compare.config import (
    CompareConfig,
    GuidanceControl,
    RewardEntry,
    load_compare_config,
    make_compare_config,
)
from mmalign.compare.images.diversity import check_diversity, measure_diversity
from mmalign.compare.images.draw import ModelHolder, draw_system
from mmalign.compare.images.guidance_control import control_prompts, run_control
from mmalign.compare.images.made import MadeImages, match_images
from mmalign.compare.images.media import IMAGES, ImageMedia, check_entry, find_media
from mmalign.compare.images.open_attributes import count_open_attributes
from mmalign.compare.images.scoring import score_all
from mmalign.compare.images.store import Images, ImageStore
from mmalign.compare.results.comparison import Comparison
from mmalign.compare.results.results import build_results
from mmalign.compare.results.training_seeds import gather_scores, merge_systems, replica_names
from mmalign.compare.shared import Outcome, check_config, described, train_and_read, write_outcome
from mmalign.compare.systems.config import Replica, SystemConfig
from mmalign.compare.systems.facts import SystemFacts, read_system
from mmalign.core.errors import UserError, did_you_mean
from mmalign.core.lock import locked_output
from mmalign.core.progress import note
from mmalign.data.prompts import Prompt, load_prompts

__all__ = [
    "CompareConfig",
    "GuidanceControl",
    "Outcome",
    "RewardEntry",
    "SystemConfig",
    "compare",
    "load_compare_config",
    "make_compare_config",
]


def compare(config: CompareConfig, *, train: bool = True, retrain: bool = False) -> Outcome:
    """Generate, score and compare the images, or videos, of all systems of `config`, and write report, results and
    scores into its output.

    Systems that the config trains are trained first, unless they are there already; for `train` and `retrain` see
    `mmalign.compare.systems.training.train_systems`.

    Raises:
        UserError, PipelineError, RewardError: a model, reward or prompt set is not what the config takes it for, or
            another process writes into the output.
    """
    with locked_output(Path(config.output), "output"):
        comparison = measure(config, train=train, retrain=retrain)
        return write_outcome(comparison, build_results(comparison), config)


def measure(config: CompareConfig, *, train: bool = True, retrain: bool = False) -> Comparison:
    """Train, generate and score, and return the measurements; see `compare`."""
    check_config(config)
    prompts = load_prompts(config.prompts, config.limit)
    _check_category(config, prompts)
    media, texts = find_media(config), [prompt.text for prompt in prompts]
    if media is not IMAGES and any(prompt.first_frame is not None for prompt in prompts):
        note(f"{config.prompts}: systems are given the texts alone, not the first frames")
    for reward in config.rewards:
        check_entry(reward, texts, media)
    if config.diversity is not None:
        check_diversity(config.diversity, media)
    validation = control_prompts(config, media)
    made = {
        one.name: match_images(one.made, texts, config.seeds, media) for one in config.systems if one.made is not None
    }
    facts = train_and_read(config, partial(_read, config, made), train=train, retrain=retrain)
    systems, replicas = merge_systems(config, facts)
    models = ModelHolder(config)
    sweep = None
    if config.guidance_control is not None:
        baseline = facts[config.baseline_name]
        control, sweep = run_control(config, config.guidance_control, baseline, validation, prompts, models, media)
        systems = _insert_after(systems, baseline.name, control)
        facts[control.name] = control
    stores = _draw(config, facts, prompts, models, media, made)
    models.close()
    names, cache = replica_names([*systems], replicas), Path(config.output) / "cache"
    ordered = {name: stores[name] for held in names.values() for name in held}
    sizes = ("image_size",) if media is IMAGES else ("image_size", "video")
    scores, rewards = score_all(config.rewards, ordered, cache)
    if config.diversity is not None:
        entry = config.diversity.named("diversity")
        scores[entry.title], rewards[entry.title] = measure_diversity(entry, ordered, cache)
    return Comparison(
        prompts=prompts,
        seeds=config.seeds,
        systems=systems,
        replicas=replicas,
        rewards=rewards,
        scores=gather_scores(scores, names),
        image_paths={
            name: [[stores[name].path(i, seed) for seed in config.seeds] for i in range(len(prompts))]
            for name in systems
        },
        sweep=sweep,
        category_apart=config.category_apart,
        open_counts=count_open_attributes(ordered, names) if config.open_attributes and media is IMAGES else {},
        modality=media.modality,
        **described(config, "prompts", "limit", "steps", "guidance", "solver", *sizes),
    )


def _check_category(config: CompareConfig, prompts: list[Prompt]) -> None:
    found = [*dict.fromkeys(prompt.category for prompt in prompts if prompt.category)]
    if config.category_apart is not None and config.category_apart not in found:
        listed = f"it has {', '.join(found)}" if found else "it has none"
        hint = did_you_mean(config.category_apart, found)
        raise UserError(f"category_apart: {config.prompts} has no category '{config.category_apart}'; {listed}{hint}")


def _read(config: CompareConfig, made: Mapping[str, MadeImages], replica: Replica, model: str) -> SystemFacts:
    system, name = replica.system, replica.name
    if name in made:
        return made[name].facts(name, model, system.trained_on)
    guidance = config.guidance if system.guidance is None else system.guidance
    facts = read_system(name, model, guidance, system.trained_on, system.adapter_scale)
    if facts.remark and name == system.name:
        note(f"{name}: {facts.remark}; state it as trained_on if it was one of the rewards compared")
    return facts


def _draw(
    config: CompareConfig,
    facts: dict[str, SystemFacts],
    prompts: list[Prompt],
    models: ModelHolder,
    media: ImageMedia,
    made: Mapping[str, MadeImages],
) -> dict[str, Images]:
    """Complete the images, or videos, of all systems."""
    drawn: dict[str, ImageStore] = {}
    for name in sorted(facts, key=lambda name: name != config.baseline_name):  # the control copies from the baseline
        if name in made:
            continue
        source = drawn.get(config.baseline_name) if facts[name].control else None
        folder = Path(config.output) / f"{media.modality}s"
        drawn[name] = draw_system(config, facts[name], prompts, folder, models, media, source)
    return {**made, **drawn}


def _insert_after(systems: dict[str, SystemFacts], name: str, new: SystemFacts) -> dict[str, SystemFacts]:
    """Return the systems with `new` right after `name`, as tables show it."""
    ordered = {}
    for key, facts in systems.items():
        ordered[key] = facts
        if key == name:
            ordered[new.name] = new
    return ordered
