"""Whole comparisons of simulated experiments whose truth is known."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from comparing_parts import experiment, outcome

from online_dpo.compare import INITIAL, Comparison, Difference, Measure, Outcomes, compare
from online_dpo.compare.differences import differences, make_field
from online_dpo.compare.grid import make_grid
from online_dpo.errors import ConfigError

MEASURES: tuple[Measure, ...] = ("reward", "win_rate", "length_controlled")


def compared(outcomes: list[Outcomes]) -> dict[Measure, Difference]:
    """The difference of two arms by each measure, without the league."""
    return {one.measure: one for one in differences(make_field(make_grid(outcomes), "last"))}


def holds_nothing(one: Difference) -> bool:
    """Whether the interval contains what two equal arms have."""
    none = 0.0 if one.measure == "reward" else 0.5
    return one.interval.low <= none <= one.interval.high


def misses(seeds: int, spread: float, times: int) -> dict[Measure, int]:
    """In how many of `times` experiments with two identical arms the interval leaves out "no difference"."""
    random = np.random.default_rng([seeds, int(100 * spread)])
    missed: dict[Measure, int] = dict.fromkeys(MEASURES, 0)
    for _ in range(times):
        found = compared(experiment(random, seeds=seeds, spread_of_seeds=spread))
        for measure, one in found.items():
            missed[measure] += not holds_nothing(one)
            assert (one.verdict == "inconclusive") == (one.p_corrected > 0.05)
    return missed


def test_two_identical_arms_are_inconclusive() -> None:
    """100 experiments, 3 seeds, prompts and seeds with effects of their own, heavy tails."""
    assert max(misses(3, 0.15, 100).values()) <= 7


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "spread"), [(1, 0.0), (2, 0.1), (3, 0.0), (3, 0.1), (3, 0.5), (5, 0.2)])
def test_two_identical_arms_are_inconclusive_whatever_varies(seeds: int, spread: float) -> None:
    assert max(misses(seeds, spread, 300).values()) <= 0.07 * 300


@pytest.mark.slow
def test_an_injected_difference_is_found_as_often_as_promised() -> None:
    """A pilot's verdict says how many more prompts it wants; experiments of that size find the difference about 80
    times in 100. A pilot knows only its own estimates: those that happen to be about right are taken."""
    random, found, tried = np.random.default_rng(8), 0, 0
    for _ in range(150):
        pilot = compared(experiment(random, shifts=(0.3, 0.0), prompts=40, seeds=1, heavy=False))["reward"]
        if pilot.more_prompts is None or not 0.27 <= pilot.interval.mean <= 0.33:
            continue
        for _ in range(20):
            size = 40 + pilot.more_prompts
            again = experiment(random, shifts=(0.3, 0.0), prompts=size, seeds=1, heavy=False, spread_of_seeds=0.0)
            tried += 1
            found += compared(again)["reward"].verdict == "better"
    assert tried >= 100
    assert 0.7 <= found / tried <= 0.92


def test_a_large_difference_is_said_with_its_sign() -> None:
    random = np.random.default_rng(0)
    up = compared(experiment(random, shifts=(1.5, 0.0), spread_of_seeds=0.02))
    down = compared(experiment(random, shifts=(0.0, 1.5), spread_of_seeds=0.02))
    assert {one.verdict for one in up.values()} == {"better"}
    assert {one.verdict for one in down.values()} == {"worse"}
    assert up["reward"].sentence.startswith("a is better than b by 1.")
    assert down["reward"].sentence.startswith("a is worse than b by 1.")
    assert "60 prompts × 3 seeds" in up["reward"].sentence
    assert "of prompts" in up["win_rate"].sentence
    assert (up["reward"].more_prompts, up["reward"].more_seeds) == (None, None)


def test_what_is_not_decided_says_what_would_decide_it() -> None:
    """0.2 between arms whose answers differ by about √2·0.8 a prompt: one seed, 40 prompts."""
    found = compared(experiment(np.random.default_rng(5), shifts=(0.2, 0.0), prompts=40, seeds=1))["reward"]
    assert found.verdict == "inconclusive"
    assert found.more_prompts is not None and found.more_seeds is None
    assert "this seed only" in found.sentence
    assert "more prompts would decide it" in found.sentence


def test_four_equal_arms_have_one_correction() -> None:
    found = compare(experiment(np.random.default_rng(1), shifts=(0.0,) * 4, prompts=30))
    assert len(found.differences) == 3 * 6
    for measure in MEASURES:
        family = [one for one in found.differences if one.measure == measure]
        assert [(one.a, one.b) for one in family] == list(itertools.combinations("abcd", 2))
        assert all(one.p <= one.p_corrected and one.family == 6 for one in family)
    assert found.verdict.startswith("inconclusive by reward: none of 6 differences is decided")


def test_the_verdict_names_the_arm_that_beats_all_others() -> None:
    found = compare(experiment(np.random.default_rng(1), shifts=(3.0, 0.0, 0.1), spread_of_seeds=0.01))
    assert found.verdict.startswith("a is better than all 2 others by reward")


def test_the_verdict_lists_what_is_decided_where_nobody_beats_all() -> None:
    found = compare(experiment(np.random.default_rng(1), shifts=(3.0, 3.0, 0.0), spread_of_seeds=0.01))
    assert found.verdict.startswith("2 of 3 differences by reward are decided")


def test_one_arm_is_held_against_the_policy_it_began_with() -> None:
    found = compare(experiment(np.random.default_rng(1), shifts=(2.0,), spread_of_seeds=0.01))
    assert {(one.a, one.b) for one in found.differences} == {("a", INITIAL)}
    assert found.verdict.startswith("a is better than initial by ")


def test_win_matrix_is_its_own_mirror() -> None:
    found = compare(experiment(np.random.default_rng(2), shifts=(0.5, 0.0)))
    matrix = found.win_matrix
    assert list(matrix) == ["a", "b", INITIAL]
    for one, other in itertools.combinations(matrix, 2):
        there, back = matrix[one][other], matrix[other][one]
        assert (there.mean + back.mean, there.low + back.high) == pytest.approx((1, 1))
    assert matrix["a"]["b"].mean == found.differences[1].interval.mean
    assert matrix["a"][INITIAL] == next(p for p in found.curves if (p.arm, p.round) == ("a", 1)).win_rate


def rounds_of(rewards: list[list[float]], **columns: list[list[float]]) -> list[Outcomes]:
    """Arm `a` at seed 0 with these rewards by round."""
    return [
        outcome("a", 0, index, reward, **{name: np.array(rows[index]) for name, rows in columns.items()})
        for index, reward in enumerate(rewards)
    ]


def test_curves_by_hand() -> None:
    """Rounds 0, 1, 2 on four prompts: against round 0 round 2 wins three and ties one, against round 1 two and two."""
    found = compare(rounds_of([[0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]], tokens=[[8] * 4, [9] * 4, [7, 9, 7, 9]]))
    start, first, second = found.curves
    assert (start.win_rate.mean, start.previous_win_rate) == (0.5, None)
    assert (first.win_rate.mean, second.win_rate.mean) == (0.75, 0.875)
    assert first.previous_win_rate == first.win_rate
    assert second.previous_win_rate is not None and second.previous_win_rate.mean == 0.625
    assert (second.reward.mean, second.tokens.mean, second.gold) == (0.75, 8.0, None)
    assert start.kl is not None and (start.kl.mean, start.kl.low, start.kl.high) == (0, 0, 0)


def test_abstentions_leave_out_their_prompt_and_are_counted() -> None:
    random = np.random.default_rng(0)
    outcomes = experiment(random, prompts=40)
    lame = [
        outcome(one.arm, one.seed, one.round, np.where(np.arange(40) < 3, np.nan, one.reward), tokens=one.tokens)
        if (one.arm, one.seed, one.round) == ("b", 1, 1)
        else one
        for one in outcomes
    ]
    found = compare(lame)
    assert {(one.prompts, one.abstained) for one in found.differences} == {(37, 3)}
    assert any("3 prompts are left out" in warning for warning in found.warnings)


def test_kl_curve_holds_the_exact_divergence_of_a_tiny_model() -> None:
    """Answers of up to three tokens out of {x, y, end}: all are enumerated under two policies, and KL(π‖π₀) is exact.
    Each of 40 experiments draws 3 seeds × 100 answers from π."""
    new, old = np.array([0.5, 0.2, 0.3]), np.array([0.3, 0.3, 0.4])
    answers = [
        (*words, *end)
        for length in range(4)
        for words in itertools.product((0, 1), repeat=length)
        for end in ([(2,)] if length < 3 else [()])
    ]
    log_new, log_old = (np.array([np.log(p)[list(answer)].sum() for answer in answers]) for p in (new, old))
    chances = np.exp(log_new)
    assert chances.sum() == pytest.approx(1)
    exact = float(chances @ (log_new - log_old))
    random, inside = np.random.default_rng(0), 0
    for _ in range(40):
        drawn = [random.choice(len(answers), size=100, p=chances) for _ in range(3)]
        found = compare(
            [
                outcome("a", seed, index, np.zeros(100), log_ratio=(log_new - log_old)[places] * index)
                for seed, places in enumerate(drawn)
                for index in (0, 1)
            ]
        )
        kl = found.curves[1].kl
        assert kl is not None
        inside += kl.low <= exact <= kl.high
    assert inside >= 37


def turned(random: np.random.Generator, gold: list[float], reward: list[float], prompts: int = 100) -> list[Outcomes]:
    """One arm whose true gold and reward by round are given."""
    level = random.normal(size=prompts)
    return rounds_of(
        [(level + mean + 0.5 * random.normal(size=prompts)).tolist() for mean in reward],
        gold=[(level + mean + 0.5 * random.normal(size=prompts)).tolist() for mean in gold],
    )


def test_a_gold_reward_that_falls_while_the_proxy_rises_is_flagged_at_its_peak() -> None:
    (flag,) = compare(turned(np.random.default_rng(0), [0, 1, 2, 1], [0, 1, 2, 3])).over_optimised
    assert (flag.arm, flag.seed, flag.peak, flag.last) == ("a", 0, 2, 3)
    assert flag.gold_fall.low > 0.5 and flag.proxy_rise.low > 0.5
    assert compare(turned(np.random.default_rng(0), [0, 1, 2, 3], [0, 1, 2, 3])).over_optimised == ()
    assert compare(turned(np.random.default_rng(0), [0, 1, 2, 1], [0, 1, 2, 1])).over_optimised == ()


def test_a_peak_found_by_looking_flags_no_arm_that_stays_level() -> None:
    """Gold is level from round 1 on, the proxy rises: 200 arms of seven rounds, one in twenty may be flagged."""
    random = np.random.default_rng(4)
    flagged = sum(bool(compare_over(turned(random, [0.0] * 7, [0.2 * i for i in range(7)], 40))) for _ in range(200))
    assert flagged <= 0.07 * 200


def compare_over(outcomes: list[Outcomes]) -> tuple[object, ...]:
    from online_dpo.compare.over_optimisation import over_optimised

    return over_optimised(make_grid(outcomes))


def test_the_verdict_is_by_gold_where_there_is_a_gold_judge() -> None:
    random = np.random.default_rng(0)
    outcomes = [
        outcome(one.arm, one.seed, one.round, one.reward, gold=one.reward - 3 * (one.arm == "a") * one.round)
        for one in experiment(random, shifts=(1.5, 0.0), spread_of_seeds=0.02)
    ]
    found = compare(outcomes)
    assert [one.measure for one in found.differences] == ["reward", "gold", "win_rate", "length_controlled"]
    assert [one.verdict for one in found.differences[:2]] == ["better", "worse"]
    assert found.measure == "gold"
    assert found.verdict.startswith("a is worse than b by")


def test_differences_that_an_experiment_is_made_for_are_corrected_for_these_alone() -> None:
    """Holm's first of 6 differences is multiplied by 6, of 1 by 1: the interval stays, the corrected p falls."""
    outcomes = experiment(np.random.default_rng(3), shifts=(0.0, 0.3, 0.1, 0.2))
    every = {(one.a, one.b, one.measure): one for one in compare(outcomes).differences}
    planned = compare(outcomes, contrasts=[("b", "a"), ("b", "not there")]).differences
    assert [(one.a, one.b, one.measure) for one in planned] == [
        ("b", "a", measure) for measure in ("reward", "win_rate", "length_controlled")
    ]
    for one in planned:
        other = every["a", "b", one.measure]
        assert (other.family, one.family) == (6, 1)
        assert one.p_corrected == one.p == pytest.approx(other.p)
        assert other.p_corrected > one.p_corrected
    assert len(compare(outcomes, contrasts=[("x", "y")]).differences) == len(every)


