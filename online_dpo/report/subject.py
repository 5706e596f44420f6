"""What the sections of a report are about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from online_dpo.compare import INITIAL, Comparison, CurvePoint
from online_dpo.measure import Interval
from online_dpo.report.data import ReportedRun
from online_dpo.report.palette import Style, styles


@dataclass(frozen=True)
class Subject:
    """The runs, and what a comparison of their held-out answers found. `controlled`: label -> win rate against the
    initial policy at equal length."""

    runs: Sequence[ReportedRun]
    comparison: Comparison
    controlled: Mapping[str, Interval]

    @cached_property
    def arms(self) -> list[str]:
        """All arms, as the report calls them."""
        return [arm for run in self.runs for arm in run.arms]

    @cached_property
    def look(self) -> dict[str, Style]:
        """How each arm is drawn."""
        return styles(self.arms)

    @cached_property
    def curves(self) -> dict[str, list[CurvePoint]]:
        """The comparison's curves by arm, in the order of the rounds."""
        found: dict[str, list[CurvePoint]] = {}
        for point in sorted(self.comparison.curves, key=lambda point: point.round):
            found.setdefault(point.arm, []).append(point)
        return {arm: found[arm] for arm in [*self.arms, *found] if arm in found}

    def against_initial(self, arm: str) -> Interval | None:
        """The win rate of `arm`, at its selected rounds, against the initial policy."""
        return self.comparison.win_matrix.get(arm, {}).get(INITIAL)

    def selected_rounds(self, arm: str) -> list[tuple[int, int]]:
        """The round that stands for `arm` at each seed: (seed, round)."""
        return [(one.seed, one.round) for one in self.comparison.selected if one.arm == arm]

    def selected(self, arm: str) -> str:
        """These rounds in words: `3`, or `3–5` where seeds differ."""
        rounds = sorted({number for _, number in self.selected_rounds(arm)})
        return "–".join(str(number) for number in dict.fromkeys((rounds[0], rounds[-1]))) if rounds else ""
