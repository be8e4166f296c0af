"""Contrast prompts: captions that say something else, near enough to be confused with the true one.

Three sources: rules of English (`rewards.language.contrast_rules`), a file, or a language model behind an endpoint.
`make_contrast` builds one from what a configuration says, as a function from a prompt to a list of prompts.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from rewards.errors import RewardError, choices
from rewards.language.contrast_rules import KINDS, LIMIT, plain, rule_contrast, without_duplicates

Contrast = Callable[[str], list[str]]
QUESTION = (
    "Here is a caption of an image:\n{prompt}\n\nWrite {count} other captions of the same form that would be wrong "
    "for that image: change how many things there are, what they are, their colours, sizes and other attributes, or "
    "where they are. Each must differ from the caption in what would be seen. One caption a line, nothing else."
)

_BULLET = re.compile(r"^\s*(?:\d+[.)]|[-*•])\s*")


def make_contrast(spec: Any = "rules") -> Contrast:
    """Make a source of contrast prompts.

    spec: `"rules"`; a path of a file (see `read_contrast`); a mapping of prompts to lists; or one of
    `{rules: {kinds: [...], limit: 24}}`, `{file: PATH, otherwise: rules}`, and
    `{endpoint: URL, model: NAME, count: 10, ...}` with the options of `rewards.backbones.chat.ChatClient`.
    """
    if callable(spec):
        return spec
    if spec == "rules":
        return rule_contrast
    if isinstance(spec, (str, PathLike)):
        return _from_table(read_contrast(spec), str(spec), None)
    if not isinstance(spec, Mapping) or not spec:
        raise RewardError(f"contrast is {spec!r}; give 'rules', a file, or options as a mapping")
    options = dict(spec)
    if "endpoint" in options:
        return AskedContrast(**options)
    if "rules" in options:
        return _from_rules(dict(options.pop("rules") or {}), options)
    if "file" in options:
        path, otherwise = options.pop("file"), options.pop("otherwise", None)
        _no_more(options, ("file", "otherwise"))
        return _from_table(read_contrast(path), str(path), otherwise and make_contrast(otherwise))
    return _from_table(_checked(options, "contrast"), "contrast", None)


def read_contrast(path: str | PathLike[str]) -> dict[str, list[str]]:
    """Read contrast prompts: JSON `{prompt: [contrast, ...]}`, TextNorm's own layout, or JSONL.

    A line of JSONL is `{"prompt": ..., "contrast": [...]}`.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        if Path(path).suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
            table: Any = {row["prompt"]: row["contrast"] for row in rows}
        else:
            table = json.loads(text)
    except OSError as error:
        raise RewardError(f"contrast file {str(path)!r}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RewardError(
            f'contrast file {str(path)!r}: {error}; give JSON {{prompt: [...]}}, or JSONL with "prompt" and "contrast"'
        ) from error
    return _checked(table, f"contrast file {str(path)!r}")


def _from_table(table: Mapping[str, list[str]], name: str, otherwise: Contrast | None) -> Contrast:
    by_plain = {plain(prompt): contrast for prompt, contrast in table.items()}

    def find(prompt: str) -> list[str]:
        if plain(prompt) in by_plain:
            return without_duplicates(prompt, by_plain[plain(prompt)])
        if otherwise is None:
            raise RewardError(
                f"{name} has no contrast for the prompt {prompt!r}; add it, or give `otherwise: rules` beside `file`"
            )
        return otherwise(prompt)

    return find


def _from_rules(rules: dict[str, Any], rest: dict[str, Any]) -> Contrast:
    _no_more(rest, ("rules",))
    kinds, limit = rules.pop("kinds", KINDS), rules.pop("limit", LIMIT)
    _no_more(rules, ("kinds", "limit"))
    for kind in kinds:
        if kind not in KINDS:
            raise RewardError(f"contrast rules: kind {kind!r} is unknown; {choices(str(kind), KINDS)}")
    return lambda prompt: rule_contrast(prompt, kinds, limit)


class AskedContrast:
    """Contrast prompts of a language model; `concurrency` prompts may be asked for at a time."""

    def __init__(self, *, count: int = 10, **options: Any) -> None:
        """count: how many for each prompt; options: those of `rewards.backbones.chat.ChatClient`."""
        from rewards.backbones.chat import ChatClient

        allowed = set(inspect.signature(ChatClient).parameters)
        for option in options:
            if option not in allowed:
                raise RewardError(
                    f"contrast: endpoint has no option {option!r}; {choices(option, allowed | {'count'})}"
                )
        if "model" not in options:
            raise RewardError("contrast: endpoint needs model: NAME, the model to be asked")
        if count < 1:
            raise RewardError(f"contrast: count is {count}; at least 1 is allowed")
        self.client, self.count = ChatClient(**options), count
        self.concurrency = self.client.concurrency

    def __call__(self, prompt: str) -> list[str]:
        """Ask for contrast prompts; raise `RewardError` where the answer has none."""
        reply = self.client.ask([(QUESTION.format(count=self.count, prompt=prompt), [])])[0]
        lines = [_BULLET.sub("", line).strip().strip('"“”') for line in reply.text.splitlines()]
        found = without_duplicates(prompt, [line for line in lines if line])[: self.count]
        if not found:
            raise RewardError(f"{self.client.model} gave no contrast for {prompt!r}: {reply.text[:100]!r}")
        return found


def _no_more(options: Mapping[str, Any], allowed: tuple[str, ...]) -> None:
    for option in options:
        raise RewardError(f"contrast has no option {option!r} beside {allowed[0]!r}; {choices(str(option), allowed)}")


def _checked(table: Any, name: str) -> dict[str, list[str]]:
    if not isinstance(table, Mapping):
        raise RewardError(f"{name} holds a {type(table).__name__}; a mapping of prompts to lists is expected")
    for prompt, contrast in table.items():
        if not isinstance(contrast, list) or not all(isinstance(other, str) for other in contrast):
            raise RewardError(
                f"{name}: {str(prompt)[:60]!r} has {str(contrast)[:40]!r}; a list of prompts is expected"
            )
    return dict(table)
