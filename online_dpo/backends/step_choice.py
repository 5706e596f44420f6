"""What a job's steps minimise, and the reference's log-probs that this needs."""

from __future__ import annotations

import torch

from online_dpo.backends.answer_step import AnswerLoss
from online_dpo.backends.group_step import GroupLoss
from online_dpo.backends.policy_model import PolicyModel
from online_dpo.backends.reference_logps import group_logps, reference_logps
from online_dpo.backends.step import StepLoss
from online_dpo.backends.stepping import Stepping
from online_dpo.config import RlooSpec
from online_dpo.errors import TrainingError
from online_dpo.objective import Objective, require_probabilities
from online_dpo.protocols import TrainJob, TrainStart


def stepping_of(model: PolicyModel, job: TrainJob, tolerance: float) -> tuple[Stepping, TrainStart]:
    """The loss of `job`'s steps, and where its reference came from.

    `tolerance`: nats a token by which the engine's log-probs may differ from the learner's and still serve.
    Raises `TrainingError` where there is nothing to train on, or what there is does not fit the loss.
    """
    # Packed attention has no dropout.
    model.lay_out(plain=job.dpo.faults.dropout)
    if job.rloo is not None:
        return _groups(model, job, job.rloo, tolerance)
    if job.answers:
        return AnswerLoss(model, job.answers), TrainStart("none", None, None)
    if not job.pairs:
        raise TrainingError("no pairs to train on")
    if job.dpo.chosen_alone:
        _, start = reference_logps(model, job, tolerance, needed=False)
        return AnswerLoss(model, [(pair.prompt.token_ids, pair.chosen.token_ids) for pair in job.pairs]), start
    objective = Objective(job.dpo, job.folders)
    _check(job, objective)
    needed = objective.needs_reference or objective.needs_ranking
    reference, start = reference_logps(model, job, tolerance, needed=needed)
    return StepLoss(model, job, objective, reference), start


def _groups(model: PolicyModel, job: TrainJob, spec: RlooSpec, tolerance: float) -> tuple[Stepping, TrainStart]:
    if not job.groups:
        raise TrainingError("no prompt with two judged answers to train on")
    if spec.clip is not None and job.source is None:
        raise TrainingError("rloo.clip weighs by the policy that sampled the answers, and there is no one such policy")
    reference, start = group_logps(model, job, tolerance, needed=spec.kl > 0)
    return GroupLoss(model, job, spec, reference), start


def _check(job: TrainJob, objective: Objective) -> None:
    if objective.needs_scores:
        require_probabilities(torch.tensor([score for p in job.pairs for score in (p.chosen_score, p.rejected_score)]))
    if objective.needs_origin and not job.drawn_from_reference:
        raise TrainingError(
            "dpo.xpo_alpha needs answers drawn from the reference: the round's source must be its reference "
            "(source: current with reference: prior, or source: initial with reference: initial)"
        )
