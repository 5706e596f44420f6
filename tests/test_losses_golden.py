"""The losses against the DPO authors' own figures (float64)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from online_dpo.config import DPOSpec
from online_dpo.losses import implicit_rewards, ipo, log_ratios, robust, sigmoid
from online_dpo.objective import Objective, PairBatch, TokenLogps

INPUTS = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")


def golden_inputs(golden: dict[str, Any]) -> list[Tensor]:
    return [torch.tensor(golden["inputs"][name], dtype=torch.float64) for name in INPUTS]


@pytest.mark.parametrize("kwargs", [{"beta": 0.1}, {"beta": 0.5}, {"beta": 0.1, "label_smoothing": 0.1}])
def test_losses_and_rewards_are_the_authors(golden: dict[str, Any], kwargs: dict[str, float]) -> None:
    """Case by case in float64: their `preference_loss` and this one do the same arithmetic."""
    [case] = [case for case in golden["cases"] if case["kwargs"] == kwargs]
    r = log_ratios(*golden_inputs(golden))
    assert sigmoid(r, **kwargs).tolist() == pytest.approx(case["losses"], rel=1e-12)
    chosen, rejected = implicit_rewards(r, kwargs["beta"])
    assert chosen.tolist() == pytest.approx(case["chosen_rewards"], rel=1e-12)
    assert rejected.tolist() == pytest.approx(case["rejected_rewards"], rel=1e-12)


def test_without_a_reference_the_log_probs_themselves_are_compared(golden: dict[str, Any]) -> None:
    """The authors' `reference_free` sets π_ref's log-ratio to zero: the loss with zeros for the reference."""
    [case] = [case for case in golden["cases"] if case["kwargs"].get("reference_free")]
    policy_w, policy_l, *_ = golden_inputs(golden)
    zeros = torch.zeros_like(policy_w)
    loss = sigmoid(log_ratios(policy_w, policy_l, zeros, zeros), beta=case["kwargs"]["beta"])
    assert loss.tolist() == pytest.approx(case["losses"], rel=1e-12)


def test_ipo_is_the_authors(golden: dict[str, Any]) -> None:
    """Theirs is on summed log-probs, as ours where `length_normalize` is false."""
    [case] = [case for case in golden["cases"] if case["kwargs"].get("ipo")]
    loss = ipo(log_ratios(*golden_inputs(golden)), case["kwargs"]["beta"])
    assert loss.tolist() == pytest.approx(case["losses"], rel=1e-12)


def test_robust_follows_from_the_authors_figures(golden: dict[str, Any]) -> None:
    """With L their loss at ε = 0, L(−Δ) = L(Δ) + βΔ: robust = [(1−ε)·L − ε·(L + βΔ)] / (1−2ε)."""
    [case] = [case for case in golden["cases"] if case["kwargs"] == {"beta": 0.1}]
    margins = [w - lo for w, lo in zip(case["chosen_rewards"], case["rejected_rewards"], strict=True)]
    expected = [(0.8 * L - 0.2 * (L + m)) / 0.6 for L, m in zip(case["losses"], margins, strict=True)]
    assert robust(log_ratios(*golden_inputs(golden)), 0.1, 0.2).tolist() == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize(
    ("settings", "kwargs"),
    [
        ({"beta": 0.1}, {"beta": 0.1}),
        ({"beta": 0.5}, {"beta": 0.5}),
        ({"beta": 0.1, "label_smoothing": 0.1}, {"beta": 0.1, "label_smoothing": 0.1}),
        ({"beta": 0.1, "loss": "ipo", "length_normalize": False}, {"beta": 0.1, "ipo": True}),
    ],
)
def test_objective_on_tokens_is_the_authors(
    golden: dict[str, Any], settings: dict[str, Any], kwargs: dict[str, Any]
) -> None:
    """Each of their sums dealt out over 1 to 6 tokens: the objective must sum them again, and average nothing."""
    [case] = [case for case in golden["cases"] if case["kwargs"] == kwargs]
    pi_w, pi_l, ref_w, ref_l = (dealt_out(part) for part in golden_inputs(golden))
    out = Objective(DPOSpec(**settings))(PairBatch(pi_w=pi_w, pi_l=pi_l, ref_w=ref_w, ref_l=ref_l))
    assert out.losses.tolist() == pytest.approx(case["losses"], rel=1e-11)
    chosen, rejected = implicit_rewards(out.ratios, kwargs["beta"])
    assert chosen.tolist() == pytest.approx(case["chosen_rewards"], rel=1e-11)
    assert rejected.tolist() == pytest.approx(case["rejected_rewards"], rel=1e-11)


def dealt_out(sums: Tensor) -> TokenLogps:
    """Completion i has i + 1 tokens of unequal parts of its sum."""
    parts = [sums[i] * torch.softmax(torch.arange(i + 1, dtype=torch.float64), 0) for i in range(len(sums))]
    return TokenLogps(torch.cat(parts), torch.arange(1, len(sums) + 1))
