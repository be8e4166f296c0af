"""Shapes: a procedural world with a known truth: its images, language, oracle, prompts and models."""
