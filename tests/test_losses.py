"""The DPO loss against the authors' own figures, exact facts and finite differences."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from online_dpo.losses import LN2, LogRatios, implicit_rewards, log_ratios, sigmoid

INPUTS = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")


def ratios(*delta: float) -> LogRatios:
    """Log-ratios with the given Δ: r_w = Δ + 1, r_l = 1, so that neither alone is the difference."""
    values = torch.tensor(delta, dtype=torch.float64)
    return LogRatios(values + 1.0, torch.ones_like(values))


# --- the authors' own figures ---


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


# --- log-ratios ---


def test_log_ratios_by_hand() -> None:
    """r_w = −10 − (−12) = 2, r_l = −7 − (−6) = −1, Δ = 2 − (−1) = 3."""
    r = log_ratios(*(torch.tensor([value]) for value in (-10.0, -7.0, -12.0, -6.0)))
    assert (r.r_w.item(), r.r_l.item(), r.delta.item()) == (2.0, -1.0, 3.0)


@pytest.mark.parametrize("wrong", range(4))
@pytest.mark.parametrize("shape", [(3,), (2, 1), ()])
def test_shapes_that_would_broadcast_are_refused(wrong: int, shape: tuple[int, ...]) -> None:
    """[2] against [2, 1] would broadcast to [2, 2] and average pairs that were never made."""
    inputs = [torch.zeros(2) for _ in range(4)]
    inputs[wrong] = torch.zeros(shape)
    with pytest.raises(ValueError, match=r"one shape \[pairs\]"):
        log_ratios(*inputs)


def test_equal_shapes_of_two_dimensions_are_refused() -> None:
    """Per-token log-probs [pairs, tokens] must be summed first."""
    with pytest.raises(ValueError, match=r"one shape \[pairs\]"):
        log_ratios(*(torch.zeros(2, 5) for _ in range(4)))


# --- exact facts ---


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.4])
def test_policy_equal_to_reference(epsilon: float) -> None:
    """Δ = 0: σ(0) = ½, so the loss is (1−ε)·ln 2 + ε·ln 2 = ln 2 and the margin β·0 = 0.

    dL/dΔ = −(1−ε)·β·σ(−βΔ) + ε·β·σ(βΔ), at 0: −β·(½ − ε); ε = 0 gives the gradient weight ½.
    """
    pi = torch.tensor([-31.5, -4.25], dtype=torch.float64, requires_grad=True)
    other = torch.tensor([-2.0, -90.0], dtype=torch.float64)
    r = log_ratios(pi, other, pi.detach(), other)
    loss = sigmoid(r, beta=0.3, label_smoothing=epsilon)
    assert loss.tolist() == pytest.approx([LN2, LN2], abs=1e-15)
    chosen, rejected = implicit_rewards(r, beta=0.3)
    assert (chosen - rejected).tolist() == [0.0, 0.0]
    [gradient] = torch.autograd.grad(loss.sum(), pi)
    assert gradient.tolist() == pytest.approx([-0.3 * (0.5 - epsilon)] * 2, abs=1e-15)


def test_ln2() -> None:
    """e^(ln 2) = 2."""
    assert math.exp(LN2) == pytest.approx(2.0, abs=1e-15)


def test_one_pair_by_hand() -> None:
    """β = ½, Δ = 2 ln 3: βΔ = ln 3, σ = 3/4. Loss −ln ¾; with ε = ¼: −¾·ln ¾ − ¼·ln ¼."""
    r = ratios(2 * math.log(3))
    assert sigmoid(r, beta=0.5).item() == pytest.approx(-math.log(0.75), rel=1e-14)
    smoothed = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert sigmoid(r, beta=0.5, label_smoothing=0.25).item() == pytest.approx(smoothed, rel=1e-14)


def test_swapping_a_pair_negates_the_difference() -> None:
    """Chosen and rejected exchanged: Δ → −Δ, so L'(Δ) = L(−Δ), and L(−Δ) − L(Δ) = βΔ at ε = 0 (log-odds)."""
    inputs = [torch.tensor(v, dtype=torch.float64) for v in ([-3.0, -8.0], [-4.5, -2.0], [-3.5, -9.0], [-4.0, -2.5])]
    policy_w, policy_l, reference_w, reference_l = inputs
    straight = log_ratios(policy_w, policy_l, reference_w, reference_l)
    swapped = log_ratios(policy_l, policy_w, reference_l, reference_w)
    assert torch.equal(swapped.delta, -straight.delta)
    difference = sigmoid(swapped, beta=0.7) - sigmoid(straight, beta=0.7)
    assert difference.tolist() == pytest.approx((0.7 * straight.delta).tolist(), rel=1e-12)


@pytest.mark.parametrize("epsilon", [0.05, 0.25, 0.45])
@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_optimum_under_smoothing(epsilon: float, beta: float) -> None:
    """dL/dΔ = 0 ⇔ (1−ε)·σ(−βΔ) = ε·σ(βΔ) ⇔ e^(βΔ) = (1−ε)/ε: Δ* = ln((1−ε)/ε)/β, a minimum."""
    best = math.log((1 - epsilon) / epsilon) / beta
    delta = torch.tensor([best], dtype=torch.float64, requires_grad=True)
    loss = sigmoid(LogRatios(delta, torch.zeros(1, dtype=torch.float64)), beta, epsilon)
    [gradient] = torch.autograd.grad(loss.sum(), delta)
    assert gradient.item() == pytest.approx(0.0, abs=1e-14)
    around = sigmoid(ratios(best - 0.1, best, best + 0.1), beta, epsilon).tolist()
    assert around[1] < min(around[0], around[2])


def test_loss_falls_with_the_difference() -> None:
    """Without smoothing there is no optimum: a larger Δ is always better, down to 0."""
    loss = sigmoid(ratios(-200.0, -1.0, 0.0, 1.0, 200.0), beta=1.0).tolist()
    assert loss == sorted(loss, reverse=True)
    # −log σ(−200) = 200 + log(1 + e^−200): no overflow where exp(200)'s square would be near one.
    assert loss[0] == pytest.approx(200.0, rel=1e-12)
    assert 0.0 <= loss[-1] < 1e-80


# --- gradients ---


@pytest.mark.parametrize("epsilon", [0.0, 0.2])
def test_gradients_are_those_of_finite_differences(epsilon: float) -> None:
    """All four inputs, float64, Δ from −40 to 40."""
    generator = torch.Generator().manual_seed(0)
    inputs = [(20 * torch.randn(8, generator=generator, dtype=torch.float64) - 30).requires_grad_() for _ in range(4)]

    def losses(*four: Tensor) -> Tensor:
        return sigmoid(log_ratios(*four), beta=0.3, label_smoothing=epsilon)

    assert torch.autograd.gradcheck(losses, inputs)


def test_rewards_carry_no_gradient() -> None:
    """They are figures to report: nothing may train through them."""
    r = LogRatios(torch.ones(2, requires_grad=True), torch.zeros(2, requires_grad=True))
    assert not any(reward.requires_grad for reward in implicit_rewards(r, 0.1))
