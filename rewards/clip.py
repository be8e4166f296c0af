"""CLIPScore: how well a caption describes an image, by the cosine of CLIP embeddings.

Sources: Radford et al. 2021 (arXiv:2103.00020); Hessel et al. 2021, "CLIPScore" (arXiv:2104.08718), section 3. Papers
report three scales under one name, so the kind is an option and stands in `version`:

* `cosine`     cos(image, text), in [-1, 1]; the default;
* `clipscore`  100 * max(cos, 0), as torchmetrics and most alignment papers;
* `hessel`     2.5 * max(cos, 0) with "A photo depicts " before the caption, as the CLIPScore paper.

`scale=` and `prefix=` override the kind's own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from jaxtyping import Float
from torch import Tensor

from rewards.errors import RewardError, choices
from rewards.preprocess import MODES, Preprocess
from rewards.two_tower import TwoTowerReward

LOCAL, HUB = "local-dir:", "hf-hub:"


class Kind(NamedTuple):
    """How a cosine becomes a score: `scale * max(cos, 0)`, or without the maximum where `clamp` is false."""

    scale: float
    prefix: str
    clamp: bool


KINDS = {
    "cosine": Kind(1.0, "", clamp=False),
    "clipscore": Kind(100.0, "", clamp=True),
    "hessel": Kind(2.5, "A photo depicts ", clamp=True),
}


class ClipReward(TwoTowerReward):
    """Agreement of image and prompt: cosine of the embeddings of any open_clip model.

    The model is named by `weights` (a directory in open_clip's layout, or `hf-hub:org/name`), or else by open_clip's
    own `model` and `pretrained` tag; `weights` may also be a .safetensors file for that `model`.
    `preprocessing="reference"` resizes through PIL as open_clip does, without gradient.

    A subclass with another `name` is a preset: it may override `default_weights`, `default_kind`, `default_model`,
    `default_pretrained`, and the facts.
    """

    name: ClassVar[str] = "clip"
    licence = "code and OpenAI weights MIT; other weights: see their card"
    source = "open_clip ViT-B-32-quickgelu, tag openai"
    citation = "Hessel et al. 2021, arXiv:2104.08718; Radford et al. 2021, arXiv:2103.00020"
    version = "cosine"
    range = (-1.0, 1.0)

    default_model: ClassVar[str] = "ViT-B-32-quickgelu"
    default_pretrained: ClassVar[str] = "openai"
    default_kind: ClassVar[str] = "cosine"

    def __init__(
        self,
        *,
        weights: str | PathLike[str] | None = None,
        model: str | None = None,
        pretrained: str | None = None,
        kind: str | None = None,
        scale: float | None = None,
        prefix: str | None = None,
        preprocessing: str = "differentiable",
        **options: Any,
    ) -> None:
        """Load the model; nothing given means the class's defaults."""
        super().__init__(**options)
        if preprocessing not in MODES:
            raise RewardError(f"preprocessing {preprocessing!r} is unknown; {choices(preprocessing, MODES)}")
        self.preprocessing = preprocessing
        self.kind = _kind(kind or self.default_kind, scale, prefix)
        self.range = (0.0 if self.kind.clamp else -self.kind.scale, self.kind.scale)
        self.version = f"{kind or self.default_kind}, scale {self.kind.scale:g}, prefix {self.kind.prefix!r}"
        if weights is None and model is None and pretrained is None:
            weights = self.default_weights()
        name, tag = _resolve(weights, model or self.default_model, pretrained or self.default_pretrained)
        self.source = name if tag is None else f"open_clip {name}, {tag}"
        self.model: Any = _load_model(name, tag).to(self.device, self.dtype)
        self.preprocess = Preprocess.from_open_clip(self.model.visual.preprocess_cfg)
        self.tokenizer: Any = _load_tokenizer(name)
        self._truncated: set[str] = set()

    @classmethod
    def default_weights(cls) -> str | None:
        """Where a preset has its weights; asked at load time, so that it may look for them."""
        return None

    def encode_media(self, media: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch features"]:
        """Embed images by CLIP's image tower."""
        return self.model.encode_image(self.preprocess(media, self.preprocessing).to(self.dtype))

    def encode_prompts(self, prompts: list[str]) -> Float[Tensor, "batch features"]:
        """Embed prompts, prefix first, by CLIP's text tower; what exceeds its context is cut with a warning."""
        texts = [self.kind.prefix + prompt for prompt in prompts]
        self._warn_truncated(texts)
        return self.model.encode_text(self.tokenizer(texts).to(self.device))

    def compare(self, cosine: Float[Tensor, " *shape"]) -> Float[Tensor, " *shape"]:
        """Apply the kind: scale, and cut at zero."""
        return self.kind.scale * (cosine.clamp(min=0) if self.kind.clamp else cosine)

    def _warn_truncated(self, texts: list[str]) -> None:
        limit = self.tokenizer.context_length
        long = [text for text in texts if _token_count(self.tokenizer, text) > limit]
        if long and not self._truncated:
            warnings.warn(
                f"{self.name}: {len(long)} of {len(texts)} prompts exceed {limit} tokens and are cut there, "
                f"first {long[0][:60]!r}; later ones are counted in `truncated_prompts`",
                stacklevel=2,
            )
        self._truncated.update(long)

    @property
    def truncated_prompts(self) -> int:
        """How many distinct prompts were cut at the context length so far."""
        return len(self._truncated)


def _kind(kind: str, scale: float | None, prefix: str | None) -> Kind:
    if kind not in KINDS:
        raise RewardError(f"kind {kind!r} is unknown; {choices(kind, KINDS)}")
    base = KINDS[kind]
    return Kind(base.scale if scale is None else scale, base.prefix if prefix is None else prefix, base.clamp)


def _resolve(weights: str | PathLike[str] | None, model: str, pretrained: str) -> tuple[str, str | None]:
    """Return open_clip's model name and tag (or weights file); a model with a schema has no tag."""
    if weights is None:
        return model, pretrained
    given = str(weights)
    path = Path(given.removeprefix(LOCAL))
    if path.is_dir():
        _check_directory(path)
        return f"{LOCAL}{path}", None
    if path.is_file():
        if path.suffix != ".safetensors":
            raise RewardError(f"weights {given!r}: only .safetensors files are read; convert it with safetensors")
        return model, str(path)
    if given.startswith(HUB):
        return given, None
    raise RewardError(
        f"weights {given!r}: no such directory or file; allowed: a directory with open_clip_config.json, a "
        f".safetensors file (with model=), or a model of the hub as 'hf-hub:org/name'"
    )


def _check_directory(path: Path) -> None:
    if not (path / "open_clip_config.json").is_file():
        raise RewardError(f"{path} is not an open_clip model: it lacks open_clip_config.json")
    if not any(path.glob("*.safetensors")):
        raise RewardError(f"{path} has no weights: open_clip_model.safetensors is expected")


def _load_model(name: str, tag: str | None) -> Any:
    import open_clip

    if tag is not None:
        _check_name(name, tag)
    with warnings.catch_warnings():
        # The wrong activation gives wrong embeddings without any other sign.
        warnings.filterwarnings("error", message="QuickGELU mismatch")
        create = partial(open_clip.create_model, name, tag, require_pretrained=True)
        return _explained(f"cannot load CLIP {name!r}", create)


def _check_name(name: str, tag: str) -> None:
    """Check model, tag and activation before anything is downloaded."""
    import open_clip

    config = open_clip.get_model_config(name)
    if config is None:
        raise RewardError(f"open_clip has no model {name!r}; {choices(name, open_clip.list_models())}")
    if Path(tag).is_file():
        return
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
    """Turn whatever open_clip raises into one line."""
    try:
        return load()
    except Exception as error:
        reason = " ".join(str(error).split())
        raise RewardError(f"{what}: {reason or type(error).__name__}") from error


def _token_count(tokenizer: Any, text: str) -> int:
    """Count tokens with the start and end tokens; open_clip's tokenizers either wrap transformers' or encode alone."""
    wrapped = getattr(tokenizer, "tokenizer", None)
    if wrapped is not None:
        return len(wrapped(text, verbose=False)["input_ids"])
    return len(tokenizer.encode(text)) + 2
