"""How many floating-point operations a DPO step needs, and how many this machine can do."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

Lengths = tuple[int, int, int]
"""Tokens of a pair's prompt, chosen and rejected completion."""


@dataclass(frozen=True, slots=True)
class Shape:
    """`layer_weights`: parameters outside the embeddings and the head. `attention_width`: heads × head size."""

    layers: int
    layer_weights: int
    hidden: int
    attention_width: int
    vocabulary: int


def shape_of(folder: Path) -> Shape:
    """The shape of the model in `folder`, from its configuration alone."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(str(folder))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    outside = {
        id(part.weight): part.weight.numel() for part in (model.get_input_embeddings(), model.get_output_embeddings())
    }
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shape(
        layers=config.num_hidden_layers,
        layer_weights=sum(p.numel() for p in model.parameters()) - sum(outside.values()),
        hidden=config.hidden_size,
        attention_width=config.num_attention_heads * head_size,
        vocabulary=config.vocab_size,
    )


def step_flops(shape: Shape, pairs: Sequence[Lengths], *, shared_prompt: bool) -> float:
    """Operations of one forward and backward over `pairs`, nothing recomputed; theirs is the formula for both.

    A product of [m, k] and [k, n] takes 2·m·k·n operations; the backward does two such for each of the forward, so
    a weight costs 2 + 4 = 6 operations a token (Kaplan et al. 2020, sec. 2.1).

    - layers: 6 · layer weights · tokens, where a pair has p + w + l tokens with its prompt shared, and 2p + w + l
      as two sequences;
    - attention: a query and a key that it sees cost 2 · width for the score and 2 · width for the weighted sum, in each
      layer, times 3 for the backward. Causal sequences of T tokens see T(T + 1)/2 keys in all; a completion of c
      tokens behind a shared prompt of p sees c·p + c(c + 1)/2;
    - head: 6 · hidden · vocabulary for each of the w + l completion tokens, which alone are scored.

    Norms, rotations, activations and the softmax are left out, as is usual: below 1 % here.
    """
    tokens, seen, scored = 0, 0, 0
    for p, w, length in pairs:
        scored += w + length
        if shared_prompt:
            tokens += p + w + length
            seen += _causal(p) + w * p + _causal(w) + length * p + _causal(length)
        else:
            tokens += 2 * p + w + length
            seen += _causal(p + w) + _causal(p + length)
    in_layers = 6 * shape.layer_weights * tokens
    in_attention = 3 * 4 * shape.attention_width * seen * shape.layers
    in_head = 6 * shape.hidden * shape.vocabulary * scored
    return float(in_layers + in_attention + in_head)


def plain_tokens(pairs: Sequence[Lengths]) -> int:
    """Tokens of `pairs` as two sequences each: what tokens a second are counted in, on every side."""
    return sum(2 * p + w + length for p, w, length in pairs)


def matmul_peak(size: int = 2048, dtype: torch.dtype = torch.float32, device: str = "cpu", repeats: int = 3) -> float:
    """Operations a second of a product of two square matrices: the best of `repeats`."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(repeats + 1):  # the first warms up and never is the best
        _finish(device)
        began = time.perf_counter()
        torch.mm(a, b)
        _finish(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


def _causal(tokens: int) -> int:
    return tokens * (tokens + 1) // 2


def _finish(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
