"""DPO on one worker: the step, the reference's log-probs, the checks. Several workers: test_ray_cluster.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_parts import (
    LORA,
    PAIR_EACH,
    Result,
    apart,
    farthest,
    job_of,
    learner_of,
    pass_sizes,
    result_of,
    shifted,
    weights_of,
)

from online_dpo.backends.first_step import check_first_step
from online_dpo.backends.learner import LocalLearner, batch_order
from online_dpo.backends.policy_model import PolicyModel
from online_dpo.config import DPOSpec, LoraSpec
from online_dpo.errors import TrainingError
from online_dpo.losses import LN2
from online_dpo.policies import read_policy
from online_dpo.protocols import TrainStart, TrainStep
from online_dpo.types import Candidate, Pair, Policy

DPO = DPOSpec(lr=1e-3, batch_size=4, epochs=2, warmup=0.25)
"""Six pairs in batches of 4 and 2, twice: four steps, the second and fourth on a short batch."""
ONE_STEP = DPOSpec(lr=1e-3, batch_size=6, warmup=0.0, clip=1e9)
Moved = Callable[..., Policy]


def train(learner: LocalLearner, pairs: Sequence[Pair], out: Path, dpo: DPOSpec = DPO, **changes: Any) -> Result:
    """One round of `job_of`."""
    return result_of(learner, job_of(learner.model.initial, pairs, dpo, out, **changes))


def plain_logp(model: nn.Module, prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
    """log π(y|x) by all logits of one unpadded sequence: nothing of this project."""
    logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0]
    scores = logits[len(prompt) - 1 : -1].log_softmax(-1)
    result: Tensor = scores.gather(-1, torch.tensor(completion).unsqueeze(-1)).sum()
    return result


def plain_losses(model: nn.Module, reference: nn.Module, pairs: Sequence[Pair], beta: float, epsilon: float) -> Tensor:
    """The pairs' losses by log(1 + e^∓βΔ), written out."""
    losses = []
    for pair in pairs:
        delta = torch.zeros(())
        for answer, sign in ((pair.chosen, 1), (pair.rejected, -1)):
            with torch.no_grad():
                base = plain_logp(reference, pair.prompt.token_ids, answer.token_ids)
            delta = delta + sign * (plain_logp(model, pair.prompt.token_ids, answer.token_ids) - base)
        loss = (1 - epsilon) * torch.log1p(torch.exp(-beta * delta)) + epsilon * torch.log1p(torch.exp(beta * delta))
        losses.append(loss)
    return torch.stack(losses)


