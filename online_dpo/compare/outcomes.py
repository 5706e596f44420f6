"""What one policy did on the held-out prompts, as arrays: the only thing that comparisons are made of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]


@dataclass(frozen=True, eq=False, slots=True)
class Outcomes:
    """One policy's held-out answers; all arrays are [prompts], in the order of `prompt_ids`.

    `reward`: the evaluation judge's score, `gold`: the gold judge's (None where the experiment has none), NaN where the
    judge abstained. `tokens`: length of the answer. `log_ratio`: Σ_t log π/π₀ of the answer, nats, whose mean over
    answers of π is KL(π‖π₀); None where answers are not drawn from π itself (temperature, top-p).
    """

    run: str
    arm: str
    seed: int
    round: int
    prompt_ids: tuple[str, ...]
    reward: Values
    gold: Values | None
    tokens: Values
    log_ratio: Values | None
