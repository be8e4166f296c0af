"""Read layered YAML: `extends`, dotted overrides, and for every value the place it came from.

YAML is read by the 1.2 core schema: `1e-4` is a number, `no` and `on` are words, `12:30` is text, dates are text.
A key given twice in one mapping is an error. Layers merge mapping by mapping; lists are replaced whole; and changing
a mapping's `name` or `kind` empties that mapping first, since its other options belonged to the previous choice.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mmalign.config.reader import MAX_DEPTH, Loader, explain, read_document
from mmalign.core.errors import UserError, nearest, plain
from mmalign.core.files import expand
from mmalign.core.resources import resource_root, shipped

KeyPath = tuple[str | int, ...]
COMMAND_LINE = "the command line"
_DISCRIMINATORS = ("name", "kind")


class ConfigIssues(UserError):
    """Everything that is wrong with a configuration, one line for each issue."""

    def __init__(self, lines: list[str]) -> None:
        """Keep each line once, in order, foreign line breaks escaped; `str()` of the error is the lines joined."""
        self.lines = list(dict.fromkeys(map(plain, lines)))
        super().__init__("\n".join(self.lines))


@dataclass
class Tree:
    """The merged values and, for each key path, where it was last set ("FILE:LINE" or "the command line")."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, str] = field(default_factory=dict)

    def origin(self, path: KeyPath) -> str | None:
        """Return where `path` was set, or where the nearest mapping around it was; None if neither was set."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]]
        return None

    def value_origin(self, path: KeyPath) -> str | None:
        """Return where the value at `path` was set, alone or as part of a larger value; None for a default."""
        holder: Any = self.values
        for part in path:
            if isinstance(holder, dict) and part not in holder:
                return None
            holder = holder[part]
        return self.origin(path)

    def rename(self, path: KeyPath, new: str) -> None:
        """Give the key at `path` another name, in the values and in the origins."""
        holder: Any = self.values
        for part in path[:-1]:
            holder = holder[part]
        holder[new] = holder.pop(path[-1])
        for old in [old for old in self.origins if old[: len(path)] == path]:
            self.origins[(*path[:-1], new, *old[len(path) :])] = self.origins.pop(old)


Normalise = Callable[[dict[str, Any]], None]
TakesText = Callable[[Mapping[str, Any], KeyPath], bool]
"""From the values so far and a key path: whether the key takes text alone, so that an override is not read as YAML."""


def read_tree(
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    normalise: Normalise = lambda values: None,
    sections: Mapping[str, Any] | None = None,
    takes_text: TakesText = lambda values, path: False,
) -> Tree:
    """Read a config file with everything it extends, or take its values, and apply the overrides `key.path=value`.

    `sections` is one more layer, merged over the file's before the overrides. `normalise` rewrites short forms in
    place (such as `method: sft`) in every layer before it is merged. An override of a key that `takes_text` is the
    text as given, `#`, braces and colons included; null, and text within quotes, are read as YAML there too.

    Raises:
        UserError: a file is missing or not YAML; or (as `ConfigIssues`) overrides that cannot be applied.
    """
    if isinstance(source, Mapping):
        tree = _on_its_bases(_layer_of(source, "the config given"), "the config given", None, normalise, ())
    else:
        tree = _read_layers(find_config(source), normalise, ())
    if sections:
        layer = _layer_of(sections, "the arguments")
        normalise(layer.values)
        _merge(tree, layer)
    _apply_overrides(tree, overrides, normalise, takes_text)
    return tree


def parse_value(text: str) -> Any:
    """Read one value as YAML: `2000`, `1e-4`, `true`, `null`, `[a, b]`, `{kind: full}`, or plain text.

    Raises:
        UserError: the text is not YAML.
    """
    try:
        value, node = read_document(text)
    except yaml.YAMLError as error:
        raise UserError(
            f"'{plain(shorten(text, 60))}' is not a YAML value: {explain(error)}; quote text that contains : or ["
        ) from None
    rest = text[node.end_mark.index :].strip() if node is not None else ""
    if rest.startswith("#"):
        raise UserError(f"'{rest}' would be a comment in YAML; quote the text: \"'{text}'\"")
    return value


def write_yaml(values: Mapping[str, Any]) -> str:
    """Write values so that they are read back equal, and of the same types."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=119)