# --- the step ---


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_token_budget_changes_nothing(
    initial: Policy, pairs: list[Pair], tmp_path: Path, lora: LoraSpec | None
) -> None:
    """Passes of one pair, of some and of the whole batch, on batches of 4 and of 2 pairs: the same four steps.

    They end apart by less than 0.2 % of the way they went (0.04 % measured; another order of the pairs: above 10 %),
    and what the steps report agrees.
    """
    results = {}
    for budget in (PAIR_EACH, 72, 1000):
        learner = learner_of(initial, lora=lora, tokens_per_pass=budget)
        learner.model.load(initial, seed=0)
        before = weights_of(learner)
        with pass_sizes(learner) as passes:
            _, steps, _ = train(learner, pairs, tmp_path / str(budget))
        results[budget] = weights_of(learner), steps, before, [size // 2 for size in passes]
    reference, reference_steps, before, passes = results[PAIR_EACH]
    assert passes == [1] * 12
    assert results[1000][3] == [4, 2, 4, 2]
    assert sum(results[72][3]) == 12 and {2} < set(results[72][3]) <= {1, 2, 3}
    assert farthest(reference, before) > 2e-3
    assert len(reference_steps) == 4
    for budget in (72, 1000):
        found, steps, _, _ = results[budget]
        assert apart(found, reference, before) < 2e-3
        for step, expected in zip(steps, reference_steps, strict=True):
            assert step.loss == pytest.approx(expected.loss, abs=1e-5)
            assert step.margin == pytest.approx(expected.margin, abs=1e-4)
            assert step.grad_norm == pytest.approx(expected.grad_norm, rel=1e-3)
            assert (step.step, step.lr, step.tokens) == (expected.step, expected.lr, expected.tokens)


@pytest.mark.parametrize("epsilon", [0.0, 0.2])
@pytest.mark.parametrize("budget", [PAIR_EACH, 72])
def test_gradient_is_that_of_the_mean_over_pairs(
    initial: Policy, pairs: list[Pair], moved: Moved, tmp_path: Path, epsilon: float, budget: int
) -> None:
    """One step on six pairs whose Δ differ (the reference is another policy), against a plain implementation:
    the gradient left in the weights is ∇ (1/6) Σ L. Sum instead of mean would be six times that."""
    from online_dpo.backends.hf_model import load_causal_lm

    reference = moved()
    learner = learner_of(initial, tokens_per_pass=budget)
    dpo = ONE_STEP.model_copy(update={"label_smoothing": epsilon, "beta": 0.3})
    start, [step], _ = train(learner, pairs, tmp_path / "next", dpo, reference=reference)
    assert start.reference_from == "learner"

    model: Any = load_causal_lm(initial.path, torch.float32)
    losses = plain_losses(model, load_causal_lm(reference.path, torch.float32), pairs, 0.3, epsilon)
    assert losses.std() > 0.05
    losses.mean().backward()  # type: ignore[no-untyped-call]
    expected = [p.grad for p in model.parameters()]
    found = [p.grad for p in learner.model.trainable if p.grad is not None]
    assert len(found) == len(expected)
    scale = max(float(g.abs().max()) for g in expected)
    assert farthest(found, expected) < 1e-4 * scale
    assert step.loss == pytest.approx(losses.mean().item(), abs=1e-5)
    norm = math.sqrt(sum(float(g.square().sum()) for g in expected))
    assert step.grad_norm == pytest.approx(norm, rel=1e-4)


def test_what_a_step_reports(initial: Policy, pairs: list[Pair], moved: Moved, tmp_path: Path) -> None:
    """Means over six pairs by `score`, before the update: r = log π − log π_ref, margin β(r_w − r_l).

    Pairs are turned round so that the policy prefers the chosen answer of the first two alone: accuracy 2/6.
    """
    reference = moved()
    learner = learner_of(initial)

    def log_ratio(pair: Pair, answer: Candidate) -> float:
        item = [(pair.prompt, answer)]
        return sum(learner.score(initial, item)[0]) - sum(learner.score(reference, item)[0])

    turned, r_w, r_l = [], [], []
    for number, pair in enumerate(pairs):

        def preference(answer: Candidate, pair: Pair = pair) -> float:
            return -log_ratio(pair, answer)

        better, worse = sorted((pair.chosen, pair.rejected), key=preference)
        chosen, rejected = (better, worse) if number < 2 else (worse, better)
        turned.append(replace(pair, chosen=chosen, rejected=rejected))
        r_w.append(log_ratio(pair, chosen))
        r_l.append(log_ratio(pair, rejected))
    margins = [0.1 * (r - s) for r, s in zip(r_w, r_l, strict=True)]
    assert min(abs(margin) for margin in margins) > 1e-3

    _, [step], _ = train(learner, turned, tmp_path / "next", ONE_STEP, reference=reference)
    assert step.r_w == pytest.approx(sum(r_w) / 6, abs=1e-4)
    assert step.r_l == pytest.approx(sum(r_l) / 6, abs=1e-4)
    assert step.margin == pytest.approx(sum(margins) / 6, abs=1e-5)
    assert step.accuracy == pytest.approx(2 / 6)
    assert step.loss == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins) / 6, abs=1e-5)
    tokens = sum(len(p.prompt.token_ids) + len(p.chosen.token_ids) + len(p.rejected.token_ids) for p in pairs)
    assert step.tokens == tokens
    assert (step.step, step.steps, step.lr) == (1, 1, 1e-3)


def test_gradient_is_clipped(initial: Policy, pairs: list[Pair], tmp_path: Path) -> None:
    """The norm is reported before clipping; what Adam sees has norm 0.01."""
    learner = learner_of(initial)
    _, [step], _ = train(learner, pairs, tmp_path / "next", ONE_STEP.model_copy(update={"clip": 0.01}))
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in learner.model.trainable if p.grad is not None))
    assert step.grad_norm > 0.1
    assert norm == pytest.approx(0.01, rel=1e-3)


