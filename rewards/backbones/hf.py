"""Models of transformers as towers: loading with clear errors, and their pooled embeddings."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewards.backbones.preprocess import Preprocess
from rewards.errors import RewardError


def features(output: Any) -> Tensor:
    """Return the embedding of `get_image_features` or `get_text_features`.

    transformers 4 returns the tensor; transformers 5 an object whose `pooler_output` is the projected embedding.
    """
    if isinstance(output, Tensor):
        return output
    pooled = getattr(output, "pooler_output", None)
    if not isinstance(pooled, Tensor):
        raise RewardError(f"transformers returned {type(output).__name__} without a pooled embedding")
    return pooled


def load_pretrained(
    cls: str, source: str | PathLike[str], *, dtype: torch.dtype | None = None, subfolder: str = "", **options: Any
) -> Any:
    """Load a model (give `dtype`), tokenizer, processor or config by the name of its transformers class.

    Safetensors are read where there are any, else a torch file, from which only tensors are taken. Weights that the
    checkpoint lacks, which transformers would draw at random with a warning, are an error.

    Raises:
        RewardError: it cannot be loaded, or the checkpoint does not hold every weight.
    """
    import transformers
    from transformers.utils import logging

    found = getattr(transformers, cls)
    if cls.startswith("Auto"):
        options["trust_remote_code"] = False  # else transformers asks on standard input, where `yes` may answer
    if not Path(source).exists() and Path(source).is_absolute():
        raise RewardError(f"{source}: no such directory")
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        if dtype is None:
            return found.from_pretrained(str(source), subfolder=subfolder, **options)
        options |= {"dtype": dtype, "weights_only": True, "output_loading_info": True, "subfolder": subfolder}
        # Else transformers raises an error that only its log explains; mismatches are refused below.
        options["ignore_mismatched_sizes"] = True
        try:
            model, info = found.from_pretrained(str(source), use_safetensors=True, **options)
        except OSError as error:
            if "safetensors" not in str(error):
                raise
            model, info = found.from_pretrained(str(source), use_safetensors=False, **options)
    except Exception as error:  # OSError, ValueError, and the hub's own
        reason = " ".join(str(error).split())[:300]
        raise RewardError(f"cannot load {cls} from {source}: {reason}") from error
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
    mismatched = [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]]
    lacking = sorted([*info["missing_keys"], *mismatched])
    if lacking:
        raise RewardError(f"{source} lacks weights of {cls}: {', '.join(lacking[:6])}: it belongs to another model")
    return model.eval()


def image_preprocessing(source: str | PathLike[str]) -> Preprocess:
    """Read the preprocessing of a model's images from the image processor's configuration beside its weights.

    Raises:
        RewardError: it does not exist, or `Preprocess` does not support it.
    """
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        config, _ = ImageProcessingMixin.get_image_processor_dict(str(source))
    except Exception as error:  # OSError, ValueError, and the hub's own
        reason = " ".join(str(error).split())[:200]
        raise RewardError(f"{source}: cannot read preprocessor_config.json: {reason}") from error
    return Preprocess.from_transformers(config)
