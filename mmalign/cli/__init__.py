"""The command line: one verb per file; `main` finds, imports and runs it."""

from mmalign.cli.main import main

__all__ = ["main"]
