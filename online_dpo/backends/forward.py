"""How a learner computes completion log-probs with its model: packed where the model can, plain where it cannot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from online_dpo.backends.distributed import from_first
from online_dpo.errors import ModelError, one_line
from online_dpo.logps import chunked_head, collate, token_scores
from online_dpo.packed_attention import NAME, packed_attention, register
from online_dpo.packing import Item, pack

TRIAL_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.1}
"""Largest difference, nats a token, that a trial allows by dtype: rounding of one layout against the other. A wrong
mask or position is off by more, and so is a forgotten scaling of the logits."""


class ItemScores(NamedTuple):
    """Of the completions of some items, one after the other.

    `logps`, `collisions`: [N] float32, log π(y_t | x, y_<t) and log Σ_v p_v². `lengths`: [items] long.
    """

    logps: Tensor
    collisions: Tensor
    lengths: Tensor

    def each(self) -> list[list[float]]:
        """The log-probs as one list an item."""
        return [part.tolist() for part in torch.split(self.logps.cpu(), self.lengths.tolist())]


@dataclass(frozen=True, slots=True)
class Forward:
    """`packed`: prompts once, in one row. `chunked`: the vocabulary's logits a chunk at a time. `why`: what a model
    could not do, one line; empty when it does both."""

    packed: bool
    chunked: bool
    why: str = ""

    def scores(self, model: nn.Module, items: Sequence[Item], device: torch.device) -> ItemScores:
        """The items' scores under `model`, with gradients; an item that stands twice is computed once."""
        lengths = torch.tensor([len(completion) for _, completion in items], device=device)
        if not self.packed:
            found = token_scores(model, collate(items).to(device), chunked=self.chunked)
            return ItemScores(found.logps, found.collisions, lengths)
        row, number = pack(items)
        found = token_scores(model, row.to(device), chunked=self.chunked)
        if number != tuple(range(len(items))):
            places = [torch.arange(first, last) for first, last in _spans(row.lengths, number)]
            order = torch.cat(places).to(device)
            return ItemScores(found.logps[order], found.collisions[order], lengths)
        return ItemScores(found.logps, found.collisions, lengths)


def _spans(lengths: Sequence[int], number: Sequence[int]) -> list[tuple[int, int]]:
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return [(ends[i] - lengths[i], ends[i]) for i in number]


def choose_forward(model: Any, wanted: str, device: torch.device, precision: Any) -> Forward:
    """The fastest `Forward` that gives this model's own log-probs, found by trying it on a few random tokens.

    `wanted` is "auto", "packed" or "plain". The model's attention is left set for the choice. `precision` makes the
    context (autocast) that the forward will run in. Raises `ModelError` when "packed" is wanted and not possible.
    """
    inner = _inner(model)
    own = attention_of(model)
    items = _trial_items(int(inner.get_input_embeddings().weight.shape[0]))
    # transformers' sdpa leaves out the soft-capping of attention scores that some models were trained with.
    exact = "eager" if getattr(inner.config, "attn_logit_softcapping", None) else own
    attend_by(inner, exact)
    truth, error = _tried(model, items, Forward(False, False), device, precision)
    if truth is None:
        raise ModelError(f"the model's forward fails on a few random tokens: {error}")
    reasons = []
    whole = "its head is no bare linear layer"
    if chunked_head(inner) is not None:
        whole = _agrees(model, items, Forward(False, True), device, precision, truth)
    if whole:
        reasons.append(f"all logits of scored positions at once ({whole})")
    if wanted == "plain":
        return Forward(False, not whole, "; ".join(reasons))
    packed = Forward(True, not whole)
    for name, attention in _attentions(device).items():
        register(name, attention)
        attend_by(inner, name)
        fault = _agrees(model, items, packed, device, precision, truth)
        if not fault:
            return Forward(True, not whole, "; ".join(reasons))
    attend_by(inner, exact)
    if wanted == "packed":
        raise ModelError(f"learner.layout is packed, and this model cannot: {fault}; set learner.layout: auto")
    reasons.append(f"a prompt is computed again for each completion ({fault})")
    return Forward(False, not whole, "; ".join(reasons))


def _attentions(device: torch.device) -> dict[str, Callable[..., Any]]:
    """Implementations of packed attention in the order in which they are tried."""
    found: dict[str, Callable[..., Any]] = {}
    if device.type == "cuda":
        from online_dpo import flex_attention

        found[flex_attention.NAME] = flex_attention.packed_flex_attention
    return {**found, NAME: packed_attention}


def attention_of(model: Any) -> str:
    """The name of the attention that `model` computes with."""
    return str(_inner(model).config._attn_implementation)


def attend_by(model: Any, name: str) -> None:
    """Let `model` compute with the attention called `name`."""
    if attention_of(model) != name:
        _inner(model).set_attn_implementation(name)


def _inner(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _agrees(model: Any, items: list[Item], way: Forward, device: torch.device, precision: Any, truth: Tensor) -> str:
    """Why `way` does not give `truth`; empty when it does."""
    found, error = _tried(model, items, way, device, precision)
    if found is not None:
        gap = float((found - truth).abs().max())
        dtype = torch.get_autocast_dtype(device.type) if _autocast(device, precision) else torch.float32
        error = "" if gap <= TRIAL_TOLERANCE[dtype] else f"its log-probs differ by {gap:.2g}"
    # One decision for all workers: those that hold shares of a model try it together.
    return from_first(error)


def _autocast(device: torch.device, precision: Any) -> bool:
    with precision():
        return bool(torch.is_autocast_enabled(device.type))


@torch.no_grad()
def _tried(
    model: Any, items: list[Item], way: Forward, device: torch.device, precision: Any
) -> tuple[Tensor | None, str]:
    try:
        with precision():
            return way.scores(model, items, device).logps, ""
    except Exception as error:  # whatever a model's own code makes of a layout it does not know
        return None, one_line(error, 120)


def _trial_items(vocabulary: int) -> list[Item]:
    """Two prompts of different lengths; one has two answers of different lengths."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(0, vocabulary, (count,), generator=generator).tolist()

    first, second = tokens(7), tokens(12)
    return [(first, tokens(5)), (second, tokens(4)), (first, tokens(9))]
