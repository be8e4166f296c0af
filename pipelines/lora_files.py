"""LoRA files: read those of diffusers, peft, kohya and LyCORIS, and write diffusers' and kohya's.

A layer's change is ``alpha / rank * up @ down``. diffusers' file carries no alpha (its header could, but most tools
read none of it), so alpha is folded into `up` there; kohya's file has a tensor ``alpha`` for every layer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pipelines.components import read_json
from pipelines.errors import MissingModelError, PipelineError
from pipelines.lora_names import adaptable_layers, kohya_names, layer_of_name, lora_prefix

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
KOHYA_NAME = "lora_kohya.safetensors"
PEFT_NAME, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
METADATA_KEY = "lora_adapter_metadata"
ROLES = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".alpha": "alpha",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}
"""How the names of tensors end -> what they are."""
OTHER_KINDS = {
    ".hada_": "LoHa",
    ".lokr_": "LoKr",
    ".oft_": "OFT",
    ".boft_": "BOFT",
    ".lora_mid.": "LoCon with a Tucker decomposition",
    ".dora_scale": "DoRA in LyCORIS's layout",
    ".w_norm": "LyCORIS with norm layers",
    ".b_norm": "LyCORIS with norm layers",
    ".diff$": "full differences",
    ".diff_b$": "full differences",
    ".lora_B.bias": "LoRA with biases",
}
"""What a tensor's name holds ($: its end) -> a kind of adapter that is no plain LoRA."""
_OTHER_MODELS = ("unet", "transformer", "prior", "decoder")
_TEXT = ("text_encoder", "lora_te")


