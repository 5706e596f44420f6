"""Intervals over prompts against numbers derived by hand, and against SciPy and scikit-learn on the doubled data."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from online_dpo.audit import intervals
from online_dpo.measure import mean_interval, win_rate


def test_rate_is_wilsons_where_every_prompt_has_one_row() -> None:
    values = [1.0] * 6 + [0.0] * 4
    assert intervals.rate(values, range(10)) == win_rate(values, [0.5] * 10)


def test_rate_of_repeated_rows_is_that_of_the_prompts() -> None:
    """Ten prompts, each row ten times: the variance is ten times that of 100 independent rows, but for the small-
    sample factors 10/9 and 99/100: d = 10·(10/9)·(99/100) = 11, so Wilson's n is 100/11 = 9.09."""
    values = np.repeat([1.0] * 6 + [0.0] * 4, 10)
    found = intervals.rate(values, np.repeat(np.arange(10), 10))
    n, p, z = 100 / 11, 0.6, 1.959963984540054
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    assert (found.mean, found.n) == pytest.approx((0.6, 100))
    assert (found.low, found.high) == pytest.approx((centre - half, centre + half))


def test_opposite_rows_of_a_prompt_never_narrow_the_interval() -> None:
    assert intervals.rate([0.0, 1.0] * 10, np.repeat(np.arange(10), 2)) == win_rate([0, 1] * 10, [0.5] * 20)


def test_rate_at_the_ends_has_a_width() -> None:
    found = intervals.rate([1.0] * 20, np.repeat(np.arange(10), 2))
    assert found.high == 1.0
    assert 0.8 < found.low < 0.9


def test_mean_draws_prompts_and_not_rows() -> None:
    """Two prompts, one with three rows of 0 and one with a row of 1: the resamples are (0, 0), (0, 1) twice and (1, 1),
    whose means over rows are 0, ¼ and 1; each end has probability ¼, so the bounds are 0 and 1."""
    found = intervals.mean([0, 0, 0, 1], [7, 7, 7, 3], seed=0)
    assert (found.mean, found.low, found.high, found.n) == (0.25, 0.0, 1.0, 4)


def test_mean_over_single_rows_is_about_the_ordinary_bootstrap() -> None:
    values = np.random.default_rng(0).normal(size=400)
    found, plain = intervals.mean(values, range(400), seed=1), mean_interval(values, seed=1)
    assert found.mean == pytest.approx(plain.mean)
    assert found.low == pytest.approx(plain.low, abs=0.01)
    assert found.high == pytest.approx(plain.high, abs=0.01)


def test_nothing_and_a_single_prompt() -> None:
    for found in (intervals.mean([], [], 0), intervals.rate([], []), intervals.kappa([], [], [], 0)):
        assert (found.n, math.isnan(found.mean)) == (0, True)
    assert intervals.spearman([], [], [], 0).n == intervals.pearson([], [], [], 0).n == 0
    one = intervals.mean([1.0, 2.0], [0, 0], 0)
    assert (one.mean, math.isnan(one.low), math.isnan(one.high)) == (1.5, True, True)


def test_values_and_prompts_of_different_number_are_refused() -> None:
    with pytest.raises(ValueError, match="one row each"):
        intervals.mean([1.0, 2.0], [0], 0)


def test_pearson_by_hand() -> None:
    """x = (1, 2), y = (2, 1): Σxy = 4, Σx² = Σy² = 5: 0.8. About their own means it would be −1."""
    assert intervals.pearson([1, 2], [2, 1], [0, 1], 0).mean == pytest.approx(0.8)


def test_correlation_of_what_does_not_vary_is_nan() -> None:
    assert math.isnan(intervals.pearson([0, 0, 0], [1, 2, 3], [0, 1, 2], 0).mean)
    assert math.isnan(intervals.spearman([0, 0, 0], [1, 2, 3], [0, 1, 2], 0).mean)


differences = st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=30)


@settings(max_examples=40, deadline=None)
@given(differences)
def test_correlations_are_scipys_on_both_orders(rows: list[tuple[int, int]]) -> None:
    from scipy import stats

    x, y = np.array(rows, dtype=float).T
    groups = np.arange(len(rows)) // 2
    if not (np.any(x) and np.any(y)):
        return
    both = np.concatenate([x, -x]), np.concatenate([y, -y])
    assert intervals.spearman(x, y, groups, 0).mean == pytest.approx(stats.spearmanr(*both).statistic)
    assert intervals.pearson(x, y, groups, 0).mean == pytest.approx(stats.pearsonr(*both).statistic)


