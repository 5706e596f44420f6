"""The KL of fresh samples, end to end from a model's log-probs: unbiased, end token included, blind to padding.

Two real models over a vocabulary of three tokens, answers of at most three tokens: all 15 answers are enumerated, so
that the estimator's expectation is a sum, and the divergence itself is known by the chain rule.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from online_dpo.logps import collate, token_logps
from online_dpo.measure import kl_sequence

END = 2
PROMPT = (0, 1, 1)
ANSWERS = [
    (END,),
    *((a, END) for a in (0, 1)),
    *((a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1, END)),
]
"""An answer ends with the end token, or at three tokens without."""


def tiny(seed: int) -> Any:
    """A model of one layer in float64; weights wide enough for distributions far from uniform."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=3,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
        initializer_range=0.5,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=END,
    )
    return LlamaForCausalLM(config).double().eval()


@pytest.fixture(scope="module")
def models(one_thread: None) -> tuple[Any, Any]:
    """The policy and the reference."""
    return tiny(1), tiny(2)


@torch.no_grad()
def rows(model: Any, answers: list[tuple[int, ...]], pad: int = 0) -> list[list[float]]:
    """Log-probs of the answers' tokens, all answers in one padded batch."""
    batch = collate([(PROMPT, answer) for answer in answers], pad_token_id=pad)
    return [part.tolist() for part in torch.split(token_logps(model, batch), list(batch.lengths))]


@torch.no_grad()
def next_token(model: Any, answer: tuple[int, ...]) -> Tensor:
    """log π(· | prompt, answer), shape [3]: alone, without padding or mask."""
    logits: Tensor = model(input_ids=torch.tensor([[*PROMPT, *answer]])).logits[0, -1]
    return logits.log_softmax(-1)


def chain_rule(policy: Any, reference: Any) -> float:
    """KL = Σ over beginnings b of fewer than three tokens, none of them the end: π(b)·KL(π(·|b) ‖ ref(·|b))."""
    total = 0.0
    beginnings: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    while beginnings:
        answer, logp = beginnings.pop()
        own, other = next_token(policy, answer), next_token(reference, answer)
        total += float(torch.tensor(logp).exp() * (own.exp() * (own - other)).sum())
        if len(answer) < 2:
            beginnings += [((*answer, token), logp + float(own[token])) for token in (0, 1)]
    return total


def expectation(theta: list[list[float]], values: list[float]) -> float:
    """E over answers sampled from θ."""
    return sum(float(torch.tensor(sum(row)).exp()) * value for row, value in zip(theta, values, strict=True))


def test_the_estimator_is_unbiased(models: tuple[Any, Any]) -> None:
    """Σ_y π(y)·(estimate from y alone) is the KL of the two distributions over whole answers."""
    policy, reference = models
    theta, ref = rows(policy, ANSWERS), rows(reference, ANSWERS)
    assert expectation(theta, [1.0] * len(ANSWERS)) == pytest.approx(1, abs=1e-6)
    estimates = [kl_sequence([own], [other]).mean for own, other in zip(theta, ref, strict=True)]
    exact = chain_rule(policy, reference)
    assert exact > 0.1
    assert expectation(theta, estimates) == pytest.approx(exact, abs=1e-5)


def test_the_end_token_is_part_of_it(models: tuple[Any, Any]) -> None:
    """Without it, the expectation is another number by far: when to stop is part of what two policies differ in."""
    policy, reference = models
    theta, ref = rows(policy, ANSWERS), rows(reference, ANSWERS)
    ends = [len(answer) - (answer[-1] == END) for answer in ANSWERS]
    estimates = [sum(own[:n]) - sum(other[:n]) for own, other, n in zip(theta, ref, ends, strict=True)]
    assert abs(expectation(theta, estimates) - chain_rule(policy, reference)) > 0.05


def test_padding_cannot_enter(models: tuple[Any, Any]) -> None:
    """Not which token pads, bit for bit; nor how much: a neighbour of 12 tokens, or none, but for rounding."""
    for model in models:
        padded = rows(model, ANSWERS)
        assert [len(row) for row in padded] == [len(answer) for answer in ANSWERS]
        assert rows(model, ANSWERS, pad=1) == rows(model, ANSWERS, pad=END) == padded
        wide = rows(model, [*ANSWERS, (0, 1) * 6])[:-1]
        alone = [rows(model, [answer])[0] for answer in ANSWERS]
        for found in (wide, alone):
            for row, expected in zip(found, padded, strict=True):
                assert row == pytest.approx(expected, abs=1e-6)
