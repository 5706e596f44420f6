"""The loss of REINFORCE leave-one-out (`rloo`): a prompt with all its judged answers is one unit of a step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from online_dpo.backends.distributed import summed
from online_dpo.backends.forward import ItemScores
from online_dpo.backends.policy_model import PolicyModel
from online_dpo.backends.step_passes import StepPasses
from online_dpo.backends.stepping import StepSums
from online_dpo.config import RlooSpec
from online_dpo.errors import TrainingError
from online_dpo.objective import TokenLogps
from online_dpo.protocols import TrainJob, TrainStart, TrainStep
from online_dpo.rloo import rloo
from online_dpo.types import Group


class GroupLoss:
    """A unit is a group. See `Stepping`.

    `reference`: the reference's log-probs of every group's answers, token by token; empty where there is no penalty.
    """

    digest: str | None = None

    def __init__(
        self, model: PolicyModel, job: TrainJob, spec: RlooSpec, reference: Sequence[Sequence[Sequence[float]]]
    ) -> None:
        self.model = model
        self.job = job
        self.spec = spec
        self.passes = StepPasses(
            model, [[(group.prompt.token_ids, answer.token_ids) for answer in group.candidates] for group in job.groups]
        )
        self.reference = [[sum(answer) for answer in group] for group in reference]
        self.scale = score_scale(job.groups) if spec.standardise else 1.0

    def __len__(self) -> int:
        return len(self.job.groups)

    def backward(self, batch: Sequence[int], delta: float) -> StepSums:
        """See `Stepping.backward`."""
        sums = torch.zeros(6, dtype=torch.float64)
        for chosen, counts in self.passes.of(batch):
            found = self.model.scores(self.passes.items(chosen))
            losses, figures = self._losses(chosen, found)
            (losses * (counts / len(batch))).backward()  # type: ignore[no-untyped-call]
            if counts:
                tokens = float(self.passes.tokens(chosen))
                sums += torch.tensor([float(losses.detach()), *figures, tokens], dtype=torch.float64)
        loss, score, kl, drift, shift, computed = summed(sums.to(self.model.device)).tolist()
        return StepSums(
            loss,
            None,
            None,
            None,
            None,
            reward=0.0,
            expected=None,
            tokens=int(computed),
            score=score,
            kl=kl if self.reference else None,
            drift=drift,
            shift=shift,
        )

    def check_first(self, step: TrainStep, sums: StepSums, units: int, start: TrainStart, tolerance: float) -> None:
        """A policy that begins where the answers were sampled gives each the weight 1; one that begins at the reference
        is at a KL of 0. Bounds as those of the first step of DPO, `first_step.check_first_step`.
        """
        policy, source = self.job.policy.digest, self.job.source
        rounding, gap = 20 * tolerance, 4 * (start.engine_gap_sequence or 0.0)
        drift = sums.drift or 0.0
        if source is not None and source.digest == policy and abs(drift) / units > max(gap, rounding):
            raise TrainingError(
                f"the first step of an on-policy round must weigh every answer 1, found a mean log-weight of "
                f"{drift / units:.4f}: the stored log-probs are not this policy's"
            )
        allowed = max(gap, rounding) if start.reference_from == "engine" else rounding
        if self.reference and self.job.reference.digest == policy and abs(sums.shift) / units > allowed:
            raise TrainingError(
                f"the first step of a round that begins at its reference must have a KL of 0, found a mean log-ratio "
                f"of {sums.shift / units:.4f}: the reference's log-probs are not this policy's"
            )

    def _losses(self, chosen: Sequence[int], found: ItemScores) -> tuple[Tensor, list[float]]:
        """The sum of the groups' losses; the sums of their mean scores, log-ratios to the reference, weighed,
        the drifts, and the log-ratios as they are."""
        log_pi = TokenLogps(found.logps, found.lengths).sums()
        losses: list[Tensor] = []
        figures = [0.0, 0.0, 0.0, 0.0]
        first = 0
        for i in chosen:
            group = self.job.groups[i]
            own = log_pi[first : first + len(group.candidates)]
            first += len(group.candidates)
            log_mu = self._vector([sum(answer.logprobs) for answer in group.candidates])
            log_ref = self._vector(self.reference[i]) if self.reference else None
            scores = self._vector([score / self.scale for score in group.scores])
            out = rloo(own, log_mu, log_ref, scores, self.spec.kl, self.spec.clip)
            losses.append(out.loss)
            figures[0] += sum(group.scores) / len(group.scores)
            if out.log_ratios is not None:
                figures[1] += float((out.weights * out.log_ratios).double().mean())
                figures[3] += float(out.log_ratios.double().mean())
            figures[2] += float((own.detach() - log_mu).double().mean())
        return torch.stack(losses).sum(), figures

    def _vector(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.model.device)


def score_scale(groups: Sequence[Group]) -> float:
    """The standard deviation of all scores of the round; 1 where they are all the same."""
    scores = [score for group in groups for score in group.scores]
    mean = sum(scores) / len(scores)
    return math.sqrt(sum((score - mean) ** 2 for score in scores) / len(scores)) or 1.0
