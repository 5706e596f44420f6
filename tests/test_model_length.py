"""How long a sequence the engine must hold."""

from __future__ import annotations

import pytest
from fakes import fake_prompt
from test_loop import experiment

from online_dpo.config import Experiment
from online_dpo.runs import JUDGE_TOKENS, model_length, tokens_needed

PROMPTS = [fake_prompt("a"), fake_prompt("b")]


def spec(max_tokens: int = 100) -> Experiment:
    return experiment(sampling={"n": 2, "max_tokens": max_tokens})


def test_a_prompt_and_its_answer_with_one_more() -> None:
    """The longest prompt, 100 tokens of answer, and one."""
    longest = max(len(prompt.token_ids) for prompt in PROMPTS)
    assert tokens_needed(spec(), PROMPTS) == longest + 100 + 1
    assert tokens_needed(spec(), PROMPTS, judging=True) == longest + 200 + JUDGE_TOKENS + 1


@pytest.mark.parametrize("judging", [False, True])
def test_whole_blocks_of_32_and_no_more_than_the_model_was_made_for(judging: bool) -> None:
    """A judge's question that does not fit is an abstention, not a reason to refuse the model."""
    needed = tokens_needed(spec(), PROMPTS, judging)
    blocks = -(-needed // 32) * 32
    assert model_length(spec(), PROMPTS, None, judging) == blocks
    assert model_length(spec(), PROMPTS, 10_000, judging) == blocks
    assert model_length(spec(), PROMPTS, 150, judging) == min(blocks, 150)
