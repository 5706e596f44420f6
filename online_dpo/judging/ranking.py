"""From comparisons of n candidates to a ranking: which to compare, and the strengths that the outcomes give.

Candidates are numbered 0…n−1; a comparison (i, j) has i < j and an outcome p in [0, 1], the probability that i is
better.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from online_dpo.config import ComparingSpec

Place = tuple[int, int]
"""Which two candidates are compared, the lower number first."""
Outcomes = Mapping[Place, float | None]
"""What came of the comparisons so far: the probability that the first is better, None where the judge abstained."""

NEWTON_STEPS = 50
CONVERGED = 1e-10


def next_comparisons(n: int, spec: ComparingSpec, done: Outcomes) -> list[Place]:
    """What to compare next, given what came of it so far; empty when the schedule is through.

    all_pairs: everything at once. swiss: wave by wave, each candidate against one of about equal record that it has
    not met (n even: n/2 comparisons a wave; n odd: the lowest sits out). knock_out: winners meet, n − 1 comparisons;
    only the first place is well founded.
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
    if len(done) >= schedule_size(n, ComparingSpec(schedule="swiss", waves=waves)) or max(met) >= waves:
        return []
    # Who sat out goes first, so that nobody sits out twice while another has not.
    order = sorted(range(n), key=lambda i: (met[i], -record[i], i)) if n % 2 else []
    playing = sorted(order[: n - 1] if order else range(n), key=lambda i: (-record[i], i))
    return _matched(playing, set(done))


def _matched(playing: list[int], done: set[Place]) -> list[Place]:
    """Each of `playing` with the nearest below that it has not met; with one met before only where none is left."""
    wave: list[Place] = []
    left = list(playing)
    while len(left) > 1:
        first = left.pop(0)
        partner = next((other for other in left if _place(first, other) not in done), None)
        if partner is None:
            continue
        left.remove(partner)
        wave.append(_place(first, partner))
    return wave


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
    return [math.fsum(values) / len(values) if values else None for values in won]


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
    i, j = np.array([row[0] for row in kept]), np.array([row[1] for row in kept])
    p = np.array([row[2] for row in kept])
    sides = np.zeros((len(kept), len(group)))
    rows = np.arange(len(kept))
    sides[rows, i], sides[rows, j] = 1.0, -1.0
    s = np.zeros(len(group))
    for _ in range(NEWTON_STEPS):
        sigma = 1.0 / (1.0 + np.exp(-(sides @ s)))
        gradient = sides.T @ (p - sigma) - precision * s
        hessian = (sides * (sigma * (1.0 - sigma))[:, None]).T @ sides + precision * np.eye(len(group))
        step = np.linalg.solve(hessian, gradient)
        # The logistic function flattens: an undamped step from far out would overshoot.
        s = s + step * min(1.0, 2.0 / max(float(np.abs(step).max()), 1e-300))
        if float(np.abs(step).max()) < CONVERGED:
            break
    s = s - s.mean()
    return [float(s[number[candidate]]) if candidate in number else None for candidate in range(n)]


def strengths(n: int, outcomes: Outcomes, spec: ComparingSpec) -> list[float | None]:
    """One score a candidate by `spec.rank_by`; None where there is nothing to place it by."""
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
