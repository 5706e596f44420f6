"""Completion log-probs of a causal language model.

A batch is either plain, one right-padded row a sequence (`collate`), or packed, each prompt once (`packing.pack`). In
both the model's head runs on the positions that predict a completion token and nowhere else, so neither prompt nor
padding can enter a sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from online_dpo.packing import Item, Packed
from online_dpo.scored_head import Scores, scored


@dataclass(frozen=True, slots=True)
class Sequences:
    """A right-padded batch of B sequences of at most T tokens with N completion tokens in all.

    `token_ids`, `attention_mask`: [B, T]. `predictors`: [N], index into the flattened [B·T] positions whose
    logits predict the completion tokens. `targets`: [N], those tokens. `lengths`: completion tokens a sequence.
    """

    token_ids: Tensor
    attention_mask: Tensor
    predictors: Tensor
    targets: Tensor
    lengths: tuple[int, ...]

    def to(self, device: torch.device) -> Sequences:
        """The same batch on `device`."""
        return Sequences(
            self.token_ids.to(device),
            self.attention_mask.to(device),
            self.predictors.to(device),
            self.targets.to(device),
            self.lengths,
        )


def collate(items: Sequence[Item], pad_token_id: int = 0) -> Sequences:
    """Batch (prompt token ids, completion token ids) items. The pad id is never attended to nor scored.

    Raises `ValueError` on an empty prompt (its first token would have no predictor) or completion.
    """
    if any(not len(prompt) or not len(completion) for prompt, completion in items):
        raise ValueError("a prompt and a completion need at least one token each")
    width = max(len(prompt) + len(completion) for prompt, completion in items)
    token_ids = torch.full((len(items), width), pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros((len(items), width), dtype=torch.long)
    predictors: list[int] = []
    targets: list[int] = []
    for row, (prompt, completion) in enumerate(items):
        tokens = [*prompt, *completion]
        token_ids[row, : len(tokens)] = torch.tensor(tokens)
        attention_mask[row, : len(tokens)] = 1
        # The token at position t is predicted by the logits at position t − 1.
        first = row * width + len(prompt) - 1
        predictors.extend(range(first, first + len(completion)))
        targets.extend(completion)
    return Sequences(
        token_ids,
        attention_mask,
        torch.tensor(predictors),
        torch.tensor(targets),
        tuple(len(completion) for _, completion in items),
    )


def chunked_head(model: nn.Module) -> nn.Linear | None:
    """The model's output head where `scored` can stand for it: a bare linear layer; None for any other.

    What a model does to the head's logits afterwards is known for soft-capping alone (`final_logit_softcapping`). A
    model that does more is found out by trying it (`PolicyModel`).
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    return head if type(head) is nn.Linear else None


@contextmanager
def _head_only_at(model: nn.Module, predictors: Tensor) -> Iterator[None]:
    """Inside, the model's output head sees the hidden states at `predictors` alone: logits are [1, N, V].

    A hook on the head, rather than calling the decoder and the head ourselves, keeps what some architectures do
    to logits after the head (scaling, soft-capping).
    """

    def select(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden: Tensor = args[0]
        return (hidden.reshape(-1, hidden.shape[-1]).index_select(0, predictors).unsqueeze(0), *args[1:])

    head = model.get_output_embeddings()  # type: ignore[operator]
    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _head_scores(model: nn.Module, head: nn.Linear, targets: Tensor) -> Iterator[list[Scores]]:
    """Inside, the head leaves its `Scores` of `targets` in the list and passes their log-probs on: no logits exist.

    The model is run whole all the same, and its output used: workers that hold shares of it gather them by hooks on its
    own forward, and on what comes out of it for the way back.
    """
    found: list[Scores] = []
    config: Any = getattr(model, "config", None)  # peft hands on its base model's own
    cap: float | None = getattr(config, "final_logit_softcapping", None)

    def score(hidden: Tensor) -> Tensor:
        found.append(scored(hidden.reshape(-1, hidden.shape[-1]), head, targets, cap))
        return found[0].logps.view(1, -1, 1).clone()  # such hooks warn of views

    before = head.__dict__.get("forward")
    head.forward = score  # type: ignore[method-assign,assignment]
    if cap is not None:
        config.final_logit_softcapping = None
    try:
        yield found
    finally:
        del head.forward
        if before is not None:
            head.forward = before  # type: ignore[method-assign]
        if cap is not None:
            config.final_logit_softcapping = cap


def token_logps(model: nn.Module, batch: Sequences | Packed, *, chunked: bool = False) -> Tensor:
    """log π(y_t | x, y_<t) of every completion token, shape [N], float32, completions one after the other.

    The log-softmax is over the whole vocabulary in float32, whatever the model computes in.
    """
    return token_scores(model, batch, chunked=chunked).logps


def token_scores(model: nn.Module, batch: Sequences | Packed, *, chunked: bool = False) -> Scores:
    """`token_logps`, and log Σ_v p_v² beside each. `chunked`: by `scored`, where `chunked_head` allows it.

    A packed batch needs a model whose attention is `packed_attention`.
    """
    head = chunked_head(model) if chunked else None
    with _head_only_at(model, batch.predictors):
        if head is not None:
            with _head_scores(model, head, batch.targets) as found:
                logps: Tensor = _run(model, batch).logits
            return Scores(logps.flatten(), found[0].collisions)
        logits: Tensor = _run(model, batch).logits.squeeze(0).float()
    logs = logits - torch.logsumexp(logits, dim=-1, keepdim=True)
    logps = logs.gather(-1, batch.targets.unsqueeze(-1)).squeeze(-1)
    return Scores(logps, torch.logsumexp(2 * logs.detach(), dim=-1))


def _run(model: nn.Module, batch: Sequences | Packed) -> Any:
    if isinstance(batch, Packed):
        return model(input_ids=batch.token_ids, position_ids=batch.position_ids, packed=batch.layout, use_cache=False)
    return model(input_ids=batch.token_ids, attention_mask=batch.attention_mask, use_cache=False)


def sequence_logps(model: nn.Module, batch: Sequences | Packed, *, chunked: bool = False) -> Tensor:
    """log π(y|x) summed over each completion's tokens, shape [completions], float32."""
    per_token = token_logps(model, batch, chunked=chunked)
    owner = torch.repeat_interleave(
        torch.arange(len(batch.lengths), device=per_token.device),
        torch.tensor(batch.lengths, device=per_token.device),
    )
    return torch.zeros(len(batch.lengths), device=per_token.device).index_add(0, owner, per_token)
