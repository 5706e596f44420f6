"""The loss `sft` through the learner: answers alone, each by the mean of its tokens; rejected ones are not computed."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_parts import farthest, gradients_of, job_of, learner_of, pass_sizes, result_of

from online_dpo.backends.answer_step import AnswerLoss
from online_dpo.backends.hf_model import load_causal_lm
from online_dpo.config import DPOSpec
from online_dpo.errors import TrainingError
from online_dpo.losses import sft
from online_dpo.packing import Item
from online_dpo.types import Pair, Policy

DPO = DPOSpec(loss="sft", lr=1e-3, batch_size=6, warmup=0.0)


def chosen_of(pairs: list[Pair]) -> list[Item]:
    return [(pair.prompt.token_ids, pair.chosen.token_ids) for pair in pairs]


def mean_nll(model: Any, item: Item) -> Tensor:
    """−log π(y|x)/|y| of one answer alone behind its prompt, all logits of it."""
    prompt, answer = item
    logs = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    found: Tensor = -logs.gather(-1, torch.tensor(answer).unsqueeze(-1)).mean()
    return found


def test_the_loss_by_hand() -> None:
    """−log π/|y| of answers with −6 nats in 3 tokens and −1 in 2; no other shape is taken."""
    log_pi = torch.tensor([-2.0, -0.5], dtype=torch.float64, requires_grad=True)
    assert sft(log_pi).tolist() == [2.0, 0.5]
    [gradient] = torch.autograd.grad(sft(log_pi).sum(), log_pi)
    assert gradient.tolist() == [-1.0, -1.0]
    with pytest.raises(ValueError, match="one shape"):
        sft(torch.zeros(2, 3))


@pytest.mark.parametrize("layout", ["packed", "plain"])
def test_gradient_is_that_of_all_answers_at_once(initial: Policy, pairs: list[Pair], layout: str) -> None:
    """Passes of one answer, of some, of all. Each answer counts once, whatever its length: a mean over all tokens would
    give another gradient."""
    items = chosen_of(pairs)
    model: Any = load_causal_lm(initial.path, torch.float32)
    losses = [mean_nll(model, item) for item in items]
    parameters = list(model.parameters())
    expected = torch.autograd.grad(torch.stack(losses).mean(), parameters, retain_graph=True)
    scale = max(float(g.abs().max()) for g in expected)
    lengths = torch.tensor([float(len(answer)) for _, answer in items])
    by_token = torch.autograd.grad((torch.stack(losses) * lengths).sum() / lengths.sum(), parameters)
    assert farthest(expected, by_token) > 0.02 * scale
    learner = learner_of(initial, layout=layout)
    numbers = set()
    for budget in (1, 40, 10_000):
        learner.model.tokens_per_pass = budget
        learner.model.model.zero_grad(set_to_none=True)
        with pass_sizes(learner) as passes:
            sums = AnswerLoss(learner.model, items).backward(range(6), 0.0)
        numbers.add(len(passes))
        assert farthest(gradients_of(learner), expected) < 1e-4 * scale
        assert sums.loss == pytest.approx(float(torch.stack(losses).detach().sum()), rel=1e-4)
    assert {1, 6} <= numbers


def test_shares_of_workers_add_up(initial: Policy, pairs: list[Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    learner = learner_of(initial)
    loss = AnswerLoss(learner.model, chosen_of(pairs))
    expected_sums = loss.backward(range(6), 0.0)
    expected = gradients_of(learner)
    learner.model.model.zero_grad(set_to_none=True)
    monkeypatch.setattr(learner.model, "world", 4)
    parts = []
    for rank in range(4):
        monkeypatch.setattr(learner.model, "rank", rank)
        parts.append(loss.backward(range(6), 0.0))
    assert farthest(gradients_of(learner), expected) < 1e-4 * max(float(g.abs().max()) for g in expected)
    assert sum(part.loss for part in parts) == pytest.approx(expected_sums.loss, rel=1e-5)
    assert sum(part.tokens for part in parts) == expected_sums.tokens


def test_rejected_answers_are_not_computed_and_no_figure_of_them_is_made_up(
    initial: Policy, pairs: list[Pair], moved: Callable[..., Policy], tmp_path: Path
) -> None:
    """One item a pair in the passes; what they hold is the chosen ones' tokens. No reference is loaded for it."""
    learner = learner_of(initial)
    job = job_of(initial, pairs, DPO, tmp_path / "next", reference=moved(), cache=tmp_path / "logps.sqlite")
    with pass_sizes(learner) as passes:
        start, [step], _ = result_of(learner, job)
    assert sum(passes) == 6
    assert step.tokens == sum(len(prompt) + len(answer) for prompt, answer in chosen_of(pairs))
    assert (step.margin, step.accuracy, step.r_w, step.r_l, step.reward, step.kl) == (None,) * 6
    assert start.reference_from == "none"
    assert start.engine_gap_token is not None and start.engine_gap_token < 1e-4
    assert not (tmp_path / "logps.sqlite").exists()


def test_the_first_steps_loss_is_that_of_the_stored_log_probs(
    initial: Policy, pairs: list[Pair], tmp_path: Path
) -> None:
    """The answers were sampled from the policy: −mean of what the engine stored."""
    _, [step], _ = result_of(learner_of(initial), job_of(initial, pairs, DPO, tmp_path / "next"))
    stored = [-sum(pair.chosen.logprobs) / len(pair.chosen.logprobs) for pair in pairs]
    assert step.loss == pytest.approx(sum(stored) / 6, abs=1e-4)


def test_given_answers_of_nobodys_are_learned(initial: Policy, pairs: list[Pair], tmp_path: Path) -> None:
    """No pairs, no source, no reference: what the stage `sft` gives the learner. Eight epochs show."""
    answers = tuple((tuple(prompt), tuple(answer)) for prompt, answer in chosen_of(pairs))
    dpo = DPO.model_copy(update={"epochs": 8, "batch_size": 3})
    job = job_of(initial, (), dpo, tmp_path / "next", source=None, answers=answers)
    learner = learner_of(initial)
    start, steps, policy = result_of(learner, job)
    assert (start.reference_from, start.engine_gap_token) == ("none", None)
    assert len(steps) == 16
    assert all(math.isfinite(step.grad_norm) for step in steps)
    sides = [(pair.prompt, pair.chosen) for pair in pairs]
    before, after = (sum(-sum(row) / len(row) for row in learner.score(at, sides)) / 6 for at in (initial, policy))
    assert after < 0.7 * before


def test_no_pairs(initial: Policy, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no pairs to train on"):
        result_of(learner_of(initial), job_of(initial, (), DPO, tmp_path / "next"))
