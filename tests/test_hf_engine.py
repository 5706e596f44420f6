"""The transformers engine: seeds, log-probs, endings and weights."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from online_dpo.backends.hf_engine import TransformersEngine, draw, left_padded
from online_dpo.backends.policy_model import PolicyModel
from online_dpo.config import EngineSpec, LoraSpec, SamplingSpec
from online_dpo.errors import EngineError
from online_dpo.model_config import end_token_ids
from online_dpo.models import digest_folder
from online_dpo.protocols import SampleRequest
from online_dpo.types import Candidate, Policy, Probe, Prompt

FOUR = torch.tensor([0.25, 0.5, 0.1, 0.15]).log()
"""Next-token distribution of the hand-derived cases; the order of the tokens is not that of the probabilities."""
Moved = Callable[..., Policy]


def requests_for(prompts: Sequence[Prompt], n: int = 2) -> list[SampleRequest]:
    return [SampleRequest(p, tuple(1000 * k + i for i in range(n))) for k, p in enumerate(prompts)]


def engine_of(policy: Policy, **spec: object) -> TransformersEngine:
    engine = TransformersEngine(policy, EngineSpec.model_validate(spec))
    engine.load(policy)
    return engine


def sampled(
    engine: TransformersEngine, requests: Sequence[SampleRequest], sampling: SamplingSpec
) -> dict[tuple[str, int], Candidate]:
    return {(c.prompt_id, c.index): c for group in engine.sample(requests, sampling) for c in group}


# --- seeds ---


def test_answer_depends_on_its_own_seed_alone(initial: Policy, prompts: list[Prompt]) -> None:
    """Six prompts × two seeds decoded one at a time, four and all together, forwards and backwards, and one request
    by itself: the same tokens. Neighbours only pad, and padding moves logits by rounding."""
    requests = requests_for(prompts)
    sampling = SamplingSpec(n=2, max_tokens=20)
    reference = sampled(engine_of(initial, batch_size=32), requests, sampling)
    assert len(reference) == 12
    for size in (1, 4):
        engine = engine_of(initial, batch_size=size)
        for order in (requests, requests[::-1], requests[3:4]):
            for key, candidate in sampled(engine, order, sampling).items():
                assert candidate.token_ids == reference[key].token_ids
                assert candidate.logprobs == pytest.approx(reference[key].logprobs, abs=1e-4)
                assert replace(candidate, logprobs=()) == replace(reference[key], logprobs=())


def test_other_seeds_give_other_answers(initial: Policy, prompts: list[Prompt]) -> None:
    """Of 20 seeds for one prompt, 40 tokens each, no two alike; and a seed used twice gives one answer twice."""
    engine = engine_of(initial)
    seeds = (*range(20), 7)
    [group] = engine.sample([SampleRequest(prompts[0], seeds)], SamplingSpec(n=21, max_tokens=40))
    answers = [candidate.token_ids for candidate in group]
    assert len(set(answers)) == 20
    assert answers[20] == answers[7]


def test_what_a_candidate_records(initial: Policy, prompts: list[Prompt]) -> None:
    engine = engine_of(initial)
    groups = list(engine.sample(requests_for(prompts), SamplingSpec(n=2, max_tokens=5)))
    assert sorted(group[0].prompt_id for group in groups) == sorted(p.id for p in prompts)
    for group in groups:
        assert [c.index for c in group] == [0, 1]
        number = int(group[0].prompt_id.removeprefix("p"))
        assert [c.seed for c in group] == [1000 * number, 1000 * number + 1]
        for candidate in group:
            assert candidate.prompt_id == group[0].prompt_id
            assert len(candidate.token_ids) == len(candidate.logprobs) == 5
            assert candidate.text == engine.tokenizer.decode(candidate.token_ids, skip_special_tokens=True)


def test_no_requests(initial: Policy) -> None:
    assert list(engine_of(initial).sample([], SamplingSpec())) == []


# --- log-probs ---


@pytest.mark.parametrize(
    "sampling",
    [SamplingSpec(n=2, max_tokens=24), SamplingSpec(n=2, max_tokens=24, temperature=0.6, top_p=0.8)],
    ids=["plain", "cooled"],
)
def test_stored_log_probs_are_the_learners(initial: Policy, prompts: list[Prompt], sampling: SamplingSpec) -> None:
    """The model's own, before temperature and top-p: the learner's forward over the same tokens, 1e-4 a token."""
    found = list(sampled(engine_of(initial), requests_for(prompts), sampling).values())
    ids = {p.id: p.token_ids for p in prompts}
    own = PolicyModel(initial, model_name="small").per_token([(ids[c.prompt_id], c.token_ids) for c in found])
    for candidate, expected in zip(found, own, strict=True):
        assert list(candidate.logprobs) == pytest.approx(expected, abs=1e-4)


# --- endings ---


@pytest.fixture
def soon_ending(tiny_llama: Path, tmp_path: Path) -> Policy:
    """A model whose every fourth token ends an answer, as a list in generation_config.json."""
    folder = tmp_path / "soon-ending"
    shutil.copytree(tiny_llama, folder)
    file = folder / "generation_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "eos_token_id": list(range(2, 259, 4))}))
    policy = Policy("initial", folder, digest_folder(folder))
    return replace(policy, probe=PolicyModel(policy, model_name="tiny").probe([1, 40, 41]))


def test_end_token_is_kept_and_ends_the_answer(soon_ending: Policy) -> None:
    """Finished "stop": the last token and no other is an end token. "length": max_tokens, and none is."""
    ends = set(range(2, 259, 4))
    prompt = Prompt("p", (), (1, 40, 41))
    other = Prompt("q", (), (1, 60))
    requests = [SampleRequest(prompt, tuple(range(40))), SampleRequest(other, tuple(range(40)))]
    found = sampled(engine_of(soon_ending), requests, SamplingSpec(n=40, max_tokens=6))
    reasons = {c.finish_reason for c in found.values()}
    assert reasons == {"stop", "length"}
    for candidate in found.values():
        inside = [token in ends for token in candidate.token_ids]
        if candidate.finish_reason == "stop":
            assert inside == [False] * (len(inside) - 1) + [True]
        else:
            assert inside == [False] * 6
        assert len(candidate.logprobs) == len(inside)
    # An end token as the sixth and last is a stop, not a length.
    assert any(len(c.token_ids) == 6 and c.finish_reason == "stop" for c in found.values())


def test_end_tokens_come_from_the_generation_config_first(tmp_path: Path) -> None:
    """Chat models name the end of a turn there; config.json has the base model's. None at all is possible."""
    assert end_token_ids(tmp_path) == ()
    (tmp_path / "config.json").write_text('{"eos_token_id": 5}')
    assert end_token_ids(tmp_path) == (5,)
    (tmp_path / "generation_config.json").write_text('{"bos_token_id": 1}')
    assert end_token_ids(tmp_path) == (5,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert end_token_ids(tmp_path) == (7, 8)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 0}')
    assert end_token_ids(tmp_path) == (0,)


