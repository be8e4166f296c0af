"""The numbers of a comparison, as results.json and scores.csv hold them."""

from mmalign.compare.results.results import Comparison, build_results, write_results, write_scores

__all__ = ["Comparison", "build_results", "write_results", "write_scores"]
