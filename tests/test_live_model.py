"""The policy in the live engine as something to talk to."""

from __future__ import annotations

import math

import pytest

from online_dpo.backends.hf_engine import TransformersEngine
from online_dpo.config import EngineSpec, SamplingSpec
from online_dpo.live_model import EngineModel
from online_dpo.models import load_tokenizer
from online_dpo.protocols import SampleRequest
from online_dpo.types import Message, Policy, Prompt

CHATS = [[Message("user", "Once upon a time")], [Message("system", "Be brief."), Message("user", "Tom had a ball.")]]


@pytest.fixture(scope="module")
def engine(initial: Policy) -> TransformersEngine:
    engine = TransformersEngine(initial, EngineSpec(batch_size=3))
    engine.load(initial)
    return engine


def live(engine: TransformersEngine, limit: int = 200) -> EngineModel:
    return EngineModel(engine, load_tokenizer(engine.initial.path), limit)


def test_an_engine_scores_what_it_sampled_as_it_sampled_it(engine: TransformersEngine, prompts: list[Prompt]) -> None:
    """Log-probs of the sampled tokens, once from decoding step by step and once from one forward: equal to rounding."""
    requests = [SampleRequest(prompt, (number,)) for number, prompt in enumerate(prompts)]
    answers = {group[0].prompt_id: group[0] for group in engine.sample(requests, SamplingSpec(n=1, max_tokens=9))}
    rows = engine.score([(prompt.token_ids, answers[prompt.id].token_ids) for prompt in prompts])
    for prompt, row in zip(prompts, rows, strict=True):
        assert row == pytest.approx(answers[prompt.id].logprobs, abs=1e-4)


def test_continuations_are_scored_each_by_itself(engine: TransformersEngine) -> None:
    """Sums over tokens: a continuation of one token is a log-prob below 0, and the order of the asked is kept."""
    rows = live(engine).score(CHATS, [[" a", " the red ball"], [" the red ball"]])
    assert [len(row or []) for row in rows] == [2, 1]
    assert all(value < 0 and math.isfinite(value) for row in rows if row is not None for value in row)
    again = live(engine).score(CHATS[::-1], [[" the red ball"], [" the red ball", " a"]])
    assert again[1] is not None and rows[0] is not None
    assert again[1][::-1] == pytest.approx(rows[0], abs=1e-4)


def test_the_chance_of_two_continuations_is_the_models_own(engine: TransformersEngine) -> None:
    """e^score of every possible first token sums to 1: what is scored is a probability, of the very next token."""
    tokenizer = load_tokenizer(engine.initial.path)
    vocabulary = engine.model.config.vocab_size
    [row] = [engine.score([(tokenizer("Tom")["input_ids"], (token,)) for token in range(vocabulary)])]
    assert math.fsum(math.exp(value[0]) for value in row) == pytest.approx(1.0, abs=1e-4)


def test_answers_follow_their_seeds(engine: TransformersEngine) -> None:
    model = live(engine)
    first = model.generate(CHATS, max_tokens=8, temperature=1.0, seeds=[1, 2])
    assert first == model.generate(CHATS, max_tokens=8, temperature=1.0, seeds=[1, 2])
    assert first != model.generate(CHATS, max_tokens=8, temperature=1.0, seeds=[3, 4])


def test_what_is_too_long_is_none_and_the_rest_is_answered(engine: TransformersEngine) -> None:
    long = [Message("user", "Tom had a ball. " * 40)]
    model = live(engine, limit=60)
    answers = model.generate([long, CHATS[0]], max_tokens=5, temperature=0.0, seeds=[0, 0])
    assert answers[0] is None
    assert answers[1]
    rows = model.score([CHATS[0], long], [[" a"], [" a"]])
    assert rows[1] is None
    assert rows[0] is not None
    assert model.generate([long], max_tokens=5, temperature=0.0, seeds=[0]) == [None]
