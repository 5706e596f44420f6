"""The losses of the DPO family: pure functions of log-probs, one a loss, each giving one value a pair.

Notation (one for the whole project): π the policy being trained, π_ref the reference, y_w the chosen and y_l the
rejected completion of prompt x; r = log π(y|x) − log π_ref(y|x), summed over completion tokens, the end token
included, prompt and padding never; Δ = r_w − r_l; σ the logistic function; ε `label_smoothing`.

Whether r is a sum over tokens or divided by the completion's length is the caller's choice, made before
(`loss_modifiers.length_normalize`): no loss here divides by a length. All raise `ValueError` on log-ratios that are not
of one shape [pairs].
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
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


def require_pairs(*tensors: Tensor) -> None:
    """`ValueError` unless all `tensors` have one shape [pairs]: other shapes would broadcast to pairs never made."""
    shapes = {tuple(t.shape) for t in tensors}
    if len(shapes) != 1 or tensors[0].dim() != 1:
        raise ValueError(f"all inputs must have one shape [pairs], found {sorted(shapes)}")


def log_ratios(pi_w: Tensor, pi_l: Tensor, ref_w: Tensor, ref_l: Tensor) -> LogRatios:
    """The log-ratios of summed completion log-probs, each of shape [pairs].

    Raises `ValueError` when the four shapes differ or are not one-dimensional.
    """
    require_pairs(pi_w, pi_l, ref_w, ref_l)
    return LogRatios(pi_w - ref_w, pi_l - ref_l)


def sigmoid(r: LogRatios, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Per-pair DPO loss, shape [pairs]: −(1−ε)·log σ(βΔ) − ε·log σ(−βΔ).

    ε = 0: Rafailov et al. 2023, "Direct Preference Optimization", eq. 7. ε > 0: conservative DPO, Mitchell 2023,
    eq. 3. The gradient with respect to Δ at Δ = 0 is −β(½ − ε).
    On log-ratios divided by their lengths it is `sigmoid_norm` (Rafailov et al. 2024, "Scaling Laws for Reward Model
    Overoptimization in Direct Alignment Algorithms"; Meng et al. 2024).
    """
    require_pairs(*r)
    epsilon = label_smoothing
    return -(1 - epsilon) * F.logsigmoid(beta * r.delta) - epsilon * F.logsigmoid(-beta * r.delta)


def robust(r: LogRatios, beta: float, label_smoothing: float) -> Tensor:
    """Per-pair loss that is unbiased under flipped labels: [−(1−ε)·log σ(βΔ) + ε·log σ(−βΔ)] / (1−2ε).

    Its mean over flips with rate ε is the clean `sigmoid`. ε in [0, ½). It is not bounded below: where ε > 0 it falls
    for ever with Δ. Chowdhury et al. 2024, "Provably Robust DPO" (arXiv 2403.00409), sec. 3.1.
    """
    require_pairs(*r)
    epsilon = label_smoothing
    if not 0.0 <= epsilon < 0.5:
        raise ValueError(f"robust: label_smoothing must lie in [0, 0.5), found {epsilon}")
    clean, flipped = -F.logsigmoid(beta * r.delta), -F.logsigmoid(-beta * r.delta)
    return ((1 - epsilon) * clean - epsilon * flipped) / (1 - 2 * epsilon)


def hinge(r: LogRatios, beta: float) -> Tensor:
    """Per-pair loss max(0, 1 − βΔ).

    Zhao et al. 2023, "SLiC-HF" (arXiv 2305.10425), sec. 2; with log-ratios to a reference in place of log-probs: Liu
    et al. 2023, "Statistical Rejection Sampling Improves Preference Optimization" (arXiv 2309.06657), its hinge-norm.
    """
    require_pairs(*r)
    return F.relu(1 - beta * r.delta)


def ipo(r: LogRatios, beta: float) -> Tensor:
    """Per-pair loss (Δ − 1/(2β))², with optimum Δ* = 1/(2β); β is the paper's τ.

    Azar et al. 2023, "A General Theoretical Paradigm to Understand Learning from Human Preferences"
    (arXiv 2310.12036), eq. 17. The paper's log-ratios are sums; others average them under the same name.
    """
    require_pairs(*r)
    return (r.delta - 1 / (2 * beta)).square()