def test_who_wins_is_by_gold_where_there_is_a_gold_judge() -> None:
    """Arm a gains reward on every prompt and loses gold on every one: by reward it wins all, by gold none."""
    up, down = np.full(8, 1.0), np.full(8, -1.0)
    outcomes = [
        outcome("a", 0, 0, np.zeros(8), gold=np.zeros(8)),
        outcome("a", 0, 1, up, gold=down),
        outcome("b", 0, 0, np.zeros(8), gold=np.zeros(8)),
        outcome("b", 0, 1, np.zeros(8), gold=np.zeros(8)),
    ]
    by_gold = compare(outcomes)
    by_reward = compare([replace(one, gold=None) for one in outcomes])
    for found, won, first in ((by_gold, 0.0, "b"), (by_reward, 1.0, "a")):
        assert [one.interval.mean for one in found.differences if one.measure == "win_rate"] == [won]
        assert found.win_matrix["a"]["b"].mean == won and found.win_matrix["b"]["a"].mean == 1 - won
        (point,) = [point for point in found.curves if (point.arm, point.round) == ("a", 1)]
        assert point.win_rate.mean == won and point.previous_win_rate is not None
        assert point.previous_win_rate.mean == won
        order = [one.arm for one in found.league]
        assert order.index(first) < order.index("b" if first == "a" else "a")


