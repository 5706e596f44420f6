"""The loss `sft`: answers alone, each by the mean of its tokens. Chosen ones of a round's pairs, or given ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from online_dpo.backends.distributed import summed
from online_dpo.backends.policy_model import PolicyModel
from online_dpo.backends.step_passes import StepPasses
from online_dpo.backends.stepping import StepSums
from online_dpo.losses import sft
from online_dpo.objective import TokenLogps
from online_dpo.packing import Item
from online_dpo.protocols import TrainStart, TrainStep


class AnswerLoss:
    """A unit is an answer. See `Stepping`."""

    digest: str | None = None

    def __init__(self, model: PolicyModel, answers: Sequence[Item]) -> None:
        self.model = model
        self.passes = StepPasses(model, [[answer] for answer in answers])

    def __len__(self) -> int:
        return len(self.passes.units)

    def backward(self, batch: Sequence[int], delta: float) -> StepSums:
        """See `Stepping.backward`."""
        sums = torch.zeros(2, dtype=torch.float64)
        for chosen, counts in self.passes.of(batch):
            found = self.model.scores(self.passes.items(chosen))
            losses = sft(TokenLogps(found.logps, found.lengths).sums() / found.lengths)
            (losses.sum() * (counts / len(batch))).backward()  # type: ignore[no-untyped-call]
            if counts:
                lost = float(losses.detach().double().sum())
                sums += torch.tensor([lost, float(self.passes.tokens(chosen))], dtype=torch.float64)
        loss, computed = summed(sums.to(self.model.device)).tolist()
        return StepSums(loss, None, None, None, None, reward=0.0, expected=None, tokens=int(computed))

    def check_first(self, step: TrainStep, sums: StepSums, units: int, start: TrainStart, tolerance: float) -> None:
        """Nothing is known of it beforehand."""
