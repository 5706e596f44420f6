"""DPO on one worker of a group (or alone): the step, the reference's log-probs, the checks. Knows no Ray."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from online_dpo.backends.distributed import from_first, gathered, rank_and_world, sum_gradients, summed
from online_dpo.backends.optimiser import learning_rate, make_optimiser
from online_dpo.backends.policy_model import Item, PolicyModel
from online_dpo.config import DPOSpec
from online_dpo.errors import TrainingError
from online_dpo.losses import LN2, implicit_rewards, log_ratios, sigmoid
from online_dpo.policies import write_policy
from online_dpo.protocols import TrainStart, TrainStep
from online_dpo.types import Candidate, Pair, Policy, Probe, Prompt

GAP_SAMPLE = 4
"""Pairs on which the engine's stored log-probs are held against the learner's own, every round."""


class PairSums(NamedTuple):
    """Summed reference log-probs of all pairs, each [pairs], float32."""

    ref_w: Tensor
    ref_l: Tensor


def chosen_item(pair: Pair) -> Item:
    """Prompt and chosen completion, as sampled."""
    return pair.prompt.token_ids, pair.chosen.token_ids


def rejected_item(pair: Pair) -> Item:
    """Prompt and rejected completion, as sampled."""
    return pair.prompt.token_ids, pair.rejected.token_ids


class LocalLearner:
    """Implements `protocols.Learner` in this process; one of `world` equal workers when a group was joined."""

    def __init__(self, model: PolicyModel, probe_token_ids: Sequence[int], *, share_gpu: bool = False) -> None:
        self.model = model
        self.share_gpu = share_gpu
        self.probe_token_ids = tuple(probe_token_ids)
        self.rank, self.world = rank_and_world()

    def train(
        self,
        policy: Policy,
        reference: Policy,
        source: Policy,
        pairs: Sequence[Pair],
        dpo: DPOSpec,
        *,
        policy_id: str,
        out: Path,
        seed: int,
    ) -> Iterator[TrainStart | TrainStep | Policy]:
        """See `protocols.Learner.train`. Every worker runs it whole; worker 0 saves."""
        if not pairs:
            raise TrainingError("no pairs to train on")
        sums, start = self._reference_sums(reference, source, pairs, dpo)
        yield start
        self.model.load(policy, seed)
        # From the first step on, the weights in memory are no saved policy's.
        self.model.loaded = None
        expect_zero = policy.digest == reference.digest
        for step in self._steps(pairs, sums, dpo, seed):
            if expect_zero and step.step == 1:
                # A tolerance of zero asks for computed references; their forward still rounds.
                check_first_step(step, start, dpo.beta, max(self._tolerance(dpo), self._rounding()))
            yield step
        yield self._save(policy_id, out)

    def score(self, policy: Policy, items: Sequence[tuple[Prompt, Candidate]]) -> list[list[float]]:
        """See `protocols.Learner.score`. Workers share the items."""
        self.model.load(policy)
        mine = [(prompt.token_ids, answer.token_ids) for prompt, answer in items[self.rank :: self.world]]
        return gathered(self.model.per_token(mine, batch_size=8))

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

    def _reference_sums(
        self, reference: Policy, source: Policy, pairs: Sequence[Pair], dpo: DPOSpec
    ) -> tuple[PairSums, TrainStart]:
        """The reference's log-probs: the engine's stored ones where they are the reference's own and agree."""
        # Every worker must take the same branch: beside the tolerance, their rounding could differ.
        gap_token, gap_sequence = from_first(self._engine_gap(source, pairs, dpo))
        if reference.digest == source.digest and gap_token <= self._tolerance(dpo):
            stored = [(sum(p.chosen.logprobs), sum(p.rejected.logprobs)) for p in pairs]
            return _pair_sums(stored), TrainStart("engine", gap_token, gap_sequence)
        self.model.load(reference)
        return self._computed_sums(pairs, dpo), TrainStart("learner", gap_token, gap_sequence)

    def _engine_gap(self, source: Policy, pairs: Sequence[Pair], dpo: DPOSpec) -> tuple[float, float]:
        """Largest |engine − learner| log-prob at the source's own weights, a token and a sequence, on a few pairs."""
        self.model.load(source)
        spread = [pairs[i * len(pairs) // min(GAP_SAMPLE, len(pairs))] for i in range(min(GAP_SAMPLE, len(pairs)))]
        answers = [a for p in spread for a in (p.chosen, p.rejected)]
        items = [item for p in spread for item in (chosen_item(p), rejected_item(p))]
        own = self.model.per_token(items, batch_size=2 * dpo.micro_batch_size)
        tokens = [
            mine - theirs
            for values, answer in zip(own, answers, strict=True)
            for mine, theirs in zip(values, answer.logprobs, strict=True)
        ]
        return _largest(tokens), _largest([sum(v) - sum(a.logprobs) for v, a in zip(own, answers, strict=True)])

    def _computed_sums(self, pairs: Sequence[Pair], dpo: DPOSpec) -> PairSums:
        """One pass without gradients under the weights that are loaded now; workers share the pairs."""
        mine = pairs[self.rank :: self.world]
        items = [item for p in mine for item in (chosen_item(p), rejected_item(p))]
        values = [sum(v) for v in self.model.per_token(items, batch_size=2 * dpo.micro_batch_size)]
        return _pair_sums(gathered(list(zip(values[0::2], values[1::2], strict=True))))

    def _steps(self, pairs: Sequence[Pair], sums: PairSums, dpo: DPOSpec, seed: int) -> Iterator[TrainStep]:
        optimiser = make_optimiser(self.model.trainable, dpo)
        batches = batch_order(len(pairs), dpo, seed)
        for number, batch in enumerate(batches):
            began = time.perf_counter()
            lr = learning_rate(number, len(batches), dpo)
            for group in optimiser.param_groups:
                group["lr"] = lr
            optimiser.zero_grad(set_to_none=True)
            stats = self._backward(pairs, sums, batch, dpo)
            sum_gradients(self.model.trainable)
            norm = float(torch.nn.utils.clip_grad_norm_(self.model.trainable, dpo.clip))
            loss, margin, accuracy, r_w, r_l = (stats[:5] / len(batch)).tolist()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise TrainingError(
                    f"step {number + 1} of {len(batches)}: loss {loss}, gradient norm {norm}; "
                    "the last good policy is kept"
                )
            optimiser.step()
            yield TrainStep(
                step=number + 1,
                steps=len(batches),
                loss=loss,
                margin=margin,
                accuracy=accuracy,
                grad_norm=norm,
                lr=lr,
                r_w=r_w,
                r_l=r_l,
                tokens=int(stats[5]),
                seconds=time.perf_counter() - began,
            )

    def _backward(self, pairs: Sequence[Pair], sums: PairSums, batch: Sequence[int], dpo: DPOSpec) -> Tensor:
        """Gradients of the batch's mean loss, accumulated over this worker's micro-batches.

        Each micro-batch's summed loss is divided by the whole batch's size, so the gradient is that of the mean over
        the batch whatever the micro-batch size and the number of workers.
        Returns sums over the batch: loss, margin, wins, r_w, r_l, tokens.
        """
        stats = torch.zeros(6, dtype=torch.float64)
        mine = batch[self.rank :: self.world]
        for start in range(0, len(mine), dpo.micro_batch_size):
            index = mine[start : start + dpo.micro_batch_size]
            items = [item for i in index for item in (chosen_item(pairs[i]), rejected_item(pairs[i]))]
            pi = self.model.sums(items)
            ref_w, ref_l = (s[list(index)].to(pi.device) for s in sums)
            r = log_ratios(pi[0::2], pi[1::2], ref_w, ref_l)
            losses = sigmoid(r, dpo.beta, dpo.label_smoothing)
            (losses.sum() / len(batch)).backward()  # type: ignore[no-untyped-call]
            reward_w, reward_l = implicit_rewards(r, dpo.beta)
            margins = reward_w - reward_l
            wins = (margins > 0).double() + 0.5 * (margins == 0).double()
            parts = (losses.detach(), margins, wins, r.r_w.detach(), r.r_l.detach())
            stats[:5] += torch.stack([part.double().sum() for part in parts]).cpu()
            stats[5] += sum(len(prompt) + len(completion) for prompt, completion in items)
        return summed(stats.to(self.model.device)).cpu()

    def _save(self, policy_id: str, out: Path) -> Policy:
        saved: list[Policy] = []
        if self.rank == 0:
            saved = [self.model.save(policy_id, out, self.probe_token_ids)]
            write_policy(saved[0])
        (policy,) = from_first(saved)
        self.model.loaded = policy.digest
        return policy


def batch_order(pairs: int, dpo: DPOSpec, seed: int) -> list[list[int]]:
    """Indices of each optimiser step's pairs: every epoch a fresh seeded permutation, cut into batches."""
    generator = torch.Generator().manual_seed(seed)
    batches: list[list[int]] = []
    for _ in range(dpo.epochs):
        order = torch.randperm(pairs, generator=generator).tolist()
        batches.extend(order[i : i + dpo.batch_size] for i in range(0, pairs, dpo.batch_size))
    return batches


def check_first_step(step: TrainStep, start: TrainStart, beta: float, tolerance: float) -> None:
    """Policy = reference gives loss ln 2 and margin 0 (Rafailov 2023 eq. 7 at Δ = 0); else log-probs are wrong.

    Where the reference's log-probs are the engine's, Δ may be off by the gap between engine and learner, twice what a
    few pairs showed on each side; a micro-batch's other padding moves float32 by less. The margin is β·Δ.
    """
    gap = start.engine_gap_sequence if start.reference_from == "engine" else 0.0
    allowed = beta * max(4 * gap, 20 * tolerance)
    if abs(step.margin) > allowed or abs(step.loss - LN2) > allowed:
        raise TrainingError(
            f"the first step of a fresh round must have loss ln 2 = {LN2:.4f} and margin 0, found loss "
            f"{step.loss:.4f} and margin {step.margin:.4f}: the reference's log-probs are not this policy's"
        )


def _largest(differences: Sequence[float]) -> float:
    """The largest absolute value; infinite when one is undefined (`max` would pass over a NaN)."""
    return max(math.inf if math.isnan(value) else abs(value) for value in differences)


def _pair_sums(values: Sequence[tuple[float, float]]) -> PairSums:
    table = torch.tensor(values, dtype=torch.float32)
    return PairSums(table[:, 0], table[:, 1])
