"""REINFORCE leave-one-out by hand, and its expectation against the exact gradient of what is maximised.

The exact one is of a small model whose answers can all be named: two tokens "a" and "b" and an end, at most two tokens
before the end, nine numbers. Nothing is sampled: every n-tuple of answers is weighed by its probability.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from online_dpo.rloo import Rloo, leave_one_out, rloo

END, A, B = 0, 1, 2
ANSWERS = ((END,), (A, END), (A, A), (A, B), (B, END), (B, A), (B, B))
SCORES = torch.tensor([0.3, -1.0, 2.0, 0.7, -0.4, 1.1, 0.0], dtype=torch.float64)
BETA = 0.3


def of(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- by hand ---


def test_leave_one_out_by_hand() -> None:
    """1 − (2 + 6)/2, 2 − (1 + 6)/2, 6 − (1 + 2)/2; of two answers, plus and minus their difference."""
    assert leave_one_out(of([1, 2, 6])).tolist() == pytest.approx([-3.0, -1.5, 4.5])
    assert leave_one_out(of([5, 2])).tolist() == pytest.approx([3.0, -3.0])


def test_one_prompt_by_hand() -> None:
    """Scores 1, 2, 6 and β = ½; log-ratios to the reference 2, 0, −2 make rewards 0, 2, 7 and advantages −4.5, −1.5,
    6. Weights π/μ are 1, 2 and 40, which is cut at 10."""
    log_pi = of([-3.0, -4.0, -5.0]).requires_grad_()
    log_mu = of([-3.0, -4.0 - math.log(2), -5.0 - math.log(40)])
    log_ref = of([-5.0, -4.0, -3.0])
    out = rloo(log_pi, log_mu, log_ref, of([1.0, 2.0, 6.0]), kl=0.5, clip=10.0)
    assert out.log_ratios is not None
    assert out.log_ratios.tolist() == pytest.approx([2.0, 0.0, -2.0])
    assert out.advantages.tolist() == pytest.approx([-4.5, -1.5, 6.0])
    assert out.weights.tolist() == pytest.approx([1.0, 2.0, 10.0])
    assert out.loss.item() == pytest.approx(-(-4.5 * -3 + 2 * -1.5 * -4 + 10 * 6 * -5) / 3)
    [gradient] = torch.autograd.grad(out.loss, log_pi)
    assert gradient.tolist() == pytest.approx([4.5 / 3, 3.0 / 3, -60.0 / 3])


def test_without_a_clip_no_answer_is_weighed_and_without_a_penalty_no_reference_is_read() -> None:
    log_pi = of([-3.0, -4.0]).requires_grad_()
    out = rloo(log_pi, of([-9.0, -1.0]), None, of([1.0, 0.0]), kl=0.0, clip=None)
    assert out.weights.tolist() == [1.0, 1.0]
    assert out.log_ratios is None
    assert out.loss.item() == pytest.approx(-(1 * -3 + -1 * -4) / 2)


def test_weights_and_advantages_are_constants_of_the_gradient() -> None:
    """Finite differences of −mean(w·A·log π) with w and A held where they are; moving them too would show."""
    values = [-3.0, -4.0, -2.5, -6.0]
    log_mu, log_ref, scores = of([-3.5, -4.0, -2.0, -5.0]), of([-2.0, -4.5, -3.0, -6.0]), of([0.5, -1.0, 2.0, 0.0])
    log_pi = of(values).requires_grad_()
    out = rloo(log_pi, log_mu, log_ref, scores, kl=0.4, clip=1.5)
    [gradient] = torch.autograd.grad(out.loss, log_pi)

    def held(at: Tensor) -> float:
        return float(-(out.weights * out.advantages * at).mean())

    def moving(at: Tensor) -> float:
        return float(rloo(at, log_mu, log_ref, scores, kl=0.4, clip=1.5).loss)

    assert gradient.tolist() == pytest.approx(slopes(held, of(values)), abs=1e-8)
    assert gradient.tolist() != pytest.approx(slopes(moving, of(values)), abs=1e-2)


@pytest.mark.parametrize(
    ("sizes", "kl", "says"),
    [
        ((1, 1, 1, 1), 0.1, "n ≥ 2"),
        ((3, 2, 3, 3), 0.1, "one shape"),
        ((3, 3, 3, 2), 0.1, "one shape"),
        ((3, 3, None, 3), 0.1, "a penalty needs the reference"),
    ],
)
def test_what_is_refused(sizes: tuple[int | None, ...], kl: float, says: str) -> None:
    log_pi, log_mu, log_ref, scores = (None if size is None else torch.zeros(size) for size in sizes)
    assert log_pi is not None and log_mu is not None and scores is not None
    with pytest.raises(ValueError, match=says):
        rloo(log_pi, log_mu, log_ref, scores, kl, clip=None)


# --- the exact gradient ---


def log_probs(theta: Tensor) -> Tensor:
    """[answers]: θ[0] holds the logits of the first token, θ[1] and θ[2] those after "a" and "b"."""
    logs = theta.log_softmax(-1)

    def one(answer: tuple[int, ...]) -> Tensor:
        first = logs[0, answer[0]]
        return first if len(answer) == 1 else first + logs[answer[0], answer[1]]

    return torch.stack([one(answer) for answer in ANSWERS])


def model(seed: int) -> Tensor:
    return torch.randn(3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def objective(theta: Tensor, log_ref: Tensor) -> Tensor:
    """J = Σ_y π(y)·(s(y) − β·log(π(y)/π_ref(y)))."""
    log_pi = log_probs(theta)
    return (log_pi.exp() * (SCORES - BETA * (log_pi - log_ref))).sum()


def exact(theta: Tensor, log_ref: Tensor) -> list[float]:
    """∇J by finite differences."""
    return slopes(lambda at: float(objective(at.view(3, 3), log_ref)), theta.flatten())


def slopes(function: Callable[[Tensor], float], at: Tensor, step: float = 1e-5) -> list[float]:
    found = []
    for i in range(len(at)):
        move = torch.zeros_like(at)
        move[i] = step
        found.append((function(at + move) - function(at - move)) / (2 * step))
    return found


def expected_gradient(theta: Tensor, log_mu: Tensor, log_ref: Tensor, n: int, clip: float | None) -> list[float]:
    """E[∇L] over all n-tuples of answers drawn from μ, one by one."""
    theta = theta.clone().requires_grad_()
    log_pi = log_probs(theta)
    total = torch.zeros((), dtype=torch.float64)
    for drawn in itertools.product(range(len(ANSWERS)), repeat=n):
        chance = log_mu[list(drawn)].sum().exp()
        total = total + chance * loss_of(drawn, log_pi, log_mu, log_ref, clip).loss
    [gradient] = torch.autograd.grad(total, theta)
    return [float(value) for value in gradient.flatten()]


def loss_of(drawn: tuple[int, ...], log_pi: Tensor, log_mu: Tensor, log_ref: Tensor, clip: float | None) -> Rloo:
    places = list(drawn)
    return rloo(log_pi[places], log_mu[places], log_ref[places], SCORES[places], BETA, clip)


def test_the_answers_are_all_there_are() -> None:
    assert log_probs(model(1)).exp().sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("clip", [None, 10.0])
def test_on_policy_its_mean_is_the_exact_policy_gradient(n: int, clip: float | None) -> None:
    """E[∇L] = −∇J, the penalty's part in it: π drew the answers."""
    theta, log_ref = model(1), log_probs(model(2))
    found = expected_gradient(theta, log_probs(theta), log_ref, n, clip)
    assert found == pytest.approx([-value for value in exact(theta, log_ref)], abs=1e-8)
    assert max(map(abs, found)) > 0.05


