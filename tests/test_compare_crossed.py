"""Intervals over prompts and seeds at once: by hand, against Student's t, and how often they hold the truth."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from online_dpo.compare.crossed import LEAST_P, crossed, half_width, t_quantile
from online_dpo.compare.outcomes import Values


def test_mean_squares_by_hand() -> None:
    """[[1, 2], [3, 6]]: mean 3; rows 1.5 and 4.5, so MS_p = 2·(1.5² + 1.5²) = 9; columns 2 and 4, MS_s = 2·(1 + 1) = 4;
    what is left is ±½ four times, MS_ps = 1. σ²_p = (9 − 1)/2, σ²_s = (4 − 1)/2."""
    found = crossed(np.array([[1.0, 2.0], [3.0, 6.0]]))
    assert (found.mean, found.ms_prompts, found.ms_seeds, found.ms_cells) == pytest.approx((3, 9, 4, 1))
    parts = found.components
    assert (parts.prompts, parts.seeds, parts.cells) == pytest.approx((4, 1.5, 1))


def test_half_width_by_hand() -> None:
    """Same cells: t with one degree of freedom on both sides, t = tan(0.475π); 4 + (9 − 1) = 9 + 4 − 1 = 12, over 4."""
    found = crossed(np.array([[1.0, 2.0], [3.0, 6.0]]))
    assert found.half_width() == pytest.approx(math.tan(0.475 * math.pi) * math.sqrt(3))
    assert found.interval().low == pytest.approx(3 - found.half_width())


def test_each_side_has_its_own_t() -> None:
    """P = 5, S = 3, mean squares 8 (prompts), 3 (seeds), 2 (cells): A = 3·t²₂ + 6·t²₄ is the larger of the two; where
    seeds have a mean square of 0, B = 8·t²₄ is. With P and S exchanged, their mean squares too, all is as before."""
    two, four = t_quantile(2, 0.05), t_quantile(4, 0.05)
    assert half_width(8.0, 3.0, 2.0, 5, 3, 0.05) == pytest.approx(math.sqrt((3 * two**2 + 6 * four**2) / 15))
    assert half_width(8.0, 0.0, 2.0, 5, 3, 0.05) == pytest.approx(math.sqrt(8 * four**2 / 15))
    assert half_width(3.0, 8.0, 2.0, 3, 5, 0.05) == pytest.approx(half_width(8.0, 3.0, 2.0, 5, 3, 0.05))


def test_one_seed_is_students_t() -> None:
    from scipy import stats

    values = np.random.default_rng(0).normal(0.3, 1, size=25)
    found, known = crossed(values[:, None]), stats.ttest_1samp(values, 0)
    low, high = known.confidence_interval()
    assert (found.interval().low, found.interval().high) == pytest.approx((low, high))
    assert found.p_value() == pytest.approx(known.pvalue, rel=1e-6)


def test_seeds_are_the_sample_where_prompts_do_not_matter() -> None:
    """Every prompt says the same of a seed: the interval is Student's t of the seeds' means."""
    from scipy import stats

    means = np.array([0.1, 0.5, 0.3, 0.2])
    found = crossed(np.tile(means, (20, 1)))
    assert found.p_value() == pytest.approx(stats.ttest_1samp(means, 0).pvalue, rel=1e-6)


def test_cells_without_spread() -> None:
    """No difference at all decides nothing; the same one everywhere is held against the sign test."""
    none, same = crossed(np.zeros((10, 3))), crossed(np.full((10, 3), 0.1))
    assert (none.interval().low, none.interval().high, none.p_value()) == (0, 0, 1.0)
    assert (same.interval().low, same.interval().high) == (0.1, 0.1)
    assert same.p_value() == 2.0**-9


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (1, 1), (1, 3)])
def test_fewer_than_two_prompts_have_no_interval(shape: tuple[int, int]) -> None:
    found = crossed(np.ones(shape))
    assert math.isnan(found.interval().low)
    assert found.p_value() == 1.0


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 12), st.integers(1, 6), st.integers(0, 10_000), st.floats(-2, 2), st.floats(0, 2))
def test_an_interval_leaves_out_zero_exactly_where_p_is_small(
    prompts: int, seeds: int, seed: int, shift: float, of_seeds: float
) -> None:
    random = np.random.default_rng(seed)
    found = crossed(shift + of_seeds * random.normal(size=(1, seeds)) + random.normal(size=(prompts, seeds)))
    assert LEAST_P <= found.p_value() <= 1
    for alpha in (0.2, 0.05, 0.001):
        outside = abs(found.mean) > found.half_width(alpha)
        if abs(found.p_value() / alpha - 1) > 1e-6:
            assert outside == (found.p_value() < alpha)


def test_many_of_both_agree_with_the_pigeonhole_bootstrap() -> None:
    """Owen's bootstrap draws prompts and seeds; with 40 of each and little in single cells the two must agree."""
    random = np.random.default_rng(1)
    cells = random.normal(size=(40, 1)) + random.normal(size=(1, 40)) + 0.3 * random.normal(size=(40, 40))
    rows, columns = (random.multinomial(40, [1 / 40] * 40, size=4000) / 40 for _ in range(2))
    drawn = np.einsum("bp,ps,bs->b", rows, cells, columns)
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert 2 * crossed(cells).half_width() == pytest.approx(high - low, rel=0.12)


