"""Holm's correction."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from online_dpo.compare.holm import holm


def test_by_hand() -> None:
    """Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1: 0.04, 0.06, 0.06 and 0.04, which may not fall below 0.06."""
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([0.03]) == [0.03]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_never_below_the_raw_one_and_in_its_order(p_values: list[float]) -> None:
    corrected = holm(p_values)
    assert all(p <= q <= 1 for p, q in zip(p_values, corrected, strict=True))
    smallest = min(range(len(p_values)), key=lambda place: p_values[place])
    assert corrected[smallest] == pytest.approx(min(1.0, len(p_values) * p_values[smallest]))
    assert sorted(corrected) == [corrected[i] for i in sorted(range(len(p_values)), key=lambda i: p_values[i])]


def test_one_wrong_verdict_among_all_differences_is_rare() -> None:
    """Four equal arms, six differences that share arms and so depend on each other: z scores of 4000 experiments.
    Without correction one experiment in five has a wrong verdict."""
    from scipy.special import ndtr

    means = np.random.default_rng(0).normal(size=(4000, 4))
    pairs = [(i, j) for i in range(4) for j in range(i)]
    p_values = np.stack([2 * ndtr(-np.abs(means[:, i] - means[:, j]) / np.sqrt(2)) for i, j in pairs], axis=1)
    corrected = np.array([holm(list(row)) for row in p_values])
    assert np.mean(p_values.min(axis=1) <= 0.05) > 0.15
    assert np.mean(corrected.min(axis=1) <= 0.05) < 0.055
