"""The round that stands for an arm, and why it is judged on other prompts than it was chosen on."""

from __future__ import annotations

import numpy as np
import pytest
from comparing_parts import ids, outcome

from online_dpo.compare.selecting import Select, halves, selected_round
from online_dpo.config import validate_experiment
from online_dpo.errors import ConfigError


def test_halves_are_disjoint_equal_and_do_not_depend_on_the_order() -> None:
    names = ids(41)
    choosing, judging = halves(names)
    assert sorted([*choosing, *judging]) == list(range(41))
    assert len(choosing) == 20
    turned = halves(names[::-1])[0]
    assert {names[::-1][place] for place in turned} == {names[place] for place in choosing}
    assert [place.tolist() for place in halves(ids(1))] == [[0], [0]]


@pytest.mark.parametrize(("select", "expected"), [("last", 3), ("best", 2), ("best_gold", 1)])
def test_rules(select: Select, expected: int) -> None:
    """Round 0 never stands for an arm, however good."""
    reward, gold = (9.0, 1.0, 3.0, 2.0), (9.0, 5.0, 3.0, 4.0)
    rounds = {i: outcome("a", 0, i, [reward[i]] * 8, gold=np.full(8, gold[i])) for i in range(4)}
    assert selected_round(rounds, select) == expected


def test_best_gold_is_refused_before_a_run_where_no_judge_is_gold() -> None:
    plain = {"name": "a", "model": "m", "prompts": {"path": "p"}, "judge": "judges.length:LengthJudge"}
    with pytest.raises(ConfigError, match="best_gold needs a judge at evaluation"):
        validate_experiment({**plain, "select": "best_gold"}, "test")
    gold = {"gold": "judges.length:LengthJudge"}
    assert validate_experiment({**plain, "select": "best_gold", "evaluation": gold}, "test").select == "best_gold"


def test_the_earliest_of_equals_and_rounds_that_cannot_be_told_apart() -> None:
    equal = {i: outcome("a", 0, i, [1.0] * 8) for i in range(4)}
    assert selected_round(equal, "best") == 1
    assert selected_round(equal, "best_gold") == 3
    silent = {i: outcome("a", 0, i, [np.nan] * 8) for i in range(4)}
    assert selected_round(silent, "best") == 3


def test_rounds_are_held_against_each_other_on_the_prompts_that_all_have_scores_of() -> None:
    """Round 2 abstained on the prompt that is hard for both: its mean over the rest is higher, but it is the worse."""
    choosing, _ = halves(ids(8))
    first, second = np.full(8, 2.0), np.full(8, 1.5)
    first[choosing[0]], second[choosing[0]] = -9.0, np.nan
    assert selected_round({i: outcome("a", 0, i, [first, second][i - 1]) for i in (1, 2)}, "best") == 1


def test_choosing_and_judging_on_the_same_prompts_flatters() -> None:
    """Eight rounds of equal worth, 400 experiments: the best of them looks good where it was chosen, not elsewhere."""
    random, chosen_on, judged_on = np.random.default_rng(0), [], []
    choosing, judging = halves(ids(40))
    for _ in range(400):
        rounds = {i: outcome("a", 0, i, random.normal(size=40)) for i in range(9)}
        best = rounds[selected_round(rounds, "best")].reward
        chosen_on.append(best[choosing].mean())
        judged_on.append(best[judging].mean())
    assert np.mean(chosen_on) > 0.2
    assert abs(np.mean(judged_on)) < 0.04
