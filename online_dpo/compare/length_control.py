"""The length-controlled win rate: what the win rate would be if both answers were equally long.

Dubois et al., Length-controlled AlpacaEval, 2024: a logistic model of the win with the difference of lengths in it,
read where that difference is 0. Adapted: one model for each two policies, ties as ½, no term for how hard a prompt is;
lengths are differences of tokens over their root mean square, through tanh as there. (The judge of that name,
judges/length_controlled.py, corrects scores within a round by a line instead; the two share no arithmetic.)

    P(win) = σ(a + b·h),  h = tanh((tokens of one − tokens of the other)/scale),  length-controlled win rate = σ(a)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit, log_expit

from online_dpo.compare.crossed import crossed
from online_dpo.compare.estimates import Estimate, critical, p_of_score, share
from online_dpo.compare.outcomes import Values
from online_dpo.measure import Interval

PRECISION = 0.01
"""Of a normal prior on a and b (standard deviation 10): it keeps both finite and moves nothing else."""
BOUND, STEEPEST = 60.0, 1000.0
"""|a| and |b| are below these: σ(60) is 1, and the prior holds b."""


def length_controlled(wins: Values, longer: Values) -> Estimate:
    """σ(a) from `wins` in {0, ½, 1} and `longer`, tokens of the one less those of the other (shape (P, S) each).

    The interval is that of the profile likelihood: all a with 2(ℓ(â) − ℓ(a)) ≤ z², b chosen anew for each; with
    several seeds z² grows by how much less than independent the cells are (the linearised a, crossed; Rotnitzky and
    Jewell, Biometrika 1990). Unlike â ± z·error it says [0, 1] where one policy's answers are always the longer ones:
    nothing is known of equal lengths then.
    """
    if wins.shape[0] < 2:
        return share(wins)
    model = _Model(wins.ravel(), _squashed(longer).ravel())
    top = model.best()
    influence, error = model.linearised(top)
    cells = influence.reshape(wins.shape)
    seeds = wins.shape[1]
    slope = float(expit(top)) * float(expit(-top))
    bound = critical(crossed(cells), error, seeds)
    low, high = (model.reach(top, bound, side) for side in (-1, 1))
    score = math.sqrt(max(0.0, 2 * (model.profile(top) - model.profile(0.0))))
    return Estimate(
        Interval(float(expit(top)), float(expit(low)), float(expit(high)), wins.size),
        p_of_score(crossed(cells), error, seeds, score),
        crossed(float(expit(top)) - 0.5 + slope * cells),
    )


@dataclass(frozen=True, slots=True)
class _Model:
    """The penalised likelihood of `wins` given squashed length differences `h` (shape (n,) both)."""

    wins: Values
    h: Values

    def slope(self, a: float) -> float:
        """The b that is best for this a."""
        return _root(lambda b: float(self.h @ (self.wins - expit(a + b * self.h))) - PRECISION * b, STEEPEST)

    def best(self) -> float:
        """â. By the envelope theorem the profile's slope in a is that of the likelihood at the best b."""
        return _root(lambda a: float((self.wins - expit(a + self.slope(a) * self.h)).sum()) - PRECISION * a, BOUND)

    def profile(self, a: float) -> float:
        """The penalised log-likelihood of a at the best b."""
        b = self.slope(a)
        eta = a + b * self.h
        likely = self.wins @ log_expit(eta) + (1 - self.wins) @ log_expit(-eta)
        return float(likely) - PRECISION * (a * a + b * b) / 2

    def reach(self, top: float, bound: float, side: int) -> float:
        """The a on one side of `top` that lies `bound` standard errors away by likelihood; ±BOUND where none does."""
        peak, end = self.profile(top), side * BOUND

        def excess(a: float) -> float:
            return 2 * (peak - self.profile(a)) - bound * bound

        return end if excess(end) <= 0 else float(brentq(excess, top, end, xtol=1e-6))

    def linearised(self, a: float) -> tuple[Values, float]:
        """What each cell adds to â (mean 0, but for the prior), and the standard error of â for independent cells."""
        chance = expit(a + self.slope(a) * self.h)
        weight = chance * (1 - chance)
        one, mixed, two = weight.sum() + PRECISION, weight @ self.h, weight @ np.square(self.h) + PRECISION
        determinant = one * two - mixed * mixed
        residual = self.wins - chance
        influence: Values = self.wins.size * (two * residual - mixed * self.h * residual) / determinant
        return influence, math.sqrt(two / determinant)


def _squashed(longer: Values) -> Values:
    """Differences of lengths over their root mean square, through tanh; 0 where there are none."""
    scale = math.sqrt(float(np.square(longer).mean()))
    return np.tanh(longer / scale) if scale > 0 else np.zeros_like(longer)


def _root(falling: Callable[[float], float], most: float) -> float:
    """Where `falling` is 0, at most `most` from 0: looked for near 0 first, where it nearly always is."""
    near = 4.0
    while near < most and not falling(-near) > 0 > falling(near):
        near = min(most, 4 * near)
    return float(brentq(falling, -near, near, xtol=1e-9))
