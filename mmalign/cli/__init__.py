"""The command line: one verb a file; `main` finds it, imports it and runs it."""

from mmalign.cli.main import main

__all__ = ["main"]
