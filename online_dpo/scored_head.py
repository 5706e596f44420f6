"""The output head and its log-softmax where completions are scored, the vocabulary's logits a chunk at a time.

For N scored positions and a vocabulary of V, the plain way holds N·V logits and as many gradients. Here at most
`CHUNK_BYTES` of logits exist at once. Going back needs the probabilities again: those that fit `KEPT_BYTES` are kept,
the others are computed a second time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from online_dpo.matmul import times, times_transposed
from online_dpo.vocabulary_gradients import memory_of

CHUNK_BYTES = 64 * 2**20
"""float32 logits that exist at once."""
KEPT_BYTES = 128 * 2**20
"""float32 probabilities that are kept for the way back."""


class Scores(NamedTuple):
    """Of N positions, each [N], float32: log p(target), and log Σ_v p_v² (Zhou 2024, WPO; without gradient)."""

    logps: Tensor
    collisions: Tensor


class _Scored(torch.autograd.Function):
    """log-softmax(c·tanh((h·Wᵀ + b)/c)) at the targets; without a cap c, log-softmax(h·Wᵀ + b).

    With z the logits, p their softmax and e the target's unit vector: ∂ log p_target / ∂z = e − p.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        cap: float | None,
        going_back: bool,
    ) -> tuple[Tensor, Tensor]:
        rows = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
        keeping = rows * (KEPT_BYTES // CHUNK_BYTES) if cap is None and going_back else 0
        logps = torch.empty(h.shape[0], dtype=torch.float32, device=h.device)
        collisions = torch.empty_like(logps)
        kept: list[Tensor] = []
        narrow = weight.to(h.dtype)
        for start in range(0, h.shape[0], rows):
            part = slice(start, start + rows)
            z = _logits(h[part], narrow, bias, cap)
            at_target = z.gather(-1, targets[part].unsqueeze(-1))
            p, top, total = _softmax_(z)
            logps[part] = (at_target - top - total.log()).squeeze(-1)
            collisions[part] = torch.linalg.vector_norm(p, dim=-1).square().log()
            if start < keeping:
                kept.append(p)
            # Or this chunk would still be there beside the next.
            del z, p
        ctx.save_for_backward(h, weight, bias, targets, *kept)
        ctx.cap, ctx.rows, ctx.weight = cap, rows, weight
        ctx.mark_non_differentiable(collisions)
        return logps, collisions

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        h, weight, bias, targets, *kept = ctx.saved_tensors
        want_h, want_weight, want_bias = ctx.needs_input_grad[:3]
        narrow = weight.to(h.dtype)
        of_h = torch.empty_like(h) if want_h else None
        # Asked now, not on the way there: gradients may have been cleared in between.
        memory = memory_of(ctx.weight) if h.dtype == weight.dtype else None
        of_weight = memory
        of_bias = torch.zeros_like(bias) if want_bias else None
        for number, start in enumerate(range(0, h.shape[0], ctx.rows)):
            part = slice(start, start + ctx.rows)
            p = kept[number] if number < len(kept) else None
            of_u = _of_logits(h[part], narrow, bias, targets[part], ctx.cap, gradients[0][part], p)
            if of_bias is not None:
                of_bias += of_u.sum(0)
            of_u = of_u.to(h.dtype)
            if of_h is not None:
                of_h[part] = times(of_u, narrow)
            if want_weight:
                # Without memory laid out for it, the first chunk's product is it; the others are added in place.
                if of_weight is None:
                    of_weight = (of_u.t() @ h[part]).to(weight.dtype)
                elif of_weight.dtype == h.dtype:
                    of_weight.addmm_(of_u.t(), h[part])
                else:
                    of_weight += of_u.t() @ h[part]
            del p, of_u
        return of_h, None if memory is not None else of_weight, of_bias, None, None, None


def _logits(h: Tensor, weight: Tensor, bias: Tensor | None, cap: float | None) -> Tensor:
    """[rows, V], float32 whatever the product's precision."""
    u = times_transposed(h, weight).float()
    if bias is not None:
        u += bias
    return u if cap is None else u.div_(cap).tanh_().mul_(cap)


def _softmax_(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """softmax(z) in z's own memory; m = max z and Σ exp(z − m), [rows, 1].

    torch's logsumexp and softmax would each hold a second chunk.
    """
    top = z.amax(-1, keepdim=True)
    total = z.sub_(top).exp_().sum(-1, keepdim=True)
    return z.div_(total), top, total


def _of_logits(
    h: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, cap: float | None, g: Tensor, p: Tensor | None
) -> Tensor:
    """∂/∂u of Σ g·log p_target, [rows, V], where u are the logits before the cap: g·(e − p)·(1 − (z/c)²).

    Writes into `p` where it was kept.
    """
    slope = None
    if p is None:
        z = _logits(h, weight, bias, cap)
        slope = None if cap is None else (z / cap).square_().neg_().add_(1)
        p = _softmax_(z)[0]
    of_u = p.mul_(-g.unsqueeze(-1))
    of_u.scatter_add_(-1, targets.unsqueeze(-1), g.unsqueeze(-1))
    return of_u if slope is None else of_u.mul_(slope)


def scored(h: Tensor, head: nn.Linear, targets: Tensor, cap: float | None = None) -> Scores:
    """`Scores` of `targets` [N] by the hidden states `h` [N, H] before `head`, whose logits are capped at `cap`."""
    if torch.is_autocast_enabled(h.device.type):
        # The way back runs outside of autocast: what the products are made of is settled here for both ways.
        h = h.to(torch.get_autocast_dtype(h.device.type))
    # Inside the function gradients are always off, and its inputs ask for them even where nobody will.
    going_back = torch.is_grad_enabled()
    return Scores(*_Scored.apply(h, head.weight, head.bias, targets, cap, going_back))  # type: ignore[no-untyped-call]
