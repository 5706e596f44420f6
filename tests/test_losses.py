"""The losses against figures derived by hand, exact facts and finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from online_dpo.losses import (
    LN2,
    LogRatios,
    aot,
    aot_reference,
    apo_down,
    apo_zero,
    bco_pair,
    discopop,
    exo_pair,
    hinge,
    implicit_rewards,
    ipo,
    log_ratios,
    mean_reward,
    nca_pair,
    robust,
    sigmoid,
    simpo,
    sppo,
    sppo_hard,
)

Loss = Callable[[LogRatios, float], Tensor]
P = torch.tensor([0.9, 0.75, 0.5, 1.0, 0.6], dtype=torch.float64)

FAMILY: dict[str, Loss] = {
    "sigmoid": sigmoid,
    "sigmoid smoothed": lambda r, beta: sigmoid(r, beta, 0.2),
    "robust": lambda r, beta: robust(r, beta, 0.2),
    "hinge": hinge,
    "ipo": ipo,
    "simpo": lambda r, beta: simpo(r, beta, 0.5),
    "exo_pair": lambda r, beta: exo_pair(r, beta, 0.1),
    "nca_pair": nca_pair,
    "bco_pair": bco_pair,
    "bco_pair shifted": lambda r, beta: bco_pair(r, beta, 0.4),
    "sppo_hard": sppo_hard,
    "sppo": lambda r, beta: sppo(r, beta, P[: r.r_w.numel()], 1 - P[: r.r_w.numel()]),
    "aot": lambda r, beta: aot(r.r_w, r.r_l, beta, 0.1),
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
}
"""Every loss as a function of log-ratios and β (`aot`'s two margins in place of r_w and r_l)."""


def ratios(*delta: float) -> LogRatios:
    """Log-ratios with the given Δ: r_w = Δ + 1, r_l = 1, so that neither alone is the difference."""
    values = torch.tensor(delta, dtype=torch.float64)
    return LogRatios(values + 1.0, torch.ones_like(values))


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


@pytest.mark.parametrize("name", FAMILY)
def test_every_gradient_is_that_of_finite_differences(name: str) -> None:
    """Both log-ratios, float64, five pairs on both sides of the reference; none near the kink of `hinge`, βΔ = 1."""
    r_w = torch.tensor([0.0, 1.5, -3.0, 0.7, 12.0], dtype=torch.float64, requires_grad=True)
    r_l = torch.tensor([0.0, -2.0, 1.0, 4.0, -9.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w, lo: FAMILY[name](LogRatios(w, lo), 0.7), (r_w, r_l))


@pytest.mark.parametrize("name", FAMILY)
def test_every_loss_is_finite_far_from_the_reference(name: str) -> None:
    """float32, βΔ = ±400: e^400 is infinite there, and 0·∞ undefined. `sppo`'s squares are 1e6 or so."""
    far = torch.tensor([400.0, -400.0, 0.0])
    r = LogRatios(far.clone().requires_grad_(), (-far / 4).requires_grad_())
    loss = FAMILY[name](r, 0.8)
    gradients = torch.autograd.grad(loss.sum(), r)
    assert torch.isfinite(loss).all()
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("shapes", [((3,), (1,)), ((3, 1), (3, 1)), ((), ())])
def test_every_loss_refuses_shapes_that_are_no_pairs(name: str, shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match=r"one shape \[pairs\]"):
        FAMILY[name](LogRatios(torch.zeros(shapes[0]), torch.zeros(shapes[1])), 0.1)


@pytest.mark.parametrize("name", FAMILY)
def test_every_loss_reads_beta(name: str) -> None:
    """β left out altogether is a mistake that public code has made."""
    r = LogRatios(torch.tensor([1.5, -0.5]), torch.tensor([-0.25, 1.0]))
    assert not torch.allclose(FAMILY[name](r, 0.1), FAMILY[name](r, 0.3))


@pytest.mark.parametrize("name", FAMILY)
def test_every_loss_is_of_each_pair_alone(name: str) -> None:
    """A pair's loss does not change with its neighbours (once `aot`'s reference margins are given)."""
    r = LogRatios(torch.tensor([1.5, -0.5, 3.0]), torch.tensor([-0.25, 1.0, 2.0]))
    alone = FAMILY[name](LogRatios(r.r_w[:1], r.r_l[:1]), 0.3)
    assert torch.equal(alone, FAMILY[name](r, 0.3)[:1])


# --- each loss by hand ---

LN3 = math.log(3.0)


def one(r_w: float, r_l: float) -> LogRatios:
    return LogRatios(torch.tensor([r_w], dtype=torch.float64), torch.tensor([r_l], dtype=torch.float64))


@pytest.mark.parametrize(
    ("loss", "r_w", "r_l", "beta", "expected"),
    [
        # βΔ = ½·(2 ln 3) = ln 3, σ = ¾, ε = ¼: [−¾·ln ¾ + ¼·ln ¼] / ½
        (lambda r, b: robust(r, b, 0.25), LN3, -LN3, 0.5, (-0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / 0.5),
        # 1 − ½·1.2 = 0.4; and 1 − ½·3 < 0
        (hinge, 1.0, -0.2, 0.5, 0.4),
        (hinge, 2.0, -1.0, 0.5, 0.0),
        # (1.2 − 1/(2·½))² = 0.2²
        (ipo, 1.0, -0.2, 0.5, 0.04),
        # 2·(−0.5 + 0.5 + ½ ln 3) − 0 with γ = 0: ln 3; with γ = 2 ln 3: −ln 3, σ = ¼
        (lambda r, b: simpo(r, b, 0.0), -0.5, -0.5 - LN3 / 2, 2.0, -math.log(0.75)),
        (lambda r, b: simpo(r, b, 2 * LN3), -0.5, -0.5 - LN3 / 2, 2.0, -math.log(0.25)),
        # p = (¾, ¼), q = (0.9, 0.1): ¾·ln(¾/0.9) + ¼·ln(¼/0.1)
        (lambda r, b: exo_pair(r, b, 0.1), LN3, -LN3, 0.5, 0.75 * math.log(0.75 / 0.9) + 0.25 * math.log(2.5)),
        # βr_w = ln 3, βr_l = −ln 3: −ln ¾ − ½ ln ¼ − ½ ln ¾
        (nca_pair, 2 * LN3, -2 * LN3, 0.5, -1.5 * math.log(0.75) - 0.5 * math.log(0.25)),
        # −ln σ(ln 3) − ln σ(−(−ln 3)) = −2 ln ¾; with δ = ln 3: −ln σ(0) − ln σ(2 ln 3) = ln 2 − ln 0.9
        (bco_pair, 2 * LN3, -2 * LN3, 0.5, -2 * math.log(0.75)),
        (lambda r, b: bco_pair(r, b, LN3), 2 * LN3, -2 * LN3, 0.5, math.log(2) - math.log(0.9)),
        # 1/(2β) = 1: ½[(1.5 − 1)² + (0.5 + 1)²] = ½[0.25 + 2.25]
        (sppo_hard, 1.5, 0.5, 0.5, 1.25),
        # P = 0.9, 0.1 and β = ½: targets 0.8 and −0.8: ½[0.7² + 1.3²] = ½[0.49 + 1.69]
        (lambda r, b: sppo(r, b, P[:1], 1 - P[:1]), 1.5, 0.5, 0.5, 1.09),
        # βr_w = ln 3, βr_l = −ln 3: 1 − ¾ + ¼
        (apo_zero, 2 * LN3, -2 * LN3, 0.5, 0.5),
        # βr_w = ln 3; βΔ = 2 ln 3, σ = 9/10: ¾ + 1 − 0.9
        (apo_down, 2 * LN3, -2 * LN3, 0.5, 0.85),
        # z = ln 3, τ = 1: m = ¾: ¼·(−ln ¾) + ¾·⅓
        (lambda r, b: discopop(r, b, 1.0), LN3, -LN3, 0.5, -0.25 * math.log(0.75) + 0.25),
        # z = 0: m = ½: ½·ln 2 + ½, whatever τ
        (discopop, 1.0, 1.0, 0.5, 0.5 * math.log(2) + 0.5),
    ],
)
def test_one_pair_of_each_loss_by_hand(loss: Loss, r_w: float, r_l: float, beta: float, expected: float) -> None:
    """The derivation stands beside each case; the arguments are chosen so that σ is ¼, ½, ¾ or 9/10."""
    assert loss(one(r_w, r_l), beta).item() == pytest.approx(expected, rel=1e-13, abs=1e-15)


def test_discopop_at_the_papers_temperature() -> None:
    """τ = 0.05: |z| = 2 is 40 τ away from the mixture's centre: logistic below, e^(−z) above (m < 1e-17)."""
    loss = discopop(LogRatios(torch.tensor([-2.0, 2.0], dtype=torch.float64), torch.zeros(2).double()), 1.0)
    assert loss.tolist() == pytest.approx([math.log(1 + math.exp(2)), math.exp(-2)], rel=1e-14)


def test_apo_directions() -> None:
    """`apo_zero` raises the chosen and lowers the rejected answer. `apo_down` at Δ = r_w = 0 lowers both.

    d apo_down/dr_w = β[σ'(0) − σ'(0)] = 0 there; at r_w = 0, Δ > 0 large: +β/4 > 0, so a step lowers the chosen one.
    """
    r = LogRatios(torch.zeros(1, requires_grad=True), torch.full((1,), -5.0, requires_grad=True))
    up, down = torch.autograd.grad(apo_zero(r, 1.0).sum(), r)
    assert up.item() < 0 < down.item()
    chosen, rejected = torch.autograd.grad(apo_down(r, 1.0).sum(), r)
    assert chosen.item() > 0 and rejected.item() > 0


# --- exact facts of the family ---


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sigmoid", LN2),
        ("sigmoid smoothed", LN2),
        # [(1−ε)·ln 2 − ε·ln 2] / (1−2ε)
        ("robust", LN2),
        ("hinge", 1.0),
        # 1/(2·0.4)² = 1.25²
        ("ipo", 1.5625),
        ("exo_pair", -LN2 - 0.5 * math.log(0.1 * 0.9)),
        ("nca_pair", 2 * LN2),
        ("bco_pair", 2 * LN2),
        ("sppo_hard", 1.5625),
        ("aot", LN2),
        ("apo_zero", 1.0),
        ("apo_down", 1.0),
        ("discopop", 0.5 * LN2 + 0.5),
    ],
)
def test_every_loss_where_policy_is_reference(name: str, expected: float) -> None:
    """r_w = r_l = 0, β = 0.4: every σ is ½."""
    zeros = torch.zeros(3, dtype=torch.float64)
    assert FAMILY[name](LogRatios(zeros, zeros), 0.4).tolist() == pytest.approx([expected] * 3, rel=1e-14)


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.45])
def test_robust_over_flipped_labels_is_the_clean_loss(epsilon: float) -> None:
    """(1−ε)·L(Δ) + ε·L(−Δ) = [((1−ε)² − ε²)·(−log σ(βΔ)) + 0·log σ(−βΔ)] / (1−2ε) = −log σ(βΔ)."""
    r = ratios(-7.0, -0.3, 0.0, 1.0, 25.0)
    flipped = LogRatios(r.r_l, r.r_w)
    mean = (1 - epsilon) * robust(r, 0.6, epsilon) + epsilon * robust(flipped, 0.6, epsilon)
    assert mean.tolist() == pytest.approx(sigmoid(r, 0.6).tolist(), rel=1e-12, abs=1e-13)


