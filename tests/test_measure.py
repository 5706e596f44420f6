"""The figures of a round against numbers derived by hand, exact enumeration and simulated coverage."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest

from online_dpo import measure
from online_dpo.measure import (
    Interval,
    distinct_n,
    kl_sequence,
    kl_token,
    length_stats,
    mean_interval,
    paired_change,
    summarise_held_out,
    token_entropy,
    win_rate,
)
from online_dpo.types import Candidate, FinishReason


def candidate(index: int, text: str, logprobs: tuple[float, ...], finish_reason: FinishReason = "stop") -> Candidate:
    return Candidate(f"p{index}", 0, text, tuple(range(len(logprobs))), logprobs, finish_reason, seed=index)


# --- mean_interval ---


def test_interval_of_many_values_is_the_normal_one() -> None:
    """With n = 2000 values the bootstrap's bounds are mean ± 1.96·s/√n, up to the noise of 2000 resamples.

    Values 0 and 1, 1000 each: mean ½, s = ½, so ± 1.96·0.5/√2000 = ± 0.0219. The 2.5 % quantile of 2000 resamples
    has standard error √(0.025·0.975/2000)/φ(1.96) = 0.0035/0.0584 = 0.06 standard errors: 0.0007.
    """
    interval = mean_interval([0.0, 1.0] * 1000)
    assert interval.mean == 0.5
    assert interval.n == 2000
    assert interval.low == pytest.approx(0.5 - 0.0219, abs=0.003)
    assert interval.high == pytest.approx(0.5 + 0.0219, abs=0.003)


def test_interval_of_two_values() -> None:
    """Of resamples of {0, 1} a quarter are (0, 0) and a quarter (1, 1): the 2.5 % and 97.5 % quantiles are 0 and 1."""
    assert mean_interval([0.0, 1.0]) == Interval(0.5, 0.0, 1.0, 2)


def test_interval_without_spread_or_without_values() -> None:
    assert mean_interval([0.3, 0.3, 0.3]) == Interval(0.3, 0.3, 0.3, 3)
    one = mean_interval([2.5])
    assert (one.mean, one.n) == (2.5, 1)
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    none = mean_interval([])
    assert none.n == 0
    assert all(math.isnan(value) for value in (none.mean, none.low, none.high))
    assert one.as_dict() == {"mean": 2.5, "low": None, "high": None}
    json.dumps(none.as_dict(), allow_nan=False)


def test_interval_is_reproducible_and_takes_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same seed gives the same interval; and drawing in chunks gives the same one as drawing at once."""
    values = np.random.default_rng(1).normal(size=50)
    whole = mean_interval(values, seed=3)
    assert mean_interval(values, seed=3) == whole
    assert mean_interval(values, seed=4) != whole
    monkeypatch.setattr(measure, "CHUNK", 7 * 50)
    assert mean_interval(values, seed=3) == whole


@pytest.mark.parametrize("bad", [[math.nan, 1.0], [math.inf], [[1.0, 2.0]]])
def test_interval_refuses_what_has_no_mean(bad: list[float]) -> None:
    with pytest.raises(ValueError, match=r"finite|shape"):
        mean_interval(bad)


def test_interval_covers_the_true_mean() -> None:
    """600 samples of 80 exponential values (mean 1, skewed): the 95 % interval covers 1 in about 93 to 95 %.

    Binomial standard error of the share at 0.94: √(0.94·0.06/600) = 0.0097; the bounds are 4 of them around it.
    """
    random = np.random.default_rng(20)
    intervals = [mean_interval(random.exponential(size=80), seed=repeat) for repeat in range(600)]
    covered = np.mean([interval.low <= 1.0 <= interval.high for interval in intervals])
    assert 0.90 <= covered <= 0.98


def test_level_widens_the_interval() -> None:
    values = np.random.default_rng(2).normal(size=100)
    narrow, wide = mean_interval(values, level=0.5), mean_interval(values, level=0.99)
    assert wide.low < narrow.low < narrow.high < wide.high
    with pytest.raises(ValueError, match="level"):
        mean_interval(values, level=95)


# --- paired_change ---


def test_paired_change_sees_what_the_pairing_removes() -> None:
    """Prompts differ by 100 but each gains exactly 1: the change is 1 with no spread, whatever the prompts are."""
    before = np.arange(0.0, 1000.0, 100.0)
    assert paired_change(before + 1, before) == Interval(1.0, 1.0, 1.0, 10)
    with pytest.raises(ValueError, match="equal lengths"):
        paired_change([1.0], [1.0, 2.0])


