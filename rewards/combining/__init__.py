"""How several rewards become one: modes, parts, transforms, shaping."""
