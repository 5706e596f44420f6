"""How off-policy a batch of answers is, and what training did to it: figures of log-probs alone, with intervals.

An answer y was sampled from the behaviour policy μ, which stored its log-probs; θ is the policy that is trained.
d_t = ℓ_θ(t) − ℓ_μ(t), D = Σ_t d_t, ρ_t = e^{d_t}; all log-probs are natural, one a completion token.

Answers come from μ, so a divergence estimated here is KL(μ‖θ), not KL(θ‖μ): that one needs fresh answers from θ
(`measure.kl_sequence`). The expectations below are over draws from μ. Pairs are answers that a rule chose among such
draws, so on them the figures say how far the batch that was trained on is from θ, not how far all of μ is.

Every interval is a 95 % interval over prompts, whose answers stay together: two answers to one prompt are not
independent. NumPy alone is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from online_dpo.measure import CHUNK, RESAMPLES, Interval, Logprobs, wilson

Values = NDArray[np.float64]
COVERED_FROM = 0.05
"""An answer is covered where θ gives it a mean log-prob that at least this share of θ's own answers stay below."""


# --- staleness ---


def staleness(steps: Sequence[int], sampled_after: int, begins_after: int) -> int:
    """Optimiser steps between the weights that sampled and those that training begins with; 0 on-policy.

    `steps[i]` are those of round i + 1; both policies are named by the round that made them, 0 the initial one.
    """
    if not 0 <= sampled_after <= begins_after <= len(steps):
        raise ValueError(f"no steps from round {sampled_after} to round {begins_after} among {len(steps)} rounds")
    return sum(steps[sampled_after:begins_after])


# --- divergence ---


def kl_token(theta: Logprobs, behaviour: Logprobs, prompts: Sequence[str]) -> Interval:
    """KL(μ‖θ) in nats a token: the mean of −d_t over all tokens. Unbiased in its sum, may be negative."""
    d = _differences(theta, behaviour)
    return over_prompts([[-row.sum(), row.size] for row in d], prompts, _ratio)


def kl_token_k3(theta: Logprobs, behaviour: Logprobs, prompts: Sequence[str]) -> Interval:
    """KL(μ‖θ) in nats a token by the low-variance estimator: the mean of ρ_t − 1 − ln ρ_t. Never negative.

    E_μ ρ_t = 1, so its expectation is that of −d_t (k3 of Schulman, Approximating KL divergence, 2020).
    Infinite where some ρ_t overflows.
    """
    with np.errstate(over="ignore"):
        # expm1 keeps the digits that e^d − 1 loses near d = 0, where the two policies nearly agree.
        rows = [[(np.expm1(d) - d).sum(), d.size] for d in _differences(theta, behaviour)]
    return over_prompts(rows, prompts, _ratio)


# --- weights ---


def ess(theta: Logprobs, behaviour: Logprobs, prompts: Sequence[str]) -> Interval:
    """Effective sample size as a share of the answers, (Σw)²/(n Σw²) with w = e^D: 1 = on-policy.

    Estimates 1/E_μ[w²] = 1/(1 + χ²(θ‖μ)), from above where a few answers would carry most of the weight: such an
    answer is seldom in the batch.
    """
    return _weighed([row.sum() for row in _differences(theta, behaviour)], prompts)


def ess_token(theta: Logprobs, behaviour: Logprobs, prompts: Sequence[str]) -> Interval:
    """`ess` with w = e^{D/|y|}: by the mean log-ratio a token, so that long answers do not decide it alone."""
    return _weighed([row.mean() if row.size else 0.0 for row in _differences(theta, behaviour)], prompts)


def _weighed(log_weights: Sequence[float], prompts: Sequence[str]) -> Interval:
    logs = np.asarray(log_weights, dtype=np.float64)
    largest = logs.max(initial=-math.inf)
    if not math.isfinite(largest):  # no answer, or none that θ could give
        return _none()
    weights = np.exp(logs - largest)
    rows = np.stack([weights, np.square(weights), np.ones_like(weights)], axis=1)
    return over_prompts(rows, prompts, _effective)


