"""The reward model's loss by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from online_dpo.losses import LN2, LogRatios, bradley_terry, sigmoid


def rewards(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_loss_by_hand() -> None:
    """r_w − r_l = ln 3: σ = 3/4, loss −ln ¾. Equal rewards: σ(0) = ½, loss ln 2. Difference −ln 3: −ln ¼."""
    loss = bradley_terry(rewards(math.log(3) + 5.0, -2.0, 1.0), rewards(5.0, -2.0, 1.0 + math.log(3)))
    assert loss.tolist() == pytest.approx([-math.log(0.75), LN2, -math.log(0.25)], rel=1e-12)


def test_centring_by_hand() -> None:
    """r_w = 2, r_l = −1, λ = 0.1: ln(1 + e^−3) + 0.1·(2 − 1)². A pair that sums to zero pays nothing."""
    loss = bradley_terry(rewards(2.0, 1.5), rewards(-1.0, -1.5), centre=0.1)
    assert loss.tolist() == pytest.approx([math.log1p(math.exp(-3)) + 0.1, math.log1p(math.exp(-3))], rel=1e-12)


def test_gradients_by_hand() -> None:
    """At r_w = r_l = 3, λ = 0.01: dL/dr_w = −½ + 2·0.01·6 = −0.38, dL/dr_l = ½ + 0.12 = 0.62."""
    r_w, r_l = rewards(3.0).requires_grad_(), rewards(3.0).requires_grad_()
    gradients = torch.autograd.grad(bradley_terry(r_w, r_l, centre=0.01).sum(), (r_w, r_l))
    assert [float(gradient) for gradient in gradients] == pytest.approx([-0.38, 0.62], rel=1e-12)


def test_it_is_dpo_with_rewards_in_place_of_scaled_log_ratios() -> None:
    """Rafailov et al. 2023 put β·log-ratio into this loss: with β = 1 both are one formula."""
    r_w, r_l = rewards(0.3, -700.0, 4.0), rewards(-0.2, 700.0, 9.0)
    assert torch.equal(bradley_terry(r_w, r_l), sigmoid(LogRatios(r_w, r_l), beta=1.0))
    assert bradley_terry(r_w, r_l)[1].item() == pytest.approx(1400.0)  # −log σ(−1400) without overflow


@pytest.mark.parametrize("shapes", [((2,), (2, 1)), ((2,), (3,)), ((2, 1), (2, 1)), ((), ())])
def test_shapes_that_would_broadcast_are_refused(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match=r"one shape \[pairs\]"):
        bradley_terry(torch.zeros(shapes[0]), torch.zeros(shapes[1]))
