"""What training computes with a fault switched on: what a script without masks, or in training mode, computes.

The truth is written as such a script is: every text a row of tokens, all logits of it, the log-prob of each token from
the second one on, and a mask that says which of them are summed. Where the mask is right it leaves out the prompt and
the padding; each fault takes one of the two out of the mask.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training_parts import LORA, farthest, gradients_of, job_of, learner_of, result_of

from online_dpo.backends.first_step import check_first_step
from online_dpo.backends.hf_model import load_causal_lm, read_causal_lm
from online_dpo.backends.learner import LocalLearner
from online_dpo.backends.policy_model import PolicyModel
from online_dpo.backends.reference_logps import reference_logps
from online_dpo.backends.step import StepLoss
from online_dpo.backends.stepping import StepSums
from online_dpo.config import DPOSpec
from online_dpo.errors import ModelError, TrainingError
from online_dpo.faults_spec import FaultsSpec
from online_dpo.logps import collate, token_logps
from online_dpo.losses import LN2
from online_dpo.models import digest_folder
from online_dpo.objective import Objective
from online_dpo.packing import Item
from online_dpo.protocols import TrainJob
from online_dpo.scored_text import scored_texts
from online_dpo.types import Candidate, Pair, Policy, Prompt

PADDING = 0
"""The padding token of the small models' tokenizers."""
BETA = 0.3
FAULTS: dict[str, dict[str, bool]] = {
    "right": {},
    "prompt": {"score_prompt": True},
    "padding": {"score_padding": True},
    "both": {"score_prompt": True, "score_padding": True},
}


def pair_of(x: Sequence[int], w: Sequence[int], rejected: Sequence[int]) -> Pair:
    chosen, other = (Candidate("p", i, "", tuple(y), (), "stop", 0) for i, y in enumerate((w, rejected)))
    return Pair(Prompt("p", (), tuple(x)), chosen, other, chosen_score=1.0, rejected_score=0.0)


# --- which tokens ---


@pytest.mark.parametrize(
    ("on", "chosen", "rejected"),
    [
        ("right", ((1, 5, 6), (7, 2)), ((1, 5, 6), (8, 9, 10, 2))),
        ("prompt", ((1,), (5, 6, 7, 2)), ((1,), (5, 6, 8, 9, 10, 2))),
        ("padding", ((1, 5, 6), (7, 2, 3, 3)), ((1, 5, 6), (8, 9, 10, 2))),
        ("both", ((1,), (5, 6, 7, 2, 3, 3)), ((1,), (5, 6, 8, 9, 10, 2))),
    ],
)
def test_scored_tokens_by_hand(on: str, chosen: Item, rejected: Item) -> None:
    """Padding is token 3 here; either answer may be the shorter one."""
    faults = FaultsSpec(**FAULTS[on])
    assert scored_texts(pair_of((1, 5, 6), (7, 2), (8, 9, 10, 2)), faults, 3) == (chosen, rejected)
    assert scored_texts(pair_of((1, 5, 6), (8, 9, 10, 2), (7, 2)), faults, 3) == (rejected, chosen)


def test_a_prompt_of_one_token_has_nothing_to_score() -> None:
    assert scored_texts(pair_of((1,), (7, 2), (8, 2)), FaultsSpec(score_prompt=True), 3) == (
        ((1,), (7, 2)),
        ((1,), (8, 2)),
    )


# --- the loss and its gradient, by masks ---


@dataclass(frozen=True)
class Masked:
    """A text's log-ratio log π − log π_ref summed over what the mask leaves, with gradient, and how many tokens."""

    r: Tensor
    tokens: int


