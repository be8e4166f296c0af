"""Shapes: a procedural world with a known truth: its pictures, language, oracle, prompts and models."""
