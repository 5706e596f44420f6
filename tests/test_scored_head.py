"""The scored head: log-softmax of the whole vocabulary, its gradients, and the memory that it takes."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from online_dpo import scored_head
from online_dpo.scored_head import scored

V, H, ROWS = 37, 8, 3
KEPT_CHUNKS = {"all kept": 100, "none kept": 0, "some kept": 2}
"""Chunks of `ROWS` rows whose probabilities are kept."""


@pytest.fixture(params=KEPT_CHUNKS)
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> str:
    """Logits of three rows at once; all, none or two of the chunks are kept."""
    kept: str = request.param
    monkeypatch.setattr(scored_head, "CHUNK_BYTES", ROWS * 4 * V)
    monkeypatch.setattr(scored_head, "KEPT_BYTES", KEPT_CHUNKS[kept] * ROWS * 4 * V)
    return kept


def made(rows: int, *, bias: bool, seed: int = 0) -> tuple[Tensor, nn.Linear, Tensor, Tensor]:
    """Hidden states, a head whose logits are about ±3, targets, and the gradient that comes in."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(rows, H, generator=generator).requires_grad_()
    head = nn.Linear(H, V, bias=bias)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    targets = torch.randint(0, V, (rows,), generator=generator)
    return h, head, targets, torch.randn(rows, generator=generator)


def truth(h: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, cap: float | None) -> tuple[Tensor, Tensor]:
    """log p(target) and log Σ p², all logits at once, by torch's own log_softmax in the inputs' precision."""
    z = h @ weight.t() + (0 if bias is None else bias)
    logs = (z if cap is None else cap * torch.tanh(z / cap)).log_softmax(-1)
    return logs.gather(-1, targets.unsqueeze(-1)).squeeze(-1), logs.exp().square().sum(-1).log()


def doubled(h: Tensor, head: nn.Linear) -> list[Tensor | None]:
    parts = (h, head.weight, head.bias)
    return [None if part is None else part.detach().double().requires_grad_() for part in parts]


# --- values and gradients ---


@pytest.mark.parametrize("rows", [1, 3, 4, 6, 11])
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("bias", [False, True])
def test_equal_to_the_whole_log_softmax_in_float64(chunks: str, rows: int, cap: float | None, bias: bool) -> None:
    """Values and collisions to 1e-5, and all gradients, from one row to four chunks.

    Log-probs are float32 inside, too coarse for finite differences; the truth's own gradients are held against these
    below.
    """
    h, head, targets, g = made(rows, bias=bias)
    found = scored(h, head, targets, cap)
    assert found.logps.dtype == found.collisions.dtype == torch.float32
    assert not found.collisions.requires_grad
    exact_h, exact_w, exact_b = doubled(h, head)
    assert exact_h is not None
    assert exact_w is not None
    logps, collisions = truth(exact_h, exact_w, exact_b, targets, cap)
    torch.testing.assert_close(found.logps.double(), logps, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.collisions.double(), collisions, atol=1e-5, rtol=0)
    found.logps.backward(g)  # type: ignore[no-untyped-call]
    logps.backward(g.double())  # type: ignore[no-untyped-call]
    pairs = [(h.grad, exact_h.grad), (head.weight.grad, exact_w.grad)]
    if bias:
        assert exact_b is not None
        pairs.append((head.bias.grad, exact_b.grad))
    for mine, exact in pairs:
        assert mine is not None
        assert exact is not None
        assert exact.abs().max() > 1e-3
        torch.testing.assert_close(mine.double(), exact, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("cap", [None, 2.0])
def test_the_truth_itself_by_finite_differences(cap: float | None) -> None:
    """torch's gradcheck in float64, of the plain formula that `scored` is compared with."""
    h, head, targets, _ = made(4, bias=True)

    def logps(*parts: Tensor) -> Tensor:
        return truth(parts[0], parts[1], parts[2], targets, cap)[0]

    assert torch.autograd.gradcheck(logps, [part for part in doubled(h, head) if part is not None])


@pytest.mark.parametrize("cap", [None, 2.0])
def test_gradient_by_finite_differences(chunks: str, cap: float | None) -> None:
    """Along random directions, (f(x + εd) − f(x − εd))/2ε of `scored` itself: to 1 %, what float32 at ε = 0.01
    allows."""
    h, head, targets, g = made(7, bias=True)
    (scored(h, head, targets, cap).logps * g).sum().backward()  # type: ignore[no-untyped-call]
    for part in (h, head.weight, head.bias):
        generator = torch.Generator().manual_seed(3)
        direction = torch.randn(part.shape, generator=generator)
        assert part.grad is not None
        slope = (part.grad * direction).sum().item()
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                part.add_(sign * 0.01 * direction)
                values.append((scored(h, head, targets, cap).logps.double() * g).sum().item())
                part.sub_(sign * 0.01 * direction)
        assert (values[0] - values[1]) / 0.02 == pytest.approx(slope, rel=0.01, abs=0.02)


@pytest.mark.parametrize("frozen", ["h", "weight", "bias", "weight and bias"])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_what_is_frozen_gets_no_gradient(chunks: str, frozen: str, cap: float | None) -> None:
    """And what is not gets the same as when all are trained."""
    h, head, targets, g = made(11, bias=True)
    scored(h, head, targets, cap).logps.backward(g)  # type: ignore[no-untyped-call]
    parts = {"h": h, "weight": head.weight, "bias": head.bias}
    expected = {name: part.grad for name, part in parts.items()}
    for name, part in parts.items():
        part.grad = None
        part.requires_grad_(name not in frozen.split(" and "))
    scored(h, head, targets, cap).logps.backward(g)  # type: ignore[no-untyped-call]
    for name, part in parts.items():
        if part.requires_grad:
            torch.testing.assert_close(part.grad, expected[name], atol=0, rtol=0)
        else:
            assert part.grad is None


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 9), size=st.floats(0, 1e4), cap=st.sampled_from([None, 0.5, 30.0]), seed=st.integers(0, 99))
def test_any_size_of_logits(
    monkeypatch: pytest.MonkeyPatch, rows: int, size: float, cap: float | None, seed: int
) -> None:
    """Logits up to 1e5: finite, log p ≤ 0, and within float32's rounding of the logits' own sums."""
    monkeypatch.setattr(scored_head, "CHUNK_BYTES", 2 * 4 * V)
    monkeypatch.setattr(scored_head, "KEPT_BYTES", 2 * 2 * 4 * V)
    h, head, targets, g = made(rows, bias=False, seed=seed)
    with torch.no_grad():
        h.mul_(size)
    found = scored(h, head, targets, cap)
    found.logps.backward(g)  # type: ignore[no-untyped-call]
    exact_h, exact_w, _ = doubled(h, head)
    assert exact_h is not None
    assert exact_w is not None
    logps, collisions = truth(exact_h, exact_w, None, targets, cap)
    # A sum of 8 products is rounded by as many times 2⁻²⁴ of what it would be without signs; a cap is no steeper.
    largest = (exact_h.abs() @ exact_w.abs().t()).max().item()
    torch.testing.assert_close(found.logps.double(), logps, atol=1e-5 + 2e-6 * largest, rtol=0)
    torch.testing.assert_close(found.collisions.double(), collisions, atol=1e-5 + 4e-6 * largest, rtol=0)
    assert float(found.logps.detach().max()) <= 0
    assert h.grad is not None
    assert bool(h.grad.isfinite().all())


