"""The results of a comparison as plain records: what the report prints and `comparison.json` holds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal

from online_dpo.measure import Interval

Verdict = Literal["better", "worse", "inconclusive"]
Measure = Literal["reward", "gold", "win_rate", "length_controlled", "equal_kl"]


@dataclass(frozen=True, slots=True)
class Difference:
    """Arm `a` against arm `b` at their selected rounds, by one measure.

    `interval`: of a − b for `reward` and `gold` (judge's units), of the share of prompts on which a wins (ties half, by
    gold reward where there is a gold judge) for `win_rate` and `length_controlled`, and for `equal_kl` of a − b (gold
    reward where there is a gold judge) where both are equally far from the initial policy, whatever the rounds. `p`:
    two-sided, of no difference; `p_corrected`: Holm's, over all `family` differences of the same measure. The verdict
    is by `p_corrected`.
    `more_prompts`, `more_seeds`: about how many more would decide it with a chance of 80 % if the difference is what it
    seems (None: decided, or no number of these alone would, or there is one seed, which says nothing of others).
    `abstained`: prompts left out because a judge abstained on one of their answers.
    """

    measure: Measure
    a: str
    b: str
    interval: Interval
    p: float
    p_corrected: float
    verdict: Verdict
    prompts: int
    seeds: int
    more_prompts: int | None
    more_seeds: int | None
    sentence: str
    abstained: int = 0
    family: int = 1
    kl: float | None = None
    """Of `equal_kl`: KL(π‖π₀), nats a sequence; None for the other measures."""

    def said(self, sentence: str) -> Difference:
        """The same with its sentence."""
        return replace(self, sentence=sentence)


@dataclass(frozen=True, slots=True)
class Selected:
    """The round that stands for an arm at one seed, and why (`select`)."""

    arm: str
    seed: int
    round: int


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One arm after one round, over all its seeds; None where there is no such figure.

    `kl`: KL(π‖π₀), nats a sequence. Wins are by gold reward where there is a gold judge. `win_rate`: against the policy
    that the arm began with (½ at round 0, by definition), `previous_win_rate`: against the round before. Intervals are
    over prompts and, where there are several, seeds; `seeds` counts those that have this round. All held-out prompts,
    also where rounds are chosen on some.
    """

    arm: str
    round: int
    seeds: int
    reward: Interval
    gold: Interval | None
    win_rate: Interval
    kl: Interval | None
    tokens: Interval
    previous_win_rate: Interval | None = None


@dataclass(frozen=True, slots=True)
class OverOptimisation:
    """An arm (one seed) whose gold reward fell after round `peak` while the evaluation judge's rose.

    Both are differences between the two rounds, paired over prompts, and neither interval holds 0; that of `gold_fall`
    is wide enough for a peak that was found by looking.
    """

    arm: str
    seed: int
    peak: int
    last: int
    proxy_rise: Interval
    gold_fall: Interval


@dataclass(frozen=True, slots=True)
class Rating:
    """A policy's Bradley–Terry strength among all rounds of all arms, in Elo points; the initial policy has 0."""

    arm: str
    round: int
    strength: Interval


@dataclass(frozen=True, slots=True)
class Comparison:
    """All of it, for one run or several that share their held-out prompts."""

    selected: tuple[Selected, ...]
    differences: tuple[Difference, ...]
    win_matrix: dict[str, dict[str, Interval]]
    curves: tuple[CurvePoint, ...]
    over_optimised: tuple[OverOptimisation, ...]
    league: tuple[Rating, ...]
    verdict: str
    """The answer in one sentence."""
    warnings: tuple[str, ...]
    measure: Measure = "reward"
    """What the verdict, and all wins, are by: gold reward where there is a gold judge."""
    select: str = "last"
    prompts: int = 0
    """Held-out prompts on which arms are compared: half of all where rounds are chosen by their scores."""

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain JSON: an interval is `{mean, low, high}`, null stands for what is no number."""
        found: dict[str, Any] = _plain(self)
        return found


def _plain(value: Any) -> Any:
    if isinstance(value, Interval):
        return value.as_dict()
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
