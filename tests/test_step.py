"""One step's gradient is that of the whole batch's mean loss, however it is cut, laid out and dealt.

The truth is computed apart from the project: each answer alone behind its prompt, unpadded, all logits of it, and the
loss written out from its definition.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training_parts import PAIR_EACH, farthest, gradients_of, job_of, learner_of, pass_sizes, result_of

from online_dpo.backends import step as step_module
from online_dpo.backends.hf_model import load_causal_lm
from online_dpo.backends.learner import LocalLearner
from online_dpo.backends.reference_logps import PairLogps
from online_dpo.backends.step import StepLoss
from online_dpo.backends.stepping import StepSums
from online_dpo.config import DPOSpec
from online_dpo.dpo_spec import PAIR_LOSSES
from online_dpo.errors import TrainingError
from online_dpo.losses import LN2
from online_dpo.objective import Objective
from online_dpo.protocols import TrainJob
from online_dpo.types import Candidate, Pair, Policy

WHOLE = 10_000
"""A token budget that the whole batch keeps to."""
CUTS = ((PAIR_EACH, "packed"), (80, "packed"), (WHOLE, "packed"), (PAIR_EACH, "plain"), (80, "plain"))
EVERYTHING: dict[str, Any] = {
    "beta": 0.3,
    "label_smoothing": 0.1,
    "nll_weight": 0.2,
    "dpop_lambda": 2.0,
    "length_penalty": 0.05,
    "ld_alpha": 0.4,
    "wpo_weight": True,
    "importance_clip": 1.5,
}
"""Every modifier but `xpo_alpha`, which asks for answers of the reference's own."""


@dataclass(frozen=True)
class Side:
    """One answer, [tokens] each: log-probs under policy (with gradient), reference and sampler, and log Σ_v p_v²."""

    pi: Tensor
    ref: Tensor
    mu: Tensor
    collision: Tensor

    def r(self, weights: Tensor | float = 1.0) -> Tensor:
        return ((self.pi - self.ref) * weights).sum()


@dataclass(frozen=True)
class Situation:
    """Policy, reference and source all differ; three of the pairs share a prompt and, two by two, an answer."""

    learner: LocalLearner
    job: TrainJob
    truth: list[tuple[Side, Side]]
    weights: list[nn.Parameter]
    """Of the plain model that `truth` comes from."""

    def reference(self) -> list[PairLogps]:
        return [(w.ref.tolist(), rejected.ref.tolist()) for w, rejected in self.truth]

    def gradients(self, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, self.weights, retain_graph=True))

    def step(self, dpo: DPOSpec, delta: float = 0.0, batch: Sequence[int] | None = None) -> StepSums:
        """One `backward`, its gradients left in the learner's model."""
        self.learner.model.model.zero_grad(set_to_none=True)
        return self.add(dpo, delta, batch)

    def add(self, dpo: DPOSpec, delta: float = 0.0, batch: Sequence[int] | None = None) -> StepSums:
        loss = StepLoss(self.learner.model, replace(self.job, dpo=dpo), Objective(dpo), self.reference())
        return loss.backward(batch or range(len(self.job.pairs)), delta)


