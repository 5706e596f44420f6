"""The figures of a round, each with an interval: reward, win rate, KL, length, diversity.

Log-probs are natural logarithms, so KL is in nats. One value a prompt is the unit everywhere: intervals are over
prompts, and say nothing of the spread between training seeds. NumPy alone is needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from online_dpo.self_bleu import self_bleu
from online_dpo.types import Candidate

RESAMPLES = 2000
CHUNK = 2_000_000
"""Resampled values held in memory at once."""

Logprobs = Sequence[Sequence[float]]
"""Per-token log-probs of the completions: one inner sequence a completion, ragged, without padding."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over `n` values with its interval; `low` and `high` are NaN where `n` < 2 leaves none to give."""

    mean: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, float | None]:
        """`{mean, low, high}` for JSON, which has no NaN: None stands for it."""
        return {"mean": _finite(self.mean), "low": _finite(self.low), "high": _finite(self.high)}


# --- intervals ---


def mean_interval(values: ArrayLike, level: float = 0.95, seed: int = 0) -> Interval:
    """The mean of `values` (shape (n,)) with a percentile bootstrap interval of coverage `level`.

    `RESAMPLES` resamples of the values with replacement; the bounds are the (1 ± level)/2 quantiles of their means
    (Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13). The same values and seed give the same
    interval. At few values the interval is somewhat too narrow, as every percentile bootstrap's.
    Constant values: low = mean = high. One value: its mean, NaN bounds. No value: NaN throughout.
    Raises `ValueError` for a value that is not finite.
    """
    data = _vector(values)
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    if data.size < 2:
        return Interval(float(data[0]) if data.size else math.nan, math.nan, math.nan, data.size)
    if np.all(data == data[0]):
        constant = float(data[0])
        return Interval(constant, constant, constant, data.size)
    low, high = np.quantile(_resampled_means(data, seed), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(data.mean()), float(low), float(high), data.size)


def paired_change(after: ArrayLike, before: ArrayLike, level: float = 0.95, seed: int = 0) -> Interval:
    """The mean of `after − before`, paired by position (shape (n,) each), with a bootstrap interval over the pairs."""
    first, second = _vector(after), _vector(before)
    if first.shape != second.shape:
        raise ValueError(f"paired values need equal lengths, got {first.size} and {second.size}")
    return mean_interval(first - second, level, seed)


def win_rate(after_scores: ArrayLike, before_scores: ArrayLike, level: float = 0.95) -> Interval:
    """The share of prompts on which `after` scores higher, ties counting one half, with Wilson's interval.

    Each prompt gives x in {0, ½, 1}. Since x² ≤ x on [0, 1], Var x = E x² − p² ≤ p − p² = p(1 − p), with equality
    when there are no ties. Wilson's interval is the set of p whose score test with variance p(1 − p)/n does not
    reject the observed mean: a larger variance than the true one accepts more, so with ties it errs on the wide
    side. Unlike a bootstrap it has a width at 0 and at 1 (Wilson 1927; Brown, Cai and DasGupta 2001).
    No pair: NaN throughout.
    """
    after, before = _vector(after_scores), _vector(before_scores)
    if after.shape != before.shape:
        raise ValueError(f"paired scores need equal lengths, got {after.size} and {before.size}")
    n = after.size
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    return wilson(float(np.mean((after > before) + 0.5 * (after == before))), n, level)


def wilson(p: float, n: float, level: float = 0.95, z: float | None = None) -> Interval:
    """Wilson's interval of a share `p` in [0, 1] over `n` > 0 values that are independent, or worth so many.

    `z`: standard errors that it reaches instead of the normal quantile of `level`.
    """
    z = NormalDist().inv_cdf((1 + level) / 2) if z is None else z
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # At p = 0 and p = 1 the bound is p itself but for rounding.
    return Interval(p, min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half)), round(n))


# --- divergence and entropy ---


def kl_sequence(theta_logps: Logprobs, ref_logps: Logprobs, level: float = 0.95, seed: int = 0) -> Interval:
    """KL(θ‖ref) in nats a sequence, from completions sampled from θ.

    Σ_t (ℓ_θ(t) − ℓ_ref(t)) of each completion, averaged: unbiased, since its expectation under θ is the divergence
    of the two distributions over whole completions (estimator k1 of Schulman, Approximating KL divergence, 2020).
    A single estimate may be negative. Completions must come from θ itself, at temperature 1 and without top-p.
    """
    return mean_interval(_sequence_sums(theta_logps, ref_logps), level, seed)


def kl_token(theta_logps: Logprobs, ref_logps: Logprobs) -> float:
    """KL(θ‖ref) in nats a token: the sum of all ℓ_θ − ℓ_ref over the number of tokens. NaN without a token."""
    differences = _token_differences(theta_logps, ref_logps)
    return float(differences.mean()) if differences.size else math.nan


def token_entropy(logps: Logprobs) -> float:
    """The entropy of the next token, nats, along completions sampled from the policy itself: the mean of −ℓ(t).

    Each token's −ℓ(t) has that position's entropy as its expectation, so no whole distribution is needed. Completions
    must be sampled at temperature 1 and without top-p. NaN without a token.
    """
    values = [logp for row in logps for logp in row]
    return -math.fsum(values) / len(values) if values else math.nan


# --- texts ---


@dataclass(frozen=True, slots=True)
class LengthStats:
    """Mean completion length in tokens (end token included) and the share that ended by itself (`stop`)."""

    tokens: float
    ended: float


def length_stats(candidates: Sequence[Candidate]) -> LengthStats:
    """Length figures of `candidates`; NaN when there are none."""
    if not candidates:
        return LengthStats(math.nan, math.nan)
    tokens = float(np.mean([len(candidate.token_ids) for candidate in candidates]))
    return LengthStats(tokens, float(np.mean([candidate.finish_reason == "stop" for candidate in candidates])))