def _effective(sums: Values) -> Values:
    """(Σw)²/(n Σw²) of Σw, Σw² and n; shape [..., 3] -> [...]."""
    result: Values = np.square(sums[..., 0]) / (sums[..., 2] * sums[..., 1])
    return result


# --- coverage ---


def coverage(theta: Logprobs, fresh: Logprobs, prompts: Sequence[str]) -> Interval:
    """The share of the batch whose mean ℓ_θ lies below the 5th percentile of that of θ's own `fresh` answers.

    5 % of a batch that θ could have sampled; near 1 for answers that θ would not give. Small is good. Wilson's
    interval, with as many independent values as there are prompts; the percentile itself is taken as known.
    """
    own, batch = _means(fresh), _means(theta)
    if not own.size or not batch.size:
        return _none()
    return share(batch < np.quantile(own, COVERED_FROM), prompts)


def _means(logprobs: Logprobs) -> Values:
    """The mean log-prob a token of each answer; answers without a token are left out."""
    return np.array([np.mean(_row(row)) for row in logprobs if len(row)], dtype=np.float64)


# --- displacement and accuracy ---


def displacement(end: Logprobs, start: Logprobs, prompts: Sequence[str]) -> Interval:
    """Mean change of Σ_t ℓ(t) from `start` to `end`, nats an answer, paired by answer."""
    return over_prompts([[row.sum(), 1.0] for row in _differences(end, start)], prompts, _ratio)


def margins(chosen: ArrayLike, rejected: ArrayLike, other_chosen: ArrayLike, other_rejected: ArrayLike) -> Values:
    """log π/π′(chosen) − log π/π′(rejected) of summed log-probs, shape [pairs]: the reward margin without its β."""
    parts = (np.asarray(part, dtype=np.float64) for part in (chosen, rejected, other_chosen, other_rejected))
    first, second, third, fourth = parts
    result: Values = (first - third) - (second - fourth)
    return result


def positive(values: ArrayLike, prompts: Sequence[str]) -> Interval:
    """The share of `values` above zero, ties one half, with `share`'s interval."""
    found = np.asarray(values, dtype=np.float64)
    return share((found > 0) + 0.5 * (found == 0), prompts)


def share(values: ArrayLike, prompts: Sequence[str]) -> Interval:
    """The mean of values in [0, 1], shape [n], with Wilson's interval for as many as there are different prompts.

    Values of one prompt are counted as one: right if they always agree, too wide otherwise.
    """
    found = np.asarray(values, dtype=np.float64)
    if not found.size:
        return _none()
    return wilson(float(found.mean()), len(set(prompts)))


# --- all of it ---


@dataclass(frozen=True, slots=True)
class Distance:
    """How far one θ is from what sampled a batch. None: there is no such figure."""

    kl_token: Interval | None
    kl_token_k3: Interval | None
    ess: Interval | None
    ess_token: Interval | None
    coverage: Interval | None

    def as_dict(self) -> dict[str, Any]:
        """Each figure as a number, and under `intervals` with its bounds; None for what does not exist."""
        found = {name: getattr(self, name) for name in type(self).__slots__}
        bounds = {name: None if one is None else one.as_dict() for name, one in found.items()}
        return {**{name: one and one["mean"] for name, one in bounds.items()}, "intervals": bounds}


def distance(
    theta: Logprobs,
    behaviour: Sequence[Sequence[float] | None],
    prompts: Sequence[str],
    fresh: Logprobs | None = None,
) -> Distance:
    """All figures of θ on the batch.

    `behaviour`: None for an answer whose sampler's log-probs are not known, which only coverage can count. `fresh`:
    log-probs of θ's own answers under θ itself; None where there are none.
    """
    known = [
        (own, sampled, prompt)
        for own, sampled, prompt in zip(theta, behaviour, prompts, strict=True)
        if sampled is not None
    ]
    covered = None if fresh is None else coverage(theta, fresh, prompts)
    if not known:
        return Distance(None, None, None, None, covered)
    columns = tuple(list(column) for column in zip(*known, strict=True))
    return Distance(kl_token(*columns), kl_token_k3(*columns), ess(*columns), ess_token(*columns), covered)


