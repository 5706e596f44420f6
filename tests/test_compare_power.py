"""What is promised of more prompts or seeds: against simulation, and where no number would do."""

from __future__ import annotations

import math

import numpy as np
import pytest

from online_dpo.compare.crossed import Components, Crossed, crossed
from online_dpo.compare.power import more_prompts, more_seeds, power


def found_share(difference: float, parts: Components, prompts: int, seeds: int, alpha: float, times: int) -> float:
    """How often simulated experiments find `difference`."""
    random, found = np.random.default_rng([prompts, seeds]), 0
    for _ in range(times):
        x = difference + math.sqrt(parts.prompts) * random.normal(size=(prompts, 1))
        x = x + math.sqrt(parts.seeds) * random.normal(size=(1, seeds))
        found += crossed(x + math.sqrt(parts.cells) * random.normal(size=(prompts, seeds))).p_value() <= alpha
    return found / times


CASES = [
    (0.3, Components(1.0, 0.0, 0.0), 40, 1, 0.05),
    (0.3, Components(0.3, 0.004, 1.0), 50, 3, 0.05),
    (0.4, Components(0.0, 0.02, 1.0), 60, 4, 0.0125),
    (0.3, Components(0.5, 0.01, 0.5), 30, 8, 0.05),
]


@pytest.mark.parametrize(("difference", "parts", "prompts", "seeds", "alpha"), CASES)
def test_power_is_what_simulation_finds(
    difference: float, parts: Components, prompts: int, seeds: int, alpha: float
) -> None:
    """300 experiments: a standard error of at most 0.03; three of them."""
    promised = power(difference, parts, prompts, seeds, alpha)
    assert 0.05 < promised < 0.99
    assert found_share(difference, parts, prompts, seeds, alpha, 300) == pytest.approx(promised, abs=0.09)


@pytest.mark.parametrize(("seeds", "difference"), [(3, 1.0), (5, 0.6), (12, 0.3)])
def test_power_where_seeds_alone_matter_is_that_of_students_t(seeds: int, difference: float) -> None:
    """Every prompt says the same of a seed: the seeds' means are the sample."""
    from scipy import stats

    bound, shift = stats.t.ppf(0.975, seeds - 1), difference * math.sqrt(seeds / 0.2)
    exact = stats.nct.sf(bound, seeds - 1, shift) + stats.nct.cdf(-bound, seeds - 1, shift)
    assert power(difference, Components(0.0, 0.2, 0.0), 50, seeds, 0.05) == pytest.approx(exact, abs=0.01)


def spread(mean: float, prompts: int, seeds: int, parts: Components) -> Crossed:
    """Mean squares at their expectations."""
    return Crossed(
        mean,
        prompts,
        seeds,
        parts.cells + seeds * parts.prompts,
        parts.cells + prompts * parts.seeds if seeds > 1 else 0.0,
        parts.cells if seeds > 1 else 0.0,
    )


def test_as_many_more_prompts_as_promised_are_enough_and_needed() -> None:
    parts = Components(0.4, 0.0005, 0.8)
    more = more_prompts(spread(0.15, 40, 3, parts), 0.05)
    assert more is not None and more > 0
    assert power(0.15, parts, 40 + more, 3, 0.05) >= 0.8
    assert power(0.15, parts, 40 + more - 1, 3, 0.05) < 0.8


def test_one_seed_by_the_textbook() -> None:
    """δ/σ = 0.5, two-sided 5 %, power 80 %: 34 pairs (Cohen 1988, table 2.4.1, halved for one sample)."""
    assert more_prompts(spread(0.5, 10, 1, Components(1.0, 0.0, 0.0)), 0.05) == 24


def test_no_number_of_prompts_mends_seeds_that_differ() -> None:
    """Standard error of three seeds' mean alone: 0.3/√3 = 0.17, more than the difference."""
    found = spread(0.1, 50, 3, Components(0.01, 0.09, 1.0))
    assert more_prompts(found, 0.05) is None
    seeds = more_seeds(found, 0.05)
    assert seeds is not None and seeds > 50


def test_no_number_of_seeds_mends_too_few_prompts() -> None:
    found = spread(0.1, 20, 3, Components(1.0, 0.0001, 0.1))
    assert more_seeds(found, 0.05) is None
    assert more_prompts(found, 0.05) is not None


def test_one_seed_says_nothing_of_seeds_and_no_difference_is_never_found() -> None:
    assert more_seeds(spread(0.5, 10, 1, Components(1.0, 0.0, 0.0)), 0.05) is None
    assert more_prompts(spread(0.0, 10, 3, Components(1.0, 0.1, 1.0)), 0.05) is None
    assert power(0.0, Components(0.0, 0.0, 0.0), 10, 3, 0.05) == 0.0


@pytest.mark.slow
def test_an_injected_difference_is_found_with_the_promised_power() -> None:
    """At the numbers promised, 100 experiments of each find it 80 times; a binomial's three standard errors are 12."""
    for parts in (Components(0.4, 0.001, 0.8), Components(0.1, 0.01, 1.0), Components(0.0, 0.002, 0.5)):
        found = spread(0.2, 40, 3, parts)
        prompts, seeds = more_prompts(found, 0.05), more_seeds(found, 0.05)
        if prompts is not None:
            assert 0.68 <= found_share(0.2, parts, 40 + prompts, 3, 0.05, 400) <= 0.92
        if seeds is not None:
            assert found_share(0.2, parts, 40, 3 + seeds, 0.05, 400) >= 0.68
        assert prompts is not None or seeds is not None