def test_robust_is_another_loss_than_smoothing() -> None:
    """The same ε has opposite effect: smoothing flattens the gradient at 0 to −β(½−ε), `robust` keeps −β/2.

    d/dΔ at 0: −β[(1−ε)/2 + ε/2]/(1−2ε) = −β/(2(1−2ε)), steeper than the clean one.
    """
    gradients = []
    for loss in (sigmoid, robust):
        delta = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        [gradient] = torch.autograd.grad(loss(LogRatios(delta, torch.zeros(1).double()), 0.5, 0.1).sum(), delta)
        gradients.append(gradient.item())
    assert gradients == pytest.approx([-0.5 * 0.4, -0.5 / (2 * 0.8)], rel=1e-14)


@pytest.mark.parametrize("epsilon", [-0.1, 0.5, 0.7])
def test_robust_needs_more_right_labels_than_wrong_ones(epsilon: float) -> None:
    with pytest.raises(ValueError, match=r"label_smoothing must lie in \[0, 0.5\)"):
        robust(ratios(1.0), 0.1, epsilon)


@pytest.mark.parametrize("epsilon", [0.0, 1.0])
def test_exo_pair_takes_the_logarithm_of_its_smoothing(epsilon: float) -> None:
    with pytest.raises(ValueError, match=r"label_smoothing must lie in \(0, 1\)"):
        exo_pair(ratios(1.0), 0.1, epsilon)


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_ipo_optimum(beta: float) -> None:
    """A square is 0 where Δ* = 1/(2β), and nowhere else."""
    best = 1 / (2 * beta)
    left, there, right = ipo(ratios(best - 0.1, best, best + 0.1), beta).tolist()
    assert there == pytest.approx(0.0, abs=1e-25)
    assert (left, right) == pytest.approx((0.01, 0.01), rel=1e-9)


