"""The DPO loss: pure functions of log-probs.

Notation (one for the whole project): π the policy being trained, π_ref the reference, y_w the chosen and y_l the
rejected completion of prompt x; r = log π(y|x) − log π_ref(y|x), summed over completion tokens, the end token
included, prompt and padding never; Δ = r_w − r_l; σ the logistic function.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

LN2 = math.log(2.0)


class LogRatios(NamedTuple):
    """r_w and r_l of a batch of pairs, each of shape [pairs], float32 or float64, nats."""

    r_w: Tensor
    r_l: Tensor

    @property
    def delta(self) -> Tensor:
        """Δ = r_w − r_l, shape [pairs]."""
        return self.r_w - self.r_l


def log_ratios(pi_w: Tensor, pi_l: Tensor, ref_w: Tensor, ref_l: Tensor) -> LogRatios:
    """The log-ratios of summed completion log-probs, each of shape [pairs].

    Raises `ValueError` when the four shapes differ or are not one-dimensional.
    """
    shapes = {tuple(t.shape) for t in (pi_w, pi_l, ref_w, ref_l)}
    if len(shapes) != 1 or pi_w.dim() != 1:
        raise ValueError(f"the four log-probs must have one shape [pairs], found {sorted(shapes)}")
    return LogRatios(pi_w - ref_w, pi_l - ref_l)


def sigmoid(r: LogRatios, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Per-pair DPO loss, shape [pairs]: −(1−ε)·log σ(βΔ) − ε·log σ(−βΔ).

    ε = 0: Rafailov et al. 2023, "Direct Preference Optimization", eq. 7. ε > 0: conservative DPO, Mitchell 2023,
    eq. 3. The gradient with respect to Δ at Δ = 0 is −β(½ − ε).
    """
    epsilon = label_smoothing
    return -(1 - epsilon) * F.logsigmoid(beta * r.delta) - epsilon * F.logsigmoid(-beta * r.delta)


def implicit_rewards(r: LogRatios, beta: float) -> tuple[Tensor, Tensor]:
    """β·r_w and β·r_l, each [pairs], detached: the rewards that DPO's policy defines (Rafailov 2023, sec. 4)."""
    return beta * r.r_w.detach(), beta * r.r_l.detach()


def bradley_terry(r_w: Tensor, r_l: Tensor, centre: float = 0.0) -> Tensor:
    """Per-pair loss of a reward model, shape [pairs]: −log σ(r_w − r_l) + λ·(r_w + r_l)².

    Here r_w and r_l are the model's rewards of chosen and rejected answer, shape [pairs]; λ = `centre`. λ = 0:
    Christiano et al. 2017, eq. 1; Ouyang et al. 2022, "Training language models to follow instructions", eq. 1 (one
    pair a prompt). The first term leaves a constant of each prompt free; λ > 0 pulls a prompt's two rewards towards
    zero in sum: Eisenstein et al. 2023, "Helping or Herding?", sec. 2.
    Raises `ValueError` when the shapes differ or are not one-dimensional.
    """
    if r_w.shape != r_l.shape or r_w.dim() != 1:
        raise ValueError(f"both rewards must have one shape [pairs], found {tuple(r_w.shape)} and {tuple(r_l.shape)}")
    return -F.logsigmoid(r_w - r_l) + centre * (r_w + r_l).square()