@dataclass(frozen=True)
class LoraLayer:
    """One layer's low-rank change; `magnitude` makes it a DoRA (arXiv 2402.09353), as peft computes it."""

    down: Float[Tensor, "rank inputs ..."]
    up: Float[Tensor, "outputs rank ..."]
    alpha: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """Rank of the change."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """Factor of ``up @ down``."""
        return self.alpha / self.rank


def adapter_file(path: str | Path) -> Path:
    """Return the safetensors file meant by a path to it or to its directory.

    Raises:
        MissingModelError: there is none. PipelineError: another format, or several files.
    """
    path = Path(path)
    file = path
    if path.is_dir():
        # Of our two files kohya's is read: with its own alpha the adapter computes what it computed in training,
        # in low precision too.
        usual = [path / name for name in (KOHYA_NAME, WEIGHTS_NAME, PEFT_NAME) if (path / name).is_file()]
        found = usual or sorted(path.glob("*.safetensors"))
        if len(found) > 1 and not usual:
            raise PipelineError(f"{path} holds {len(found)} safetensors files; name one, such as {found[0]}.")
        file = found[0] if found else path / WEIGHTS_NAME
    if not file.is_file():
        raise MissingModelError(f"no adapter at {file}; give a .safetensors file or a directory with {WEIGHTS_NAME}.")
    if file.suffix != ".safetensors":
        raise PipelineError(f"{file} is not safetensors; only safetensors adapters are read, convert it first.")
    return file


AdapterPath = str | Path | tuple[str | Path, float]
"""A LoRA file or directory, as text also ``PATH:WEIGHT``, or a pair of a path and a weight."""


def with_weight(given: AdapterPath) -> tuple[Path, float]:
    """Return the path and the weight (1 if none is given) that one adapter stands for.

    >>> with_weight("style.safetensors:0.5")
    (PosixPath('style.safetensors'), 0.5)
    """
    path, weight = given if isinstance(given, tuple) else (given, 1.0)
    if isinstance(given, str) and ":" in given and not Path(given).exists():
        before, _, after = given.rpartition(":")
        try:
            path, weight = before, float(after)
        except ValueError:
            pass  # a path with a colon, which does not exist
    if not math.isfinite(weight):
        raise PipelineError(f"the weight {weight} of the adapter {path} must be a finite number.")
    return Path(path).expanduser(), float(weight)


def tensor_names(file: Path) -> list[str]:
    """Return the names of a safetensors file's tensors; nothing else is read.

    Raises:
        PipelineError: the file is damaged.
    """
    return sorted(_open(file)[0])


def is_lora_file(file: Path) -> bool:
    """Say whether a safetensors file holds an adapter, of any kind, and no whole model."""
    return any(key.endswith(tuple(ROLES)) or _other_kind(key) for key in tensor_names(file))


def read_lora(file: Path, network: Any) -> dict[str, LoraLayer]:
    """Return the LoRA of `file` by the layers of `network`.

    Raises:
        PipelineError: it is no plain LoRA, changes the text encoder too, or does not fit this network.
    """
    names, metadata = _open(file)
    _check_kind(file, names)
    tensors, prefix = _load(file), lora_prefix(network)
    grouped: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        stem, role = _split(file, key, prefix)
        grouped.setdefault(stem, {})[role] = tensor
    layers, known = adaptable_layers(network), layer_of_name(network)
    found = {stem: known[stem] for stem in grouped if stem in known}
    if len(found) < len(grouped):
        stray = next(stem for stem in grouped if stem not in known)
        raise PipelineError(
            f"the adapter {file} does not fit this base model: it adapts {len(grouped)} layers but only {len(found)}"
            f" of them exist, not {stray}."
        )
    alphas = _Alphas(file, metadata, prefix)
    return {
        name: _layer(file, name, grouped[stem], layers[name], alphas)
        for stem, name in sorted(found.items(), key=lambda item: item[1])
    }


def combine(parts: list[tuple[dict[str, LoraLayer], float]]) -> dict[str, LoraLayer]:
    """Return one LoRA whose change is the weighted sum of several: their matrices side by side, ranks added.

    Raises:
        PipelineError: a DoRA among several, or with a weight other than 1.
    """
    if len(parts) == 1 and parts[0][1] == 1:
        return parts[0][0]
    if any(layer.magnitude is not None for layers, _ in parts for layer in layers.values()):
        raise PipelineError(
            "a DoRA rescales whole weights, so it has no weight other than 1 and adds to no other adapter; merge it"
            " into its base first: `mmalign merge`."
        )
    if len(parts) == 1:
        layers, weight = parts[0]
        return {name: replace(layer, alpha=layer.alpha * weight) for name, layer in layers.items()}
    summed: dict[str, LoraLayer] = {}
    for name in sorted({name for layers, _ in parts for name in layers}):
        own = [(layers[name], weight) for layers, weight in parts if name in layers]
        down = torch.cat([layer.down.float() for layer, _ in own])
        up = torch.cat([layer.up.float() * (layer.scale * weight) for layer, weight in own], dim=1)
        summed[name] = LoraLayer(down, up, float(len(down)))
    return summed


def write_lora(folder: Path, layers: Mapping[str, LoraLayer], network: Any) -> None:
    """Write diffusers' file and, where every layer has a name there, kohya's; the same weights make the same bytes.

    Raises:
        PipelineError: it is a DoRA, of which the tools compute different models.
    """
    from safetensors.torch import save_file

    if any(layer.magnitude is not None for layer in layers.values()):
        raise PipelineError(
            "a DoRA is not written as an adapter, since ComfyUI, kohya and diffusers compute different models from one"
            " file; merge it into its base instead."
        )
    state: dict[str, Tensor] = {}
    prefix = lora_prefix(network)
    for name, layer in layers.items():
        state[f"{prefix}{name}.lora_A.weight"] = layer.down
        state[f"{prefix}{name}.lora_B.weight"] = layer.up if layer.scale == 1 else layer.up * layer.scale
    save_file(_plain(state), folder / WEIGHTS_NAME, metadata={"format": "pt"})
    kohya = kohya_names(network)
    if not set(layers) <= set(kohya):
        (folder / KOHYA_NAME).unlink(missing_ok=True)  # of an earlier export, and read before diffusers'
        return
    state = {}
    for name, layer in layers.items():
        state[f"{kohya[name]}.lora_down.weight"] = layer.down
        state[f"{kohya[name]}.lora_up.weight"] = layer.up
        state[f"{kohya[name]}.alpha"] = torch.tensor(float(layer.alpha))
    save_file(_plain(state), folder / KOHYA_NAME, metadata={"format": "pt"})


def _plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}


def _open(file: Path) -> tuple[list[str], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), "pt") as opened:
            return list(opened.keys()), opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise PipelineError(f"{file} is no readable safetensors file ({error}); fetch it again.") from None


def _load(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(str(file))
    except (SafetensorError, OSError) as error:
        raise PipelineError(f"{file} is no readable safetensors file ({error}); fetch it again.") from None


def _other_kind(name: str) -> str | None:
    return next((kind for mark, kind in OTHER_KINDS.items() if mark in f"{name}$"), None)


def _check_kind(file: Path, names: list[str]) -> None:
    """Refuse an adapter that is more or other than a LoRA of a denoiser."""
    text = sorted({name.split(".")[0].split("_text")[0] for name in names if name.startswith(_TEXT)})
    if text:
        raise PipelineError(
            f"{file} also changes {', '.join(text)}, which is not supported; merge it into the base with diffusers:"
            " pipe.load_lora_weights(A); pipe.fuse_lora(); pipe.save_pretrained(DIR)."
        )
    for name in names:
        kind = _other_kind(name)
        if kind is not None:
            raise PipelineError(
                f"{file} is a {kind}, not a plain LoRA; merge it into the base with the tool that trained it, and give"
                " the merged model."
            )
    if not any(name.endswith(tuple(ROLES)) for name in names):
        raise PipelineError(f"{file} holds no LoRA; its first tensor is {names[0] if names else '(none)'}.")


def _split(file: Path, key: str, prefix: str) -> tuple[str, str]:
    """Return the layer that a tensor's name stands for, as `layer_of_name` knows it, and what the tensor is."""
    end = next((end for end in ROLES if key.endswith(end)), None)
    if end is None:
        raise PipelineError(f"{file}: the tensor {key} is no part of a LoRA that is supported.")
    stem = key.removesuffix(end)
    stem = stem.removeprefix("base_model.model.").removeprefix(prefix)
    foreign = stem.split(".")[0]
    if foreign in _OTHER_MODELS:
        raise PipelineError(
            f"{file} holds no LoRA for this kind of model; it has ['{foreign}'], not '{prefix.removesuffix('.')}'."
        )
    if ".processor." in stem:  # diffusers before 0.22: attn1.processor.to_q_lora
        stem = stem.replace(".processor.", ".").removesuffix("_lora")
        stem = f"{stem}.0" if stem.endswith(".to_out") else stem
    return stem, ROLES[end]


