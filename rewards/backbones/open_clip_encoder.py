"""Models of open_clip as encoders: by name and tag, from a directory, from the hub, or from a weights file.

The wrong activation gives wrong embeddings without any warning sign: open_clip 3 builds `ViT-B-32` with plain GELU
also for the `openai` weights, which were trained with QuickGELU, and only warns. Here that is an error.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from rewards.backbones.encoder import Encoder
from rewards.backbones.preprocess import Preprocess
from rewards.backbones.weights import load_state, read_state
from rewards.errors import RewardError, choices

LOCAL, HUB = "local-dir:", "hf-hub:"

# Further entries of OpenAI's archives besides the weights.
_NOT_WEIGHTS = {"input_resolution", "context_length", "vocab_size"}


class OpenClipEncoder(Encoder):
    """A model of open_clip with its tokenizer."""

    text_parts = ("text", "transformer", "token_embedding", "positional_embedding", "ln_final", "text_projection")

    def __init__(self, model: nn.Module, name: str, source: str) -> None:
        """model: of open_clip; name: by which open_clip finds its tokenizer; source: for the facts."""
        super().__init__(model)
        self.source = source
        self.preprocess = Preprocess.from_open_clip(self.model.visual.preprocess_cfg)
        self.tokenizer: Any = _load_tokenizer(name)
        self.context = self.tokenizer.context_length

    def embed_pixels(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch features"]:
        """Embed preprocessed images."""
        return self.model.encode_image(pixels)

    def tokenize(self, texts: list[str]) -> tuple[dict[str, Tensor], list[int]]:
        """Return the tokens that embeddings depend on, and the uncut token counts.

        A text that is pooled at its end token, and where no token sees a later one, needs none of its padding, which
        is most of CLIP's context for an ordinary prompt.
        """
        ids = self.tokenizer(texts)
        pool = getattr(self.model, "text_pool_type", None)
        if pool not in ("argmax", "eos") or self.model.attn_mask is None:
            return {"text": ids}, [self._count(text) for text in texts]
        ends = (ids if pool == "argmax" else (ids == self.model.text_eos_id).int()).argmax(dim=-1) + 1
        # The tokens of a text that fills the context do not show whether it was cut.
        counts = [
            end if end < self.context else self._count(text) for end, text in zip(ends.tolist(), texts, strict=True)
        ]
        return {"text": ids[:, : int(ends.max())]}, counts

    def embed_tokens(self, tokens: dict[str, Tensor]) -> Float[Tensor, "batch features"]:
        """Embed the result of `tokenize`."""
        text = tokens["text"].to(next(self.parameters()).device)
        length = text.shape[1]
        if length == self.context:
            return self.model.encode_text(text)
        positions, mask = self.model.positional_embedding, self.model.attn_mask
        cut = {"positional_embedding": positions[:length], "attn_mask": mask[:length, :length]}
        return functional_call(self.model, cut, kwargs={"text": text}, tie_weights=False)[1]

    def _count(self, text: str) -> int:
        """Count tokens; open_clip's tokenizers either wrap transformers' or encode without start and end."""
        wrapped = getattr(self.tokenizer, "tokenizer", None)
        if wrapped is None:
            return len(self.tokenizer.encode(text)) + 2
        return len(wrapped(text, verbose=False)["input_ids"])


def load_open_clip(
    weights: str | PathLike[str] | None = None, *, model: str | None = None, pretrained: str | None = None
) -> OpenClipEncoder:
    """Load a directory in open_clip's layout, a model of the hub, a weights file for `model`, or `model` with a tag.

    Raises:
        RewardError: the model, tag or file does not exist, or weights or activation belong to another model.
    """
    if weights is None:
        if model is None or pretrained is None:
            raise RewardError("give model= and pretrained= (open_clip's name and tag), or weights=")
        _check_tag(model, pretrained)
        return OpenClipEncoder(_create(model, pretrained), model, f"open_clip {model}, {pretrained}")
    given = str(weights)
    path = Path(given.removeprefix(LOCAL)).expanduser()
    if path.is_file():
        if model is None:
            raise RewardError(f"weights {given!r} is a file; also give model=, open_clip's name of the architecture")
        _check_name(model)
        built = _create(model, None)
        load_state(built, read_state(path), path, rename=lambda name: None if name in _NOT_WEIGHTS else name)
        return OpenClipEncoder(built, model, f"open_clip {model}, {path}")
    name = given if given.startswith(HUB) else f"{LOCAL}{path}"
    if name.startswith(LOCAL) and not any(path.glob("*.safetensors")):
        raise RewardError(f"{path} has no weights; open_clip_model.safetensors is expected")
    return OpenClipEncoder(_create(name, None), name, name)


def _create(name: str, tag: str | None) -> Any:
    import open_clip

    # A name with a schema brings its weights; towers are never filled with other weights than asked for.
    complete = tag is not None or name.startswith((LOCAL, HUB))
    towers = {"pretrained_image": False, "pretrained_text": False}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="QuickGELU mismatch")
        create = partial(open_clip.create_model, name, tag, require_pretrained=complete, **towers)
        return _explained(f"cannot load CLIP {name!r}", create)


def _check_name(name: str) -> dict[str, Any]:
    import open_clip

    config = open_clip.get_model_config(name)
    if config is None:
        raise RewardError(f"open_clip has no model {name!r}; {choices(name, open_clip.list_models())}")
    return config


def _check_tag(name: str, tag: str) -> None:
    """Check model, tag and activation before anything is downloaded."""
    import open_clip

    config = _check_name(name)
    trained = open_clip.get_pretrained_cfg(name, tag)
    if not trained:
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise RewardError(f"open_clip model {name!r} has no pretrained tag {tag!r}; {choices(tag, tags)}")
    quick = trained.get("quick_gelu", False)
    if quick != config.get("quick_gelu", False):
        other = f"{name}-quickgelu"
        known = quick and other in open_clip.list_models()
        fix = f"use model={other!r}" if known else "use another tag, or weights='hf-hub:org/name'"
        has = ("plain GELU", "QuickGELU")
        raise RewardError(
            f"QuickGELU mismatch: {tag!r} was trained with {has[quick]}, {name!r} has {has[not quick]}; {fix}"
        )


def _load_tokenizer(name: str) -> Any:
    import open_clip

    return _explained(f"cannot load the tokenizer of {name!r}", partial(open_clip.get_tokenizer, name))


def _explained(what: str, load: Callable[[], Any]) -> Any:
    """Convert errors of open_clip to a RewardError of one line; no code beside a model is run."""
    from transformers import dynamic_module_utils

    # open_clip hands no trust_remote_code on, and transformers then asks on standard input, unless it may not wait.
    held = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        return load()
    except Exception as error:
        reason = " ".join(str(error).split())
        raise RewardError(f"{what}: {reason or type(error).__name__}") from error
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = held