# --- drawing ---


def counts(sampling: SamplingSpec, number: int = 4000) -> list[float]:
    """Shares of the four tokens over `number` draws from one generator."""
    generator = torch.Generator().manual_seed(0)
    logits = FOUR.unsqueeze(0)
    drawn = [int(draw(logits, sampling, [generator], [False])) for _ in range(number)]
    return [drawn.count(token) / number for token in range(4)]


def within(found: list[float], expected: list[float], number: int = 4000) -> None:
    """Four standard errors, √(p(1−p)/number); a token of probability 0 is never drawn."""
    for share, p in zip(found, expected, strict=True):
        assert abs(share - p) <= 4 * math.sqrt(p * (1 - p) / number)


def test_temperature_one_draws_the_distribution() -> None:
    within(counts(SamplingSpec()), [0.25, 0.5, 0.1, 0.15])


def test_temperature_one_half_squares_the_probabilities() -> None:
    """p²/Σp²: 0.0625, 0.25, 0.01, 0.0225, sum 0.345."""
    expected = [0.0625 / 0.345, 0.25 / 0.345, 0.01 / 0.345, 0.0225 / 0.345]
    within(counts(SamplingSpec(temperature=0.5)), expected)


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (0.49, [0.0, 1.0, 0.0, 0.0]),
        (0.6, [1 / 3, 2 / 3, 0.0, 0.0]),
        (0.8, [0.25 / 0.9, 0.5 / 0.9, 0.0, 0.15 / 0.9]),
        (0.95, [0.25, 0.5, 0.1, 0.15]),
    ],
)
def test_nucleus_by_hand(top_p: float, expected: list[float]) -> None:
    """By falling probability the masses before each token are 0, 0.5, 0.75 and 0.9: a token stays while that is
    below top_p, and what stays is renormalised: 0.5; 0.75; 0.9; 1."""
    within(counts(SamplingSpec(top_p=top_p)), expected)


def test_nucleus_is_of_the_cooled_distribution() -> None:
    """At temperature ½ the largest token alone has 0.25/0.345 = 0.72 ≥ 0.7: only it is left. Cut first and cooled
    after, 0.5 < 0.7 would keep two."""
    assert counts(SamplingSpec(temperature=0.5, top_p=0.7), 500) == [0.0, 1.0, 0.0, 0.0]


def test_temperature_zero_takes_the_largest() -> None:
    generators = [torch.Generator(), torch.Generator()]
    logits = torch.stack([FOUR, FOUR.flip(0)])
    assert draw(logits, SamplingSpec(temperature=0.0), generators, [False, False]).tolist() == [1, 2]


