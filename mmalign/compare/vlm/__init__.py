"""Comparing vision-language models: the same questions, answers marked right or wrong."""
