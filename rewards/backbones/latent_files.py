"""The directory of a latent reward: all parts that score pixels or noisy latents, as JSON and safetensors.

latent_reward.json      format, classes of the parts, guidance, features, image size, what it was made from
model.safetensors       the trained network: half a UNet, text encoders, projections, logit scale
unet/ text_encoder*/    their configurations alone
vae/ scheduler/ tokenizer*/     as in the diffusers directory of the generator
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from rewards.backbones.latent_network import LatentNetwork, cut_in_half
from rewards.backbones.truncation import Truncation
from rewards.backbones.weights import load_state, read_state
from rewards.errors import RewardError

RECORD, WEIGHTS, FORMAT = "latent_reward.json", "model.safetensors", 1


@dataclass
class LatentParts:
    """The network, the parts that are not trained, and the record of the training (`record`)."""

    network: LatentNetwork
    vae: Any
    scheduler: Any
    tokenizers: list[Any]
    record: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Prepare to count the prompts that are too long."""
        self.truncation = Truncation("latent", min(one.model_max_length for one in self.tokenizers))

    def tokens(self, prompts: list[str]) -> list[Int[Tensor, "prompts length"]]:
        """Return token ids for each text encoder, padded and cut to its length; cuts are counted and warned of."""
        first = self.tokenizers[0]
        self.truncation.note(prompts, [len(ids) for ids in first(prompts, verbose=False)["input_ids"]])
        device = self.network.logit_scale.device
        return [
            tokenizer(
                prompts,
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            )["input_ids"].to(device)
            for tokenizer in self.tokenizers
        ]

    def save(self, folder: str | Path) -> None:
        """Write the directory, each part atomically; the record, which marks it as complete, comes last."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        network = self.network
        scratch = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
        try:
            state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
            save_file(state, scratch / WEIGHTS)
            network.unet.save_config(scratch / "unet")
            self.vae.save_pretrained(scratch / "vae", safe_serialization=True)
            self.scheduler.save_pretrained(scratch / "scheduler")
            encoders: list[Any] = list(network.text_encoders)
            for suffix, encoder, tokenizer in zip(("", "_2"), encoders, self.tokenizers, strict=False):
                encoder.config.save_pretrained(scratch / f"text_encoder{suffix}")
                tokenizer.save_pretrained(scratch / f"tokenizer{suffix}")
            classes = {"vae": self.vae, "scheduler": self.scheduler}
            classes |= dict(zip(("text_encoder", "text_encoder_2"), encoders, strict=False))
            classes |= dict(zip(("tokenizer", "tokenizer_2"), self.tokenizers, strict=False))
            record = {
                "format": FORMAT,
                "classes": {name: type(part).__name__ for name, part in classes.items()},
                "guidance": network.guidance,
                "features": network.text_projection.out_features,
                "image_size": network.image_size,
                **self.record,
            }
            (scratch / RECORD).write_text(json.dumps(record, indent=2) + "\n")
            for part in sorted(scratch.iterdir(), key=lambda path: path.name == RECORD):
                if part.is_dir():
                    shutil.rmtree(folder / part.name, ignore_errors=True)
                os.replace(part, folder / part.name)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    @classmethod
    def load(cls, folder: str | PathLike[str]) -> LatentParts:
        """Read the directory that `save` wrote, on the CPU in float32.

        Raises:
            RewardError: the directory does not exist, is incomplete, or has another format.
        """
        folder = Path(folder)
        record = read_record(folder)
        classes = record["classes"]
        encoders = [name for name in classes if name.startswith("text_encoder")]
        try:
            network = LatentNetwork(
                _empty_unet(folder / "unet"),
                [_empty_text_encoder(folder / name, classes[name]) for name in encoders],
                image_size=record["image_size"],
                guidance=record["guidance"],
                features=record["features"],
            )
            others = {name: _load(folder, name, kind) for name, kind in classes.items() if name not in encoders}
        except (OSError, ValueError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise RewardError(f"latent: {folder} is incomplete ({reason}); train it again") from error
        load_state(network, read_state(folder / WEIGHTS), folder / WEIGHTS)
        tokenizers = [part for name, part in others.items() if name.startswith("tokenizer")]
        return cls(network, others["vae"], others["scheduler"], tokenizers, record)


def read_record(folder: str | PathLike[str]) -> dict[str, Any]:
    """Return the record of a directory, without reading weights.

    Raises:
        RewardError: the directory holds no latent reward, or one of another format.
    """
    path = Path(folder) / RECORD
    if not path.is_file():
        raise RewardError(
            f"latent: {folder} holds no latent reward (it has no {RECORD}); give the output of `mmalign train-reward`"
        )
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RewardError(f"latent: {path} is damaged ({error}); train it again, or fetch it again") from None
    if not isinstance(record, dict):
        raise RewardError(f"latent: {path} is damaged; train it again, or fetch it again")
    if record.get("format") != FORMAT:
        raise RewardError(
            f"latent: {folder} has format {record.get('format')}; this version reads format {FORMAT}; train it again"
        )
    return record


def _empty_unet(folder: Path) -> Any:
    """Return half a UNet without weights; no memory is allocated for the other half."""
    from diffusers import UNet2DConditionModel

    config = UNet2DConditionModel.load_config(str(folder), local_files_only=True)
    with torch.device("meta"):
        unet = cut_in_half(UNet2DConditionModel.from_config(config))
    return unet.to_empty(device="cpu")


def _empty_text_encoder(folder: Path, kind: str) -> Any:
    import transformers

    found = getattr(transformers, kind)
    return found(found.config_class.from_pretrained(str(folder)))


def _load(folder: Path, name: str, kind: str) -> Any:
    import diffusers
    import transformers

    library = transformers if name.startswith("tokenizer") else diffusers
    logger = logging.getLogger("diffusers.configuration_utils")
    logger.addFilter(_is_no_false_alarm)
    try:
        return getattr(library, kind).from_pretrained(str(folder / name), local_files_only=True)
    finally:
        logger.removeFilter(_is_no_false_alarm)


def _is_no_false_alarm(record: logging.LogRecord) -> bool:
    """Hide that diffusers does not know a key which its own AutoencoderTiny writes."""
    return "block_out_channels" not in record.getMessage()
