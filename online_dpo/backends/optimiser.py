"""The optimiser and the learning-rate schedule of one round."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from online_dpo.config import DPOSpec


def make_optimiser(parameters: Iterable[nn.Parameter], dpo: DPOSpec) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) over the trainable parameters; fresh in every round."""
    trainable = [p for p in parameters if p.requires_grad]
    return torch.optim.AdamW(
        trainable,
        lr=dpo.lr,
        betas=(dpo.adam_beta1, dpo.adam_beta2),
        weight_decay=dpo.weight_decay,
        fused=True,
    )


def learning_rate(step: int, steps: int, dpo: DPOSpec) -> float:
    """The rate of optimiser step `step` (0-based) of `steps`: linear warm-up, then constant, linear or cosine.

    Warm-up covers `dpo.warmup` of the steps and never begins at zero: with w warm-up steps the first runs at
    lr·1/(w+1). The decays reach zero one step past the last, so that no step is wasted.
    """
    warmup = int(dpo.warmup * steps)
    if step < warmup:
        return dpo.lr * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    if dpo.schedule == "linear":
        return dpo.lr * (1 - progress)
    if dpo.schedule == "cosine":
        return dpo.lr * 0.5 * (1 + math.cos(math.pi * progress))
    return dpo.lr
