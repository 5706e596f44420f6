"""Cutting an optimiser step's pairs into forward passes by the tokens they hold, and dealing them to workers.

Neither changes the gradient: each pass's summed loss is divided by the whole batch's size.
"""

from __future__ import annotations

from collections.abc import Sequence

from online_dpo.packing import Item


def tokens_of(items: Sequence[Item], *, packed: bool = True) -> int:
    """Tokens that are computed: packed, every distinct prompt and every distinct completion of it once."""
    if not packed:
        return sum(len(prompt) + len(completion) for prompt, completion in items)
    prompts = {tuple(prompt) for prompt, _ in items}
    answers = {(tuple(prompt), tuple(completion)) for prompt, completion in items}
    return sum(map(len, prompts)) + sum(len(completion) for _, completion in answers)


def deal(costs: Sequence[int], workers: int) -> list[list[int]]:
    """Indices of `costs` by worker: the dearest first, each to the worker that has least (ties: the lower number)."""
    hands: list[list[int]] = [[] for _ in range(workers)]
    loads = [0] * workers
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        least = loads.index(min(loads))
        hands[least].append(index)
        loads[least] += costs[index]
    return [sorted(hand) for hand in hands]


def fill(units: Sequence[Sequence[Item]], budget: int, *, packed: bool = True) -> list[list[int]]:
    """Indices of `units` by pass, at most `budget` tokens each (`tokens_of`); a larger unit has a pass of its own.

    Units of one prompt come to stand together, since their prompt then costs nothing, and units of like lengths, since
    attention pads a pass to its longest.
    """
    order = sorted(range(len(units)), key=lambda i: (_shape(units[i]), i))
    passes: list[list[int]] = []
    held: list[Item] = []
    for index in order:
        both = [*held, *units[index]]
        if passes and tokens_of(both, packed=packed) <= budget:
            passes[-1].append(index)
            held = both
        else:
            passes.append([index])
            held = list(units[index])
    return passes


def _shape(unit: Sequence[Item]) -> tuple[int, tuple[int, ...], int]:
    prompt = tuple(unit[0][0])
    return len(prompt), prompt, max(len(completion) for _, completion in unit)
