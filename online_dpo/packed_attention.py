"""Attention over a packed row (`packing`), under the name that transformers' models find it by.

Exact: each completion's softmax runs over its own prompt and itself. Queries, keys and values are laid out as two
rectangles, prompts and completions; prompts run causally, completions against [their prompt | themselves]. Only
attention sees padding, and masks it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from online_dpo.packing import Layout

NAME = "online_dpo_packed"


class _Rearranged(torch.autograd.Function):
    """Rows of `x` by `index`; the gradient's rows by `inverse`, zero where `filled` is false.

    Indexing's own gradient adds rows up one by one; between packed and rectangular places each row has one partner.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, filled: Tensor | None) -> Tensor:
        ctx.save_for_backward(inverse, filled)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        inverse, filled = ctx.saved_tensors
        gradient = gradients[0].index_select(0, inverse)
        return gradient if filled is None else gradient * filled, None, None, None


def _rearranged(x: Tensor, index: Tensor, inverse: Tensor, filled: Tensor | None = None) -> Tensor:
    rows: Tensor = _Rearranged.apply(x, index, inverse, filled)  # type: ignore[no-untyped-call]
    return rows


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | int | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    packed: Layout | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer. `query`: [1, heads, T, size]; `key`, `value`: [1, kv_heads, T, size].

    Returns [1, T, heads, size]. `attention_mask` is what `_window` made of it. `others` are what transformers passes to
    every implementation. What would change the result is refused, so that a model that needs it is found out when it
    is tried.
    """
    layout = usable(packed, attention_mask, sliding_window, others)
    prompts, completions = layout.prompts.shape, layout.completions.shape

    def rectangles(states: Tensor) -> tuple[Tensor, Tensor]:
        """[G, heads, P, size] and [B, heads, C, size]."""
        rows = _rearranged(states[0].transpose(0, 1), layout.places, layout.back)
        # Split, not two slices: their gradients would each be a whole tensor of zeros with a part filled in.
        x, y = torch.split(rows, [prompts.numel(), completions.numel()])
        return (
            x.view(*prompts, *rows.shape[1:]).transpose(1, 2),
            y.view(*completions, *rows.shape[1:]).transpose(1, 2),
        )

    (q_x, q_y), (k_x, k_y), (v_x, v_y) = rectangles(query), rectangles(key), rectangles(value)
    mask_x, mask_y = _masks(layout, sliding_window)
    out_x = attend(q_x, k_x, v_x, mask_x, scaling, softcap)
    keys = torch.cat([_of_owner(k_x, layout), k_y], dim=2)
    values = torch.cat([_of_owner(v_x, layout), v_y], dim=2)
    out_y = attend(q_y, keys, values, mask_y, scaling, softcap)
    rows = torch.cat([out.transpose(1, 2).reshape(-1, *query.shape[1::2]) for out in (out_x, out_y)])
    return _rearranged(rows, layout.back, layout.places, layout.filled).unsqueeze(0), None


def _masks(layout: Layout, window: int | None) -> tuple[Tensor | None, Tensor]:
    """The two rectangles' masks, made once for all layers with this window."""
    key = ("rectangles", window)
    if key not in layout.masks:
        layout.masks[key] = (layout.prompt_mask(window), layout.completion_mask(window))
    masks: tuple[Tensor | None, Tensor] = layout.masks[key]
    return masks


def usable(
    packed: Layout | None, attention_mask: object, sliding_window: int | None, others: Mapping[str, object]
) -> Layout:
    """The layout, if it says all that there is to say of who sees whom; else `ValueError`."""
    if packed is None:
        raise ValueError("the model does not hand the packed layout on to its attention")
    unknown = [others.get("s_aux"), others.get("position_bias")]
    if isinstance(attention_mask, Tensor) or any(extra is not None for extra in unknown):
        raise ValueError("packed attention has no place for this model's mask, sinks or position bias")
    if attention_mask != sliding_window:
        raise ValueError(f"the model's mask has a window of {attention_mask}, its attention one of {sliding_window}")
    return packed


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, cap: float | None) -> Tensor:
    """softmax(scale·qkᵀ)v, causal where `mask` is None; grouped heads; with `cap` c the scores are c·tanh(score/c).

    q: [rows, heads, Q, size], k and v: [rows, kv_heads, K, size], mask: [·, 1, Q, K]; returns q's shape.
    """
    each = q.shape[1] // k.shape[1]
    if each > 1 and (cap is not None or (mask is not None and q.device.type == "cuda")):
        # On a GPU, grouped heads beside a mask would leave the fused kernels for the one that holds all scores.
        k, v = k.repeat_interleave(each, dim=1), v.repeat_interleave(each, dim=1)
    if cap is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    scores = (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = (cap * torch.tanh(scores / cap)).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


def register(name: str, attention: Callable[..., Any]) -> None:
    """Make `attention` known to transformers; models take it by `set_attn_implementation(name)`."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, _window)


def _window(*_: Any, local_size: int | None = None, **__: Any) -> int | None:
    """In a mask's place its window alone: the layout says who sees whom.

    Some models keep a window, or chunks, in the mask and hand nothing on to attention. On a short text this makes no
    difference, so it would not be seen in the log-probs of a trial.
    """
    return local_size


def _of_owner(states: Tensor, packed: Layout) -> Tensor:
    """[G, …] of the prompts as [B, …], each completion's own."""
    if packed.each is None:
        return states.index_select(0, packed.owner)
    return states.unsqueeze(1).expand(-1, packed.each, *states.shape[1:]).reshape(-1, *states.shape[1:])
