"""Training a reward model on one worker of a group (or alone). Knows no Ray."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from online_dpo.backends.distributed import from_first, gathered, rank_and_world, sum_gradients, summed
from online_dpo.backends.learner import batch_order
from online_dpo.backends.optimiser import learning_rate, make_optimiser
from online_dpo.backends.reward_network import RewardNetwork
from online_dpo.errors import TrainingError
from online_dpo.losses import bradley_terry
from online_dpo.reward_pairs import TokenPair
from online_dpo.reward_spec import RewardSpec


@dataclass(frozen=True, slots=True)
class RewardStep:
    """One optimiser step, over its whole batch: `pairs` of them.

    `margin`: mean r_w − r_l; `accuracy`: share of pairs with r_w > r_l, ties one half; `tokens`: of both texts.
    """

    step: int
    steps: int
    pairs: int
    loss: float
    margin: float
    accuracy: float
    grad_norm: float
    lr: float
    tokens: int
    seconds: float


class LocalRewardTrainer:
    """One of `world` equal workers when a group was joined."""

    def __init__(self, network: RewardNetwork) -> None:
        self.network = network
        self.rank, self.world = rank_and_world()

    def train(self, pairs: Sequence[TokenPair], spec: RewardSpec) -> Iterator[RewardStep]:
        """`spec.epochs` passes over `pairs`; every worker runs it whole. An adapter is merged at the end.

        Raises `TrainingError` for no pairs, and before the step whose loss or gradient is not finite.
        """
        if not pairs:
            raise TrainingError("no pairs to train on")
        settings = spec.steps()
        trainable = self.network.trainable
        optimiser = make_optimiser(trainable, settings)
        batches = batch_order(len(pairs), settings, spec.seed)
        for number, batch in enumerate(batches):
            began = time.perf_counter()
            lr = learning_rate(number, len(batches), settings)
            for group in optimiser.param_groups:
                group["lr"] = lr
            optimiser.zero_grad(set_to_none=True)
            stats = self._backward([pairs[i] for i in batch], spec)
            sum_gradients(trainable)
            norm = float(torch.nn.utils.clip_grad_norm_(trainable, settings.clip))
            loss, margin, accuracy = (stats[:3] / len(batch)).tolist()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise TrainingError(
                    f"step {number + 1} of {len(batches)}: loss {loss}, gradient norm {norm}; nothing was saved"
                )
            optimiser.step()
            yield RewardStep(
                step=number + 1,
                steps=len(batches),
                pairs=len(batch),
                loss=loss,
                margin=margin,
                accuracy=accuracy,
                grad_norm=norm,
                lr=lr,
                tokens=int(stats[3]),
                seconds=time.perf_counter() - began,
            )
        self.network.merge()

    def scores(self, rows: Sequence[Sequence[int]], batch_size: int) -> list[float]:
        """The reward of each row of token ids. Workers share the rows."""
        return gathered(self.network.scores(rows[self.rank :: self.world], batch_size))

    def save(self, out: Path) -> None:
        """Worker 0 saves the model in the empty folder `out`; all return when it is there."""
        if self.rank == 0:
            self.network.save(out)
        from_first(None)

    def _backward(self, batch: Sequence[TokenPair], spec: RewardSpec) -> Tensor:
        """Gradients of the batch's mean loss, accumulated over this worker's micro-batches.

        Each micro-batch's summed loss is divided by the whole batch's size, so the gradient is that of the mean over
        the batch whatever the micro-batch size and the number of workers. Pairs of like length go together.
        Returns sums over the batch: loss, margin, wins, tokens.
        """
        stats = torch.zeros(4, dtype=torch.float64)
        mine = sorted(batch, key=lambda pair: pair.tokens, reverse=True)[self.rank :: self.world]
        for start in range(0, len(mine), spec.micro_batch_size):
            part = mine[start : start + spec.micro_batch_size]
            rewards = self.network.rewards([row for pair in part for row in (pair.chosen, pair.rejected)])
            r_w, r_l = rewards[0::2], rewards[1::2]
            losses = bradley_terry(r_w, r_l, spec.centre)
            (losses.sum() / len(batch)).backward()  # type: ignore[no-untyped-call]
            margins = (r_w - r_l).detach()
            wins = (margins > 0).double() + 0.5 * (margins == 0).double()
            sums = torch.stack([values.double().sum() for values in (losses.detach(), margins, wins)])
            stats[:3] += sums.cpu()
            stats[3] += sum(pair.tokens for pair in part)
        return summed(stats.to(self.network.device)).cpu()
