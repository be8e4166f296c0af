"""Formats: reading and writing images, videos, tables and question files, and the rules by which answers count."""