@pytest.mark.parametrize("epsilon", [0.01, 0.3])
def test_exo_pair_has_the_optimum_of_smoothed_sigmoid(epsilon: float) -> None:
    """A Kullback-Leibler divergence is 0 where p = q: σ(βΔ) = 1 − ε ⇔ Δ* = ln((1−ε)/ε)/β."""
    best = math.log((1 - epsilon) / epsilon) / 0.5
    left, there, right = exo_pair(ratios(best - 0.1, best, best + 0.1), 0.5, epsilon).tolist()
    assert there == pytest.approx(0.0, abs=1e-15)
    assert min(left, right) > 1e-6


def test_sppo_with_certain_probabilities_is_the_hard_one() -> None:
    """P = 1, 0: targets (1 − ½)/β = 1/(2β) and −1/(2β). P = ½ for both asks for no change at all."""
    r = ratios(-2.0, 0.5, 3.0)
    certain = sppo(r, 0.2, torch.ones(3).double(), torch.zeros(3).double())
    assert torch.equal(certain, sppo_hard(r, 0.2))
    undecided = torch.full((1,), 0.5, dtype=torch.float64)
    assert sppo(one(0.0, 0.0), 0.2, undecided, undecided).item() == 0.0


def test_mean_reward_by_hand() -> None:
    """β = ½, r_w = 2, 4 and r_l = −2, 0: rewards 1, 2, −1, 0, mean ½."""
    r = LogRatios(torch.tensor([2.0, 4.0], requires_grad=True), torch.tensor([-2.0, 0.0]))
    found = mean_reward(r, 0.5)
    assert found.item() == 0.5
    assert not found.requires_grad


