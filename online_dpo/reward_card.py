"""What is known of a trained reward model: how often it is right on held-out pairs, and what its scores mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from online_dpo.audit import intervals
from online_dpo.audit.calibration import Calibration, as_log_odds
from online_dpo.audit.intervals import Floats
from online_dpo.preferences import Preference, group_of


def held_out_figures(
    preferences: Sequence[Preference], chosen: ArrayLike, rejected: ArrayLike, seed: int
) -> dict[str, Any]:
    """The figures of rewards `chosen` and `rejected` (shape (pairs,) each) of held-out pairs, ready for JSON.

    `accuracy`: share of pairs whose chosen answer scores higher, with Wilson's interval; `longer_wins`: the same of
    the longer answer (characters, without white space at the ends); `difference`: of the two, paired, with a bootstrap
    interval. Ties count one half. Calibration is that of σ(r_w − r_l). All 95 % intervals are over prompts.
    `score_mean` and `score_std` are over both answers of all pairs; None where they do not exist.
    """
    r_w, r_l = np.asarray(chosen, dtype=np.float64), np.asarray(rejected, dtype=np.float64)
    names = {name: code for code, name in enumerate(sorted({group_of(one) for one in preferences}))}
    groups = np.array([names[group_of(one)] for one in preferences])
    longer = np.array([float(len(one.chosen.strip()) - len(one.rejected.strip())) for one in preferences])
    right, right_by_length = _right(r_w - r_l), _right(longer)
    both = np.concatenate([r_w, r_l])
    return {
        "pairs": len(preferences),
        "prompts": len(names),
        "accuracy": intervals.rate(right, groups).as_dict(),
        "longer_wins": intervals.rate(right_by_length, groups).as_dict(),
        "difference": intervals.mean(right - right_by_length, groups, seed).as_dict(),
        **_calibration(as_log_odds(r_w - r_l, groups, seed)),
        "score_mean": float(both.mean()),
        "score_std": float(both.std()) if both.std() > 0 else None,
    }


def verdict(figures: dict[str, Any]) -> str:
    """One line: whether the model is right more often than the longer answer is."""
    low, high = figures["difference"]["low"], figures["difference"]["high"]
    if low is None or math.isnan(low):
        return "too few held-out pairs to tell it from 'the longer answer wins'"
    if low > 0:
        return "right more often than 'the longer answer wins'"
    if high < 0:
        return "right LESS often than 'the longer answer wins'"
    return "not shown to be better than 'the longer answer wins': the interval of the difference holds zero"


def _right(difference: Floats) -> Floats:
    found: Floats = (difference > 0) + 0.5 * (difference == 0)
    return found


def _calibration(found: Calibration | None) -> dict[str, Any]:
    if found is None:
        return {}
    return {
        "brier": found.brier.as_dict(),
        "log_loss": found.log_loss.as_dict(),
        "calibration_error": found.error,
        "calibration_error_by_chance": found.error_by_chance,
        "bins": [
            {
                "low": one.low,
                "high": one.high,
                "pairs": one.accuracy.n,
                "certainty": one.certainty,
                "accuracy": one.accuracy.as_dict(),
            }
            for one in found.bins
        ],
    }
