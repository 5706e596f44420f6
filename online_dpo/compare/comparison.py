"""The results of a comparison as plain records: what the report prints and `comparison.json` holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from online_dpo.measure import Interval

Verdict = Literal["better", "worse", "inconclusive"]
Measure = Literal["reward", "gold", "win_rate", "length_controlled"]


@dataclass(frozen=True, slots=True)
class Difference:
    """Arm `a` against arm `b` at their selected rounds, by one measure.

    `interval`: of a − b for `reward` and `gold` (judge's units), of the share of prompts on which a wins (ties half)
    for `win_rate` and `length_controlled`. `p`: two-sided, of no difference; `p_corrected`: Holm's, over all
    differences of the same measure. The verdict is by `p_corrected`. `more_prompts`, `more_seeds`: about how many more
    would decide it if the difference is what it seems (None: decided, or no number of these alone would).
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


@dataclass(frozen=True, slots=True)
class Selected:
    """The round that stands for an arm at one seed, and why (`select`)."""

    arm: str
    seed: int
    round: int


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One arm after one round, over all its seeds; None where there is no such figure.

    `kl`: KL(π‖π₀), nats a sequence. Intervals are over prompts and, where there are several, seeds.
    """

    arm: str
    round: int
    seeds: int
    reward: Interval
    gold: Interval | None
    win_rate: Interval
    kl: Interval | None
    tokens: Interval


@dataclass(frozen=True, slots=True)
class OverOptimisation:
    """An arm (one seed) whose gold reward fell after round `peak` while the training judge's rose."""

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
