"""Short runs of every method on tiny models, and what they leave: metrics by step, weights, what the export makes.

`PYTHONPATH=tests python -m invariant.trajectories FOLDER` writes one JSON file a method into FOLDER. The files in
`references/` were written so; `test_references.py` compares every change with them.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file
from tiny_models import build_tiny_sd, build_tiny_sdxl
from tiny_runs import BRIGHTNESS, online_config, run_config, write_answer_pairs, write_pairs
from tiny_vlms import build_llava_onevision

from mmalign.methods import methods
from mmalign.training.latent_reward.config import LatentRewardConfig
from mmalign.training.latent_reward.training import make_parts, train_reward
from mmalign.training.train import train
from pipelines import load_generator, load_vlm, sample

SAMPLER: dict[str, Any] = {"sampling_steps": 3, "guidance": 2.0}
IMAGES: dict[str, dict[str, Any]] = {
    "align_prop": SAMPLER,
    "capo": {},
    "ddpo": {**SAMPLER, "images_per_prompt": 2, "advantage": "group", "kl_weight": 0.1},
    "dense_dpo": {**SAMPLER, "images_per_prompt": 2, "updates_per_round": 2},
    "diffusion_dpo": {},
    "diffusion_dro": {"sampling_steps": 2, "updates_per_round": 2},
    "diffusion_kto": {},
    "inpo": {"inversion_steps": 2},
    "lpo": {**SAMPLER, "candidates": 2, "threshold": [0.0, 0.0]},
    "mapo": {},
    "prdp": {**SAMPLER, "images_per_prompt": 2, "updates_per_round": 2},
    "sft": {},
    "smpo": {"inversion_steps": 2},
    "spo": {**SAMPLER, "candidates": 2, "threshold": [0.0, 0.0]},
    "tpo": {},
    "nft": {
        "sampling_steps": 3,
        "images_per_prompt": 2,
        "levels": 2,
        "updates_per_round": 2,
        "old_decay": [0, 0.1, 0.5],
    },
    "awm": {
        "sampling_steps": 3,
        "images_per_prompt": 2,
        "levels": 2,
        "sampler_steps": [0, 2],
        "updates_per_round": 2,
        "old_decay": [0, 0.1, 0.3],
    },
    "dgpo": {
        "sampling_steps": 3,
        "images_per_prompt": 2,
        "levels": 2,
        "sampler_steps": [0, 2],
        "old_decay": [0, 0.1, 0.3],
        "old_samples_after": 1,
    },
    "flow_grpo": {**SAMPLER, "images_per_prompt": 2, "window": {"size": 2}, "kl": {"weight": 0.1, "form": "code"}},
}
NEEDS_VELOCITY = {"nft", "awm", "dgpo"}
"""Methods for models that predict a velocity."""
ANSWERS: dict[str, dict[str, Any]] = {
    "vlm_sft": {},
    "vlm_dpo": {"anchor_weight": 1.0},
    "rrpo": {},
    "vdpo": {"selection": "random", "operators": ["black"]},
    "rdpo": {"unseen": "column"},
    "temple": {"stages": [2, 1]},
}
TIMING = {"seconds", "images_per_second", "memory_gb"}


def environment() -> dict[str, str]:
    """Return what numbers depend on to the bit besides the code."""
    packages = ("torch", "diffusers", "transformers", "peft", "accelerate", "numpy")
    cpu = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine()
    )
    return {**{name: version(name) for name in packages}, "cpu": cpu, "threads": str(torch.get_num_threads())}


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def build_models(folder: Path) -> dict[str, str]:
    """Write one tiny model a family."""
    return {
        "sd15": build_tiny_sd(folder / "sd15", vae="tiny"),
        "sd21-v": build_tiny_sd(folder / "sd21", "v_prediction", seed=1),
        "sdxl": build_tiny_sdxl(folder / "sdxl", seed=2),
        "vlm": build_llava_onevision(folder / "vlm"),
    }


def write_scored_pairs(path: Path) -> Path:
    """Pairs with scores, in Pick-a-Pic's columns."""
    lines = write_pairs(path.parent / "images", 6).read_text().splitlines()
    rows = []
    for number, row in enumerate(map(json.loads, lines)):
        sides = (row["chosen"], row["rejected"])
        pictures = {f"jpg_{side}": (path.parent / "images" / name).read_bytes() for side, name in enumerate(sides)}
        scores = {"label_0": 1.0, "label_1": 0.0, "score_0": 0.9 - 0.1 * number, "score_1": 0.5}
        rows.append({"caption": row["prompt"], **scores, **pictures})
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_captions(path: Path) -> Path:
    """The chosen images with a caption that does not fit."""
    rows = [json.loads(line) for line in write_pairs(path.parent / "images", 6).read_text().splitlines()]
    table = [
        {"image": f"images/{row['chosen']}", "caption": row["prompt"], "caption_rejected": "a star", "label": "good"}
        for row in rows
    ]
    path.write_text("\n".join(map(json.dumps, table)))
    return path


