"""RLOO through the learner: a step's gradient is that of the prompts' mean loss, however it is cut and dealt.

The truth is computed apart from the project: each answer alone behind its prompt, and the loss from its definition.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_parts import farthest, gradients_of, job_of, learner_of, pass_sizes, result_of, shifted, weights_of

from online_dpo.backends.group_step import GroupLoss, score_scale
from online_dpo.backends.hf_model import load_causal_lm
from online_dpo.backends.learner import LocalLearner
from online_dpo.backends.logp_cache import LogpCache, cache_key
from online_dpo.backends.stepping import StepSums
from online_dpo.config import DPOSpec, LoraSpec, RlooSpec
from online_dpo.errors import TrainingError
from online_dpo.protocols import TrainJob
from online_dpo.types import Group, Pair, Policy

WHOLE = 10_000
CUTS = ((1, "packed"), (80, "packed"), (WHOLE, "packed"), (1, "plain"), (80, "plain"))
CLIP = 1.1
SPEC = RlooSpec(kl=0.3, clip=CLIP)
ONE_STEP = DPOSpec(lr=1e-3, batch_size=4, warmup=0.0)
Truth = list[list[tuple[Tensor, float, float, float]]]
"""Of each answer of each group: log π with gradient, log μ, log π_ref, the score."""


@pytest.fixture(scope="module")
def groups(pairs: list[Pair]) -> tuple[Group, ...]:
    """Four prompts with 2, 3, 2 and 3 answers; the third ones are another prompt's, with that prompt's log-probs."""
    made = []
    for number, pair in enumerate(pairs[:4]):
        answers = [pair.chosen, pair.rejected]
        if number % 2:
            answers.append(replace(pairs[number + 1].chosen, prompt_id=pair.prompt.id, index=2))
        made.append(Group(pair.prompt, tuple(answers), tuple(1.5 * i - 0.5 * number for i in range(len(answers)))))
    return tuple(made)


@pytest.fixture(scope="module")
def sampled(pairs: list[Pair]) -> tuple[Group, ...]:
    """Six groups of two answers, really sampled from the initial policy."""
    return tuple(
        Group(pair.prompt, (pair.chosen, pair.rejected), (1.0 + number, -0.5)) for number, pair in enumerate(pairs)
    )


@dataclass(frozen=True)
class Situation:
    """Policy, reference and sampler all differ."""

    learner: LocalLearner
    job: TrainJob
    truth: Truth
    reference: list[list[list[float]]]
    weights: list[nn.Parameter]

    def step(self, spec: RlooSpec = SPEC, batch: Sequence[int] | None = None) -> StepSums:
        self.learner.model.model.zero_grad(set_to_none=True)
        return self.add(spec, batch)

    def add(self, spec: RlooSpec = SPEC, batch: Sequence[int] | None = None) -> StepSums:
        loss = GroupLoss(self.learner.model, self.job, spec, self.reference)
        return loss.backward(batch or range(len(self.job.groups)), 0.0)


@pytest.fixture
def situation(initial: Policy, groups: tuple[Group, ...], moved: Callable[..., Policy], tmp_path: Path) -> Situation:
    policy, reference = moved(2), moved(1)
    plain: Any = load_causal_lm(policy.path, torch.float32)
    base: Any = load_causal_lm(reference.path, torch.float32)
    generator = torch.Generator().manual_seed(4)

    def alone(model: Any, group: Group, tokens: Sequence[int]) -> Tensor:
        logits = model(input_ids=torch.tensor([[*group.prompt.token_ids, *tokens]])).logits[0]
        logs = logits[len(group.prompt.token_ids) - 1 : -1].log_softmax(-1)
        found: Tensor = logs.gather(-1, torch.tensor(tokens).unsqueeze(-1)).squeeze(-1)
        return found

    truth: Truth = []
    made, referred = [], []
    for group in groups:
        rows, answers, refs = [], [], []
        for answer, score in zip(group.candidates, group.scores, strict=True):
            pi = alone(plain, group, answer.token_ids)
            with torch.no_grad():
                ref = alone(base, group, answer.token_ids)
            # As if sampled by a policy near the one in training: π/μ on either side of the clip.
            mu = pi.detach() + 0.2 * torch.randn(len(pi), generator=generator)
            rows.append((pi.sum(), float(mu.sum()), float(ref.sum()), score))
            answers.append(replace(answer, logprobs=tuple(mu.tolist())))
            refs.append(ref.tolist())
        truth.append(rows)
        made.append(replace(group, candidates=tuple(answers)))
        referred.append(refs)
    job = job_of(initial, (), ONE_STEP, tmp_path / "next", policy=policy, reference=reference, groups=tuple(made))
    learner = learner_of(initial)
    learner.model.load(policy)
    return Situation(learner, replace(job, rloo=SPEC), truth, referred, list(plain.parameters()))


def defined(truth: Truth, kl: float, clip: float | None, scale: float = 1.0) -> list[Tensor]:
    """Each prompt's loss, from the definition."""
    found = []
    for rows in truth:
        rewards = [score / scale - kl * (float(pi.detach()) - ref) for pi, _, ref, score in rows]
        loss = torch.zeros(())
        for i, (pi, mu, _, _) in enumerate(rows):
            others = [reward for j, reward in enumerate(rewards) if j != i]
            weight = 1.0 if clip is None else min(math.exp(float(pi.detach()) - mu), clip)
            loss = loss - weight * (rewards[i] - sum(others) / len(others)) * pi / len(rows)
        found.append(loss)
    return found


