"""Training on one worker of a group (or alone): a round's steps, the checks, the checkpoints. Knows no Ray."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from online_dpo.backends.distributed import from_first, sum_gradients
from online_dpo.backends.optimiser import learning_rate, make_optimiser
from online_dpo.backends.optimiser_state import load_state, save_state
from online_dpo.backends.policy_model import PolicyModel
from online_dpo.backends.reference_logps import shared_logps
from online_dpo.backends.round_checkpoint import Progress, RoundCheckpoint
from online_dpo.backends.sharding import whole
from online_dpo.backends.step_choice import stepping_of
from online_dpo.backends.stepping import Stepping, StepSums
from online_dpo.config import DPOSpec
from online_dpo.errors import LeftTraining, TrainingError
from online_dpo.files import digest_json
from online_dpo.policies import write_policy
from online_dpo.protocols import RoundPart, TrainJob, TrainStart, TrainStep
from online_dpo.types import Candidate, Policy, Probe, Prompt


class LocalLearner:
    """Implements `protocols.Learner` in this process; one of `world` equal workers when a group was joined.

    `save_every`: optimiser steps between checkpoints within a round; None for none.
    """

    def __init__(
        self,
        model: PolicyModel,
        probe_token_ids: Sequence[int],
        *,
        share_gpu: bool = False,
        save_every: int | None = None,
    ) -> None:
        self.model = model
        self.share_gpu = share_gpu
        self.save_every = save_every
        self.probe_token_ids = tuple(probe_token_ids)

    def train(self, job: TrainJob) -> Iterator[TrainStart | TrainStep | Policy]:
        """See `protocols.Learner.train`. Every worker runs it whole; worker 0 saves."""
        tolerance = self._tolerance(job.dpo)
        loss, start = stepping_of(self.model, job, tolerance)
        yield start
        self.model.load(job.policy, job.seed)
        # From the first step on, the weights in memory are no saved policy's.
        self.model.loaded = None
        checkpoint = self._checkpoint(job, loss)
        for step, sums in self._steps(job, loss, checkpoint):
            if step.step == 1 and sums is not None:
                # A tolerance of zero asks for computed references; their forward still rounds.
                allowed = max(tolerance, self._rounding())
                loss.check_first(step, sums, min(job.dpo.batch_size, len(loss)), start, allowed)
            yield step
        yield self._save(job)

    def score(self, policy: Policy, items: Sequence[tuple[Prompt, Candidate]]) -> list[list[float]]:
        """See `protocols.Learner.score`. Workers share the items."""
        self.model.load(policy)
        return shared_logps(self.model, [(prompt.token_ids, answer.token_ids) for prompt, answer in items])

    def probe(self, policy: Policy, token_ids: Sequence[int]) -> Probe:
        """See `protocols.Learner.probe`."""
        self.model.load(policy)
        return self.model.probe(token_ids)

    def rest(self) -> None:
        """See `protocols.Learner.rest`."""
        if self.share_gpu:
            self.model.rest()

    def _tolerance(self, dpo: DPOSpec) -> float:
        return self._rounding() if dpo.engine_gap_tolerance is None else dpo.engine_gap_tolerance

    def _rounding(self) -> float:
        return 1e-3 if self.model.dtype == torch.float32 else 0.05

    def _checkpoint(self, job: TrainJob, loss: Stepping) -> RoundCheckpoint | None:
        if job.checkpoint is None:
            return None
        policies = [job.policy.digest, job.reference.digest, job.source and job.source.digest]
        pairs = [
            [p.prompt.token_ids, p.chosen.token_ids, p.rejected.token_ids, p.chosen_score, p.rejected_score]
            for p in job.pairs
        ]
        groups = [
            [g.prompt.token_ids, [[*c.token_ids, *c.logprobs] for c in g.candidates], g.scores] for g in job.groups
        ]
        data = [pairs, groups, job.answers]
        spec = [job.dpo.model_dump(mode="json"), job.rloo and job.rloo.model_dump(mode="json")]
        part = job.part and [job.part.first, job.part.steps, job.part.total]
        # The digest is of a loss of the user's own: its source may change while its name and its keys do not.
        return RoundCheckpoint(job.checkpoint, digest_json([policies, data, spec, loss.digest, job.seed, part]))

    def _steps(
        self, job: TrainJob, loss: Stepping, checkpoint: RoundCheckpoint | None
    ) -> Iterator[tuple[TrainStep, StepSums | None]]:
        """Every step, with its sums; without them where a checkpoint has it."""
        optimiser = make_optimiser(self.model.trainable, job.dpo)
        batches = batch_order(len(loss), job.dpo, job.seed, None if job.part is None else job.part.steps)
        first, total = (0, len(batches)) if job.part is None else (job.part.first, job.part.total)
        progress = self._begin(job.part, optimiser, checkpoint)
        yield from ((step, None) for step in progress.steps)
        for number in range(len(progress.steps), len(batches)):
            began = time.perf_counter()
            batch = batches[number]
            lr = learning_rate(first + number, total, job.dpo)
            for group in optimiser.param_groups:
                group["lr"] = lr
            self.model.clear_gradients(optimiser)
            sums = loss.backward(batch, progress.delta)
            norm = self._gradient_norm(job.dpo)
            step = reported(sums, len(batch), first + number + 1, total, norm, lr)
            optimiser.step()
            step = replace(step, seconds=time.perf_counter() - began)
            progress = advanced(progress, step, sums, len(batch))
            # Before it is kept: a first step that is refused must not be there when the round is tried again.
            yield step, sums
            if checkpoint is not None:
                self._keep_if_due(checkpoint, progress, optimiser)
        if job.part and job.part.end and self._saves:
            save_state(job.part.end, self.model.trainable, optimiser, progress.delta, progress.seen)

    def _begin(
        self, part: RoundPart | None, optimiser: torch.optim.Optimizer, checkpoint: RoundCheckpoint | None
    ) -> Progress:
        """Where the job is: as its checkpoint has it, else where the part before it ended, else at the start."""
        kept = Progress() if checkpoint is None else checkpoint.load(self.model.trainable, optimiser)
        if kept.steps or part is None or part.begin is None:
            return kept
        delta, seen = load_state(part.begin, self.model.trainable, optimiser)
        return Progress((), delta, seen)

    def _gradient_norm(self, dpo: DPOSpec) -> float:
        """The gradients of all workers added, their norm, and they themselves clipped to `dpo.clip`."""
        if not self.model.sharded:  # shares were added as each was computed
            sum_gradients(self.model.trainable)
        return float(whole(torch.nn.utils.clip_grad_norm_(self.model.trainable, dpo.clip)))

    @property
    def _saves(self) -> bool:
        """Whether this worker takes part in saving: worker 0 writes, and those that hold shares gather them."""
        return self.model.rank == 0 or self.model.sharded

    def _keep_if_due(self, checkpoint: RoundCheckpoint, progress: Progress, optimiser: torch.optim.Optimizer) -> None:
        """Keep the state after every `save_every` steps; and where that is asked for, then raise `LeftTraining`."""
        leave = from_first(checkpoint.leave_asked())  # all workers leave, or none
        done = len(progress.steps)
        due = self.save_every is not None and done % self.save_every == 0
        if (leave or due) and self._saves:
            checkpoint.save(progress, self.model.trainable, optimiser)
        if leave:
            raise LeftTraining(f"told to leave: training is kept after {done} steps of the stage")

    def _save(self, job: TrainJob) -> Policy:
        saved: list[Policy] = []
        if self._saves:
            saved = [self.model.save(job.policy_id, job.out, self.probe_token_ids)]
        if self.model.rank == 0:
            write_policy(saved[0])
        (policy,) = from_first(saved)
        self.model.loaded = policy.digest
        return policy


def reported(sums: StepSums, units: int, number: int, of: int, norm: float, lr: float) -> TrainStep:
    """What a step reports: means over its units. Raises `TrainingError` on a loss or gradient that is not finite."""

    def mean(value: float | None) -> float | None:
        return None if value is None else value / units

    loss = sums.loss / units
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise TrainingError(f"step {number} of {of}: loss {loss}, gradient norm {norm}; the last good policy is kept")
    return TrainStep(
        step=number,
        steps=of,
        loss=loss,
        margin=mean(sums.margin),
        accuracy=mean(sums.wins),
        grad_norm=norm,
        lr=lr,
        r_w=mean(sums.r_w),
        r_l=mean(sums.r_l),
        tokens=sums.tokens,
        seconds=0.0,
        reward=mean(sums.score),
        kl=mean(sums.kl),
    )


def advanced(progress: Progress, step: TrainStep, sums: StepSums, units: int) -> Progress:
    """`progress` one step on; δ is the mean reward over all pairs so far."""
    seen = progress.seen + units
    return Progress((*progress.steps, step), (progress.delta * progress.seen + sums.reward) / seen, seen)


def batch_order(units: int, dpo: DPOSpec, seed: int, most: int | None = None) -> list[list[int]]:
    """Indices of each optimiser step's units: every epoch a fresh seeded permutation, cut into batches.

    Of at most `most` steps, the last one takes what is left.
    """
    generator = torch.Generator().manual_seed(seed)
    batches: list[list[int]] = []
    for _ in range(dpo.epochs):
        order = torch.randperm(units, generator=generator).tolist()
        batches.extend(order[i : i + dpo.batch_size] for i in range(0, units, dpo.batch_size))
    if most is not None and len(batches) > most:
        batches[most - 1 :] = [[unit for batch in batches[most - 1 :] for unit in batch]]
    return batches
