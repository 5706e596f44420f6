"""One optimiser step's loss and gradients: its pairs in passes, the objective on each pass, everything summed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from online_dpo.backends.distributed import gathered_by_index, summed
from online_dpo.backends.forward import ItemScores
from online_dpo.backends.policy_model import PolicyModel
from online_dpo.backends.reference_logps import PairLogps, items_of, stored_logps
from online_dpo.losses import aot_reference, implicit_rewards
from online_dpo.objective import Objective, PairBatch, PairLosses, TokenLogps
from online_dpo.passes import deal, fill, tokens_of
from online_dpo.protocols import TrainJob


@dataclass(frozen=True, slots=True)
class StepSums:
    """Sums over a step's pairs: what they lost, how they were ranked, how far each side moved, what was computed.

    `reward`: Σ of each pass's mean reward times its pairs (for `bco_pair`). `expected`: Σ of the losses that policy =
    reference would give.
    """

    loss: float
    margin: float
    wins: float
    r_w: float
    r_l: float
    reward: float
    expected: float
    tokens: int


class StepLoss:
    """The loss of batches of one round's pairs; `backward` leaves the gradients of a batch's mean loss."""

    def __init__(self, model: PolicyModel, job: TrainJob, objective: Objective, reference: Sequence[PairLogps]) -> None:
        self.model = model
        self.pairs = job.pairs
        self.beta = job.dpo.beta
        self.objective = objective
        self.reference = reference
        self.from_reference = job.drawn_from_reference
        self.units = [items_of([pair]) for pair in self.pairs]
        self.costs = [tokens_of(unit, packed=model.forward.packed) for unit in self.units]

    def backward(self, batch: Sequence[int], delta: float) -> StepSums:
        """Gradients of the mean loss over the pairs `batch`, accumulated over this worker's passes.

        Each pass's summed loss is divided by the whole batch's size, so the gradient is that of the mean over the
        batch whatever the passes and the number of workers. `delta`: the running mean that `bco_pair` may use.
        """
        passes = self._passes(batch)
        of_rank = self._of_rank(batch, passes) if self.objective.needs_ranking else {}
        sums = torch.zeros(8, dtype=torch.float64)
        for chosen, counts in passes:
            found = self.model.scores(items_of([self.pairs[i] for i in chosen]))
            data = self._data(chosen, found, of_rank, delta)
            out = self.objective(data)
            (out.losses.sum() * (counts / len(batch))).backward()  # type: ignore[no-untyped-call]
            if counts:
                sums += self._sums(chosen, out, self.objective.at_reference(data).sum())
        loss, margin, wins, r_w, r_l, reward, expected, tokens = summed(sums.to(self.model.device)).tolist()
        return StepSums(loss, margin, wins, r_w, r_l, reward, expected, int(tokens))

    def _passes(self, batch: Sequence[int]) -> list[tuple[list[int], int]]:
        """This worker's passes, with 1 for those that count.

        Workers that hold shards of one model must make equally many passes: those that have fewer repeat one for
        nothing.
        """
        hands = deal([self.costs[i] for i in batch], self.model.world)
        cut = [self._cut([batch[i] for i in hand]) for hand in hands]
        passes = cut[self.model.rank]
        counted = [(chosen, 1) for chosen in passes]
        if self.model.sharded:
            spare = min(batch, key=lambda i: (self.costs[i], i))
            counted += [([spare], 0)] * (max(map(len, cut)) - len(passes))
        return counted

    def _cut(self, indices: Sequence[int]) -> list[list[int]]:
        filled = fill([self.units[i] for i in indices], self.model.tokens_per_pass, packed=self.model.forward.packed)
        return [[indices[i] for i in chosen] for chosen in filled]

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
            found = self.model.scores(items_of([self.pairs[i] for i in chosen]))
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
        items = [item for i in chosen for item in self.units[i]]
        tokens = tokens_of(items, packed=self.model.forward.packed)
        return torch.stack([*(part.double().sum().cpu() for part in parts), torch.tensor(float(tokens)).double()])

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
