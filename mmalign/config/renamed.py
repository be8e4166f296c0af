"""Keys of a configuration that once had another name: the old name is still read, the new one is written.

A schema declares them as `renamed: ClassVar[Mapping[str, str]] = {"old": "new"}`. That one line covers config files,
overrides, the options of a `RunConfig` built in Python, and the recipe in a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel

from mmalign.config.yaml import KeyPath, Tree, dotted
from mmalign.core.progress import note


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the schemas in a type annotation, such as that of `list[RewardConfig] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from models_in(argument)


def schema_at(schema: type[BaseModel] | None, path: KeyPath) -> type[BaseModel] | None:
    """Return the schema of the mapping at `path` of a configuration; None for a list or a mapping without a schema."""
    for part in path:
        if schema and isinstance(part, str):
            field = schema.model_fields.get(part)
            schema = next(models_in(field.annotation), None) if field else None
    return schema


def new_names(schema: type[BaseModel] | None) -> Mapping[str, str]:
    """Return the renamed keys of a schema, old name -> new name."""
    names: Mapping[str, str] = getattr(schema, "renamed", {})
    return names


def rename_keys(tree: Tree, schema: type[BaseModel], path: KeyPath = ()) -> None:
    """Give the keys at and below `path` their new names, in place, with a note for each.

    An old name beside its new one stays as it is, an unknown key that `describe_errors` explains.
    """
    values: Any = tree.values
    for part in path:
        values = values[part]
    if isinstance(values, list):
        for index in range(len(values)):
            rename_keys(tree, schema, (*path, index))
    elif isinstance(values, dict):
        for old, new in new_names(schema).items():
            if old in values and new not in values:
                tree.rename((*path, old), new)
                note(f"{dotted((*path, old))} is now called {new}; the old name is still read")
        for key in values:
            inner = schema_at(schema, (key,)) if isinstance(key, str) else None
            if inner:
                rename_keys(tree, inner, (*path, key))


def current_options(schema: type[BaseModel], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of one schema under their new names; an old name beside its new one stays as it is."""
    names = new_names(schema)
    return {key if names.get(key, key) in options else names[key]: value for key, value in options.items()}


def current_recipe(
    recipe: Mapping[str, Any], schema: type[BaseModel], method: type[BaseModel] | None
) -> dict[str, Any]:
    """Return a flat recipe (see `flatten`) under the new names of its keys; `method` is the schema of that section."""

    def current(key: str) -> str:
        holder, last = _holder(key, schema, method)
        return key.removesuffix(last) + new_names(holder).get(last, last)

    return {current(key): value for key, value in recipe.items()}


def default_of(key: str, schema: type[BaseModel], method: type[BaseModel] | None) -> Any:
    """Return the default of a flat key, which stands for it in a recipe of before the key existed; `...`: none."""
    holder, last = _holder(key, schema, method)
    field = holder.model_fields.get(last) if holder else None
    return ... if field is None or field.is_required() else field.get_default(call_default_factory=True)


def _holder(key: str, schema: type[BaseModel], method: type[BaseModel] | None) -> tuple[type[BaseModel] | None, str]:
    """Return the schema that a flat key belongs to, and the key's name in it."""
    section, _, last = key.rpartition(".")
    path = tuple(int(part) if part.isdigit() else part for part in section.split(".")) if section else ()
    return (schema_at(method, path[1:]) if path[:1] == ("method",) else schema_at(schema, path)), last
