"""What one policy did on the held-out prompts, as arrays: the only thing that comparisons are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]


@dataclass(frozen=True, eq=False, slots=True)
class Outcomes:
    """One policy's held-out answers; all arrays are [prompts], in the order of `prompt_ids`.

    `reward`: the evaluation judge's score, `gold`: the gold judge's (None where the experiment has none), NaN where the
    judge abstained. `tokens`: length of the answer. `log_ratio`: Σ_t log π/π₀ of the answer, nats, whose mean over
    answers of π is KL(π‖π₀); None where answers are not drawn from π itself (temperature, top-p). `judge` and
    `sampling`: digests of the evaluation judge and of how the answers were drawn, `model` that of the run's model:
    scores that differ in these are not on one scale (empty: not known).
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
    judge: str = ""
    sampling: str = ""
    model: str = ""

    def reordered(self, prompt_ids: Sequence[str]) -> Outcomes:
        """The same with the prompts in another order: `prompt_ids`, each of which it has, or fewer of them."""
        place = {prompt_id: index for index, prompt_id in enumerate(self.prompt_ids)}
        order = np.array([place[prompt_id] for prompt_id in prompt_ids], dtype=np.int64)
        return replace(
            self,
            prompt_ids=tuple(prompt_ids),
            reward=self.reward[order],
            gold=None if self.gold is None else self.gold[order],
            tokens=self.tokens[order],
            log_ratio=None if self.log_ratio is None else self.log_ratio[order],
        )