def truth_gradients(situation: Situation, losses: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(torch.stack(losses).mean(), situation.weights, retain_graph=True))


def laid_out(initial: Policy, policy: Policy, layout: str) -> LocalLearner:
    learner = learner_of(initial, layout=layout)
    learner.model.load(policy)
    return learner


def test_gradient_is_that_of_all_prompts_at_once(situation: Situation) -> None:
    """Passes of one prompt, of some, of all; packed and plain: within 1e-4 of the largest entry. So are the sums."""
    losses = defined(situation.truth, 0.3, CLIP)
    expected = truth_gradients(situation, losses)
    scale = max(float(g.abs().max()) for g in expected)
    plain = laid_out(situation.learner.model.initial, situation.job.policy, "plain")
    numbers = set()
    for budget, layout in CUTS:
        here = situation if layout == "packed" else replace(situation, learner=plain)
        here.learner.model.tokens_per_pass = budget
        with pass_sizes(here.learner) as passes:
            sums = here.step()
        numbers.add(len(passes))
        assert farthest(gradients_of(here.learner), expected) < 1e-4 * scale, (budget, layout)
        # A sum of terms of some hundred nats each, of both signs.
        assert sums.loss == pytest.approx(float(torch.stack(losses).detach().sum()), abs=0.02)
    assert {1, 4} <= numbers
    kls = [
        sum(min(math.exp(float(pi.detach()) - mu), CLIP) * (float(pi.detach()) - ref) for pi, mu, ref, _ in rows)
        / len(rows)
        for rows in situation.truth
    ]
    scores = [sum(score for *_, score in rows) / len(rows) for rows in situation.truth]
    assert sums.kl == pytest.approx(sum(kls), rel=1e-3)
    assert sums.score == pytest.approx(sum(scores))
    assert (sums.margin, sums.wins, sums.r_w, sums.r_l, sums.expected) == (None,) * 5


def test_the_spec_is_followed(situation: Situation) -> None:
    """Without weights, without a penalty, with scores divided by their deviation: three other gradients, each right."""
    spread = score_scale(situation.job.groups)
    cases = (
        (RlooSpec(kl=0.3, clip=None), defined(situation.truth, 0.3, None)),
        (RlooSpec(kl=0.0, clip=CLIP), defined(situation.truth, 0.0, CLIP)),
        (RlooSpec(kl=0.3, clip=CLIP, standardise=True), defined(situation.truth, 0.3, CLIP, spread)),
        (SPEC, defined(situation.truth, 0.3, CLIP)),
    )
    all_expected = [truth_gradients(situation, losses) for _, losses in cases]
    scale = max(float(g.abs().max()) for g in all_expected[-1])
    for (spec, _), expected in zip(cases, all_expected, strict=True):
        situation.step(spec)
        assert farthest(gradients_of(situation.learner), expected) < 1e-4 * scale
    for i, first in enumerate(all_expected):
        for second in all_expected[:i]:
            assert farthest(first, second) > 0.01 * scale
    weights = [math.exp(float(pi.detach()) - mu) for rows in situation.truth for pi, mu, _, _ in rows]
    assert max(weights) > CLIP > min(weights)


def test_scores_are_scaled_by_their_deviation_in_the_round(groups: tuple[Group, ...]) -> None:
    scores = torch.tensor([score for group in groups for score in group.scores], dtype=torch.float64)
    assert score_scale(groups) == pytest.approx(float(scores.std(unbiased=False)))
    assert score_scale([replace(group, scores=(2.0,) * len(group.scores)) for group in groups]) == 1.0


