"""What combines with the losses: values by hand, directions, stop-gradients, finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from online_dpo.loss_modifiers import (
    dpop,
    exploration,
    importance_weight,
    ld_weights,
    length_normalize,
    length_penalty,
    nll,
    owners,
    wpo_weight,
)
from online_dpo.losses import LogRatios, sigmoid


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_owners_by_hand() -> None:
    """2, 1 and 3 tokens."""
    assert owners(torch.tensor([2, 1, 3]), 6).tolist() == [0, 0, 1, 2, 2, 2]


def test_length_normalize_divides_each_by_its_own_length() -> None:
    """6/3 and −8/2: dividing both by one length (or by padding's) would give another."""
    r = length_normalize(LogRatios(f64(6.0), f64(-8.0)), torch.tensor([3]), torch.tensor([2]))
    assert (r.r_w.item(), r.r_l.item(), r.delta.item()) == (2.0, -4.0, 6.0)


def test_dpop_by_hand() -> None:
    """λ = 5. r_w = −2: −2 − 5·2 = −12; r_w = 3 is above the reference and stays. r_l never changes."""
    r = dpop(LogRatios(f64(-2.0, 3.0), f64(-7.0, 1.0)), 5.0)
    assert (r.r_w.tolist(), r.r_l.tolist()) == ([-12.0, 3.0], [-7.0, 1.0])


def test_dpop_keeps_a_chosen_answer_from_falling_with_the_rejected_one() -> None:
    """Below the reference the chosen answer's gradient is λ + 1 times that of the rejected one."""
    r = LogRatios(f64(-2.0).requires_grad_(), f64(-7.0).requires_grad_())
    chosen, rejected = torch.autograd.grad(sigmoid(dpop(r, 5.0), 0.1).sum(), r)
    assert chosen.item() == pytest.approx(-6 * rejected.item(), rel=1e-14)


def test_length_penalty_by_hand() -> None:
    """α = 0.02, β = 0.1, |w| = 30, |l| = 10: βΔ + α(|w| − |l|) = 0.1·1 + 0.02·20 = 0.5."""
    r = length_penalty(LogRatios(f64(3.0), f64(2.0)), torch.tensor([30]), torch.tensor([10]), 0.02, 0.1)
    assert 0.1 * r.delta.item() == pytest.approx(0.5, rel=1e-14)


def test_a_longer_chosen_answer_is_pushed_less() -> None:
    """Three pairs with the same Δ = 0: the gradient's size falls with the chosen answer's length."""
    delta = f64(0.0, 0.0, 0.0).requires_grad_()
    lengths_w, lengths_l = torch.tensor([10, 20, 40]), torch.tensor([20, 20, 20])
    r = length_penalty(LogRatios(delta, torch.zeros(3).double()), lengths_w, lengths_l, 0.05, 0.1)
    [gradient] = torch.autograd.grad(sigmoid(r, 0.1).sum(), delta)
    shorter, equal, longer = gradient.abs().tolist()
    assert shorter > equal > longer
    # At equal lengths nothing changes: β/2.
    assert equal == pytest.approx(0.05, rel=1e-14)


def test_ld_weights_by_hand() -> None:
    """Pairs (3, 1) and (2, 4), chosen side: shared lengths 1 and 2, so tokens 1, α, α and 1, 1."""
    lengths, shared = torch.tensor([3, 2]), torch.tensor([1, 2])
    assert ld_weights(torch.zeros(5), lengths, shared, 0.25).tolist() == [1.0, 0.25, 0.25, 1.0, 1.0]
    assert ld_weights(torch.zeros(5), lengths, shared, 0.0).tolist() == [1.0, 0.0, 0.0, 1.0, 1.0]
    assert ld_weights(torch.zeros(5), lengths, shared, 1.0).tolist() == [1.0] * 5


def test_ld_weights_have_the_dtype_of_what_they_weigh() -> None:
    """0.3 in float32 is off by 1e-8, which float64 figures would show."""
    found = ld_weights(torch.zeros(2, dtype=torch.float64), torch.tensor([2]), torch.tensor([1]), 0.3)
    assert found.tolist() == [1.0, 0.3]


def test_wpo_weight_by_hand() -> None:
    """e^(ln ½)·e^(ln ¼) = 1/8; answers that the policy would sample itself (alignment 0) weigh 1."""
    weight = wpo_weight(f64(math.log(0.5), 0.0), f64(math.log(0.25), 0.0))
    assert weight.tolist() == pytest.approx([0.125, 1.0], rel=1e-14)


def test_importance_weight_by_hand() -> None:
    """π/μ = e^(0.5)·e^(−1.5) = e^(−1); on-policy 1; e² is clipped at 3; e^1000 too, without overflow."""
    pi_w, mu_w = f64(-9.5, -4.0, -3.0, 0.0), f64(-10.0, -4.0, -4.0, -1000.0)
    pi_l, mu_l = f64(-6.5, -5.0, -3.0, 0.0), f64(-5.0, -5.0, -4.0, 0.0)
    weight = importance_weight(pi_w, pi_l, mu_w, mu_l, 3.0)
    assert weight.tolist() == pytest.approx([math.exp(-1), 1.0, 3.0, 3.0], rel=1e-14)


def test_nll_by_hand() -> None:
    """12 nats over 4 tokens."""
    assert nll(f64(-12.0), torch.tensor([4])).item() == 3.0


def test_exploration_by_hand() -> None:
    """Chosen from the reference: −4; both: (−2 − 6)/2; rejected: −5; neither: 0."""
    pi_w, pi_l = f64(-4.0, -2.0, -9.0, -7.0), f64(-3.0, -6.0, -5.0, -8.0)
    from_w, from_l = torch.tensor([True, True, False, False]), torch.tensor([False, True, True, False])
    assert exploration(pi_w, pi_l, from_w, from_l).tolist() == [-4.0, -4.0, -5.0, 0.0]


def test_exploration_pushes_the_policy_away_from_the_references_answers() -> None:
    """A step down the gradient of + α·log π lowers log π, of the reference's answer alone."""
    pi_w, pi_l = f64(-4.0).requires_grad_(), f64(-3.0).requires_grad_()
    bonus = exploration(pi_w, pi_l, torch.tensor([False]), torch.tensor([True]))
    gradient_w, gradient_l = torch.autograd.grad(bonus.sum(), (pi_w, pi_l))
    assert (gradient_w.item(), gradient_l.item()) == (0.0, 1.0)


def test_weights_of_pairs_are_constants_for_the_gradient() -> None:
    pi = f64(-4.0, -2.0).requires_grad_()
    assert not wpo_weight(pi, pi).requires_grad
    assert not importance_weight(pi, pi, pi.detach(), pi.detach(), 2.0).requires_grad


LENGTHS = torch.tensor([3, 1, 4])
MODIFIERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "length_normalize": lambda w, lo: sigmoid(length_normalize(LogRatios(w, lo), LENGTHS, LENGTHS.flip(0)), 0.7),
    "dpop": lambda w, lo: sigmoid(dpop(LogRatios(w, lo), 3.0), 0.7),
    "length_penalty": lambda w, lo: sigmoid(length_penalty(LogRatios(w, lo), LENGTHS, LENGTHS.flip(0), 0.3, 0.7), 0.7),
    "ld_weights": lambda w, lo: w * ld_weights(lo, torch.tensor([1, 2]), torch.tensor([1, 1]), 0.3),
    "nll": lambda w, lo: nll(w + lo, LENGTHS),
    "exploration": lambda w, lo: exploration(w, lo, LENGTHS > 2, LENGTHS > 3),
}


@pytest.mark.parametrize("name", MODIFIERS)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    """float64, on both sides of `dpop`'s kink at r_w = 0 and not on it."""
    inputs = (f64(-1.5, 0.5, 3.0).requires_grad_(), f64(-1.0, 2.0, -0.25).requires_grad_())
    assert torch.autograd.gradcheck(MODIFIERS[name], inputs)


@pytest.mark.parametrize(
    "call",
    [
        lambda two, one: length_normalize(LogRatios(two, two), two, one),
        lambda two, one: dpop(LogRatios(two, one), 1.0),
        lambda two, one: length_penalty(LogRatios(two, two), one, two, 0.1, 0.1),
        lambda two, one: ld_weights(two, two, one, 0.5),
        wpo_weight,
        lambda two, one: importance_weight(two, two, one, two, 2.0),
        nll,
        lambda two, one: exploration(two, two, two > 0, one > 0),
    ],
)
def test_shapes_that_would_broadcast_are_refused(call: Callable[[Tensor, Tensor], object]) -> None:
    with pytest.raises(ValueError, match=r"one shape \[pairs\]"):
        call(torch.ones(2), torch.ones(1))
