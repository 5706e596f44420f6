"""Several judges as one: units, majorities, abstentions and disagreement, derived by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from judges.combining import round_units
from judges.panel import ALONE, PanelJudge
from online_dpo.config import JudgeSpec, PairingSpec
from online_dpo.errors import JudgeError
from online_dpo.judging import (
    Abstention,
    AskedJudge,
    Item,
    Opinion,
    PairwiseJudge,
    PointwiseJudge,
    Score,
    judge_all,
    open_judge,
)
from online_dpo.pairing import make_pairs
from online_dpo.types import Candidate, Message, Prompt, Verdict

Rows = Sequence[Sequence[float | None]]
"""One row a prompt, one score a candidate; None abstains."""


class Prepared(PointwiseJudge):
    """Scores from a table by prompt and candidate."""

    batch_prompts = 4

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> list[Score]:
        said = self.rows[int(prompt.id)]
        return [Abstention("lost") if said[c.index] is None else said[c.index] for c in candidates]


def items_of(rows: Rows) -> list[Item]:
    return [
        (
            Prompt(str(n), (Message("user", "q"),), (1,)),
            [Candidate(str(n), i, f"answer {i}", (i,), (-1.0,), "stop", i) for i in range(len(row))],
        )
        for n, row in enumerate(rows)
    ]


def panel(*members: Rows, **params: Any) -> PanelJudge:
    return PanelJudge([AskedJudge(Prepared(rows), f"member {m}") for m, rows in enumerate(members)], **params)


def values(*members: Rows, **params: Any) -> list[list[float | None]]:
    """The panel's scores; None where it abstains."""
    said = panel(*members, **params).score_batch(items_of(members[0]))
    return [[answer.value if isinstance(answer, Opinion) else None for answer in row] for row in said]


# --- units ---------------------------------------------------------------------------------------------------


def test_round_units_pool_the_spread_within_prompts() -> None:
    """Prompt 0: scores 0, 2, prompt 1: 10, 14: centred ∓1, ∓2, Σ² = 2 + 8 = 10 over 1 + 1 degrees of freedom: s = √5.
    The second judge says the same times 100 plus 7: the same units. Their mean is ∓1/√5 and ∓2/√5."""
    first = [[0.0, 2.0], [10.0, 14.0]]
    second = [[100 * v + 7 for v in row] for row in first]
    one, two = 1 / math.sqrt(5), 2 / math.sqrt(5)
    assert values(first, second)[0] == pytest.approx([-one, one])
    assert values(first, second)[1] == pytest.approx([-two, two])


def test_a_judge_that_hardly_distinguishes_a_prompt_has_little_say_there() -> None:
    """Judge 0 sees 0.01 between the two, where elsewhere it sees 10; judge 1 prefers the other by its usual 1."""
    first, second = [[0.01, 0.0], [0.0, 10.0]], [[0.0, 1.0], [1.0, 0.0]]
    by_round, by_rank = values(first, second)[0], values(first, second, scale="rank")[0]
    assert by_round[1] is not None
    assert by_round[0] is not None
    assert by_round[1] > by_round[0]
    assert by_rank == [0.5, 0.5]


def test_raw_scores_are_weighted_as_they_are() -> None:
    """Weights 3 and 1: (3·1 + 5)/4 = 2, (3·2 + 1)/4 = 1.75."""
    assert values([[1.0, 2.0]], [[5.0, 1.0]], scale="raw", weights=[3, 1]) == [[2.0, 1.75]]


def test_ranks_share_places_between_equals() -> None:
    """Scores 1, 5, 5: of two rivals 0 beats none, the others one and a half each: 0, ¾, ¾; judge 1: 1, ½, 0."""
    said = values([[1.0, 5.0, 5.0]], [[9.0, 8.0, -7.0]], scale="rank")[0]
    assert said == pytest.approx([0.5, 0.625, 0.375])


def test_minimum_is_the_least_content_judge() -> None:
    """Ranks 0, ½, 1 and 1, ½, 0: minima 0, ½, 0: the one that both can live with."""
    assert values([[1.0, 2.0, 3.0]], [[3.0, 2.0, 1.0]], scale="rank", combine="minimum") == [[0.0, 0.5, 0.0]]
    assert values([[1.0, 2.0]], [[0.5, 7.0]], scale="raw", combine="minimum") == [[0.5, 2.0]]


TABLE = st.lists(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=4), min_size=1, max_size=4)


@given(TABLE, st.floats(0.01, 100), st.floats(-1e3, 1e3))
def test_round_units_forget_unit_and_origin(rows: list[list[float]], unit: float, origin: float) -> None:
    """Where the spread is not itself lost in rounding."""
    spread = max(max(row) - min(row) for row in rows)
    tables = [np.array([row]) for row in rows]
    moved = [np.array([[unit * v + origin for v in row]]) for row in rows]
    if spread > 1.0:
        for one, two in zip(round_units(tables), round_units(moved), strict=True):
            assert one == pytest.approx(two, abs=1e-6)


