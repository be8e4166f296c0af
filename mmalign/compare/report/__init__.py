"""The report: one self-contained HTML page, tables for the terminal, Markdown and LaTeX."""

from mmalign.compare.report.page import write_report

__all__ = ["write_report"]