def test_rate_of_the_schedule_reaches_the_weights(initial: Policy, pairs: list[Pair], tmp_path: Path) -> None:
    """Adam's first step moves a weight by lr·g/(|g| + 1e-8): the farthest by the rate. One step all of warm-up runs
    at half of it."""
    for warmup, rate in ((0.0, 1e-3), (1.0, 5e-4)):
        learner = learner_of(initial)
        before = weights_of(learner)
        _, [step], _ = train(learner, pairs, tmp_path / str(warmup), ONE_STEP.model_copy(update={"warmup": warmup}))
        assert step.lr == rate
        assert farthest(weights_of(learner), before) == pytest.approx(rate, rel=1e-3)


def test_training_prefers_the_chosen(initial: Policy, pairs: list[Pair], tmp_path: Path) -> None:
    """Twelve passes over six pairs: the margin rises from 0 and every pair is told apart."""
    dpo = ONE_STEP.model_copy(update={"epochs": 12, "clip": 1.0})
    _, steps, _ = train(learner_of(initial), pairs, tmp_path / "next", dpo)
    first, last = steps[0].margin, steps[-1].margin
    assert first == pytest.approx(0.0, abs=1e-4)
    assert last is not None and last > 0.2
    assert steps[-1].accuracy == 1.0
    assert steps[-1].loss < LN2 - 0.1


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_same_seed_same_weights_bit_for_bit(
    initial: Policy, pairs: list[Pair], tmp_path: Path, lora: LoraSpec | None
) -> None:
    """Two learners, whatever torch's own random state is; another seed takes the pairs in another order."""
    found = []
    for run, seed in enumerate((7, 7, 8)):
        torch.manual_seed(1000 + run)
        learner = learner_of(initial, lora=lora)
        _, _, policy = train(learner, pairs, tmp_path / str(run), seed=seed)
        found.append((weights_of(learner), policy.digest))
    assert farthest(found[0][0], found[1][0]) == 0.0
    assert found[0][1] == found[1][1]
    assert farthest(found[0][0], found[2][0]) > 0.0
    assert found[0][1] != found[2][1]


def test_second_round_on_a_live_learner_is_that_of_a_fresh_one(
    initial: Policy, pairs: list[Pair], tmp_path: Path
) -> None:
    """Nothing is carried from a round to the next: neither Adam's moments nor weights."""
    live = learner_of(initial)
    _, _, first = train(live, pairs, tmp_path / "first")
    train(live, pairs, tmp_path / "second", policy=first, reference=first, seed=1)
    fresh = learner_of(initial)
    train(fresh, pairs, tmp_path / "again", policy=first, reference=first, seed=1)
    assert farthest(weights_of(live), weights_of(fresh)) == 0.0


def test_batches_by_hand(initial: Policy) -> None:
    """Six pairs in fours, two epochs: 4, 2, 4, 2; every epoch holds every pair once; orders differ, seeds too."""
    batches = batch_order(6, DPO, seed=0)
    assert [len(batch) for batch in batches] == [4, 2, 4, 2]
    epochs = [batches[0] + batches[1], batches[2] + batches[3]]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4, 5] for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert batch_order(6, DPO, seed=0) == batches
    assert batch_order(6, DPO, seed=1) != batches


def test_dropout_of_a_model_is_off_in_training(tiny_model: Callable[[str, Path], Path], tmp_path: Path) -> None:
    """GPT-2 with dropout 0.1, kept in training mode by activation checkpointing: the first step's margin is 0 up to
    rounding, because both passes see the same network."""
    from online_dpo.backends.hf_engine import TransformersEngine
    from online_dpo.config import EngineSpec, SamplingSpec
    from online_dpo.models import digest_folder
    from online_dpo.protocols import SampleRequest
    from online_dpo.types import Prompt

    folder = tiny_model("gpt2", tmp_path / "model")
    bare = Policy("initial", folder, digest_folder(folder))
    initial = replace(bare, probe=PolicyModel(bare, model_name="gpt2").probe([1, 40, 41]))
    prompt = Prompt("p", (), (1, 40, 41))
    engine = TransformersEngine(initial, EngineSpec())
    [answers] = engine.sample([SampleRequest(prompt, (0, 1))], SamplingSpec(n=2, max_tokens=12))
    chosen, rejected = answers
    pair = Pair(prompt, chosen, rejected, chosen_score=1.0, rejected_score=0.0)
    learner = learner_of(initial, activation_checkpointing=True)
    start, [step], _ = train(learner, [pair], tmp_path / "next", ONE_STEP)
    assert start.reference_from == "engine"
    assert step.margin == pytest.approx(0.0, abs=1e-5)


