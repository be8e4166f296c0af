"""Hashes of content, and random numbers that depend on names only: the same on every machine and in every run."""

from __future__ import annotations

import hashlib

from mmalign.core.seeds import derive_seed


def content_key(*parts: bytes | str | int) -> str:
    """Return a 128-bit hexadecimal key of bytes, strings and integers; the length of each part is hashed with it."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        raw = part if isinstance(part, bytes) else repr(part).encode()
        digest.update(len(raw).to_bytes(8, "big"))
        digest.update(raw)
    return digest.hexdigest()


_FRACTION_BITS = 53


def uniform(*parts: int | str) -> float:
    """Return a number in [0, 1) that depends on `parts` only (see `mmalign.core.seeds.derive_seed`)."""
    return (derive_seed(*parts) % 2**_FRACTION_BITS) / 2**_FRACTION_BITS