def coverage(
    prompts: int, seeds: int, of_prompts: float, relative: float, heavy: bool, times: int
) -> tuple[float, float]:
    """How often the interval, and one by Satterthwaite's degrees of freedom, hold a true mean of 0.

    Cells have a standard deviation of 1, prompts `of_prompts`; seeds that which makes their part of the mean's variance
    `relative` times that of all the rest.
    """
    random = np.random.default_rng([prompts, seeds, int(10 * of_prompts), int(10 * relative), heavy])

    def draw(*shape: int) -> Values:
        return random.standard_t(3, shape) / math.sqrt(3) if heavy else random.normal(size=shape)

    of_seeds = math.sqrt(relative * (of_prompts**2 * seeds + 1) / prompts)
    x = of_prompts * draw(times, prompts, 1) + of_seeds * random.normal(size=(times, 1, seeds))
    x = x + draw(times, prompts, seeds)
    mean, rows, columns = x.mean(axis=(1, 2)), x.mean(axis=2), x.mean(axis=1)
    ms_p = seeds * np.square(rows - mean[:, None]).sum(axis=1) / (prompts - 1)
    ms_s = prompts * np.square(columns - mean[:, None]).sum(axis=1) / (seeds - 1)
    left = x - rows[:, :, None] - columns[:, None, :] + mean[:, None, None]
    ms_ps = np.square(left).sum(axis=(1, 2)) / ((prompts - 1) * (seeds - 1))
    ours = half_width(ms_p, ms_s, ms_ps, prompts, seeds, 0.05)
    return float(np.mean(np.abs(mean) <= ours)), _satterthwaite(mean, ms_p, ms_s, ms_ps, prompts, seeds)


def _satterthwaite(mean: Values, ms_p: Values, ms_s: Values, ms_ps: Values, prompts: int, seeds: int) -> float:
    """Coverage of the usual way: one t with the degrees of freedom of the truncated sum."""
    from scipy.special import stdtrit

    of_prompts, of_seeds = np.maximum(ms_p, ms_ps), np.maximum(ms_s - ms_ps, 0)
    total = of_prompts + of_seeds
    freedom = total**2 / (of_prompts**2 / (prompts - 1) + of_seeds**2 / (seeds - 1))
    return float(np.mean(np.abs(mean) <= -stdtrit(freedom, 0.025) * np.sqrt(total / (prompts * seeds))))


def test_coverage_holds_where_satterthwaites_does_not() -> None:
    """60 prompts, 3 seeds, no effect of prompts, seeds five times as much as the rest."""
    ours, usual = coverage(60, 3, 0.0, 5.0, False, 2000)
    assert ours > 0.935
    assert usual < 0.90


@pytest.mark.slow
@pytest.mark.parametrize(("prompts", "seeds"), list(product((16, 60, 256), (2, 3, 5))))
def test_coverage_is_at_least_about_95_per_cent_throughout(prompts: int, seeds: int) -> None:
    """Nothing, a little or nearly all of the variance from seeds; from prompts; heavy tails. 2000 experiments each: the
    standard error of a coverage of 0.95 is 0.005."""
    settings_of = product((0.0, 1.0, 5.0), (0.0, 0.5, 1.0, 2.0, 5.0, 20.0), (False, True))
    found = [coverage(prompts, seeds, *setting, 2000) for setting in settings_of]
    ours, usual = min(one for one, _ in found), min(other for _, other in found)
    print(f"{prompts} prompts × {seeds} seeds: at worst {ours:.3f}, by Satterthwaite's degrees of freedom {usual:.3f}")
    assert ours > 0.935
