"""The learning-rate schedule by hand, and AdamW's first step."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from online_dpo.backends.optimiser import learning_rate, make_optimiser
from online_dpo.config import DPOSpec


def rates(steps: int, **settings: object) -> list[float]:
    dpo = DPOSpec.model_validate({"lr": 1.0, **settings})
    return [learning_rate(step, steps, dpo) for step in range(steps)]


def test_constant_without_warm_up() -> None:
    assert rates(3, warmup=0.0, schedule="constant") == [1.0, 1.0, 1.0]


def test_warm_up() -> None:
    """Half of 6 steps: w = 3, so ¼, ²⁄₄, ¾ and then the full rate; the first is not zero."""
    assert rates(6, warmup=0.5) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_warm_up_shorter_than_a_step_is_none() -> None:
    """A tenth of 9 steps is 0.9: no whole step."""
    assert rates(9, warmup=0.1) == [1.0] * 9


def test_warm_up_over_the_whole_round() -> None:
    """w = 4 of 4: ⅕, ⅖, ⅗, ⅘."""
    assert rates(4, warmup=1.0) == pytest.approx([0.2, 0.4, 0.6, 0.8])


def test_linear() -> None:
    """No warm-up, 4 steps: 1 − k/4; it would reach 0 at step 4, one past the last."""
    assert rates(4, warmup=0.0, schedule="linear") == [1.0, 0.75, 0.5, 0.25]


def test_linear_after_warm_up() -> None:
    """5 steps, w = 1: ½, then 4 steps of decay from 1."""
    assert rates(5, warmup=0.2, schedule="linear") == [0.5, 1.0, 0.75, 0.5, 0.25]


def test_cosine() -> None:
    """½(1 + cos(πk/4)): 1, ½ + √2/4, ½, ½ − √2/4."""
    expected = [1.0, 0.5 + math.sqrt(2) / 4, 0.5, 0.5 - math.sqrt(2) / 4]
    assert rates(4, warmup=0.0, schedule="cosine") == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_one_step_runs_at_the_full_rate(schedule: str) -> None:
    assert rates(1, warmup=0.1, schedule=schedule) == [1.0]


def test_rate_is_in_units_of_lr() -> None:
    """Half of 2 steps is a warm-up of one: lr/2 and lr."""
    dpo = DPOSpec(lr=3e-5, warmup=0.5)
    assert [learning_rate(step, 2, dpo) for step in range(2)] == pytest.approx([1.5e-5, 3e-5], rel=1e-12)


def test_first_step_of_adamw_by_hand() -> None:
    """m̂ = g and v̂ = g², so the first step is lr·g/(|g| + 1e-8) ≈ lr·sign g, after the decay w·(1 − lr·λ).

    w = 2, g = −4, lr = 0.1, λ = 0.5: 2·(1 − 0.05) + 0.1 = 2.0.
    """
    weight = nn.Parameter(torch.tensor([2.0]))
    frozen = nn.Parameter(torch.tensor([7.0]), requires_grad=False)
    optimiser = make_optimiser([weight, frozen], DPOSpec(lr=0.1, weight_decay=0.5))
    assert [p for group in optimiser.param_groups for p in group["params"]] == [weight]
    weight.grad = torch.tensor([-4.0])
    optimiser.step()
    assert weight.item() == pytest.approx(2.0, abs=1e-6)
    assert frozen.item() == 7.0


def test_second_step_uses_the_experiments_betas() -> None:
    """Gradients 1 then 0, β₁ = ½, β₂ = ¾, no decay. After step 2: m = ½·½ = ¼, m̂ = ¼/(1 − ¼) = ⅓;
    v = ¾·¼ = 3/16, v̂ = (3/16)/(1 − 9/16) = 3/7. Steps: 0.1·1 + 0.1·(⅓)/√(3/7) = 0.1·(1 + 0.509175)."""
    weight = nn.Parameter(torch.tensor([1.0]))
    optimiser = make_optimiser([weight], DPOSpec(lr=0.1, adam_beta1=0.5, adam_beta2=0.75))
    for gradient in (1.0, 0.0):
        weight.grad = torch.tensor([gradient])
        optimiser.step()
    assert weight.item() == pytest.approx(1.0 - 0.1 * 1.5091751, abs=1e-6)