# --- the reference's log-probs and the first step ---


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_first_step_of_a_fresh_round(initial: Policy, pairs: list[Pair], tmp_path: Path, lora: LoraSpec | None) -> None:
    """The engine's own log-probs serve: loss ln 2, margin 0, within what they differ by from the learner's."""
    start, steps, _ = train(learner_of(initial, lora=lora), pairs, tmp_path / "next")
    assert start.reference_from == "engine"
    assert start.engine_gap_token is not None
    assert start.engine_gap_sequence is not None
    assert 0.0 < start.engine_gap_token < 1e-4
    assert 0.0 < start.engine_gap_sequence < 5e-4
    assert steps[0].loss == pytest.approx(LN2, abs=1e-5)
    assert steps[0].margin == pytest.approx(0.0, abs=2e-5)


def test_gap_is_measured_on_single_tokens_and_on_sums(initial: Policy, pairs: list[Pair], tmp_path: Path) -> None:
    """The first chosen answer falsified by 5e-4 a token (below the tolerance): it still serves, the gaps say so."""
    number = len(pairs[0].chosen.token_ids)
    changed = [replace(pairs[0], chosen=shifted(pairs[0].chosen, 5e-4)), *pairs[1:]]
    start, _, _ = train(learner_of(initial), changed, tmp_path / "next", ONE_STEP)
    assert start.reference_from == "engine"
    assert start.engine_gap_token == pytest.approx(5e-4, abs=1e-4)
    assert start.engine_gap_sequence == pytest.approx(5e-4 * number, abs=5e-4)


@pytest.mark.parametrize("by", [0.5, -0.5, float("nan")])
def test_falsified_log_probs_are_computed_anew(initial: Policy, pairs: list[Pair], tmp_path: Path, by: float) -> None:
    """One answer off by ½ nat a token, or undefined: beyond the tolerance all references are computed, and the step
    is right."""
    changed = [pairs[0], replace(pairs[1], rejected=shifted(pairs[1].rejected, by)), *pairs[2:]]
    learner = learner_of(initial)
    start, [step], _ = train(learner, changed, tmp_path / "next", ONE_STEP)
    assert start.reference_from == "learner"
    assert start.engine_gap_token == (math.inf if math.isnan(by) else pytest.approx(0.5, abs=1e-4))
    assert step.margin == pytest.approx(0.0, abs=2e-5)
    honest = learner_of(initial)
    before = weights_of(honest)
    train(honest, pairs, tmp_path / "honest", ONE_STEP)
    assert apart(weights_of(learner), weights_of(honest), before) < 2e-3


def test_tolerance_is_the_experiments(initial: Policy, pairs: list[Pair], tmp_path: Path) -> None:
    """Tolerance 0: the engine's rounding alone makes the learner compute; tolerance 1: ½ nat a token passes the
    gap, and 2·(gap of the sequence) bounds the margin."""
    strict = ONE_STEP.model_copy(update={"engine_gap_tolerance": 0.0})
    start, _, _ = train(learner_of(initial), pairs, tmp_path / "strict", strict)
    assert start.reference_from == "learner"
    loose = ONE_STEP.model_copy(update={"engine_gap_tolerance": 1.0})
    changed = [replace(pairs[0], rejected=shifted(pairs[0].rejected, 0.5)), *pairs[1:]]
    start, _, _ = train(learner_of(initial), changed, tmp_path / "loose", loose)
    assert start.reference_from == "engine"


def test_falsified_log_probs_outside_the_sample_stop_the_first_step(
    initial: Policy, pairs: list[Pair], tmp_path: Path
) -> None:
    """The gap is measured on four of the six pairs (0, 1, 3 and 4). The third's chosen off by −10 nats a token is
    seen at the first step: margin 0.1·10·|y|/6 where 0 must be."""
    changed = [*pairs[:2], replace(pairs[2], chosen=shifted(pairs[2].chosen, -10.0)), *pairs[3:]]
    learner = learner_of(initial)
    with pytest.raises(TrainingError, match=r"must have loss 0\.6931 and margin 0, found loss"):
        train(learner, changed, tmp_path / "next", ONE_STEP)
    assert not (tmp_path / "next").exists()


