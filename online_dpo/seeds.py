"""Every random number of a run derives from the experiment's seed by name, so that no order of work changes it."""

from __future__ import annotations

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2^62) from a SHA-256 over `parts`; the same on every machine and in every Python."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2
