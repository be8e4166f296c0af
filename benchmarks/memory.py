"""Peak memory of an AlignProp step by the number of sampling steps, with and without gradient checkpointing.

One step samples with guidance, keeps the gradient of every sampling step, decodes, and goes back to a LoRA's weights.
Each setting runs in a process of its own, so that what one of them leaves in the allocator serves no other.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.models import corpus, write_pipeline
from benchmarks.timing import Settings
from mmalign.core.precision import autocast
from pipelines import Generator, Truncation, load_generator, sample_with_gradient

GUIDANCE, RANK = 4.0, 8
PLAIN, CHECKPOINTED = "no checkpointing", "checkpointing"
GRID = (5, 10, 20, 50)  # sampling steps, at the default settings
MIB = 2**20


@dataclass
class MemoryReport:
    """Peak bytes above the loaded model, and seconds, by side and number of sampling steps.

    `peaks[side][steps]` is None where the setting was not run because `expected[side][steps]` bytes are too many here.
    """

    title: str
    peaks: dict[str, dict[int, int | None]] = field(default_factory=dict)
    seconds: dict[str, dict[int, float]] = field(default_factory=dict)
    expected: dict[str, dict[int, float]] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    skipped: str = ""

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return headings and rows to print."""
        headings = ["sampling steps", *(f"{side}, {unit}" for side in self.peaks for unit in ("MiB", "s"))]
        steps = next(iter(self.peaks.values()), {})
        return headings, [[str(n), *(cell for side in self.peaks for cell in self._cells(side, n))] for n in steps]

    def _cells(self, side: str, steps: int) -> tuple[str, str]:
        peak = self.peaks[side][steps]
        if peak is None:
            return f"not run, about {self.expected[side][steps] / MIB:.0f}", ""
        return f"{peak / MIB:.0f}", f"{self.seconds[side][steps]:.1f}"

    def notes(self) -> list[str]:
        """Return lines to print below the table: what one more sampling step costs, and the facts."""
        lines = []
        for side, peaks in self.peaks.items():
            ran = {steps: peak for steps, peak in peaks.items() if peak is not None}
            if len(ran) > 1:
                lines.append(f"{side}: {slope(ran) / MIB:.2f} MiB for each further step")
        return lines + [f"{fact}: {value}" for fact, value in self.facts.items()]

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {name: getattr(self, name) for name in ("title", "skipped", "peaks", "seconds", "expected", "facts")}


def measure(settings: Settings) -> list[MemoryReport]:
    """Return one report, in the precision that training has by default."""
    if settings.device.type != "cuda" and not Path("/proc/self/clear_refs").exists():
        return [MemoryReport("", skipped="the peak of a CPU process can be reset on Linux alone")]
    report = MemoryReport(f"{settings.batch} images, every step trained, guidance {GUIDANCE:g}, LoRA, bfloat16")
    with TemporaryDirectory() as folder:
        model = write_pipeline(Path(folder))
        # The cheap side first: where memory is short, the other one stops by itself.
        for side in (CHECKPOINTED, PLAIN):
            _measure_side(report, side, model, settings)
        latent = math.prod(load_generator(model).latent_shape)
    report.facts["latents of one step"] = f"{settings.batch * latent * 4 / MIB:.2f} MiB"
    return [report]


def _measure_side(report: MemoryReport, side: str, model: Path, settings: Settings) -> None:
    peaks = report.peaks.setdefault(side, {})
    seconds, expected = report.seconds.setdefault(side, {}), report.expected.setdefault(side, {})
    # As many steps as in GRID by default, fewer in proportion where a quick run takes fewer.
    for steps in sorted({max(1, steps * settings.steps // 25) for steps in GRID}):
        known = {n: peak for n, peak in peaks.items() if peak is not None}
        expected[steps] = max(known.values()) + slope(known) * (steps - max(known)) if len(known) > 1 else 0.0
        if expected[steps] > 0.5 * _free(settings.device):
            peaks[steps] = None
            continue
        checkpoint, threads = side == CHECKPOINTED, torch.get_num_threads()
        arguments = json.dumps([str(model), str(settings.device), steps, settings.batch, checkpoint, threads])
        command = [sys.executable, "-m", "benchmarks.memory", arguments]
        result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        peaks[steps], seconds[steps] = result["peak"], result["seconds"]


def slope(peaks: dict[int, int]) -> float:
    """Return the bytes of a further step, from the first number of steps to the last."""
    first, last = min(peaks), max(peaks)
    return (peaks[last] - peaks[first]) / (last - first)


def peak_of_step(
    model: str, device: str, steps: int, batch: int, checkpoint: bool, threads: int
) -> dict[str, int | float]:
    """Return the peak bytes above the loaded model, and the seconds, of one AlignProp step in this process.

    A step of one sampling step and one image goes before it, so that what libraries set up once is not counted.
    """
    torch.set_num_threads(threads)
    generator = load_generator(model, device=device)
    generator.add_adapter(RANK)
    generator.load_encoders()
    _step(generator, 1, 1, checkpoint)
    before = start_peak(generator.device)
    started = time.perf_counter()
    _step(generator, steps, batch, checkpoint)
    return {"peak": peak_since(generator.device) - before, "seconds": time.perf_counter() - started}


def _step(generator: Generator, steps: int, batch: int, checkpoint: bool) -> None:
    cond = generator.encode_prompts([wordings[0] for wordings in corpus(batch).captions])
    sampled = sample_with_gradient(
        generator,
        cond,
        truncation=Truncation("full"),
        rng=torch.Generator(),
        seeds=range(batch),
        steps=steps,
        guidance=GUIDANCE,
        checkpoint=checkpoint,
        autocast=lambda: autocast("bf16", generator.device),
    )
    decode = generator.decode_checkpointed if checkpoint else generator.decode
    decode(sampled.latents).mean().backward()
    generator.network.zero_grad()


def start_peak(device: torch.device) -> int:
    """Set the peak to what is in use now, and return that in bytes."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak_since(device: torch.device) -> int:
    """Return the peak in bytes since `start_peak`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return _kilobytes(Path("/proc/meminfo"), "MemAvailable")


def _status(name: str) -> int:
    return _kilobytes(Path("/proc/self/status"), name)


def _kilobytes(file: Path, name: str) -> int:
    (line,) = [line for line in file.read_text().splitlines() if line.startswith(f"{name}:")]
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    print(json.dumps(peak_of_step(*json.loads(sys.argv[1]))))