# --- by hand ---


def test_two_tokens_by_hand(chunks: str) -> None:
    """Logits 0 and ln 3: p = ¼ and ¾. log p = ln ¼, ln ¾; Σ p² = 1/16 + 9/16 = 5/8. ∂ log p_0/∂z = (1 − ¼, −¾); with
    the head (0, ln 3)ᵀ on h = 1, ∂/∂h = −¾·ln 3."""
    head = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[0.0], [math.log(3)]]))
    h = torch.ones(2, 1, requires_grad=True)
    found = scored(h, head, torch.tensor([0, 1]))
    assert found.logps.tolist() == pytest.approx([math.log(0.25), math.log(0.75)], abs=1e-6)
    assert found.collisions.tolist() == pytest.approx([math.log(5 / 8)] * 2, abs=1e-6)
    found.logps[0].backward()  # type: ignore[no-untyped-call]
    assert head.weight.grad is not None
    assert head.weight.grad.flatten().tolist() == pytest.approx([0.75, -0.75], abs=1e-6)
    assert h.grad is not None
    assert h.grad.flatten().tolist() == pytest.approx([-0.75 * math.log(3), 0.0], abs=1e-6)


def test_collisions_between_one_token_and_all() -> None:
    """All logits equal: Σ p² = 1/V. One logit far above: 1, and its logarithm 0."""
    head = nn.Linear(1, V, bias=True)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    h = torch.ones(1, 1)
    assert scored(h, head, torch.tensor([0])).collisions.item() == pytest.approx(-math.log(V), abs=1e-6)
    with torch.no_grad():
        head.bias[5] = 200.0
    assert scored(h, head, torch.tensor([0])).collisions.item() == pytest.approx(0.0, abs=1e-6)


