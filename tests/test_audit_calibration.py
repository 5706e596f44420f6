"""Brier score, log loss, calibration error and temperature against numbers derived by hand and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest

from online_dpo.audit import calibration


def test_brier_log_loss_and_error_by_hand() -> None:
    """P of the chosen answer 0.9, 0.8, 0.3, 0.5.

    Brier: (0.01 + 0.04 + 0.49 + 0.25)/4 = 0.1975. Log loss: −ln(0.9·0.8·0.3·0.5)/4 = −ln(0.108)/4.
    Certainties 0.9, 0.8, 0.7, 0.5, each in a bin of its own; right 1, 1, 0, ½: |0.1| + |0.2| + |0.7| + 0 over 4 = ¼.
    """
    found = calibration.stated(np.array([0.9, 0.8, 0.3, 0.5]), range(4), 0)
    assert found is not None
    assert found.brier.mean == pytest.approx(0.1975)
    assert found.log_loss.mean == pytest.approx(-math.log(0.108) / 4)
    assert found.error == pytest.approx(0.25)
    assert [part.accuracy.mean for part in found.bins] == [0.5, 0.0, 1.0, 1.0]
    assert [part.certainty for part in found.bins] == pytest.approx([0.5, 0.7, 0.8, 0.9])
    assert [part.low for part in found.bins] == pytest.approx([0.5, 0.7, 0.8, 0.9])


def test_error_averages_within_a_bin_first() -> None:
    """Certainty 0.92 twice, once right and once wrong: |½ − 0.92| = 0.42, not the mean of 0.08 and 0.92."""
    found = calibration.stated(np.array([0.92, 0.08]), range(2), 0)
    assert found is not None
    assert found.error == pytest.approx(0.42)
    assert [part.accuracy.n for part in found.bins] == [2]


def test_scores_are_scikit_learns() -> None:
    from sklearn.metrics import brier_score_loss, log_loss

    chosen = np.random.default_rng(0).random(200)
    found = calibration.stated(chosen, range(200), 0)
    assert found is not None
    assert found.brier.mean == pytest.approx(brier_score_loss(np.ones(200), chosen, pos_label=1))
    assert found.log_loss.mean == pytest.approx(log_loss(np.ones(200), chosen, labels=[0, 1]))


def test_certainty_of_one_goes_into_the_last_bin_and_costs_a_finite_amount() -> None:
    found = calibration.stated(np.array([1.0, 0.0]), range(2), 0)
    assert found is not None
    assert [(part.low, part.high, part.accuracy.n) for part in found.bins] == [(0.95, 1.0, 2)]
    assert found.log_loss.mean == pytest.approx(-(math.log(1 - 1e-6) + math.log(1e-6)) / 2)


def test_nothing_to_calibrate() -> None:
    none = np.array([])
    assert calibration.stated(none, [], 0) is None
    assert calibration.as_log_odds(none, [], 0) is None
    assert calibration.with_temperature(none, [], 0) is None
    assert calibration.with_temperature(np.array([1.0, 2.0]), [0, 0], 0) is None


def test_temperature_by_hand() -> None:
    """Difference ±3, right in 3 of 4: the likelihood is greatest where σ(3/T) = ¾, so T = 3/ln 3."""
    difference = np.tile([3.0, 3.0, 3.0, -3.0], 100)
    found = calibration.with_temperature(difference, range(400), 0)
    assert found is not None
    assert found.temperature == pytest.approx(3 / math.log(3), rel=1e-3)
    assert found.brier.mean == pytest.approx(0.75 * 0.25, abs=1e-3)
    assert found.error < 0.02


def test_temperature_follows_the_unit_of_the_scores() -> None:
    difference = np.array(np.random.default_rng(1).normal(0.3, 1.0, size=500), dtype=np.float64)
    found, scaled = (
        calibration.with_temperature(unit, range(500), 0) for unit in (difference, np.multiply(difference, 1000.0))
    )
    assert found is not None
    assert scaled is not None
    assert found.temperature is not None
    assert scaled.temperature == pytest.approx(1000 * found.temperature, rel=1e-4)
    assert scaled.brier.mean == pytest.approx(found.brier.mean, rel=1e-4)


def test_temperature_does_not_turn_a_judge_around() -> None:
    """Right in 1 of 4: no T > 0 beats P = ½ for all, whose Brier score is ¼; the judge still counts as wrong."""
    found = calibration.with_temperature(np.tile([3.0, -3.0, -3.0, -3.0], 100), range(400), 0)
    assert found is not None
    assert found.temperature is None
    assert found.brier.mean == pytest.approx(0.25)
    assert found.error == pytest.approx(0.25)


def test_judge_that_is_always_right_or_always_ties() -> None:
    right = calibration.with_temperature(np.linspace(1, 40, 40), range(40), 0)
    assert right is not None
    assert right.temperature is not None
    assert right.brier.mean < 0.05
    ties = calibration.with_temperature(np.zeros(40), range(40), 0)
    assert ties is not None
    assert (ties.temperature, ties.brier.mean, ties.error) == (None, 0.25, 0.0)


def test_temperature_is_fitted_on_other_prompts() -> None:
    """Each prompt has rows of its own size, right in all or wrong in all: a T fitted on the very rows would know."""
    random = np.random.default_rng(2)
    groups = np.repeat(np.arange(20), 5)
    difference = np.repeat(random.choice([-1.0, 1.0], size=20), 5)
    folds = calibration.with_temperature(difference, groups, 0)
    assert folds is not None
    own = max(0.0, float(np.log(np.mean(difference > 0) / np.mean(difference < 0))))
    in_sample = np.mean((1 / (1 + np.exp(own * difference))) ** 2)
    assert folds.brier.mean > in_sample


def test_log_odds_are_taken_as_they_are() -> None:
    found = calibration.as_log_odds(np.array([math.log(4), -math.log(4)]), range(2), 0)
    assert found is not None
    assert found.brier.mean == pytest.approx((0.2**2 + 0.8**2) / 2)
    assert found.temperature == 1.0


def test_error_by_chance_is_exceeded_by_few_calibrated_judges_and_all_that_are_too_sure() -> None:
    """Of 40 calibrated samples 2 are expected above the 95 % bound; 7 or more have probability 0.003."""
    above = 0
    for seed in range(40):
        random = np.random.default_rng(seed)
        certainty = random.uniform(0.5, 1.0, size=500)
        right = random.random(500) < certainty
        found = calibration.stated(np.where(right, certainty, 1 - certainty), range(500), seed)
        sure = calibration.stated(np.where(right, 0.99, 0.01), range(500), seed)
        assert found is not None
        assert sure is not None
        above += found.error > found.error_by_chance
        assert sure.error > 4 * sure.error_by_chance
    assert above < 7