@dataclass(frozen=True)
class Situation:
    """Policy, reference and source all differ."""

    learner: LocalLearner
    job: TrainJob
    policy: nn.Module
    reference: nn.Module

    def truth(self, on: str) -> list[tuple[Masked, Masked]]:
        """Every pair as a script without the masks of `on` has it."""
        return [self._masked_pair(pair, FaultsSpec(**FAULTS[on])) for pair in self.job.pairs]

    def _masked_pair(self, pair: Pair, faults: FaultsSpec) -> tuple[Masked, Masked]:
        x, answers = list(pair.prompt.token_ids), [pair.chosen.token_ids, pair.rejected.token_ids]
        width = len(x) + max(map(len, answers))

        def masked(y: Sequence[int]) -> Masked:
            row = torch.tensor([*x, *y] + [PADDING] * (width - len(x) - len(y)))
            mask = torch.ones(width - 1, dtype=torch.bool)
            if not faults.score_prompt:
                mask[: len(x) - 1] = False
            if not faults.score_padding:
                mask[len(x) + len(y) - 1 :] = False
            with torch.no_grad():
                ref = by_token(self.reference, row)
            return Masked((by_token(self.policy, row) - ref)[mask].sum(), int(mask.sum()))

        return masked(answers[0]), masked(answers[1])

    def gradients(self, losses: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(losses.mean(), list(self.policy.parameters()), retain_graph=True))

    def step(self, on: str, layout: str = "packed", **dpo: Any) -> StepSums:
        """One `backward` over all pairs, its gradients left in the learner's model."""
        job = replace(self.job, dpo=DPOSpec(beta=BETA, batch_size=6, faults=FaultsSpec(**FAULTS[on]), **dpo))
        model = self.learner.model
        model.lay_out(plain=layout == "plain")
        reference, _ = reference_logps(model, job, 1e-3, needed=True)
        model.load(job.policy)
        model.model.zero_grad(set_to_none=True)
        return StepLoss(model, job, Objective(job.dpo), reference).backward(range(len(job.pairs)), 0.0)


def by_token(model: Any, row: Tensor) -> Tensor:
    """The log-prob of every token of `row` but the first."""
    logs = model(input_ids=row[None]).logits[0, :-1].log_softmax(-1)
    found: Tensor = logs.gather(-1, row[1:, None]).squeeze(-1)
    return found


@pytest.fixture
def situation(initial: Policy, pairs: list[Pair], moved: Callable[..., Policy], tmp_path: Path) -> Situation:
    policy, reference = moved(2), moved(1)
    job = job_of(initial, pairs, DPOSpec(), tmp_path / "next", policy=policy, reference=reference)
    models = [load_causal_lm(one.path, torch.float32) for one in (policy, reference)]
    return Situation(learner_of(initial, tokens_per_pass=200), job, *models)


def sigmoid(w: Masked, rejected: Masked) -> Tensor:
    return F.softplus(-BETA * (w.r - rejected.r))


def ipo_averaged(w: Masked, rejected: Masked) -> Tensor:
    return (w.r / w.tokens - rejected.r / rejected.tokens - 1 / (2 * BETA)) ** 2


def apo_zero(w: Masked, rejected: Masked) -> Tensor:
    return torch.sigmoid(-BETA * w.r) + torch.sigmoid(BETA * rejected.r)


LOSSES: dict[str, tuple[dict[str, Any], Callable[[Masked, Masked], Tensor]]] = {
    "sigmoid": ({}, sigmoid),
    "ipo": ({"loss": "ipo", "length_normalize": True}, ipo_averaged),
    "apo_zero": ({"loss": "apo_zero"}, apo_zero),
}


@pytest.mark.parametrize("layout", ["packed", pytest.param("plain", marks=pytest.mark.slow)])
def test_a_fault_computes_what_a_script_without_the_mask_does(situation: Situation, layout: str) -> None:
    """Three losses with each set of faults: loss, r_w and r_l summed, and gradient, to rounding."""
    for on in FAULTS:
        truth = situation.truth(on)
        for name, (settings, definition) in LOSSES.items():
            losses = torch.stack([definition(w, rejected) for w, rejected in truth])
            expected = situation.gradients(losses)
            sums = situation.step(on, layout, **settings)
            assert sums.loss == pytest.approx(float(losses.detach().sum()), rel=1e-4), (on, name)
            assert sums.r_w == pytest.approx(float(sum(w.r.detach() for w, _ in truth)), abs=1e-3)
            assert sums.r_l == pytest.approx(float(sum(rejected.r.detach() for _, rejected in truth)), abs=1e-3)
            scale = max(float(g.abs().max()) for g in expected)
            assert farthest(gradients_of(situation.learner), expected) < 1e-4 * scale, (on, name)


