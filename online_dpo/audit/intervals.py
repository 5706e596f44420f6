"""Figures over pairs of answers with 95 % intervals over prompts: pairs of one prompt are not independent.

A pair is a row and `groups` names its prompt. Bootstraps draw whole prompts with replacement and weigh each row by how
often its prompt was drawn, so that 2000 resamples are a few matrix products. What compares two answers is counted in
both orders of naming them: no figure depends on which answer is called the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from online_dpo.measure import CHUNK, RESAMPLES, Interval, wilson

Floats = NDArray[np.float64]
Groups = NDArray[np.int64]
NOTHING = Interval(math.nan, math.nan, math.nan, 0)
BOUNDS = (0.025, 0.975)
SIDES = 3
"""What can be said of a pair: the first is better, a tie, the second is better."""


def rate(values: ArrayLike, groups: ArrayLike) -> Interval:
    """The mean of shares in [0, 1] (shape (n,)) with Wilson's interval, widened where rows share a prompt.

    Wilson's interval takes n/d for n, where the design effect d is the variance of the mean with rows clustered by
    prompt (linearised) over p(1 − p)/n (Franco, Little, Louis and Slud, J. Surv. Stat. Methodol. 2019). d is at least
    1, and exactly 1 where every prompt has one row of 0 or 1: then this is `measure.win_rate`'s interval.
    """
    x, codes, size = _rows(values, groups)
    n = x.size
    if n == 0:
        return NOTHING
    p = float(x.mean())
    simple = p * (1 - p) / n
    effect = 1.0
    if simple > 0 and 1 < size < n:
        sums = np.bincount(codes, weights=x - p, minlength=size)
        clustered = float(np.square(sums).sum()) / n**2 * (size / (size - 1)) * ((n - 1) / n)
        effect = max(1.0, clustered / simple)
    found = wilson(p, n / effect)
    return Interval(p, found.low, found.high, n)


def mean(values: ArrayLike, groups: ArrayLike, seed: int) -> Interval:
    """The mean of `values` (shape (n,)) over rows, with a percentile bootstrap interval over prompts."""
    x, codes, size = _rows(values, groups)
    if not x.size:
        return NOTHING
    sums, rows = np.bincount(codes, weights=x, minlength=size), np.bincount(codes, minlength=size)
    return _bootstrap(x.size, size, size, seed, lambda counts: (counts @ sums) / (counts @ rows))


def pearson(x: ArrayLike, y: ArrayLike, groups: ArrayLike, seed: int) -> Interval:
    """The correlation of two differences of first and second answer: Σxy/√(Σx² Σy²), both having mean 0 by naming
    each pair in both orders. NaN where one of them does not vary."""
    a, codes, size = _rows(x, groups)
    b = np.asarray(y, dtype=np.float64)
    products = np.stack(
        [np.bincount(codes, weights=row, minlength=size) for row in (a * b, np.square(a), np.square(b))], axis=1
    )
    return _bootstrap(a.size, size, size, seed, lambda counts: _cosine(*(counts @ products).T))


def spearman(x: ArrayLike, y: ArrayLike, groups: ArrayLike, seed: int) -> Interval:
    """The rank correlation of two differences of first and second answer, each pair in both orders, ties sharing
    their mean rank. Ranks are taken anew in every resample."""
    a, codes, size = _rows(x, groups)
    rank_a, rank_b = _Ranks(a), _Ranks(np.asarray(y, dtype=np.float64))

    def figure(counts: Floats) -> Floats:
        weights = counts[:, codes]
        one, other = rank_a(weights), rank_b(weights)
        sums = [np.einsum("rn,rn,rn->r", weights, left, right) for left, right in _pairs_of(one, other)]
        return _cosine(*sums)

    return _bootstrap(a.size, size, 2 * a.size, seed, figure)


def kappa(one: ArrayLike, other: ArrayLike, groups: ArrayLike, seed: int) -> Interval:
    """Cohen's κ of two judges' verdicts on the same pairs (Educ. Psychol. Meas. 1960).

    Verdicts (shape (n,)) are 0 (first better), 1 (tie) or 2 (second better). Each pair counts in both orders, so both
    judges say "first" as often as "second", and chance agreement is that of their shares of ties alone.
    NaN where both always say "tie": chance explains everything.
    """
    a, codes, size = _rows(one, groups)
    b = np.asarray(other, dtype=np.int64)
    cells = a.astype(np.int64) * SIDES + b
    mirrored = (SIDES - 1 - a.astype(np.int64)) * SIDES + (SIDES - 1 - b)
    table = np.zeros((size, SIDES * SIDES))
    for column in (cells, mirrored):
        np.add.at(table, (codes, column), 1.0)
    return _bootstrap(a.size, size, size, seed, lambda counts: _kappas(counts @ table))


def prompts_of(groups: ArrayLike) -> int:
    """How many prompts the rows come from."""
    return int(np.unique(np.asarray(groups)).size)


def resamples(size: int, width: int, seed: int) -> Iterator[Floats]:
    """How often each of `size` prompts was drawn: `RESAMPLES` rows in all, a few at a time; `width` numbers a row
    are what the caller makes of them."""
    random = np.random.default_rng(seed)
    step = max(1, CHUNK // max(size, width))
    for start in range(0, RESAMPLES, step):
        rows = min(step, RESAMPLES - start)
        drawn = random.integers(0, size, size=(rows, size)) + np.arange(rows)[:, None] * size
        yield np.bincount(drawn.ravel(), minlength=rows * size).reshape(rows, size).astype(np.float64)


class _Ranks:
    """Mid-ranks of ±values under row weights, less their mean: ranks among the values in both orders of naming."""

    def __init__(self, values: Floats) -> None:
        both = np.concatenate([values, -values])
        self.n = values.size
        distinct, place = np.unique(both, return_inverse=True)
        self.order = np.argsort(place, kind="stable") % max(self.n, 1)
        self.starts = np.searchsorted(np.sort(place), np.arange(distinct.size))
        self.place = place[: self.n]

    def __call__(self, weights: Floats) -> Floats:
        """`weights` (resamples, n) → centred ranks (resamples, n)."""
        tied = np.add.reduceat(weights[:, self.order], self.starts, axis=1)
        middle = np.cumsum(tied, axis=1) - tied / 2
        centred: Floats = (middle - weights.sum(axis=1, keepdims=True))[:, self.place]
        return centred


def _pairs_of(one: Floats, other: Floats) -> tuple[tuple[Floats, Floats], ...]:
    return (one, other), (one, one), (other, other)


def _cosine(xy: Floats, xx: Floats, yy: Floats) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Floats = xy / np.sqrt(xx * yy)
    return np.clip(found, -1.0, 1.0)


def _kappas(cells: Floats) -> Floats:
    """κ of each row of confusion counts (resamples, 9)."""
    shares = cells.reshape(-1, SIDES, SIDES) / cells.sum(axis=1)[:, None, None]
    observed = np.trace(shares, axis1=1, axis2=2)
    chance = np.einsum("rk,rk->r", shares.sum(axis=1), shares.sum(axis=2))
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Floats = np.where(chance < 1.0, (observed - chance) / (1.0 - chance), math.nan)
    return found


def _bootstrap(n: int, size: int, width: int, seed: int, figure: Callable[[Floats], Floats]) -> Interval:
    """`figure` of all rows, with the bounds of its resamples; resamples that have no such figure are left out."""
    if n == 0:
        return NOTHING
    whole = float(figure(np.ones((1, size)))[0])
    if size < 2 or math.isnan(whole):
        return Interval(whole, math.nan, math.nan, n)
    found = np.concatenate([figure(counts) for counts in resamples(size, width, seed)])
    low, high = np.nanquantile(found, BOUNDS)
    return Interval(whole, float(low), float(high), n)


def _rows(values: ArrayLike, groups: ArrayLike) -> tuple[Floats, Groups, int]:
    """Values, each row's prompt as a number from 0, and the number of prompts."""
    x = np.asarray(values, dtype=np.float64)
    distinct, codes = np.unique(np.asarray(groups), return_inverse=True)
    if x.shape != codes.shape or x.ndim != 1:
        raise ValueError(f"values and prompts need one row each, got {x.shape} and {codes.shape}")
    return x, codes, int(distinct.size)
