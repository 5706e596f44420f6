"""Weighted draws without replacement, and shares of whole things: by hashes, so that no order of work changes them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from online_dpo.seeds import derive_seed

BITS = 52
"""Of a uniform number: k + ½ over 2^52 is exact in a float, and neither 0 nor 1."""


def draw(names: Sequence[tuple[int | str, ...]], log_weights: Sequence[float], count: int, seed: str) -> list[int]:
    """The places of `count` of the things (all, where there are no more), ascending.

    One after another, each with a chance in proportion to its weight among those that are left. Efraimidis and
    Spirakis (2006), algorithm A: the largest keys u^(1/w), u uniform. Here by ln(−ln u) − ln w, the smallest, which
    no weight is too small for. `names` tell the things apart and, with `seed`, give each its u.
    """
    keys = [
        math.log(-math.log(_uniform(seed, name))) - log_weight
        for name, log_weight in zip(names, log_weights, strict=True)
    ]
    return sorted(sorted(range(len(names)), key=lambda place: (keys[place], place))[:count])


def divide(names: Sequence[str], shares: Sequence[float], seed: str) -> list[list[str]]:
    """`names`, all different, cut into parts of these shares (which add up to 1), each in the order of `names`.

    How many each gets follows from the largest remainder, which of them from a hash of name and seed.
    """
    counts = largest_remainder(len(names), shares)
    shuffled = sorted(names, key=lambda name: (derive_seed(seed, "divide", name), name))
    part: dict[str, int] = {}
    for number, count in enumerate(counts):
        part |= dict.fromkeys(shuffled[:count], number)
        shuffled = shuffled[count:]
    return [[name for name in names if part[name] == number] for number in range(len(shares))]


def largest_remainder(total: int, shares: Sequence[float]) -> list[int]:
    """`total` as whole numbers in proportion to `shares`: each its floor, what is left to the largest remainders
    (the first of equals)."""
    whole = sum(shares)
    # A share like 0.29 of 100 must not lose one to rounding.
    exact = [round(total * share / whole, 9) for share in shares]
    counts = [math.floor(value) for value in exact]
    order = sorted(range(len(shares)), key=lambda number: (counts[number] - exact[number], number))
    for number in order[: total - sum(counts)]:
        counts[number] += 1
    return counts


def _uniform(seed: str, name: tuple[int | str, ...]) -> float:
    drawn: float = ((derive_seed(seed, "draw", *name) >> (62 - BITS)) + 0.5) / (1 << BITS)
    return drawn
