"""Print the configuration of a training run as it will be used: merged, overridden, with every default filled in.

Each value is followed by its origin: a file and line, the command line, or the default. No code that the config
names as module:Class is imported; `mmalign train --dry-run` does that, and checks it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mmalign.core.progress import note

if TYPE_CHECKING:
    from mmalign.config.run import RunConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("config", help="a YAML file or the name of a shipped config (see `mmalign list configs`)")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="override a value, such as trainer.steps=100"
    )
    parser.add_argument("--plain", action="store_true", help="without the origins, to save as a config file")


def run(args: argparse.Namespace) -> int:
    """Print YAML on standard output."""
    from mmalign.config.run import dump_config, load_with_tree

    config, tree = load_with_tree(args.config, args.overrides, foreign=False)
    for key, name in _foreign(config):
        note(f"{key}: '{name}' is not resolved here, since that would run its code; its options are not checked")
    text = dump_config(config)
    if args.plain:
        print(text, end="")
        return 0
    origins = [(tree.value_origin(path) or "default") if path else "" for path in _paths(text)]
    lines = text.splitlines()
    width = min(max(len(line) for line in lines), 60)
    for line, origin in zip(lines, origins, strict=True):
        print(f"{line:<{width}}  # {origin}" if origin else line)
    return 0


def _foreign(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield the keys whose names are dotted paths, and these."""
    from mmalign.config.checks import is_foreign

    evaluated = config.evaluate.rewards if config.evaluate else []
    named = [("method", config.method_name), *(("rewards", reward.name) for reward in config.rewards)]
    for key, name in (*named, *(("evaluate.rewards", name) for name in evaluated)):
        if is_foreign(name):
            yield key, name


def _paths(text: str) -> Iterator[tuple[str | int, ...]]:
    """Yield the key path of the value in each line of dumped YAML; () for a line that only opens a mapping."""
    import yaml

    held: dict[int, tuple[str | int, ...]] = {}

    def visit(node: Any, path: tuple[str | int, ...]) -> None:
        if isinstance(node, yaml.MappingNode) and node.value:
            for key, value in node.value:
                visit(value, (*path, key.value))
        elif isinstance(node, yaml.SequenceNode) and not node.flow_style:
            for index, value in enumerate(node.value):
                visit(value, (*path, index))
        else:
            held[node.start_mark.line] = path

    visit(yaml.compose(text), ())
    for line in range(len(text.splitlines())):
        yield held.get(line, ())
