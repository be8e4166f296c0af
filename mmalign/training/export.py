"""Write a finished run's model, and read it back as any user would to prove that it is the one that was trained."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from mmalign.core.precision import autocast, round_frozen
from mmalign.core.progress import note
from mmalign.training.checkpoint import as_disk_full
from mmalign.training.model_card import write_card
from mmalign.training.models import answers, base_model_name, open_model
from mmalign.training.prepare import Prepared
from pipelines.conditioning import Conditioning
from pipelines.sampling import seeded_noise
from pipelines.vlm.batch import VlmSample

if TYPE_CHECKING:
    from mmalign.config.run import RunConfig


def export(
    config: RunConfig, parts: Prepared, weights: AbstractContextManager[None], facts: dict[str, Any]
) -> tuple[Probe | VlmProbe, torch.Tensor]:
    """Write the model, in the context `weights`, and its card; return an input and what the model makes of it."""
    run, output = parts.run, Path(config.output)
    with weights:
        probe = VlmProbe(first_sample(parts)) if answers(config) else make_probe(parts)
        with run.autocast():
            expected = probe.predict(run.generator)
        try:
            write_weights(run.generator, config, output, base_model_name(config))
        except Exception as error:
            raise as_disk_full(error, f"writing the model to {output}") from error
    write_card(config, output, {parts.method.needs.source: len(parts.feed.samples), **facts})
    return probe, expected


def verify(config: RunConfig, probe: Probe | VlmProbe, expected: torch.Tensor, device: torch.device) -> None:
    """Read the export back as any user would and check that it is the model that was trained."""

    def load(path: str) -> Any:
        generator = open_model(config, path, device)
        round_frozen(generator.network, config.trainer.precision)
        return generator

    with autocast(config.trainer.precision, device):
        check_load_back(Path(config.output), load, probe, expected)
    note(f"the model is in {config.output}")


def make_probe(parts: Prepared) -> Probe:
    """Return noise at the middle of the noise schedule with the data's first prompt."""
    batch = next(parts.feed.micro_batches(0))
    process, generator = parts.run.process, parts.run.generator
    middle = process.num_train_timesteps // 2
    t = process.sample_timesteps(1, low=middle, high=middle + 1).to(generator.device)
    noise = seeded_noise([0], generator.latent_shape, device=generator.device)
    return Probe(noise, t, batch.cond[:1])


def first_sample(parts: Prepared) -> VlmSample:
    """Return a sample of the data, prompt, media and answer, for a vision-language model."""
    sample: VlmSample = next(parts.feed.micro_batches(0)).chosen[0]
    return sample


class ExportError(RuntimeError):
    """The exported weights, read again, do not give what the trained model gave."""


@dataclass
class Probe:
    """One input of the network, by which an exported model is compared with the trained one."""

    x_t: Float[Tensor, "1 *latent"]
    t: Shaped[Tensor, " 1"]
    cond: Conditioning

    @torch.no_grad()
    def predict(self, generator: Any) -> Float[Tensor, "1 *latent"]:
        """Return the network's output in float32 arithmetic, dropout off, on the CPU."""
        training = generator.network.training
        generator.network.eval()
        output = generator.predict(self.x_t, self.t, self.cond).float().cpu()
        generator.network.train(training)
        return output


@dataclass
class VlmProbe:
    """One sample of a vision-language model, for the same purpose."""

    sample: VlmSample

    @torch.no_grad()
    def predict(self, model: Any) -> Float[Tensor, "1 tokens vocabulary"]:
        """Return the logits of every token of the answer, on the CPU."""
        logits: Tensor = model.completion_logits(model.collate([self.sample])).float().cpu()
        return logits


def write_weights(generator: Any, config: RunConfig, output: Path, base_model: str) -> None:
    """Write the weights as they are now: an adapter for LoRA, else a diffusers or transformers directory."""
    output.mkdir(parents=True, exist_ok=True)
    if config.adapter.kind == "lora":
        generator.save_lora(output, base_model=base_model)
    else:
        generator.save(output)


def check_load_back(
    output: Path,
    load: Callable[[str], Any],
    probe: Probe | VlmProbe,
    expected: Tensor,
    tolerance: float = 1e-4,
) -> None:
    """Load the export as any user would and compare one prediction with that of the trained model.

    Raises:
        ExportError: they differ by more than the tolerance times the largest value (at least 1).
    """
    found = probe.predict(load(str(output)))
    difference = (found - expected).abs().max().item()
    allowed = tolerance * max(1.0, expected.abs().max().item())
    if not difference <= allowed:
        raise ExportError(
            f"{output} was written, but read again it predicts something else (largest difference {difference:.2g}, "
            f"allowed {allowed:.2g}); the last checkpoint in {output / 'checkpoints'} is sound, please report this"
        )
