"""Differences and shares with their intervals and p-values."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from online_dpo.compare.estimates import mean_difference, share, wins_of
from online_dpo.measure import win_rate


def test_wins_by_hand() -> None:
    found = wins_of(np.array([2.0, 1.0, 1.0, np.nan]), np.array([1.0, 1.0, 2.0, 0.0]))
    assert found[:3].tolist() == [1.0, 0.5, 0.0]
    assert math.isnan(found[3])


def test_one_seeds_share_is_the_win_rate_of_a_round() -> None:
    a, b = np.random.default_rng(0).integers(0, 4, size=(2, 50)).astype(float)
    found, known = share(wins_of(a, b)[:, None]).interval, win_rate(a, b)
    assert (found.mean, found.low, found.high, found.n) == (known.mean, known.low, known.high, 50)


def test_seeds_that_differ_widen_a_share() -> None:
    """Half of all cells won: in a chessboard of prompts and seeds every seed wins half; in the other, one seed wins
    nearly all and another nearly none."""
    even = np.indices((40, 4)).sum(axis=0) % 2 * 1.0
    uneven = np.zeros((40, 4))
    uneven[:, :2] = 1.0
    even_one, uneven_one = share(even).interval, share(uneven).interval
    assert even_one.mean == uneven_one.mean == 0.5
    assert even_one.high - even_one.low < 0.2
    assert uneven_one.high - uneven_one.low > 0.8


def test_a_share_never_beats_independent_cells() -> None:
    """Ties everywhere: no spread at all, and still Wilson's width over the prompts."""
    found = share(np.full((30, 3), 0.5))
    known = win_rate([1.0] * 30, [1.0] * 30)
    assert (found.interval.low, found.interval.high) == pytest.approx((known.low, known.high))
    assert found.p == 1.0


def test_winning_everything_is_no_certainty() -> None:
    found = share(np.ones((12, 3)))
    assert found.interval.high == 1.0
    assert 0.7 < found.interval.low < 0.8
    assert 0 < found.p < 0.01


def test_nothing_to_share() -> None:
    assert math.isnan(share(np.zeros((0, 3))).interval.mean)
    assert share(np.zeros((0, 3))).p == mean_difference(np.zeros((0, 3))).p == 1.0


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 30), st.integers(1, 5), st.integers(0, 10_000))
def test_a_share_leaves_out_a_half_where_p_is_small(prompts: int, seeds: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    found = share(random.choice([0.0, 0.5, 1.0], p=[0.2, 0.1, 0.7], size=(prompts, seeds)))
    assert 0 <= found.interval.low <= found.interval.mean <= found.interval.high <= 1
    outside = not found.interval.low <= 0.5 <= found.interval.high
    if abs(found.p / 0.05 - 1) > 1e-6:
        assert outside == (found.p < 0.05)


def test_a_share_holds_a_half_as_often_as_it_says() -> None:
    """Wins of one of two equal policies a seed, whose luck moves the chance of a win: 300 experiments."""
    random, inside = np.random.default_rng(5), 0
    for _ in range(300):
        chance = 1 / (1 + np.exp(-0.4 * random.normal(size=(1, 3)) - 0.8 * random.normal(size=(50, 1))))
        found = share((random.uniform(size=(50, 3)) < chance).astype(float)).interval
        inside += found.low <= 0.5 <= found.high
    assert inside >= 0.93 * 300
