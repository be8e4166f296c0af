"""Training image generators: diffusers models that learn from image pairs, labelled images or their own samples."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from mmalign.config.run import RunConfig
from mmalign.core.progress import note, track
from mmalign.core.resources import resolve_model
from mmalign.data.encoded.cache import CachedSides, build_pair_cache
from mmalign.data.encoded.first_frames import starts_from_image
from mmalign.data.encoded.label_cache import build_label_cache
from mmalign.data.encoded.prompt_cache import build_prompt_cache
from mmalign.data.labels import LabelTable, read_labels
from mmalign.data.pairs import PairTable, read_pairs
from mmalign.data.prompts import Prompt, load_prompts
from mmalign.data.sampler import BatchSampler, Samples
from mmalign.methods.base import Method
from mmalign.methods.reference import Reference
from mmalign.methods.run import BaseRun, Run
from mmalign.scoring.checks import check_reward
from mmalign.training.family import check_family, check_process, flow_options
from mmalign.training.image_evaluation import ImageEvaluation, check_evaluation
from mmalign.training.recipe import data_id
from mmalign.training.tasks.base import CardFacts, Source, Task
from pipelines import Generator, load_generator, seeded_noise
from pipelines.conditioning import Conditioning


@dataclass
class ImageProbe:
    """Noise at one level with one prompt."""

    x_t: Float[Tensor, "1 *latent"]
    t: Shaped[Tensor, " 1"]
    cond: Conditioning

    @torch.no_grad()
    def predict(self, model: Generator) -> Float[Tensor, "1 *latent"]:
        """Return the network's output."""
        training = model.network.training
        model.network.eval()
        output = model.predict(self.x_t, self.t, self.cond).float().cpu()
        model.network.train(training)
        return output


class ImageTask(Task[Generator]):
    """See the module."""

    unit = "images"
    card = CardFacts(
        library="diffusers",
        pipeline_tag="text-to-image",
        all_weights="all weights of the denoiser",
        evaluation="Means over a few fixed prompts and seeds",
    )

    def check(self, config: RunConfig) -> None:
        """Check the model's family, and the prompts and rewards of the evaluation."""
        if Path(resolve_model(config.model)).is_dir():  # that of a hub id is checked when it is fetched
            check_family(config)
        if config.evaluate:
            check_evaluation(config.evaluate, config.modality)

    def open_source(self, config: RunConfig, method: Method[Any]) -> Source:
        """Return prompts, labelled images or pairs, as the method needs."""
        if method.needs.source == "prompts":
            prompts = load_prompts(str(config.data.prompts), limit=config.data.limit)
            texts = [prompt.text for prompt in prompts]
            for reward in config.rewards:
                judged = "image" if reward.frames else config.modality
                grouped = method.images_per_sample > 1 and not reward.frames
                check_reward(reward.name, reward.options, texts, judged, grouped=grouped)
            note(f"{config.data.prompts}: {len(prompts)} prompts")
            return prompts
        if method.needs.source in ("labels", "images"):
            given = config.data.labels or config.data.pairs
            labels = read_labels(str(given), config.data, good_only=method.needs.source == "images")
            note(f"{given}: {labels.counts}")
            return labels
        pairs = read_pairs(str(config.data.pairs), config.data)
        note(f"{config.data.pairs}: {pairs.counts}")
        if pairs.weighed:
            taken = "takes the" if method.weighs_pairs else "all pairs count alike: it takes no"
            note(f"{config.data.pairs}: method '{method.name}': {taken} weights or segments of the pairs")
        return pairs

    def load_model(self, config: RunConfig, path: str, device: Any) -> Generator:
        """Return the generator; its encoders are loaded when they are first used."""
        check_family(config)
        return load_generator(
            path,
            dtype="float32",
            device=device,
            attention=config.attention,
            resolve=resolve_model,
            flow=flow_options(config, path),
            video=None if config.video is None else config.video.options(),
        )

    def model_id(self, model: Generator) -> str:
        """Return the fingerprint of the diffusers directory."""
        return model.model_id

    def check_model(self, method: Method[Any], model: Generator) -> None:
        """Check the method and its options against the noise process; prints the family's conventions."""
        check_process(method, model.process, model.name_or_path)
        if line := model.describe():
            note(line)

    def encode(
        self,
        source: PairTable | LabelTable | list[Prompt],
        model: Generator,
        config: RunConfig,
        accelerator: Any,
        model_id: str,
    ) -> tuple[Samples, str]:
        """Encode images and prompts once, in the cache."""
        with accelerator.main_process_first():
            if isinstance(source, list):
                prompts = build_prompt_cache(source, model, config.data)
                return prompts, hashlib.blake2b(repr(prompts.facts()).encode(), digest_size=16).hexdigest()
            labels = isinstance(source, LabelTable)
            with track(len(source), "encode", unit="images" if labels else "pairs") as job:
                build: Any = build_label_cache if labels else build_pair_cache
                samples: CachedSides = build(source, model, config.data, progress=job.advance)
            return samples, data_id(source, samples)  # type: ignore[return-value]

    def evaluator(self, config: RunConfig, model: Generator) -> ImageEvaluation | None:
        """Return the evaluator, which samples and scores fixed prompts; it encodes the prompts now."""
        if config.evaluate is None:
            return None
        starts = starts_from_image(model, config.data)
        return ImageEvaluation(config.evaluate, model, config.trainer.seed, first_frames=starts)

    def free_encoders(self, model: Generator, method: Method[Any]) -> tuple[str, ...]:
        """Drop text encoders and, unless the method decodes its own samples, the autoencoder."""
        model.unconditional()  # encoded for guidance before the text encoders are freed
        kept = model.vae_names if method.needs.source == "prompts" else ()
        model.free_encoders(keep=kept)
        return kept

    def set_mode(self, model: Generator) -> None:
        """Switch the network to training mode."""
        model.network.train()

    def make_run(self, model: Generator, **parts: Any) -> BaseRun[Generator]:
        """Return a `Run`."""
        return Run(model, **parts)

    def counted(self, model: Generator, reference: Reference | None) -> list[nn.Module]:
        """Return the denoiser and, where it is a copy, the reference's."""
        frozen = [] if reference is None or reference.frozen is None else [reference.frozen]
        return [model.network, *frozen]

    def probe(self, run: BaseRun[Generator], sampler: BatchSampler) -> ImageProbe:
        """Return noise at the middle of the noise schedule with the data's first prompt."""
        batch = next(sampler.micro_batches(0))
        process = run.model.process
        middle = process.num_train_timesteps // 2
        t = process.sample_timesteps(1, low=middle, high=middle + 1).to(run.model.device)
        noise = seeded_noise([0], run.model.latent_shape, device=run.model.device)
        return ImageProbe(noise, t, batch.cond[:1])

    def usage(self, base: str, output: Path, *, lora: bool) -> Sequence[str]:
        """Load by diffusers alone."""
        return [
            "from diffusers import DiffusionPipeline",
            "",
            f'pipe = DiffusionPipeline.from_pretrained("{base if lora else output}")',
            *([f'pipe.load_lora_weights("{output}")'] if lora else []),
            'image = pipe("a prompt").images[0]',
        ]
