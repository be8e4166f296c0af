"""The long instructions that reward models were trained with: downloaded or given, and identified by SHA-256.

An instruction belongs to its model like the weights: another wording gives other scores. It is a string constant in a
Python file of the authors' code. Like the weights it is not part of this package, but downloaded once, pinned to a
commit, or given by the user. The file is parsed and never run.
"""

from __future__ import annotations

import ast
import hashlib
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from rewards.backbones.weights import Weights, locate
from rewards.errors import RewardError

PLACEHOLDER = "{text_prompt}"


@dataclass(frozen=True)
class Instruction:
    """A published instruction: the Python file, its constants in the order in which they are joined, their SHA-256."""

    file: Weights
    constants: tuple[str, ...]
    sha256: str


class Template(NamedTuple):
    """An instruction as read; `version` is empty for the published one, else it identifies the instruction."""

    text: str
    version: str

    def fill(self, prompt: str) -> str:
        """Insert a prompt."""
        return self.text.replace(PLACEHOLDER, prompt)


def read_instruction(published: Instruction, given: str | PathLike[str] | None = None) -> Template:
    """Return an instruction: given as text, text file or the authors' Python file, or else downloaded.

    Raises:
        RewardError: it cannot be fetched or read, has no place for the prompt, or is not the published one although
            it was fetched.
    """
    if given is not None and PLACEHOLDER in str(given):
        return _template(published, str(given), "the text given")
    path = _located(published, given)
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        text = _joined_constants(path, text, published.constants)
    template = _template(published, text, path)
    if given is None and template.version:
        raise RewardError(
            f"{path} does not hold the published instruction; give instruction=PATH of the published one"
        )
    return template


def _located(published: Instruction, given: str | PathLike[str] | None) -> Path:
    if given is not None:
        path = Path(given).expanduser()
        if path.is_file():
            return path
        raise RewardError(
            f"instruction {str(given)[:60]!r}: not a file, and not a text with {PLACEHOLDER} in place of the prompt"
        )
    try:
        return locate(published.file)
    except RewardError as error:
        reason = str(error).removesuffix("; or give weights=PATH of a copy")
        raise RewardError(f"the instruction: {reason}; or give instruction=PATH of a copy, or its text") from error


def _joined_constants(path: Path, source: str, names: tuple[str, ...]) -> str:
    found: dict[str, object] = {}
    try:
        statements = ast.parse(source).body
    except SyntaxError as error:
        raise RewardError(f"{path} is not Python: {error.msg}; give the authors' file, or a text file") from error
    for statement in statements:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant):
            found |= {t.id: statement.value.value for t in statement.targets if isinstance(t, ast.Name)}
    texts = [found.get(name) for name in names]
    if not all(isinstance(text, str) for text in texts):
        raise RewardError(f"{path} lacks the constants {' and '.join(names)}; give the authors' file, or a text file")
    return "".join(str(text) for text in texts)


def _template(published: Instruction, text: str, where: object) -> Template:
    if text.count(PLACEHOLDER) != 1:
        raise RewardError(f"{where}: {PLACEHOLDER} must occur in the instruction exactly once, in place of the prompt")
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Template(text, "" if digest == published.sha256 else f"instruction {digest[:8]}")
