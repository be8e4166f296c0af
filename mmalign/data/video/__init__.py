"""Pairs of answers about videos: the questions, perturbations of media, and the model's answers."""