# --- win_rate ---


def test_win_rate_of_eight_in_ten() -> None:
    """Wilson, p = 0.8, n = 10, z = 1.95996, z² = 3.84146.

    centre = (0.8 + 3.84146/20)/(1 + 0.384146) = 0.992073/1.384146 = 0.716741
    half = 1.95996·√(0.16/10 + 3.84146/400)/1.384146 = 1.95996·√0.0256037/1.384146 = 0.226577
    """
    interval = win_rate([1.0] * 8 + [0.0] * 2, [0.5] * 10)
    assert interval.mean == pytest.approx(0.8)
    assert interval.low == pytest.approx(0.490164, abs=2e-5)
    assert interval.high == pytest.approx(0.943318, abs=2e-5)


def test_win_rate_counts_ties_half() -> None:
    """One win, two ties, one loss: (1 + ½ + ½ + 0)/4 = ½."""
    interval = win_rate([2.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0])
    assert (interval.mean, interval.n) == (0.5, 4)
    assert win_rate([1.0] * 5, [1.0] * 5).mean == 0.5


def test_win_rate_at_the_ends_has_a_width() -> None:
    """No win in 10: Wilson's upper bound is z²/(n + z²) = 3.84146/13.84146 = 0.277533; all won is its mirror."""
    lost, won = win_rate([0.0] * 10, [1.0] * 10), win_rate([1.0] * 10, [0.0] * 10)
    assert (lost.mean, lost.low) == (0.0, 0.0)
    assert lost.high == pytest.approx(0.277533, abs=1e-6)
    assert (won.mean, won.high) == (1.0, 1.0)
    assert won.low == pytest.approx(1 - 0.277533, abs=1e-6)
    assert math.isnan(win_rate([], []).mean)


@pytest.mark.parametrize("ties", [0.0, 0.4])
def test_win_rate_covers_the_true_rate(ties: float) -> None:
    """2000 samples of 40 prompts at a true rate of 0.6: at least 95 % covered less 4 standard errors (0.0195).

    With ties the variance is below p(1 − p) and the coverage is above 95 %: here Var x = 0.24 − 0.4/4 = 0.14.
    """
    random = np.random.default_rng(5)
    wins = 0.6 - ties / 2
    after = random.choice([1.0, 0.5, 0.0], p=[wins, ties, 1 - wins - ties], size=(2000, 40))
    intervals = [win_rate(row, np.full(40, 0.5)) for row in after]
    covered = np.mean([interval.low <= 0.6 <= interval.high for interval in intervals])
    assert covered >= 0.93
    if ties:
        assert covered >= 0.98


# --- KL ---

THETA = {"a": 1 / 2, "b": 1 / 4, "c": 1 / 4}
REF = {"a": 1 / 4, "b": 1 / 4, "c": 1 / 2}
TOKEN_KL = 0.5 * math.log(2) + 0.0 + 0.25 * math.log(0.5)


def representative_sample() -> tuple[list[list[float]], list[list[float]]]:
    """Every two-token sequence as often in 16 as θ samples it on average: a mean over them is the expectation.

    THETA's probabilities are quarters, so that sequence (x, y) comes 16·θ(x)·θ(y) times, a whole number.
    """
    theta, ref = [], []
    for pair in itertools.product(THETA, repeat=2):
        times = round(16 * math.prod(THETA[token] for token in pair))
        theta += [[math.log(THETA[token]) for token in pair]] * times
        ref += [[math.log(REF[token]) for token in pair]] * times
    return theta, ref


def test_kl_is_the_enumerated_one() -> None:
    """Exact KL over the nine sequences is twice the token's: KL = ½ ln 2 + ¼·0 + ¼ ln ½ = ¼ ln 2 a token."""
    sequences = list(itertools.product(THETA, repeat=2))
    exact = sum(
        math.prod(THETA[token] for token in pair) * sum(math.log(THETA[token] / REF[token]) for token in pair)
        for pair in sequences
    )
    theta, ref = representative_sample()
    assert len(theta) == 16
    assert kl_sequence(theta, ref).mean == pytest.approx(exact, abs=1e-12)
    assert exact == pytest.approx(2 * TOKEN_KL)
    assert kl_token(theta, ref) == pytest.approx(0.25 * math.log(2), abs=1e-12)


