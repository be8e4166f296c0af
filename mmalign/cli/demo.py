"""The whole story on Shapes, on a CPU: a flow model learns from its own scored samples, and is compared with its base.

With --pairs the offline way instead: sample images, label pairs, fine-tune by Diffusion-DPO, compare. Every step is an
ordinary mmalign command, which is printed before it runs and can be copied. Run the demo again to resume it: only what
is missing is sampled and trained.
"""

from __future__ import annotations

import argparse
import shlex
import time
from pathlib import Path

from mmalign.core.files import check_output

DRAW = ["--solver", "dpm++", "--precision", "bf16", "--batch-size", "64"]
"""How images are drawn from the Shapes models: for pairs and for the comparison alike."""
REWARDS = "shapes-correctness,shapes-strict,shapes-quality,shapes-clip"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the demo."""
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="default runs/demo, with -pairs and -quick added by the options"
    )
    parser.add_argument("--pairs", action="store_true", help="learn from labelled pairs, by Diffusion-DPO, instead")
    parser.add_argument("--quick", action="store_true", help="a smoke test of every step; too short to show a gain")


def run(args: argparse.Namespace) -> int:
    """Run the steps one after the other; the first that fails ends the demo with its exit code."""
    from mmalign.cli import main

    start = time.time()
    out = args.out or Path("runs/demo" + "-pairs" * args.pairs + "-quick" * args.quick)
    check_output(out)
    for title, command in (steps_of_pairs if args.pairs else steps_online)(out, args.quick):
        print(f"\n── {title}\n$ mmalign {shlex.join(command)}", flush=True)
        code = main(command)
        if code:
            return code
    minutes = (time.time() - start) / 60
    tuned = out / ("dpo" if args.pairs else "nft")
    print(f"\nDone in {minutes:.1f} min. The fine-tuned model: {tuned} (a MODEL for every mmalign command)")
    print(f"Open the report: {out / 'compare' / 'report.html'}")
    if args.quick:
        print("This was --quick, which trains too little to show a gain; run `mmalign demo` for a result.")
    return 0


def steps_online(out: Path, quick: bool) -> list[tuple[str, list[str]]]:
    """(title, arguments) of every step of learning from the model's own samples."""
    base, test, control = "assets/shapes-flow", *(("8", "4") if quick else ("200", "50"))
    short = ["trainer.steps=24"]  # the first four minutes of the config
    tiny = ["trainer.steps=2", "trainer.batch_size=2", "trainer.gradient_accumulation=1"]
    return [
        (
            "1/2  Fine-tune by DiffusionNFT: the model samples, the oracle scores, the model learns from that",
            ["train", "shapes_flow/nft", f"output={out / 'nft'}", *(tiny if quick else short)],
        ),
        (
            "2/2  Compare base and tuned model on held-out prompts, with the base at its best guidance as control",
            ["compare", base, str(out / "nft"), "--names", "base,nft", "--prompts", "shapes-drawbench",
             "--limit", test, "--rewards", REWARDS, "--steps", "8", "--guidance", "2", *DRAW,
             "--guidance-control", "1,2,4", "--control-prompts", "shapes-validation", "--control-limit", control,
             "--out", str(out / "compare")],
        ),
    ]  # fmt: skip


def steps_of_pairs(out: Path, quick: bool) -> list[tuple[str, list[str]]]:
    """(title, arguments) of every step of learning from pairs."""
    base = "assets/shapes-sd"
    draw = ["--steps", "12", "--guidance", "4", *DRAW]
    prompts, images, test, control = ("16", "2", "10", "4") if quick else ("1600", "4", "200", "50")
    overrides = ["trainer.steps=4", "trainer.batch_size=4", "evaluate.every=4", "evaluate.limit=4"] if quick else []
    return [
        (
            "1/4  Sample several images a prompt from the base model",
            ["pairs", "sample", base, "--prompts", "shapes-train", "--limit", prompts, "--images-per-prompt", images,
             *draw, "--out", str(out / "samples")],
        ),
        (
            "2/4  Label them: the best of each prompt against the worst, as the oracle sees them",
            ["pairs", "label", str(out / "samples"), "--reward", "shapes-correctness,shapes-quality:0.3",
             "--out", str(out / "pairs.parquet")],
        ),
        (
            "3/4  Fine-tune by Diffusion-DPO",
            ["train", "shapes/diffusion_dpo", f"data.pairs={out / 'pairs.parquet'}", f"output={out / 'dpo'}",
             *overrides],
        ),
        (
            "4/4  Compare base and tuned model on held-out prompts, with the base at its best guidance as control",
            ["compare", base, str(out / "dpo"), "--names", "base,dpo", "--prompts", "shapes-drawbench",
             "--limit", test, "--rewards", REWARDS,
             *draw, "--guidance-control", "2,4,6,8", "--control-prompts", "shapes-validation",
             "--control-limit", control, "--out", str(out / "compare")],
        ),
    ]  # fmt: skip
