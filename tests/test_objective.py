"""The objective: from ragged per-token log-probs to one value a pair, the loss composed with its modifiers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from online_dpo import losses
from online_dpo.config import DPOSpec
from online_dpo.dpo_spec import PAIR_LOSSES
from online_dpo.errors import ConfigError, TrainingError
from online_dpo.losses import LN2, LogRatios, aot_reference
from online_dpo.objective import BUILT_IN, Objective, PairBatch, TokenLogps

LENGTHS_W, LENGTHS_L = (3, 1, 4), (2, 5, 4)
NEEDED: dict[str, dict[str, Any]] = {"ipo": {"length_normalize": False}, "exo_pair": {"label_smoothing": 0.01}}
ALL_MODIFIERS = {
    "nll_weight": 0.5,
    "dpop_lambda": 2.0,
    "length_penalty": 0.05,
    "ld_alpha": 0.3,
    "wpo_weight": True,
    "importance_clip": 1.5,
    "xpo_alpha": 0.1,
}


def spec(loss: Any, **settings: Any) -> DPOSpec:
    return DPOSpec(loss=loss, **{**NEEDED.get(str(loss), {}), "beta": 0.4, **settings})


def logps(lengths: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> TokenLogps:
    """Per-token log-probs between −3 and 0."""
    generator = torch.Generator().manual_seed(seed)
    values = -3 * torch.rand(sum(lengths), generator=generator, dtype=torch.float64)
    return TokenLogps(values.to(dtype), torch.tensor(lengths))


def full_batch(dtype: torch.dtype = torch.float64) -> PairBatch:
    """Three pairs of unequal lengths with all that any objective may need; the policy's log-probs are leaves."""
    pi_w, pi_l = logps(LENGTHS_W, 1, dtype), logps(LENGTHS_L, 2, dtype)
    return PairBatch(
        pi_w=TokenLogps(pi_w.values.requires_grad_(), pi_w.lengths),
        pi_l=TokenLogps(pi_l.values.requires_grad_(), pi_l.lengths),
        ref_w=logps(LENGTHS_W, 3, dtype),
        ref_l=logps(LENGTHS_L, 4, dtype),
        mu_w=logps(LENGTHS_W, 5, dtype),
        mu_l=logps(LENGTHS_L, 6, dtype),
        collision_w=logps(LENGTHS_W, 7, dtype),
        collision_l=logps(LENGTHS_L, 8, dtype),
        p_w=torch.tensor([0.9, 0.6, 1.0], dtype=dtype),
        p_l=torch.tensor([0.1, 0.5, 0.0], dtype=dtype),
        aot_margin_ref=torch.tensor([0.5, -1.0, 2.0], dtype=dtype),
        from_ref_w=torch.tensor([True, False, False]),
        from_ref_l=torch.tensor([True, True, False]),
    )


def present(part: Tensor | None) -> Tensor:
    assert part is not None
    return part


def changed(batch: PairBatch, name: str, part: Any) -> PairBatch:
    """`batch` with another `name`, which is known only as the test runs."""
    change: dict[str, Any] = {name: part}
    return replace(batch, **change)


def sums(part: TokenLogps | None) -> list[float]:
    """Summed in plain Python."""
    assert part is not None
    return [float(piece.sum()) for piece in torch.split(part.values.detach(), part.lengths.tolist())]


def ratio_sums(batch: PairBatch) -> tuple[list[float], list[float]]:
    """r_w and r_l of each pair, in plain Python."""
    return (
        [pi - ref for pi, ref in zip(sums(batch.pi_w), sums(batch.ref_w), strict=True)],
        [pi - ref for pi, ref in zip(sums(batch.pi_l), sums(batch.ref_l), strict=True)],
    )


def neg_log_sigmoid(z: float) -> float:
    return math.log1p(math.exp(-z))


# --- the ragged batch ---


def test_sums_by_hand() -> None:
    """Completions (1, 2), (4), (8, 16): 3, 4, 24; weighed by ½ past the first token: 2, 4, 16."""
    part = TokenLogps(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]), torch.tensor([2, 1, 2]))
    assert part.sums().tolist() == [3.0, 4.0, 24.0]
    assert part.sums(torch.tensor([1.0, 0.5, 1.0, 1.0, 0.5])).tolist() == [2.0, 4.0, 16.0]