def test_kl_interval_covers_the_enumerated_one() -> None:
    """500 batches of 60 two-token sequences really sampled from θ cover the exact 2·TOKEN_KL in about 95 %."""
    random = np.random.default_rng(8)
    own, other = np.log(list(THETA.values())), np.log(list(REF.values()))
    draws = random.choice(3, p=list(THETA.values()), size=(500, 60, 2))
    intervals = [kl_sequence(own[batch].tolist(), other[batch].tolist()) for batch in draws]
    covered = np.mean([interval.low <= 2 * TOKEN_KL <= interval.high for interval in intervals])
    assert 0.90 <= covered <= 0.985


def test_kl_of_ragged_completions() -> None:
    """Differences 1, and 0.5 + 0.25 − 0.25: sequences 1 and 0.5, mean 0.75; tokens (1 + 0.5)/4 = 0.375."""
    theta, ref = [[-1.0], [-1.0, -1.0, -1.0]], [[-2.0], [-1.5, -1.25, -0.75]]
    interval = kl_sequence(theta, ref)
    assert interval.mean == pytest.approx(0.75)
    assert interval.n == 2
    assert kl_token(theta, ref) == pytest.approx(0.375)


def test_kl_without_tokens_and_with_unequal_lengths() -> None:
    assert math.isnan(kl_token([], []))
    with pytest.raises(ValueError, match="completion 1 has 2 and 1"):
        kl_sequence([[0.0], [0.0, 0.0]], [[0.0], [0.0]])
    with pytest.raises(ValueError, match="1 and 2 completions"):
        kl_token([[0.0]], [[0.0], [0.0]])


# --- entropy, lengths, texts ---


def test_entropy_is_the_mean_surprise_of_own_tokens() -> None:
    """ln 2, ln 4 and ln 4 over three tokens, whatever answer they stand in; the fair coin's is ln 2 exactly."""
    rows = [[-math.log(2), -math.log(4)], [-math.log(4)]]
    assert token_entropy(rows) == pytest.approx(5 * math.log(2) / 3)
    assert token_entropy([[math.log(0.5)] * 7]) == pytest.approx(math.log(2))
    assert math.isnan(token_entropy([[], []]))


def test_entropy_is_unbiased_along_own_samples() -> None:
    """E_θ[−ln θ] over the three tokens is the entropy of θ: ½ ln 2 + ¼ ln 4 + ¼ ln 4 = 1½ ln 2."""
    own = [[math.log(p)] for p in THETA.values()]
    exact = -sum(p * math.log(p) for p in THETA.values())
    assert sum(p * token_entropy([row]) for p, row in zip(THETA.values(), own, strict=True)) == pytest.approx(exact)
    assert exact == pytest.approx(1.5 * math.log(2))


def test_length_stats() -> None:
    """Lengths 1 and 3: mean 2; one of two stopped."""
    stats = length_stats([candidate(0, "", (0.0,)), candidate(1, "", (0.0, 0.0, 0.0), "length")])
    assert (stats.tokens, stats.ended) == (2.0, 0.5)
    assert math.isnan(length_stats([]).tokens)


def test_distinct_n() -> None:
    """`a b a b` has bigrams ab, ba, ab: 2 of 3. Together with `A B`: 2 of 4. No bigram crosses two texts."""
    assert distinct_n(["a b a b"], 2) == pytest.approx(2 / 3)
    assert distinct_n(["a b a b", "A B"], 2) == pytest.approx(2 / 4)
    assert distinct_n(["a b", "b a"], 2) == 1.0
    assert distinct_n(["a a a"], 1) == pytest.approx(1 / 3)
    assert math.isnan(distinct_n(["one", ""], 2))
    with pytest.raises(ValueError, match="at least 1"):
        distinct_n(["a"], 0)


# --- summarise_held_out ---


def test_summary_by_hand() -> None:
    """Four prompts, one abstained on each side; two scored pairs (3 against 1) and (1 against 1).

    reward (3 + 1)/2 = 2; change (2 + 0)/2 = 1; win rate (1 + ½)/2 = 0.75. KL is over all four: sums 1, 0, 0, 0,
    mean 0.25; one nat over six tokens. Lengths 2, 2, 1, 1: 1.5. Three of four stopped. Bigrams: `x y` twice: ½.
    """
    current = [
        candidate(0, "x y", (-1.0, -1.0)),
        candidate(1, "x y", (-1.0, -1.0)),
        candidate(2, "x", (-1.0,)),
        candidate(3, "", (-1.0,), "length"),
    ]
    initial = [[-1.5, -1.5], [-1.0, -1.0], [-1.0], [-1.0]]
    summary = summarise_held_out(current, [3.0, 1.0, None, 5.0], [1.0, 1.0, 2.0, None], initial)
    assert summary["n"] == 4
    assert summary["abstained"] == 2
    assert summary["reward"] == {"mean": 2.0, "low": 1.0, "high": 3.0}
    assert summary["reward_change"] == {"mean": 1.0, "low": 0.0, "high": 2.0}
    assert summary["win_rate"]["mean"] == 0.75
    assert summary["kl_initial"]["mean"] == pytest.approx(0.25)
    assert summary["kl_initial_token"] == pytest.approx(1 / 6)
    assert (summary["length"], summary["ended"], summary["distinct_2"]) == (1.5, 0.75, 0.5)
    json.dumps(summary, allow_nan=False)