def find_config(name: str | Path, relative_to: Path | None = None) -> Path:
    """Find a config by path (relative to `relative_to`, else the working directory) or by shipped name.

    `configs/shapes/sft.yaml`, `shapes/sft.yaml` and `shapes/sft` all name the shipped file.

    Raises:
        UserError: there is none; the message names the nearest shipped config.
    """
    given = expand(name)
    for path in ((relative_to or Path()) / given, shipped(given), resource_root() / "configs" / given):
        for candidate in (path, Path(f"{path}.yaml")) if path is not None else ():
            if candidate.is_file():
                return candidate
    if given.is_dir():
        raise UserError(f"config {name}: is a directory; name a YAML file in it")
    known = list_configs()
    short = re.sub(r"^configs/|\.ya?ml$", "", given.as_posix())
    match = nearest(short, known) or next((one for one in known if one.endswith("/" + given.stem)), None)
    hint = f"did you mean '{match}'?" if match else "see `mmalign list configs`"
    raise UserError(f"config {name}: no such file and no shipped config of that name; {hint}")


def list_configs() -> list[str]:
    """Return the names of the shipped configs, such as "shapes/diffusion_dpo"."""
    root = resource_root() / "configs"
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def shorten(text: str, length: int) -> str:
    """Return a text of at most `length` characters, cut with "..." where it is longer."""
    return text if len(text) <= length else text[: length - 3] + "..."


