"""DPO on one worker of a group (or alone): a round's steps, the checks, the checkpoints. Knows no Ray."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from online_dpo.backends.distributed import from_first, sum_gradients
from online_dpo.backends.optimiser import learning_rate, make_optimiser
from online_dpo.backends.policy_model import PolicyModel
from online_dpo.backends.reference_logps import reference_logps, shared_logps
from online_dpo.backends.round_checkpoint import Progress, RoundCheckpoint
from online_dpo.backends.sharding import whole
from online_dpo.backends.step import StepLoss, StepSums
from online_dpo.config import DPOSpec
from online_dpo.errors import TrainingError
from online_dpo.files import digest_json
from online_dpo.objective import Objective, require_probabilities
from online_dpo.policies import write_policy
from online_dpo.protocols import TrainJob, TrainStart, TrainStep
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
        objective = Objective(job.dpo, job.folders)
        self._check(job, objective)
        needed = objective.needs_reference or objective.needs_ranking
        tolerance = self._tolerance(job.dpo)
        reference, start = reference_logps(self.model, job, tolerance, needed=needed)
        yield start
        self.model.load(job.policy, job.seed)
        # From the first step on, the weights in memory are no saved policy's.
        self.model.loaded = None
        expect_zero = needed and job.policy.digest == job.reference.digest
        checkpoint = self._checkpoint(job, objective)
        for step, sums in self._steps(job, StepLoss(self.model, job, objective, reference), checkpoint):
            if expect_zero and step.step == 1 and sums is not None:
                # A tolerance of zero asks for computed references; their forward still rounds.
                expected = sums.expected / min(job.dpo.batch_size, len(job.pairs))
                check_first_step(step, start, expected, job.dpo, max(tolerance, self._rounding()))
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

    def _check(self, job: TrainJob, objective: Objective) -> None:
        if not job.pairs:
            raise TrainingError("no pairs to train on")
        if objective.needs_scores:
            require_probabilities(
                torch.tensor([score for p in job.pairs for score in (p.chosen_score, p.rejected_score)])
            )
        if objective.needs_origin and not job.drawn_from_reference:
            raise TrainingError(
                "dpo.xpo_alpha needs answers drawn from the reference: the round's source must be its reference "
                "(source: current with reference: prior, or source: initial with reference: initial)"
            )

    def _tolerance(self, dpo: DPOSpec) -> float:
        return self._rounding() if dpo.engine_gap_tolerance is None else dpo.engine_gap_tolerance

    def _rounding(self) -> float:
        return 1e-3 if self.model.dtype == torch.float32 else 0.05

    def _checkpoint(self, job: TrainJob, objective: Objective) -> RoundCheckpoint | None:
        if self.save_every is None or job.checkpoint is None:
            return None
        policies = [job.policy.digest, job.reference.digest, job.source and job.source.digest]
        pairs = [
            [p.prompt.token_ids, p.chosen.token_ids, p.rejected.token_ids, p.chosen_score, p.rejected_score]
            for p in job.pairs
        ]
        # The digest is of a loss of the user's own: its source may change while its name and its keys do not.
        key = digest_json([policies, pairs, job.dpo.model_dump(mode="json"), objective.digest, job.seed])
        return RoundCheckpoint(job.checkpoint, key)

    def _steps(
        self, job: TrainJob, loss: StepLoss, checkpoint: RoundCheckpoint | None
    ) -> Iterator[tuple[TrainStep, StepSums | None]]:
        """Every step, with its sums; without them where a checkpoint has it."""
        optimiser = make_optimiser(self.model.trainable, job.dpo)
        batches = batch_order(len(job.pairs), job.dpo, job.seed)
        progress = Progress() if checkpoint is None else checkpoint.load(self.model.trainable, optimiser)
        yield from ((step, None) for step in progress.steps)
        for number in range(len(progress.steps), len(batches)):
            began = time.perf_counter()
            batch = batches[number]
            lr = learning_rate(number, len(batches), job.dpo)
            for group in optimiser.param_groups:
                group["lr"] = lr
            self.model.clear_gradients(optimiser)
            sums = loss.backward(batch, progress.delta)
            norm = self._gradient_norm(job.dpo)
            step = reported(sums, len(batch), number + 1, len(batches), norm, lr)
            optimiser.step()
            step = replace(step, seconds=time.perf_counter() - began)
            progress = advanced(progress, step, sums, len(batch))
            # Before it is kept: a first step that is refused must not be there when the round is tried again.
            yield step, sums
            if checkpoint is not None and self.save_every and (number + 1) % self.save_every == 0:
                self._keep(checkpoint, progress, optimiser)

    def _gradient_norm(self, dpo: DPOSpec) -> float:
        """The gradients of all workers added, their norm, and they themselves clipped to `dpo.clip`."""
        if not self.model.sharded:  # shares were added as each was computed
            sum_gradients(self.model.trainable)
        return float(whole(torch.nn.utils.clip_grad_norm_(self.model.trainable, dpo.clip)))

    def _keep(self, checkpoint: RoundCheckpoint, progress: Progress, optimiser: torch.optim.Optimizer) -> None:
        if self.model.rank == 0 or self.model.sharded:
            checkpoint.save(progress, self.model.trainable, optimiser)

    def _save(self, job: TrainJob) -> Policy:
        saved: list[Policy] = []
        if self.model.rank == 0 or self.model.sharded:
            saved = [self.model.save(job.policy_id, job.out, self.probe_token_ids)]
        if self.model.rank == 0:
            write_policy(saved[0])
        (policy,) = from_first(saved)
        self.model.loaded = policy.digest
        return policy


def reported(sums: StepSums, pairs: int, number: int, of: int, norm: float, lr: float) -> TrainStep:
    """What a step reports: means over its pairs. Raises `TrainingError` on a loss or gradient that is not finite."""
    loss = sums.loss / pairs
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise TrainingError(f"step {number} of {of}: loss {loss}, gradient norm {norm}; the last good policy is kept")
    return TrainStep(
        step=number,
        steps=of,
        loss=loss,
        margin=sums.margin / pairs,
        accuracy=sums.wins / pairs,
        grad_norm=norm,
        lr=lr,
        r_w=sums.r_w / pairs,
        r_l=sums.r_l / pairs,
        tokens=sums.tokens,
        seconds=0.0,
    )


def advanced(progress: Progress, step: TrainStep, sums: StepSums, pairs: int) -> Progress:
    """`progress` one step on; δ is the mean reward over all pairs so far."""
    seen = progress.seen + pairs
    return Progress((*progress.steps, step), (progress.delta * progress.seen + sums.reward) / seen, seen)


def batch_order(pairs: int, dpo: DPOSpec, seed: int) -> list[list[int]]:
    """Indices of each optimiser step's pairs: every epoch a fresh seeded permutation, cut into batches."""
    generator = torch.Generator().manual_seed(seed)
    batches: list[list[int]] = []
    for _ in range(dpo.epochs):
        order = torch.randperm(pairs, generator=generator).tolist()
        batches.extend(order[i : i + dpo.batch_size] for i in range(0, pairs, dpo.batch_size))
    return batches


