"""The release of mmalign."""

__version__ = "0.1.0"
