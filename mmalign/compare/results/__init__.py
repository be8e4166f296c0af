"""The numbers of a comparison, as results.json, summary.csv and scores.csv hold them."""

from mmalign.compare.results.comparison import Comparison
from mmalign.compare.results.results import build_results, write_results, write_scores, write_summary

__all__ = ["Comparison", "build_results", "write_results", "write_scores", "write_summary"]