def test_going_back_twice_is_refused_rather_than_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept probabilities become the gradient in their own memory."""
    monkeypatch.setattr(scored_head, "KEPT_BYTES", 2 * scored_head.CHUNK_BYTES)
    h, head, targets, g = made(4, bias=False)
    logps = scored(h, head, targets).logps
    logps.backward(g, retain_graph=True)  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match="inplace"):
        logps.backward(g)  # type: ignore[no-untyped-call]


# --- bfloat16 ---


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_bfloat16_states_float32_log_softmax(chunks: str, weights: torch.dtype) -> None:
    """A logit's product is bfloat16's (8 bits: 2⁻⁸ of it at most, for the target's and, in the mean, the others'), the
    log-softmax over it float32's: the V log-probs of one position make 1 to 1e-5, where bfloat16's would miss by 1e-2.
    """
    h, head, _, _ = made(1, bias=False)
    head = head.to(weights)
    states = h.detach().bfloat16().expand(V, H)
    found = scored(states, head, torch.arange(V))
    assert found.logps.dtype == torch.float32
    assert found.logps.exp().sum().item() == pytest.approx(1.0, abs=1e-5)
    w = head.weight.detach().bfloat16().double()
    exact, _ = truth(states.double(), w, None, torch.arange(V), None)
    largest = float((states[0].double() @ w.t()).abs().max())
    assert (found.logps.double() - exact).abs().max().item() <= 2 * 2**-8 * largest


def test_bfloat16_gradients_are_the_weights_own_kind(chunks: str) -> None:
    """A float32 weight's gradient is float32; chunks are added in float32. 2 % of the norm is bfloat16's rounding."""
    h, head, targets, g = made(11, bias=True)
    states = h.detach().bfloat16().requires_grad_()
    scored(states, head, targets).logps.backward(g)  # type: ignore[no-untyped-call]
    assert states.grad is not None
    assert head.weight.grad is not None
    assert states.grad.dtype == torch.bfloat16
    assert head.weight.grad.dtype == head.bias.grad.dtype == torch.float32  # type: ignore[union-attr]
    exact_h, exact_w, exact_b = doubled(states, head)
    truth(exact_h, exact_w, exact_b, targets, None)[0].backward(g.double())  # type: ignore[arg-type,no-untyped-call]
    for mine, exact in ((states, exact_h), (head.weight, exact_w), (head.bias, exact_b)):
        assert mine.grad is not None
        assert exact is not None
        assert exact.grad is not None
        assert (mine.grad.double() - exact.grad).norm() <= 0.02 * exact.grad.norm()


@pytest.mark.parametrize("cap", [None, 2.0])
def test_autocast_is_that_of_the_plain_head(chunks: str, cap: float | None) -> None:
    """float32 states and weights under bfloat16 autocast: the product is bfloat16's in both, on the way back too."""
    h, head, targets, g = made(11, bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        found = scored(h, head, targets, cap).logps
        z = head(h)
    assert z.dtype == torch.bfloat16
    z = z.float()
    plain = (z if cap is None else cap * torch.tanh(z / cap)).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=0)
    assert (found - scored(h, head, targets, cap).logps).abs().max() > 1e-4
    mine = torch.autograd.grad(found, (h, head.weight), g)
    expected = torch.autograd.grad(plain, (h, head.weight), g)
    for a, b in zip(mine, expected, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() <= 0.01 * b.norm()


# --- memory ---


def peak_bytes(work: Callable[[], object]) -> int:
    """The most memory that torch held at once beyond what it held before, from every allocation that it made."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept: Any = work()
    del kept
    events = profile.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def test_the_meter_sees_what_is_held() -> None:
    """8 MiB and then 4 MiB beside it, freed and taken again: 12."""

    def work() -> None:
        a = torch.ones(2 * 2**20)
        for _ in range(3):
            b = torch.ones(2**20)
            del b
        del a

    assert peak_bytes(work) == pytest.approx(12 * 2**20, abs=2**12)


N, NARROW = 512, 8


def head_of(vocabulary: int) -> tuple[Tensor, nn.Linear, Tensor]:
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(NARROW, vocabulary, bias=False)
    h = torch.randn(N, NARROW, generator=generator).requires_grad_()
    return h, head, torch.randint(0, vocabulary, (N,), generator=generator)


@pytest.mark.parametrize(("vocabulary", "cap"), [(50_000, None), (150_000, None), (150_000, 30.0)])
def test_a_step_holds_one_chunk_beside_what_it_keeps(one_thread: None, vocabulary: int, cap: float | None) -> None:
    """512 positions have 98 and 293 MiB of logits, and as much of gradients. Here: CHUNK + KEPT, whatever V, and the
    gradient of the weight. A capped head keeps nothing, and holds the cap's slope beside its chunk."""
    h, head, targets = head_of(vocabulary)
    weight = 4 * vocabulary * NARROW

    def step() -> None:
        scored(h, head, targets, cap).logps.sum().backward()  # type: ignore[no-untyped-call]

    chunk, kept = scored_head.CHUNK_BYTES, scored_head.KEPT_BYTES
    allowed = chunk + kept if cap is None else 2 * chunk
    found = peak_bytes(step)
    assert found <= allowed + 2 * weight + 2**20
    assert found >= min(allowed, 4 * vocabulary * N) - chunk


def test_scoring_alone_keeps_nothing(one_thread: None) -> None:
    """Without gradients to come there is one chunk at a time, though the head's weights could have gradients."""
    h, head, targets = head_of(150_000)
    assert head.weight.requires_grad
    with torch.no_grad():
        assert peak_bytes(lambda: scored(h, head, targets)) <= scored_head.CHUNK_BYTES + 2**20
