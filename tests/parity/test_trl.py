"""Every loss that TRL has as well, trained for ten steps by both: the same losses and gradient norms, step by step.

TRL's side is its own `DPOTrainer.train`, from text. Where the two differ on purpose, the exact relation is checked.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from training_parts import LORA, PAIR_EACH
from trl_parts import Stage, ours, settings, stage_of, theirs

from online_dpo.types import Policy

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason="TRL is not installed: pip install 'online-dpo[dev]'"
)

TOLERANCE = 1e-4
SMOOTHED: dict[str, Any] = {"label_smoothing": 0.1}
# Ours, and TRL's options for the same.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sigmoid": ({}, {}),
    "robust": (SMOOTHED, SMOOTHED),
    "hinge": ({"beta": 0.05}, {}),  # at 0.1 its late losses are next to none: all rounding
    "ipo": ({"length_normalize": True}, {}),
    "sigmoid_norm": ({}, {}),
    "exo_pair": (SMOOTHED, SMOOTHED),
    "nca_pair": ({}, {}),
    "bco_pair": ({}, {}),
    "sppo_hard": ({}, {"loss_weights": [0.5]}),  # TRL leaves the paper's ½ out
    "aot": (SMOOTHED, SMOOTHED),
    "apo_zero": ({}, {}),
    "apo_down": ({}, {}),
    # At the default 0.05 rounding grows too fast for ten steps: see below.
    "discopop": ({"discopop_tau": 0.5}, {"discopop_tau": 0.5}),
    "sigmoid, ld_alpha": ({"ld_alpha": 0.3}, {"ld_alpha": 0.3}),
    "ipo, ld_alpha": ({"length_normalize": True, "ld_alpha": 0.3}, {"ld_alpha": 0.3}),
    "sigmoid, wpo": ({"wpo_weight": True}, {"use_weighting": True}),
    "nca_pair, wpo": ({"wpo_weight": True}, {"use_weighting": True}),
    # Adam forgets a gradient's scale but not how it changes from step to step.
    "sigmoid, clipped": ({"clip": 1.5}, {}),
}


@pytest.fixture
def full(stories: Path, initial: Policy, moved: Callable[..., Policy]) -> Stage:
    """All weights of stories260k, against a reference that is not the policy."""
    return stage_of(initial, moved(3, scale=0.01))


@pytest.fixture
def adapter(stories: Path, initial: Policy, moved: Callable[..., Policy]) -> Stage:
    """An adapter of stories260k, against another adapter."""
    return stage_of(initial, moved(5, lora=LORA, scale=0.02), moved(4, lora=LORA, scale=0.02))


def require_parity(stage: Stage, name: str) -> None:
    loss = name.partition(",")[0]
    changes, options = CASES[name]
    dpo = settings(loss=loss, **changes)
    found, truth = ours(stage, dpo), theirs(stage, dpo, loss_type=[loss], **options)
    assert len(truth.loss) == 10
    assert found.off(truth) <= TOLERANCE
    if dpo.ld_alpha is None:  # TRL reports margins of weighed tokens, we plain ones
        assert torch.allclose(found.margin, truth.margin, rtol=TOLERANCE, atol=TOLERANCE)


def test_sigmoid_trains_as_trls(full: Stage) -> None:
    require_parity(full, "sigmoid")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name != "sigmoid"])
def test_all_weights_train_as_trls(full: Stage, name: str) -> None:
    require_parity(full, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_an_adapter_trains_as_trls(adapter: Stage, name: str) -> None:
    require_parity(adapter, name)


@pytest.mark.slow
def test_discopop_at_its_default_temperature_begins_as_trls(full: Stage) -> None:
    """σ(βΔ/τ) at τ = 0.05 turns within a tenth of a nat: from the second step on, rounding decides.

    TRL's own training, begun from weights a ten-millionth apart, ends as far from itself as ours from it.
    """
    dpo = settings(loss="discopop", batch_size=8, epochs=1)
    assert ours(full, dpo).off(theirs(full, dpo, loss_type=["discopop"])) <= TOLERANCE


@pytest.mark.slow
def test_trls_sppo_hard_is_twice_ours(full: Stage) -> None:
    """Without the ½: twice the loss and twice the gradient, at the same weights, which Adam moves alike."""
    dpo = settings(loss="sppo_hard")
    assert ours(full, dpo).off(theirs(full, dpo, loss_type=["sppo_hard"]), times=0.5) <= TOLERANCE


@pytest.mark.slow
def test_trls_ipo_is_not_the_papers(full: Stage) -> None:
    """The paper's log-ratios are sums: mean of (Δ − 1/(2β))², which TRL has under no name."""
    dpo = settings(loss="ipo", length_normalize=False, epochs=1)
    pi, ref, _ = full.first(dpo)
    summed = ours(full, dpo)
    r = pi - ref
    assert summed.loss[0].item() == pytest.approx(float((r[:, 0] - r[:, 1] - 5).square().mean()), rel=TOLERANCE)
    assert summed.off(theirs(full, dpo, loss_type=["ipo"])) > 0.01