def simpo(log_pi: LogRatios, beta: float, gamma: float) -> Tensor:
    """Per-pair loss −log σ(β·(log π(w)/|w| − log π(l)/|l|) − γ), without a reference.

    `log_pi`: the policy's own log-probs, each divided by its length already. Meng et al. 2024, "SimPO"
    (arXiv 2405.14734), eq. 6; its tables give γ/β.
    """
    require_pairs(*log_pi)
    return -F.logsigmoid(beta * log_pi.delta - gamma)


def exo_pair(r: LogRatios, beta: float, label_smoothing: float) -> Tensor:
    """Per-pair loss KL(p ‖ q), p = (σ(βΔ), σ(−βΔ)) and q = (1−ε, ε); ε in (0, 1). Zero where βΔ = ln((1−ε)/ε).

    σ(βΔ)·[log σ(βΔ) − log(1−ε)] + σ(−βΔ)·[log σ(−βΔ) − log ε]: Ji et al. 2024, "Towards Efficient Exact
    Optimization of Language Model Alignment" (arXiv 2402.00856), eq. 16.
    """
    require_pairs(*r)
    epsilon = label_smoothing
    if not 0.0 < epsilon < 1.0:
        raise ValueError(f"exo_pair: label_smoothing must lie in (0, 1), found {epsilon}")
    z = beta * r.delta
    chosen = torch.sigmoid(z) * (F.logsigmoid(z) - math.log1p(-epsilon))
    return chosen + torch.sigmoid(-z) * (F.logsigmoid(-z) - math.log(epsilon))


def nca_pair(r: LogRatios, beta: float) -> Tensor:
    """Per-pair loss −log σ(βr_w) − ½·log σ(−βr_w) − ½·log σ(−βr_l): both answers pulled to where they stand.

    Chen et al. 2024, "Noise Contrastive Alignment of Language Models with Explicit Rewards" (arXiv 2402.05369),
    sec. 4.1.
    """
    require_pairs(*r)
    z_w, z_l = beta * r.r_w, beta * r.r_l
    return -F.logsigmoid(z_w) - 0.5 * F.logsigmoid(-z_w) - 0.5 * F.logsigmoid(-z_l)


def bco_pair(r: LogRatios, beta: float, delta: float = 0.0) -> Tensor:
    """Per-pair loss −log σ(βr_w − δ) − log σ(−(βr_l − δ)): a classifier of chosen and rejected answers.

    δ: the running mean of the rewards βr (`mean_reward` gives one batch's), or 0. Jung et al. 2024, "Binary
    Classifier Optimization for Large Language Model Alignment" (arXiv 2404.04656), sec. 4.
    """
    require_pairs(*r)
    return -F.logsigmoid(beta * r.r_w - delta) - F.logsigmoid(-(beta * r.r_l - delta))


def mean_reward(r: LogRatios, beta: float) -> Tensor:
    """½(mean βr_w + mean βr_l), a scalar without gradient: a batch's part in the δ of `bco_pair`."""
    require_pairs(*r)
    return 0.5 * beta * (r.r_w.detach() + r.r_l.detach()).mean()


def sppo(r: LogRatios, beta: float, p_w: Tensor, p_l: Tensor) -> Tensor:
    """Per-pair loss ½[(r_w − (P_w − ½)/β)² + (r_l − (P_l − ½)/β)²].

    `p_w`, `p_l`: [pairs], the probability in [0, 1] that the answer beats an answer of the policy that sampled it.
    1/β is the paper's η. Wu et al. 2024, "Self-Play Preference Optimization" (arXiv 2405.00675), eq. 4.7, with the
    authors' ½ (their released trainer).
    """
    require_pairs(*r, p_w, p_l)
    return 0.5 * ((r.r_w - (p_w - 0.5) / beta).square() + (r.r_l - (p_l - 0.5) / beta).square())


