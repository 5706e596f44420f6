"""The league: strengths that are known, and intervals against a bootstrap."""

from __future__ import annotations

import math

import numpy as np
import pytest
from comparing_parts import outcome

from online_dpo.compare.grid import INITIAL, Grid, make_grid
from online_dpo.compare.league import ELO, league
from online_dpo.compare.outcomes import Outcomes, Values

STRENGTHS = {"a": (0.0, 0.5, 1.0), "b": (0.0, -0.4, 0.3)}
"""In log-odds, by round."""


def scores(random: np.random.Generator, strength: float, prompts: int) -> Values:
    """Gumbel noise: then P(one scores higher than the other) = σ(difference of strengths), which is Bradley–Terry."""
    return strength + random.gumbel(size=prompts)


def field(random: np.random.Generator, prompts: int = 300, seeds: int = 2) -> Grid:
    found: list[Outcomes] = []
    for seed in range(seeds):
        start = scores(random, 0.0, prompts)
        for arm, strengths in STRENGTHS.items():
            found.append(outcome(arm, seed, 0, start))
            found += [outcome(arm, seed, at, scores(random, s, prompts)) for at, s in enumerate(strengths) if at]
    return make_grid(found)


def test_strengths_are_recovered() -> None:
    rated = {(one.arm, one.round): one.strength for one in league(field(np.random.default_rng(0), 2000))}
    assert rated[INITIAL, 0].mean == 0.0
    assert len(rated) == 5
    for arm, strengths in STRENGTHS.items():
        for index in (1, 2):
            found = rated[arm, index]
            assert found.mean == pytest.approx(ELO * strengths[index], abs=25)
            assert found.low <= found.mean <= found.high


def test_the_strongest_comes_first() -> None:
    means = [one.strength.mean for one in league(field(np.random.default_rng(0)))]
    assert means == sorted(means, reverse=True)


def test_intervals_are_about_those_of_a_bootstrap_over_prompts() -> None:
    """One seed: prompts alone are drawn, 100 times."""
    grid = field(np.random.default_rng(1), 120, 1)
    whole = {(one.arm, one.round): one.strength for one in league(grid)}
    random, drawn = np.random.default_rng(2), []
    for _ in range(100):
        places = random.integers(0, 120, size=120)
        again = [
            outcome(arm, 0, index, one.reward[places])
            for arm, (rounds,) in grid.arms.items()
            for index, one in rounds.items()
        ]
        drawn.append({(one.arm, one.round): one.strength.mean for one in league(make_grid(again))})
    for key, found in whole.items():
        if key[0] != INITIAL:
            low, high = np.quantile([one[key] for one in drawn], [0.025, 0.975])
            assert found.high - found.low == pytest.approx(high - low, rel=0.3)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """40 experiments of 4 strengths at 3 seeds."""
    inside = []
    for number in range(40):
        for one in league(field(np.random.default_rng([3, number]), 60, 3)):
            if one.arm != INITIAL:
                inside.append(one.strength.low <= ELO * STRENGTHS[one.arm][one.round] <= one.strength.high)
    assert np.mean(inside) >= 0.93


def test_one_who_won_everything_is_finite_and_unsure() -> None:
    random = np.random.default_rng(0)
    start = random.normal(size=30)
    grid = make_grid([outcome("a", 0, 0, start), outcome("a", 0, 1, (start + 100).tolist())])
    best = league(grid)[0]
    assert (best.arm, best.round) == ("a", 1)
    assert 500 < best.strength.mean < 5000
    assert best.strength.high - best.strength.low > 500


def test_all_ties_are_equal_strength_and_abstentions_count_for_nothing() -> None:
    start = [float(level) for level in range(20)]
    later = [math.nan if level < 5 else level for level in range(20)]
    grid = make_grid([outcome("a", 0, 0, start), outcome("a", 0, 1, later)])
    rated = {one.arm: one.strength for one in league(grid)}
    assert rated["a"].mean == pytest.approx(0.0, abs=1e-6)
    assert rated["a"].low < 0 < rated["a"].high