def test_finished_rows_draw_nothing() -> None:
    """A row's generator moves with its own draws alone: the third draw of a row that waited once is the second."""
    logits = torch.zeros((1, 50))
    busy, waiting = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    plain = [int(draw(logits, SamplingSpec(), [busy], [False])) for _ in range(3)]
    found = [int(draw(logits, SamplingSpec(), [waiting], [done])) for done in (False, True, False, False)]
    assert [found[0], *found[2:]] == plain


def test_left_padding_by_hand() -> None:
    token_ids, mask = left_padded([[5, 6, 7], [8]], torch.device("cpu"))
    assert token_ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2", "gemma2"])
def test_greedy_is_transformers_greedy(
    tiny_model: Callable[[str, Path], Path], tmp_path: Path, architecture: str
) -> None:
    """Temperature 0 against `generate(do_sample=False)` prompt by prompt; here all prompts are padded together."""
    folder = tiny_model(architecture, tmp_path / "model")
    policy = Policy("initial", folder, digest_folder(folder))
    engine = TransformersEngine(policy, EngineSpec())
    prompts = [Prompt("a", (), (1, 40, 41, 42, 43, 44)), Prompt("b", (), (1, 60)), Prompt("c", (), (1, 70, 71))]
    found = sampled(engine, requests_for(prompts, n=1), SamplingSpec(n=1, max_tokens=12, temperature=0.0))
    for prompt in prompts:
        output = engine.model.generate(torch.tensor([prompt.token_ids]), do_sample=False, max_new_tokens=12)
        assert found[prompt.id, 0].token_ids == tuple(output[0, len(prompt.token_ids) :].tolist())


# --- weights ---


@pytest.mark.parametrize("lora", [None, LoraSpec(rank=4, alpha=8.0)], ids=["full", "lora"])
def test_loading_another_policy(initial: Policy, moved: Moved, prompts: list[Prompt], lora: LoraSpec | None) -> None:
    """In place: other answers, log-probs of the new weights, and back again to the very same answers."""
    sampling = SamplingSpec(n=1, max_tokens=16)
    requests = requests_for(prompts, n=1)
    engine = engine_of(initial)
    first = sampled(engine, requests, sampling)
    policy = moved(lora=lora, scale=0.1)
    assert engine.load(policy) < 1e-4
    second = sampled(engine, requests, sampling)
    assert any(first[key].token_ids != second[key].token_ids for key in first)
    learner = PolicyModel(initial, model_name="small", lora=lora)
    learner.load(policy)
    ids = {p.id: p.token_ids for p in prompts}
    answers = list(second.values())
    own = learner.per_token([(ids[c.prompt_id], c.token_ids) for c in answers])
    for candidate, expected in zip(answers, own, strict=True):
        assert list(candidate.logprobs) == pytest.approx(expected, abs=1e-4)
    engine.load(initial)
    assert sampled(engine, requests, sampling) == first


def test_wrong_weights_stop_before_sampling(initial: Policy, moved: Moved) -> None:
    """A folder that holds other weights than its probe was taken from."""
    policy = moved()
    engine = engine_of(initial)
    with pytest.raises(EngineError, match="does not hold the weights of moved-1"):
        engine.load(replace(policy, probe=initial.probe))
    assert engine.load(policy) < 1e-4


def test_engine_that_ignored_the_new_weights(initial: Policy, moved: Moved) -> None:
    """A policy near the one before (its probe moves by less than the tolerance), and an engine that keeps the old
    weights because it takes them for the new ones."""
    policy = moved(scale=2e-6)
    engine = engine_of(initial)
    engine.loaded = policy.digest
    assert initial.probe is not None and policy.probe is not None
    distance = [abs(a - b) for a, b in zip(initial.probe.logprobs, policy.probe.logprobs, strict=True)]
    assert 1e-5 < sum(distance) / len(distance) < 5e-4
    with pytest.raises(EngineError, match="still holds initial, not moved-1"):
        engine.load(policy)


def test_policy_without_probe_is_not_sampled_from(initial: Policy) -> None:
    with pytest.raises(EngineError, match="carries no probe"):
        TransformersEngine(initial, EngineSpec()).load(replace(initial, probe=None))


def test_probe_of_other_tokens_is_noticed(initial: Policy) -> None:
    """The same log-probs, one token of the probe exchanged: the engine really computes them."""
    assert initial.probe is not None
    ids = initial.probe.token_ids
    changed = Probe((*ids[:2], ids[2] + 1, *ids[3:]), initial.probe.logprobs)
    with pytest.raises(EngineError, match="does not hold"):
        TransformersEngine(initial, EngineSpec()).load(replace(initial, probe=changed))
