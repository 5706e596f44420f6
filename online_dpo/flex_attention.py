"""Attention over a packed row by FlexAttention: for GPUs, where blocks that nobody may see are not computed.

The same rule as `packed_attention`, said as a mask: a token sees its own prompt, and of the completions its own alone,
up to itself. On a CPU FlexAttention cannot go backward: there it serves to test the mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from online_dpo.packed_attention import usable
from online_dpo.packing import Layout

NAME = "online_dpo_packed_flex"


def packed_flex_attention(
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
    """What transformers calls in every layer; shapes as `packed_attention.packed_attention`."""
    layout = usable(packed, attention_mask, sliding_window, others)
    kernel: Any = _compiled() if query.is_cuda else flex_attention
    out: Tensor = kernel(
        query,
        key,
        value,
        score_mod=None if softcap is None else _capped(softcap),
        block_mask=_block_mask(layout, sliding_window),
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2), None


def sees(layout: Layout, window: int | None) -> Callable[[Any, Any, Tensor, Tensor], Tensor]:
    """FlexAttention's mask function of (batch, head, query place, key place)."""
    group, answer, position = layout.seats

    def rule(_batch: Any, _head: Any, q: Tensor, k: Tensor) -> Tensor:
        back = position[q] - position[k]
        own = (group[q] == group[k]) & ((answer[k] == -1) | (answer[q] == answer[k])) & (back >= 0)
        return own if window is None else own & (back < window)

    return rule


def _block_mask(layout: Layout, window: int | None) -> BlockMask:
    """One for all layers with this window, kept beside the layout."""
    key = ("blocks", window)
    if key not in layout.masks:
        length = layout.back.shape[0]
        layout.masks[key] = create_block_mask(
            sees(layout, window), None, None, length, length, device=layout.back.device
        )
    mask: BlockMask = layout.masks[key]
    return mask


def _capped(cap: float) -> Callable[..., Tensor]:
    def cap_score(score: Tensor, *_: Any) -> Tensor:
        return cap * torch.tanh(score / cap)

    return cap_score


_kernels: list[Callable[..., Any]] = []


def _compiled() -> Callable[..., Any]:
    """The fused kernel: compiled once a process, for all lengths."""
    if not _kernels:
        _kernels.append(torch.compile(flex_attention, dynamic=True))
    return _kernels[0]
