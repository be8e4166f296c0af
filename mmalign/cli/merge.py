"""Merge adapters into a base model: one model in the layout of diffusers or transformers.

The merged model can be trained further, shared or served. The config of the adapter's training is copied along, so
that a comparison still knows how the model was trained.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mmalign.cli.generate import add_adapter_argument
from mmalign.core.errors import UserError
from mmalign.core.files import check_output
from mmalign.core.resources import resolve_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "model", metavar="MODEL", help="directory of a training run with adapter.kind lora, or a base for --adapter"
    )
    add_adapter_argument(parser)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write the merged model to")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="type of the weights (default fp32)"
    )


def run(args: argparse.Namespace) -> int:
    """Load base and adapter on the CPU, merge them, and write the result atomically."""
    location = resolve_model(args.model)
    from mmalign.training.models import save_whole
    from pipelines.load import is_adapter
    from pipelines.vlm.adapters import is_vlm_adapter

    vlm = is_vlm_adapter(location)
    if not vlm and not args.adapter and not is_adapter(location):
        whole = any((Path(location) / name).is_file() for name in ("config.json", "model_index.json"))
        what = "is a whole model already" if whole else "holds no adapter"
        raise UserError(
            f"{args.model} {what}; name the directory of a finished training with adapter.kind lora, or a base with "
            "--adapter PATH"
        )
    if vlm and args.adapter:
        raise UserError(f"--adapter {args.adapter[0]}: {args.model} is a vision-language adapter; leave --adapter out")
    check_output(args.out)
    if args.out.is_dir() and any(args.out.iterdir()):
        raise UserError(f"--out {args.out}: is not empty; name another folder, or remove it")
    model = _open(location, args, vlm)
    save_whole(model, Path(location), args.out)
    print(f"{' + '.join([args.model, *(args.adapter or [])])} was merged into {model.name_or_path}: {args.out}")
    return 0


def _open(location: str, args: argparse.Namespace, vlm: bool) -> Any:
    from mmalign.api.generate import Sampling
    from pipelines import load_vlm

    if vlm:
        return load_vlm(location, dtype=args.precision, device="cpu", resolve=resolve_model)
    return Sampling(location, precision=args.precision, adapter=args.adapter).open("cpu")
