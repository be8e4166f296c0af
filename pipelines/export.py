"""Write a generator as a diffusers directory, all of it safetensors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from pipelines.components import has_component, weight_files
from pipelines.errors import PipelineError
from pipelines.saving import replacing_parts

UNSAFE = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".msgpack", ".h5", ".onnx", ".onnx_data")


def save_pipeline(path: str | Path, root: Path, index: dict[str, Any], networks: dict[str, Any]) -> None:
    """Write networks, by the names of their components, and every other component of `root` into the directory `path`.

    The others are unchanged; encoders are copied as files, so they need not be in memory. Each part is written beside
    its place and then moved there; ``model_index.json`` comes last, so that a directory that has one is complete.
    """
    path = Path(path)
    if path.resolve() == root.resolve():
        raise PipelineError(f"refusing to save over the base model {root}; choose another directory.")
    with replacing_parts(path, "model_index.json") as scratch:
        for name in index:
            if name not in networks and has_component(index, name):
                _copy_component(root / name, scratch / name)
        for name, network in networks.items():
            network.save_pretrained(scratch / name, safe_serialization=True)
        (scratch / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def _copy_component(source: Path, target: Path) -> None:
    """Copy one component's configuration and the weights that would be loaded; never a pickle."""
    target.mkdir(parents=True)
    wanted = {file.name for file in weight_files(source)}
    for file in source.iterdir():
        skipped = file.suffix in UNSAFE or (file.suffix == ".safetensors" and file.name not in wanted)
        if file.is_file() and not skipped:
            shutil.copyfile(file, target / file.name)
