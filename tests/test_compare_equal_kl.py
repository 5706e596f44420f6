"""Arms compared where they are equally far from the policy that they began with."""

from __future__ import annotations

import math

import numpy as np
import pytest
from comparing_parts import outcome

from online_dpo.compare import Difference, Measure, Outcomes, compare
from online_dpo.compare.differences import differences, make_field
from online_dpo.compare.equal_kl import cells_at, common_kl
from online_dpo.compare.grid import make_grid

PROMPTS = 80


def path(arm: str, points: list[tuple[float, float]], seed: int = 0) -> list[Outcomes]:
    """An arm whose round t has KL and reward `points[t]`: four prompts, two below and two above, by as much."""
    around = np.array([-1.0, -1.0, 1.0, 1.0])
    return [
        outcome(arm, seed, index, reward + around, log_ratio=kl * (1 + around / 2))
        for index, (kl, reward) in enumerate(points)
    ]


def by_measure(outcomes: list[Outcomes]) -> dict[Measure, Difference]:
    return {one.measure: one for one in differences(make_field(make_grid(outcomes), "last"))}


def test_between_two_rounds_a_path_is_straight_in_the_root_of_kl() -> None:
    """a: KL 0, 1, 4 with rewards 0, 2, 3. b ends at KL 9/4, reward 1: √KL = 3/2 is half way between a's 1 and 2, so a
    has (2 + 3)/2 = 5/2 there, and a − b = 3/2. Both arms' steps of reward a √nat there: a's 1, b's (1 − 0)/(3/2)."""
    grid = make_grid([*path("a", [(0, 0), (1, 2), (4, 3)]), *path("b", [(0, 0), (2.25, 1)])])
    assert common_kl(grid, "a", "b") == pytest.approx(2.25)
    assert cells_at(grid.arms["a"], 2.25, "reward").mean() == pytest.approx(2.5)
    found = by_measure([*path("a", [(0, 0), (1, 2), (4, 3)]), *path("b", [(0, 0), (2.25, 1)])])["equal_kl"]
    assert found.interval.mean == pytest.approx(1.5)
    assert found.kl == pytest.approx(2.25)
    assert "better than b by 1.500 [" in found.sentence and "reward at equal KL (2.25 nats)" in found.sentence


def test_a_prompts_cell_is_less_by_what_its_log_ratio_moves_the_place() -> None:
    """b: √KL 0 to 3/2, reward 0 to 1, taken at its end: the slope is 2/3. A prompt with log-ratio 9/4·(1 ± 1/2) moves
    √KL by (±9/8)/(2·3/2) = ±3/8, and the place's reward by ±1/4: cells 1 ± 1 become 1 ± 3/4."""
    grid = make_grid(path("b", [(0, 0), (2.25, 1)]))
    assert cells_at(grid.arms["b"], 2.25, "reward")[:, 0] == pytest.approx([0.25, 0.25, 1.75, 1.75])


def test_the_first_crossing_counts_where_a_path_turns_back() -> None:
    grid = make_grid(path("a", [(0, 0), (4, 1), (1, 5), (9, 7)]))
    assert cells_at(grid.arms["a"], 1.0, "reward").mean() == pytest.approx(0.5)


def test_the_seed_that_went_least_far_sets_the_kl_for_all() -> None:
    ends = {("a", 0): 4, ("a", 1): 2, ("b", 0): 3, ("b", 1): 5}
    outcomes = [one for (arm, seed), kl in ends.items() for one in path(arm, [(0, 0), (kl, 1)], seed)]
    assert common_kl(make_grid(outcomes), "a", "b") == pytest.approx(2)


@pytest.mark.parametrize("still", [[(0.0, 0.0), (0.0, 1.0)], [(0.0, 0.0), (-0.5, 1.0)]])
def test_an_arm_that_did_not_move_has_no_kl_in_common(still: list[tuple[float, float]]) -> None:
    assert "equal_kl" not in by_measure([*path("a", [(0, 0), (1, 1)]), *path("b", still)])


def test_answers_of_another_distribution_have_no_kl() -> None:
    unmeasured = [outcome("b", 0, index, np.zeros(4), log_ratio=None) for index in (0, 1)]  # type: ignore[arg-type]
    assert "equal_kl" not in by_measure([*path("a", [(0, 0), (1, 1)]), *unmeasured])


def test_a_prompt_without_a_score_is_left_out_of_both() -> None:
    gap = path("a", [(0, 0), (1, 1)])
    gap[1].reward[0] = math.nan
    found = by_measure([*gap, *path("b", [(0, 0), (1, 1)])])["equal_kl"]
    assert (found.prompts, found.abstained) == (3, 1)


def simulated(random: np.random.Generator, reach: tuple[float, float], gains: tuple[float, float]) -> list[Outcomes]:
    """Two arms, three seeds, three rounds: √KL grows evenly to `reach`, the true reward is `gains` times √KL.
    Log-ratios have the variance 2 KL, as those of two normal distributions have; a part of a score goes with them."""
    found: list[Outcomes] = []
    level = random.normal(size=PROMPTS)
    for seed in range(3):
        for arm, far, gain in zip("ab", reach, gains, strict=True):
            for index in range(4):
                root = far * index / 3
                moved = math.sqrt(2) * root * random.normal(size=PROMPTS)
                reward = level + gain * root + 0.3 * moved + random.normal(size=PROMPTS)
                found.append(outcome(arm, seed, index, reward, log_ratio=root**2 + moved))
    return found


def test_of_two_arms_on_one_frontier_the_faster_is_better_but_not_at_equal_kl() -> None:
    """100 experiments: by reward the arm that goes twice as far wins in all but a few; at equal KL the interval leaves
    out 0 at most 7 times."""
    random = np.random.default_rng(3)
    found = [by_measure(simulated(random, (2.4, 1.2), (1.0, 1.0))) for _ in range(100)]
    assert sum(one["reward"].verdict == "better" for one in found) >= 90
    assert sum(not one["equal_kl"].interval.low <= 0 <= one["equal_kl"].interval.high for one in found) <= 7


def test_the_arm_that_gains_more_for_its_kl_is_better_there_though_it_went_less_far() -> None:
    found = by_measure(simulated(np.random.default_rng(4), (1.2, 3.0), (2.0, 1.0)))
    assert found["reward"].interval.mean < 0
    assert found["equal_kl"].verdict == "better"
    assert "reward at equal KL (" in found["equal_kl"].sentence


def test_it_is_in_the_comparison_and_plain() -> None:
    entry = compare(simulated(np.random.default_rng(5), (1.0, 2.0), (1.0, 1.0))).as_dict()["differences"][-1]
    assert entry["measure"] == "equal_kl"
    assert entry["kl"] == pytest.approx(1.0, abs=0.6)