@pytest.mark.parametrize(
    ("values", "lengths"),
    [((3,), [2, 2]), ((3,), [3, 0]), ((3,), [4, -1]), ((3, 1), [3]), ((3,), [[3]])],
)
def test_lengths_that_are_not_those_of_the_tokens(values: tuple[int, ...], lengths: list[Any]) -> None:
    with pytest.raises(ValueError, match="lengths"):
        TokenLogps(torch.zeros(values), torch.tensor(lengths))


@pytest.mark.parametrize("name", ["ref_w", "mu_w", "collision_w", "ref_l", "mu_l", "collision_l"])
def test_log_probs_of_other_tokens_are_refused(name: str) -> None:
    """A completion tokenised anew may have one token more: its log-probs are not those of the trained tokens."""
    with pytest.raises(ValueError, match="log-probs of other tokens: 9 in 3 completions, the policy's are"):
        changed(full_batch(), name, logps((2, 3, 4), 9))


def test_chosen_and_rejected_come_in_pairs() -> None:
    with pytest.raises(ValueError, match="2 chosen and 3 rejected completions"):
        PairBatch(pi_w=logps((1, 2), 1), pi_l=logps((1, 2, 3), 1))


# --- each loss through the objective ---


def test_every_name_has_a_loss() -> None:
    assert set(BUILT_IN) == set(PAIR_LOSSES)


def test_a_loss_of_chosen_answers_alone_is_no_objective_of_pairs() -> None:
    with pytest.raises(ValueError, match="loss 'sft' is of chosen answers alone"):
        Objective(DPOSpec(loss="sft"))


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_each_name_is_the_loss_of_its_name(name: str) -> None:
    """Log-ratios summed in plain Python, the loss function called by hand: a mixed-up mapping would show."""
    batch = full_batch()
    r_w, r_l = ratio_sums(batch)
    if name == "simpo":
        r_w, r_l = sums(batch.pi_w), sums(batch.pi_l)
    if name in ("sigmoid_norm", "simpo"):
        r_w = [r / n for r, n in zip(r_w, LENGTHS_W, strict=True)]
        r_l = [r / n for r, n in zip(r_l, LENGTHS_L, strict=True)]
    r = LogRatios(torch.tensor(r_w, dtype=torch.float64), torch.tensor(r_l, dtype=torch.float64))
    margins = torch.tensor(sums(batch.pi_w), dtype=torch.float64) - torch.tensor(sums(batch.pi_l), dtype=torch.float64)
    p_w, p_l, of_rank = (present(part) for part in (batch.p_w, batch.p_l, batch.aot_margin_ref))
    by_hand: dict[str, Callable[[], Tensor]] = {
        "sigmoid": lambda: losses.sigmoid(r, 0.4, 0.1),
        "sigmoid_norm": lambda: losses.sigmoid(r, 0.4, 0.1),
        "robust": lambda: losses.robust(r, 0.4, 0.1),
        "exo_pair": lambda: losses.exo_pair(r, 0.4, 0.1),
        "simpo": lambda: losses.simpo(r, 0.4, 0.7),
        "discopop": lambda: losses.discopop(r, 0.4, 0.3),
        "bco_pair": lambda: losses.bco_pair(r, 0.4, 0.25),
        "sppo": lambda: losses.sppo(r, 0.4, p_w, p_l),
        "aot": lambda: losses.aot(margins, of_rank, 0.4, 0.1),
    }
    settings: dict[str, Any] = {"length_normalize": False} if name == "ipo" else {}
    if name in ("sigmoid", "sigmoid_norm", "robust", "exo_pair", "aot"):
        settings["label_smoothing"] = 0.1
    other: dict[str, dict[str, Any]] = {
        "simpo": {"simpo_gamma": 0.7},
        "discopop": {"discopop_tau": 0.3},
        "bco_pair": {"bco_running_mean": True},
    }
    settings |= other.get(name, {})
    out = Objective(spec(name, **settings))(replace(batch, bco_delta=0.25))
    expected = by_hand[name]() if name in by_hand else getattr(losses, name)(r, 0.4)
    assert torch.allclose(out.losses, expected, rtol=1e-12, atol=0)


def test_bco_pair_reads_the_running_mean_only_where_it_is_asked_for() -> None:
    batch = full_batch()
    r = LogRatios(*(torch.tensor(sums, dtype=torch.float64) for sums in ratio_sums(batch)))
    for asked, delta in ((False, 0.0), (True, 0.25)):
        out = Objective(spec("bco_pair", bco_running_mean=asked))(replace(batch, bco_delta=0.25))
        assert torch.allclose(out.losses, losses.bco_pair(r, 0.4, delta), rtol=1e-12, atol=0)


