"""Scores freed of length: the slope by hand, and that nothing of length is left within prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from judges.length_controlled import LengthControlledJudge
from online_dpo.config import JudgeSpec
from online_dpo.errors import JudgeError
from online_dpo.judging import Abstention, AskedJudge, Item, Opinion, PointwiseJudge, Score, judge_all, open_judge
from online_dpo.types import Candidate, Message, Prompt, Verdict

Row = list[tuple[int, float | None]]
"""(length in words, score) of a prompt's candidates; None abstains."""


class Prepared(PointwiseJudge):
    """Scores from a table by prompt id and index."""

    batch_prompts = None

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> list[Score]:
        return [self.rows[int(prompt.id)][c.index][1] for c in candidates]


def controlled(rows: Sequence[Row], **params: Any) -> list[list[Any]]:
    items: list[Item] = []
    for number, row in enumerate(rows):
        prompt = Prompt(str(number), (Message("user", "q"),), (1,))
        texts = [" ".join(["w"] * length) for length, _ in row]
        items.append((prompt, [Candidate(str(number), i, t, (), (), "stop", i) for i, t in enumerate(texts)]))
    judge = LengthControlledJudge(AskedJudge(Prepared(rows), "inner"), **{"unit": "words", **params})
    return judge.score_batch(items)


def test_the_slope_is_pooled_within_prompts() -> None:
    """Prompt 0: lengths 1, 3, scores 0, 2: centred x ∓1, s ∓1. Prompt 1: lengths 10, 12, 14, scores 5, 5, 8: x −2, 0,
    2, s −1, −1, 2. Σxs = 2 + 6 = 8, Σx² = 2 + 8 = 10, Σs² = 2 + 6 = 8: slope 0.8, r² = 64/80 = 0.8. Scores less
    0.8·x: 0.8, 1.2 and 6.6, 5, 6.4."""
    rows = controlled([[(1, 0.0), (3, 2.0)], [(10, 5.0), (12, 5.0), (14, 8.0)]])
    assert [opinion.value for row in rows for opinion in row] == pytest.approx([0.8, 1.2, 6.6, 5.0, 6.4])
    assert rows[1][2].details == pytest.approx({"raw": 8.0, "slope": 0.8, "r2": 0.8})


def test_the_logarithm_of_length() -> None:
    """ln(1 + length) is 0 for no word and ln 20 for 19: two points lie on their line, both get the mean score."""
    rows = controlled([[(0, 1.0), (19, 4.0)]], log=True)
    assert [opinion.value for opinion in rows[0]] == pytest.approx([2.5, 2.5])
    assert rows[0][0].details["slope"] == pytest.approx(3.0 / math.log(20))


def test_abstentions_stay_and_do_not_count() -> None:
    """Without the third: lengths 1, 3, scores 0, 4, slope 2, both 2."""
    rows = controlled([[(1, 0.0), (3, 4.0), (100, None)]])
    assert [rows[0][0].value, rows[0][1].value] == pytest.approx([2.0, 2.0])
    assert rows[0][2] == Abstention("judge declined")


@pytest.mark.parametrize(
    "row", [[(4, 1.0), (4, 2.0)], [(4, 1.0)], [(1, 3.0), (9, 3.0)], [(1, 1.0), (2, 5.0), (3, 1.0)]]
)
def test_scores_stay_where_length_explains_nothing(row: Row) -> None:
    """One length, one candidate, one score, or a slope of 0."""
    said = controlled([row])[0]
    assert [opinion.value for opinion in said] == [score for _, score in row]
    assert (said[0].details["slope"], said[0].details["r2"]) == (0.0, 0.0)


def test_a_prompt_where_all_abstain() -> None:
    assert controlled([[(1, None), (2, None)]]) == [[Abstention("judge declined")] * 2]
    assert controlled([]) == []


ROWS = st.lists(
    st.lists(st.tuples(st.integers(0, 300), st.floats(-1e6, 1e6) | st.none()), min_size=1, max_size=5),
    min_size=1,
    max_size=6,
)


@given(ROWS, st.booleans())
def test_no_correlation_with_length_is_left_within_prompts(rows: list[Row], log: bool) -> None:
    """|Σ x·s'| ≤ 1e-9·√(Σ x² Σ s²), s the scores before: also where what is left is all rounding."""
    said = controlled(rows, log=log)
    xs, before, after = [], [], []
    for row, answers in zip(rows, said, strict=True):
        there = [i for i, answer in enumerate(answers) if isinstance(answer, Opinion)]
        assert there == [i for i, (_, score) in enumerate(row) if score is not None]
        lengths = [math.log1p(row[i][0]) if log else float(row[i][0]) for i in there]
        xs += centred(lengths)
        before += centred([answers[i].details["raw"] for i in there])
        after += centred([answers[i].value for i in there])
        means = [math.fsum(answers[i].details["raw"] for i in there), math.fsum(answers[i].value for i in there)]
        assert means[0] == pytest.approx(means[1], abs=1e-6)
    size = math.sqrt(math.fsum(x * x for x in xs) * math.fsum(s * s for s in before))
    assume(size > 1e-3)
    assert abs(math.fsum(x * s for x, s in zip(xs, after, strict=True))) <= 1e-9 * size


def centred(values: list[float]) -> list[float]:
    mean = math.fsum(values) / len(values) if values else 0.0
    return [value - mean for value in values]


def test_extreme_scores_do_not_overflow() -> None:
    rows = controlled([[(1, 0.0), (2, 1e300), (3, 1.5e300)]])
    assert all(math.isfinite(opinion.value) and 0.0 < opinion.details["r2"] < 1.0 for opinion in rows[0])


def test_the_length_judge_has_nothing_left() -> None:
    """Length controlled for length: every candidate of a prompt gets the prompt's mean length."""
    spec = {"use": "judges.length_controlled:LengthControlledJudge", "unit": "words"}
    spec["judge"] = {"use": "judges.length:LengthJudge", "unit": "words"}  # type: ignore[assignment]
    asked = open_judge(JudgeSpec.model_validate(spec), [])
    prompts = {name: Prompt(name, (Message("user", "q"),), (1,)) for name in "pq"}
    candidates = [
        Candidate(name, i, " ".join(["w"] * n), (), (), "stop", i)
        for name, lengths in (("p", (1, 2, 6)), ("q", (4, 10)))
        for i, n in enumerate(lengths)
    ]
    verdicts = judge_all(asked, prompts, candidates, max_abstain=0)
    assert [v.score for v in verdicts if isinstance(v, Verdict)] == pytest.approx([3, 3, 3, 7, 7])


@pytest.mark.parametrize(("params", "message"), [({"unit": "word"}, "did you mean 'words'"), ({"log": 1}, "log")])
def test_wrong_keys_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(JudgeError, match=message):
        controlled([], **params)
    with pytest.raises(JudgeError, match="must be one judge"):
        LengthControlledJudge([])  # type: ignore[arg-type]
