"""Gradients of matrices as large as the vocabulary, added in place.

Autograd gives every use of a matrix a gradient of its own before it adds them: where the embedding is the output head
too and a step takes several passes, three exist at once. Here each use adds to the one that the optimiser reads, once
there is one. On a CPU alone: on a GPU such additions would come in any order.
"""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Embedded(torch.autograd.Function):
    """Rows of the matrix; the way back adds their gradients, but for those of the padding id, where there is room."""

    @staticmethod
    def forward(ctx: Any, token_ids: Tensor, weight: Tensor, padding: int | None) -> Tensor:
        ctx.save_for_backward(token_ids)
        ctx.weight, ctx.padding = weight, padding
        return F.embedding(token_ids, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor | None, None]:
        (token_ids,) = ctx.saved_tensors
        g = gradients[0].flatten(0, -2)
        ids = token_ids.flatten()
        if ctx.padding is not None:
            g = g.masked_fill((ids == ctx.padding).unsqueeze(-1), 0.0)
        # Asked now, not on the way there: gradients may have been cleared in between.
        memory = memory_of(ctx.weight)
        if memory is None:
            return None, torch.zeros_like(ctx.weight).index_add_(0, ids, g), None
        memory.index_add_(0, ids, g)
        return None, None, None


def memory_of(weight: Tensor) -> Tensor | None:
    """What `weight`'s gradient can be added to in place: the one that it has; None where it has none, or on a GPU.

    `backward` ends with the same sum either way. `torch.autograd.grad` would not see what was added in place.
    """
    memory = weight.grad if _plain(weight) else None
    return memory if memory is not None and memory.dtype == weight.dtype else None


def lay_out(model: nn.Module) -> None:
    """Zeros as the gradients of the model's embedding and of its head, where they have none: room to add to in place.

    For before a step's first pass.
    """
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):  # type: ignore[operator]
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and _plain(weight) and weight.grad is None:
            weight.grad = torch.zeros_like(weight)


def embed_in_place(model: nn.Module) -> None:
    """Let the model's embedding add its gradient to the one that its matrix has already."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    if type(embedding) is nn.Embedding and embedding.max_norm is None and not embedding.scale_grad_by_freq:
        embedding.forward = types.MethodType(_forward, embedding)  # type: ignore[method-assign]


def _forward(self: nn.Embedding, token_ids: Tensor) -> Tensor:
    if not _plain(self.weight):
        return F.embedding(token_ids, self.weight, self.padding_idx)
    found: Tensor = _Embedded.apply(token_ids, self.weight, self.padding_idx)  # type: ignore[no-untyped-call]
    return found


def _plain(weight: object) -> bool:
    """A whole float32 parameter on a CPU that is trained."""
    return (
        type(weight) is nn.Parameter
        and weight.requires_grad
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
    )