def test_ipo_summed_and_averaged_are_two_losses() -> None:
    """β = 0.4: (Σ_w − Σ_l − 1.25)² and (Σ_w/|w| − Σ_l/|l| − 1.25)²."""
    batch = full_batch()
    r_w, r_l = ratio_sums(batch)
    for averaged in (False, True):
        expected = []
        for w, lo, n_w, n_l in zip(r_w, r_l, LENGTHS_W, LENGTHS_L, strict=True):
            delta = w / n_w - lo / n_l if averaged else w - lo
            expected.append((delta - 1.25) ** 2)
        out = Objective(spec("ipo", length_normalize=averaged))(batch)
        assert out.losses.tolist() == pytest.approx(expected, rel=1e-12)
        # What is reported is the sum, whatever the loss sees.
        assert out.ratios.r_w.tolist() == pytest.approx(r_w, rel=1e-12)


@pytest.mark.parametrize("name", PAIR_LOSSES)
@pytest.mark.parametrize("modified", [False, True])
def test_gradients_are_those_of_finite_differences(name: str, modified: bool) -> None:
    """With respect to every token's log-prob, float64, plain and with every modifier.

    What stands without gradient (weights of pairs) would be seen by finite differences: it is left out there and
    compared in the next test.
    """
    modifiers = {key: ALL_MODIFIERS[key] for key in ("nll_weight", "length_penalty", "ld_alpha", "xpo_alpha")}
    if name != "simpo":
        modifiers["dpop_lambda"] = ALL_MODIFIERS["dpop_lambda"]
    objective = Objective(spec(name, **(modifiers if modified else {})))
    batch = full_batch()

    def values(w: Tensor, rejected: Tensor) -> Tensor:
        parts = TokenLogps(w, batch.pi_w.lengths), TokenLogps(rejected, batch.pi_l.lengths)
        return objective(replace(batch, pi_w=parts[0], pi_l=parts[1])).losses

    assert torch.autograd.gradcheck(values, (batch.pi_w.values, batch.pi_l.values))


@pytest.mark.parametrize("key", ["wpo_weight", "importance_clip"])
def test_weights_of_pairs_scale_the_gradient_and_are_none_themselves(key: str) -> None:
    """∇(w·L) = w·∇L with w = (weighed loss)/(plain loss), pair by pair."""
    plain, weighed = Objective(spec("sigmoid")), Objective(spec("sigmoid", **{key: ALL_MODIFIERS[key]}))
    batch = full_batch()
    for pair in range(3):
        first, second = plain(batch).losses[pair], weighed(batch).losses[pair]
        weight = second.item() / first.item()
        assert weight != pytest.approx(1.0, rel=1e-3)
        [expected] = torch.autograd.grad(first, batch.pi_w.values)
        [found] = torch.autograd.grad(second, batch.pi_w.values)
        assert torch.allclose(found, weight * expected, rtol=1e-12)


# --- modifiers by hand ---


def test_every_modifier_by_hand() -> None:
    """All of them at once on one pair of 2 and 1 tokens, β = ½; the order is the one that `objective` states.

    Weights 1, α = ½ (shared length 1): r_w = (−3 + 2) + ½(−2 + 1) = −3/2, r_l = −1 + ½ = −½. Below the reference,
    λ = 2 makes r_w −9/2. Penalty α/β = 0.2 a token: r_w = −4.1, r_l = −0.3, Δ = −3.8, βΔ = −1.9, L = log(1 + e^1.9).
    WPO: means over tokens (−3 + 4 − 2 + 1)/2 = 0 and −1 + 2 = 1: weight e. Importance: π/μ = e^(−5+4.5)·e^(−1+1.2)
    = e^(−0.3), not clipped at 2. NLL: 5/2 at 0.4: 1. Exploration: both from the reference, (−5 − 1)/2 at 0.1: −0.3.
    """
    batch = PairBatch(
        pi_w=tokens(-3.0, -2.0),
        pi_l=tokens(-1.0),
        ref_w=tokens(-2.0, -1.0),
        ref_l=tokens(-0.5),
        mu_w=tokens(-2.0, -2.5),
        mu_l=tokens(-1.2),
        collision_w=tokens(-4.0, -1.0),
        collision_l=tokens(-2.0),
        from_ref_w=torch.tensor([True]),
        from_ref_l=torch.tensor([True]),
    )
    dpo = DPOSpec(
        beta=0.5,
        ld_alpha=0.5,
        dpop_lambda=2.0,
        length_penalty=0.1,
        wpo_weight=True,
        importance_clip=2.0,
        nll_weight=0.4,
        xpo_alpha=0.1,
    )
    out = Objective(dpo)(batch)
    expected = neg_log_sigmoid(-1.9) * math.e * math.exp(-0.3) + 1.0 - 0.3
    assert out.losses.item() == pytest.approx(expected, rel=1e-13)
    assert (out.shaped.r_w.item(), out.shaped.r_l.item()) == pytest.approx((-4.1, -0.3), rel=1e-13)
    # The plain sums: −5 + 3 and −1 + ½.
    assert (out.ratios.r_w.item(), out.ratios.r_l.item()) == (-2.0, -0.5)


