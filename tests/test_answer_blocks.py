"""A round's answers by prompts: every prompt in one block, every answer with its prompt, in the file's order."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from online_dpo import answer_blocks as blocks_of
from online_dpo.answer_blocks import answer_blocks, judged_blocks, prompts_at_once
from online_dpo.errors import DataError
from online_dpo.records import each_candidate, write_candidates, write_verdicts
from online_dpo.types import Candidate, Message, Prompt, Verdict

FILE = "candidates.parquet"


def answer(prompt_id: str, index: int) -> Candidate:
    return Candidate(prompt_id, index, f"{prompt_id}/{index}", (index,), (-0.5,), "stop", index)


def prompts(count: int) -> tuple[Prompt, ...]:
    return tuple(Prompt(str(number), (Message("user", "?"),), ()) for number in range(count))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("round")


@settings(max_examples=30, deadline=None)
@given(
    order=st.lists(st.integers(0, 9), max_size=25),
    size=st.integers(1, 6),
    count=st.just(10),
    sort=st.booleans(),
)
def test_blocks_are_all_prompts_and_all_answers_once(
    folder: Path, order: list[int], size: int, count: int, sort: bool
) -> None:
    """Any order of the file: prompts without an answer, in another order than the round's, in several pieces."""
    order = sorted(order) if sort else order
    asked = prompts(count)
    rows = [answer(str(number), index) for index, number in enumerate(order)]
    write_candidates(folder / FILE, rows)
    blocks = list(answer_blocks(folder / FILE, asked, size))
    assert [prompt for block in blocks for prompt in block.prompts] == list(asked)
    assert [row for block in blocks for row in block.candidates] == rows
    for block in blocks:
        assert {row.prompt_id for row in block.candidates} <= {prompt.id for prompt in block.prompts}
    if sort:
        answered = [{row.prompt_id for row in block.candidates} for block in blocks]
        assert all(len(own) == size for own in answered[:-1])
        assert len(answered[-1]) <= size


def test_an_answer_to_no_prompt_of_the_round_is_named(folder: Path) -> None:
    write_candidates(folder / FILE, [answer("0", 0), answer("7", 0)])
    with pytest.raises(DataError, match="an answer belongs to no prompt of the round: '7'"):
        list(answer_blocks(folder / FILE, prompts(2), 1))


def test_verdicts_come_with_their_answers_and_none_is_left_over(folder: Path) -> None:
    rows = [answer(str(number), index) for number in range(5) for index in range(2)]
    verdicts = [Verdict(row.prompt_id, row.index, float(row.index)) for row in rows]
    write_candidates(folder / FILE, rows)
    write_verdicts(folder / "verdicts.parquet", verdicts)
    found = list(judged_blocks(folder, prompts(5), 2))
    assert [len(own) for _, own in found] == [4, 4, 2]
    for block, own in found:
        assert [(row.prompt_id, row.index) for row in block.candidates] == [(v.prompt_id, v.index) for v in own]
        assert all(row.logprobs == () for row in block.candidates), "log-probs are not read where nobody needs them"
    write_verdicts(folder / "verdicts.parquet", [*verdicts, verdicts[0]])
    with pytest.raises(DataError, match="more verdicts than answers"):
        list(judged_blocks(folder, prompts(5), 2))


def test_answers_of_some_prompts_alone(folder: Path) -> None:
    rows = [answer(str(number), index) for number in range(5) for index in range(2)]
    write_candidates(folder / FILE, rows)
    assert list(each_candidate(folder / FILE, of={"3", "1", "x"})) == [rows[i] for i in (2, 3, 6, 7)]
    assert list(each_candidate(folder / FILE, of=[])) == []


def test_a_block_is_whole_multiples_of_what_a_judge_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 answers at once: 12 prompts of 8; of judges that take 5 prompts 10, of those that take 50 no fewer."""
    monkeypatch.setattr(blocks_of, "AT_ONCE", 100)
    assert prompts_at_once(8) == 12
    assert prompts_at_once(8, 5) == 10
    assert prompts_at_once(8, 50) == 50
    assert prompts_at_once(1000) == 1
