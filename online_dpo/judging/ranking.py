"""From comparisons of n candidates to a ranking: which to compare, and the strengths that the outcomes give.

Candidates are numbered 0…n−1; a comparison (i, j) has i < j and an outcome p in [0, 1], the probability that i is
better.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from online_dpo.config import ComparingSpec

Place = tuple[int, int]
"""Which two candidates are compared, the lower number first."""
Outcomes = Mapping[Place, float | None]
"""What came of the comparisons so far: the probability that the first is better, None where the judge abstained."""

NEWTON_STEPS = 1000
"""Far more than strict concavity needs: a handful, some dozens at a tiny precision."""
CONVERGED = 1e-10
DIGITS = 9
"""After the point: what lies below is rounding, and would make a preference of a tie."""


def next_comparisons(n: int, spec: ComparingSpec, done: Outcomes) -> list[Place]:
    """What to compare next, given what came of it so far; empty when the schedule is through.

    all_pairs: everything at once. swiss: wave by wave, each candidate against one of about equal record that it has
    not met (⌊n/2⌋ comparisons a wave, fewer where no such pairing is left; n odd: the lowest of those that have not
    sat out yet sits out). knock_out: winners meet, n − 1 comparisons; only the first place is well founded.
    """
    if n < 2:
        return []
    if spec.schedule == "all_pairs":
        return [place for place in itertools.combinations(range(n), 2) if place not in done]
    if spec.schedule == "swiss":
        return _swiss_wave(n, spec.waves or swiss_waves(n), done)
    return _knock_out_wave(n, done)


def swiss_waves(n: int) -> int:
    """Enough waves to find the best of n and to order the rest roughly: ⌈log₂ n⌉ + 1, never more than n − 1."""
    return min(max(n - 1, 1), math.ceil(math.log2(n)) + 1) if n > 1 else 0


def schedule_size(n: int, spec: ComparingSpec) -> int:
    """The most comparisons of n candidates, each counted once whatever the number of orders."""
    if n < 2:
        return 0
    if spec.schedule == "all_pairs":
        return n * (n - 1) // 2
    if spec.schedule == "swiss":
        return min(n * (n - 1) // 2, (n // 2) * (spec.waves or swiss_waves(n)))
    return n - 1


def _swiss_wave(n: int, waves: int, done: Outcomes) -> list[Place]:
    met = [0] * n
    record = [0.0] * n
    for (i, j), outcome in done.items():
        p = 0.5 if outcome is None else outcome  # an abstention moves nobody
        met[i], met[j] = met[i] + 1, met[j] + 1
        record[i], record[j] = record[i] + p, record[j] + 1.0 - p
    left = schedule_size(n, ComparingSpec(schedule="swiss", waves=waves)) - len(done)
    if left <= 0 or max(met) >= waves:
        return []
    # To sit out counts as a win, or the best would not meet the others that never lost.
    points = [record[i] + max(met) - met[i] for i in range(n)]
    # Who sat out goes first, so that nobody sits out twice while another has not.
    order = sorted(range(n), key=lambda i: (met[i], -points[i], i))
    playing = sorted(order[: n - n % 2], key=lambda i: (-points[i], i))
    return _matched(playing, set(done))[:left]


def _matched(playing: list[int], done: set[Place]) -> list[Place]:
    """Each of `playing` with the nearest below that it has not met.

    Two that are left over take another pair apart where both find a partner in it. Such a pair exists as long as each
    has met fewer than half of those that play: the two then have more than two open comparisons to some pair.
    """
    wave: list[Place] = []
    left: list[int] = []
    waiting = list(playing)
    while waiting:
        first = waiting.pop(0)
        partner = next((other for other in waiting if _place(first, other) not in done), None)
        if partner is None:
            left.append(first)
            continue
        waiting.remove(partner)
        wave.append(_place(first, partner))
    while len(left) > 1 and (swap := _swap(left, wave, done)) is not None:
        pair, mended = swap
        wave = [*(other for other in wave if other != pair), *mended]
        left = [i for i in left if all(i not in place for place in mended)]
    return wave


def _swap(left: Sequence[int], wave: Sequence[Place], done: set[Place]) -> tuple[Place, list[Place]] | None:
    """A pair of `wave`, and two pairs that its members and two of `left` can form instead."""
    for a, b in itertools.combinations(left, 2):
        for pair in reversed(wave):  # from below: the first places are decided by the pairs above
            for c, d in (pair, pair[::-1]):
                if _place(a, c) not in done and _place(b, d) not in done:
                    return pair, [_place(a, c), _place(b, d)]
    return None


def _knock_out_wave(n: int, done: Outcomes) -> list[Place]:
    """Pairs of neighbours among those still in; the last of an odd number passes; of a tie the lower number passes."""
    still_in = list(range(n))
    while len(still_in) > 1:
        wave = [_place(a, b) for a, b in zip(still_in[::2], still_in[1::2], strict=False)]
        missing = [place for place in wave if place not in done]
        if missing:
            return missing
        winners = [i if _passes(done[i, j]) else j for i, j in wave]
        still_in = winners + ([still_in[-1]] if len(still_in) % 2 else [])
    return []


def _passes(outcome: float | None) -> bool:
    """Whether the lower number goes on. Where the judge abstained somebody must: it is no verdict, only a seat."""
    return outcome is None or outcome >= 0.5


def _place(i: int, j: int) -> Place:
    return (i, j) if i < j else (j, i)


def mean_wins(n: int, outcomes: Outcomes) -> list[float | None]:
    """Each candidate's mean probability of winning its comparisons (Borda's count where all pairs were compared)."""
    won: list[list[float]] = [[] for _ in range(n)]
    for (i, j), p in outcomes.items():
        if p is not None:
            won[i].append(p)
            won[j].append(1.0 - p)
    return [round(math.fsum(values) / len(values), DIGITS) if values else None for values in won]


def bradley_terry(n: int, outcomes: Outcomes, precision: float) -> list[float | None]:
    """Strengths s with P(i beats j) = σ(s_i − s_j), in log-odds (Bradley and Terry, Biometrika 1952).

    Maximises Σ p·log σ(s_i − s_j) + (1 − p)·log σ(s_j − s_i) − (precision/2)·Σ s²: the normal prior keeps the
    strength of one that won everything finite, and makes Σ s = 0. Newton's method; the objective is strictly concave.
    None for candidates that no chain of comparisons joins with the largest group: they cannot be placed.
    """
    group = _largest_group(n, outcomes)
    if len(group) < 2:
        return [None] * n
    number = {candidate: place for place, candidate in enumerate(group)}
    kept = [(number[i], number[j], p) for (i, j), p in outcomes.items() if p is not None and i in number]
    sides = np.zeros((len(kept), len(group)))
    rows = np.arange(len(kept))
    sides[rows, [row[0] for row in kept]], sides[rows, [row[1] for row in kept]] = 1.0, -1.0
    s = _most_likely(sides, np.array([row[2] for row in kept]), precision)
    # The sum of 0.0 makes −0.0 plain zero.
    return [round(float(s[number[i]]), DIGITS) + 0.0 if i in number else None for i in range(n)]


def _most_likely(sides: NDArray[np.float64], p: NDArray[np.float64], precision: float) -> NDArray[np.float64]:
    """The strengths, shape (candidates,), of `sides` (comparisons, candidates): 1 for the first, −1 for the second."""

    def objective(s: NDArray[np.float64]) -> float:
        d = sides @ s  # p·log σ(d) + (1 − p)·log σ(−d) = p·d − log(1 + e^d)
        return float(p @ d - np.logaddexp(0.0, d).sum() - 0.5 * precision * (s @ s))

    s = np.zeros(sides.shape[1])
    now = objective(s)
    for _ in range(NEWTON_STEPS):
        sigma = 0.5 * (1.0 + np.tanh(0.5 * (sides @ s)))  # as 1/(1 + e^−d), without overflow
        gradient = sides.T @ (p - sigma) - precision * s
        hessian = (sides.T * (sigma * (1.0 - sigma))) @ sides + precision * np.eye(len(s))
        step = np.linalg.solve(hessian, gradient)
        if float(np.abs(step).max()) < CONVERGED:
            return np.asarray(s + step - (s + step).mean())  # the sum is zero but for rounding
        # The logistic function flattens: a whole step from far out may overshoot.
        while (after := objective(s + step)) < now and float(np.abs(step).max()) >= CONVERGED:
            step = 0.5 * step
        s, now = s + step, after
    return np.asarray(s - s.mean())  # the sum is zero but for rounding


def tree_strengths(n: int, outcomes: Outcomes, spec: ComparingSpec) -> list[float | None]:
    """Strengths of a knock-out: each loser stands below its winner by what the two alone would differ.

    The comparisons are a tree, so each difference can be had exactly: the winner comes first and a tie stays one,
    which a fit of all strengths at once does not grant (its prior pulls a winner of narrow comparisons below one
    that lost to it and beat others clearly). Centred; None as in `bradley_terry`.
    """
    group = _largest_group(n, outcomes)
    if len(group) < 2:
        return [None] * n
    below: dict[int, list[tuple[int, float]]] = {i: [] for i in group}
    for (i, j), p in outcomes.items():
        if p is not None and i in below:
            difference = _apart(p, spec)
            below[i].append((j, difference))
            below[j].append((i, -difference))
    found = {group[0]: 0.0}
    reached = [group[0]]
    for i in reached:
        for j, difference in below[i]:
            if j not in found:
                found[j] = found[i] - difference
                reached.append(j)
    mean = math.fsum(found.values()) / len(found)
    return [round(found[i] - mean, DIGITS) + 0.0 if i in found else None for i in range(n)]


def _apart(p: float, spec: ComparingSpec) -> float:
    """How far one candidate stands above another by their comparison alone."""
    if spec.rank_by == "mean_win":
        return 2.0 * p - 1.0
    first, second = bradley_terry(2, {(0, 1): p}, spec.precision)
    return (first or 0.0) - (second or 0.0)


def strengths(n: int, outcomes: Outcomes, spec: ComparingSpec) -> list[float | None]:
    """One score a candidate by `spec.rank_by`; None where there is nothing to place it by."""
    if spec.schedule == "knock_out":
        return tree_strengths(n, outcomes, spec)
    if spec.rank_by == "mean_win":
        return mean_wins(n, outcomes)
    return bradley_terry(n, outcomes, spec.precision)


def _largest_group(n: int, outcomes: Outcomes) -> Sequence[int]:
    """The largest set of candidates that comparisons join; of equal ones that with the lowest number."""
    root = list(range(n))

    def find(i: int) -> int:
        while root[i] != i:
            i = root[i]
        return i

    for (i, j), p in outcomes.items():
        if p is not None:
            root[max(find(i), find(j))] = min(find(i), find(j))
    groups: dict[int, list[int]] = {}
    for i in range(n):
        groups.setdefault(find(i), []).append(i)
    return max(groups.values(), key=lambda group: (len(group), -group[0]))
