"""Many comparisons, few of which may be wrong by chance."""

from __future__ import annotations

from collections.abc import Sequence


def holm(p_values: Sequence[float]) -> list[float]:
    """Corrected p-values in the same order (Holm, Scand. J. Statist. 1979).

    The i-th smallest of m (from 1) is multiplied by m − i + 1, never below the one before, never above 1. Those at most
    α are wrong, even one of them, with a chance of at most α, whatever the dependence between them.
    """
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    corrected = [1.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(order):
        largest = max(largest, (len(p_values) - rank) * p_values[place])
        corrected[place] = min(1.0, largest)
    return corrected
