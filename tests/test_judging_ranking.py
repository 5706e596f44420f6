"""Which candidates to compare, and the strengths that come of it."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from online_dpo.config import ComparingSpec
from online_dpo.judging.ranking import (
    Outcomes,
    Place,
    bradley_terry,
    mean_wins,
    next_comparisons,
    schedule_size,
    strengths,
    swiss_waves,
)

SWISS = ComparingSpec(schedule="swiss")
KNOCK_OUT = ComparingSpec(schedule="knock_out")
QUICK = settings(max_examples=40, deadline=None)
probability = st.one_of(st.floats(0.0, 1.0), st.sampled_from([0.0, 0.5, 1.0]))
precision = st.sampled_from([1e-6, 1e-3, 0.1, 1.0, 30.0])


def logistic(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def some(values: list[float | None]) -> list[float]:
    found = [value for value in values if value is not None]
    assert len(found) == len(values)
    return found


@st.composite
def round_robin(draw: st.DrawFn, most: int = 8) -> tuple[int, dict[Place, float | None]]:
    n = draw(st.integers(2, most))
    return n, {place: draw(probability) for place in itertools.combinations(range(n), 2)}


@st.composite
def some_comparisons(draw: st.DrawFn) -> tuple[int, dict[Place, float | None]]:
    n, outcomes = draw(round_robin())
    kept = draw(st.lists(st.sampled_from(sorted(outcomes)), unique=True))
    return n, {place: draw(st.one_of(st.none(), st.just(outcomes[place]))) for place in kept}


def played(n: int, spec: ComparingSpec, judge: Callable[[int, int], float | None]) -> list[list[Place]]:
    """The waves of a schedule, each comparison answered by `judge`."""
    waves: list[list[Place]] = []
    done: dict[Place, float | None] = {}
    while wave := next_comparisons(n, spec, done):
        assert not set(wave) & set(done), "nobody meets the same one twice"
        assert all(0 <= i < j < n for i, j in wave)
        done |= {place: judge(*place) for place in wave}
        waves.append(wave)
        assert len(waves) <= n * n, "it ends"
    return waves


def results(waves: list[list[Place]], judge: Callable[[int, int], float | None]) -> dict[Place, float | None]:
    return {place: judge(*place) for wave in waves for place in wave}


# --- strengths ---


@pytest.mark.parametrize("p", [0.9, 0.5, 0.0, 1.0])
@pytest.mark.parametrize("weight", [1e-6, 0.1, 1.0, 100.0])
def test_two_candidates_stand_where_the_slope_is_zero(p: float, weight: float) -> None:
    """With s and −s: d/ds_0 [p log σ(s_0 − s_1) + (1 − p) log σ(s_1 − s_0) − λ/2 Σ s²] = p − σ(2s) − λ s = 0."""
    first, second = some(bradley_terry(2, {(0, 1): p}, weight))
    assert first == -second
    assert p - logistic(2 * first) - weight * first == pytest.approx(0.0, abs=1e-6)


def test_at_nine_in_ten_the_strength_is_the_hand_derived_one() -> None:
    """λ = 0.1, p = 0.9: 0.9 − σ(2s) = 0.1 s. At s = 0.8: 0.9 − σ(1.6) = 0.9 − 0.832018 = 0.067982 < 0.08.
    At s = 0.75: 0.9 − σ(1.5) = 0.9 − 0.817574 = 0.082426 > 0.075: the root lies between.
    """
    first, _ = some(bradley_terry(2, {(0, 1): 0.9}, 0.1))
    assert 0.75 < first < 0.8


def test_a_tiny_precision_gives_the_log_odds() -> None:
    """λ → 0: σ(s_0 − s_1) = p, so the difference is ln(0.9/0.1) = ln 9."""
    first, second = some(bradley_terry(2, {(0, 1): 0.9}, 1e-9))
    assert first - second == pytest.approx(math.log(9), abs=1e-6)


@QUICK
@given(st.integers(2, 8), precision)
def test_all_ties_are_all_zero(n: int, weight: float) -> None:
    outcomes: Outcomes = dict.fromkeys(itertools.combinations(range(n), 2), 0.5)
    assert bradley_terry(n, outcomes, weight) == [0.0] * n


@pytest.mark.parametrize("p", [0.9, 0.7, 1 / 3, 1.0])
def test_beating_each_other_in_a_circle_is_a_tie_to_the_last_bit(p: float) -> None:
    """Were it not, rounding would choose the answer to train on."""
    outcomes: Outcomes = {(0, 1): p, (1, 2): p, (0, 2): 1.0 - p}
    for spec in (ComparingSpec(), ComparingSpec(rank_by="mean_win")):
        assert len(set(strengths(3, outcomes, spec))) == 1


@QUICK
@given(round_robin(), precision)
def test_the_slope_is_zero_and_so_is_the_sum(case: tuple[int, dict[Place, float | None]], weight: float) -> None:
    """Strict concavity: the only point with slope zero is the maximum."""
    n, outcomes = case
    s = some(bradley_terry(n, outcomes, weight))
    slope = [-weight * value for value in s]
    for (i, j), p in outcomes.items():
        assert p is not None
        rest = p - 0.5 * (1 + math.tanh(0.5 * (s[i] - s[j])))
        slope[i] += rest
        slope[j] -= rest
    assert max(map(abs, slope)) < 1e-6
    assert math.fsum(s) == pytest.approx(0.0, abs=1e-8 * max(map(abs, [1.0, *s])))


@QUICK
@given(round_robin(6), st.sampled_from([0.01, 0.1, 1.0]))
def test_strengths_are_those_of_a_general_optimiser(case: tuple[int, dict[Place, float | None]], weight: float) -> None:
    from scipy.optimize import minimize

    n, outcomes = case
    i, j = np.array(list(outcomes)).T
    p = np.array(list(outcomes.values()), dtype=float)

    def loss(s: np.ndarray) -> float:
        d = s[i] - s[j]
        return float(np.sum(np.logaddexp(0, d) - p * d) + weight / 2 * np.sum(s**2))

    best = minimize(loss, np.zeros(n), method="BFGS", options={"gtol": 1e-8})
    assert bradley_terry(n, outcomes, weight) == pytest.approx(best.x, abs=1e-4)


@QUICK
@given(round_robin(), precision)
def test_where_all_met_all_the_order_is_that_of_mean_wins(
    case: tuple[int, dict[Place, float | None]], weight: float
) -> None:
    """At slope zero Σ_j p_ij = λ s_i + Σ_j σ(s_i − s_j), which rises with s_i: equal sums, equal strengths."""
    n, outcomes = case
    s, wins = some(bradley_terry(n, outcomes, weight)), some(mean_wins(n, outcomes))
    for a, b in itertools.permutations(range(n), 2):
        if wins[a] > wins[b] + 1e-6:
            assert s[a] > s[b]
        if wins[a] == wins[b]:
            assert s[a] == pytest.approx(s[b], abs=1e-6)


@QUICK
@given(some_comparisons(), precision, st.randoms(use_true_random=False))
def test_numbering_the_candidates_otherwise_changes_nothing_else(
    case: tuple[int, dict[Place, float | None]], weight: float, dice: random.Random
) -> None:
    n, outcomes = case
    new = list(range(n))
    dice.shuffle(new)
    moved: dict[Place, float | None] = {}
    for (i, j), p in outcomes.items():
        a, b = new[i], new[j]
        moved[min(a, b), max(a, b)] = p if a < b or p is None else 1.0 - p
    before, after = bradley_terry(n, outcomes, weight), bradley_terry(n, moved, weight)
    groups = sum(value is not None for value in before)
    assert groups == sum(value is not None for value in after)
    if 2 * groups > n:  # else there may be two largest groups, and numbers decide
        for i in range(n):
            assert after[new[i]] == (None if before[i] is None else pytest.approx(before[i], abs=1e-6))


@pytest.mark.parametrize("n", [2, 3, 8, 32])
@pytest.mark.parametrize("weight", [1e-6, 1e-3, 0.1, 100.0])
@pytest.mark.parametrize("shape", ["all", "chain", "star"])
def test_the_surest_of_judges_still_has_finite_strengths(n: int, weight: float, shape: str) -> None:
    places = {
        "all": list(itertools.combinations(range(n), 2)),
        "chain": [(i, i + 1) for i in range(n - 1)],
        "star": [(0, i) for i in range(1, n)],
    }[shape]
    s = np.array(some(bradley_terry(n, dict.fromkeys(places, 1.0), weight)))
    slope = -weight * s
    for i, j in places:
        rest = 1.0 - 0.5 * (1 + np.tanh(0.5 * (s[i] - s[j])))
        slope[i] += rest
        slope[j] -= rest
    assert np.abs(slope).max() < 1e-6
    if shape == "all":
        assert all(s[i] > s[i + 1] for i in range(n - 1))
    if shape == "chain":  # a strong prior leaves nothing but rounding of the middle, which won once and lost once
        assert all(s[i] > s[i + 1] - 1e-12 for i in range(n - 1))


def test_what_no_comparison_joins_to_the_largest_group_has_no_strength() -> None:
    """{0, 1} and {2, 3, 4} and 5: the group of three is placed. Of two equal ones that with the lowest number is."""
    outcomes: Outcomes = {(0, 1): 1.0, (2, 3): 1.0, (3, 4): 1.0, (1, 2): None}
    found = bradley_terry(6, outcomes, 0.1)
    assert [value is None for value in found] == [True, True, False, False, False, True]
    assert some(found[2:5]) == sorted(some(found[2:5]), reverse=True)
    assert [v is None for v in bradley_terry(4, {(0, 1): 1.0, (2, 3): 1.0}, 0.1)] == [False, False, True, True]
    assert bradley_terry(3, {(0, 1): None}, 0.1) == [None, None, None]
    assert bradley_terry(1, {}, 0.1) == [None]


def test_mean_wins_are_means_over_those_met() -> None:
    """0 met 1 (0.8) and 2 (0.6): 0.7. 1 met 0 alone: 0.2. 2: 0.4. 3 met nobody who was judged."""
    outcomes: Outcomes = {(0, 1): 0.8, (0, 2): 0.6, (1, 3): None}
    assert mean_wins(4, outcomes)[:3] == pytest.approx([0.7, 0.2, 0.4])
    assert mean_wins(4, outcomes)[3] is None


# --- schedules ---


@QUICK
@given(st.integers(0, 9))
def test_all_pairs_are_all_at_once(n: int) -> None:
    spec = ComparingSpec()
    waves = played(n, spec, lambda i, j: None)
    assert sorted(place for wave in waves for place in wave) == list(itertools.combinations(range(n), 2))
    assert len(waves) <= 1
    assert schedule_size(n, spec) == sum(map(len, waves))


def test_the_number_of_waves_is_known_for_small_n() -> None:
    """⌈log₂ n⌉ + 1, at most n − 1: 2 candidates meet once, 3 need 2, 4 need 3, 8 need 4, 9 and 16 need 5, 32 need 6."""
    assert [swiss_waves(n) for n in (0, 1, 2, 3, 4, 8, 9, 16, 32)] == [0, 0, 1, 2, 3, 4, 5, 5, 6]


@QUICK
@given(st.integers(2, 33), st.randoms(use_true_random=False))
def test_swiss_waves_are_matchings_and_few(n: int, dice: random.Random) -> None:
    answers: dict[Place, float | None] = {}

    def judge(i: int, j: int) -> float | None:
        return answers.setdefault((i, j), dice.choice([0.0, 0.2, 0.5, 1.0, None]))

    waves = played(n, SWISS, judge)
    for wave in waves:
        assert len({i for place in wave for i in place}) == 2 * len(wave), "each plays once a wave"
    assert sum(map(len, waves)) <= schedule_size(n, SWISS)
    if n == 8 or n >= 10:  # the mending of pairs is sure as long as each has met fewer than half of those that play
        assert [len(wave) for wave in waves] == [n // 2] * swiss_waves(n)


@QUICK
@given(st.integers(6, 16).map(lambda half: 2 * half - 1), st.randoms(use_true_random=False))
def test_nobody_sits_out_twice_before_all_others_did(n: int, dice: random.Random) -> None:
    waves = played(n, SWISS, lambda i, j: dice.choice([0.0, 0.5, 1.0]))
    out = [i for wave in waves for i in set(range(n)) - {i for place in wave for i in place}]
    assert len(out) == len(set(out)) == len(waves)


@QUICK
@given(st.integers(2, 32), st.randoms(use_true_random=False))
def test_swiss_finds_the_best_of_a_judge_that_is_sure_and_consistent(n: int, dice: random.Random) -> None:
    """Those that never lost (sitting out is no loss) meet each other, so after ⌈log₂ n⌉ waves one is left."""
    rank = list(range(n))
    dice.shuffle(rank)

    def judge(i: int, j: int) -> float:
        return float(rank[i] < rank[j])

    found = some(strengths(n, results(played(n, SWISS, judge), judge), SWISS))
    assert max(range(n), key=found.__getitem__) == rank.index(0)


def test_as_many_waves_as_the_experiment_says() -> None:
    spec = ComparingSpec(schedule="swiss", waves=2)
    assert [len(wave) for wave in played(8, spec, lambda i, j: 1.0)] == [4, 4]
    assert schedule_size(8, spec) == 8
    assert schedule_size(3, ComparingSpec(schedule="swiss", waves=9)) == 3


@QUICK
@given(st.integers(2, 33), st.randoms(use_true_random=False), st.booleans(), precision)
def test_the_best_wins_a_knock_out_of_n_less_one_comparisons(
    n: int, dice: random.Random, sure: bool, weight: float
) -> None:
    """Also where its wins are narrow (0.5 + something small) and a loser's were clear."""
    rank = list(range(n))
    dice.shuffle(rank)

    def judge(i: int, j: int) -> float:
        best = rank.index(0)
        if sure or best not in (i, j):
            return float(rank[i] < rank[j])
        return 0.51 if i == best else 0.49

    spec = ComparingSpec(schedule="knock_out", precision=weight)
    waves = played(n, spec, judge)
    assert sum(map(len, waves)) == n - 1 == schedule_size(n, spec)
    found = some(strengths(n, results(waves, judge), spec))
    assert max(range(n), key=found.__getitem__) == rank.index(0)
    assert math.fsum(found) == pytest.approx(0.0, abs=1e-9 * n * max(map(abs, [1.0, *found])))


