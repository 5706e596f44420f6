"""The length-controlled win rate where the right answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import expit

from online_dpo.compare.crossed import crossed
from online_dpo.compare.estimates import share
from online_dpo.compare.length_control import _Model, _squashed, length_controlled
from online_dpo.compare.outcomes import Values


def lengths(random: np.random.Generator, prompts: int, seeds: int, more: float) -> Values:
    """Tokens of the one less those of the other; the one's answers are `more` longer in the mean."""
    return np.round(random.normal(more, 10, size=(prompts, seeds)))


@pytest.mark.parametrize(("seeds", "more"), [(1, 0.0), (1, 6.0), (3, 6.0), (3, -8.0)])
def test_a_judge_that_only_sees_length_gives_a_half(seeds: int, more: float) -> None:
    longer = lengths(np.random.default_rng(seeds), 150, seeds, more)
    wins = np.heaviside(longer, 0.5)
    found = length_controlled(wins, longer)
    assert found.interval.low <= 0.5 <= found.interval.high
    assert found.p > 0.05
    if abs(more) > 5:
        assert not share(wins).interval.low <= 0.5 <= share(wins).interval.high


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_judge_that_does_not_see_length_gives_the_win_rate(seeds: int) -> None:
    random = np.random.default_rng(9)
    longer = lengths(random, 300, seeds, 0.0)
    wins = (random.uniform(size=longer.shape) < 0.65).astype(float)
    found, plain = length_controlled(wins, longer), share(wins)
    assert found.interval.mean == pytest.approx(plain.interval.mean, abs=0.005)
    width = plain.interval.high - plain.interval.low
    assert found.interval.high - found.interval.low == pytest.approx(width, rel=0.1)
    assert math.log(found.p) == pytest.approx(math.log(plain.p), rel=0.05)


def test_a_judge_that_sees_both_gives_what_is_left_without_length() -> None:
    """P(win) = σ(0.6 + 1.5·h) and answers that are longer: the plain win rate is too high, the controlled one σ(0.6).
    100 experiments: the interval holds it in about 95 %."""
    random, inside, plain = np.random.default_rng(3), 0, []
    for _ in range(100):
        longer = lengths(random, 120, 1, 8.0)
        wins = (random.uniform(size=longer.shape) < expit(0.6 + 1.5 * _squashed(longer))).astype(float)
        found = length_controlled(wins, longer).interval
        inside += found.low <= expit(0.6) <= found.high
        plain.append(wins.mean())
    assert inside >= 0.91 * 100
    assert np.mean(plain) > expit(0.6) + 0.08


def test_equal_lengths_change_nothing() -> None:
    wins = np.array([1.0] * 30 + [0.0] * 10)[:, None]
    found, plain = length_controlled(wins, np.zeros((40, 1))), share(wins)
    assert found.interval.mean == pytest.approx(0.75, abs=1e-3)
    assert found.interval.low == pytest.approx(plain.interval.low, abs=0.02)
    assert found.interval.high == pytest.approx(plain.interval.high, abs=0.02)


def test_nothing_is_known_of_equal_lengths_where_one_is_always_the_longer() -> None:
    found = length_controlled(np.ones((50, 1)), np.full((50, 1), 20.0))
    assert found.interval.low < 0.05
    assert found.interval.high > 0.95
    assert found.p > 0.3


def test_coefficients_are_scikit_learns() -> None:
    from sklearn.linear_model import LogisticRegression

    random = np.random.default_rng(2)
    h = np.tanh(random.normal(0.3, 1, size=200))
    wins = (random.uniform(size=200) < expit(0.4 + h)).astype(float)
    model = _Model(wins, h)
    # The same prior on the intercept: a column of ones.
    known = LogisticRegression(C=100.0, fit_intercept=False, tol=1e-10, max_iter=1000)
    known.fit(np.stack([np.ones(200), h], axis=1), wins)
    assert [model.best(), model.slope(model.best())] == pytest.approx(known.coef_[0].tolist(), abs=1e-4)


def test_influences_are_those_of_leaving_a_prompt_out() -> None:
    """The jackknife: n·(â − â without a cell) is the cell's influence, to first order."""
    random = np.random.default_rng(4)
    h = np.tanh(random.normal(0.3, 1, size=120))
    wins = random.choice([0.0, 0.5, 1.0], size=120, p=[0.3, 0.1, 0.6])
    top = _Model(wins, h).best()
    influence, error = _Model(wins, h).linearised(top)
    left_out = [120 * (top - _Model(np.delete(wins, i), np.delete(h, i)).best()) for i in range(0, 120, 10)]
    assert influence[::10].tolist() == pytest.approx(left_out, abs=0.15, rel=0.1)
    assert crossed(influence[:, None]).half_width() / 1.98 == pytest.approx(error, rel=0.15)


def test_seeds_that_differ_widen_the_interval() -> None:
    random = np.random.default_rng(6)
    longer = lengths(random, 80, 3, 0.0)
    luck = np.array([1.2, 0.0, -1.2])[None, :]
    wins = (random.uniform(size=longer.shape) < expit(luck)).astype(float)
    found = length_controlled(wins, longer)
    assert found.interval.high - found.interval.low > 0.5
    assert found.interval.low <= 0.5 <= found.interval.high


def test_too_few_prompts() -> None:
    assert math.isnan(length_controlled(np.zeros((0, 2)), np.zeros((0, 2))).interval.mean)
    assert length_controlled(np.ones((1, 1)), np.ones((1, 1))).p == pytest.approx(share(np.ones((1, 1))).p)