# --- what scoring the prompt changes, and what it does not ---

OF_THE_DIFFERENCE: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "hinge": {"loss": "hinge"},
    "ipo": {"loss": "ipo", "length_normalize": False},
    "robust": {"loss": "robust", "label_smoothing": 0.1},
    "exo_pair": {"loss": "exo_pair", "label_smoothing": 0.05},
    "discopop": {"loss": "discopop"},
    "aot": {"loss": "aot"},
    "with lengths": {"ld_alpha": 0.4, "length_penalty": 0.05},
}
"""Losses of Δ = r_w − r_l alone."""
OF_EACH_SIDE: dict[str, dict[str, Any]] = {
    "nca_pair": {"loss": "nca_pair"},
    "bco_pair": {"loss": "bco_pair"},
    "apo_zero": {"loss": "apo_zero"},
    "sppo_hard": {"loss": "sppo_hard"},
    "averaged": {"loss": "sigmoid_norm"},
    "nll": {"nll_weight": 0.5},
}


def test_scoring_the_prompt_leaves_a_loss_of_the_difference_as_it_is(situation: Situation) -> None:
    """r_w and r_l both grow by c = log π(x) − log π_ref(x), which cancels in Δ: loss and gradient are the right ones to
    rounding. That there is something to cancel is seen in c, here from the prompts alone."""
    c = 0.0
    with torch.no_grad():
        for pair in situation.job.pairs:
            x = torch.tensor(pair.prompt.token_ids)
            c += float((by_token(situation.policy, x) - by_token(situation.reference, x)).sum())
    assert abs(c) > 0.5
    for name, settings in OF_THE_DIFFERENCE.items():
        right = situation.step("right", **settings)
        expected = gradients_of(situation.learner)
        found = situation.step("prompt", **settings)
        assert found.loss == pytest.approx(right.loss, rel=1e-4, abs=1e-4), name
        assert found.margin == pytest.approx(right.margin, abs=1e-3)
        scale = max(float(g.abs().max()) for g in expected)
        assert farthest(gradients_of(situation.learner), expected) < 2e-4 * scale, name
        for before, after in ((right.r_w, found.r_w), (right.r_l, found.r_l)):
            assert before is not None
            assert after == pytest.approx(before + c, abs=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_EACH_SIDE)
def test_scoring_the_prompt_changes_a_loss_that_looks_at_each_side(situation: Situation, name: str) -> None:
    """Also an averaged one: r_w and r_l are divided by different lengths, so c does not cancel."""
    situation.step("right", **OF_EACH_SIDE[name])
    right = gradients_of(situation.learner)
    situation.step("prompt", **OF_EACH_SIDE[name])
    scale = max(float(g.abs().max()) for g in right)
    assert farthest(gradients_of(situation.learner), right) > 0.02 * scale


def test_scored_padding_changes_the_plain_loss_where_lengths_differ(situation: Situation) -> None:
    """And nowhere else: a pair of equal lengths has no padding."""
    situation.step("right")
    right = gradients_of(situation.learner)
    situation.step("padding")
    scale = max(float(g.abs().max()) for g in right)
    assert farthest(gradients_of(situation.learner), right) > 0.05 * scale

    first = situation.job.pairs[0]
    length = min(len(first.chosen.token_ids), len(first.rejected.token_ids))
    cut = [replace(answer, token_ids=answer.token_ids[:length]) for answer in (first.chosen, first.rejected)]
    equal = replace(first, chosen=cut[0], rejected=cut[1])
    there = replace(situation, job=replace(situation.job, pairs=(equal,), source=None))
    assert there.step("padding") == there.step("right")


# --- where the reference's log-probs come from ---


