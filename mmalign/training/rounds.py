"""Iterated training: the tuned model samples images, rewards label them, and the next training learns from the pairs.

Round 1 starts from `model`, every later one from the export of the round before; the reference of a round is its
starting model. Finished parts are kept: the same call again resumes the interrupted round at its interrupted part.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.config.run import dump_config
from mmalign.core.files import write_atomically
from mmalign.core.progress import note, track
from mmalign.core.resources import resolve_model
from mmalign.core.seeds import derive_seed
from mmalign.training.chain import check_chain, train_once
from mmalign.training.family import check_family, flow_options
from mmalign.training.models import whole_model
from mmalign.training.output import CONFIG_FILE
from mmalign.training.recipe import build_method, set_aside

if TYPE_CHECKING:
    from mmalign.config.run import RunConfig
    from mmalign.config.sections import RoundsConfig
    from mmalign.data.labels import LabelTable

FOLDER = "rounds"
PAIRS_FILE, MIXED_FILE = "pairs.parquet", "mixed.parquet"
_PAIRS_KEY = {"pairs": "pairs", "images": "pairs", "labels": "labels"}
"""Source of a method's data -> the key of `data` for a round's pairs."""


def describe_rounds(rounds: RoundsConfig) -> str:
    """Return a description of a round's data in one line."""
    limit = f" (the first {rounds.limit})" if rounds.limit else ""
    return (
        f"{rounds.count} rounds, each from {rounds.images_per_prompt} images of the prompts {rounds.prompts}{limit}, "
        f"labelled by {rounds.reward}"
        + (f", {100 * rounds.real_share:g} % of the training images real ({rounds.real})" if rounds.real else "")
    )


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
    check_family(config)
    if resume == "never":
        set_aside(output / FOLDER)
    note(describe_rounds(rounds))
    model, real = config.model, _read_real(config, rounds)
    for number in range(1, rounds.count + 1):
        folder = output / FOLDER / str(number)
        note(f"── round {number} of {rounds.count}, from {model}")
        data = {_PAIRS_KEY[build_method(config).needs.source]: str(_make_pairs(config, rounds, model, folder, number))}
        if real is not None:
            data = {"labels": str(_mix(config, rounds, real, folder, number))}
        last = number == rounds.count
        place = output if last else folder / "model"
        learned = config.data.model_copy(update=data)
        one = config.model_copy(update={"rounds": None, "model": model, "data": learned, "output": str(place)})
        trained = train_once(one, resume if last else "auto")
        if not last:
            model = str(whole_model(config, trained, folder / "merged"))
    write_atomically(output / FOLDER / CONFIG_FILE, dump_config(config))
    return output


def _make_pairs(config: RunConfig, rounds: RoundsConfig, model: str, folder: Path, number: int) -> Path:
    """Complete the samples and the pairs of a round, and return the file of pairs."""
    from mmalign.core.io.parquet import open_parquet, read_metadata
    from mmalign.data.building.sampling import IMAGES_FILE, SampleSettings, sample_images
    from mmalign.data.prompts import load_prompts
    from mmalign.scoring.chosen import load_weighted_rewards, parse_rewards
    from mmalign.scoring.labelling import LabelSettings, label_pairs
    from mmalign.scoring.pictures import sampled_prompts
    from pipelines import fingerprint_model, load_generator

    weights, path = parse_rewards(rounds.reward), resolve_model(model)
    flow = flow_options(config, path)
    settings = SampleSettings(
        model=model,
        fingerprint=fingerprint_model(path, resolve=resolve_model),
        steps=rounds.steps,
        guidance=rounds.guidance,
        solver=rounds.solver,
        precision=rounds.precision,
        seed=derive_seed(config.trainer.seed, "round", number),
        flow=None if flow is None else flow.sampling,
    )

    def open_generator() -> Any:
        return load_generator(path, dtype=rounds.precision, resolve=resolve_model, flow=flow)

    prompts = load_prompts(rounds.prompts, rounds.limit)
    samples, pairs = folder / "samples", folder / PAIRS_FILE
    sample_images(
        open_generator,
        prompts,
        samples,
        settings,
        images_per_prompt=rounds.images_per_prompt,
        batch_size=rounds.batch_size,
    )
    images, labelling = samples / IMAGES_FILE, LabelSettings(seed=config.trainer.seed)
    made_from = {
        "rewards": [{"name": name, "weight": weight} for name, weight in weights.items()],
        "labelling": asdict(labelling),
        "sampling": {key: value for key, value in asdict(settings).items() if value is not None},
    }
    if pairs.is_file() and read_metadata(pairs) == made_from:
        return pairs
    rewards = load_weighted_rewards(weights, sampled_prompts(images))
    with track(open_parquet(images).metadata.num_rows, "label") as job:
        note(str(label_pairs(images, rewards, pairs, labelling, progress=job.advance)))
    return pairs


def _read_real(config: RunConfig, rounds: RoundsConfig) -> LabelTable | None:
    """Return the real images that are mixed in, read before the first round rather than after its sampling."""
    from mmalign.data.labels import read_labels

    return read_labels(rounds.real, config.data, good_only=True) if rounds.real else None


def _mix(config: RunConfig, rounds: RoundsConfig, real: LabelTable, folder: Path, number: int) -> Path:
    """Write the chosen images of a round's pairs with the share of real ones, and return the file."""
    from mmalign.core.io.parquet import read_metadata
    from mmalign.data.building.mixing import mix_real
    from mmalign.data.labels import read_labels

    pairs, mixed = folder / PAIRS_FILE, folder / MIXED_FILE
    own, seed = read_labels(str(pairs), config.data, good_only=True), derive_seed(config.trainer.seed, "real", number)
    rewards = {"rewards": read_metadata(pairs)["rewards"]}
    count = mix_real(own, real, rounds.real_share, mixed, seed=seed, metadata=rewards)
    note(f"{len(own)} chosen images and {count} real ones: {mixed}")
    return mixed
