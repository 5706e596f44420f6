"""Where a name in an experiment may lie on this machine."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def places_of(name: str, bases: Iterable[Path]) -> list[Path]:
    """What there is called `name` (`~` is the home folder) in each of `bases`, in their order.

    Empty for what can be no path: too long, no such user, a null character.
    """
    try:
        path = Path(name).expanduser()
        return [base / path for base in bases if (base / path).exists()]
    except (OSError, RuntimeError, ValueError):
        return []
