"""Whether a judge's certainty is worth what it says: Brier score, log loss, calibration error, reliability bins."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from online_dpo.audit import intervals
from online_dpo.audit.intervals import Floats
from online_dpo.measure import Interval

Source = Literal["stated", "temperature", "log_odds"]
EDGES = np.arange(10, 21) / 20
"""Of the bins of certainty: ten from ½ to 1."""
FOLDS = 5
CERTAIN = 1e-6
"""Probabilities nearer than this to 0 and 1 count as this near in the log loss: one certain error costs 13.8 nats."""
WEAK_PENALTY = 1e4
"""1/λ of the slope's normal prior, the differences scaled to mean square 1: only keeps T finite where a judge is
always right."""
SIMULATIONS = 500


@dataclass(frozen=True, slots=True)
class Bin:
    """The pairs whose certainty lies in [low, high): how certain on average, and how often right (ties one half)."""

    low: float
    high: float
    certainty: float
    accuracy: Interval


@dataclass(frozen=True, slots=True)
class Calibration:
    """How good the probabilities are that a judge gives to the chosen answer.

    `source`: "stated" by a judge that compares; "temperature": σ(score difference/T), each pair's T fitted on other
    prompts; "log_odds": T = 1, for judges whose scores are log-odds (reward models, strengths).
    `temperature`: the T fitted on all pairs; None where no T > 0 fits: the scores then say nothing, or the opposite.
    `brier`: mean (P − 1)² of the chosen answer's P: 0 is perfect, ¼ is knowing nothing.
    `log_loss`: mean −ln P in nats: 0 is perfect, ln 2 is knowing nothing.
    `error`: expected calibration error: |accuracy − certainty| averaged over `bins` by their pairs, where certainty is
    the larger of P and 1 − P (Guo et al., ICML 2017). `error_by_chance`: what a perfectly calibrated judge of the same
    certainties would stay below in 95 of 100 such samples; `error` has no interval, since resampling only raises it.
    """

    source: Source
    temperature: float | None
    brier: Interval
    log_loss: Interval
    error: float
    error_by_chance: float
    bins: tuple[Bin, ...]


def stated(chosen: Floats, groups: ArrayLike, seed: int) -> Calibration | None:
    """Of probabilities (shape (n,)) that the judge gave to the chosen answers. None without a pair."""
    return _calibration("stated", None, chosen, chosen - 0.5, groups, seed)


def as_log_odds(difference: Floats, groups: ArrayLike, seed: int) -> Calibration | None:
    """Of score differences chosen − rejected (shape (n,)) taken as log-odds. None without a pair."""
    return _calibration("log_odds", 1.0, _sigmoid(difference), difference, groups, seed)


def with_temperature(difference: Floats, groups: ArrayLike, seed: int) -> Calibration | None:
    """Of score differences chosen − rejected (shape (n,)) in any unit, by a temperature fitted in `FOLDS` folds over
    prompts. None for fewer than two prompts."""
    from sklearn.model_selection import GroupKFold

    folds = min(FOLDS, intervals.prompts_of(groups))
    if folds < 2:
        return None
    chosen = np.full(difference.size, math.nan)
    for fit, rest in GroupKFold(folds).split(difference, groups=groups):
        chosen[rest] = _sigmoid(difference[rest] * _slope(difference[fit]))
    slope = _slope(difference)
    return _calibration("temperature", 1 / slope if slope > 0 else None, chosen, difference, groups, seed)


def _slope(difference: Floats) -> float:
    """1/T ≥ 0 of P(chosen is better) = σ(difference/T) by maximum likelihood; 0 where that would be negative: a
    temperature does not turn verdicts around."""
    from sklearn.linear_model import LogisticRegression

    scale = math.sqrt(float(np.mean(np.square(difference))))
    if not 0.0 < scale < math.inf:
        return 0.0
    x = np.concatenate([difference, -difference])[:, None] / scale
    y = np.repeat([1, 0], difference.size)
    fitted = LogisticRegression(fit_intercept=False, C=WEAK_PENALTY).fit(x, y)
    return max(0.0, float(fitted.coef_[0, 0])) / scale


def _sigmoid(x: Floats) -> Floats:
    from scipy.special import expit

    found: Floats = expit(x)
    return found


def _calibration(
    source: Source, temperature: float | None, chosen: Floats, difference: Floats, groups: ArrayLike, seed: int
) -> Calibration | None:
    """`difference`: only its sign counts; whether the judge was right must not depend on rounding in P."""
    if not chosen.size:
        return None
    codes = np.asarray(groups)
    right = (difference > 0) + 0.5 * (difference == 0)
    certainty = np.maximum(chosen, 1 - chosen)
    inside = np.digitize(certainty, EDGES[1:-1])
    bins = tuple(
        Bin(
            float(EDGES[k]),
            float(EDGES[k + 1]),
            float(certainty[inside == k].mean()),
            intervals.rate(right[inside == k], codes[inside == k]),
        )
        for k in np.unique(inside)
    )
    gap = right - certainty
    return Calibration(
        source,
        temperature,
        intervals.mean(np.square(1 - chosen), codes, seed),
        intervals.mean(-np.log(np.clip(chosen, CERTAIN, 1 - CERTAIN)), codes, seed),
        float(_errors(gap[None, :], inside)[0]),
        _error_by_chance(certainty, difference == 0, inside, seed),
        bins,
    )


def _errors(gaps: Floats, inside: np.ndarray) -> Floats:
    """Σ over bins of |Σ gap| / n, for each row of accuracy − certainty (rows, n)."""
    sums = np.stack([np.abs(gaps[:, inside == k].sum(axis=1)) for k in np.unique(inside)], axis=1)
    found: Floats = sums.sum(axis=1) / inside.size
    return found


def _error_by_chance(certainty: Floats, tied: np.ndarray, inside: np.ndarray, seed: int) -> float:
    """The 95 % quantile of the error when each verdict is right with exactly its certainty; ties stay ties."""
    random = np.random.default_rng(seed)
    right = np.where(tied, 0.5, random.random((SIMULATIONS, certainty.size)) < certainty)
    return float(np.quantile(_errors(right - certainty, inside), 0.95))