def test_bounds_of_spearman_are_quantiles_of_scipys_over_the_same_resamples() -> None:
    from scipy import stats

    random = np.random.default_rng(3)
    x, y = random.integers(-4, 5, size=(2, 30)).astype(float)
    groups = np.arange(30) // 3
    found = intervals.spearman(x, y, groups, seed=5)
    drawn = np.concatenate(list(intervals.resamples(10, 60, 5)))
    values = []
    for counts in drawn:
        rows = np.repeat(np.arange(30), counts[groups].astype(int))
        a, b = np.concatenate([x[rows], -x[rows]]), np.concatenate([y[rows], -y[rows]])
        values.append(stats.spearmanr(a, b).statistic)
    assert [found.low, found.high] == pytest.approx(np.quantile(values, [0.025, 0.975]))


def test_resamples_draw_as_many_prompts_as_there_are_and_come_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.concatenate(list(intervals.resamples(7, 7, 0)))
    assert whole.shape == (2000, 7)
    assert set(whole.sum(axis=1)) == {7.0}
    monkeypatch.setattr(intervals, "CHUNK", 70)
    chunks = list(intervals.resamples(7, 7, 0))
    assert len(chunks) == 200
    assert np.array_equal(np.concatenate(chunks), whole)


def test_kappa_by_hand() -> None:
    """Four pairs, verdicts (0, 0), (0, 2), (2, 2), (1, 1): agreement 3/4. In both orders "first" and "second" are
    said of 3/8 each and "tie" of 1/4 by either judge: chance 2·(3/8)² + (1/4)² = 11/32; κ = (24 − 11)/(32 − 11)."""
    found = intervals.kappa([0, 0, 2, 1], [0, 2, 2, 1], [0, 1, 2, 3], 0)
    assert found.mean == pytest.approx(13 / 21)
    assert found.low <= found.mean <= found.high == 1.0


def test_kappa_of_equal_opposite_and_tied_judges() -> None:
    assert intervals.kappa([0, 2, 0], [0, 2, 0], [0, 1, 2], 0).mean == pytest.approx(1.0)
    assert intervals.kappa([0, 2, 0], [2, 0, 2], [0, 1, 2], 0).mean == pytest.approx(-1.0)
    assert math.isnan(intervals.kappa([1, 1], [1, 1], [0, 1], 0).mean)


verdicts = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=30)


@settings(max_examples=40, deadline=None)
@given(verdicts)
def test_kappa_is_scikit_learns_on_both_orders(rows: list[tuple[int, int]]) -> None:
    from sklearn.metrics import cohen_kappa_score

    one, other = np.array(rows).T
    if (one == 1).all() and (other == 1).all():
        return
    expected = cohen_kappa_score([*one, *(2 - one)], [*other, *(2 - other)], labels=[0, 1, 2])
    assert intervals.kappa(one, other, range(len(rows)), 0).mean == pytest.approx(expected)


def test_intervals_cover_as_often_as_they_say_where_rows_share_a_prompt() -> None:
    """150 samples of 60 prompts with 3 rows each, all rows of a prompt alike with probability 0.8: of 95 % intervals
    at least 88 % must hold the truth (4 standard errors of 0.018 below); taking rows for independent gives about
    75 %, which the last line shows."""
    random = np.random.default_rng(11)
    groups = np.repeat(np.arange(60), 3)
    held = {"rate": 0, "mean": 0, "rows": 0}
    for sample in range(150):
        shared = np.repeat(random.random(60) < 0.6, 3)
        own = random.random(180) < 0.6
        values = np.where(random.random(180) < 0.9, shared, own).astype(float)
        for name, found in (
            ("rate", intervals.rate(values, groups)),
            ("mean", intervals.mean(values, groups, sample)),
            ("rows", win_rate(values, np.full(180, 0.5))),
        ):
            held[name] += found.low <= 0.6 <= found.high
    assert held["rate"] >= 132
    assert held["mean"] >= 132
    assert held["rows"] < 132