def tokens(*values: float) -> TokenLogps:
    return TokenLogps(torch.tensor(values, dtype=torch.float64), torch.tensor([len(values)]))


def test_importance_is_clipped() -> None:
    """π/μ = e^3 and 1: 1.5 and 1 times the plain loss ln 2 (policy = reference)."""
    pi = TokenLogps(torch.tensor([-1.0, -2.0]), torch.tensor([1, 1]))
    mu = TokenLogps(torch.tensor([-4.0, -2.0]), torch.tensor([1, 1]))
    batch = PairBatch(pi_w=pi, pi_l=pi, ref_w=pi, ref_l=pi, mu_w=mu, mu_l=pi)
    out = Objective(DPOSpec(importance_clip=1.5))(batch)
    assert out.losses.tolist() == pytest.approx([1.5 * LN2, LN2], rel=1e-6)


def test_ld_alpha_one_changes_nothing_and_zero_leaves_the_shared_length() -> None:
    """α = 0: tokens past min(|w|, |l|) have no gradient, in the policy's sums as in the reference's."""
    batch = full_batch()
    plain = Objective(spec("sigmoid"))(batch).losses
    assert torch.allclose(Objective(spec("sigmoid", ld_alpha=1.0))(batch).losses, plain, rtol=1e-14)
    out = Objective(spec("sigmoid", ld_alpha=0.0))(batch)
    [gradient] = torch.autograd.grad(out.losses.sum(), batch.pi_l.values)
    # Rejected lengths 2, 5, 4 beside chosen 3, 1, 4.
    assert (gradient != 0).tolist() == [True, True, True, False, False, False, False, True, True, True, True]
    assert batch.ref_l is not None and batch.ref_w is not None
    by_hand = [sum((batch.pi_l.values - batch.ref_l.values)[index].tolist()) for index in ([0, 1], [2], [7, 8, 9, 10])]
    assert out.shaped.r_l.tolist() == pytest.approx(by_hand, rel=1e-12)


def test_a_term_beside_the_loss_is_not_weighed() -> None:
    """The anchor to the chosen answer stays whole however unlikely the pair: nll(weighed) − weighed = nll."""
    batch = full_batch()
    with_nll = Objective(spec("sigmoid", wpo_weight=True, nll_weight=0.5))(batch).losses
    without = Objective(spec("sigmoid", wpo_weight=True))(batch).losses
    expected = [0.5 * -total / n for total, n in zip(sums(batch.pi_w), LENGTHS_W, strict=True)]
    assert (with_nll - without).tolist() == pytest.approx(expected, rel=1e-11)


# --- what an objective needs ---

NEEDS = {
    "needs_reference": ("ref_w", "ref_l"),
    "needs_behaviour": ("mu_w", "mu_l"),
    "needs_collision": ("collision_w", "collision_l"),
    "needs_ranking": ("aot_margin_ref",),
    "needs_scores": ("p_w", "p_l"),
    "needs_origin": ("from_ref_w", "from_ref_l"),
}


@pytest.mark.parametrize("name", PAIR_LOSSES)
@pytest.mark.parametrize("modifier", [None, *ALL_MODIFIERS])
def test_an_objective_needs_what_it_says_and_nothing_more(name: str, modifier: str | None) -> None:
    """With every part that it does not name left out it works; without one that it names it says which."""
    if (name, modifier) == ("simpo", "dpop_lambda"):
        return
    objective = Objective(spec(name, **({modifier: ALL_MODIFIERS[modifier]} if modifier else {})))
    batch = full_batch()
    unneeded: dict[str, Any] = {
        part: None for need, parts in NEEDS.items() if not getattr(objective, need) for part in parts
    }
    least = replace(batch, **unneeded)
    assert torch.equal(objective(least).losses, objective(batch).losses)
    for part in (part.name for part in fields(batch) if part.name not in ("pi_w", "pi_l", "bco_delta")):
        if part not in unneeded:
            with pytest.raises(ValueError, match=f"the batch lacks '{part}'"):
                objective(changed(batch, part, None))


