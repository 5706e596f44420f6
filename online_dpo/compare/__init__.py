"""Which arm is better, by how much, and how sure that is: from a run's held-out answers alone."""

from __future__ import annotations

from online_dpo.compare.comparing import closing_lines, compare, contrasts_of, open_runs
from online_dpo.compare.comparison import (
    Comparison,
    CurvePoint,
    Difference,
    Measure,
    OverOptimisation,
    Rating,
    Selected,
    Verdict,
)
from online_dpo.compare.grid import INITIAL
from online_dpo.compare.outcomes import Outcomes
from online_dpo.compare.reading import read_outcomes, read_runs

__all__ = [
    "INITIAL",
    "Comparison",
    "CurvePoint",
    "Difference",
    "Measure",
    "Outcomes",
    "OverOptimisation",
    "Rating",
    "Selected",
    "Verdict",
    "closing_lines",
    "compare",
    "contrasts_of",
    "open_runs",
    "read_outcomes",
    "read_runs",
]
