"""What the tests of training share: learners of the small model, jobs for them, and how far apart they end."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from online_dpo.backends.learner import LocalLearner
from online_dpo.backends.policy_model import PolicyModel
from online_dpo.config import DPOSpec, LoraSpec
from online_dpo.protocols import TrainJob, TrainStart, TrainStep
from online_dpo.types import Candidate, Pair, Policy

LORA = LoraSpec(rank=4, alpha=8.0)
PAIR_EACH = 1
"""A token budget that no pair keeps to: every pass is of one pair."""
Result = tuple[TrainStart, list[TrainStep], Policy]


def learner_of(initial: Policy, *, save_every: int | None = None, **settings: Any) -> LocalLearner:
    """A learner of one worker, in this process."""
    assert initial.probe is not None
    model = PolicyModel(initial, model_name="small", **settings)
    return LocalLearner(model, initial.probe.token_ids, save_every=save_every)


def job_of(initial: Policy, pairs: Sequence[Pair], dpo: DPOSpec, out: Path, **changes: Any) -> TrainJob:
    """A round from the initial policy, which is source, reference and start where nothing else is said."""
    job = TrainJob(initial, initial, initial, tuple(pairs), dpo, policy_id="next", out=out, seed=0)
    return replace(job, **changes)


def result_of(learner: Any, job: TrainJob) -> Result:
    """What training yields, told apart."""
    start, *steps, last = learner.train(job)
    assert isinstance(start, TrainStart)
    assert isinstance(last, Policy)
    return start, [step for step in steps if isinstance(step, TrainStep)], last


def weights_of(learner: LocalLearner) -> list[Tensor]:
    return [p.detach().clone() for p in learner.model.trainable]


def gradients_of(learner: LocalLearner) -> list[Tensor]:
    """Zeros where a parameter has none."""
    return [p.new_zeros(p.shape) if p.grad is None else p.grad.clone() for p in learner.model.trainable]


def farthest(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))


def apart(first: Sequence[Tensor], second: Sequence[Tensor], before: Sequence[Tensor]) -> float:
    """How far two trainings from `before` ended from each other, over how far they went (Euclidean).

    Adam divides a gradient by its own size: rounding of a gradient near zero moves that one weight by up to the
    rate, so single weights say little.
    """
    between = sum(float((a - b).square().sum()) for a, b in zip(first, second, strict=True))
    went = sum(float((a - b).square().sum()) for a, b in zip(first, before, strict=True))
    return math.sqrt(between / went)


def shifted(answer: Candidate, by: float) -> Candidate:
    """`answer` with `by` nats added to every stored log-prob: falsified."""
    return replace(answer, logprobs=tuple(value + by for value in answer.logprobs))


@contextmanager
def pass_sizes(learner: LocalLearner) -> Iterator[list[int]]:
    """Inside, the list grows by the number of items of each forward with gradients."""
    seen: list[int] = []
    forward = learner.model.scores

    def counted(items: Any) -> Any:
        if torch.is_grad_enabled():
            seen.append(len(items))
        return forward(items)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learner.model, "scores", counted)
        yield seen
