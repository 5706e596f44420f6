"""What a step minimises: the arm's loss with its modifiers, from per-token log-probs to one value a pair.

The order: tokens are weighed (`ld_alpha`) and summed; log-ratios are formed, divided by their lengths
(`length_normalize`), changed (`dpop_lambda`, then `length_penalty`); the loss is taken; pairs are weighed
(`wpo_weight`, `importance_clip`); terms beside the loss are added, unweighed (`nll_weight`, `xpo_alpha`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from online_dpo import losses
from online_dpo.custom_loss import CustomLoss
from online_dpo.dpo_spec import REFERENCE_FREE, DPOSpec, LossSpec
from online_dpo.errors import TrainingError
from online_dpo.loss_modifiers import (
    dpop,
    exploration,
    importance_weight,
    ld_weights,
    length_normalize,
    length_penalty,
    nll,
    owners,
    wpo_weight,
)
from online_dpo.losses import LogRatios, log_ratios


@dataclass(frozen=True, eq=False, slots=True)
class TokenLogps:
    """A figure of every completion token, completions one after the other.

    `values`: [N], float32 or float64, nats. `lengths`: [completions] long on the same device, each at least 1, N in
    sum. Raises `ValueError` on other shapes (on a GPU the sum is not checked: that would wait for it).
    """

    values: Tensor
    lengths: Tensor

    def __post_init__(self) -> None:
        if self.values.dim() != 1 or self.lengths.dim() != 1:
            raise ValueError(
                f"values must be [N] and lengths [completions], found {tuple(self.values.shape)} and "
                f"{tuple(self.lengths.shape)}"
            )
        if self.lengths.device.type == "cpu" and (
            int(self.lengths.sum()) != len(self.values) or int(self.lengths.min()) < 1
        ):
            raise ValueError(f"lengths {self.lengths.tolist()} are not those of {len(self.values)} tokens")

    def sums(self, weights: Tensor | None = None) -> Tensor:
        """Σ_t values_t, or Σ_t weights_t·values_t, of each completion: [completions]."""
        values = self.values if weights is None else self.values * weights
        zeros = torch.zeros(len(self.lengths), dtype=values.dtype, device=values.device)
        return zeros.index_add(0, owners(self.lengths, len(values)), values)


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class PairBatch:
    """What an `Objective` may read of a batch of pairs; what its `needs_*` do not name may stay None.

    `pi_*` carry the gradient. `ref_*`: the reference's log-probs, `mu_*`: those of the policy that sampled the answers.
    `collision_*`: log Σ_v p_v² of the policy's next-token distribution at every token. `p_w`, `p_l`: [pairs], the
    judge's scores. `aot_margin_ref`: [pairs], `losses.aot_reference` of the whole optimiser batch, cut to these pairs.
    `from_ref_*`: [pairs] bool, whether the reference sampled the answer. `bco_delta`: the running mean of the rewards,
    read with `bco_running_mean` alone.
    Raises `ValueError` when log-probs of one answer have different numbers of tokens.
    """

    pi_w: TokenLogps
    pi_l: TokenLogps
    ref_w: TokenLogps | None = None
    ref_l: TokenLogps | None = None
    mu_w: TokenLogps | None = None
    mu_l: TokenLogps | None = None
    collision_w: TokenLogps | None = None
    collision_l: TokenLogps | None = None
    p_w: Tensor | None = None
    p_l: Tensor | None = None
    aot_margin_ref: Tensor | None = None
    from_ref_w: Tensor | None = None
    from_ref_l: Tensor | None = None
    bco_delta: float = 0.0

    def __post_init__(self) -> None:
        for pi, others in (
            (self.pi_w, (self.ref_w, self.mu_w, self.collision_w)),
            (self.pi_l, (self.ref_l, self.mu_l, self.collision_l)),
        ):
            size = (len(pi.values), len(pi.lengths))
            for other in others:
                if other is not None and (len(other.values), len(other.lengths)) != size:
                    raise ValueError(
                        f"log-probs of other tokens: {len(other.values)} in {len(other.lengths)} completions, "
                        f"the policy's are {size[0]} in {size[1]}"
                    )
        if len(self.pi_w.lengths) != len(self.pi_l.lengths):
            raise ValueError(f"{len(self.pi_w.lengths)} chosen and {len(self.pi_l.lengths)} rejected completions")


class PairLosses(NamedTuple):
    """`losses`: [pairs], with gradient. `ratios`: plain r_w and r_l, summed, unmodified, for reporting (zeros stand for
    the reference where there is none). `shaped`: the log-ratios that the loss saw. Both without gradient.
    """

    losses: Tensor
    ratios: LogRatios
    shaped: LogRatios


Part = TypeVar("Part")
Loss = Callable[[LogRatios, DPOSpec, PairBatch], Tensor]


def _sigmoid(r: LogRatios, dpo: DPOSpec, _: PairBatch) -> Tensor:
    return losses.sigmoid(r, dpo.beta, dpo.label_smoothing)


def _sppo(r: LogRatios, dpo: DPOSpec, batch: PairBatch) -> Tensor:
    p_w, p_l = _given(batch.p_w, "p_w"), _given(batch.p_l, "p_l")
    require_probabilities(torch.cat([p_w, p_l]))
    return losses.sppo(r, dpo.beta, p_w.to(r.r_w.dtype), p_l.to(r.r_w.dtype))


def require_probabilities(scores: Tensor) -> None:
    """`TrainingError` unless all `scores` lie in [0, 1]."""
    if not bool(((scores >= 0) & (scores <= 1)).all()):
        raise TrainingError(
            f"loss 'sppo' needs scores that are probabilities in [0, 1], found {scores.min():g} to {scores.max():g}: "
            "a pairwise judge with comparing.rank_by mean_win gives such"
        )


def _aot(r: LogRatios, dpo: DPOSpec, batch: PairBatch) -> Tensor:
    # Modifiers change Δ, which is against the pair's own reference margin: that one is put back first.
    of_rank = _given(batch.aot_margin_ref, "aot_margin_ref")
    return losses.aot(r.delta + pair_margins(batch, dpo)[1], of_rank, dpo.beta, dpo.label_smoothing)


BUILT_IN: dict[str, Loss] = {
    "sigmoid": _sigmoid,
    "sigmoid_norm": _sigmoid,
    "robust": lambda r, dpo, _: losses.robust(r, dpo.beta, dpo.label_smoothing),
    "hinge": lambda r, dpo, _: losses.hinge(r, dpo.beta),
    "ipo": lambda r, dpo, _: losses.ipo(r, dpo.beta),
    "simpo": lambda r, dpo, _: losses.simpo(r, dpo.beta, dpo.simpo_gamma),
    "exo_pair": lambda r, dpo, _: losses.exo_pair(r, dpo.beta, dpo.label_smoothing),
    "nca_pair": lambda r, dpo, _: losses.nca_pair(r, dpo.beta),
    "bco_pair": lambda r, dpo, batch: losses.bco_pair(r, dpo.beta, batch.bco_delta if dpo.bco_running_mean else 0.0),
    "sppo_hard": lambda r, dpo, _: losses.sppo_hard(r, dpo.beta),
    "sppo": _sppo,
    "aot": _aot,
    "apo_zero": lambda r, dpo, _: losses.apo_zero(r, dpo.beta),
    "apo_down": lambda r, dpo, _: losses.apo_down(r, dpo.beta),
    "discopop": lambda r, dpo, _: losses.discopop(r, dpo.beta, dpo.discopop_tau),
}


class Objective:
    """The arm's loss and modifiers. `folders`: where a loss of the user's own is looked for.

    Raises `ConfigError` or `TrainingError`, one line, when a loss of the user's own cannot be used, and `ValueError`
    for a loss that is not of pairs.
    """

    def __init__(self, dpo: DPOSpec, folders: Sequence[Path] = ()) -> None:
        if dpo.chosen_alone:
            raise ValueError(f"loss '{dpo.loss_name}' is of chosen answers alone, not of pairs")
        self.dpo = dpo
        self.needs_reference = dpo.loss_name not in REFERENCE_FREE
        self.needs_behaviour = dpo.importance_clip is not None
        self.needs_collision = dpo.wpo_weight
        self.needs_ranking = dpo.loss == "aot"
        self.needs_scores = dpo.loss == "sppo"
        self.needs_origin = dpo.xpo_alpha > 0
        self.digest: str | None = None
        if isinstance(dpo.loss, LossSpec):
            own = CustomLoss(dpo.loss, dpo.beta, folders)
            self.digest = own.digest
            self._loss: Loss = lambda r, _dpo, _batch: own(r)
        else:
            self._loss = BUILT_IN[dpo.loss]

    def __call__(self, batch: PairBatch) -> PairLosses:
        """One loss a pair. Raises `ValueError` when the batch lacks what the objective needs."""
        plain = self._ratios(batch)
        shaped = self._shaped(batch, plain)
        values = self._loss(shaped, self.dpo, batch)
        values = self._added(self._weighed(values, batch), batch)
        return PairLosses(values, _detached(plain), _detached(shaped))

    @torch.no_grad()
    def at_reference(self, batch: PairBatch) -> Tensor:
        """The losses [pairs] that the batch would have if policy and reference were the same, without gradient.

        ln 2 of a plain `sigmoid`: what the first step of a fresh round must show. Without a reference in the loss it
        is the batch's own losses, and shows nothing.
        """
        same = replace(batch, ref_w=batch.pi_w, ref_l=batch.pi_l, bco_delta=0.0)
        if self.needs_ranking:
            same = replace(same, aot_margin_ref=pair_margins(same, self.dpo)[1])
        values: Tensor = self(same).losses
        return values

    def margins(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """`pair_margins` under these settings: gather them over the optimiser batch for `losses.aot_reference`."""
        return pair_margins(batch, self.dpo)

    def mean_reward(self, out: PairLosses) -> Tensor:
        """A batch's part in the running mean δ of `bco_pair`: a scalar, the mean of the rewards that the loss saw."""
        return losses.mean_reward(out.shaped, self.dpo.beta)

    def describe(self) -> str:
        """One line for plan and report; see `DPOSpec.describe_loss`."""
        return self.dpo.describe_loss()

    def _ratios(self, batch: PairBatch) -> LogRatios:
        return _ratios(batch, (None, None), self.needs_reference)

    def _shaped(self, batch: PairBatch, plain: LogRatios) -> LogRatios:
        """What the loss sees: tokens weighed, lengths divided out, log-ratios changed."""
        dpo, lengths = self.dpo, (batch.pi_w.lengths, batch.pi_l.lengths)
        weights = _token_weights(batch, dpo)
        r = plain if weights[0] is None else _ratios(batch, weights, self.needs_reference)
        if dpo.averaged:
            r = length_normalize(r, *lengths)
        if dpo.dpop_lambda:
            r = dpop(r, dpo.dpop_lambda)
        if dpo.length_penalty:
            r = length_penalty(r, *lengths, dpo.length_penalty, dpo.beta)
        return r

    def _weighed(self, values: Tensor, batch: PairBatch) -> Tensor:
        if self.needs_collision:
            aligned = (
                _aligned(batch.pi_w, _given(batch.collision_w, "collision_w")),
                _aligned(batch.pi_l, _given(batch.collision_l, "collision_l")),
            )
            values = values * wpo_weight(*aligned)
        if self.dpo.importance_clip is not None:
            mu = (_given(batch.mu_w, "mu_w").sums(), _given(batch.mu_l, "mu_l").sums())
            values = values * importance_weight(batch.pi_w.sums(), batch.pi_l.sums(), *mu, self.dpo.importance_clip)
        return values

    def _added(self, values: Tensor, batch: PairBatch) -> Tensor:
        if self.dpo.nll_weight:
            values = values + self.dpo.nll_weight * nll(batch.pi_w.sums(), batch.pi_w.lengths)
        if self.needs_origin:
            drawn = _given(batch.from_ref_w, "from_ref_w"), _given(batch.from_ref_l, "from_ref_l")
            values = values + self.dpo.xpo_alpha * exploration(batch.pi_w.sums(), batch.pi_l.sums(), *drawn)
        return values


