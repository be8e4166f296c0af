"""The reference of a run: the model that training starts from, its base without the adapter, or another model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.core.errors import UserError
from mmalign.core.resources import resolve_model
from mmalign.methods.reference import Reference
from mmalign.training.tasks import task_of
from pipelines.components import component_config
from pipelines.load import family_of, fingerprint_model, is_adapter, process_of

if TYPE_CHECKING:
    from mmalign.config.run import RunConfig
    from mmalign.methods.base import Method


def check_reference(config: RunConfig, method: Method[Any]) -> None:
    """Refuse a reference that the method does not use, or of another family; reads the index of the model alone.

    Raises:
        UserError: names the key and the fix.
    """
    fixed = config.rounds is not None and config.rounds.reference == "base"
    if (config.reference is not None or fixed) and not method.keeps_reference:
        key = "rounds.reference" if fixed else "reference"
        raise UserError(f"{key}: method '{method.name}' has, with these options, no reference that is kept; remove it")
    if config.reference is None:
        return
    path, own = resolve_model(config.reference), resolve_model(config.model)
    if is_adapter(path):
        raise UserError(f"reference {config.reference} is an adapter; merge it first: `mmalign merge`")
    if not (Path(path).is_dir() and Path(own).is_dir()) or is_adapter(own):
        return  # those of a hub id are compared when they are loaded, and to train an adapter is refused there
    other, family = family_of(path, resolve_model), family_of(own, resolve_model)
    if other is not family:
        raise UserError(
            f"reference {config.reference} is of the family '{other.family}', and model {config.model} of"
            f" '{family.family}'; choose a reference of the model's family"
        )
    different = _different(*(component_config(Path(one), family.network_name) for one in (path, own)))
    if not family.is_flow and not different:
        different = _different(
            *({"prediction": getattr(process_of(one, resolve_model), "prediction", None)} for one in (path, own))
        )
    if different:
        raise UserError(
            f"reference {config.reference} differs from model {config.model} in {different}; choose a reference of"
            " the model's shape"
        )


def _different(reference: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """Return the first key on which two configurations disagree, with both values; empty where there is none."""
    for key in (one for one in own if one in reference and one != "sample_size" and not one.startswith("_")):
        if reference[key] != own[key]:
            return f"{key} ({reference[key]} and {own[key]})"
    return ""


def reference_id(config: RunConfig) -> str:
    """Return what tells one reference from another, by its content; empty for that of the start."""
    if config.reference is None:
        return ""
    return f"+reference {fingerprint_model(resolve_model(config.reference), resolve=resolve_model)}"


def make_reference(config: RunConfig, model: Any, *, autocast: Any, device: Any) -> Reference:
    """Return the reference of `model`, which is about to be trained and has its adapter.

    An adapter on the reference itself is switched off, also one that was trained before (`adapter.start`); any other
    reference is held in memory beside the policy.

    Raises:
        UserError: the reference has latents of another shape.
    """
    precision, adapter = config.trainer.precision, config.adapter
    of_base = config.reference is not None and resolve_model(config.reference) == resolve_model(config.model)
    if config.reference is None or of_base:
        switched = adapter.kind == "lora" and (of_base or adapter.start is None)
        return Reference(model, "adapter" if switched else "copy", precision=precision, autocast=autocast)
    other = task_of(config).load_model(config, resolve_model(config.reference), device)
    if type(other) is not type(model) or other.latent_shape != model.latent_shape:
        raise UserError(
            f"reference {config.reference} is of '{other.family}' with latents {list(other.latent_shape)}, and model"
            f" {config.model} of '{model.family}' with {list(model.latent_shape)}; choose one of the model's shape"
        )
    return Reference(model, "copy", network=other.network, precision=precision, autocast=autocast)
