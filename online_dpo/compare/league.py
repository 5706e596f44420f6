"""All rounds of all arms in one table of strengths, by how often each beats each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from online_dpo.compare.comparison import Rating
from online_dpo.compare.crossed import Crossed, crossed
from online_dpo.compare.estimates import NORMAL, wins_of
from online_dpo.compare.grid import INITIAL, Grid, cells
from online_dpo.compare.outcomes import Values
from online_dpo.measure import Interval

ELO = 400 / math.log(10)
"""Elo points of one unit of log-odds: 400 points are odds of 10 to 1."""
INVERSE_PRECISION = 100.0
"""Of a normal prior on strengths, in log-odds squared: it keeps one who won everything finite, and moves no other."""


@dataclass(frozen=True, slots=True)
class _Tally:
    """Players and what their comparisons add up to. `wins[i, j]`: cells in which i beat j, ties half; `met[i, j]`: in
    which both have a score. Player 0 is the initial policy: for each other one, that of its own arm."""

    names: list[tuple[str, int]]
    scores: Values
    """[players, P, S]"""
    starts: Values
    """[players, P, S]: the scores of the policy that each began with."""
    wins: Values
    met: Values

    def against(self, player: int) -> Values:
        """[players, P, S]: 1 where `player` beat each other, ½, 0; NaN where they did not meet."""
        others = self.scores.copy()
        others[0] = self.starts[player]
        won = wins_of(self.scores[player][None], others)
        won[player] = np.nan
        return won


def league(grid: Grid) -> tuple[Rating, ...]:
    """Bradley–Terry strengths (Biometrika 1952) of the initial policy and of all rounds that an arm has at all seeds.

    Two answers to the same prompt by policies of the same seed are one comparison, by the scores of the judge that
    decides. Strengths are those of a logistic regression without intercept (scikit-learn). Intervals: what each cell of
    prompt and seed adds to a strength (one Newton step, the bootstrap's linear part), crossed as in `crossed.py`, and
    never less than independent comparisons would give, which holds where one won nearly everything. All are relative to
    the initial policy.
    """
    tally = _tally(grid)
    strengths = _fit(tally)
    cells_of, error = _linearised(tally, strengths)
    rated = [Rating(INITIAL, 0, Interval(0.0, 0.0, 0.0, 0))]
    for player, (label, index) in enumerate(tally.names[1:], start=1):
        found = crossed(cells_of[player])
        rated.append(Rating(label, index, _interval(found, strengths[player] - strengths[0], error[player])))
    return tuple(sorted(rated, key=lambda one: -one.strength.mean))


def _tally(grid: Grid) -> _Tally:
    names = [(INITIAL, 0), *((label, index) for label in grid.arms for index in grid.rounds(label) if index > 0)]
    first = next(iter(grid.arms))
    owners = [first if label == INITIAL else label for label, _ in names]
    scores = np.stack(
        [
            cells([rounds[index] for rounds in grid.arms[owner]], grid.deciding)
            for owner, (_, index) in zip(owners, names, strict=True)
        ]
    )
    starts = np.stack([cells([rounds[0] for rounds in grid.arms[owner]], grid.deciding) for owner in owners])
    tally = _Tally(names, scores, starts, np.zeros((len(names),) * 2), np.zeros((len(names),) * 2))
    for player in range(1, len(names)):
        won = tally.against(player)
        tally.wins[player], tally.met[player] = np.nansum(won, axis=(1, 2)), np.isfinite(won).sum(axis=(1, 2))
    tally.met[0] = tally.met[:, 0]
    tally.wins[0] = tally.met[:, 0] - tally.wins[:, 0]
    return tally


def _fit(tally: _Tally) -> Values:
    """Strengths in log-odds, of mean about 0."""
    from sklearn.linear_model import LogisticRegression

    count = len(tally.names)
    one, other = np.triu_indices(count, 1)
    rows = np.zeros((one.size, count))
    rows[np.arange(one.size), one], rows[np.arange(one.size), other] = 1.0, -1.0
    won, lost = tally.wins[one, other], tally.wins[other, one]
    # Each comparison a second time with its sides changed, at half the weight: both outcomes are then always there.
    x = np.concatenate([rows, rows, -rows, -rows])
    y = np.concatenate([np.ones(one.size), np.zeros(one.size)] * 2)
    weight = np.concatenate([won, lost, lost, won]) / 2
    model = LogisticRegression(
        C=INVERSE_PRECISION, fit_intercept=False, solver="newton-cholesky", tol=1e-8, max_iter=1000
    )
    model.fit(x[weight > 0], y[weight > 0], sample_weight=weight[weight > 0])
    strengths: Values = np.asarray(model.coef_[0], dtype=np.float64)
    return strengths


def _linearised(tally: _Tally, strengths: Values) -> tuple[Sequence[Values], Values]:
    """For each player, cells (P, S) whose mean is its strength less the initial's; and that difference's standard error
    were all comparisons independent."""
    chance = 1 / (1 + np.exp(strengths[None, :] - strengths[:, None]))
    weight = tally.met * chance * (1 - chance)
    inverse = np.linalg.inv(np.diag(weight.sum(axis=1) + 1 / INVERSE_PRECISION) - weight)
    slope = np.zeros_like(tally.scores)
    for player in range(1, len(tally.names)):
        surprise = np.nan_to_num(tally.against(player) - chance[player][:, None, None])
        slope[player] = surprise.sum(axis=0)
        slope[0] -= surprise[0]
    count = slope[0].size
    moved = count * np.tensordot(inverse - inverse[0], slope, axes=1)
    error = np.sqrt(np.maximum(0.0, np.diag(inverse) + inverse[0, 0] - 2 * inverse[0]))
    return [strengths[player] - strengths[0] + moved[player] for player in range(len(tally.names))], error


def _interval(found: Crossed, strength: float, error: float) -> Interval:
    """In Elo points."""
    half = max(found.half_width(), NORMAL.inv_cdf(0.975) * float(error))
    middle = float(strength)
    return Interval(ELO * middle, ELO * (middle - half), ELO * (middle + half), found.prompts * found.seeds)