def test_summary_of_a_policy_that_had_a_reference() -> None:
    """To the reference: (−1 − 1) − (−2 − 2) = 2 and −1 − (−0.5) = −0.5, mean 0.75; to π₀ 1 and 0, mean 0.5. Of
    resamples of two values a quarter take each twice, so the bounds are the values."""
    current = [candidate(0, "x y", (-1.0, -1.0)), candidate(1, "x", (-1.0,))]
    initial, reference = [[-1.5, -1.5], [-1.0]], [[-2.0, -2.0], [-0.5]]
    summary = summarise_held_out(current, [1.0, 1.0], [1.0, 1.0], initial, reference)
    assert summary["kl_initial"] == {"mean": 0.5, "low": 0.0, "high": 1.0}
    assert summary["kl_reference"] == {"mean": 0.75, "low": -0.5, "high": 2.0}
    assert summarise_held_out(current, [1.0, 1.0], [1.0, 1.0], initial)["kl_reference"] is None
    with pytest.raises(ValueError, match="2 and 1 completions"):
        summarise_held_out(current, [1.0, 1.0], [1.0, 1.0], initial, reference[:1])


def test_summary_with_a_gold_judge_by_hand() -> None:
    """Three prompts; the judge says 1 → 2 thrice, the gold judge 5 → 4, an abstention, and 3 → 3.

    gold (4 + 3)/2, change (−1 + 0)/2, win rate (0 + ½)/2 over two prompts; the judge's own are over all three.
    """
    current = [candidate(index, "a b c d", (-1.0, -3.0)) for index in range(3)]
    own = [answer.logprobs for answer in current]
    gold = ([4.0, None, 3.0], [5.0, 1.0, 3.0])
    summary = summarise_held_out(current, [2.0] * 3, [1.0] * 3, own, gold=gold)
    assert (summary["abstained"], summary["gold_abstained"]) == (0, 1)
    assert summary["reward_change"]["mean"] == 1.0
    assert summary["gold"] == {"mean": 3.5, "low": 3.0, "high": 4.0}
    assert summary["gold_change"] == {"mean": -0.5, "low": -1.0, "high": 0.0}
    assert summary["gold_win_rate"]["mean"] == 0.25
    assert (summary["entropy"], summary["self_bleu"]) == (2.0, pytest.approx(1.0))
    without = summarise_held_out(current, [2.0] * 3, [1.0] * 3, own)
    names = ("gold", "gold_change", "gold_win_rate", "gold_abstained")
    assert [without[name] for name in names] == [None] * 4
    assert {k: v for k, v in without.items() if k not in names} == {k: v for k, v in summary.items() if k not in names}
    with pytest.raises(ValueError, match="one entry a prompt"):
        summarise_held_out(current, [2.0] * 3, [1.0] * 3, own, gold=([1.0], [1.0]))


def test_summary_of_the_initial_policy_itself() -> None:
    """The initial policy against itself: change 0 without width, win rate ½, KL 0."""
    current = [candidate(index, f"text {index}", (-1.0, -2.0)) for index in range(3)]
    scores = [0.1, 0.2, 0.3]
    summary = summarise_held_out(current, scores, scores, [answer.logprobs for answer in current])
    assert summary["reward_change"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert summary["win_rate"]["mean"] == 0.5
    assert summary["kl_initial"] == {"mean": 0.0, "low": 0.0, "high": 0.0}


def test_summary_with_every_score_abstained_and_with_unequal_lengths() -> None:
    current = [candidate(0, "a b", (-1.0,))]
    summary = summarise_held_out(current, [None], [0.5], [[-1.0]])
    assert summary["abstained"] == 1
    assert summary["reward"] == summary["win_rate"] == {"mean": None, "low": None, "high": None}
    with pytest.raises(ValueError, match="one entry a prompt"):
        summarise_held_out(current, [1.0, 2.0], [1.0], [[-1.0]])