def test_needs_by_hand() -> None:
    plain = Objective(DPOSpec())
    assert [getattr(plain, need) for need in NEEDS] == [True, False, False, False, False, False]
    assert plain.digest is None
    assert not Objective(DPOSpec(loss="simpo")).needs_reference
    assert Objective(DPOSpec(loss="aot")).needs_ranking
    assert Objective(DPOSpec(loss="sppo")).needs_scores


def test_without_a_reference_zeros_are_reported() -> None:
    """r is then log π itself, summed."""
    batch = full_batch()
    out = Objective(spec("simpo"))(replace(batch, ref_w=None, ref_l=None))
    assert out.ratios.r_w.tolist() == pytest.approx(sums(batch.pi_w), rel=1e-12)


@pytest.mark.parametrize("scores", [[1.5, 0.5, 0.5], [0.5, -0.1, 0.5], [math.nan, 0.5, 0.5]])
def test_sppo_needs_probabilities(scores: list[float]) -> None:
    """A judge's points on a scale of 1 to 10 would be taken for probabilities silently."""
    batch = replace(full_batch(), p_w=torch.tensor(scores))
    with pytest.raises(TrainingError, match=r"probabilities in \[0, 1\], found .* comparing.rank_by mean_win"):
        Objective(spec("sppo"))(batch)


# --- figures beside the loss ---


def test_figures_carry_no_gradient() -> None:
    out = Objective(spec("sigmoid"))(full_batch())
    assert out.losses.requires_grad
    assert not any(part.requires_grad for part in (*out.ratios, *out.shaped))


def test_the_reference_gets_no_gradient() -> None:
    batch = full_batch()
    assert batch.ref_w is not None
    ref_w = TokenLogps(batch.ref_w.values.requires_grad_(), batch.ref_w.lengths)
    objective = Objective(spec("sigmoid", dpop_lambda=1.0))
    [gradient] = torch.autograd.grad(
        objective(replace(batch, ref_w=ref_w)).losses.sum() + 0 * ref_w.values.sum(), ref_w.values
    )
    assert not gradient.any()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, LN2),
        ({"label_smoothing": 0.3}, LN2),
        ({"loss": "hinge"}, 1.0),
        ({"loss": "ipo", "length_normalize": True, "beta": 0.5}, 1.0),
        ({"loss": "aot"}, LN2),
        ({"dpop_lambda": 5.0, "ld_alpha": 0.1}, LN2),
    ],
)
def test_the_loss_at_the_reference(settings: dict[str, Any], expected: float) -> None:
    """What the first step of a fresh round must show, whatever reference the batch holds."""
    found = Objective(DPOSpec(**settings)).at_reference(full_batch())
    assert found.tolist() == pytest.approx([expected] * 3, rel=1e-12)
    assert not found.requires_grad


def test_the_loss_at_the_reference_with_modifiers_is_that_of_the_first_step() -> None:
    """Lengths and log-probs enter it: no constant would do. Equal to the losses where reference = policy."""
    objective = Objective(spec("nca_pair", **ALL_MODIFIERS))
    batch = full_batch()
    same = replace(batch, ref_w=batch.pi_w, ref_l=batch.pi_l)
    assert torch.equal(objective.at_reference(batch), objective(same).losses.detach())
    assert not torch.equal(objective.at_reference(batch), objective(batch).losses.detach())


def test_mean_reward_is_of_what_the_loss_saw() -> None:
    """β = 0.4: half the mean over pairs of r_w/|w| + r_l/|l|, times β."""
    objective = Objective(spec("bco_pair", length_normalize=True, bco_running_mean=True))
    batch = full_batch()
    r_w, r_l = ratio_sums(batch)
    expected = 0.4 * sum(w / n + lo / m for w, lo, n, m in zip(r_w, r_l, LENGTHS_W, LENGTHS_L, strict=True)) / 6
    assert objective.mean_reward(objective(batch)).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_the_dtype_is_the_policys(name: str, dtype: torch.dtype) -> None:
    modifiers = {key: value for key, value in ALL_MODIFIERS.items() if (name, key) != ("simpo", "dpop_lambda")}
    assert Objective(spec(name, **modifiers))(full_batch(dtype)).losses.dtype == dtype


