"""The round that stands for an arm at one seed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from online_dpo.compare.grid import Rounds
from online_dpo.compare.outcomes import Values

Select = Literal["last", "best", "best_gold"]
Places = NDArray[np.int64]


def halves(prompt_ids: Sequence[str]) -> tuple[Places, Places]:
    """The places of the prompts on which a round is chosen, and of those on which it is then judged.

    The best of several rounds looks better on the very prompts that it was chosen on than it is. Which half a prompt
    belongs to follows from a hash of its id: the same for all arms, seeds and runs. A lone prompt is in both.
    """
    ranked = sorted(range(len(prompt_ids)), key=lambda place: _rank(prompt_ids[place]))
    middle = len(ranked) // 2
    if not middle:
        return np.arange(len(ranked)), np.arange(len(ranked))
    return np.array(sorted(ranked[:middle])), np.array(sorted(ranked[middle:]))


def selected_round(rounds: Rounds, select: Select) -> int:
    """Of the rounds after 0 the last, or the one with the highest mean reward or gold reward on the choosing half.

    Means are over prompts that every round has a score of; the earliest of equals; the last where there is no such
    prompt or no gold score.
    """
    trained = {index: rounds[index] for index in sorted(rounds) if index > 0}
    last = max(trained)
    if select == "last":
        return last
    choosing, _ = halves(trained[last].prompt_ids)
    scores: dict[int, Values] = {}
    for index, one in trained.items():
        values = one.gold if select == "best_gold" else one.reward
        if values is None:
            return last
        scores[index] = values[choosing]
    return _highest(scores, last)


def _highest(scores: Mapping[int, Values], last: int) -> int:
    there = np.all([np.isfinite(values) for values in scores.values()], axis=0)
    if not there.any():
        return last
    return max(scores, key=lambda index: float(scores[index][there].mean()))


def _rank(prompt_id: str) -> str:
    return hashlib.sha256(f"select\0{prompt_id}".encode()).hexdigest()
