"""Score files in bulk: what `mmalign score` and `mmalign pairs label` have in common.

`items` says what there is to score, `inputs` finds it, `engine` decodes ahead and scores, `results` keeps the scores.
"""
