"""Check this installation and print what a bug report needs: versions, devices, kernels, assets, disk.

The checks are real tests: attention kernels are called, and folders are written to. The exit code is 1 if something
that mmalign needs is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import tempfile
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from mmalign.core.resources import resource_root
from mmalign.core.version import __version__

REQUIRED = (
    "torch torchvision diffusers transformers open-clip-torch accelerate peft safetensors datasets pydantic pyyaml "
    "pyarrow pillow numpy scipy rich jaxtyping jinja2"
).split()
OPTIONAL = ("xformers", "tensorboard", "wandb", "trackio")
VARIABLES = ("HF_HOME", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF")
ASSETS = ("assets/shapes-sd", "assets/shapes-clip", "assets/shapes-vlm", "assets/prompts", "configs")
OK = "works"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


def run(args: argparse.Namespace) -> int:
    """Print the findings on standard output."""
    findings = examine()
    if args.json:
        print(json.dumps(findings, indent=2))
    else:
        for section, entries in findings.items():
            if isinstance(entries, dict):
                print(section)
                for name, value in entries.items():
                    print(f"  {name:<24} {value}")
        print("\n".join(f"problem: {problem}" for problem in findings["problems"]) or "no problems found")
    return 1 if findings["problems"] else 0


def examine() -> dict[str, Any]:
    """Return sections of name -> finding, and the list `problems` (empty on a sound installation)."""
    findings: dict[str, Any] = {
        "mmalign": {
            "version": __version__,
            "found in": str(Path(__file__).parent.parent),
            "python": platform.python_version(),
            "system": platform.platform(),
        },
        "packages": {name: _version(name) for name in (*REQUIRED, *OPTIONAL)},
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "assets": {name: _asset(resource_root() / name) for name in ASSETS},
        "folders": {str(folder): _write_test(folder) for folder in dict.fromkeys((Path.cwd(), cache_folder()))},
    }
    problems = [
        f"package {name} is missing; run `pip install {name}`"
        for name in REQUIRED
        if findings["packages"][name] == "not installed"
    ]
    problems += [
        f"{name} is missing under {resource_root()}; install mmalign again"
        for name, finding in findings["assets"].items()
        if finding == "missing"
    ]
    problems += [f"{folder}: {finding}" for folder, finding in findings["folders"].items() if "free" not in finding]
    if findings["packages"]["torch"] != "not installed":
        findings["devices"] = _devices()
        findings["attention"] = _attention()
        problems += [f"{name}: {it}" for name, it in findings["attention"].items() if "(auto)" in name and it != OK]
    return findings | {"problems": problems}


def cache_folder() -> Path:
    """Return the nearest existing folder to the cache of encoded data, `~/.cache/mmalign`."""
    wanted = Path.home() / ".cache" / "mmalign"
    return next(folder for folder in (wanted, *wanted.parents) if folder.is_dir())


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _asset(path: Path) -> str:
    if not path.exists():
        return "missing"
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return f"{len(files)} files, {sum(file.stat().st_size for file in files) / 1e6:.2f} MB"


def _write_test(folder: Path) -> str:
    """Write, rename and delete a small file, as every checkpoint does."""
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".mmalign-doctor-") as scratch:
            written = Path(scratch) / "written"
            written.write_bytes(b"0")
            os.replace(written, Path(scratch) / "renamed")
    except OSError as error:
        return f"cannot be written to ({error.strerror})"
    return f"writable, {shutil.disk_usage(folder).free / 1e9:.1f} GB free"


def _devices() -> dict[str, str]:
    import torch

    found = {"cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads in torch{_free_memory()}"}
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        capability = ".".join(map(str, torch.cuda.get_device_capability(index)))
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        name = torch.cuda.get_device_name(index)
        found[f"cuda:{index}"] = f"{name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free, compute {capability}, {bf16}"
    if torch.backends.mps.is_available():
        found["mps"] = "Apple GPU"
    return found


def _free_memory() -> str:
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on Windows and macOS
        return ""
    return f", {free / 1e9:.1f} GB free"


def _attention() -> dict[str, str]:
    """Call every attention kernel once, with its gradient, on every kind of device."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernels = ("MATH", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION")
    attention = torch.nn.functional.scaled_dot_product_attention
    found = {}
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        sample = torch.randn(1, 2, 16, 32, device=device, dtype=dtype, requires_grad=True)
        found[f"{device} sdpa (auto)"] = _try(attention, sample)
        for kernel in kernels:
            with sdpa_kernel(getattr(SDPBackend, kernel)):
                found[f"{device} sdpa {kernel.partition('_')[0].lower()}"] = _try(attention, sample)
        found[f"{device} xformers"] = _try(_xformers, sample.transpose(1, 2))
    return found


def _xformers(query: Any, key: Any, value: Any) -> Any:
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(query, key, value)


def _try(attention: Callable[[Any, Any, Any], Any], sample: Any) -> str:
    """Return "works", or the first line of the error of a forward and backward call."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            attention(sample, sample, sample).float().sum().backward()
    except Exception as error:  # any error of a kernel is the finding
        return "no: " + (str(error).strip().splitlines() or [type(error).__name__])[0]
    return OK
