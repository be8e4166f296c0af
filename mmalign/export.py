"""Write a finished run's model, and read it back as any user would to prove that it is the one that was trained."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mmalign import hub
from mmalign.checkpoint import as_disk_full
from mmalign.core.precision import autocast, round_frozen
from mmalign.core.progress import note
from mmalign.models import answers, base_model_name, open_model
from mmalign.prepare import Prepared
from pipelines.sampling import seeded_noise
from pipelines.vlm_batch import VlmSample

if TYPE_CHECKING:
    from mmalign.config.run import RunConfig


def export(
    config: RunConfig, parts: Prepared, weights: AbstractContextManager[None], facts: dict[str, Any]
) -> tuple[hub.Probe | hub.VlmProbe, torch.Tensor]:
    """Write the model, in the context `weights`, and its card; return an input and what the model makes of it."""
    run, output = parts.run, Path(config.output)
    with weights:
        probe = hub.VlmProbe(first_sample(parts)) if answers(config) else make_probe(parts)
        with run.autocast():
            expected = probe.predict(run.generator)
        try:
            hub.export(run.generator, config, output, base_model_name(config))
        except Exception as error:
            raise as_disk_full(error, f"writing the model to {output}") from error
    hub.write_card(config, output, {parts.method.needs.source: len(parts.feed.samples), **facts})
    return probe, expected


def verify(config: RunConfig, probe: hub.Probe | hub.VlmProbe, expected: torch.Tensor, device: torch.device) -> None:
    """Read the export back as any user would and check that it is the model that was trained."""

    def load(path: str) -> Any:
        generator = open_model(config, path, device)
        round_frozen(generator.network, config.trainer.precision)
        return generator

    with autocast(config.trainer.precision, device):
        hub.check_load_back(Path(config.output), load, probe, expected)
    note(f"the model is in {config.output}")


def make_probe(parts: Prepared) -> hub.Probe:
    """Return noise at the middle of the noise schedule with the data's first prompt."""
    batch = next(parts.feed.micro_batches(0))
    process, generator = parts.run.process, parts.run.generator
    middle = process.num_train_timesteps // 2
    t = process.sample_timesteps(1, low=middle, high=middle + 1).to(generator.device)
    noise = seeded_noise([0], generator.latent_shape, device=generator.device)
    return hub.Probe(noise, t, batch.cond[:1])


def first_sample(parts: Prepared) -> VlmSample:
    """Return a sample of the data, prompt, media and answer, for a vision-language model."""
    sample: VlmSample = next(parts.feed.micro_batches(0)).chosen[0]
    return sample
