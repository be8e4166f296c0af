"""LoRA on a diffusers network, by peft: add, load, switch off, scale, save, merge.

Every function takes the bare network and works for any diffusers model; the generator picks the defaults.
Low-rank adaptation: arXiv 2106.09685.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from pipelines.errors import MissingModelError, PipelineError, nearest
from pipelines.saving import replacing_parts

ADAPTER = "default"
WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
RECORD_NAME = "mmalign.json"
Init = Literal["gaussian", "kaiming"]
DEFAULT_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def lora_layers(network: Any) -> list[Any]:
    """Return the peft layers that carry the adapter, in the order of the network."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in network.modules() if isinstance(module, BaseTunerLayer)]


def lora_parameters(network: Any) -> list[tuple[str, torch.nn.Parameter]]:
    """Return the adapter's named parameters."""
    return [(name, parameter) for name, parameter in network.named_parameters() if f".{ADAPTER}." in f"{name}."]


def has_adapter(network: Any) -> bool:
    """Say whether the network carries an adapter."""
    return bool(getattr(network, "peft_config", None))


def add_adapter(
    network: Any,
    rank: int,
    alpha: float | None = None,
    targets: Iterable[str] | None = None,
    seed: int = 0,
    init: Init = "gaussian",
) -> None:
    """Add a trainable LoRA and freeze the rest; the output does not change, as B starts at zero.

    A is drawn by a CPU generator from `seed`, so that it is the same on every device: "gaussian" from
    ``N(0, 1/rank^2)``, as published scripts for image models do (those of diffusers, DDPO, AlignProp and SPO);
    "kaiming" from ``U(-b, b)`` with ``b = 1/sqrt(inputs)``, peft's default, as those for language models do. The first
    step of B moves the output in proportion to A: with 3,584 inputs and rank 16, gaussian's 6.5 times as far.
    `alpha` defaults to `rank` (scale 1). The adapter's weights are float32 whatever the network's dtype.
    """
    from peft import LoraConfig

    if has_adapter(network):
        raise PipelineError("the model already carries an adapter; save or merge it before adding another.")
    if rank < 1:
        raise PipelineError(f"the adapter's rank must be at least 1, got {rank}.")
    chosen = list(targets or DEFAULT_TARGETS)
    config = LoraConfig(r=rank, lora_alpha=cast(int, rank if alpha is None else alpha), target_modules=chosen)
    _check_targets(network, chosen)
    attach(network, config)
    generator = torch.Generator().manual_seed(seed)
    network.requires_grad_(False)
    with torch.no_grad():
        for name, parameter in lora_parameters(network):
            parameter.data = parameter.data.float()
            if "lora_A" in name:
                parameter.copy_(_start(parameter.shape, rank, init, generator))
            else:
                parameter.zero_()
            parameter.requires_grad_(True)


def _start(shape: torch.Size, rank: int, init: Init, generator: torch.Generator) -> Tensor:
    """Draw a matrix A, which for a convolution has the shape ``[rank, channels, height, width]``."""
    if init == "gaussian":
        return torch.randn(shape, generator=generator) / rank
    return (2 * torch.rand(shape, generator=generator) - 1) / shape[1:].numel() ** 0.5


def attach(network: Any, config: Any) -> None:
    """Put peft's layers into a network of diffusers or transformers.

    What their own ``add_adapter`` does, whatever release of peft it asks for: transformers 5.24 asks for a newer one
    than installs beside it.
    """
    from peft import inject_adapter_in_model

    config.base_model_name_or_path = vars(network).get("name_or_path")
    inject_adapter_in_model(config, network, ADAPTER)
    network._hf_peft_config_loaded = True


def _check_targets(network: Any, targets: list[str]) -> None:
    """Raise if a target matches no layer; peft notices only when none does, and leaves the network half changed."""
    names = [name for name, _ in network.named_modules()]
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in names):
            leaves = {name.rsplit(".", 1)[-1] for name in names} | set(DEFAULT_TARGETS)
            raise PipelineError(
                f"no layer of the model matches the adapter target '{target}'; the default is"
                f" {', '.join(DEFAULT_TARGETS)}.{nearest(target, leaves)}"
            )


