"""Choose the attention kernel of a network, and verify which one runs.

diffusers' ``set_attention_backend`` silently skips processors that do not support it (those of
``UNet2DConditionModel`` among them), so the processors are set here and then inspected.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from pipelines.errors import MissingDependencyError, PipelineError, choose

PROCESSORS = {"sdpa": "AttnProcessor2_0", "xformers": "XFormersAttnProcessor"}


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
    if kernel == "xformers":
        _require_xformers()
        network.enable_xformers_memory_efficient_attention()
    elif set(inspect_attention(network).processors) != {PROCESSORS[kernel]}:
        from diffusers.models.attention_processor import AttnProcessor2_0

        network.set_attn_processor(AttnProcessor2_0())
    report = inspect_attention(network)
    others = [name for name in report.processors if name != PROCESSORS[kernel]]
    if others:
        raise PipelineError(
            f"attention '{kernel}' was set but layers still run {', '.join(others)};"
            f" choose the other of {', '.join(PROCESSORS)}."
        )
    return report


def inspect_attention(network: Any) -> AttentionReport:
    """Report the attention processors that `network` holds now."""
    counts = dict(Counter(type(processor).__name__ for processor in network.attn_processors.values()))
    kernels = {name: kernel for kernel, name in PROCESSORS.items()}
    running = sorted({kernels.get(name, name) for name in counts})
    device = next(network.parameters()).device
    return AttentionReport("+".join(running), counts, _backends(device) if running == ["sdpa"] else ())


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