def test_shares_of_workers_add_up_to_the_whole(situation: Situation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three workers, one after the other in this process; a prompt's answers stay with one of them."""
    model = situation.learner.model
    expected_sums = situation.step()
    expected = gradients_of(situation.learner)
    monkeypatch.setattr(model, "world", 3)
    model.model.zero_grad(set_to_none=True)
    parts = []
    for rank in range(3):
        monkeypatch.setattr(model, "rank", rank)
        parts.append(situation.add())
    scale = max(float(g.abs().max()) for g in expected)
    assert farthest(gradients_of(situation.learner), expected) < 1e-4 * scale
    assert all(part.tokens > 0 for part in parts)
    for field in ("loss", "score", "kl", "drift", "tokens"):
        total = sum(getattr(part, field) for part in parts)
        assert total == pytest.approx(getattr(expected_sums, field), rel=1e-4, abs=0.02)


def test_worker_without_a_prompt_adds_nothing(situation: Situation, monkeypatch: pytest.MonkeyPatch) -> None:
    model = situation.learner.model
    monkeypatch.setattr(model, "world", 2)
    monkeypatch.setattr(model, "rank", 1)
    sums = situation.step(batch=[3])
    assert (sums.loss, sums.score, sums.kl, sums.tokens) == (0.0, 0.0, 0.0, 0)
    assert all(p.grad is None for p in model.trainable)


# --- a round ---


def round_of(initial: Policy, groups: Sequence[Group], out: Path, dpo: DPOSpec = ONE_STEP, **changes: Any) -> TrainJob:
    return job_of(initial, (), dpo, out, groups=tuple(groups), **{"rloo": SPEC, **changes})


def test_the_first_step_by_hand(initial: Policy, sampled: tuple[Group, ...], tmp_path: Path) -> None:
    """On-policy, two answers with scores s and −½: every weight is 1, the penalty 0, A = ±(s + ½), the loss the mean
    over prompts of −½·(s + ½)·(log π(first) − log π(second)), from the log-probs that the engine stored."""
    dpo = ONE_STEP.model_copy(update={"batch_size": 6})
    learner = learner_of(initial)
    start, [step], policy = result_of(learner, round_of(initial, sampled, tmp_path / "next", dpo))
    losses = []
    for group in sampled:
        first, second = (sum(answer.logprobs) for answer in group.candidates)
        losses.append(-0.5 * (group.scores[0] + 0.5) * (first - second))
    assert step.loss == pytest.approx(sum(losses) / 6, abs=1e-3)
    assert start.reference_from == "engine"
    assert step.kl == pytest.approx(0.0, abs=1e-4)
    assert step.reward == pytest.approx(sum((1.0 + i - 0.5) / 2 for i in range(6)) / 6)
    assert (step.margin, step.accuracy, step.r_w, step.r_l) == (None,) * 4
    tokens = [len(g.prompt.token_ids) + sum(len(a.token_ids) for a in g.candidates) for g in sampled]
    assert step.tokens == sum(tokens)
    assert step.grad_norm > 0
    assert policy.digest != initial.digest


def test_good_answers_become_likelier(initial: Policy, sampled: tuple[Group, ...], tmp_path: Path) -> None:
    """The first answer of each prompt has the higher score: after twelve steps its share of the two has grown."""
    dpo = DPOSpec(lr=1e-3, batch_size=3, epochs=6, warmup=0.0)
    learner = learner_of(initial)
    _, steps, policy = result_of(learner, round_of(initial, sampled, tmp_path / "next", dpo, reference=initial))
    assert len(steps) == 12
    first = [(group.prompt, group.candidates[0]) for group in sampled]
    second = [(group.prompt, group.candidates[1]) for group in sampled]
    margins = []
    for at in (initial, policy):
        sides = [[sum(row) for row in learner.score(at, side)] for side in (first, second)]
        margins.append([a - b for a, b in zip(*sides, strict=True)])
    assert sum(after > before for before, after in zip(*margins, strict=True)) >= 5
    assert steps[-1].kl != 0.0


def test_where_the_references_log_probs_come_from(
    initial: Policy, sampled: tuple[Group, ...], moved: Callable[..., Policy], tmp_path: Path
) -> None:
    """The engine's where it sampled with the reference's weights; else one pass, kept in the cache; none for β = 0."""
    other = moved()
    cache = tmp_path / "logps.sqlite"
    found = []
    for number, changes in enumerate(
        ({}, {"reference": other, "cache": cache}, {"reference": other, "cache": cache}, {"rloo": RlooSpec(kl=0.0)})
    ):
        job = round_of(initial, sampled, tmp_path / str(number), **changes)  # type: ignore[arg-type]
        start, steps, policy = result_of(learner_of(initial), job)
        found.append((start.reference_from, steps[0].kl is None, policy.digest))
    assert [(origin, none) for origin, none, _ in found] == [
        ("engine", False), ("learner", False), ("cache", False), ("none", True),
    ]  # fmt: skip
    assert found[1][2] == found[2][2]


def test_falsified_log_probs_outside_the_sample_stop_the_first_step(
    initial: Policy, sampled: tuple[Group, ...], moved: Callable[..., Policy], tmp_path: Path
) -> None:
    """Groups 0, 1, 3 and 4 are compared with the engine's; the third's first answer is off by −10 nats a token."""
    false = replace(sampled[2], candidates=(shifted(sampled[2].candidates[0], -10.0), sampled[2].candidates[1]))
    changed = [*sampled[:2], false, *sampled[3:]]
    dpo = ONE_STEP.model_copy(update={"batch_size": 6})
    for name, reference in (("own", initial), ("other", moved())):
        job = round_of(initial, changed, tmp_path / name, dpo, reference=reference)
        with pytest.raises(TrainingError, match="must weigh every answer 1, found a mean log-weight of") as caught:
            result_of(learner_of(initial), job)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / name).exists()


