"""REINFORCE leave-one-out (RLOO): the policy gradient that stands beside DPO. Pure torch.

Notation as in `losses`; beside it: y_1 … y_n the n ≥ 2 judged answers to one prompt x, s_i the judge's score of y_i,
μ the policy that sampled them, β `kl`, c `clip`, sg stop-gradient. Log-probs are summed over an answer's tokens.

What is maximised is J(π) = E_{y~π}[s(y) − β·log(π(y|x)/π_ref(y|x))] (Ziegler et al. 2019, eq. 2; Rafailov et al. 2023,
eq. 3). With R(y) = s(y) − β·log(π(y|x)/π_ref(y|x)) its gradient is

    ∇J = E_{y~π}[R(y)·∇log π(y|x)] = E_{y~μ}[(π(y|x)/μ(y|x))·R(y)·∇log π(y|x)]:

the gradient of R itself adds −β·E_π[∇log π(y|x)], which is 0, since probabilities add up to 1. For the same reason any
number that does not depend on y_i may be taken from R(y_i): here the mean reward of the prompt's other answers, which
were drawn independently of it. So with

    A_i = R_i − 1/(n−1)·Σ_{j≠i} R_j,   w_i = min(π(y_i|x)/μ(y_i|x), c),
    L = −(1/n)·Σ_i sg(w_i·A_i)·log π(y_i|x)

the expectation of ∇L is −∇J, but for the weights that were cut at c. At the first step on answers of the policy's own
every weight is 1, and ∇L is −1 times the estimator of the paper.

Ahmadian et al. 2024, "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in
LLMs" (arXiv 2402.14740); the baseline: Kool et al. 2019, "Buy 4 REINFORCE Samples, Get a Baseline for Free!". In R
stands the policy that is trained, as in J, not the one that sampled: at the first step the two are the same, and later,
or where an older policy sampled, only this is the penalty of the policy that is to be held back.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Rloo(NamedTuple):
    """`loss`: L, a scalar with gradient. The others are [n], without: `advantages` A, `weights` w, and `log_ratios`
    log(π/π_ref), None where there is no reference.
    """

    loss: Tensor
    advantages: Tensor
    weights: Tensor
    log_ratios: Tensor | None


def rloo(log_pi: Tensor, log_mu: Tensor, log_ref: Tensor | None, scores: Tensor, kl: float, clip: float | None) -> Rloo:
    """One prompt's loss by all of its judged answers.

    `log_pi` (with gradient), `log_mu`, `log_ref`: [n], nats, summed over each answer's tokens. `scores`: [n]. `clip`
    None: answers are not weighed (w = 1). Raises `ValueError` on other shapes, on fewer than two answers, and where a
    penalty has no reference.
    """
    given = [part for part in (log_pi, log_mu, log_ref, scores) if part is not None]
    if {tuple(part.shape) for part in given} != {(len(log_pi),)} or len(log_pi) < 2:
        raise ValueError(f"all inputs must have one shape [n], n ≥ 2, found {[tuple(part.shape) for part in given]}")
    if kl and log_ref is None:
        raise ValueError("a penalty needs the reference's log-probs")
    pi = log_pi.detach()
    log_ratios = None if log_ref is None else pi - log_ref
    rewards = scores if log_ratios is None else scores - kl * log_ratios
    advantages = leave_one_out(rewards)
    weights = torch.ones_like(pi)
    if clip is not None:
        # Clipped before the exponential, which could overflow.
        weights = torch.exp((pi - log_mu).clamp(max=math.log(clip)))
    return Rloo(-(weights * advantages * log_pi).mean(), advantages, weights, log_ratios)


def leave_one_out(rewards: Tensor) -> Tensor:
    """A_i = R_i − 1/(n−1)·Σ_{j≠i} R_j, of n ≥ 2 rewards [n]. They add up to 0."""
    others = (rewards.sum() - rewards) / (len(rewards) - 1)
    return rewards - others