# --- aot ---


def test_aot_reference_by_hand() -> None:
    """Policy margins 5, −1, 2 rank 3rd, 1st, 2nd; the reference's sorted are −4, 0, 7: so 7, −4, 0. The reference's
    own order does not matter.
    """
    margins_pi = torch.tensor([5.0, -1.0, 2.0])
    for margins_ref in ([0.0, 7.0, -4.0], [7.0, -4.0, 0.0]):
        assert aot_reference(margins_pi, torch.tensor(margins_ref)).tolist() == [7.0, -4.0, 0.0]


def test_aot_reference_of_equal_margins() -> None:
    """The earlier of two equal pairs ranks lower."""
    assert aot_reference(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([3.0, 2.0, 1.0])).tolist() == [2.0, 3.0, 1.0]


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_aot_from_pieces_has_value_and_gradient_of_the_sorted_formula(epsilon: float) -> None:
    """Mean over ranks k of sigmoid(sort(m_π)_k − sort(m_ref)_k), by autograd through `sort`; ours from pieces of 3 and
    5 pairs, as in two forward passes, the reference margins found beforehand.
    """
    generator = torch.Generator().manual_seed(3)
    margins_pi = torch.randn(8, generator=generator, dtype=torch.float64).mul(4).requires_grad_()
    margins_ref = torch.randn(8, generator=generator, dtype=torch.float64).mul(4)
    whole = sigmoid(LogRatios(margins_pi.sort().values, margins_ref.sort().values), 0.3, epsilon).mean()
    [expected] = torch.autograd.grad(whole, margins_pi)

    of_rank = aot_reference(margins_pi, margins_ref)
    assert not of_rank.requires_grad
    total = 0.0
    for piece in (slice(0, 3), slice(3, 8)):
        part = aot(margins_pi[piece], of_rank[piece], 0.3, epsilon).sum() / 8
        part.backward()  # type: ignore[no-untyped-call]
        total += part.item()
    assert total == pytest.approx(whole.item(), rel=1e-14)
    assert margins_pi.grad is not None
    assert torch.allclose(margins_pi.grad, expected, rtol=1e-13, atol=0)


def test_aot_is_not_the_loss_of_each_pair_against_its_own_reference() -> None:
    """Margins (1, 2) against (2, 1): by rank both differences are 0, by pair −1 and 1."""
    margins_pi, margins_ref = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])
    assert aot(margins_pi, aot_reference(margins_pi, margins_ref), 1.0).tolist() == pytest.approx([LN2, LN2])
    assert sigmoid(LogRatios(margins_pi, margins_ref), 1.0)[0].item() > 1.3
