"""Find and describe what is wrong with a configuration: wrong values, and values that exclude each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from mmalign.config.issues import ConfigIssue, mapping
from mmalign.config.renamed import new_names, schema_at
from mmalign.config.round_checks import SOURCES, check_rounds
from mmalign.config.yaml import KeyPath, dotted
from mmalign.core.errors import UserError, did_you_mean
from mmalign.core.registry import methods

TAKEN = {"pairs": ("pairs",), "labels": ("labels",), "images": ("labels", "pairs"), "prompts": ("prompts",)}
"""What a method learns from -> the sources that hold it."""

MAX_FLOAT = 3.4e38
"""The largest number that float32 holds."""

_ALLOWED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping of key: value",
    "model_type": "a mapping of key: value",
    "model_attributes_type": "a mapping of key: value",
}


def describe_errors(error: ValidationError, schema: type[BaseModel], values: Any) -> list[ConfigIssue]:
    """Turn pydantic's errors into issues; the errors of all members of a union become one issue."""
    alternatives: dict[KeyPath, list[ErrorDetails]] = {}
    for details in error.errors(include_url=False):
        alternatives.setdefault(_key_path(details, values), []).append(details)
    return [ConfigIssue(path, _describe(path, details, schema, values)) for path, details in alternatives.items()]


def is_foreign(name: Any) -> bool:
    """Tell whether a name is a dotted path "module:Class", whose module may be any file."""
    return isinstance(name, str) and ":" in name


def method_class(values: Any, foreign: bool = True) -> tuple[Any, list[ConfigIssue]]:
    """Return the class that a config's `method` names, or None and the issue; None alone for a dotted path if not
    `foreign`, since importing it would run its module.
    """
    if values is None:
        return None, []  # the schema itself reports that it is missing
    if not isinstance(values, dict) or not isinstance(values.get("name"), str):
        known = ", ".join(methods.names())
        return None, [ConfigIssue(("method", "name"), f"missing; give the method's name (known: {known})")]
    if is_foreign(values["name"]) and not foreign:
        return None, []
    try:
        chosen = methods.get(values["name"])
    except UserError as error:
        return None, [ConfigIssue(("method", "name"), str(error))]
    schema = getattr(chosen, "Config", None)
    if not (isinstance(schema, type) and issubclass(schema, BaseModel) and hasattr(chosen, "needs")):
        return None, [ConfigIssue(("method", "name"), f"'{values['name']}' is no method (a subclass of Method)")]
    return chosen, []


def generated_modality(method: Any, video: Any) -> str:
    """Return the kind of model that a method trains; of generators, the section `video` makes it one of videos."""
    return "video" if method.needs.modality == "image" and video is not None else str(method.needs.modality)


def takes_text(schema: type[BaseModel], values: Mapping[str, Any], path: KeyPath, *, foreign: bool = True) -> bool:
    """Tell whether the key at `path` of a configuration takes text, or null, and nothing else."""
    if path[0] == "method" and "method" in schema.model_fields and len(path) > 1:
        chosen, _ = method_class(values.get("method"), foreign)
        if path == ("method", "name") or chosen is None:
            return path == ("method", "name")
        schema, path = chosen.Config, path[1:]
    names = [part for part in path if isinstance(part, str)]
    holder = schema_at(schema, tuple(names[:-1])) if names else None
    field = holder.model_fields.get(new_names(holder).get(names[-1], names[-1])) if holder else None
    depth = len(path) - 1 - max((place for place, part in enumerate(path) if isinstance(part, str)), default=0)
    return field is not None and _is_text(field.annotation, depth)


def _is_text(annotation: Any, depth: int) -> bool:
    """Tell whether an annotation, or the items `depth` lists within it, is text or text and null."""
    if get_origin(annotation) is Annotated:
        return _is_text(get_args(annotation)[0], depth)
    if get_origin(annotation) in (Union, UnionType):
        return all(_is_text(one, depth) for one in get_args(annotation) if one is not type(None))
    if depth and get_origin(annotation) is list:
        return _is_text(get_args(annotation)[0], depth - 1)
    return depth == 0 and annotation is str


def check_numbers(values: Any, path: KeyPath = ()) -> Iterator[ConfigIssue]:
    """Find numbers that no computation can use: not finite, beyond float32, or whole ones beyond 64 bits."""
    if isinstance(values, dict | list):
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield from check_numbers(value, (*path, key))
    elif isinstance(values, float) and not abs(values) <= MAX_FLOAT:
        yield ConfigIssue(path, f"given {values}; allowed: a finite number of at most {MAX_FLOAT:g} in size")
    elif isinstance(values, int) and not -(2**63) <= values < 2**63:
        yield ConfigIssue(path, f"given {values}; allowed: a whole number of at most 64 bits")