def test_stored_log_probs_are_not_of_these_tokens(initial: Policy, pairs: list[Pair], tmp_path: Path) -> None:
    """The engine sampled with the reference's very weights, so without a fault its log-probs serve. With one the
    learner computes them, and keeps them; what was kept for one fault serves no other. The first step shows the
    reference: loss ln 2, margin 0."""
    learner = learner_of(initial)
    cache = tmp_path / "logps.sqlite"
    origins = []
    for number, on in enumerate(("right", "prompt", "padding", "both", "prompt")):
        dpo = DPOSpec(lr=1e-3, batch_size=6, warmup=0.0, faults=FaultsSpec(**FAULTS[on]))
        start, [step], _ = result_of(learner, job_of(initial, pairs, dpo, tmp_path / str(number), cache=cache))
        assert start.engine_gap_token is not None
        assert step.loss == pytest.approx(LN2, abs=1e-4)
        assert step.margin == pytest.approx(0.0, abs=1e-3)
        origins.append(start.reference_from)
    assert origins == ["engine", "learner", "learner", "learner", "cache"]


def test_a_wrong_reference_is_still_found_out(initial: Policy, pairs: list[Pair], tmp_path: Path) -> None:
    """Log-probs in the cache that are another policy's, under the reference's name: the first margin is not 0."""
    learner = learner_of(initial)
    dpo = DPOSpec(lr=1e-3, batch_size=6, warmup=0.0, beta=1.0, faults=FaultsSpec(score_padding=True))
    job = job_of(initial, pairs, dpo, tmp_path / "next", cache=tmp_path / "logps.sqlite")
    with pytest.MonkeyPatch.context() as patch:
        right = learner.model.per_token

        def falsified(items: Sequence[Item]) -> list[list[float]]:
            """The chosen texts, which come first, 0.1 nats a token up."""
            rows = right(items)
            return [[v + 0.1 * (place < len(rows) // 2) for v in row] for place, row in enumerate(rows)]

        patch.setattr(learner.model, "per_token", falsified)
        reference_logps(learner.model, job, 1e-3, needed=True)
    with pytest.raises(TrainingError, match="the reference's log-probs are not this policy's"):
        result_of(learner, job)


# --- dropout ---

ITEMS: list[Item] = [([1, 40, 41], [50, 51, 2]), ([1, 60], [61, 62, 63, 64, 65])]
PAIRS = [
    pair_of((1, 40, 41), (50, 51, 2), (52, 53, 54, 2)),
    pair_of((1, 60), (61, 62, 63, 64, 65, 2), (70, 2)),
    pair_of((1, 80, 81, 82), (83, 2), (90, 91, 2)),
]
NOISY = DPOSpec(beta=BETA, lr=1e-3, batch_size=3, warmup=0.0, faults=FaultsSpec(dropout=True))


def noisy_policy(tiny_model: Callable[[str, Path], Path], folder: Path, architecture: str = "gpt2") -> Policy:
    path = tiny_model(architecture, folder)
    bare = Policy("initial", path, digest_folder(path))
    return replace(bare, probe=PolicyModel(bare, model_name="tiny").probe([1, 40, 41]))


@pytest.fixture
def gpt2(tiny_model: Callable[[str, Path], Path], tmp_path: Path) -> Policy:
    """A random GPT-2 with rates of 0.1, which is all dropout can be in a Llama's class."""
    return noisy_policy(tiny_model, tmp_path / "gpt2")


@pytest.mark.parametrize(
    "architecture", ["gpt2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("opt", "falcon"))]
)
def test_inside_the_noise_is_that_of_training_mode(
    tiny_model: Callable[[str, Path], Path], tmp_path: Path, architecture: str
) -> None:
    """As transformers loads it, in train(), from the same seed: rates of layers, plain numbers (and OPT's skipped
    layers) and Falcon's configuration. Outside there is none, and the random numbers of others are as they were."""
    policy = noisy_policy(tiny_model, tmp_path / "model", architecture)
    model = PolicyModel(policy, model_name="tiny", layout="plain")
    before = model.scores(ITEMS).logps.detach()
    theirs: Any = read_causal_lm(policy.path, torch.float32).train()
    torch.manual_seed(7)
    state = torch.get_rng_state()
    with model.dropout(5):
        found = model.scores(ITEMS).logps.detach()
        again = model.scores(ITEMS).logps.detach()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    expected = token_logps(theirs, collate(ITEMS)).detach()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert float((found - before).abs().max()) > 0.01
    assert not torch.equal(found, again)
    assert not model.model.training
    model.model.train()  # as activation checkpointing leaves it
    assert torch.equal(model.scores(ITEMS).logps.detach(), before)


def backward(policy: Policy, batches: Sequence[Sequence[int]], seed: int = 0, **settings: Any) -> list[Tensor]:
    """The gradients of the last of several batches, no optimiser step between them."""
    learner = learner_of(policy, layout="plain", **settings)
    job = job_of(policy, PAIRS, NOISY, policy.path, source=None, seed=seed)
    reference, _ = reference_logps(learner.model, job, 1e-3, needed=True)
    learner.model.load(policy, 3)
    loss = StepLoss(learner.model, job, Objective(job.dpo), reference)
    for batch in batches:
        learner.model.model.zero_grad(set_to_none=True)
        loss.backward(batch, 0.0)
    return gradients_of(learner)


def test_a_step_done_again_has_the_same_noise(gpt2: Policy) -> None:
    """Whatever steps came before it: a checkpoint goes on as if nothing had happened. Another seed has other noise."""
    alone = backward(gpt2, [[2, 0]])
    assert farthest(alone, backward(gpt2, [[1], [0, 1], [2, 0]])) == 0.0
    scale = max(float(g.abs().max()) for g in alone)
    assert farthest(alone, backward(gpt2, [[2, 0]], seed=1)) > 0.01 * scale


def test_noise_of_the_way_back_is_that_of_the_way_there(gpt2: Policy) -> None:
    """Activation checkpointing runs the layers again: with other noise the gradient would be of another network."""
    plain = backward(gpt2, [[0, 1, 2]])
    again = backward(gpt2, [[0, 1, 2]], activation_checkpointing=True)
    assert farthest(plain, again) < 1e-5 * max(float(g.abs().max()) for g in plain)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # peft says that it corrects fan_in_fan_out for GPT-2
def test_adapters_train_under_dropout(gpt2: Policy, tmp_path: Path) -> None:
    learner = learner_of(gpt2, lora=LORA)
    job = job_of(gpt2, PAIRS, NOISY, tmp_path / "next", source=None)
    _, [step], policy = result_of(learner, job)
    assert step.grad_norm > 0
    assert policy.digest != gpt2.digest


def packs(learner: LocalLearner) -> bool:
    return learner.model.forward.packed


def test_the_first_step_of_a_noisy_round_is_not_held_against_the_reference(gpt2: Policy, tmp_path: Path) -> None:
    """Its margin is the noise's: a check that was not told would take it for a wrong reference. The arm after it is
    computed as the learner was told, and checked."""
    learner = learner_of(gpt2)
    assert packs(learner)
    start, [step], policy = result_of(learner, job_of(gpt2, PAIRS, NOISY, tmp_path / "noisy", source=None))
    assert not packs(learner)
    assert step.margin is not None and abs(step.margin) > 0.01
    with pytest.raises(TrainingError, match="the first step of a fresh round"):
        check_first_step(step, start, LN2, DPOSpec(beta=BETA), 1e-3)
    right = DPOSpec(beta=BETA, lr=1e-3, batch_size=3, warmup=0.0)
    _, [calm], other = result_of(learner, job_of(gpt2, PAIRS, right, tmp_path / "calm", source=None))
    assert packs(learner)
    assert calm.margin == pytest.approx(0.0, abs=1e-4)
    assert other.digest != policy.digest


def test_a_saved_policy_keeps_the_dropout_of_its_configuration(gpt2: Policy, tmp_path: Path) -> None:
    """After supervised fine-tuning it is what the arms begin with."""
    saved = PolicyModel(gpt2, model_name="tiny").save("next", tmp_path / "next", [1, 40, 41])
    config = json.loads((saved.path / "config.json").read_text(encoding="utf-8"))
    assert config["resid_pdrop"] == config["attn_pdrop"] == 0.1
    assert PolicyModel(saved, model_name="tiny").dropout_rates


def test_a_model_without_dropout_has_none_to_leave_on(initial: Policy, gpt2: Policy) -> None:
    with pytest.raises(ModelError, match="this model has no dropout to leave on"), learner_of(initial).model.dropout(0):
        pass
    with pytest.raises(ModelError, match="packed attention has no dropout"), learner_of(gpt2).model.dropout(0):
        pass
