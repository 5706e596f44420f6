"""What combines with any loss: changes to log-ratios, weights of tokens and of pairs, terms beside the loss.

Notation as in `losses`. |w| and |l| are the completions' lengths in tokens, the end token included. "sg" (stop
gradient): the value is a constant for the gradient. Completions are ragged: their tokens stand one after the other,
N in all, `lengths` says how many each has. All raise `ValueError` on inputs of other shapes than said.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from online_dpo.losses import LogRatios, require_pairs


def owners(lengths: Tensor, tokens: int) -> Tensor:
    """The completion that each of N = `tokens` tokens belongs to: [N] long, for `lengths` [completions]."""
    # The size is given: on a GPU torch would otherwise wait for the lengths.
    return torch.repeat_interleave(lengths, output_size=tokens)


def length_normalize(r: LogRatios, lengths_w: Tensor, lengths_l: Tensor) -> LogRatios:
    """Each log-ratio divided by its own completion's length: nats a token. All inputs [pairs]."""
    require_pairs(*r, lengths_w, lengths_l)
    return LogRatios(r.r_w / lengths_w, r.r_l / lengths_l)


def dpop(r: LogRatios, weight: float) -> LogRatios:
    """r_w ← r_w − λ·max(0, −r_w), λ = `weight`: a chosen answer that falls below the reference counts λ + 1 times.

    Pal et al. 2024, "Smaug: Fixing Failure Modes of Preference Optimisation with DPO-Positive" (arXiv 2402.13228).
    """
    require_pairs(*r)
    return LogRatios(r.r_w - weight * F.relu(-r.r_w), r.r_l)


def length_penalty(r: LogRatios, lengths_w: Tensor, lengths_l: Tensor, alpha: float, beta: float) -> LogRatios:
    """r ← r + (α/β)·length, of both answers, so βΔ ← βΔ + α(|w| − |l|): a longer chosen answer is pushed less.

    It maximises a reward less α a token. Park et al. 2024, "Disentangling Length from Quality in Direct Preference
    Optimization" (arXiv 2403.19159), eq. 9. All inputs [pairs].
    """
    require_pairs(*r, lengths_w, lengths_l)
    # A number times whole lengths would be float32, whatever r is.
    each = alpha / beta
    return LogRatios(r.r_w + each * lengths_w.to(r.r_w.dtype), r.r_l + each * lengths_l.to(r.r_l.dtype))


def ld_weights(values: Tensor, lengths: Tensor, shared: Tensor, alpha: float) -> Tensor:
    """Weight of each token of `values` [N], in its dtype, shape [N]: 1 up to the pair's shared length, α past it.

    `lengths`, `shared`: [completions] long, the completion's own length and min(|w|, |l|) of its pair. For policy and
    reference alike. Liu et al. 2024, "Length Desensitization in Direct Preference Optimization" (arXiv 2409.06411).
    """
    require_pairs(lengths, shared)
    tokens = len(values)
    owner = owners(lengths, tokens)
    first = torch.cumsum(lengths, 0) - lengths
    position = torch.arange(tokens, device=lengths.device) - first[owner]
    return torch.ones_like(values).masked_fill(position >= shared[owner], alpha)


def wpo_weight(aligned_w: Tensor, aligned_l: Tensor) -> Tensor:
    """sg: the pair's weight e^(a_w)·e^(a_l), shape [pairs].

    a: [pairs], mean over a completion's tokens of log π(y_t) − log Σ_v p_v²; Σ_v p_v² is the probability that a token
    of the policy's own would have on average, so a is about 0 for an answer that the policy might have sampled.
    Zhou et al. 2024, "WPO: Enhancing RLHF with Weighted Preference Optimization" (arXiv 2406.11827), eq. 2 with its
    sampled alignment.
    """
    require_pairs(aligned_w, aligned_l)
    return torch.exp(aligned_w.detach() + aligned_l.detach())


def importance_weight(pi_w: Tensor, pi_l: Tensor, mu_w: Tensor, mu_l: Tensor, clip: float) -> Tensor:
    """sg: min(c, π(w)π(l) / (μ(w)μ(l))), the pair's weight, shape [pairs]; c = `clip`.

    Inputs: log-probs [pairs] summed over tokens, of the policy π and of the policy μ that sampled the answers.
    Truncated importance sampling: Ionides 2008, "Truncated Importance Sampling", here of whole sequences.
    """
    require_pairs(pi_w, pi_l, mu_w, mu_l)
    log_weight = (pi_w - mu_w + pi_l - mu_l).detach()
    # Clipped before the exponential, which could overflow.
    return torch.exp(log_weight.clamp(max=math.log(clip)))


def nll(pi_w: Tensor, lengths_w: Tensor) -> Tensor:
    """−log π(w)/|w|, shape [pairs]: the term that α weighs beside the loss.

    `pi_w`: [pairs], summed over the tokens. Pang et al. 2024, "Iterative Reasoning Preference Optimization"
    (arXiv 2404.19733), eq. 1.
    """
    require_pairs(pi_w, lengths_w)
    return -pi_w / lengths_w


def exploration(pi_w: Tensor, pi_l: Tensor, from_ref_w: Tensor, from_ref_l: Tensor) -> Tensor:
    """The mean log π (summed over tokens) of those of a pair's answers that the reference sampled; 0 where none was.

    Shape [pairs]; `from_ref_*`: [pairs] bool. With weight α > 0 beside the loss it pushes the policy away from what
    the reference would say: the optimism of Xie et al. 2024, "Exploratory Preference Optimization"
    (arXiv 2405.21046), algorithm 1, where one answer of each pair is the reference's.
    """
    require_pairs(pi_w, pi_l, from_ref_w, from_ref_l)
    total = torch.where(from_ref_w, pi_w, 0.0) + torch.where(from_ref_l, pi_l, 0.0)
    return total / (from_ref_w.int() + from_ref_l.int()).clamp(min=1)
