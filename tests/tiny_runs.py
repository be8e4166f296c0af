"""Tiny training runs for tests: a few random pairs on disk, a configuration, and pairs that need no disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmalign.config.run import RunConfig
from mmalign.data.batches import PairBatch
from mmalign.methods.reference import Reference
from mmalign.methods.run import Run
from mmalign.methods.sft import SFT
from pipelines import load_generator
from pipelines.conditioning import Conditioning
from rewards import Reward

BRIGHTNESS = "tiny_runs:Brightness"


def write_pairs(folder: Path, count: int = 12, seed: int = 0) -> Path:
    """Write `count` pairs (chosen light, rejected dark, both noisy) as JSONL with images beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    lines = []
    for index in range(count):
        names = {"chosen": f"{index}-chosen.png", "rejected": f"{index}-rejected.png"}
        for side, name in names.items():
            low = 128 if side == "chosen" else 0
            Image.fromarray(rng.integers(low, low + 127, (16, 16, 3), dtype=np.uint8)).save(folder / name)
        lines.append(json.dumps({"prompt": f"a {'red' if index % 2 else 'blue'} circle", **names}))
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(lines))
    return path


def run_config(model: str, pairs: Path, output: Path, method: Any = "diffusion_dpo", **changes: Any) -> RunConfig:
    """Return the configuration of a run of four steps; `changes` replace keys of `trainer`, or whole sections."""
    trainer = {"steps": 4, "batch_size": 2, "learning_rate": 1e-3, "log_every": 1, "checkpoint_every": 2, "warmup": 0}
    sections = {
        key: changes.pop(key)
        for key in ("adapter", "evaluate", "data", "rewards", "monitors", "rounds", "flow", "video")
        if key in changes
    }
    return RunConfig(
        model=model,
        method={"name": method} if isinstance(method, str) else method,
        data={"pairs": str(pairs), "cache": str(pairs.parent / "cache"), **sections.pop("data", {})},
        output=str(output),
        adapter=sections.pop("adapter", {"kind": "lora", "rank": 4}),
        trainer={**trainer, **changes},
        **sections,
    )


def online_config(model: str, output: Path, method: dict[str, Any], **changes: Any) -> RunConfig:
    """Return the configuration of a run of four steps, two prompts each, that makes its own samples."""
    output.mkdir(parents=True, exist_ok=True)
    prompts = output / "prompts.txt"
    prompts.write_text("a red circle\na blue square\ntwo green stars\nthree red squares\n")
    given = {"rewards": [{"name": BRIGHTNESS}], "log_every": 1, **changes}
    config = run_config(model, prompts, output, method, **given, data={"pairs": None, "prompts": str(prompts)})
    return config


def losses(output: Path, key: str = "loss") -> dict[int, float]:
    """Return one metric of a run by step."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


class InMemoryPairs:
    """Random latents and embeddings with the two methods that training needs of cached pairs."""

    def __init__(self, count: int, shape: tuple[int, ...] = (4, 8, 8), length: int = 5, width: int = 16) -> None:
        source = torch.Generator().manual_seed(0)
        self.ids = [f"pair-{index}" for index in range(count)]
        self.chosen = torch.randn(count, *shape, generator=source)
        self.rejected = torch.randn(count, *shape, generator=source)
        self.embeds = torch.randn(count, length, width, generator=source)

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, indices: Any, epoch: int, seed: int) -> PairBatch:
        rows = list(indices)
        ids = [self.ids[row] for row in rows]
        return PairBatch(self.chosen[rows], self.rejected[rows], Conditioning(self.embeds[rows]), ids, epoch)


class Brightness(Reward):
    """The mean of all pixels, whatever the prompt."""

    name = "brightness"
    differentiable = True
    range = (0.0, 1.0)

    def score(self, media: Any, prompts: Any, references: Any) -> Any:
        return media.mean((1, 2, 3))


class BrightnessOfRed(Brightness):
    """The mean of all pixels where the prompt says red, 0 elsewhere."""

    name = "brightness-of-red"
    needs = ("prompts",)

    def score(self, media: Any, prompts: Any, references: Any) -> Any:
        return media.mean((1, 2, 3)) * torch.tensor(["red" in prompt for prompt in prompts])


class BreaksAtStepThree(SFT):
    """SFT whose loss is not a number in the third step."""

    def loss(self, run: Any, batch: Any) -> Any:
        output = super().loss(run, batch)
        if run.step == 2:
            output.loss = output.loss * float("nan")
        return output


class ExactReference(Reference):
    """The reference in the network's own precision."""

    def predict(self, x_t: Any, t: Any, cond: Any) -> Tensor:
        with self.active():
            return self.generator.predict(x_t, t, cond)


class ExactRun(Run):
    """A run in the network's own precision, for finite differences in float64."""

    def predict(self, x_t: Any, t: Any, cond: Any) -> Tensor:
        return self.generator.predict(x_t, t, cond)


def exact_run(model: str, scale: float = 0.05, **options: Any) -> Run:
    """A run in float64 whose policy has moved from the reference by `scale`."""
    generator = load_generator(model, device="cpu", dtype=torch.float64)
    generator.unconditional()
    generator.add_adapter(4, seed=1)
    generator.network.double()
    source = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in generator.trainable_parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=source))
    generator.network.train()
    return ExactRun(generator, reference=ExactReference(generator, "adapter"), **options)


def write_answer_pairs(folder: Path, count: int = 6, *, own_media: bool = False, **columns: list[Any]) -> Path:
    """Write pairs of answers about videos of four noisy frames as JSONL, answers of different lengths.

    own_media: every rejected side has a video of its own. columns: further columns, a value for each pair.
    """
    from mmalign.core.io.video_files import write_video

    source = torch.Generator().manual_seed(0)
    lines = []
    for index in range(count):
        line: dict[str, Any] = {
            "prompt": f"what moves in {index}?",
            "chosen": f"a {'red' if index % 2 else 'blue'} one",
        }
        line |= {"rejected": "a green one" if index % 3 else "nothing", "video": f"{index}.mkv", "id": f"pair-{index}"}
        line |= {"rejected_video": f"{index}-other.mkv"} if own_media else {}
        for name in [line["video"], *([line["rejected_video"]] if own_media else [])]:
            write_video(folder / name, torch.randint(0, 256, (4, 3, 16, 16), generator=source).to(torch.uint8), 4.0)
        lines.append(json.dumps(line | {name: values[index] for name, values in columns.items()}))
    path = folder / "answers.jsonl"
    path.write_text("\n".join(lines))
    return path


class Motion(Reward):
    """The mean absolute difference of neighbouring frames of videos."""

    name = "motion"
    modality = "video"
    differentiable = True
    range = (0.0, 1.0)

    def score(self, media: Any, prompts: Any, references: Any) -> Any:
        return media.diff(dim=1).abs().mean((1, 2, 3, 4))