def test_each_loser_of_a_knock_out_stands_below_its_winner_by_their_comparison() -> None:
    """0 beats 1 with 0.9, 2 ties with 3, 0 beats 2 with 0.6. By mean_win (2p − 1): 0 − 1 = 0.8, 2 = 3, 0 − 2 = 0.2.
    Before centring 0, −0.8, −0.2, −0.2; the mean is −0.3.
    """
    outcomes: Outcomes = {(0, 1): 0.9, (2, 3): 0.5, (0, 2): 0.6}
    spec = ComparingSpec(schedule="knock_out", rank_by="mean_win")
    assert strengths(4, outcomes, spec) == pytest.approx([0.3, -0.5, 0.1, 0.1])
    found = some(strengths(4, outcomes, KNOCK_OUT))
    alone = some(bradley_terry(2, {(0, 1): 0.9}, KNOCK_OUT.precision))
    assert found[0] - found[1] == pytest.approx(alone[0] - alone[1])
    assert found[2] == found[3]


def test_in_a_knock_out_an_abstention_places_nobody() -> None:
    """(0, 1) abstains: 0 takes the seat and meets 2, who beat 3. 1 was compared with nobody: no strength."""
    answers: dict[Place, float | None] = {(0, 1): None, (2, 3): 1.0, (0, 2): 1.0}
    waves = played(4, KNOCK_OUT, lambda i, j: answers[i, j])
    assert waves == [[(0, 1), (2, 3)], [(0, 2)]]
    found = strengths(4, answers, KNOCK_OUT)
    assert found[1] is None
    assert found[0] is not None and found[2] is not None and found[3] is not None
    assert found[0] > found[2] > found[3]
    assert strengths(2, {(0, 1): None}, KNOCK_OUT) == [None, None]


@QUICK
@given(some_comparisons(), st.sampled_from(["swiss", "knock_out"]))
def test_a_schedule_taken_up_again_goes_on_as_it_would_have(
    case: tuple[int, dict[Place, float | None]], schedule: str
) -> None:
    """What comes next depends on what came of it, not on when: asking twice gives the same."""
    n, outcomes = case
    spec = ComparingSpec.model_validate({"schedule": schedule})
    waves = played(n, spec, lambda i, j: outcomes.get((i, j), 0.5))
    again = dict(reversed(list(results(waves[:1], lambda i, j: outcomes.get((i, j), 0.5)).items())))
    assert next_comparisons(n, spec, again) == (waves[1] if len(waves) > 1 else [])