def check_first_step(step: TrainStep, start: TrainStart, expected: float, dpo: DPOSpec, tolerance: float) -> None:
    """Policy = reference gives margin 0, and of the plain DPO loss ln 2 (Rafailov 2023 eq. 7 at Δ = 0).

    `expected`: the loss that this arm's objective has at policy = reference. Where the reference's log-probs are the
    engine's, Δ may be off by the gap between engine and learner, twice what a few pairs showed on each side; another
    packing moves float32 by less. The margin is β·Δ, and the plain loss is no steeper in Δ; other losses and some
    modifiers are, so the margin alone is looked at there. Raises `TrainingError`.
    """
    gap = (start.engine_gap_sequence or 0.0) if start.reference_from == "engine" else 0.0
    allowed = dpo.beta * max(4 * gap, 20 * tolerance)
    steeper = dpo.loss != "sigmoid" or dpo.dpop_lambda or dpo.wpo_weight or dpo.importance_clip
    off = not steeper and abs(step.loss - expected) > allowed
    if abs(step.margin) > allowed or off:
        raise TrainingError(
            f"the first step of a fresh round must have loss {expected:.4f} and margin 0, found loss "
            f"{step.loss:.4f} and margin {step.margin:.4f}: the reference's log-probs are not this policy's"
        )