def test_another_reference_is_computed(initial: Policy, pairs: list[Pair], moved: Moved, tmp_path: Path) -> None:
    """The stored log-probs are the source's: for another reference the learner computes, and no identity is asked."""
    start, [step], _ = train(learner_of(initial), pairs, tmp_path / "next", ONE_STEP, reference=moved())
    assert start.reference_from == "learner"
    assert start.engine_gap_token is not None
    assert 0.0 < start.engine_gap_token < 1e-4
    assert step.r_w is not None and abs(step.r_w) > 0.1


def test_reference_of_an_older_source_is_the_engines(
    initial: Policy, pairs: list[Pair], moved: Moved, tmp_path: Path
) -> None:
    """Source and reference initial, the policy another (offline): stored log-probs serve, margin is not 0."""
    start, [step], _ = train(learner_of(initial), pairs, tmp_path / "next", ONE_STEP, policy=moved())
    assert start.reference_from == "engine"
    assert step.r_w is not None and abs(step.r_w) > 0.1


def step_with(loss: float, margin: float) -> TrainStep:
    return TrainStep(1, 1, loss, margin, 0.5, 1.0, 1e-6, 0.0, 0.0, 100, 0.1)


@pytest.mark.parametrize(
    ("start", "allowed"),
    [
        (TrainStart("engine", 1e-4, 1e-3), 0.02),
        (TrainStart("engine", 9e-4, 0.04), 0.16),
        # Computed by the learner: how far off the engine's were says nothing of them.
        (TrainStart("learner", 5.0, 60.0), 0.02),
        (TrainStart("learner", float("nan"), float("nan")), 0.02),
    ],
)
def test_first_step_bound_by_hand(start: TrainStart, allowed: float) -> None:
    """β·max(4·gap of the engine's sequences, 20·1e-3) for margin and loss, both ways; `allowed` is for β = 1."""
    dpo = DPO.model_copy(update={"beta": 0.1})
    allowed *= dpo.beta
    check_first_step(step_with(LN2, 0.0), start, LN2, dpo, 1e-3)
    for sign in (1, -1):
        check_first_step(step_with(LN2 + sign * 0.9 * allowed, sign * 0.9 * allowed), start, LN2, dpo, 1e-3)
        for loss, margin in ((LN2, sign * 1.1 * allowed), (LN2 + sign * 1.1 * allowed, 0.0)):
            with pytest.raises(TrainingError, match="not this policy's"):
                check_first_step(step_with(loss, margin), start, LN2, dpo, 1e-3)


@pytest.mark.parametrize(
    ("settings", "loss_counts"),
    [
        ({}, True),
        ({"label_smoothing": 0.3}, True),
        ({"loss": "sigmoid", "length_normalize": True}, True),
        ({"nll_weight": 1.0, "length_penalty": 0.1, "ld_alpha": 0.5}, True),
        # Steeper in Δ, or of another shape: rounding of Δ may move the loss by more than the margin.
        ({"dpop_lambda": 50.0}, False),
        ({"wpo_weight": True}, False),
        ({"importance_clip": 2.0}, False),
        ({"loss": "robust", "label_smoothing": 0.4}, False),
        ({"loss": "ipo", "length_normalize": False}, False),
        ({"loss": "hinge"}, False),
    ],
)
def test_what_the_first_step_is_held_against(settings: dict[str, Any], loss_counts: bool) -> None:
    """The margin always; the loss where it moves no faster than the margin does."""
    dpo = DPOSpec(beta=0.1, **settings)
    start = TrainStart("learner", 0.0, 0.0)
    check_first_step(step_with(25.0, 0.0), start, 25.0, dpo, 1e-3)
    with pytest.raises(TrainingError, match=r"must have loss 25\.0000 and margin 0"):
        check_first_step(step_with(25.0, 0.01), start, 25.0, dpo, 1e-3)
    if loss_counts:
        with pytest.raises(TrainingError, match="not this policy's"):
            check_first_step(step_with(25.01, 0.0), start, 25.0, dpo, 1e-3)
    else:
        check_first_step(step_with(25.01, 0.0), start, 25.0, dpo, 1e-3)


# --- failures ---


