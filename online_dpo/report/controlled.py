"""Win rates against the initial policy at equal length: the one figure that the report adds to a comparison's own."""

from __future__ import annotations

from collections.abc import Sequence

from online_dpo.compare import INITIAL, Outcomes
from online_dpo.compare.differences import estimate, make_field
from online_dpo.compare.grid import make_grid
from online_dpo.compare.selecting import Select
from online_dpo.measure import Interval


def against_initial(outcomes: Sequence[Outcomes], select: Select) -> dict[str, Interval]:
    """Label -> length-controlled win rate of the arm at its selected rounds."""
    field = make_field(make_grid(outcomes), select)
    return {label: estimate(field, "length_controlled", label, INITIAL)[0].interval for label in field.grid.arms}