def check_recipe(values: dict[str, Any], foreign: bool = True) -> list[ConfigIssue]:
    """Find sections that contradict each other, before any weight is loaded; values of the wrong type are skipped.

    Unless `foreign`, no module of a dotted path is imported, and what only it knows is not checked.
    """
    method, _ = method_class(values.get("method"), foreign)
    source = check_rounds if mapping(values, "rounds") else _check_source
    issues = [*source(values, method), *_check_modality(values, method)]
    issues += _check_rewards(values, method, foreign)
    issues += [*_check_adapter(mapping(values, "adapter")), *_check_warmup(mapping(values, "trainer"))]
    if "stages" in mapping(values, "method") and mapping(values, "adapter").get("start") is not None:
        fix = "would be added again to the model of each of the stages; merge it first (`mmalign merge`)"
        issues.append(ConfigIssue(("adapter", "start"), f"{fix} and start from that as `model`"))
    if values.get("reference") is not None and method and not method.needs.reference:
        issues.append(ConfigIssue(("reference",), f"method '{values['method']['name']}' has no reference; remove it"))
    return issues


def _check_source(values: dict[str, Any], method: Any) -> Iterator[ConfigIssue]:
    data = mapping(values, "data")
    given = [source for source in SOURCES if data.get(source) is not None]
    needed = method.needs.source if method else None
    name = values["method"]["name"] if method else ""
    taken = TAKEN[needed] if needed else ()
    keys = " or ".join(f"data.{source}" for source in taken)
    if len(given) > 1:
        keep = f"keep {keys}, which method '{name}' learns from" if needed else "keep one"
        yield ConfigIssue(
            ("data",), f"{' and '.join(f'data.{source}' for source in given)} exclude each other; {keep}"
        )
    elif needed and not given and (data or "data" not in values):
        yield ConfigIssue(("data",), f"method '{name}' learns from {needed}; give {keys}")
    elif needed and given and given[0] not in taken:
        yield ConfigIssue(
            ("data", given[0]), f"method '{name}' learns from {needed}, not from {given[0]}; give {keys} instead"
        )
    if method and not getattr(method, "weighs_pairs", False) and data.get("rarity") is not None:
        yield ConfigIssue(("data", "rarity"), f"method '{name}' takes no weights of pairs; remove it")
    for key in ("min_margin", "columns", "default_prompt", "streaming", "axis") if given == ["prompts"] else ():
        if data.get(key) not in (None, False):
            yield ConfigIssue(("data", key), "applies to pairs only, and data.prompts holds none; remove it")


_IDLE: dict[bool, dict[str, tuple[str, ...]]] = {
    False: {"data": ("frames", "fps"), "evaluate": ("questions", "max_new_tokens")},
    True: {
        "data": (
            *("ties", "resolution", "crop", "flip", "caption_dropout"),
            *("columns", "default_prompt", "streaming", "axis", "rarity", "first_frame"),
        ),
        "evaluate": ("prompts", "rewards", "steps", "guidance", "frames"),
    },
}
"""Whether the method trains a vision-language model -> the keys that it does not support."""
_DEFAULTS: tuple[Any, ...] = (None, [], False, 0, "drop", "center", "error")
"""The values of such keys in a configuration that was written out with its defaults."""


def _check_modality(values: dict[str, Any], method: Any) -> Iterator[ConfigIssue]:
    """Find keys that the method's kind of model does not support, and evaluations without anything to evaluate."""
    is_vlm = method is not None and method.needs.modality == "vlm"
    if method:
        kind, name = "vision-language" if is_vlm else method.needs.modality, values["method"]["name"]
        for section, keys in _IDLE[is_vlm].items():
            for key in keys:
                if mapping(values, section).get(key) not in _DEFAULTS:
                    yield ConfigIssue((section, key), f"not supported by {kind} methods such as '{name}'; remove it")
        for key in ("flow", "allow_distilled", "video", "reference"):
            if is_vlm and values.get(key) not in (None, False):
                yield ConfigIssue((key,), f"not supported by {kind} methods such as '{name}'; remove it")
        if is_vlm and values.get("attention") == "xformers":
            yield ConfigIssue(("attention",), f"method '{name}' trains a vision-language model; allowed: sdpa")
    if values.get("video") is not None and not is_vlm:
        if mapping(values, "data").get("resolution") is not None:
            fix = "applies to image models; the size of videos is video.height and video.width"
            yield ConfigIssue(("data", "resolution"), fix)
    evaluate = mapping(values, "evaluate")
    if evaluate.get("frames") is not None and values.get("video") is None and not is_vlm:
        yield ConfigIssue(("evaluate", "frames"), "is for image rewards on video models (section video); remove it")
    if evaluate and is_vlm and evaluate.get("questions") is None:
        yield ConfigIssue(("evaluate", "questions"), "missing; give a folder of videos with questions")
    if evaluate and not is_vlm:
        for key, what in (
            ("prompts", "a built-in name of `mmalign list prompts`, or a file"),
            ("rewards", "rewards to report"),
        ):
            if not evaluate.get(key):
                yield ConfigIssue(("evaluate", key), f"missing; give {what}")


