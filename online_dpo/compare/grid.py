"""Outcomes arranged for comparing: arm × seed × round, the same seeds and prompts for all arms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from online_dpo.compare.outcomes import Outcomes, Values
from online_dpo.errors import RunFolderError

INITIAL = "initial"
"""How the policy that every arm began with is called among arms."""

Column = Literal["reward", "gold", "tokens", "log_ratio"]
Rounds = Mapping[int, Outcomes]


@dataclass(frozen=True, slots=True)
class Grid:
    """`arms`: for each arm's label its rounds, one mapping for each of `seeds` in order. `warnings`: what was left out.

    Seeds are a column each: that of all arms where they share seeds, else the arms' seeds in order.
    """

    prompt_ids: tuple[str, ...]
    arms: Mapping[str, tuple[Rounds, ...]]
    seeds: Mapping[str, tuple[int, ...]]
    warnings: tuple[str, ...]

    def rounds(self, label: str) -> list[int]:
        """The rounds that the arm has at every seed."""
        return sorted(set.intersection(*(set(rounds) for rounds in self.arms[label])))

    @property
    def has_gold(self) -> bool:
        """Whether every policy has a gold score."""
        every = [one for seeds in self.arms.values() for rounds in seeds for one in rounds.values()]
        return bool(every) and all(one.gold is not None for one in every)

    @property
    def deciding(self) -> Literal["reward", "gold"]:
        """Whose scores say which of two answers wins: the gold judge's where there is one, for no arm trained on it."""
        return "gold" if self.has_gold else "reward"


def make_grid(outcomes: Sequence[Outcomes]) -> Grid:
    """Arrange `outcomes`, all on the same prompts in the same order.

    An arm without a round after 0 is left out; so are seeds that not every arm has. Raises `RunFolderError` when
    nothing is left, and `ValueError` for prompts in different orders.
    """
    if len({one.prompt_ids for one in outcomes}) > 1:
        raise ValueError("outcomes are on different prompts, or in another order: read_runs brings them into one")
    arms = _by_arm(outcomes)
    begun = {
        label: {seed: rounds for seed, rounds in seeds.items() if 0 in rounds and len(rounds) > 1}
        for label, seeds in arms.items()
    }
    warnings = [f"{label} is left out: it has no closed round yet" for label, seeds in begun.items() if not seeds]
    begun = {label: seeds for label, seeds in begun.items() if seeds}
    if not begun:
        raise RunFolderError("no arm has closed a round after round 0 yet: there is nothing to compare")
    chosen, lost = _columns(begun)
    return Grid(
        prompt_ids=outcomes[0].prompt_ids,
        arms={label: tuple(begun[label][seed] for seed in seeds) for label, seeds in chosen.items()},
        seeds=chosen,
        warnings=(*warnings, *lost),
    )


def cells(policies: Sequence[Outcomes], column: Column) -> Values:
    """One column of one policy a seed, as (P, S)."""
    return np.stack([_column(one, column) for one in policies], axis=1)


def _column(one: Outcomes, column: Column) -> Values:
    values: Values | None = getattr(one, column)
    if values is None:
        raise ValueError(f"{one.arm}, round {one.round} has no {column}")
    return values


def complete(*columns: Values) -> tuple[list[Values], int]:
    """`columns` (shape (P, S) each) without the prompts that lack a value in any cell, and how many these are."""
    there = np.all([np.isfinite(column).all(axis=1) for column in columns], axis=0)
    return [column[there] for column in columns], int(there.size - there.sum())


def _by_arm(outcomes: Sequence[Outcomes]) -> dict[str, dict[int, dict[int, Outcomes]]]:
    """Label -> seed -> round; a label is the arm's name, with its run's where that is needed to tell arms apart."""
    names = Counter(arm for _, arm in {(one.run, one.arm) for one in outcomes})
    found: dict[str, dict[int, dict[int, Outcomes]]] = {}
    for one in outcomes:
        plain = names[one.arm] == 1 and one.arm != INITIAL
        label = one.arm if plain else f"{one.run}/{one.arm}"
        found.setdefault(label, {}).setdefault(one.seed, {})[one.round] = one
    return found


def _columns(arms: Mapping[str, Mapping[int, Rounds]]) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """The seeds of each arm that are compared, and what is to be said of the others."""
    common = set.intersection(*(set(seeds) for seeds in arms.values()))
    every = set[int]().union(*arms.values())
    if common:
        chosen = {label: tuple(sorted(common)) for label in arms}
        lost = sorted(every - common)
        return chosen, [f"seeds {_list(lost)} are left out: not every arm has closed a round there"] if lost else []
    count = min(len(seeds) for seeds in arms.values())
    chosen = {label: tuple(sorted(seeds))[:count] for label, seeds in arms.items()}
    return chosen, [f"the arms share no seed: the first {count} of each are set side by side, in order"]


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(str(number) for number in numbers)
