"""Readers of published preference formats: tables and listings, each row a candidate pair."""
