"""Images or videos of a comparison: generated once, stored, scored once; the guidance control and diversity."""