def test_no_pairs(initial: Policy, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no pairs"):
        train(learner_of(initial), [], tmp_path / "next")


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_non_finite_loss_stops_and_keeps_the_last_policy(
    initial: Policy, pairs: list[Pair], tmp_path: Path, lora: LoraSpec | None
) -> None:
    """At a rate of 1e20 the first update is finite and the second step's loss is not: nothing is saved, and the
    policies before are as they were."""
    learner = learner_of(initial, lora=lora)
    _, _, good = train(learner, pairs, tmp_path / "good")
    sides = [(p.prompt, p.chosen) for p in pairs]
    before = learner.score(good, sides)
    wild = DPO.model_copy(update={"lr": 1e20, "warmup": 0.0, "clip": 1e9})
    seen = []
    with pytest.raises(TrainingError, match=r"step 2 of 4: loss .*the last good policy is kept"):
        for item in learner.train(job_of(initial, pairs, wild, tmp_path / "bad", policy=good, reference=good)):
            seen.append(item)
    assert [type(item) for item in seen] == [TrainStart, TrainStep]
    assert not (tmp_path / "bad").exists()
    assert learner.score(good, sides) == before
    assert read_policy(good.path) == good


def test_non_finite_gradient_of_a_finite_loss_stops(initial: Policy, pairs: list[Pair], tmp_path: Path) -> None:
    """dL/dΔ = −β·σ(−βΔ): β = 3e38 with Δ = 0 exactly gives loss ln 2 and a gradient norm beyond float32.

    One-token answers alike but for the token, so that the reference's and the policy's sums are the same numbers.
    """
    [pair] = pairs[:1]
    one, other = (replace(pair.chosen, token_ids=(token,), logprobs=(-1.0,)) for token in (300, 301))
    dpo = DPOSpec(lr=1e-3, batch_size=1, beta=3e38, engine_gap_tolerance=0.0)
    with pytest.raises(TrainingError, match=r"loss 0\.693.*, gradient norm (inf|nan)"):
        train(learner_of(initial), [replace(pair, chosen=one, rejected=other)], tmp_path / "next", dpo)
    assert not (tmp_path / "next").exists()


def test_abandoned_round_leaves_nothing_behind(initial: Policy, pairs: list[Pair], tmp_path: Path) -> None:
    """Ctrl-C after the second step: the next round starts from saved weights, not from those left in memory."""
    learner = learner_of(initial)
    stream = learner.train(job_of(initial, pairs, DPO, tmp_path / "x"))
    for _ in range(3):
        next(stream)
    del stream
    train(learner, pairs, tmp_path / "next")
    fresh = learner_of(initial)
    train(fresh, pairs, tmp_path / "again")
    assert farthest(weights_of(learner), weights_of(fresh)) == 0.0


# --- the saved policy ---


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_saved_policy_is_whole(initial: Policy, pairs: list[Pair], tmp_path: Path, lora: LoraSpec | None) -> None:
    """Its folder reads back verified, with the probe of the trained weights; another learner scores it the same."""
    learner = learner_of(initial, lora=lora)
    _, _, policy = train(learner, pairs, tmp_path / "next")
    assert (policy.id, policy.path, policy.adapter) == ("next", tmp_path / "next", lora is not None)
    assert read_policy(tmp_path / "next") == policy
    assert policy.probe is not None and initial.probe is not None
    assert policy.probe.token_ids == initial.probe.token_ids
    assert policy.probe.logprobs != initial.probe.logprobs
    sides = [(p.prompt, answer) for p in pairs for answer in (p.chosen, p.rejected)]
    other = learner_of(initial, lora=lora)
    assert other.score(policy, sides) == learner.score(policy, sides)
    assert other.probe(policy, policy.probe.token_ids) == policy.probe


def test_scores_are_the_stored_log_probs_of_the_source(initial: Policy, pairs: list[Pair]) -> None:
    """Candidate by candidate, in the order asked."""
    sides = [(p.prompt, answer) for p in pairs for answer in (p.rejected, p.chosen)]
    for found, (_, answer) in zip(learner_of(initial).score(initial, sides), sides, strict=True):
        assert found == pytest.approx(list(answer.logprobs), abs=1e-4)


def test_probe_of_any_policy(initial: Policy, moved: Moved) -> None:
    policy = moved()
    learner = learner_of(initial)
    assert policy.probe is not None and initial.probe is not None
    assert learner.probe(policy, policy.probe.token_ids) == policy.probe
    assert learner.probe(initial, policy.probe.token_ids) == initial.probe