def test_a_wrong_reference_stops_the_first_step(
    initial: Policy, sampled: tuple[Group, ...], moved: Callable[..., Policy], tmp_path: Path
) -> None:
    """The policy begins at its reference, but an older one sampled, and the cache holds another policy's log-probs."""
    policy, cache = moved(), tmp_path / "logps.sqlite"
    job = round_of(initial, sampled, tmp_path / "next", policy=policy, reference=policy, cache=cache)
    start, _, _ = result_of(learner_of(initial), job)
    assert start.reference_from == "learner"
    false = {
        cache_key(policy.digest, "float32", (group.prompt.token_ids, answer.token_ids)): answer.logprobs
        for group in sampled
        for answer in group.candidates
    }
    LogpCache(cache).keep(false)
    with pytest.raises(TrainingError, match="must have a KL of 0, found"):
        result_of(learner_of(initial), replace(job, out=tmp_path / "stale"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"groups": ()}, "no prompt with two judged answers to train on"),
        ({"source": None}, "rloo.clip weighs by the policy that sampled the answers"),
    ],
)
def test_what_cannot_be_trained_on(
    initial: Policy, sampled: tuple[Group, ...], tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    job = replace(round_of(initial, sampled, tmp_path / "next"), **changes)
    with pytest.raises(TrainingError, match=says):
        result_of(learner_of(initial), job)


@pytest.mark.parametrize("lora", [None, LoraSpec(rank=4, alpha=8.0)], ids=["full", "lora"])
def test_a_killed_round_goes_on_as_if_nothing_had_been(
    initial: Policy, sampled: tuple[Group, ...], tmp_path: Path, lora: LoraSpec | None
) -> None:
    """Stopped after its third step, a checkpoint after the second: another learner ends with the same bytes."""
    dpo = DPOSpec(lr=1e-3, batch_size=2, epochs=2, warmup=0.0)
    whole = learner_of(initial, lora=lora)
    _, expected, policy = result_of(whole, round_of(initial, sampled, tmp_path / "whole", dpo))
    job = round_of(initial, sampled, tmp_path / "next", dpo, checkpoint=tmp_path / "state")
    stream = learner_of(initial, lora=lora, save_every=2).train(job)
    for _ in range(4):
        next(stream)
    del stream
    other = learner_of(initial, lora=lora, save_every=2)
    _, steps, again = result_of(other, job)
    assert again.digest == policy.digest
    assert [step.loss for step in steps] == [step.loss for step in expected]
    assert [step.kl for step in steps] == [step.kl for step in expected]
    assert farthest(weights_of(other), weights_of(whole)) == 0.0


def test_a_checkpoint_of_other_scores_is_passed_over(
    initial: Policy, sampled: tuple[Group, ...], tmp_path: Path
) -> None:
    dpo = DPOSpec(lr=1e-3, batch_size=2, epochs=2, warmup=0.0)
    job = round_of(initial, sampled, tmp_path / "one", dpo, checkpoint=tmp_path / "state")
    result_of(learner_of(initial, save_every=2), job)
    assert (tmp_path / "state").exists()
    judged = tuple(replace(group, scores=tuple(reversed(group.scores))) for group in sampled)
    other = replace(job, groups=judged, out=tmp_path / "two")
    _, steps, policy = result_of(learner_of(initial, save_every=2), other)
    _, fresh, expected = result_of(learner_of(initial), replace(other, checkpoint=None, out=tmp_path / "three"))
    assert [step.loss for step in steps] == [step.loss for step in fresh]
    assert policy.digest == expected.digest
