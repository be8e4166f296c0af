"""Score files in bulk, for `mmalign score` and `mmalign pairs label`.

`mmalign.core.io.items` describes an item, `inputs` finds items, `engine` decodes ahead and scores, `results` keeps the
scores.
"""
