"""A training step of the UNet on a CPU: torch's flash attention against its plain kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.timing import Report, Settings, interleave
from mmalign.core.precision import Precision, autocast
from mmalign.shapes.train_base import build_unet
from mmalign.training.optim import build_optimizer

KERNELS = {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}
TITLE = "UNet training step on the CPU"
TEXT_LENGTH, TEXT_WIDTH = 32, 128


def measure(settings: Settings) -> list[Report]:
    """Return a report in bfloat16 and one in float32; nothing to measure on CUDA, where torch picks by the shape."""
    if settings.device.type != "cpu":
        return [Report(TITLE, skipped="a question of CPUs only; hide the GPU to measure it: CUDA_VISIBLE_DEVICES=")]
    return [_compare("bf16", settings), _compare("fp32", settings)]


def _compare(precision: Precision, settings: Settings) -> Report:
    torch.manual_seed(0)
    network = build_unet().train()
    optimizer = build_optimizer(network.parameters(), learning_rate=1e-5)
    x, target = torch.randn(2, 2 * settings.batch, 4, 16, 16)
    t = torch.randint(1000, (len(x),))
    states = torch.randn(len(x), TEXT_LENGTH, TEXT_WIDTH)

    def predict(kernel: SDPBackend) -> torch.Tensor:
        with autocast(precision, settings.device), sdpa_kernel(kernel):
            return network(x, t, states).sample.float()

    def step(kernel: SDPBackend) -> Callable[[], None]:
        def call() -> None:
            F.mse_loss(predict(kernel), target).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return call

    with torch.no_grad():
        flash, math = (predict(kernel) for kernel in KERNELS.values())
    return Report(
        f"{TITLE}, {len(x)} images, {precision}",
        interleave({name: step(kernel) for name, kernel in KERNELS.items()}, settings),
        {"flash / math": ("flash", "math")},
        images=len(x),
        facts={
            "max difference of outputs": f"{(flash - math).abs().max().item():.2e}",
            "spread of outputs": f"{math.std().item():.2e}",
        },
    )