def _check_rewards(values: dict[str, Any], method: Any, foreign: bool) -> Iterator[ConfigIssue]:
    given = values.get("rewards") or []
    named: list[tuple[KeyPath, Any]] = []
    if isinstance(given, list):
        named = [(("rewards", i, "name"), one.get("name")) for i, one in enumerate(given) if isinstance(one, dict)]
    if method and method.needs.reward == "none" and given:
        yield ConfigIssue(
            ("rewards",),
            f"method '{values['method']['name']}' learns from {method.needs.source} and takes no rewards; remove "
            "`rewards` (`mmalign pairs label --reward` makes pairs by a reward, `evaluate.rewards` reports one)",
        )
    elif method and method.needs.reward not in ("none", "optional") and not given:
        yield ConfigIssue(
            ("rewards",), f"method '{values['method']['name']}' needs at least one reward; see `mmalign list rewards`"
        )
    named = [(path, name) for path, name in named if isinstance(name, str)]
    repeated = [name for name, count in Counter(name for _, name in named).items() if count > 1]
    if repeated:
        yield ConfigIssue(("rewards",), f"'{repeated[0]}' occurs more than once; give it one weight")
    yield from _check_features(
        mapping(values, "method").get("advantage_diversity"), [name for _, name in named], foreign
    )
    evaluated = mapping(values, "evaluate").get("rewards")
    if isinstance(evaluated, list):
        named += [(("evaluate", "rewards", i), name) for i, name in enumerate(evaluated)]
    for path, name in named:
        if isinstance(name, str) and (foreign or not is_foreign(name)):
            yield from _check_reward(path, name, method, values)


def _check_features(name: Any, rewards: list[str], foreign: bool) -> Iterator[ConfigIssue]:
    """Find out whether the reward whose features a method uses is there and has any."""
    from rewards import RewardError, TwoTowerReward, reward_class

    path = ("method", "advantage_diversity")
    if not isinstance(name, str) or (is_foreign(name) and not foreign):
        return
    if name not in rewards:
        yield ConfigIssue(
            path, f"'{name}' is not among `rewards`; add {{name: {name}, weight: 0}} for its features alone"
        )
        return
    with suppress(RewardError):  # an unknown reward is an issue of `rewards`
        if not issubclass(reward_class(name), TwoTowerReward):
            yield ConfigIssue(
                path, f"'{name}' embeds no images; choose one that does, such as clip, pickscore, shapes-clip"
            )


def _check_reward(path: KeyPath, name: str, method: Any, values: dict[str, Any]) -> Iterator[ConfigIssue]:
    from rewards import RewardError, reward_class

    try:
        reward = reward_class(name)
    except RewardError as error:
        yield ConfigIssue(path, str(error))
        return
    if method is None:
        return
    made, (section, *place) = generated_modality(method, values.get("video")), path[:-1]
    frames: KeyPath = (section, *place, "frames") if section == "rewards" else ("evaluate", "frames")
    on_frames = (values["rewards"][place[0]] if section == "rewards" else values["evaluate"]).get("frames")
    if (reward.modality, made) == ("image", "video") and on_frames is None:
        yield ConfigIssue(
            path,
            f"'{name}' scores images, and the section video trains a video model; give {dotted(frames)}, the number "
            "of frames of each video that it scores, or a video reward",
        )
    elif reward.modality != made and (reward.modality, made) != ("image", "video"):
        yield ConfigIssue(path, f"'{name}' scores {reward.modality}s, and the method generates {made}s")
    elif section == "rewards" and on_frames is not None and reward.modality != "image":
        yield ConfigIssue(frames, f"is for image rewards on videos, and '{name}' scores {reward.modality}s; remove it")
    elif section == "rewards" and on_frames is not None and made != "video":
        yield ConfigIssue(frames, "is for image rewards on video models (section video); remove it")
    if path[0] == "rewards" and method.needs.reward == "differentiable" and not reward.differentiable:
        yield ConfigIssue(
            path,
            f"'{name}' has no gradient, which method '{method.name}' needs; choose a differentiable one of "
            "`mmalign list rewards`, or a method that takes any reward",
        )