def load_adapter(network: Any, path: str | Path, pipeline_class: Any) -> None:
    """Load a LoRA file or directory (diffusers, peft or kohya keys) into `network` and freeze the rest.

    Raises `PipelineError` if it holds nothing for this network, does not fit it, or also changes the text encoder.
    """
    if has_adapter(network):
        raise PipelineError(f"cannot load the adapter {path}: the model already carries one.")
    file = adapter_file(path)
    try:
        state, alphas, metadata = pipeline_class.lora_state_dict(
            str(file.parent), weight_name=file.name, unet_config=network.config, return_lora_metadata=True
        )
        prefixes = {key.split(".", 1)[0] for key in state}
        if "unet" not in prefixes:
            raise PipelineError(f"{file} holds no LoRA for this kind of model; it has {sorted(prefixes)}, not 'unet'.")
        if prefixes - {"unet"}:
            raise PipelineError(
                f"{file} also changes {', '.join(sorted(prefixes - {'unet'}))}, which is not supported; merge it into"
                " the base with diffusers: pipe.load_lora_weights(A); pipe.fuse_lora(); pipe.save_pretrained(DIR)."
            )
        pipeline_class.load_lora_into_unet(state, alphas, network, adapter_name=ADAPTER, metadata=metadata)
        given = sum(any(mark in key for mark in ("lora_A", "lora.down", "lora_down")) for key in state)
        taken = sum("lora_A" in name for name, _ in lora_parameters(network))
        if given != taken:
            raise PipelineError(f"{file} adapts {given} layers but only {taken} of them exist in this base model.")
    except (RuntimeError, KeyError, ValueError, OSError) as error:
        if isinstance(error, PipelineError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise PipelineError(f"the adapter {file} does not fit this base model: {reason}") from error
    network.requires_grad_(False)
    for _, parameter in lora_parameters(network):
        parameter.requires_grad_(True)


def adapter_file(path: str | Path) -> Path:
    """Return the safetensors file meant by a path to it or to its directory."""
    path = Path(path)
    file = path / WEIGHTS_NAME if path.is_dir() else path
    if not file.is_file():
        raise MissingModelError(f"no adapter at {file}; give a .safetensors file or a directory with {WEIGHTS_NAME}.")
    if file.suffix != ".safetensors":
        raise PipelineError(f"{file} is not safetensors; only safetensors adapters are read, convert it first.")
    return file


@contextmanager
def adapter_disabled(layers: Iterable[Any]) -> Iterator[None]:
    """Run the network as its base: bit-equal to the frozen network that never had an adapter.

    peft switches ``requires_grad`` along with the adapter; it is put back as it was, and nesting is safe.
    """
    switched = [layer for layer in layers if not layer.disable_adapters]
    trainable = [parameter for layer in switched for parameter in layer.parameters() if parameter.requires_grad]
    for layer in switched:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in switched:
            layer.enable_adapters(True)
            layer.requires_grad_(False)
        for parameter in trainable:
            parameter.requires_grad_(True)


def set_adapter_scale(network: Any, scale: float) -> None:
    """Multiply the adapter's effect by `scale` (1 as trained, 0 the base)."""
    for layer in lora_layers(network):
        layer.set_scale(ADAPTER, scale)


def save_adapter(network: Any, path: str | Path, pipeline_class: Any, record: dict[str, Any]) -> None:
    """Write `WEIGHTS_NAME` and ``mmalign.json`` (`record`) into the directory `path`, each in one atomic step.

    The file is diffusers' own, so ``pipe.load_lora_weights(path)`` reads it; rank and alpha travel in its header. The
    same weights make the same bytes.
    """
    from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers
    from peft import get_peft_model_state_dict

    if not has_adapter(network):
        raise PipelineError("there is no adapter to save; the model was not trained with adapter: {kind: lora}.")
    weights: dict[str, Tensor] = convert_state_dict_to_diffusers(
        get_peft_model_state_dict(network, adapter_name=ADAPTER)
    )
    config = network.peft_config[ADAPTER].to_dict()
    # peft keeps the targets in a set; sorted, the same adapter makes the same file.
    config["target_modules"] = sorted(config["target_modules"])
    with replacing_parts(Path(path), RECORD_NAME) as scratch:
        pipeline_class.save_lora_weights(scratch, unet_lora_layers=weights, unet_lora_adapter_metadata=config)
        _sort_metadata(scratch / WEIGHTS_NAME)
        (scratch / RECORD_NAME).write_text(json.dumps({**record, "rank": config["r"]}, indent=2) + "\n")


def _sort_metadata(file: Path) -> None:
    """Write the header of a safetensors file again, its metadata in order; the native writer shuffles them."""
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


def merged_copy(network: Any) -> Any:
    """Return a copy of the network with the adapter folded into its weights and removed."""
    merged = copy.deepcopy(network)
    merged.fuse_lora(adapter_names=[ADAPTER])
    merged.unload_lora()
    return merged
