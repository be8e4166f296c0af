"""Seeds that depend on the sample, never on batch size, rank or the order of the work."""

from __future__ import annotations

import hashlib
from numbers import Integral


def derive_seed(*parts: int | str) -> int:
    """Derive a seed in [0, 2**63) from any number of integers and strings.

    The same parts give the same seed in every process and on every machine (blake2b of their `repr`), and
    `derive_seed(1, 23)`, `derive_seed(12, 3)` and `derive_seed("1", 23)` all differ. NumPy integers count as integers.

    Raises:
        TypeError: a part is neither an integer nor a string (a float or a tensor would not be reproducible).
    """
    digest = hashlib.blake2b(repr(tuple(_canonical(part) for part in parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _canonical(part: object) -> int | str:
    if isinstance(part, str):
        return str(part)
    if isinstance(part, Integral):
        return int(part)
    raise TypeError(f"derive_seed takes integers and strings, not {type(part).__name__} ({part!r})")
