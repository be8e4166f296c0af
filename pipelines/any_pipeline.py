"""Text-to-image pipelines of diffusers outside our families (PixArt, Sana, Lumina, ...): drawing, nothing else.

The pipeline itself samples, with its own scheduler. It can be compared and its images labelled; training needs a
family, which gives the noise process and single steps.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pipelines.components import INDEX, has_component, quiet_loading, weight_variant
from pipelines.errors import PipelineError

GUIDANCE_NAMES = ("guidance_scale", "true_cfg_scale")
NEEDED = {"prompt", "height", "num_inference_steps", "generator"}
OTHER_INPUTS = {"image", "mask_image", "control_image", "video", "num_frames"}
"""Parameters of pipelines that edit images or make videos."""
IMAGE_IS_OPTIONAL = (
    "Flux2Pipeline",
    "GlmImagePipeline",
    "QwenImage21Pipeline",
    "ZImageOmniPipeline",
)


def is_text_to_image(pipeline: Any) -> bool:
    """Say whether the ``_class_name`` of an index is a text-to-image pipeline of the installed diffusers.

    Its call tells: it takes a prompt and a height, and no image. (``AutoPipelineForText2Image`` has a list, which
    imports all pipelines at once: under transformers 5, diffusers 0.36 fails at that.)

    >>> is_text_to_image("SanaPipeline"), is_text_to_image("FluxFillPipeline")
    (True, False)
    """
    import diffusers

    try:
        found = getattr(diffusers, pipeline, None) if isinstance(pipeline, str) else None
    except (ImportError, RuntimeError):  # this one does not import beside the installed transformers
        return False
    if not (isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline)):
        return False
    takes = set(inspect.signature(found.__call__).parameters)
    others = OTHER_INPUTS - ({"image"} if pipeline in IMAGE_IS_OPTIONAL else set())
    return takes >= NEEDED and not takes & others


class DiffusersPipeline:
    """A pipeline of diffusers that draws images from prompts.

    >>> pipeline = DiffusersPipeline(root, index, name_or_path="stabilityai/...", dtype=torch.bfloat16,
    ...     device=torch.device("cuda"))  # doctest: +SKIP
    >>> images = pipeline.draw(["a star"], seeds=[0], steps=28, guidance=4.5)  # doctest: +SKIP
    """

    has_adapter = False

    def __init__(
        self,
        root: Path,
        index: dict[str, Any],
        *,
        name_or_path: str,
        dtype: torch.dtype,
        device: torch.device,
        image_size: int | None = None,
    ) -> None:
        """Load every component from `root`, whose parsed ``model_index.json`` is `index`; safetensors only, no code.

        `image_size` is the side of the images in pixels, by default the pipeline's own.

        Raises:
            PipelineError: a component is missing, damaged or would run code of its own.
        """
        from diffusers import DiffusionPipeline

        self.name_or_path, self._side = name_or_path, image_size
        _refuse_code(root, index)
        names = [name for name in index if has_component(index, name)]
        # diffusers wants to be told of each component that is absent.
        absent = {name: None for name, entry in index.items() if isinstance(entry, list) and name not in names}
        variants = {found for name in names if (found := weight_variant(root / name)) is not None}
        options = {"torch_dtype": dtype, "use_safetensors": True, "local_files_only": True, **absent}
        with quiet_loading():
            try:
                self.pipe: Any = DiffusionPipeline.from_pretrained(
                    str(root), **options, **({"variant": min(variants)} if variants else {})
                )
            except Exception as error:  # each component raises its own kinds
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
                raise PipelineError(f"cannot load the {index['_class_name']} {root}: {reason}") from error
        self.pipe.set_progress_bar_config(disable=True)
        self.pipe.to(device)
        self._takes = inspect.signature(type(self.pipe).__call__).parameters

    def set_adapter_scale(self, scale: float) -> None:
        """Refuse: there is no adapter."""
        raise PipelineError(f"{self.name_or_path} carries no LoRA adapter to scale; leave the scale out.")

    @torch.no_grad()
    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int = 50,
        guidance: float = 7.5,
        eta: float = 0.0,
        solver: str = "ddim",
    ) -> Float[Tensor, "batch 3 height width"]:
        """Return one image in [0, 1], float32, for each prompt and its seed.

        Raises:
            PipelineError: `eta` or `solver` ask for another sampler than the pipeline's own, or it cannot draw so.
        """
        if eta or solver != "ddim":
            raise PipelineError(
                f"{self.name_or_path} is a {type(self.pipe).__name__}, which samples by its own scheduler; leave eta"
                " and solver out."
            )
        scale = next((name for name in GUIDANCE_NAMES if name in self._takes), None)
        options: dict[str, Any] = {scale: guidance} if scale else {}
        if "true_cfg_scale" in self._takes and "negative_prompt" in self._takes and guidance != 1:
            # Guidance by a second prediction; the other scale is then an input of distilled models alone.
            options |= {"true_cfg_scale": guidance, "negative_prompt": [" "] * len(prompts)}
        if self._side is not None:
            options |= {"height": self._side, "width": self._side}
        random = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        try:
            made = self.pipe(
                prompt=list(prompts), num_inference_steps=steps, generator=random, output_type="pt", **options
            )
        except (ValueError, TypeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise PipelineError(f"{self.name_or_path} cannot draw with these settings: {reason}") from error
        images = getattr(made, "images", None)
        if not isinstance(images, Tensor) or images.ndim != 4:
            raise PipelineError(f"{self.name_or_path} is a {type(self.pipe).__name__}, which gives back no images.")
        if self._side is not None and images.shape[-2:] != (self._side, self._side):
            made_side = " x ".join(map(str, images.shape[-2:]))
            raise PipelineError(
                f"{self.name_or_path} draws no images of {self._side} x {self._side}; it made {made_side} of it."
            )
        return images.float().cpu().clamp(0.0, 1.0)


def _refuse_code(root: Path, index: dict[str, Any]) -> None:
    """Refuse a directory whose loading would run code that is not diffusers' or transformers' own."""
    from diffusers import pipelines as diffusers_pipelines

    for name in index:
        if not has_component(index, name):
            continue
        library, class_name = index[name]
        ours = library in ("diffusers", "transformers") or hasattr(diffusers_pipelines, str(library))
        automatic = str(class_name).startswith("Auto") and any(
            b'"auto_map"' in file.read_bytes() for file in (root / name).glob("*.json")
        )
        if not ours or automatic:
            raise PipelineError(
                f"{root / INDEX}: the component '{name}' ({library}.{class_name}) would run code of the model's"
                " author, which is not done; use a model of diffusers' and transformers' own classes."
            )