def test_off_policy_too_as_long_as_no_weight_is_cut() -> None:
    """Answers of another model, weighed by π/μ; cut at less than the largest weight, or not weighed, it is another."""
    theta, log_mu, log_ref = model(1), log_probs(model(3)), log_probs(model(2))
    wanted = [-value for value in exact(theta, log_ref)]
    largest = float((log_probs(theta) - log_mu).exp().max())
    assert expected_gradient(theta, log_mu, log_ref, 2, 1.01 * largest) == pytest.approx(wanted, abs=1e-8)
    for clip in (0.5 * largest, None):
        assert expected_gradient(theta, log_mu, log_ref, 2, clip) != pytest.approx(wanted, abs=0.02)


def test_following_it_reaches_what_maximises_the_objective() -> None:
    """The optimum is π*(y) ∝ π_ref(y)·e^{s(y)/β} (Rafailov et al. 2023, eq. 4)."""
    theta, log_ref = model(1), log_probs(model(2))
    for _ in range(400):
        gradient = expected_gradient(theta, log_probs(theta), log_ref, 2, None)
        theta = theta - 1.0 * torch.tensor(gradient, dtype=torch.float64).view(3, 3)
    best = (log_ref + SCORES / BETA).log_softmax(-1)
    assert log_probs(theta).exp().tolist() == pytest.approx(best.exp().tolist(), abs=0.02)
