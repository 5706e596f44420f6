"""Figures as text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

ABSENT = "–"


def number(value: object, *, places: int | None = None, sign: bool = False) -> str:
    """A figure; a dash when it is absent or not finite. Without `places`, as many as its size asks for."""
    found = finite(value)
    if found is None:
        return ABSENT
    if places is None:
        places = 0 if isinstance(value, int) else _places(abs(found))
    # Adding 0.0 to what was rounded turns -0.0 into 0.0.
    return f"{round(found, places) + 0.0:{'+' if sign else ''}.{places}f}"


def interval(value: object, *, sign: bool = False, places: int | None = None) -> str:
    """`mean [low, high]` of a `{mean, low, high}` mapping, all with the same number of places."""
    mean, low, high = _bounds(value)
    if mean is None:
        return ABSENT
    if places is None:
        places = _places(max(abs(bound) for bound in (mean, low, high) if bound is not None))
    text = number(mean, places=places, sign=sign)
    if low is None or high is None:
        return text
    return f"{text} [{number(low, places=places, sign=sign)}, {number(high, places=places, sign=sign)}]"


def share(value: object) -> str:
    """A share, with its interval where it has one, in per cent: `61 % [52, 70]`."""
    mean, low, high = _bounds(value if isinstance(value, Mapping) else {"mean": value})
    if mean is None:
        return ABSENT
    return (
        f"{100 * mean:.0f} %"
        if low is None or high is None
        else f"{100 * mean:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"
    )


def finite(value: object) -> float | None:
    """`value` as a float; None when it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def _bounds(value: object) -> tuple[float | None, float | None, float | None]:
    """Mean, low and high of a mapping of these; None for what is absent."""
    if not isinstance(value, Mapping):
        return None, None, None
    return finite(value.get("mean")), finite(value.get("low")), finite(value.get("high"))


def _places(size: float) -> int:
    """Decimal places that show three or four digits of a number of this size."""
    for least, places in ((1000.0, 0), (100.0, 1), (10.0, 2), (0.01, 3)):
        if size >= least:
            return places
    return 5 if size else 3


def get(row: Mapping[str, Any], *keys: str) -> Any:
    """The value at a path of keys, None when any is absent."""
    value: Any = row
    for key in keys:
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value