def logps_and_collisions(model: Any, pair: Pair, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
    ids = torch.tensor([[*pair.prompt.token_ids, *tokens]])
    logs = model(input_ids=ids).logits[0, len(pair.prompt.token_ids) - 1 : -1].log_softmax(-1)
    found: Tensor = logs.gather(-1, torch.tensor(tokens).unsqueeze(-1)).squeeze(-1)
    return found, logs.detach().exp().square().sum(-1).log()


@pytest.fixture(scope="module")
def crossed(pairs: list[Pair]) -> list[Pair]:
    """The six pairs, and two more of the first prompt: its chosen answer against another, and that against the last."""
    first = pairs[0]
    other = replace(pairs[1].chosen, prompt_id=first.prompt.id, index=2)
    more = [
        Pair(first.prompt, first.chosen, other, chosen_score=1.0, rejected_score=0.5),
        Pair(first.prompt, other, first.rejected, chosen_score=0.5, rejected_score=0.0),
    ]
    return [*pairs, *more]


@pytest.fixture
def situation(initial: Policy, crossed: list[Pair], moved: Callable[..., Policy], tmp_path: Path) -> Situation:
    policy, reference = moved(2), moved(1)
    plain: Any = load_causal_lm(policy.path, torch.float32)
    base: Any = load_causal_lm(reference.path, torch.float32)

    # As if sampled by a policy near the one in training: π/μ on either side of the clip.
    generator = torch.Generator().manual_seed(4)

    def side(pair: Pair, answer: Candidate) -> Side:
        pi, collision = logps_and_collisions(plain, pair, answer.token_ids)
        with torch.no_grad():
            ref, _ = logps_and_collisions(base, pair, answer.token_ids)
        return Side(pi, ref, pi.detach() + 0.2 * torch.randn(len(pi), generator=generator), collision)

    def stored(answer: Candidate, found: Side) -> Candidate:
        return replace(answer, logprobs=tuple(found.mu.tolist()))

    truth = [(side(pair, pair.chosen), side(pair, pair.rejected)) for pair in crossed]
    made = [
        replace(pair, chosen=stored(pair.chosen, w), rejected=stored(pair.rejected, rejected))
        for pair, (w, rejected) in zip(crossed, truth, strict=True)
    ]
    job = job_of(initial, made, DPOSpec(batch_size=8), tmp_path / "next", policy=policy, reference=reference)
    return Situation(laid_out(initial, policy, "packed"), job, truth, list(plain.parameters()))


def laid_out(initial: Policy, policy: Policy, layout: str) -> LocalLearner:
    """A learner that holds `policy`."""
    learner = learner_of(initial, layout=layout)
    learner.model.load(policy)
    assert learner.model.forward.packed == (layout == "packed")
    return learner


def smoothed(z: Tensor, epsilon: float) -> Tensor:
    """−(1−ε)·log σ(z) − ε·log σ(−z) by softplus(x) = log(1 + eˣ)."""
    return (1 - epsilon) * F.softplus(-z) + epsilon * F.softplus(z)


def plain_sigmoid(truth: list[tuple[Side, Side]]) -> Tensor:
    return torch.stack([F.softplus(-0.3 * (w.r() - rejected.r())) for w, rejected in truth])


def with_everything(truth: list[tuple[Side, Side]]) -> Tensor:
    """`EVERYTHING`, from the definitions."""

    def one(w: Side, rejected: Side) -> Tensor:
        shared = min(len(w.pi), len(rejected.pi))
        tails = [torch.where(torch.arange(len(side.pi)) < shared, 1.0, 0.4) for side in (w, rejected)]
        r_w, r_l = w.r(tails[0]), rejected.r(tails[1])
        r_w = r_w - 2.0 * F.relu(-r_w)
        loss = smoothed(0.3 * (r_w - r_l) + 0.05 * (len(w.pi) - len(rejected.pi)), 0.1)
        aligned = sum((side.pi.detach() - side.collision).mean() for side in (w, rejected))
        drawn = sum((side.pi.detach() - side.mu).sum() for side in (w, rejected))
        weight = torch.exp(torch.as_tensor(aligned)) * torch.exp(torch.as_tensor(drawn)).clamp(max=1.5)
        return weight * loss - 0.2 * w.pi.mean()

    return torch.stack([one(w, rejected) for w, rejected in truth])


def transported(truth: list[tuple[Side, Side]]) -> Tensor:
    """`aot` with ε = 0.1: the k-th smallest margin of the policy less the k-th smallest of the reference."""
    of_pi = torch.stack([w.pi.sum() - rejected.pi.sum() for w, rejected in truth])
    of_ref = torch.stack([w.ref.sum() - rejected.ref.sum() for w, rejected in truth])
    return smoothed(0.3 * (of_pi.sort().values - of_ref.sort().values), 0.1)


def classified(truth: list[tuple[Side, Side]]) -> Tensor:
    """`bco_pair` with δ = 0.7."""
    return torch.stack([F.softplus(0.7 - 0.3 * w.r()) + F.softplus(0.3 * rejected.r() - 0.7) for w, rejected in truth])


CASES: dict[str, tuple[dict[str, Any], float, Callable[[list[tuple[Side, Side]]], Tensor]]] = {
    "sigmoid": ({"beta": 0.3}, 0.0, plain_sigmoid),
    "everything": (EVERYTHING, 0.0, with_everything),
    "aot": ({"loss": "aot", "beta": 0.3, "label_smoothing": 0.1}, 0.0, transported),
    "bco": ({"loss": "bco_pair", "beta": 0.3, "bco_running_mean": True}, 0.7, classified),
}


@pytest.mark.parametrize("name", CASES)
def test_gradient_is_that_of_the_whole_batch_at_once(situation: Situation, name: str) -> None:
    """Passes of one pair, of some, of all; packed and plain: within 1e-4 of the largest entry, which rounding of sums
    in another order explains. What is summed for the report agrees too."""
    settings, delta, definition = CASES[name]
    losses = definition(situation.truth)
    expected = situation.gradients(losses.mean())
    scale = max(float(g.abs().max()) for g in expected)
    rewards = [0.3 * float((w.r() + rejected.r()).detach()) / 2 for w, rejected in situation.truth]
    plain = laid_out(situation.learner.model.initial, situation.job.policy, "plain")
    numbers = set()
    for budget, layout in CUTS:
        here = situation if layout == "packed" else replace(situation, learner=plain)
        here.learner.model.tokens_per_pass = budget
        with pass_sizes(here.learner) as passes:
            sums = here.step(DPOSpec(**settings), delta)
        numbers.add(len(passes))
        assert farthest(gradients_of(here.learner), expected) < 1e-4 * scale, (budget, layout)
        assert sums.loss == pytest.approx(float(losses.detach().sum()), rel=1e-4)
        if name == "bco":
            assert sums.reward == pytest.approx(sum(rewards), abs=1e-3)
    assert len(numbers) >= 3 and {1, 8} <= numbers


def test_cases_are_apart(situation: Situation) -> None:
    """The comparisons above would say nothing if gradients of half the batch, or of another loss, were near."""
    whole = [situation.gradients(definition(situation.truth).mean()) for _, _, definition in CASES.values()]
    half = situation.gradients(plain_sigmoid(situation.truth[:4]).mean())
    scale = max(float(g.abs().max()) for g in whole[0])
    for other in (*whole[1:], half):
        assert farthest(whole[0], other) > 0.05 * scale
    unclipped = [sum(float((side.pi.detach() - side.mu).sum()) for side in pair) for pair in situation.truth]
    assert max(unclipped) > math.log(1.5) > min(unclipped)
    fallen = [bool(w.r() < 0) for w, _ in situation.truth]
    assert any(fallen) and not all(fallen)


def test_ranks_are_of_the_whole_batch_though_passes_split_it(situation: Situation) -> None:
    """Ranked within passes of one pair, `aot` would be `sigmoid`."""
    situation.learner.model.tokens_per_pass = PAIR_EACH
    situation.step(DPOSpec(loss="aot", beta=0.3))
    found = gradients_of(situation.learner)
    within = situation.gradients(plain_sigmoid(situation.truth).mean())
    assert farthest(found, within) > 0.05 * max(float(g.abs().max()) for g in within)


@pytest.mark.parametrize("name", CASES)
def test_shares_of_workers_add_up_to_the_whole(
    situation: Situation, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three workers, one after the other in this process: their gradients and sums added are one worker's, and none of
    them does nothing. Ranks (of `aot`) are exchanged: here every worker is handed what all three found."""
    settings, delta, _ = CASES[name]
    dpo = DPOSpec(**settings)
    model = situation.learner.model
    table: dict[int, Any] = {}
    monkeypatch.setattr(step_module, "gathered_by_index", lambda mine: (table.update(mine), mine)[1])
    expected_sums = situation.step(dpo, delta)
    expected = gradients_of(situation.learner)

    seen: list[int] = []

    def exchanged(mine: dict[int, Any]) -> dict[int, Any]:
        seen.extend(mine)
        return table

    monkeypatch.setattr(step_module, "gathered_by_index", exchanged)
    monkeypatch.setattr(model, "world", 3)
    model.model.zero_grad(set_to_none=True)
    parts = []
    for rank in range(3):
        monkeypatch.setattr(model, "rank", rank)
        parts.append(situation.add(dpo, delta))
    scale = max(float(g.abs().max()) for g in expected)
    assert farthest(gradients_of(situation.learner), expected) < 1e-4 * scale
    assert all(part.tokens > 0 for part in parts)
    for field in ("loss", "margin", "wins", "r_w", "r_l", "reward", "expected"):
        total = sum(getattr(part, field) for part in parts)
        assert total == pytest.approx(getattr(expected_sums, field), rel=1e-4, abs=1e-4)
    if name == "aot":
        assert sorted(seen) == list(range(8))


def test_worker_without_a_pair_adds_nothing(situation: Situation, monkeypatch: pytest.MonkeyPatch) -> None:
    model = situation.learner.model
    monkeypatch.setattr(model, "world", 2)
    monkeypatch.setattr(model, "rank", 1)
    sums = situation.step(DPOSpec(beta=0.3), batch=[3])
    assert sums == StepSums(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0)
    assert all(p.grad is None for p in model.trainable)


def test_what_policy_and_reference_alike_would_lose(situation: Situation) -> None:
    """ln 2 a pair of the plain loss, (1/(2β))² of ipo, whatever the policy is by now."""
    assert situation.step(DPOSpec(beta=0.3)).expected == pytest.approx(8 * LN2, rel=1e-6)
    ipo = DPOSpec(loss="ipo", beta=0.3, length_normalize=True)
    assert situation.step(ipo).expected == pytest.approx(8 * (1 / 0.6) ** 2, rel=1e-6)


# --- pairs that share a prompt and answers ---


def test_what_pairs_share_is_computed_once(initial: Policy, pairs: list[Pair], tmp_path: Path) -> None:
    """All three pairs of three answers to one prompt: the prompt and each answer count once. One pair a pass: the
    prompt three times and each answer twice. The gradient is the same."""
    first = pairs[0]
    other = replace(pairs[1].chosen, prompt_id=first.prompt.id, index=2)
    answers = [first.chosen, other, first.rejected]
    every = [Pair(first.prompt, answers[i], answers[j], 1.0, 0.0) for i, j in ((0, 1), (0, 2), (1, 2))]
    dpo = DPOSpec(lr=1e-3, batch_size=3, warmup=0.0, clip=1e9, engine_gap_tolerance=0.0)
    prompt, sampled = len(first.prompt.token_ids), sum(len(answer.token_ids) for answer in answers)
    found = {}
    for budget, tokens in ((WHOLE, prompt + sampled), (PAIR_EACH, 3 * prompt + 2 * sampled)):
        learner = learner_of(initial, tokens_per_pass=budget)
        _, [step], _ = result_of(learner, job_of(initial, every, dpo, tmp_path / str(budget)))
        assert step.tokens == tokens
        found[budget] = gradients_of(learner)
    scale = max(float(g.abs().max()) for g in found[WHOLE])
    assert farthest(found[WHOLE], found[PAIR_EACH]) < 1e-4 * scale


# --- every loss by its name ---

NEEDED: dict[str, dict[str, Any]] = {
    "ipo": {"length_normalize": False},
    "exo_pair": {"label_smoothing": 0.05},
    "robust": {"label_smoothing": 0.1},
    "bco_pair": {"bco_running_mean": True},
}


@pytest.mark.parametrize("loss", PAIR_LOSSES)
def test_every_loss_trains(initial: Policy, pairs: list[Pair], tmp_path: Path, loss: str) -> None:
    """Two steps on a fresh round of engine log-probs: the first step's check passes, figures are finite, weights move.

    From policy = reference every loss but discopop first pushes the chosen answer above the rejected one.
    """
    settings = {"loss": loss, "beta": 0.5, "lr": 1e-4, "batch_size": 6, "epochs": 2, "warmup": 0.0}
    learner = learner_of(initial)
    before = [p.detach().clone() for p in learner.model.trainable]
    dpo = DPOSpec(**settings, **NEEDED.get(loss, {}))
    start, steps, policy = result_of(learner, job_of(initial, pairs, dpo, tmp_path / "next"))
    assert start.reference_from == ("none" if loss == "simpo" else "engine")
    assert len(steps) == 2
    for step in steps:
        numbers = [step.loss, step.margin, step.accuracy, step.grad_norm, step.lr, step.r_w, step.r_l, step.seconds]
        assert all(value is not None and math.isfinite(value) for value in numbers)
        assert step.grad_norm > 0 and step.tokens > 0
    # The slope of discopop at z = 0 is (1 − ln 2)/(4τ) − ¾ = 0.78: the other way.
    first, second = (step.margin for step in steps)
    assert first is not None and second is not None
    assert (second > first) == (loss != "discopop")
    assert farthest([p.detach() for p in learner.model.trainable], before) > 0
    assert policy.digest != initial.digest


def test_loss_without_a_reference_computes_none(
    initial: Policy, pairs: list[Pair], moved: Callable[..., Policy], tmp_path: Path
) -> None:
    """The reference, which is another policy, is never loaded, and nothing is kept of it."""
    reference = moved()
    learner = learner_of(initial)
    loaded: list[str] = []
    load = learner.model.load

    def noted(policy: Policy, seed: int = 0) -> None:
        loaded.append(policy.digest)
        load(policy, seed)

    learner.model.load = noted  # type: ignore[method-assign]
    dpo = DPOSpec(loss="simpo", lr=1e-4, batch_size=6)
    job = job_of(initial, pairs, dpo, tmp_path / "next", reference=reference, cache=tmp_path / "logps.sqlite")
    start, _, _ = result_of(learner, job)
    assert start.reference_from == "none"
    assert set(loaded) == {initial.digest}
    assert not (tmp_path / "logps.sqlite").exists()


@pytest.mark.parametrize("score", [1.5, -0.1, float("nan")])
def test_scores_that_are_no_probabilities_stop_sppo(
    initial: Policy, pairs: list[Pair], tmp_path: Path, score: float
) -> None:
    """Before anything is computed, even where they come in a later batch."""
    changed = [*pairs[:5], replace(pairs[5], chosen_score=score)]
    learner = learner_of(initial)
    stream = learner.train(job_of(initial, changed, DPOSpec(loss="sppo", batch_size=1), tmp_path / "next"))
    with pytest.raises(TrainingError, match=r"^loss 'sppo' needs scores .*in \[0, 1\]") as caught:
        next(stream)
    assert "\n" not in str(caught.value)


def test_exploration_of_answers_that_the_reference_did_not_draw(
    initial: Policy, pairs: list[Pair], moved: Callable[..., Policy], tmp_path: Path
) -> None:
    learner = learner_of(initial)
    job = job_of(initial, pairs, DPOSpec(xpo_alpha=0.1), tmp_path / "next", reference=moved())
    with pytest.raises(TrainingError, match=r"dpo\.xpo_alpha needs answers drawn from the reference") as caught:
        next(learner.train(job))
    assert "\n" not in str(caught.value)


def test_exploration_pushes_away_from_what_the_reference_says(situation: Situation) -> None:
    """α·(log π(w) + log π(l))/2 beside the plain loss, where source and reference are one."""
    job = replace(situation.job, source=situation.job.reference)
    dpo = DPOSpec(beta=0.3, xpo_alpha=0.1)
    replace(situation, job=job).step(dpo)
    logps = torch.stack([(w.pi.sum() + rejected.pi.sum()) / 2 for w, rejected in situation.truth])
    expected = situation.gradients((plain_sigmoid(situation.truth) + 0.1 * logps).mean())
    scale = max(float(g.abs().max()) for g in expected)
    assert farthest(gradients_of(situation.learner), expected) < 1e-4 * scale


def test_loss_of_ones_own_from_the_jobs_folders(
    initial: Policy, pairs: list[Pair], moved: Callable[..., Policy], tmp_path: Path
) -> None:
    """Squared distance of βΔ from a target: (β·Δ − 2)², found in a folder that Python does not know."""
    folder = tmp_path / "losses"
    folder.mkdir()
    (folder / "my_distance_loss.py").write_text(
        "def distance(ratios, beta, target):\n    return (beta * ratios.delta - target) ** 2\n"
    )
    dpo = DPOSpec.model_validate(
        {"loss": {"use": "my_distance_loss:distance", "target": 2.0}, "beta": 0.3, "batch_size": 6}
    )
    reference = moved()
    learner = learner_of(initial)
    job = job_of(initial, pairs, dpo, tmp_path / "next", reference=reference, folders=(folder,))
    _, [step], _ = result_of(learner, job)
    ratios = []
    for pair in pairs:
        sides = [(pair.prompt, pair.chosen), (pair.prompt, pair.rejected)]
        ours, theirs = learner.score(initial, sides), learner.score(reference, sides)
        ratios.append([sum(a) - sum(b) for a, b in zip(ours, theirs, strict=True)])
    expected = [(0.3 * (r_w - r_l) - 2.0) ** 2 for r_w, r_l in ratios]
    assert step.loss == pytest.approx(sum(expected) / 6, rel=1e-4)


def test_running_mean_is_of_all_pairs_before(
    initial: Policy, pairs: list[Pair], moved: Callable[..., Policy], tmp_path: Path
) -> None:
    """Weights held still by a rate of 1e-30, batches of 2, 2, 2: δ of the third is the mean reward of four pairs."""
    reference = moved()
    learner = learner_of(initial)
    dpo = DPOSpec(loss="bco_pair", bco_running_mean=True, beta=0.3, lr=1e-30, batch_size=2)
    _, steps, _ = result_of(learner, job_of(initial, pairs, dpo, tmp_path / "next", reference=reference))
    delta, seen = 0.0, 0
    deltas = []
    for step in steps:
        deltas.append(delta)
        assert step.r_w is not None and step.r_l is not None
        reward = 0.3 * (step.r_w + step.r_l) / 2
        delta, seen = (delta * seen + 2 * reward) / (seen + 2), seen + 2
    assert abs(deltas[2]) > 0.05
    # What each step lost, from pairs in the order that they were taken.
    from online_dpo.backends.learner import batch_order

    for step, batch, held in zip(steps, batch_order(6, dpo, 0), deltas, strict=True):
        total = 0.0
        for index in batch:
            pair = pairs[index]
            sides = [(pair.prompt, pair.chosen), (pair.prompt, pair.rejected)]
            ours, theirs = learner.score(initial, sides), learner.score(reference, sides)
            r_w, r_l = (sum(a) - sum(b) for a, b in zip(ours, theirs, strict=True))
            total += math.log1p(math.exp(held - 0.3 * r_w)) + math.log1p(math.exp(0.3 * r_l - held))
        assert step.loss == pytest.approx(total / 2, rel=1e-4)


# --- the first step of a fresh round, whatever the loss ---


@pytest.mark.parametrize("loss", ["ipo", "sppo_hard", "hinge", "nca_pair", "apo_down", "aot"])
def test_falsified_log_probs_are_found_by_the_margin(
    initial: Policy, pairs: list[Pair], tmp_path: Path, loss: str
) -> None:
    """One pair of six, outside the sample that engine and learner are compared on, off by 10 nats a token. (That the
    honest ones pass: `test_every_loss_trains`.)"""
    answer = pairs[2].chosen
    false = replace(answer, logprobs=tuple(value - 10.0 for value in answer.logprobs))
    changed = [*pairs[:2], replace(pairs[2], chosen=false), *pairs[3:]]
    dpo = DPOSpec(loss=loss, batch_size=6, **NEEDED.get(loss, {}))
    with pytest.raises(TrainingError, match=r"must have loss .* and margin 0, found"):
        result_of(learner_of(initial), job_of(initial, changed, dpo, tmp_path / "next"))
