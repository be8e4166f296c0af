"""Pairs of answers about videos: what is asked, how media are perturbed, and what the model answers then."""
