"""Check the files of a model before a library reads them, so that a damaged one is named, in one line."""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from pipelines.errors import MissingModelError, PipelineError

Given = ParamSpec("Given")
Loaded = TypeVar("Loaded")

MAX_TOKENS = 100_000
MAX_TIMESTEPS = 1_000_000
SPACINGS = ("leading", "trailing", "linspace")
PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow_prediction")


def explain_loading(load: Callable[Given, Loaded]) -> Callable[Given, Loaded]:
    """Wrap a function that loads the model named by its first argument: what a library raises becomes one line.

    The files of models are foreign, and the libraries that read them raise anything, from KeyError to
    ZeroDivisionError.
    """

    @wraps(load)
    def loaded(*args: Given.args, **options: Given.kwargs) -> Loaded:
        try:
            return load(*args, **options)
        except (PipelineError, MemoryError, NameError, AssertionError):  # the last two are faults of ours
            raise
        except Exception as error:
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            if full or type(error).__name__ in ("OutOfMemoryError", "AcceleratorError"):
                raise
            if "CUDA" in str(error) or "NVIDIA" in str(error):
                raise PipelineError(f"cannot load {args[0] if args else 'the model'}: {reason(error)}.") from error
            name = args[0] if args else options.get("name_or_path")
            raise PipelineError(
                f"cannot load {name}: {reason(error)}; its configuration or weights are damaged."
            ) from error

    return loaded


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, naming the file when it is missing or broken."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingModelError(f"{path} is missing; the model directory is incomplete, fetch it again.") from None
    except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
        raise PipelineError(f"{path} is not valid JSON ({error}); fetch the model again.") from None
    except OSError as error:
        raise PipelineError(f"{path} cannot be read ({error.strerror}); fetch the model again.") from None
    if not isinstance(content, dict):
        raise PipelineError(f"{path} should hold a JSON object but holds a {type(content).__name__}.")
    return content


def reason(error: BaseException) -> str:
    """Return what an error says, in one line, with its kind where the text alone does not explain it."""
    text = " ".join(str(error).split())[:300]
    if "ignore_mismatched_sizes" in text:  # transformers' advice, whose report stands in its log
        return "the weights have other shapes than config.json says"
    return text if isinstance(error, OSError) and text else f"{type(error).__name__}: {text}".removesuffix(": ")


def check_files(folder: Path) -> None:
    """Refuse a folder with a damaged configuration, tokenizer, chat format or weight file.

    Raises:
        PipelineError: names the file.
    """
    for path in sorted(folder.iterdir()):
        if path.suffix == ".json":
            content = read_json(path)
            if path.name == "tokenizer.json" and not isinstance(content.get("model"), dict):
                raise PipelineError(f"{path} is no tokenizer, since it has no 'model'; fetch the model again.")
        elif path.suffix == ".safetensors":
            _check_weights(path)
        elif path.suffix == ".jinja":
            _check_template(path)


def check_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Refuse a tokenizer without a padding token, or a CLIP's without a length to pad to; others are given one.

    Raises:
        PipelineError: names the file.
    """
    length = tokenizer.model_max_length
    if tokenizer.pad_token is None:
        raise _wrong(folder / "tokenizer_config.json", "pad_token", None, "a token, which prompts are padded with")
    if not type(tokenizer).__name__.startswith("CLIP"):
        return
    if not isinstance(length, int) or not 0 < length <= MAX_TOKENS:
        raise _wrong(folder / "tokenizer_config.json", "model_max_length", length, "a whole number, 77 for CLIP")


def check_scheduler(path: Path) -> None:
    """Refuse the configuration of a scheduler without timesteps, or with values that are none.

    Raises:
        PipelineError: names the file, the key and what is allowed.
    """
    config = read_json(path)
    steps = config.get("num_train_timesteps", 1000)
    if not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps <= MAX_TIMESTEPS:
        raise _wrong(path, "num_train_timesteps", steps, f"a whole number from 1 to {MAX_TIMESTEPS:,}")
    for key in ("beta_start", "beta_end"):
        value = config.get(key, 0.01)
        if not isinstance(value, int | float) or not 0 < value < 1 or not math.isfinite(value):
            raise _wrong(path, key, value, "a number between 0 and 1")
    for key in ("shift", "flow_shift"):
        value = config.get(key)
        if value is not None and not (isinstance(value, int | float) and 0 < value < math.inf):
            raise _wrong(path, key, value, "a number above 0 (1: none)")
    betas = config.get("trained_betas")
    if betas is not None and not (isinstance(betas, list) and len(betas) == steps):
        raise _wrong(path, "trained_betas", betas, f"null, or {steps} numbers")
    for key, allowed in (("timestep_spacing", SPACINGS), ("prediction_type", PREDICTIONS)):
        if key in config and config[key] not in allowed:
            raise _wrong(path, key, config[key], ", ".join(allowed))


def _wrong(path: Path, key: str, value: Any, allowed: str) -> PipelineError:
    return PipelineError(f"{path}: {key} is {str(value)[:60]!r}; allowed: {allowed}.")


def _check_weights(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as weights:
            weights.keys()
    except (SafetensorError, OSError, ValueError) as error:
        raise PipelineError(f"{path} is damaged or cut off ({error}); fetch the model again.") from None


def _check_template(path: Path) -> None:
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
        environment.parse(
            path.read_text(encoding="utf-8").replace("{% generation %}", "").replace("{% endgeneration %}", "")
        )
    except (TemplateError, UnicodeDecodeError, RecursionError) as error:
        raise PipelineError(f"{path} is no chat format ({reason(error)}); fetch the model again.") from None
