"""Which prompts make a group, and of which answers."""

from __future__ import annotations

import pytest

from online_dpo.errors import DataError
from online_dpo.grouping import make_groups
from online_dpo.types import Abstain, Candidate, Message, Prompt, Verdict

PROMPTS = {name: Prompt(name, (Message("user", name),), (1, 2)) for name in ("b", "a", "c", "d")}


def answer(prompt_id: str, index: int) -> Candidate:
    return Candidate(prompt_id, index, f"{prompt_id}{index}", (3 + index,), (-1.0,), "stop", 0)


def test_judged_answers_by_prompt() -> None:
    """b has three, one of them without a verdict; a has one judged, c none, d no answer at all."""
    candidates = [answer("a", 0), answer("a", 1), answer("b", 2), answer("b", 0), answer("b", 1), answer("c", 0)]
    verdicts: list[Verdict | Abstain] = [
        Verdict("a", 0, 1.0), Abstain("a", 1, "none"), Verdict("b", 2, 0.5), Abstain("b", 0, "none"),
        Verdict("b", 1, 0.5), Abstain("c", 0, "none"),
    ]  # fmt: skip
    [group] = make_groups(PROMPTS, candidates, verdicts)
    assert group.prompt is PROMPTS["b"]
    assert [one.index for one in group.candidates] == [1, 2]
    assert group.scores == (0.5, 0.5)  # equal scores are no fault: their advantages are 0


def test_the_order_is_that_of_the_prompts() -> None:
    candidates = [answer(name, index) for name in ("c", "a", "b") for index in (1, 0)]
    verdicts = [Verdict(one.prompt_id, one.index, float(one.index)) for one in candidates]
    groups = make_groups(PROMPTS, candidates, verdicts)
    assert [(group.prompt.id, group.scores) for group in groups] == [(name, (0.0, 1.0)) for name in ("b", "a", "c")]


def test_an_answer_without_a_verdict_is_a_fault() -> None:
    with pytest.raises(DataError, match="candidate 1 of prompt 'a' has no verdict"):
        make_groups(PROMPTS, [answer("a", 0), answer("a", 1)], [Verdict("a", 0, 1.0)])