@pytest.mark.slow
def test_trl_ignores_label_smoothing_of_sigmoid_and_we_do_not(full: Stage) -> None:
    """β = 0.1, ε = 0.2: −0.8·log σ(βΔ) − 0.2·log σ(−βΔ) of the first four pairs; TRL's is ours at ε = 0."""
    plain, smoothed = settings(), settings(label_smoothing=0.2)
    truth, found = theirs(full, plain, loss_type=["sigmoid"], label_smoothing=0.2), ours(full, smoothed)
    assert ours(full, plain).off(truth) <= TOLERANCE
    assert found.off(truth) > 0.01
    pi, ref, _ = full.first(smoothed)
    z = 0.1 * ((pi - ref)[:, 0] - (pi - ref)[:, 1])
    by_hand = -0.8 * F.logsigmoid(z) - 0.2 * F.logsigmoid(-z)
    assert found.loss[0].item() == pytest.approx(float(by_hand.mean()), rel=TOLERANCE)


@pytest.mark.slow
def test_label_smoothing_trains_as_trls_aot_of_one_pair(full: Stage) -> None:
    """One margin is sorted already: TRL's `aot`, which does read ε, is then conservative DPO."""
    few = replace(full, pairs=full.pairs[:5])
    dpo = settings(label_smoothing=0.2, batch_size=1, epochs=2)
    assert ours(few, dpo).off(theirs(few, dpo, loss_type=["aot"], label_smoothing=0.2)) <= TOLERANCE


@pytest.mark.slow
def test_aot_is_of_the_whole_batch_and_trls_of_a_forward_pass(full: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut into passes of one pair, ours is still TRL's of one pass; TRL's, cut so, has become plain DPO."""
    monkeypatch.setattr(full.learner.model, "tokens_per_pass", PAIR_EACH)
    aot, sigmoid = settings(loss="aot"), settings()
    of_batch = ours(full, aot)
    assert of_batch.off(theirs(full, aot, loss_type=["aot"])) <= TOLERANCE
    cut = theirs(full, aot, loss_type=["aot"], per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert of_batch.off(cut) > 0.01
    assert ours(full, sigmoid).off(cut) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_nll_of_one_pair_trains_as_trls_sft(request: pytest.FixtureRequest, kind: str) -> None:
    stage: Stage = request.getfixturevalue(kind)
    few = replace(stage, pairs=stage.pairs[:5])
    dpo = settings(nll_weight=0.7, batch_size=1, epochs=2)
    truth = theirs(few, dpo, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.7])
    assert ours(few, dpo).off(truth) <= TOLERANCE


@pytest.mark.slow
def test_nll_is_a_mean_over_pairs_and_trls_sft_over_tokens(full: Stage) -> None:
    """Of four pairs: TRL's term is −Σ log π(w) / Σ |w|, ours the mean of −log π(w)/|w| (Pang et al., eq. 1)."""
    dpo = settings(nll_weight=0.7, epochs=1)
    truth, found = theirs(full, dpo, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.7]), ours(full, dpo)
    pi, _, lengths = full.first(dpo)
    over_tokens = -pi[:, 0].sum() / lengths[:, 0].sum()
    over_pairs = -(pi[:, 0] / lengths[:, 0]).mean()
    apart = 0.7 * float(over_tokens - over_pairs)
    assert abs(apart) > 0.01
    assert float(truth.loss[0] - found.loss[0]) == pytest.approx(apart, abs=TOLERANCE * float(truth.loss[0]))