# --- intervals over prompts ---


def over_prompts(
    rows: ArrayLike, prompts: Sequence[str], statistic: Callable[[Values], Values], level: float = 0.95, seed: int = 0
) -> Interval:
    """`statistic` of the column sums of `rows`, shape [answers, k], with a bootstrap interval over prompts.

    All answers of a prompt are drawn together. The bounds are the (1 ± level)/2 quantiles over `RESAMPLES` resamples,
    widened to hold the figure itself, which a statistic that is no mean may leave at the edge. `Interval.n` counts
    prompts. No answer: NaN throughout; one prompt, or a figure that is not finite: no bounds.
    """
    sums = _by_prompt(rows, prompts)
    count = len(sums)
    if not count:
        return _none()
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        figure = float(statistic(sums.sum(axis=0)))
        if count < 2 or not np.all(np.isfinite(sums)):
            return Interval(figure, math.nan, math.nan, count)
        random = np.random.default_rng(seed)
        at_once = max(1, CHUNK // count)
        even = np.full(count, 1 / count)
        parts = [
            statistic(random.multinomial(count, even, min(at_once, RESAMPLES - done)) @ sums)
            for done in range(0, RESAMPLES, at_once)
        ]
    drawn = np.concatenate(parts)
    if np.any(np.isinf(drawn)) or not math.isfinite(figure):
        return Interval(figure, math.nan, math.nan, count)
    # A resample of answers whose weights all underflow beside the largest has no figure.
    low, high = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(figure, min(figure, float(low)), max(figure, float(high)), count)


def _by_prompt(rows: ArrayLike, prompts: Sequence[str]) -> Values:
    """The sums of `rows` over the answers of each prompt, shape [prompts, k]."""
    data = np.asarray(rows, dtype=np.float64)
    if len(data) != len(prompts):
        raise ValueError(f"{len(data)} answers of {len(prompts)} prompts: one prompt an answer is needed")
    if not data.size:
        return np.zeros((0, 1))
    places = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
    sums = np.zeros((len(places), data.shape[1]))
    np.add.at(sums, [places[prompt] for prompt in prompts], data)
    return sums


def _ratio(sums: Values) -> Values:
    """The first column over the second."""
    result: Values = sums[..., 0] / sums[..., 1]
    return result


def _none() -> Interval:
    return Interval(math.nan, math.nan, math.nan, 0)


# --- log-probs ---


def _differences(theta: Logprobs, behaviour: Logprobs) -> list[Values]:
    """θ's log-probs less the other's, one array an answer, of the tokens' shape.

    Raises `ValueError` for answers or tokens that do not match, for a value that is no log-prob, and for a token that
    its own sampler could not give.
    """
    if len(theta) != len(behaviour):
        raise ValueError(f"log-probs of {len(theta)} and {len(behaviour)} answers")
    rows = []
    for place, (own, sampled) in enumerate(zip(theta, behaviour, strict=True)):
        if len(own) != len(sampled):
            raise ValueError(f"answer {place} has {len(own)} and {len(sampled)} log-probs")
        before = _row(sampled)
        if np.any(np.isneginf(before)):
            raise ValueError(f"answer {place} has a token of probability 0 under the policy that sampled it")
        rows.append(_row(own) - before)
    return rows


def _row(logprobs: Sequence[float]) -> Values:
    row = np.asarray(logprobs, dtype=np.float64)
    if np.any(np.isnan(row)) or np.any(np.isposinf(row)):
        raise ValueError("a log-prob is not a number below infinity")
    return row
