"""How much there is to win: the share of prompts that a model draws right in k tries.

    python -m benchmarks.pass_at_k MODEL --prompts shapes-validation --k 1,2,4,8,16 --guidance 1 --steps 10

Draws n images of each prompt, the largest k, and counts the c that are strictly correct. pass@k is the mean over the
prompts of the unbiased estimate 1 - C(n - c, k) / C(n, k) (Chen et al. 2021, arXiv:2107.03374), with the 95 % interval
of a bootstrap over prompts. Online RL can only raise the chance of images that the model draws at all: pass@1 is where
it starts, pass@k of its group size how many prompts teach it something, and what is right in none of many tries stays.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from mmalign.api.generate import load_generator
from mmalign.compare.stats import mean_interval
from mmalign.core.errors import UserError
from mmalign.core.progress import track
from mmalign.core.seeds import derive_seed
from mmalign.data.building.generation import generate_images
from mmalign.data.prompts import Prompt, load_prompts
from pipelines.errors import PipelineError
from rewards import RewardError, load_reward


def pass_at_k(correct: np.ndarray, tries: int, k: int) -> np.ndarray:
    """Return for each prompt the unbiased estimate that at least one of k images is right, of `correct` in `tries`."""
    missed = np.ones(len(correct))
    for drawn in range(k):  # C(n - c, k) / C(n, k) as a product, without large numbers
        missed *= np.clip(tries - correct - drawn, 0, None) / (tries - drawn)
    return 1 - missed


def count_correct(
    model: str, prompts: Sequence[Prompt], tries: int, *, reward: str, guidance: float, steps: int, batch: int
) -> np.ndarray:
    """Return how many of `tries` images of each prompt have a reward of 1."""
    generator, judge = load_generator(model), load_reward(reward)
    seeds = [[derive_seed("pass@k", number, one.text) % 2**32 for number in range(tries)] for one in prompts]
    correct, held = np.zeros(len(prompts)), list[tuple[int, torch.Tensor]]()

    def score() -> None:
        images = torch.stack([image for _, image in held])
        scores = judge(images, prompts=[prompts[index].text for index, _ in held])
        np.add.at(correct, [index for index, _ in held], (scores > 1 - 1e-6).numpy(force=True))
        held.clear()

    with track(len(prompts) * tries, "draw and judge") as job:
        for drawn in generate_images(
            generator, prompts, seeds=seeds, steps=steps, guidance=guidance, solver="dpm++", batch_size=batch
        ):
            held.append((drawn.prompt_index, drawn.image))
            if len(held) == batch:
                score()
            job.advance(1)
    if held:
        score()
    return correct


def table(correct: np.ndarray, tries: int, ks: Sequence[int]) -> list[dict[str, float]]:
    """Return a row for each k: the estimate and its 95 % interval."""
    rows = []
    for k in ks:
        values = pass_at_k(correct, tries, k)
        low, high = mean_interval(values) or (float("nan"), float("nan"))
        rows.append({"k": k, "pass": float(values.mean()), "low": low, "high": high})
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw, judge, and print a line for each k."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pass_at_k", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="a folder or hub id, as for `mmalign generate`")
    parser.add_argument("--prompts", default="shapes-validation", help="a built-in name or a file")
    parser.add_argument("--limit", type=int, help="use only the first so many prompts")
    parser.add_argument("--k", default="1,2,4,8,16", help="numbers of tries, separated by commas")
    parser.add_argument("--reward", default="shapes-strict", help="a reward that is 1 for a right image")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=10, help="of DPM-Solver++")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    given = parser.parse_args(arguments)
    try:
        ks = sorted({int(k) for k in given.k.split(",")})
    except ValueError:
        parser.error(f"--k {given.k}: give whole numbers separated by commas")
    if ks[0] < 1:
        parser.error(f"--k {given.k}: numbers of tries are at least 1")
    if given.batch < 1:
        parser.error(f"--batch {given.batch}: at least 1")
    if given.json and not given.json.parent.is_dir():
        parser.error(f"--json {given.json}: there is no folder {given.json.parent}")
    try:
        prompts = load_prompts(given.prompts, given.limit)
        options = {"reward": given.reward, "guidance": given.guidance, "steps": given.steps, "batch": given.batch}
        correct = count_correct(given.model, prompts, ks[-1], **options)
    except (UserError, PipelineError, RewardError) as error:
        parser.error(str(error))
    rows, never = table(correct, ks[-1], ks), float((correct == 0).mean())
    always = float((correct == ks[-1]).mean())
    print(
        f"{given.model}, {len(prompts)} prompts of {given.prompts}, {ks[-1]} images each, guidance {given.guidance:g}"
    )
    for row in rows:
        print(f"pass@{row['k']:<4} {row['pass']:.3f} [{row['low']:.3f}, {row['high']:.3f}]")
    print(f"right in none of {ks[-1]}: {never:.0%} of the prompts; in all: {always:.0%}")
    if given.json:
        given.json.write_text(json.dumps({"rows": rows, "correct": correct.tolist(), **options}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