def test_extreme_scores_do_not_overflow() -> None:
    said = values([[0.0, 1e300], [0.0, -1e300]], [[0.0, 1.0], [0.0, 1.0]])
    assert all(value is not None and math.isfinite(value) for row in said for value in row)
    assert said[1] == pytest.approx([0.0, 0.0])


# --- majority ------------------------------------------------------------------------------------------------


def test_majority_counts_wins_less_defeats() -> None:
    """Judges rank 0>1>2, 0>2>1, 1>0>2. Majorities: 0 beats 1 (2:1), 0 beats 2 (3:0), 1 beats 2 (2:1): 1, 0, −1."""
    first, second, third = [[3.0, 2.0, 1.0]], [[30.0, 10.0, 20.0]], [[2.0, 3.0, 1.0]]
    assert values(first, second, third, combine="majority") == [[1.0, 0.0, -1.0]]
    # With weight 3 the third decides alone.
    assert values(first, second, third, combine="majority", weights=[1, 1, 3]) == [[0.0, 1.0, -1.0]]


def test_a_circle_of_majorities_is_a_tie_and_so_are_equal_weights() -> None:
    """0>1>2, 1>2>0, 2>0>1: each beats one and loses to one. 0.1 + 0.2 against 0.3 is no majority either."""
    circle = ([[3.0, 2.0, 1.0]], [[1.0, 3.0, 2.0]], [[2.0, 1.0, 3.0]])
    assert values(*circle, combine="majority") == [[0.0, 0.0, 0.0]]
    three = ([[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 1.0]])
    assert values(*three, combine="majority", weights=[0.1, 0.2, 0.3]) == [[0.0, 0.0]]


@given(st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=4), min_size=2, max_size=5))
def test_majority_by_counting(members: list[list[int]]) -> None:
    def beats(i: int, j: int) -> int:
        ahead = sum(row[i] > row[j] for row in members) - sum(row[i] < row[j] for row in members)
        return (ahead > 0) - (ahead < 0)

    said = values(*[[[float(v) for v in row]] for row in members], combine="majority")[0]
    assert said == pytest.approx([sum(beats(i, j) for j in range(4) if j != i) / 3 for i in range(4)])


# --- abstentions ---------------------------------------------------------------------------------------------


def test_a_candidate_abstains_where_one_judge_does() -> None:
    """By default the other two are scored as if it were not there: units of 1 and 3 alone."""
    rows = panel([[1.0, 99.0, 3.0]], [[5.0, None, 7.0]]).score_batch(items_of([[0, 0, 0]]))
    assert rows[0][1] == Abstention("lost")
    low, high = rows[0][0], rows[0][2]
    assert isinstance(low, Opinion)
    assert isinstance(high, Opinion)
    assert (low.value, high.value) == pytest.approx((-1 / math.sqrt(2), 1 / math.sqrt(2)))


def test_or_only_where_all_do() -> None:
    """Raw, weights 1 and 3: (1 + 15)/4 = 4, then judge 0 alone: 9; all abstained on the third."""
    members: tuple[Rows, Rows] = ([[1.0, 9.0, None]], [[5.0, None, None]])
    assert values(*members, abstain="all", scale="raw", weights=[1, 3]) == [[4.0, 9.0, None]]
    said = panel(*members, abstain="all", scale="raw").score_batch(items_of(members[0]))
    assert isinstance(said[0][1], Opinion)
    assert said[0][1].details == {"judge_0": 9.0, "judge_1": None, "disagreement": 0.0}
    # In a majority the second has one opponent, which one judge compared it with.
    assert values(*members, abstain="all", combine="majority") == [[-1.0, 1.0, None]]


@pytest.mark.parametrize("params", [{}, {"scale": "rank"}, {"combine": "majority"}, {"combine": "minimum"}])
def test_a_candidate_alone_cannot_be_placed(params: dict[str, Any]) -> None:
    assert panel([[1.0]], [[2.0]], **params).score_batch(items_of([[0]])) == [[ALONE]]
    assert values([[1.0, 2.0]], [[2.0, None]], **params) == [[None, None]]


def test_raw_scores_stand_for_a_candidate_alone() -> None:
    [[said]] = panel([[1.0]], [[2.0]], scale="raw").score_batch(items_of([[0]]))
    assert said == Opinion(1.5, {"judge_0": 1.0, "judge_1": 2.0, "disagreement": None})


# --- disagreement --------------------------------------------------------------------------------------------


