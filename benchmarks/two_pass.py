"""Peak memory of one Diffusion-DPO step with and without `two_pass`, over frames of a video and sizes of an image.

A step is the forward and backward passes of one pair with its reference, LoRA, in float32: what the optimiser holds
does not depend on the option. Each setting runs in a process of its own, as in `benchmarks.memory`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.memory import MIB, peak_since, start_peak
from benchmarks.models import write_pipeline
from benchmarks.timing import Settings
from mmalign.data.batches import PairBatch
from mmalign.methods.diffusion_dpo import DiffusionDPO, DiffusionDPOConfig
from mmalign.methods.reference import Reference
from mmalign.methods.run import Run
from pipelines import adapters, load_generator
from pipelines.conditioning import Conditioning
from pipelines.noise import NoiseProcess

FRAMES, SIDES = (9, 17, 33), (16, 32, 64)
HEIGHT, WIDTH = 24, 40
"""Latents a side of the videos: 192 x 320 pixels in Wan."""
BOTH = (False, True)


@dataclass
class TwoPassReport:
    """Peak bytes above the loaded model, and seconds, without and with the option, by size."""

    title: str
    unit: str
    peaks: dict[int, list[int]] = field(default_factory=dict)
    seconds: dict[int, list[float]] = field(default_factory=dict)
    skipped: str = ""

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return headings and rows to print."""
        headings = [self.unit, "one graph, MiB", "two passes, MiB", "memory, two passes / one graph", "time"]
        rows = []
        for size, (one, two) in self.peaks.items():
            before, after = self.seconds[size]
            rows.append(
                [str(size), f"{one / MIB:.0f}", f"{two / MIB:.0f}", f"{two / one:.2f}", f"{after / before:.2f}"]
            )
        return headings, rows

    def notes(self) -> list[str]:
        """Return nothing: the table says it all."""
        return []

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {name: getattr(self, name) for name in ("title", "unit", "skipped", "peaks", "seconds")}


class WanDenoiser:
    """The denoiser of a small random Wan, with the parts of a generator that a step of `diffusion_dpo` uses."""

    modality, has_adapter = "video", True

    def __init__(self, device: torch.device) -> None:
        """Make a transformer of 12 layers, 256 wide."""
        from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

        torch.manual_seed(0)
        self.network = WanTransformer3DModel(
            num_attention_heads=8, attention_head_dim=32, text_dim=64, freq_dim=64, ffn_dim=1024, num_layers=12
        ).to(device)
        adapters.add_adapter(self.network, 8, None, adapters.DEFAULT_TARGETS, 0, "gaussian")
        self._layers = adapters.lora_layers(self.network)
        self.process = NoiseProcess.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0))

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        """Run the transformer once."""
        output: torch.Tensor = self.network(x_t, t, cond.prompt_embeds, return_dict=False)[0]
        return output

    def adapter_disabled(self) -> Any:
        """Return the context of the reference."""
        return adapters.adapter_disabled(self._layers)


def measure(settings: Settings) -> list[TwoPassReport]:
    """Return a report on videos and one on images."""
    if settings.device.type != "cuda" and not Path("/proc/self/clear_refs").exists():
        return [TwoPassReport("", "", skipped="the peak of a CPU process can be reset on Linux alone")]
    quick = settings.steps < 25
    video = TwoPassReport(f"a video transformer, {HEIGHT} x {WIDTH} latents a frame, one pair", "frames")
    image = TwoPassReport("the UNet of Shapes, one pair", "latents a side")
    with TemporaryDirectory() as folder:
        model = str(write_pipeline(Path(folder)))
        for report, sizes, path in ((video, FRAMES, ""), (image, SIDES, model)):
            for size in sizes[:1] if quick else sizes:
                found = [_in_process(path, settings.device, size, two_pass) for two_pass in BOTH]
                report.peaks[size] = [one["peak"] for one in found]
                report.seconds[size] = [one["seconds"] for one in found]
    return [video, image]


def _in_process(*arguments: Any) -> dict[str, Any]:
    given = json.dumps([*map(str, arguments[:2]), *arguments[2:], torch.get_num_threads()])
    command = [sys.executable, "-m", "benchmarks.two_pass", given]
    # glibc raises the size from which memory goes back to the system at once; a fixed one makes the peak that of use.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    found: dict[str, Any] = json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    )
    return found


def peak_of_step(model: str, device: str, size: int, two_pass: bool, threads: int) -> dict[str, int | float]:
    """Return the peak bytes above the loaded model, and the seconds, of one step in this process.

    `model` is a pipeline of images and `size` the side of their latents; without a model a video of `size` frames.
    A small step goes before it, so that what libraries set up once is not counted.
    """
    torch.set_num_threads(threads)
    where = torch.device(device)
    generator: Any = load_generator(model, device=device) if model else WanDenoiser(where)
    if model:
        generator.add_adapter(8)
    _step(generator, (4, 8, 8) if model else (16, 1, 4, 4), two_pass)
    before, started = start_peak(where), time.perf_counter()
    _step(generator, (4, size, size) if model else (16, (size - 1) // 4 + 1, HEIGHT, WIDTH), two_pass)
    return {"peak": peak_since(where) - before, "seconds": time.perf_counter() - started}


def _step(generator: Any, shape: tuple[int, ...], two_pass: bool) -> None:
    network = generator.network
    device, width = next(network.parameters()).device, 64 if generator.modality == "video" else 128
    text = Conditioning(torch.zeros(1, 16, width, device=device))
    batch = PairBatch(torch.zeros(1, *shape, device=device), torch.ones(1, *shape, device=device), text, ["pair"])
    run = Run(generator, reference=Reference(generator, "adapter"), two_pass=two_pass)
    DiffusionDPO(DiffusionDPOConfig()).learn(run, batch, lambda loss: loss.backward())
    network.zero_grad()


if __name__ == "__main__":
    print(json.dumps(peak_of_step(*json.loads(sys.argv[1]))))