def sppo_hard(r: LogRatios, beta: float) -> Tensor:
    """Per-pair loss ½[(r_w − 1/(2β))² + (r_l + 1/(2β))²]: `sppo` with P = 1 for chosen and 0 for rejected.

    Some libraries leave the ½ out, which doubles the loss and its gradient.
    """
    return sppo(r, beta, torch.ones_like(r.r_w), torch.zeros_like(r.r_l))


def aot_reference(margins_pi: Tensor, margins_ref: Tensor) -> Tensor:
    """For each pair the reference's margin of the same rank, shape [pairs], without gradient.

    A margin is log π(y_w|x) − log π(y_l|x). The k-th smallest of the policy's goes with the k-th smallest of the
    reference's; of equal margins the earlier pair ranks lower. Both are those of one whole optimiser batch. Which
    reference goes with which pair is locally constant, so a batch may be spread over several forward passes once this
    is known: the gradient is that of the sorted formula.
    """
    require_pairs(margins_pi, margins_ref)
    order = torch.argsort(margins_pi.detach(), stable=True)
    of_rank = torch.empty_like(margins_ref)
    of_rank[order] = margins_ref.detach().sort().values
    return of_rank


def aot(margins_pi: Tensor, of_rank: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Per-pair loss `sigmoid` of the policy's margin less the reference's of equal rank, shape [pairs].

    `margins_pi`: [pairs], with gradient. `of_rank`: [pairs] of `aot_reference`. Melnyk et al. 2024, "Distributional
    Preference Alignment of LLMs via Optimal Transport" (arXiv 2406.05882), sec. 3, for paired data: TRL's `aot` of
    late (its `aot_pair` before). TRL's `aot_unpaired`, which sorts r_w and r_l instead, is another loss.
    """
    return sigmoid(LogRatios(margins_pi, of_rank), beta, label_smoothing)


def apo_zero(r: LogRatios, beta: float) -> Tensor:
    """Per-pair loss 1 − σ(βr_w) + σ(βr_l): chosen up, rejected down.

    D'Oosterlinck et al. 2024, "Anchored Preference Optimization" (arXiv 2408.06266), eq. 7.
    """
    require_pairs(*r)
    return torch.sigmoid(-beta * r.r_w) + torch.sigmoid(beta * r.r_l)


def apo_down(r: LogRatios, beta: float) -> Tensor:
    """Per-pair loss σ(βr_w) + 1 − σ(βΔ): both down, rejected more; for answers worse than the policy's own.

    D'Oosterlinck et al. 2024 (arXiv 2408.06266), eq. 8.
    """
    require_pairs(*r)
    return torch.sigmoid(beta * r.r_w) + torch.sigmoid(-beta * r.delta)


def discopop(r: LogRatios, beta: float, tau: float = 0.05) -> Tensor:
    """Per-pair loss (1−m)·(−log σ(z)) + m·e^(−z) with z = βΔ and m = σ(z/τ).

    Lu et al. 2024, "Discovering Preference Optimization Algorithms with and for Large Language Models"
    (arXiv 2406.08414), eq. 5; τ = 0.05. Not convex, and not monotone around z = 0.
    m·e^(−z) is computed as e^(log m − z): e^(−z) alone overflows where m is 0.
    """
    require_pairs(*r)
    z = beta * r.delta
    logistic = torch.sigmoid(-z / tau) * -F.logsigmoid(z)
    return logistic + torch.exp(F.logsigmoid(z / tau) - z)


def sft(log_pi: Tensor) -> Tensor:
    """Per-answer loss of supervised fine-tuning, shape [answers]: −log π(y|x)/|y|, without a reference.

    `log_pi`: [answers], the policy's own log-probs, each divided by its answer's length already: the mean over tokens
    is what users of supervised fine-tuning expect to read (its exponential is the perplexity), and with it a long
    answer counts no more than a short one. On the best of n answers of the policy's own it is the last step of
    rejection sampling (Touvron et al. 2023, "Llama 2", sec. 3.2.3).
    """
    require_pairs(log_pi)
    return -log_pi


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