def test_disagreement_is_the_share_of_rivals_on_which_judges_are_divided() -> None:
    """Judge 0: 1 < 2 < 3; judge 1: 1 < 5 > 4; judge 2 sees no difference. Only 1 and 2 are disputed: 0, ½, ½."""
    members = ([[1.0, 2.0, 3.0]], [[1.0, 5.0, 4.0]], [[0.0, 0.0, 0.0]])
    [row] = panel(*members).score_batch(items_of(members[0]))
    assert [answer.details["disagreement"] for answer in row if isinstance(answer, Opinion)] == [0.0, 0.5, 0.5]
    assert isinstance(row[1], Opinion)
    assert [row[1].details[f"judge_{m}"] for m in range(3)] == [2.0, 5.0, 0.0]


# --- together ------------------------------------------------------------------------------------------------


class Longer(PairwiseJudge):
    """Prefers the longer text, nearly for sure."""

    def prefer(self, prompt: Prompt, first: Candidate, second: Candidate) -> Score:
        return 0.5 + 0.4 * ((len(first.text) > len(second.text)) - (len(first.text) < len(second.text)))


def test_judges_that_compare_and_judges_that_score_sit_together() -> None:
    texts = ("bad", "good good good", "good")
    prompt = Prompt("p", (Message("user", "q"),), (1,))
    candidates = [Candidate("p", i, text, (i,), (-1.0,), "stop", i) for i, text in enumerate(texts)]
    spec = JudgeSpec.model_validate(
        {
            "use": "judges.panel:PanelJudge",
            "combine": "mean",
            "weights": [1, 2],
            "judges": ["judges.sentiment:SentimentJudge", {"use": "tests.test_panel:Longer"}],
        }
    )
    asked = open_judge(spec, [])
    verdicts = judge_all(asked, {"p": prompt}, candidates, max_abstain=0)
    scores = [verdict.score for verdict in verdicts if isinstance(verdict, Verdict)]
    assert scores[1] > scores[2] > scores[0]
    assert math.fsum(scores) == pytest.approx(0.0, abs=1e-9)
    result = make_pairs({"p": prompt}, candidates, verdicts, PairingSpec(), seed=0)
    assert [(pair.chosen.index, pair.rejected.index) for pair in result.pairs] == [(1, 0)]


def test_how_much_is_asked_at_once() -> None:
    """The members take 4 prompts a call, one call at a time: 8 calls of work. Units of the round need all of it."""
    rows = [[1.0, 2.0]]
    assert panel(rows, rows).batch_prompts is None
    assert panel(rows, rows, scale="rank").batch_prompts == 32
    assert panel(rows, rows, combine="majority").batch_prompts == 32
    whole = Prepared(rows)
    whole.batch_prompts = None  # type: ignore[assignment]
    assert PanelJudge([AskedJudge(whole, "w"), AskedJudge(Prepared(rows), "p")], scale="rank").batch_prompts is None


@pytest.mark.parametrize("scale", ["rank", "raw"])
def test_these_scores_do_not_depend_on_the_other_prompts(scale: str) -> None:
    first, second = [[1.0, 4.0, 2.0], [3.0, 3.0, 9.0]], [[2.0, 2.0, 5.0], [0.0, 1.0, -1.0]]
    together = values(first, second, scale=scale)
    judge = panel(first, second, scale=scale)
    for item, row in zip(items_of(first), together, strict=True):
        alone = judge.score_batch([item])[0]
        assert [answer.value for answer in alone if isinstance(answer, Opinion)] == row


def test_the_order_of_the_judges_changes_nothing() -> None:
    members = ([[1.0, 4.0, 2.0]], [[2.0, 2.0, 5.0]], [[0.0, 9.0, 1.0]])
    for combine in ("mean", "minimum", "majority"):
        expected = values(*members, combine=combine)[0]
        for order in itertools.permutations(members):
            assert values(*order, combine=combine)[0] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"combine": "median"}, "no combine 'median'"),
        ({"scale": "rounds"}, "did you mean 'round'"),
        ({"abstain": "some"}, "no abstain 'some'"),
        ({"combine": "majority", "scale": "rank"}, "majority takes no scale"),
        ({"combine": "minimum", "weights": [1, 2]}, "minimum takes no weights"),
        ({"weights": [1]}, "weights must be 2 numbers above 0"),
        ({"weights": [1, 0]}, "weights must be 2 numbers above 0"),
        ({"weights": 2}, "weights must be 2 numbers above 0"),
    ],
)
def test_wrong_keys_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(JudgeError, match=message):
        panel([[1.0]], [[1.0]], **params)


def test_one_judge_is_no_panel() -> None:
    spec = JudgeSpec.model_validate({"use": "judges.panel:PanelJudge", "judges": "judges.length:LengthJudge"})
    with pytest.raises(JudgeError, match="two judges or more"):
        open_judge(spec, [])