def test_chosen_rounds_are_judged_on_the_other_half() -> None:
    found = compare(
        [one for seed in range(2) for one in _three_rounds(np.random.default_rng(seed), seed)], select="best"
    )
    assert [(one.arm, one.seed, one.round) for one in found.selected] == [("a", 0, 2), ("a", 1, 2)]
    assert {one.prompts for one in found.differences} == {20}
    assert found.prompts == 20
    assert any("the other half" in warning for warning in found.warnings)
    assert all(point.reward.n in (40, 80) for point in found.curves)


def _three_rounds(random: np.random.Generator, seed: int) -> list[Outcomes]:
    """The second is the best."""
    return [outcome("a", seed, i, mean + 0.1 * random.normal(size=40)) for i, mean in enumerate((0.0, 1.0, 2.0, 1.0))]


def test_best_gold_needs_gold() -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.gold"):
        compare(_three_rounds(np.random.default_rng(0), 0), select="best_gold")


def test_what_makes_arms_incomparable_is_said() -> None:
    first, second = rounds_of([[0.0] * 4, [1.0] * 4])
    other = [
        outcome("b", 0, index, [0.0] * 4, judge="another", sampling="another", model="another") for index in (0, 1)
    ]
    said = " ".join(compare([first, second, *other]).warnings)
    for word in ("different judges", "different sampling", "one model", "one seed", "4 prompts are few"):
        assert word in said


def test_as_dict_is_plain_json_and_tells_all() -> None:
    found = compare([*rounds_of([[0.0], [1.0]])])
    plain = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert set(plain) == {field for field in Comparison.__dataclass_fields__}
    assert plain["differences"][0]["interval"] == {"mean": 1.0, "low": None, "high": None}
    assert plain["win_matrix"]["a"][INITIAL]["mean"] == 1.0
    assert "too few prompts" in plain["differences"][0]["sentence"]
