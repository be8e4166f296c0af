"""Choose the attention kernel of a network, and verify which one runs.

diffusers' ``set_attention_backend`` silently skips processors that do not support it (those of
``UNet2DConditionModel`` among them), so the processors are set here and then inspected. Processors that do support it
(FLUX.1's) keep their class and carry the kernel's name.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from pipelines.errors import MissingDependencyError, PipelineError, choose

PROCESSORS = {
    "sdpa": ("AttnProcessor2_0", "JointAttnProcessor2_0", "CogVideoXAttnProcessor2_0"),
    "xformers": ("XFormersAttnProcessor", "XFormersJointAttnProcessor"),
}
"""Kernel -> the processors that run it, of UNets and of SD3."""
DISPATCHED = (
    *("FluxAttnProcessor", "ZSingleStreamAttnProcessor", "QwenDoubleStreamAttnProcessor2_0"),
    *("Flux2AttnProcessor", "Flux2ParallelSelfAttnProcessor", "WanAttnProcessor", "LTXVideoAttnProcessor"),
)
"""Processors that run any kernel, by the name that they carry."""
BACKENDS = {None: "sdpa", "native": "sdpa", "xformers": "xformers"}
"""That name, in diffusers' terms -> the kernel."""


@dataclass(frozen=True)
class AttentionReport:
    """The running kernel, the processors of the network with their counts, and torch's SDPA backends."""

    kernel: str
    processors: dict[str, int]
    backends: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return one line for the log."""
        found = ", ".join(f"{count} x {name}" for name, count in self.processors.items())
        return f"{self.kernel} ({found}{'; ' + ', '.join(self.backends) if self.backends else ''})"


def set_attention(network: Any, kernel: str = "sdpa") -> AttentionReport:
    """Make every attention layer of a diffusers network use `kernel` (``"sdpa"`` or ``"xformers"``) and verify it.

    Raises `MissingDependencyError` when xformers was chosen and cannot run here, `PipelineError` when a layer keeps
    another processor.
    """
    choose("attention kernel", kernel, PROCESSORS)
    dispatched = {type(processor).__name__ for processor in _processors(network)} <= set(DISPATCHED)
    if kernel == "xformers":
        _require_xformers()
        if dispatched:
            network.set_attention_backend("xformers")
        else:
            network.enable_xformers_memory_efficient_attention()
    elif inspect_attention(network).kernel != kernel:
        from diffusers.models.attention_processor import AttnProcessor2_0

        if dispatched:
            network.set_attention_backend("native")
        else:
            network.set_attn_processor(AttnProcessor2_0())
    report = inspect_attention(network)
    if report.kernel != kernel:
        raise PipelineError(
            f"attention '{kernel}' was set but layers still run {', '.join(report.processors)};"
            f" choose the other of {', '.join(PROCESSORS)}."
        )
    return report


def inspect_attention(network: Any) -> AttentionReport:
    """Report the attention processors that `network` holds now."""
    processors = _processors(network)
    counts = dict(Counter(type(processor).__name__ for processor in processors))
    running = sorted({_kernel(processor) for processor in processors})
    device = next(network.parameters()).device
    return AttentionReport("+".join(running), counts, _backends(device) if running == ["sdpa"] else ())


def _processors(network: Any) -> list[Any]:
    """Return the processor of each attention layer; some networks (Z-Image's) do not list theirs."""
    if hasattr(network, "attn_processors"):
        return list(network.attn_processors.values())
    return [module.processor for module in network.modules() if hasattr(module, "processor")]


def _kernel(processor: Any) -> str:
    """Return the kernel that a processor runs; its class's name if it is none of ours."""
    name = type(processor).__name__
    if name in DISPATCHED:
        backend = processor._attention_backend
        backend = getattr(backend, "value", backend)
        return BACKENDS.get(backend, str(backend))
    return next((kernel for kernel, names in PROCESSORS.items() if name in names), name)


def _backends(device: torch.device) -> tuple[str, ...]:
    """Return the SDPA implementations torch may pick from on `device`; it picks per call, by shape and dtype."""
    if device.type == "cpu":
        return ("flash" if torch.backends.cuda.flash_sdp_enabled() else "math",)
    if device.type != "cuda":
        return (f"torch on {device.type}",)
    flags = {
        "flash": torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.is_flash_attention_available(),
        "memory-efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
        "math": torch.backends.cuda.math_sdp_enabled(),
    }
    return tuple(name for name, enabled in flags.items() if enabled)


def _require_xformers() -> None:
    if importlib.util.find_spec("xformers") is None:
        raise MissingDependencyError(
            "attention 'xformers' needs xformers, which is not installed;"
            " run `pip install xformers` or set attention: sdpa."
        )
    if not torch.cuda.is_available():
        raise MissingDependencyError(
            "attention 'xformers' runs on CUDA devices only and none is available; set attention: sdpa."
        )
