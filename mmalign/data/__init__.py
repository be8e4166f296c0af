"""Preference data: prompt files, pair readers, pair-safe transforms, the encoded cache, and building new pairs."""
