"""Matrix products by the faster of the CPU's two libraries.

torch's float32 products on x86 go to MKL; oneDNN, which torch carries too, is faster at the shapes of a transformer's
layers for a·bᵀ and for a·b, and slower for aᵀ·b (`tests/benchmarks/matmul.py`). Elsewhere than in float32 on a CPU
these are torch's own.
"""

from __future__ import annotations

import types
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGE = 256 * 256
"""Weights smaller than this are left to torch: the call's own cost is what counts there."""


@cache
def has_onednn() -> bool:
    """Whether this build of torch can hand a float32 product to oneDNN."""
    there: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return there and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def times_transposed(a: Tensor, b: Tensor) -> Tensor:
    """a·bᵀ for a: [..., k] and b: [n, k]."""
    if _for_onednn(a, b):
        return _onednn(a, b)
    return a @ b.t()


def times(a: Tensor, b: Tensor) -> Tensor:
    """a·b for a: [..., n] and b: [n, k]."""
    if _for_onednn(a, b):
        return _onednn(a, b.t())
    return a @ b


class _Linear(torch.autograd.Function):
    """y = x·Wᵀ; ∂x = g·W; ∂W = gᵀ·x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        # A frozen layer need not hold what came in.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return times_transposed(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        [g] = gradients
        of_x = times(g, weight) if ctx.needs_input_grad[0] else None
        of_weight = g.flatten(0, -2).t() @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return of_x, of_weight


def quicken(model: nn.Module) -> int:
    """Let the model's large float32 linear layers on a CPU go through oneDNN; returns how many do."""
    if not has_onednn():
        return 0
    chosen = [layer for layer in model.modules() if type(layer) is nn.Linear and _large(layer)]
    for layer in chosen:
        layer.forward = types.MethodType(_forward, layer)  # type: ignore[method-assign]
    return len(chosen)


def _forward(self: nn.Linear, x: Tensor) -> Tensor:
    if torch.is_autocast_enabled(x.device.type) or not _for_onednn(x, self.weight):
        return F.linear(x, self.weight, self.bias)
    y: Tensor = _Linear.apply(x, self.weight)  # type: ignore[no-untyped-call]
    return y if self.bias is None else y + self.bias


def _large(layer: nn.Linear) -> bool:
    weight = layer.weight
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() >= LARGE


def _for_onednn(a: Tensor, b: Tensor) -> bool:
    return a.device.type == "cpu" and a.dtype == b.dtype == torch.float32 and b.numel() >= LARGE and has_onednn()


def _onednn(a: Tensor, b: Tensor) -> Tensor:
    return _opaque(a, b) if torch.compiler.is_compiling() else _direct(a, b)


def _direct(a: Tensor, b: Tensor) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return product


@torch.library.custom_op("online_dpo::onednn_product", mutates_args=())
def _opaque(a: Tensor, b: Tensor) -> Tensor:
    """a·bᵀ as one piece that torch.compile does not look into: it would want the weights in a layout of its own."""
    return _direct(a, b)


@_opaque.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(*a.shape[:-1], b.shape[0])
