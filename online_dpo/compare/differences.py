"""Every two arms against each other by every measure, and every policy's win rate against every other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from online_dpo.compare.comparison import Difference, Measure, Selected, Verdict
from online_dpo.compare.crossed import LEVEL
from online_dpo.compare.equal_kl import cells_at, common_kl
from online_dpo.compare.estimates import Estimate, mean_difference, share, wins_of
from online_dpo.compare.grid import INITIAL, Column, Grid, cells, complete
from online_dpo.compare.holm import holm
from online_dpo.compare.length_control import length_controlled
from online_dpo.compare.outcomes import Outcomes
from online_dpo.compare.power import more_prompts, more_seeds
from online_dpo.compare.selecting import Places, Select, halves, selected_round
from online_dpo.compare.sentences import sentence_of
from online_dpo.measure import Interval

ALPHA = 1 - LEVEL
"""The chance of one wrong verdict or more among all differences of one measure."""


@dataclass(frozen=True, slots=True)
class Field:
    """The policies that stand for the arms, one a seed, and the places of the prompts on which they are judged."""

    grid: Grid
    rounds: Mapping[str, tuple[int, ...]]
    judged: Places

    def policies(self, label: str, other: str) -> list[Outcomes]:
        """Of an arm those of its chosen rounds; of `INITIAL` the policies that `other` began with."""
        if label == INITIAL:
            return [rounds[0] for rounds in self.grid.arms[other]]
        return [rounds[at] for rounds, at in zip(self.grid.arms[label], self.rounds[label], strict=True)]

    @property
    def selected(self) -> tuple[Selected, ...]:
        """Which rounds these are."""
        return tuple(
            Selected(label, seed, at)
            for label, chosen in self.rounds.items()
            for seed, at in zip(self.grid.seeds[label], chosen, strict=True)
        )


def make_field(grid: Grid, select: Select) -> Field:
    """Choose the rounds by `select`; where that looks at scores, on half of the prompts, to be judged on the other."""
    chosen = {
        label: tuple(selected_round(rounds, select) for rounds in columns) for label, columns in grid.arms.items()
    }
    places = np.arange(len(grid.prompt_ids)) if select == "last" else halves(grid.prompt_ids)[1]
    return Field(grid, chosen, places)


def differences(field: Field, contrasts: Sequence[tuple[str, str]] = ()) -> tuple[Difference, ...]:
    """Those of `contrasts` whose arms are there, by each measure; where there are none each two arms, in their order;
    one arm alone against the policy that it began with."""
    labels = list(field.grid.arms)
    every = list(combinations(labels, 2)) if len(labels) > 1 else [(labels[0], INITIAL)]
    pairs = [(a, b) for a, b in contrasts if a in labels and b in labels] or every
    measures: list[Measure] = ["reward", "win_rate", "length_controlled"]
    if field.grid.has_gold:
        measures.insert(1, "gold")
    found = [difference for measure in measures for difference in _family(field, measure, pairs)]
    return (*found, *_at_equal_kl(field.grid, [pair for pair in pairs if INITIAL not in pair]))


def win_matrix(field: Field) -> dict[str, dict[str, Interval]]:
    """The share of prompts on which the policy of the row beats that of the column, ties half."""
    labels = [*field.grid.arms, INITIAL]
    found: dict[str, dict[str, Interval]] = {label: {} for label in labels}
    for a, b in combinations(labels, 2):
        won = estimate(field, "win_rate", a, b)[0].interval
        found[a][b] = won
        found[b][a] = Interval(1 - won.mean, 1 - won.high, 1 - won.low, won.n)
    return found


def estimate(field: Field, measure: Measure, a: str, b: str) -> tuple[Estimate, int]:
    """`a` against `b` by `measure`, and how many prompts are left out: a judge abstained on one of their answers."""
    sides = (field.policies(a, b), field.policies(b, a))
    scores: Column = measure if measure in ("reward", "gold") else field.grid.deciding
    columns = [cells(side, column)[field.judged] for column in (scores, "tokens") for side in sides]
    (of_a, of_b, long_a, long_b), lost = complete(*columns)
    if measure in ("reward", "gold"):
        return mean_difference(of_a - of_b), lost
    wins = wins_of(of_a, of_b)
    return (share(wins) if measure == "win_rate" else length_controlled(wins, long_a - long_b)), lost


def _family(field: Field, measure: Measure, pairs: Sequence[tuple[str, str]]) -> list[Difference]:
    """All differences of one measure, corrected together."""
    return _corrected(measure, [(pair, *estimate(field, measure, *pair)) for pair in pairs])


def _at_equal_kl(grid: Grid, pairs: Sequence[tuple[str, str]]) -> list[Difference]:
    """Those of `pairs` that have a KL in common, on all prompts: no round is chosen by its scores."""
    found, levels = [], []
    for a, b in pairs:
        kl = common_kl(grid, a, b)
        if kl is not None:
            sides, lost = complete(*(cells_at(grid.arms[label], kl, grid.deciding) for label in (a, b)))
            found.append(((a, b), mean_difference(sides[0] - sides[1]), lost))
            levels.append(kl)
    bare = _corrected("equal_kl", found)
    measured = [replace(one, kl=kl) for one, kl in zip(bare, levels, strict=True)]
    return [one.said(sentence_of(one)) for one in measured]


def _corrected(measure: Measure, found: Sequence[tuple[tuple[str, str], Estimate, int]]) -> list[Difference]:
    corrected = holm([one.p for _, one, _ in found])
    return [
        _difference(measure, pair, one, lost, p, len(found))
        for (pair, one, lost), p in zip(found, corrected, strict=True)
    ]


def _difference(
    measure: Measure, pair: tuple[str, str], one: Estimate, lost: int, corrected: float, family: int
) -> Difference:
    verdict: Verdict = "inconclusive"
    if corrected <= ALPHA:
        verdict = "better" if one.spread.mean > 0 else "worse"
    open_still = verdict == "inconclusive" and one.spread.prompts > 1
    # The bar of the first in Holm's order, the highest: what is promised is then enough at any place.
    level = ALPHA / family
    bare = Difference(
        measure=measure,
        a=pair[0],
        b=pair[1],
        interval=one.interval,
        p=one.p,
        p_corrected=corrected,
        verdict=verdict,
        prompts=one.spread.prompts,
        seeds=one.spread.seeds,
        more_prompts=more_prompts(one.spread, level) if open_still else None,
        more_seeds=more_seeds(one.spread, level) if open_still else None,
        sentence="",
        abstained=lost,
        family=family,
    )
    return bare.said(sentence_of(bare))