class _Alphas:
    """The alpha of each layer as a file's header (diffusers) or the config beside it (peft) gives it."""

    def __init__(self, file: Path, metadata: dict[str, str], prefix: str) -> None:
        self.file, self.prefix = file, prefix
        try:
            given = json.loads(metadata.get(METADATA_KEY, "{}"))
        except (ValueError, RecursionError):
            raise PipelineError(f"{file}: its header '{METADATA_KEY}' is not JSON; fetch it again.") from None
        if file.name == PEFT_NAME and (file.parent / PEFT_CONFIG).is_file():
            given = read_json(file.parent / PEFT_CONFIG)
        given = given if isinstance(given, dict) else {}
        self.config = {key.removeprefix(prefix): value for key, value in given.items()}

    def __call__(self, name: str, rank: int) -> float:
        """Return the alpha for a layer whose file holds no tensor of it; without any it is the rank."""
        patterns = self.config.get("alpha_pattern") or {}
        own = next(
            (
                value
                for key, value in patterns.items()
                if f".{name}".endswith(f".{key.removeprefix('^').removeprefix(self.prefix)}")
            ),
            self.config.get("lora_alpha"),
        )
        if own is None:
            return float(rank)
        if isinstance(own, bool) or not isinstance(own, int | float):
            raise PipelineError(f"{self.file}: the alpha {own!r} of its header is no number.")
        return float(own) * (math.sqrt(rank) if self.config.get("use_rslora") else 1.0)


def _layer(file: Path, name: str, parts: dict[str, Tensor], layer: Any, alphas: _Alphas) -> LoraLayer:
    """Return one layer's LoRA in the shapes of the layer that it adapts."""
    for role in ("down", "up"):
        if role not in parts:
            raise PipelineError(f"{file} lacks the '{role}' matrix of {name}; fetch it again.")
    down, up = parts["down"], parts["up"]
    rank, weight = down.shape[0] if down.ndim else 0, layer.weight
    wide = (rank, *weight.shape[1:])
    if rank < 1 or down.numel() != math.prod(wide) or up.numel() != weight.shape[0] * rank or up.shape[0] == 0:
        raise PipelineError(
            f"the adapter {file} does not fit this base model: for {name}, of shape {list(weight.shape)}, it has"
            f" {list(up.shape)} by {list(down.shape)}."
        )
    alpha = alphas(name, rank) if "alpha" not in parts else float(parts["alpha"].float().reshape(-1)[0])
    if not (math.isfinite(alpha) and down.isfinite().all() and up.isfinite().all()):
        raise PipelineError(f"{file}: {name} holds values that are not finite.")
    ones = (1,) * (weight.ndim - 2)
    return LoraLayer(down.reshape(wide), up.reshape(weight.shape[0], rank, *ones), alpha, parts.get("magnitude"))