def distinct_n(texts: Iterable[str], n: int = 2) -> float:
    """Different word n-grams over all word n-grams of `texts` together (Li et al. 2016). NaN without an n-gram.

    Words are what white space separates, in lower case. Falls as the texts grow in number: compare equal sets only.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    grams = [
        tuple(words[start : start + n])
        for words in (text.lower().split() for text in texts)
        for start in range(len(words) - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else math.nan


# --- the held-out summary ---

Scores = Sequence[float | None]
"""A judge's score of each prompt's answer, None where it abstained."""


def summarise_held_out(
    current: Sequence[Candidate],
    current_scores: Scores,
    initial_scores: Scores,
    initial_logprobs: Logprobs,
    reference_logprobs: Logprobs | None = None,
    gold: tuple[Scores, Scores] | None = None,
) -> dict[str, Any]:
    """The `held_out` figures of one policy, ready for JSON (None for a figure that does not exist).

    All arguments have one entry a prompt, in the same order: `current` are the policy's answers with its own
    log-probs, `initial_logprobs` the initial policy's log-probs of the same tokens, `reference_logprobs` those of the
    reference of the policy's round (None: it had none), and the scores the evaluation judge's of the current and of
    the initial policy's answers, `gold` those of the gold judge (None: there is none). `abstained` counts the prompts
    with a None among the two: `reward`, `reward_change` and `win_rate` leave these prompts out, all three, so that they
    are over the same prompts; so do `gold…` for the gold judge's. KL, length, entropy and diversity are over all
    answers. `entropy` is in nats a token: the mean of −log π over the tokens of the policy's own answers.
    """
    columns = (current, current_scores, initial_scores, initial_logprobs, *(gold or ()))
    if len({len(column) for column in columns}) != 1:
        raise ValueError("answers, scores and log-probs must have one entry a prompt each")
    scored = _scored(current_scores, initial_scores)
    golden = dict.fromkeys(scored) if gold is None else _scored(*gold)
    own = [candidate.logprobs for candidate in current]
    lengths = length_stats(current)
    texts = [candidate.text for candidate in current]
    return {
        "n": len(current),
        **scored,
        "gold": golden["reward"],
        "gold_change": golden["reward_change"],
        "gold_win_rate": golden["win_rate"],
        "gold_abstained": golden["abstained"],
        "kl_initial": kl_sequence(own, initial_logprobs).as_dict(),
        "kl_initial_token": _finite(kl_token(own, initial_logprobs)),
        "kl_reference": None if reference_logprobs is None else kl_sequence(own, reference_logprobs).as_dict(),
        "entropy": _finite(token_entropy(own)),
        "length": _finite(lengths.tokens),
        "ended": _finite(lengths.ended),
        "distinct_2": _finite(distinct_n(texts, 2)),
        "self_bleu": _finite(self_bleu(texts)),
    }


def _scored(current: Scores, initial: Scores) -> dict[str, Any]:
    """How many prompts the judge abstained on, and over all others the mean score, its change and the win rate."""
    scored = [
        (after, before)
        for after, before in zip(current, initial, strict=True)
        if after is not None and before is not None
    ]
    after, before = [pair[0] for pair in scored], [pair[1] for pair in scored]
    return {
        "abstained": len(current) - len(scored),
        "reward": mean_interval(after).as_dict(),
        "reward_change": paired_change(after, before).as_dict(),
        "win_rate": win_rate(after, before).as_dict(),
    }


# --- helpers ---


def _vector(values: ArrayLike) -> NDArray[np.float64]:
    """`values` as a finite float64 vector."""
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1:
        raise ValueError(f"one value a prompt is needed, got shape {data.shape}")
    if not np.all(np.isfinite(data)):
        raise ValueError("a value is not finite")
    return data


def _resampled_means(data: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Means of `RESAMPLES` resamples of `data` (shape (n,)); in chunks, so that memory stays small."""
    random = np.random.default_rng(seed)
    rows = max(1, CHUNK // data.size)
    parts = [
        data[random.integers(0, data.size, size=(min(rows, RESAMPLES - done), data.size))].mean(axis=1)
        for done in range(0, RESAMPLES, rows)
    ]
    return np.concatenate(parts)


def _sequence_sums(theta_logps: Logprobs, ref_logps: Logprobs) -> list[float]:
    """Σ_t (ℓ_θ − ℓ_ref) of each completion; exactly rounded, whatever the order of the tokens."""
    return [math.fsum(theta) - math.fsum(ref) for theta, ref in _matched(theta_logps, ref_logps)]


def _token_differences(theta_logps: Logprobs, ref_logps: Logprobs) -> NDArray[np.float64]:
    """ℓ_θ − ℓ_ref of all tokens of all completions, one after another."""
    matched = _matched(theta_logps, ref_logps)
    return _vector([a - b for theta, ref in matched for a, b in zip(theta, ref, strict=True)])


def _matched(theta_logps: Logprobs, ref_logps: Logprobs) -> list[tuple[Sequence[float], Sequence[float]]]:
    """The completions of both, checked to be of equal number and lengths."""
    if len(theta_logps) != len(ref_logps):
        raise ValueError(f"log-probs of {len(theta_logps)} and {len(ref_logps)} completions")
    for place, (theta, ref) in enumerate(zip(theta_logps, ref_logps, strict=True)):
        if len(theta) != len(ref):
            raise ValueError(f"completion {place} has {len(theta)} and {len(ref)} log-probs")
    return list(zip(theta_logps, ref_logps, strict=True))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
