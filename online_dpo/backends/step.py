"""One optimiser step's loss and gradients by pairs: in passes, the objective on each pass, everything summed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from online_dpo.backends.distributed import gathered_by_index, summed
from online_dpo.backends.first_step import check_first_step
from online_dpo.backends.forward import ItemScores
from online_dpo.backends.policy_model import PolicyModel
from online_dpo.backends.reference_logps import PairLogps, scored_items, side_by_side, stored_logps
from online_dpo.backends.step_passes import StepPasses
from online_dpo.backends.stepping import StepSums
from online_dpo.losses import aot_reference, implicit_rewards
from online_dpo.objective import Objective, PairBatch, PairLosses, TokenLogps
from online_dpo.protocols import TrainJob, TrainStart, TrainStep
from online_dpo.seeds import derive_seed


class StepLoss:
    """A unit is a pair. See `Stepping`."""

    def __init__(self, model: PolicyModel, job: TrainJob, objective: Objective, reference: Sequence[PairLogps]) -> None:
        self.model = model
        self.job = job
        self.pairs = job.pairs
        self.beta = job.dpo.beta
        self.digest = objective.digest
        self.objective = objective
        self.reference = reference
        self.from_reference = job.drawn_from_reference
        self.items = scored_items(model, job)
        self.passes = StepPasses(model, self.items)

    def __len__(self) -> int:
        return len(self.pairs)

    def backward(self, batch: Sequence[int], delta: float) -> StepSums:
        """See `Stepping.backward`: each pass's summed loss is divided by the whole batch's size."""
        with self._dropout(batch):
            return self._backward(batch, delta)

    def _dropout(self, batch: Sequence[int]) -> AbstractContextManager[None]:
        """Where `dpo.faults` leave dropout on: noise by batch and worker, so that a step done again has the same."""
        if not self.job.dpo.faults.dropout:
            return nullcontext()
        return self.model.dropout(derive_seed(self.job.seed, "dropout", self.model.rank, *batch))

    def _backward(self, batch: Sequence[int], delta: float) -> StepSums:
        passes = self.passes.of(batch)
        of_rank = self._of_rank(batch, passes) if self.objective.needs_ranking else {}
        sums = torch.zeros(8, dtype=torch.float64)
        for chosen, counts in passes:
            found = self._scores(chosen)
            data = self._data(chosen, found, of_rank, delta)
            out = self.objective(data)
            (out.losses.sum() * (counts / len(batch))).backward()  # type: ignore[no-untyped-call]
            if counts:
                sums += self._sums(chosen, out, self.objective.at_reference(data).sum())
        loss, margin, wins, r_w, r_l, reward, expected, tokens = summed(sums.to(self.model.device)).tolist()
        return StepSums(loss, margin, wins, r_w, r_l, reward, expected, int(tokens))

    def check_first(self, step: TrainStep, sums: StepSums, units: int, start: TrainStart, tolerance: float) -> None:
        """Of a round that begins at its reference: `first_step.check_first_step`."""
        if self.reference and self.job.policy.digest == self.job.reference.digest and sums.expected is not None:
            check_first_step(step, start, sums.expected / units, self.job.dpo, tolerance)

    def _scores(self, chosen: Sequence[int]) -> ItemScores:
        return self.model.scores(side_by_side([self.items[i] for i in chosen]))

    def _data(self, chosen: Sequence[int], found: ItemScores, of_rank: dict[int, float], delta: float) -> PairBatch:
        pairs = [self.pairs[i] for i in chosen]
        objective = self.objective
        pi_w, pi_l = _sides(found.logps, found.lengths)
        ref = self._given([self.reference[i] for i in chosen], found) if self.reference else (None, None)
        mu = self._given(stored_logps(pairs), found) if objective.needs_behaviour else (None, None)
        collisions = _sides(found.collisions, found.lengths) if objective.needs_collision else (None, None)
        origin = torch.full((len(pairs),), self.from_reference, device=pi_w.values.device)
        return PairBatch(
            pi_w=pi_w,
            pi_l=pi_l,
            ref_w=ref[0],
            ref_l=ref[1],
            mu_w=mu[0],
            mu_l=mu[1],
            collision_w=collisions[0],
            collision_l=collisions[1],
            p_w=self._vector([pair.chosen_score for pair in pairs]) if objective.needs_scores else None,
            p_l=self._vector([pair.rejected_score for pair in pairs]) if objective.needs_scores else None,
            aot_margin_ref=self._vector([of_rank[i] for i in chosen]) if of_rank else None,
            from_ref_w=origin,
            from_ref_l=origin,
            bco_delta=delta,
        )

    @torch.no_grad()
    def _of_rank(self, batch: Sequence[int], passes: Sequence[tuple[list[int], int]]) -> dict[int, float]:
        """`aot_reference` of the whole batch by pair: one more forward, since ranks need every margin first."""
        margins: dict[int, tuple[float, float]] = {}
        for chosen, _ in passes:
            found = self._scores(chosen)
            of_pi, of_ref = self.objective.margins(self._data(chosen, found, {}, 0.0))
            margins.update(zip(chosen, zip(of_pi.tolist(), of_ref.tolist(), strict=True), strict=True))
        margins = gathered_by_index(margins)
        table = torch.tensor([margins[i] for i in batch])
        return dict(zip(batch, aot_reference(table[:, 0], table[:, 1]).tolist(), strict=True))

    def _sums(self, chosen: Sequence[int], out: PairLosses, expected: Tensor) -> Tensor:
        reward_w, reward_l = implicit_rewards(out.ratios, self.beta)
        margins = reward_w - reward_l
        wins = (margins > 0).double() + 0.5 * (margins == 0).double()
        reward = self.objective.mean_reward(out) * len(chosen)
        parts = (out.losses.detach(), margins, wins, out.ratios.r_w, out.ratios.r_l, reward, expected)
        tokens = torch.tensor(float(self.passes.tokens(chosen))).double()
        return torch.stack([*(part.double().sum().cpu() for part in parts), tokens])

    def _given(self, values: Sequence[PairLogps], found: ItemScores) -> tuple[TokenLogps, TokenLogps]:
        """Known log-probs in the form of `found`."""
        flat = [x for side in (0, 1) for pair in values for x in pair[side]]
        return _sides(self._vector(flat), found.lengths)

    def _vector(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.model.device)


def _sides(values: Tensor, lengths: Tensor) -> tuple[TokenLogps, TokenLogps]:
    """Per-token figures of chosen and of rejected completions, in the order of `items_of`."""
    pairs = len(lengths) // 2
    cut = int(lengths[:pairs].sum())
    return TokenLogps(values[:cut], lengths[:pairs]), TokenLogps(values[cut:], lengths[pairs:])
