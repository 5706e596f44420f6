"""Which arms, seeds and prompts are set side by side."""

from __future__ import annotations

import numpy as np
import pytest
from comparing_parts import outcome

from online_dpo.compare.grid import cells, complete, make_grid
from online_dpo.compare.outcomes import Outcomes
from online_dpo.errors import RunFolderError


def arm(name: str, seeds: dict[int, int], run: str = "run") -> list[Outcomes]:
    """An arm with so many rounds after 0 at each seed."""
    return [
        outcome(name, seed, index, [seed + index / 10] * 4, run=run)
        for seed, rounds in seeds.items()
        for index in range(rounds + 1)
    ]


def test_seeds_that_not_all_arms_have_are_left_out_and_said() -> None:
    grid = make_grid([*arm("a", {0: 2, 1: 2, 2: 2}), *arm("b", {0: 2, 2: 1})])
    assert grid.seeds == {"a": (0, 2), "b": (0, 2)}
    assert (grid.rounds("a"), grid.rounds("b")) == ([0, 1, 2], [0, 1])
    assert grid.warnings == ("seeds 1 are left out: not every arm has closed a round there",)


def test_a_seed_with_round_0_alone_has_not_begun() -> None:
    assert make_grid([*arm("a", {0: 1, 1: 1}), *arm("b", {0: 1, 1: 0})]).seeds["a"] == (0,)


def test_an_arm_that_has_not_begun_is_left_out_and_said() -> None:
    grid = make_grid([*arm("a", {0: 1}), *arm("b", {0: 0})])
    assert list(grid.arms) == ["a"]
    assert grid.warnings == ("b is left out: it has no closed round yet",)
    with pytest.raises(RunFolderError, match="nothing to compare"):
        make_grid(arm("b", {0: 0}))


def test_seeds_of_arms_that_share_none_are_set_side_by_side_in_order() -> None:
    grid = make_grid([*arm("a", {0: 1, 1: 1, 2: 1}, "one"), *arm("b", {7: 1, 9: 1}, "two")])
    assert grid.seeds == {"a": (0, 1), "b": (7, 9)}
    assert "share no seed" in grid.warnings[0]
    assert cells([rounds[1] for rounds in grid.arms["b"]], "reward")[0].tolist() == [7.1, 9.1]


def test_arms_of_one_name_in_two_runs_are_named_after_their_runs() -> None:
    both = [*arm("a", {0: 1}, "one"), *arm("a", {0: 1}, "two"), *arm("b", {0: 1}, "two")]
    assert list(make_grid(both).arms) == ["one/a", "two/a", "b"]
    assert list(make_grid(arm("initial", {0: 1})).arms) == ["run/initial"]


def test_prompts_in_another_order_are_a_mistake() -> None:
    one, two = arm("a", {0: 1})
    with pytest.raises(ValueError, match="another order"):
        make_grid([one, two.reordered(two.prompt_ids[::-1])])


def test_a_prompt_is_left_out_when_any_cell_lacks_a_value() -> None:
    one = np.array([[1.0, 2.0], [np.nan, 4.0], [5.0, 6.0]])
    two = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, np.nan]])
    (left, right), lost = complete(one, two)
    assert (left.tolist(), right.tolist(), lost) == ([[1.0, 2.0]], [[1.0, 2.0]], 2)


def test_reordered_takes_every_array_along() -> None:
    one = outcome("a", 0, 1, [1.0, 2.0, 3.0], gold=np.array([4.0, 5.0, 6.0]), tokens=np.array([7.0, 8.0, 9.0]))
    found = one.reordered(["p002", "p000"])
    assert found.gold is not None and found.log_ratio is not None
    assert (found.reward.tolist(), found.gold.tolist(), found.tokens.tolist()) == ([3, 1], [6, 4], [9, 7])
    assert (found.prompt_ids, found.log_ratio.size) == (("p002", "p000"), 2)
