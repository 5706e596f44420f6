"""A job given to the learner, shown as it goes, and what is kept of its steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from online_dpo.leaving import LEAVING
from online_dpo.protocols import Learner, Progress, TrainJob, TrainStart, TrainStep
from online_dpo.types import Policy


@dataclass(frozen=True, slots=True)
class Shown:
    """How a job is shown: where, under which label, and how many units (pairs, prompts, answers) an epoch takes."""

    progress: Progress
    label: str
    units: int
    unit: str


def train_shown(learner: Learner, job: TrainJob, shown: Shown) -> tuple[TrainStart, list[TrainStep]]:
    """Do `job`; returns what was known before the first step, and every step."""
    starts: list[TrainStart] = []
    steps: list[TrainStep] = []
    total = shown.units * job.dpo.epochs
    shown.progress.start(shown.label, total, shown.unit)
    done = 0
    for event in _events(learner, job):
        if isinstance(event, TrainStart):
            starts.append(event)
        elif isinstance(event, TrainStep):
            steps.append(event)
            # The last batch of each epoch may be smaller.
            epoch_ends = (done // shown.units + 1) * shown.units
            taken = min(job.dpo.batch_size, epoch_ends - done)
            if job.part is not None and len(steps) == job.part.steps:
                taken = total - done  # a block's last step takes all that is left
            done += taken
            shown.progress.advance(taken, f"loss {event.loss:.3f}")
    shown.progress.finish()
    return starts[0], steps


def _events(learner: Learner, job: TrainJob) -> Iterator[TrainStart | TrainStep | Policy]:
    with LEAVING.by_checkpoint(job.checkpoint):
        yield from learner.train(job)


def train_figures(start: TrainStart, steps: Sequence[TrainStep], seconds: float) -> dict[str, Any]:
    """What a stage's record keeps of training: first and last steps, means over the steps, the reference, the curve."""
    computing = sum(step.seconds for step in steps)
    tokens = sum(step.tokens for step in steps)
    return {
        "steps": len(steps),
        "loss_first": steps[0].loss,
        "loss_last": steps[-1].loss,
        "loss_mean": sum(step.loss for step in steps) / len(steps),
        "margin_last": steps[-1].margin,
        "accuracy_last": steps[-1].accuracy,
        "accuracy_mean": _mean([step.accuracy for step in steps]),
        "chosen_logp_change": steps[-1].r_w,
        "rejected_logp_change": steps[-1].r_l,
        "reward_last": steps[-1].reward,
        "kl_last": steps[-1].kl,
        "grad_norm_largest": max(step.grad_norm for step in steps),
        **asdict(start),
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / computing, 1),
        "curve": [_point(step) for step in steps],
    }


def _mean(values: Sequence[float | None]) -> float | None:
    """None where one of them is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def _point(step: TrainStep) -> dict[str, float]:
    """What the curve shows of a step: the figures that it has."""
    named = {
        "loss": step.loss,
        "margin": step.margin,
        "reward": step.reward,
        "kl": step.kl,
        "grad_norm": step.grad_norm,
    }
    return {key: value for key, value in named.items() if value is not None}
