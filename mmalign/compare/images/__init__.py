"""Images of a comparison: drawn once, stored, scored once; the guidance control and diversity."""
