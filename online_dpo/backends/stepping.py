"""What a round's optimiser steps minimise, as the learner sees it: by pairs, by answers or by groups of answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from online_dpo.protocols import TrainStart, TrainStep


@dataclass(frozen=True, slots=True)
class StepSums:
    """Sums over a step's units: pairs, answers or groups. None: a figure that such units do not have.

    Of pairs: what they lost, how they were ranked, how far each side moved. `reward`: Σ of each pass's mean reward
    times its pairs (for `bco_pair`). `expected`: Σ of the losses that policy = reference would give.
    Of groups, whose answers are averaged first: `score`, the judge's; `kl`, w·log(π/π_ref); `drift`, log(π/μ);
    `shift`, log(π/π_ref) unweighed.
    `tokens`: what was computed.
    """

    loss: float
    margin: float | None
    wins: float | None
    r_w: float | None
    r_l: float | None
    reward: float
    expected: float | None
    tokens: int
    score: float | None = None
    kl: float | None = None
    shift: float = 0.0
    drift: float | None = None


class Stepping(Protocol):
    """The loss of batches of one round's units."""

    digest: str | None
    """Of a loss of the user's own: its source."""

    def __len__(self) -> int:
        """How many units the round has."""

    def backward(self, batch: Sequence[int], delta: float) -> StepSums:
        """Gradients of the mean loss over the units `batch`, accumulated over this worker's passes.

        The gradient is that of the mean over the batch whatever the passes and the number of workers. `delta`: the
        running mean that `bco_pair` may use.
        """

    def check_first(self, step: TrainStep, sums: StepSums, units: int, start: TrainStart, tolerance: float) -> None:
        """Hold the first step of a round against what is known of it beforehand; `TrainingError` where it is not so.

        `units`: of the step. `tolerance`: nats a token between two computations of one log-prob.
        """
