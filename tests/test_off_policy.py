"""Off-policyness by hand, under wild inputs, and held against exact values of two real models by enumeration."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kl import ANSWERS, rows, tiny

from online_dpo.measure import Interval
from online_dpo.off_policy import (
    coverage,
    displacement,
    distance,
    ess,
    ess_token,
    kl_token,
    kl_token_k3,
    margins,
    over_prompts,
    positive,
    share,
    staleness,
)

LN = math.log
SEVERAL = ["a", "b", "c"]


def same(found: Interval, expected: float, low: float | None = None, high: float | None = None) -> bool:
    """Whether an interval is `expected`, with these bounds (None: with the mean as both)."""
    return (found.mean, found.low, found.high) == pytest.approx(
        (expected, expected if low is None else low, expected if high is None else high), nan_ok=True
    )


# --- by hand ---


def test_staleness_counts_the_steps_between() -> None:
    """Rounds of 3, 4 and 5 steps, round 4 begins: from the policy before it none, from π₀ all twelve."""
    steps = [3, 4, 5]
    assert [staleness(steps, after, 3) for after in (3, 2, 1, 0)] == [0, 5, 9, 12]
    assert staleness([], 0, 0) == 0
    with pytest.raises(ValueError, match="from round 2 to round 1"):
        staleness(steps, 2, 1)


def test_a_batch_of_the_policys_own_is_at_zero_exactly() -> None:
    """θ = μ: d = 0, ρ = 1, w = 1. Every resample says the same."""
    logprobs = [[-1.5, -0.25], [-3.0], [-0.5, -2.0, -7.0]]
    assert same(kl_token(logprobs, logprobs, SEVERAL), 0.0)
    assert same(kl_token_k3(logprobs, logprobs, SEVERAL), 0.0)
    assert same(ess(logprobs, logprobs, SEVERAL), 1.0)
    assert same(ess_token(logprobs, logprobs, SEVERAL), 1.0)
    assert same(displacement(logprobs, logprobs, SEVERAL), 0.0)


def test_kl_is_over_tokens_not_over_answers() -> None:
    """d = (ln 2, −ln 2, −ln 2) and (−ln 2): mean −d = 2 ln 2/4. k3: ρ − 1 − ln ρ is 1 − ln 2 once and −½ + ln 2
    three times, in sum −½ + 2 ln 2, over four tokens."""
    mu = [[LN(0.25), LN(0.5), LN(0.5)], [LN(0.5)]]
    theta = [[LN(0.5), LN(0.25), LN(0.25)], [LN(0.25)]]
    prompts = ["a", "b"]
    # Resamples of two prompts: each twice in a quarter of them, so the bounds are the prompts' own figures.
    assert same(kl_token(theta, mu, prompts), LN(2) / 2, LN(2) / 3, LN(2))
    assert same(kl_token_k3(theta, mu, prompts), (2 * LN(2) - 0.5) / 4, LN(2) - 0.5, LN(2) / 3)


def test_effective_sample_size_by_sequence_and_by_token() -> None:
    """Log-weights 0 and ln 9: (1 + 9)²/(2·(1 + 81)) = 100/164. By token w = e^{ln 9/2} = 3: (1 + 3)²/(2·(1 + 9)) = 0.8.
    Resamples of one prompt alone have equal weights: 1."""
    theta, mu = [[-1.0], [-1.0, -1.0 + LN(3)]], [[-1.0], [-1.0 - LN(3), -1.0]]
    assert same(ess(theta, mu, ["a", "b"]), 100 / 164, 100 / 164, 1.0)
    assert same(ess_token(theta, mu, ["a", "b"]), 0.8, 0.8, 1.0)


def test_one_answer_that_carries_all_weight() -> None:
    """Four answers, one e^800 times as likely under θ as the others: ¼, and no overflow."""
    theta, mu = [[-1.0], [-801.0], [-801.0], [-801.0]], [[-1.0]] * 4
    found = ess(theta, mu, list("abcd"))
    assert found.mean == pytest.approx(0.25)
    assert 0.25 <= found.low <= found.high <= 1.0


def test_coverage_is_the_share_below_the_fifth_percentile_of_fresh_answers() -> None:
    """Fresh means −20, −19, …, 0: the fifth percentile is the second lowest, −19. Batch means −19.5, −19, −18, −1:
    one of four below; a mean, so that length does not count. Wilson, p = ¼, n = 4."""
    fresh = [[-float(i)] * (1 + i % 3) for i in range(21)]
    batch = [[-19.5], [-19.0], [-18.0, -18.0], [-2.0, 0.0]]
    z2 = 1.959964**2
    centre, half = (0.25 + z2 / 8) / (1 + z2 / 4), math.sqrt(z2 * (0.25 * 0.75 / 4 + z2 / 64)) / (1 + z2 / 4)
    assert same(coverage(batch, fresh, list("abcd")), 0.25, centre - half, centre + half)
    assert math.isnan(coverage(batch, [], list("abcd")).mean)
    assert math.isnan(coverage([], fresh, []).mean)


def test_displacement_is_of_whole_answers_and_has_its_sign() -> None:
    """−4 and +1 nats: mean −1.5."""
    start, end = [[-1.0, -2.0], [-3.0]], [[-3.0, -4.0], [-2.0]]
    assert same(displacement(end, start, ["a", "b"]), -1.5, -4.0, 1.0)
    assert same(displacement(start, end, ["a", "b"]), 1.5, -1.0, 4.0)


def test_margins_and_their_share() -> None:
    """(−5 − −6) − (−7 − −6) = 2; (−5 − −5) − (−5 − −5) = 0; (−9 − −5) − (−5 − −5) = −4: (1 + ½ + 0)/3."""
    found = margins([-5, -5, -9], [-7, -5, -5], [-6, -5, -5], [-6, -5, -5])
    assert found.tolist() == [2.0, 0.0, -4.0]
    assert positive(found, SEVERAL).mean == 0.5
    assert positive(found, SEVERAL).n == 3


def test_answers_of_one_prompt_count_as_one_in_every_interval() -> None:
    """Each answer three times over: no figure and no bound moves."""
    theta, mu = [[-1.0], [-2.0], [-4.0]], [[-1.5], [-1.0], [-3.0]]
    for figure in (kl_token, kl_token_k3, ess, ess_token, displacement):
        once, thrice = figure(theta, mu, SEVERAL), figure(theta * 3, mu * 3, SEVERAL * 3)
        assert same(thrice, once.mean, once.low, once.high)
        assert thrice.n == once.n == 3
    assert share([1.0, 0.0] * 2, ["a", "b"] * 2) == share([1.0, 0.0], ["a", "b"])


def test_one_prompt_has_no_interval() -> None:
    found = kl_token([[-1.0], [-2.0]], [[-1.5], [-1.0]], ["a", "a"])
    assert found.mean == 0.25
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_the_same_batch_has_the_same_interval() -> None:
    values = np.random.default_rng(0).normal(size=(50, 2)) ** 2
    prompts = [str(i) for i in range(50)]
    assert over_prompts(values, prompts, lambda s: s[..., 0]) == over_prompts(values, prompts, lambda s: s[..., 0])


def test_an_answer_that_theta_cannot_give_weighs_nothing() -> None:
    """Its log-prob is −∞: an infinite KL, weight 0, one of two answers left: ½."""
    theta, mu = [[-math.inf], [-1.0]], [[-1.0], [-1.0]]
    found = distance(theta, mu, ["a", "b"], [[-1.0], [-2.0]]).as_dict()
    assert (found["kl_token"], found["kl_token_k3"]) == (None, None)  # JSON has no infinity
    assert (found["ess"], found["coverage"]) == (0.5, 0.5)
    assert math.isnan(ess([[-math.inf]], [[-1.0]], ["a"]).mean)
    assert displacement(theta, mu, ["a", "b"]).as_dict() == {"mean": None, "low": None, "high": None}


def test_a_figure_near_the_largest_number_has_no_bounds() -> None:
    """Sums of 0 and 1e308: their mean is a number, and of some resamples it is none."""
    found = over_prompts([[0.0, 1.0], [1e308, 1.0]], ["a", "b"], lambda s: s[..., 0] * 1.5)
    assert math.isfinite(found.mean)
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_an_overflowing_ratio_is_infinite_not_a_failure() -> None:
    found = kl_token_k3([[0.0], [-1.0]], [[-2000.0], [-1.0]], ["a", "b"])
    assert found.mean == math.inf
    assert found.as_dict() == {"mean": None, "low": None, "high": None}


@pytest.mark.parametrize(
    ("theta", "mu", "fault"),
    [
        ([[-1.0]], [[-1.0], [-2.0]], "1 and 2 answers"),
        ([[-1.0], [-1.0]], [[-1.0], [-1.0, -2.0]], "answer 1 has 1 and 2"),
        ([[math.nan]], [[-1.0]], "not a number"),
        ([[math.inf]], [[-1.0]], "not a number"),
        ([[-1.0]], [[-math.inf]], "probability 0 under the policy that sampled it"),
    ],
)
def test_what_are_no_log_probs_of_the_same_answers_is_refused(theta: Any, mu: Any, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        kl_token(theta, mu, ["a"] * len(theta))


def test_each_answer_needs_its_prompt() -> None:
    with pytest.raises(ValueError, match="one prompt an answer"):
        kl_token([[-1.0]], [[-1.0]], ["a", "b"])


# --- all of it ---


def test_answers_that_no_known_policy_sampled_are_counted_by_coverage_alone() -> None:
    theta, fresh = [[-1.0], [-9.0]], [[-1.0], [-2.0]]
    found = distance(theta, [None, None], ["a", "b"], fresh).as_dict()
    assert [found[name] for name in ("kl_token", "kl_token_k3", "ess", "ess_token")] == [None] * 4
    assert found["coverage"] == 0.5
    assert found["intervals"]["coverage"]["low"] < 0.5 < found["intervals"]["coverage"]["high"]
    assert found["intervals"]["ess"] is None


def test_of_a_mixed_batch_the_divergence_is_that_of_the_answers_with_a_sampler() -> None:
    theta, mu = [[-1.0], [-9.0], [-3.0]], [[-1.5], None, [-1.0]]
    found = distance(theta, mu, SEVERAL)
    assert found.kl_token == kl_token([theta[0], theta[2]], [[-1.5], [-1.0]], ["a", "c"])
    assert found.ess is not None
    assert found.ess.n == 2
    assert found.coverage is None
    json.dumps(found.as_dict(), allow_nan=False)


# --- wild inputs ---

LOGPROB = st.floats(-1e3, 0.0, allow_nan=False, width=32)
BATCH = st.lists(
    st.tuples(st.lists(st.tuples(LOGPROB, LOGPROB), min_size=1, max_size=4), st.sampled_from("pqrs")),
    min_size=1,
    max_size=6,
)


def columns(batch: Sequence[tuple[Sequence[tuple[float, float]], str]]) -> tuple[Any, Any, Any]:
    return (
        [[theta for theta, _ in tokens] for tokens, _ in batch],
        [[mu for _, mu in tokens] for tokens, _ in batch],
        [prompt for _, prompt in batch],
    )


@settings(max_examples=40, deadline=None)
@given(BATCH)
def test_bounds_that_hold_for_any_batch(batch: Any) -> None:
    theta, mu, prompts = columns(batch)
    figures = [figure(theta, mu, prompts) for figure in (kl_token, kl_token_k3, ess, ess_token, displacement)]
    assert figures[1].mean >= 0
    for found in figures[2:4]:
        assert 1 / len(batch) - 1e-9 <= found.mean <= 1 + 1e-9
    for found in figures:
        assert found.n == len(set(prompts))
        assert math.isnan(found.low) or found.low <= found.mean <= found.high
    assert figures[0].mean == pytest.approx(-kl_token(mu, theta, prompts).mean, abs=1e-9)
    assert figures[4].mean == pytest.approx(-displacement(mu, theta, prompts).mean, abs=1e-9)
    json.dumps(distance(theta, mu, prompts, theta).as_dict(), allow_nan=False)


@settings(max_examples=20, deadline=None)
@given(BATCH, st.randoms(use_true_random=False))
def test_no_figure_depends_on_the_order_of_answers(batch: Any, random: Any) -> None:
    theta, mu, prompts = columns(batch)
    shuffled = columns(random.sample(batch, len(batch)))
    for figure in (kl_token, kl_token_k3, ess, ess_token):
        assert figure(*shuffled).mean == pytest.approx(figure(theta, mu, prompts).mean, rel=1e-6, nan_ok=True)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-50, 50), min_size=1, max_size=6), st.floats(-50, 50))
def test_a_factor_common_to_all_weights_cancels(logs: list[float], factor: float) -> None:
    prompts = [str(i) for i in range(len(logs))]
    zero = [[0.0]] * len(logs)
    found, moved = (ess([[log + more] for log in logs], zero, prompts).mean for more in (0.0, factor))
    assert found == pytest.approx(moved, rel=1e-6)


# --- exact values, by enumeration ---


@pytest.fixture(scope="module")
def enumerated(one_thread: None) -> tuple[list[list[float]], list[list[float]]]:
    """Log-probs of all 15 answers over three tokens under μ and θ: two real models.

    θ's weights are μ's, moved by a fiftieth of the way to another model's: the effective sample size is about 0.6. (At
    a quarter of the way it is 0.006, and no batch of 40 answers could show that.)
    """
    mu, other = tiny(1), tiny(2)
    state = other.state_dict()
    with torch.no_grad():
        for name, weight in mu.state_dict().items():
            state[name] = 0.98 * weight + 0.02 * state[name]
    other.load_state_dict(state)
    return rows(mu, ANSWERS), rows(other, ANSWERS)


def exact(mu: list[list[float]], theta: list[list[float]]) -> dict[str, float]:
    """By sums over all answers y: KL a token Σμ·(−D)/Σμ·|y|, and 1/Σμ·w² over (Σμ·w)² (Σμ·w = Σθ = 1 for w = e^D)."""
    probability = np.array([math.exp(sum(row)) for row in mu])
    log_ratio = np.array([sum(t) - sum(m) for t, m in zip(theta, mu, strict=True)])
    lengths = np.array([len(row) for row in mu])
    k3 = np.array(
        [sum(math.exp(a - b) - 1 - (a - b) for a, b in zip(t, m, strict=True)) for t, m in zip(theta, mu, strict=True)]
    )
    by_token = np.exp(log_ratio / lengths)
    assert probability.sum() == pytest.approx(1, abs=1e-6)
    assert (probability * np.exp(log_ratio)).sum() == pytest.approx(1, abs=1e-6)
    return {
        "kl_token": -(probability * log_ratio).sum() / (probability * lengths).sum(),
        "kl_token_k3": (probability * k3).sum() / (probability * lengths).sum(),
        "ess": 1 / (probability * np.exp(2 * log_ratio)).sum(),
        "ess_token": (probability * by_token).sum() ** 2 / (probability * by_token**2).sum(),
    }


def test_both_estimators_of_kl_have_the_exact_one_as_expectation(enumerated: Any) -> None:
    mu, theta = enumerated
    found = exact(mu, theta)
    assert found["kl_token"] > 0.01
    assert found["kl_token_k3"] == pytest.approx(found["kl_token"], rel=1e-4)


def test_intervals_hold_the_enumerated_values(enumerated: Any) -> None:
    """40 batches of 40 answers really drawn from μ: each figure's interval holds the exact value in about 38."""
    mu, theta = enumerated
    truth = exact(mu, theta)
    probability = np.array([math.exp(sum(row)) for row in mu])
    drawn = np.random.default_rng(5).choice(len(mu), p=probability / probability.sum(), size=(40, 40))
    prompts = [str(i) for i in range(40)]
    held = dict.fromkeys(truth, 0)
    for batch in drawn:
        found = distance([theta[i] for i in batch], [mu[i] for i in batch], prompts)
        for name in truth:
            interval = getattr(found, name)
            held[name] += interval.low <= truth[name] <= interval.high
    assert all(count >= 34 for count in held.values()), (held, truth)


def test_the_divergence_is_from_the_sampler_to_the_policy_not_back(enumerated: Any) -> None:
    """KL(μ‖θ) and KL(θ‖μ) of these models differ by more than a hundred answers can blur."""
    mu, theta = enumerated
    forwards, backwards = exact(mu, theta)["kl_token"], exact(theta, mu)["kl_token"]
    assert abs(forwards - backwards) > 0.002