def image_run(name: str, model: str, folder: Path, options: dict[str, Any] | None = None, **changes: Any) -> Path:
    """Train one image method for a few steps and return its output."""
    needs, options = methods.get(name).needs, dict(IMAGES[name] if options is None else options)
    if name == "lpo":
        config = LatentRewardConfig(model=model, data={"pairs": "none"}, output="none")
        make_parts(load_generator(model, device="cpu"), config).save(folder / "reward")
        options["latent_reward"] = str(folder / "reward")
    common: dict[str, Any] = {"steps": 4, "learning_rate": 1e-3, **changes}
    if needs.source == "prompts":
        rewards = [] if needs.reward == "optional" else [{"name": BRIGHTNESS}]
        return train(online_config(model, folder / "out", {"name": name, **options}, **common, rewards=rewards))
    pairs = write_scored_pairs(folder / "pairs.parquet")
    data: dict[str, Any] = {"cache": str(folder / "cache")}
    if needs.source == "labels":
        data |= {"pairs": None, "labels": str(write_captions(folder / "captions.jsonl") if name == "tpo" else pairs)}
    return train(run_config(model, pairs, folder / "out", {"name": name, **options}, **common, data=data))


def answer_run(
    name: str, model: str, folder: Path, options: dict[str, Any] | None = None, count: int = 6, **changes: Any
) -> Path:
    """Train one method on pairs of answers for a few steps and return its output."""
    columns = {"difficulty": [2, 1] * (count // 2)} if name == "temple" else {}
    pairs = write_answer_pairs(folder / "data", count, own_media=True, **columns)
    common: dict[str, Any] = {"steps": 4, "learning_rate": 1e-2, **changes}
    return train(run_config(model, pairs, folder / "out", {"name": name, **(options or ANSWERS[name])}, **common))


def reward_run(model: str, folder: Path) -> Path:
    """Train a latent reward for a few steps and return its output."""
    trainer = {"steps": 4, "batch_size": 2, "learning_rate": 1e-3, "precision": "fp32", "log_every": 1, "warmup": 0}
    pairs = write_pairs(folder / "pairs")
    lines = [json.loads(line) for line in pairs.read_text().splitlines()]
    for index, line in enumerate(lines):  # four prompts, of which one is held out
        line["prompt"] = ["a red circle", "a star", "two blue squares", "a green star"][index // 3]
    pairs.write_text("\n".join(map(json.dumps, lines)))
    return train_reward(
        LatentRewardConfig(
            model=model,
            data={"pairs": str(pairs), "cache": str(folder / "cache")},
            trainer=trainer,
            levels=2,
            held_out=0.3,
            output=str(folder / "out"),
        )
    )


def metrics(output: Path) -> list[dict[str, Any]]:
    """Return the logged lines without what a clock or the machine's memory says."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMING} for line in lines]


def digest(*tensors: torch.Tensor) -> str:
    """Return 16 hex digits of the bytes of some tensors."""
    found = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def weights(output: Path) -> str:
    """Return the digest of the exported weights, in the order of their names; kohya's file holds them once more."""
    tensors = {
        f"{path.relative_to(output)}:{name}": value
        for path in sorted(output.rglob("*.safetensors"))
        if not {"checkpoints", "stages", "lora_kohya.safetensors"} & {*path.parts}
        for name, value in load_file(path).items()
    }
    return digest(*(tensors[name] for name in sorted(tensors)))


def picture(output: Path) -> str:
    """Return the digest of an image that the exported model draws."""
    generator = load_generator(str(output), device="cpu")
    cond = generator.encode_prompts(["a red circle"])
    return digest(generator.decode(sample(generator, cond, steps=4, guidance=2.0, seeds=[3]).latents))


def answer(output: Path) -> str:
    """Return what the exported model says about a video."""
    video = torch.randint(0, 256, (4, 3, 16, 16), generator=torch.Generator().manual_seed(9)).to(torch.uint8)
    (said,) = load_vlm(str(output), device="cpu").generate(["what moves?"], [[video]], max_new_tokens=12, fps=[4.0])
    return said


def runs(models: dict[str, str]) -> dict[str, Callable[[Path], dict[str, Any]]]:
    """Return a function for each method that runs it in a folder and returns its record."""
    found: dict[str, Callable[[Path], dict[str, Any]]] = {}
    families = ("sd15", "sd21-v", "sdxl")
    for place, name in enumerate(IMAGES):
        kind = {"kind": "full"} if place % 4 == 3 else {"kind": "lora", "rank": 4}

        family = "sd21-v" if name in NEEDS_VELOCITY else families[place % 3]

        def drawn(folder: Path, name: str = name, model: str = models[family], kind: Any = kind) -> Any:
            output = image_run(name, model, folder, adapter=kind)
            return {"metrics": metrics(output), "weights": weights(output), "picture": picture(output)}

        found[name] = drawn
    for name in ANSWERS:

        def answered(folder: Path, name: str = name) -> Any:
            output = answer_run(name, models["vlm"], folder)
            return {"metrics": metrics(output), "weights": weights(output), "answer": answer(output)}

        found[name] = answered

    def scored(folder: Path) -> Any:
        output = reward_run(models["sd15"], folder)
        accuracy = json.loads((output / "accuracy.json").read_text())
        return {"metrics": metrics(output), "weights": weights(output), "accuracy": accuracy}

    found["latent_reward"] = scored
    return found


def main(folder: Path) -> None:
    """Write the record of every method into a folder."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name, run in runs(build_models(Path(scratch))).items():
            record = {"environment": environment(), **run(Path(scratch) / "runs" / name)}
            (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
            print(name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