def dotted(path: KeyPath) -> str:
    """Write a key path as the command line takes it: "rewards.0.weight"."""
    return ".".join(str(part) for part in path)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Write nested mappings as one level with dotted keys; lists of mappings get their index as a part."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, list) and any(isinstance(one, dict) for one in value):
            value = {str(index): one for index, one in enumerate(value)}
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{path}.")
        else:
            flat[path] = value
    return flat


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes text that YAML 1.1 or 1.2 would read as another type; plain lists take one line."""

    yaml_implicit_resolvers = {
        first: [rule for rules in (yaml.SafeDumper, Loader) for rule in rules.yaml_implicit_resolvers.get(first, [])]
        for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *Loader.yaml_implicit_resolvers}
    }

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.SequenceNode:
        flat = not any(isinstance(item, dict | list) for item in sequence)
        return super().represent_sequence(tag, sequence, flow_style=flat)


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # Within single quotes a line break (Unicode has several) would be read back as a space.
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _represent_text)


def _read_layers(path: Path, normalise: Normalise, chain: tuple[Path, ...]) -> Tree:
    """Read a file on top of what it extends; `chain` is the files that led here."""
    if path.resolve() in chain:
        raise UserError(f"{path}: extends itself, through {', '.join(map(str, chain))}; remove one `extends`")
    return _on_its_bases(_read_file(path), str(path), path.parent, normalise, (*chain, path.resolve()))


def _layer_of(values: Mapping[str, Any], origin: str) -> Tree:
    return Tree(copy.deepcopy(dict(values)), {(key,): origin for key in values})


def _on_its_bases(layer: Tree, name: str, folder: Path | None, normalise: Normalise, chain: tuple[Path, ...]) -> Tree:
    """Put a layer on top of what it extends; `chain` is the files that led here, its own the last."""
    bases = layer.values.pop("extends", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UserError(f"{name}: extends: give the name of a config file or a list of names, not {bases!r}")
    tree = Tree()
    for base in bases:
        _merge(tree, _read_layers(find_config(base, folder), normalise, chain))
    normalise(layer.values)
    _merge(tree, layer)
    return tree


def _read_file(path: Path) -> Tree:
    try:
        values, node = read_document(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {explain(error)}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file; a config is YAML") from None
    if node is None:
        return Tree()
    if not isinstance(values, dict):
        raise UserError(f"{path}: a config is a mapping of `key: value` lines, not {type(values).__name__}")
    origins: dict[KeyPath, str] = {}
    _record_lines(node, path, (), origins)
    return Tree(values, origins)


def _record_lines(node: yaml.Node, file: Path, path: KeyPath, origins: dict[KeyPath, str]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            origins[(*path, key.value)] = f"{file}:{key.start_mark.line + 1}"
            _record_lines(value, file, (*path, key.value), origins)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            origins[(*path, index)] = f"{file}:{item.start_mark.line + 1}"
            _record_lines(item, file, (*path, index), origins)


def _merge(tree: Tree, layer: Tree) -> None:
    """Put `layer` on top of `tree`, in place."""
    _merge_mapping(tree, tree.values, layer.values, ())
    tree.origins |= layer.origins


def _merge_mapping(tree: Tree, below: dict[str, Any], above: Mapping[str, Any], path: KeyPath) -> None:
    for key, value in above.items():
        here, old = (*path, key), below.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and not _is_another(old, value):
            _merge_mapping(tree, old, value, here)
        else:
            below[key] = copy.deepcopy(value)
            _forget(tree, here)


def _is_another(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return any(key in new and new[key] != old.get(key, new[key]) for key in _DISCRIMINATORS)


def _forget(tree: Tree, path: KeyPath) -> None:
    """Remove the origins below a path whose value is being replaced."""
    for known in [known for known in tree.origins if known[: len(path)] == path]:
        del tree.origins[known]


def _apply_overrides(tree: Tree, overrides: Sequence[str], normalise: Normalise, takes_text: TakesText) -> None:
    issues: list[str] = []
    given: dict[str, str] = {}
    for text in overrides:
        key, equals, value = text.removeprefix("--").partition("=")
        if not equals or not key.strip("."):
            issues.append(f"override '{text}': write it as key=value, for example trainer.steps=100")
        elif key in given:
            issues.append(f"override '{text}': {key} is given twice; keep one")
        elif key.count(".") >= MAX_DEPTH:
            issues.append(f"override '{shorten(key, 60)}': more than {MAX_DEPTH} parts; no config is that deep")
        else:
            given[key] = value

    def rank(key: str) -> tuple[int, bool]:
        # A mapping is set before its members, and its name or kind before the others: either empties the mapping.
        return key.count("."), key.rpartition(".")[2] not in _DISCRIMINATORS

    for key in sorted(given, key=rank):
        path = _split(key)
        try:
            _set(tree, path, (read_text if takes_text(tree.values, path) else parse_value)(given[key]))
            normalise(tree.values)
        except UserError as error:
            issues.append(f"override '{key}': {error}")
    if issues:
        raise ConfigIssues(issues)


def read_text(text: str) -> str | None:
    """Return the text that an override gives to a key that takes text: as it is, without quotes around it, or null."""
    if text.strip() in ("", "~", "null", "Null", "NULL"):
        return None
    if text.strip()[0] in "\"'":
        try:
            value = parse_value(text)
        except UserError:
            value = None
        if isinstance(value, str):
            return value
    return text.strip()


def _split(key: str) -> KeyPath:
    return tuple(int(part) if re.fullmatch("[0-9]{1,9}", part) else part for part in key.split("."))


def _set(tree: Tree, path: KeyPath, value: Any) -> None:
    """Set one value, making the mappings on the way."""
    holder: Any = tree.values
    for depth, part in enumerate(path[:-1]):
        _check_key(holder, path, depth)
        empty: Any = [] if isinstance(path[depth + 1], int) else {}
        if isinstance(holder, list) and part == len(holder):
            holder.append(empty)
            tree.origins[path[: depth + 1]] = COMMAND_LINE
        elif isinstance(holder, dict) and holder.get(str(part)) is None:
            holder[str(part)] = empty
            tree.origins[path[: depth + 1]] = COMMAND_LINE
        holder = holder[part]
    _check_key(holder, path, len(path) - 1)
    last = path[-1]
    if last in _DISCRIMINATORS and _is_another(holder, {last: value}):
        holder.clear()
        _forget(tree, path[:-1])
    if isinstance(holder, list) and last == len(holder):
        holder.append(value)
    else:
        holder[last] = value
    _forget(tree, path)
    tree.origins[path] = COMMAND_LINE


def _check_key(holder: Any, path: KeyPath, depth: int) -> None:
    """Raise a UserError if `path[depth]` cannot be a key of `holder`."""
    part, where = path[depth], dotted(path[:depth])
    if isinstance(holder, list):
        if not isinstance(part, int) or part > len(holder):
            raise UserError(f"{where} is a list of {len(holder)}; give an index from 0 to {len(holder)}, not '{part}'")
    elif not isinstance(holder, dict):
        raise UserError(f"{where} is the value {holder!r}, which has no key '{part}'; remove '{part}' from the path")
    elif isinstance(part, int):
        raise UserError(f"{where or 'a config'} is a mapping, not a list; give a key, not {part}")