def _check_adapter(adapter: dict[str, Any]) -> Iterator[ConfigIssue]:
    if adapter.get("kind") != "full":
        return
    for key in ("rank", "alpha", "targets", "init", "start"):
        if adapter.get(key) is not None:
            yield ConfigIssue(("adapter", key), "applies to kind: lora only, and kind is full; remove it")


def _check_warmup(trainer: dict[str, Any]) -> Iterator[ConfigIssue]:
    warmup, steps = trainer.get("warmup"), trainer.get("steps")
    if not isinstance(warmup, int | float) or not 1 <= warmup <= MAX_FLOAT:
        return
    if warmup != int(warmup):
        yield ConfigIssue(
            ("trainer", "warmup"), f"given {warmup}; give a fraction of the steps below 1, or a whole number"
        )
    elif isinstance(steps, int) and warmup > steps:
        yield ConfigIssue(("trainer", "warmup"), f"given {warmup} steps of warm-up in a run of {steps}; give fewer")


def _key_path(details: ErrorDetails, values: Any) -> KeyPath:
    """Return the error's location; for a union, the location of the value, without the tag of a member."""
    length = _union_depth(details, values)
    return tuple(details["loc"][:length])


def _union_depth(details: ErrorDetails, values: Any) -> int | None:
    """Return how much of the error's location precedes the tag of a union's member; None if there is no tag."""
    holder = values
    for depth, part in enumerate(details["loc"]):
        if isinstance(holder, dict) and part in holder:
            holder = holder[part]
        elif isinstance(holder, list) and isinstance(part, int) and part < len(holder):
            holder = holder[part]
        else:
            return None if details["type"] == "missing" and depth == len(details["loc"]) - 1 else depth
    return None


def _describe(path: KeyPath, alternatives: list[ErrorDetails], schema: type[BaseModel], values: Any) -> str:
    first = alternatives[0]
    if len(first["loc"]) > len(path):
        members = dict.fromkeys(str(details["loc"][len(path)]) for details in alternatives)
        return f"given {_show(_value_at(values, path))}; allowed: {' or '.join(map(_member, members))}"
    if first["type"] == "extra_forbidden":
        holder = schema_at(schema, path[:-1])
        if new := new_names(holder).get(str(path[-1])):
            return f"is the old name of {new}, which is given too; remove it"
        if reason := getattr(holder, "refused", {}).get(path[-1]):
            return str(reason)
        known = list(holder.model_fields) if holder else []
        return f"unknown key{did_you_mean(str(path[-1]), known)} (known: {', '.join(known)})"
    if first["type"] == "missing" and isinstance(path[-1], int):
        return "missing; the list is too short"
    if first["type"] == "missing":
        holder = schema_at(schema, path[:-1])
        field = holder.model_fields.get(str(path[-1])) if holder else None
        return f"missing; give {field.description}" if field and field.description else "missing; it has no default"
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    given = first["input"]
    if first["type"] == "literal_error":
        options = first["ctx"]["expected"].replace("' or '", "', '").replace("'", "").split(", ")
        hint = did_you_mean(given, options) if isinstance(given, str) else ""
        return f"given {_show(given)}; allowed: {', '.join(options)}{hint}"
    allowed = _ALLOWED.get(first["type"], first["msg"].removeprefix("Input should be "))
    return f"given {_show(given)}; allowed: {allowed}"


def _member(tag: str) -> str:
    """Write pydantic's tag of a union's member in the terms of the other messages: "[number, number]"."""
    for code, word in (("tuple", ""), ("list", ""), ("float", "number"), ("int", "whole number"), ("str", "text")):
        tag = tag.replace(code, word)
    return tag


def _value_at(values: Any, path: KeyPath) -> Any:
    for part in path:
        values = values[part]
    return values


def _show(value: Any) -> str:
    """Show a value as YAML writes it, with its kind where the text alone is ambiguous."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict | list):
        text = str(value)
        return ("the mapping " if isinstance(value, dict) else "the list ") + (
            text[:57] + "..." if len(text) > 60 else text
        )
    return f"the text '{value}'" if isinstance(value, str) else str(value)
