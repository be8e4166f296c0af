"""Parts of somebody else's program, read from a checkout of it and run on our tensors.

A training script is rarely made of functions: what matters is a run of statements in the middle of a loop. They are
found by what their first and last lines look like, compiled as they stand, and run with our tensors and stand-ins for
the names that they use.
"""

from __future__ import annotations
import __future__ as future

import ast
import math
import re
import subprocess
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import CodeType
from typing import Any

import numpy as np
import torch

from mmalign.core.errors import UserError


class Checkout:
    """A directory with the files of a public repository; what is missing in it is one line of `UserError`."""

    def __init__(self, path: Path, repository: str) -> None:
        """Take the directory; `repository` is its owner/name on GitHub, for messages."""
        if not path.is_dir():
            raise UserError(f"there is no directory {path}; give a checkout of https://github.com/{repository}")
        self.path = path
        self.repository = repository
        self._parsed: dict[str, ast.Module] = {}

    @property
    def commit(self) -> str:
        """The first digits of the commit that is checked out, or "unknown" outside of git."""
        if not (self.path / ".git").exists():
            return "unknown"
        command = ["git", "-C", str(self.path), "rev-parse", "--short=7", "HEAD"]
        found = subprocess.run(command, capture_output=True, text=True)
        return found.stdout.strip() or "unknown"

    def statements(self, file: str, first: str, last: str) -> Fragment:
        """Return the statements of one block from the first that looks like `first` to the next that does `last`.

        Both are regular expressions for the beginning of a statement (of a compound one, its first line).
        """
        seen = False
        for block in _blocks(self._tree(file)):
            starts = [index for index, statement in enumerate(block) if _looks_like(statement, first)]
            seen = seen or bool(starts)
            for start in starts:
                for end in range(start, len(block)):
                    if _looks_like(block[end], last):
                        return Fragment(_compiled(block[start : end + 1], self.path / file))
        raise self._missing(file, f"statement '{last}' after '{first}'" if seen else f"statement '{first}'")

    def functions(self, file: str, *names: str) -> Fragment:
        """Return definitions, of functions or ``Class.method``, undecorated, to be run for their names."""
        tree, found = self._tree(file), []
        for name in names:
            holder: list[ast.stmt] = tree.body
            for part in name.split("."):
                matching = [
                    node for node in holder if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == part
                ]
                if not matching:
                    raise self._missing(file, f"definition of '{name}'")
                definition, holder = matching[-1], matching[-1].body
            found.append(_undecorated(definition) if isinstance(definition, ast.FunctionDef) else definition)
        return Fragment(_compiled(found, self.path / file))

    def _tree(self, file: str) -> ast.Module:
        if file not in self._parsed:
            try:
                self._parsed[file] = ast.parse((self.path / file).read_text(encoding="utf-8"))
            except FileNotFoundError:
                raise self._missing(file, "file") from None
            except SyntaxError as error:
                raise UserError(f"{self.path / file} is not Python that can be read: line {error.lineno}") from None
        return self._parsed[file]

    def _missing(self, file: str, what: str) -> UserError:
        return UserError(
            f"{self.path / file}: found no {what}; needed: {self.repository} at a version like that in "
            "docs/results/equivalence.md"
        )


class Fragment:
    """Compiled statements, which `run` executes."""

    def __init__(self, code: CodeType) -> None:
        """Keep the code."""
        self._code = code

    def run(self, /, **names: Any) -> dict[str, Any]:
        """Execute with these names (and math, np, torch, F) and return all names afterwards; float64 stays float64."""
        namespace: dict[str, Any] = {"math": math, "np": np, "torch": torch, "F": torch.nn.functional, **names}
        with in_float64(), self._explaining():
            exec(self._code, namespace)
        return namespace

    def function(self, name: str, /, **names: Any) -> Callable[..., Any]:
        """Execute with these names and return the function `name`, in which float64 stays float64 too."""
        found = self.run(**names)[name]

        def call(*args: Any, **kwargs: Any) -> Any:
            with in_float64(), self._explaining():
                return found(*args, **kwargs)

        return call

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        try:
            yield
        except (AttributeError, IndexError, KeyError, NameError, RuntimeError, TypeError, ValueError) as error:
            file = self._code.co_filename
            lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
            place = f"{file}, line {lines[-1]}" if lines else file
            message = str(error).splitlines()[0] if str(error) else "no message"
            raise UserError(f"{place} cannot be run on our tensors: {type(error).__name__}: {message}") from error


@contextmanager
def in_float64() -> Iterator[None]:
    """Let scripts compute in float64 on the CPU: constants too, and against their calls of `float` and `cuda`."""
    to_float, to_cuda, default = torch.Tensor.float, torch.Tensor.cuda, torch.get_default_dtype()

    def keep(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return tensor if tensor.dtype == torch.float64 else to_float(tensor, *args, **kwargs)

    try:
        torch.set_default_dtype(torch.float64)
        torch.Tensor.float = keep  # type: ignore[method-assign, assignment]
        torch.Tensor.cuda = lambda tensor, *args, **kwargs: tensor  # type: ignore[method-assign, assignment]
        yield
    finally:
        torch.set_default_dtype(default)
        torch.Tensor.float, torch.Tensor.cuda = to_float, to_cuda  # type: ignore[method-assign]


def _blocks(tree: ast.AST) -> Iterator[list[ast.stmt]]:
    """Yield every list of statements of a program, outer ones first."""
    for node in ast.walk(tree):
        for field in ("body", "orelse", "finalbody"):
            block = getattr(node, field, None)
            if isinstance(block, list) and block and isinstance(block[0], ast.stmt):
                yield block


def _looks_like(statement: ast.stmt, pattern: str) -> bool:
    return re.match(pattern, ast.unparse(statement)) is not None


def _undecorated(definition: ast.FunctionDef) -> ast.FunctionDef:
    copy = ast.FunctionDef(**{field: getattr(definition, field, None) for field in definition._fields})
    copy.decorator_list = []
    return ast.copy_location(copy, definition)


def _compiled(statements: Sequence[ast.stmt], file: Path) -> CodeType:
    # Annotations stay unevaluated, because the names in them are not there.
    module = ast.Module(body=list(statements), type_ignores=[])
    return compile(module, str(file), "exec", flags=future.annotations.compiler_flag, dont_inherit=True)
