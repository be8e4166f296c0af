"""LoRA on a diffusers network, by peft: add, load, switch off, scale, save, merge.

Every function takes the bare network and works for any diffusers model; the generator picks the defaults.
Low-rank adaptation: arXiv 2106.09685.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch

from pipelines.errors import PipelineError, nearest
from pipelines.lora_files import LoraLayer, adapter_file, combine, read_lora, write_lora
from pipelines.saving import replacing_parts

ADAPTER = "default"
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
    try:
        attach(network, config)
    except ValueError as error:
        reason = " ".join(str(error).split())[:120]
        raise PipelineError(f"the adapter targets {', '.join(chosen)} name a layer without LoRA: {reason}") from error
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


def _start(shape: torch.Size, rank: int, init: Init, generator: torch.Generator) -> torch.Tensor:
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


def load_adapters(network: Any, adapters: Sequence[tuple[Path, float]]) -> None:
    """Load LoRA files, each with its weight, as one adapter into `network`, and freeze the rest.

    Files and directories of diffusers, peft, kohya and LyCORIS (LoRA, LoCon) are read; see `pipelines.lora_files`.

    Raises:
        PipelineError: one holds nothing for this network, does not fit it, or also changes the text encoder.
    """
    if has_adapter(network):
        raise PipelineError(f"cannot load the adapter {adapters[0][0]}: the model already carries one.")
    layers = combine([(read_lora(adapter_file(path), network), weight) for path, weight in adapters])
    try:
        attach(network, _config(layers))
        _fill(network, layers)
    except (RuntimeError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise PipelineError(f"the adapter {adapters[0][0]} does not fit this base model: {reason}") from error
    network.requires_grad_(False)
    for _, parameter in lora_parameters(network):
        parameter.requires_grad_(True)


def _config(layers: dict[str, LoraLayer]) -> Any:
    """Return peft's configuration for layers of several ranks and alphas: the commonest, and patterns for the rest."""
    from peft import LoraConfig

    ranks = Counter(layer.rank for layer in layers.values())
    alphas = Counter(layer.alpha for layer in layers.values())
    rank, alpha = ranks.most_common(1)[0][0], alphas.most_common(1)[0][0]

    def pattern(of: Callable[[LoraLayer], Any], usual: Any, values: Iterable[Any]) -> dict[str, Any]:
        # One pattern a value: peft tries every pattern on every layer, at the end of its name.
        return {
            "^(?:" + "|".join(re.escape(name) for name, layer in layers.items() if of(layer) == value) + ")": value
            for value in values
            if value != usual
        }

    return LoraConfig(
        r=rank,
        lora_alpha=cast(int, alpha),
        rank_pattern=pattern(lambda layer: layer.rank, rank, ranks),
        alpha_pattern=pattern(lambda layer: layer.alpha, alpha, alphas),
        target_modules="|".join(map(re.escape, sorted(layers))),  # a text is matched with whole names
        use_dora=any(layer.magnitude is not None for layer in layers.values()),
    )


@torch.no_grad()
def _fill(network: Any, layers: dict[str, LoraLayer]) -> None:
    """Copy the layers' weights into the adapter that `_config` made of them."""
    named = {name: module for name, module in network.named_modules() if name in layers}
    for name, layer in layers.items():
        module = named[name]
        module.lora_A[ADAPTER].weight.copy_(layer.down)
        module.lora_B[ADAPTER].weight.copy_(layer.up)
        if layer.magnitude is not None:
            weight = module.lora_magnitude_vector[ADAPTER].weight
            weight.copy_(layer.magnitude.reshape(weight.shape))


def adapter_layers(network: Any) -> dict[str, LoraLayer]:
    """Return the adapter's present weights by layer, as trained (without `set_adapter_scale`)."""
    from peft.tuners.lora.layer import LoraLayer as PeftLayer

    found = {}
    layers: list[tuple[str, Any]] = [pair for pair in network.named_modules() if isinstance(pair[1], PeftLayer)]
    for name, layer in layers:
        if ADAPTER in layer.lora_A:
            vectors = layer.lora_magnitude_vector
            magnitude = vectors[ADAPTER].weight.detach() if ADAPTER in vectors else None
            down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            found[name] = LoraLayer(down.detach(), up.detach(), float(layer.lora_alpha[ADAPTER]), magnitude)
    return found


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
    """Multiply the adapter's effect by `scale` (1 as trained, 0 the base).

    Raises:
        PipelineError: the adapter is a DoRA, whose magnitudes replace the base's, and the scale is not 1.
    """
    if scale != 1 and any(layer.magnitude is not None for layer in adapter_layers(network).values()):
        raise PipelineError(
            f"the adapter is a DoRA, which has no scale other than 1, got {scale:g}; leave the scale out, or use the"
            " base model for 0."
        )
    for layer in lora_layers(network):
        layer.set_scale(ADAPTER, scale)


def save_adapter(network: Any, path: str | Path, record: dict[str, Any]) -> None:
    """Write `WEIGHTS_NAME`, `KOHYA_NAME` and ``mmalign.json`` (`record`) into the directory `path`, each atomically.

    ``pipe.load_lora_weights(path)`` of diffusers reads the first; ComfyUI, Forge and kohya read the second. The same
    weights make the same bytes.
    """
    if not has_adapter(network):
        raise PipelineError("there is no adapter to save; the model was not trained with adapter: {kind: lora}.")
    layers = adapter_layers(network)
    rank = max(layer.rank for layer in layers.values())
    with replacing_parts(Path(path), RECORD_NAME) as scratch:
        write_lora(scratch, layers, network)
        (scratch / RECORD_NAME).write_text(json.dumps({**record, "rank": rank}, indent=2) + "\n")


def check_round_trip(network: Any, save: Callable[[Path], None], folder: Path, place: str = "") -> None:
    """Save the adapter with made-up weights into a folder inside `folder`, read its files at `place`, and compare.

    Every file must give every layer's change; the weights are put back, and the folder is removed.

    Raises:
        PipelineError: a file gives another change, or cannot be read.
    """
    random = torch.Generator().manual_seed(0)
    ups = [parameter for name, parameter in lora_parameters(network) if ".lora_B." in name]
    kept = [parameter.detach().clone() for parameter in ups]
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".check-", dir=folder))
    try:
        with torch.no_grad():
            for parameter in ups:
                parameter.copy_(torch.randn(parameter.shape, generator=random))
        save(scratch)
        wanted = adapter_layers(network)
        for file in sorted((scratch / place).glob("*.safetensors")):
            found = read_lora(file, network)
            wrong = [name for name, layer in wanted.items() if name not in found or not _equal(layer, found[name])]
            if wrong:
                raise PipelineError(
                    f"the adapter cannot be exported: {file.name} would give {len(wrong)} of {len(wanted)} layers"
                    f" another change, such as {wrong[0]}; choose other adapter.targets."
                )
    finally:
        with torch.no_grad():
            for parameter, before in zip(ups, kept, strict=True):
                parameter.copy_(before)
        shutil.rmtree(scratch, ignore_errors=True)


def _equal(layer: LoraLayer, read: LoraLayer) -> bool:
    down = torch.equal(layer.down.cpu(), read.down)
    return down and torch.allclose((layer.up * layer.scale).cpu(), read.up * read.scale, rtol=1e-6)


def merged_copy(network: Any) -> Any:
    """Return a copy of the network with the adapter folded into its weights and removed."""
    merged = copy.deepcopy(network)
    merged.fuse_lora(adapter_names=[ADAPTER])
    merged.unload_lora()
    return merged
