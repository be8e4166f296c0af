"""Combination of several rewards into one: modes, parts, transforms, shaping."""