# --- aot over an optimiser batch ---


@pytest.mark.parametrize("settings", [{}, {"length_normalize": True}, {"ld_alpha": 0.5}, {"label_smoothing": 0.1}])
def test_aot_over_two_forward_passes_is_aot_over_one(settings: dict[str, Any]) -> None:
    """Margins gathered from both pieces, ranked once, cut again: the same losses and gradients as in one piece, and
    as the sorted formula says.
    """
    objective = Objective(spec("aot", **settings))
    whole = replace(full_batch(), aot_margin_ref=None)
    margins_pi, margins_ref = objective.margins(whole)
    whole = replace(whole, aot_margin_ref=aot_reference(margins_pi, margins_ref))
    expected = objective(whole).losses
    by_rank = losses.sigmoid(
        LogRatios(margins_pi.sort().values, margins_ref.sort().values), 0.4, settings.get("label_smoothing", 0.0)
    )
    assert expected.sum().item() == pytest.approx(by_rank.sum().item(), rel=1e-12)
    [gradient] = torch.autograd.grad(expected.sum(), whole.pi_w.values)

    pieces = [cut(whole, slice(0, 1)), cut(whole, slice(1, 3))]
    margins = [objective.margins(piece) for piece in pieces]
    of_rank = aot_reference(torch.cat([m[0] for m in margins]), torch.cat([m[1] for m in margins]))
    found = [
        objective(replace(piece, aot_margin_ref=of_rank[place])).losses
        for piece, place in zip(pieces, (slice(0, 1), slice(1, 3)), strict=True)
    ]
    assert torch.allclose(torch.cat(found), expected, rtol=1e-13)
    [again] = torch.autograd.grad(torch.cat(found).sum(), whole.pi_w.values)
    assert torch.allclose(again, gradient, rtol=1e-12)


def test_aot_with_a_length_penalty_moves_each_pairs_difference() -> None:
    """βΔ of each pair grows by α(|w| − |l|) = 0.05·(1, −4, 0), as it does for `sigmoid`."""
    batch = full_batch()
    plain, shifted = (Objective(spec("aot", length_penalty=alpha))(batch).losses.tolist() for alpha in (0.0, 0.05))
    z = [-math.log(math.expm1(loss)) for loss in plain]
    expected = [neg_log_sigmoid(value + 0.05 * n) for value, n in zip(z, (1, -4, 0), strict=True)]
    assert shifted == pytest.approx(expected, rel=1e-10)


def cut(batch: PairBatch, pairs: slice) -> PairBatch:
    """Pairs `pairs` of `batch`, log-probs alone."""

    def part(logps: TokenLogps | None) -> TokenLogps:
        assert logps is not None
        rows = torch.split(logps.values, logps.lengths.tolist())[pairs]
        return TokenLogps(torch.cat(rows), logps.lengths[pairs])

    return PairBatch(pi_w=part(batch.pi_w), pi_l=part(batch.pi_l), ref_w=part(batch.ref_w), ref_l=part(batch.ref_l))


# --- a loss of one's own ---


def test_a_loss_of_ones_own_composes_with_modifiers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It sees the modified log-ratios: written as plain DPO it gives plain DPO's figures with every modifier."""
    import sys

    monkeypatch.setattr("sys.path", list(sys.path))
    (tmp_path / "objective_loss.py").write_text(
        "import torch.nn.functional as F\n\n\ndef mine(ratios, beta, scale=1.0):\n"
        "    return -scale * F.logsigmoid(beta * ratios.delta)\n",
        encoding="utf-8",
    )
    own = Objective(spec({"use": "objective_loss:mine", "scale": 1.0}, **ALL_MODIFIERS), [tmp_path])
    assert torch.allclose(own(full_batch()).losses, Objective(spec("sigmoid", **ALL_MODIFIERS))(full_batch()).losses)
    assert own.digest is not None and own.needs_reference
    assert own.describe().startswith("objective_loss:mine (scale 1.0), beta 0.4, summed log-probs, nll_weight 0.5")
    with pytest.raises(ConfigError, match=r"unknown key 'scal' \(did you mean 'scale'\?\)"):
        Objective(spec({"use": "objective_loss:mine", "scal": 1.0}), [tmp_path])
