"""Modules of mmalign and pipelines that were documented under other names in release 0.1.0; see `rewards.moved`."""

from __future__ import annotations

from rewards.moved import into

MOVED = {
    **into("core", "errors", "files", "progress", "registry", "resources", "seeds", package="mmalign"),
    **into("losses", "advantages", package="mmalign"),
    **into("methods", "reference", package="mmalign"),
    "mmalign.data.transforms": "mmalign.data.encoded.transforms",
    "mmalign.engine": "mmalign.training.train",
    "pipelines.unet_image": "pipelines.families.unet_image",
    **{
        f"pipelines.vlm_{name}": f"pipelines.vlm.{name}"
        for name in ("adapters", "batch", "decoding", "families", "features", "load", "media", "packing")
    },
}