@torch.no_grad()
def pair_margins(batch: PairBatch, dpo: DPOSpec) -> tuple[Tensor, Tensor]:
    """log π(y_w|x) − log π(y_l|x) of policy and of reference, each [pairs], without gradient.

    With the arm's token weights and division by length, if any; the other modifiers have no part in a ranking.
    """
    weights = _token_weights(batch, dpo)
    sides = (
        (batch.pi_w, batch.pi_l),
        (_given(batch.ref_w, "ref_w"), _given(batch.ref_l, "ref_l")),
    )
    found = []
    for side_w, side_l in sides:
        sums = LogRatios(side_w.sums(weights[0]), side_l.sums(weights[1]))
        found.append((length_normalize(sums, side_w.lengths, side_l.lengths) if dpo.averaged else sums).delta)
    return found[0], found[1]


def _ratios(batch: PairBatch, weights: tuple[Tensor | None, Tensor | None], reference: bool) -> LogRatios:
    pi_w, pi_l = batch.pi_w.sums(weights[0]), batch.pi_l.sums(weights[1])
    if not reference:
        return log_ratios(pi_w, pi_l, torch.zeros_like(pi_w), torch.zeros_like(pi_l))
    ref_w, ref_l = _given(batch.ref_w, "ref_w"), _given(batch.ref_l, "ref_l")
    return log_ratios(pi_w, pi_l, ref_w.sums(weights[0]).detach(), ref_l.sums(weights[1]).detach())


def _token_weights(batch: PairBatch, dpo: DPOSpec) -> tuple[Tensor | None, Tensor | None]:
    if dpo.ld_alpha is None:
        return None, None
    w, rejected = batch.pi_w, batch.pi_l
    shared = torch.minimum(w.lengths, rejected.lengths)
    return (
        ld_weights(w.values, w.lengths, shared, dpo.ld_alpha),
        ld_weights(rejected.values, rejected.lengths, shared, dpo.ld_alpha),
    )


def _aligned(pi: TokenLogps, collision: TokenLogps) -> Tensor:
    """Mean over each completion's tokens of log π(y_t) − log Σ_v p_v²: [completions], without gradient."""
    return TokenLogps((pi.values - collision.values).detach(), pi.lengths).sums() / pi.lengths


def _detached(r: LogRatios) -> LogRatios:
    return LogRatios(r.r_w.detach(), r.r_l.detach())


def _given(part: Part | None, name: str) -> Part:
    if part is None:
        raise ValueError(f"the batch lacks '{name}', which this objective needs")
    return part
