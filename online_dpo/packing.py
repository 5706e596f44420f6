"""Prompts computed once: completions of one prompt as one packed row.

Every distinct prompt of a batch stands once, every distinct completion behind all prompts, nothing is padded:

    [prompt 0 | prompt 1 | … | completion 0 of 0 | completion 1 of 0 | completion 0 of 1 | …]

A completion attends to its own prompt and to itself, and its positions go on from its prompt's, as if it stood alone
behind it. Token-wise layers (nearly all of the work) then run over exactly the tokens there are. `packed_attention`
knows the layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

Item = tuple[Sequence[int], Sequence[int]]
"""Prompt token ids and completion token ids."""
D = TypeVar("D")


@dataclass(frozen=True)
class Layout:
    """Where the tokens of G prompts (at most P long) and B completions (at most C long) stand among T packed ones.

    `prompts`: [G, P] and `completions`: [B, C] give the packed place of each token, 0 beyond a row's own length.
    `prompt_lengths`: [G]. `completion_lengths`: [B]. `owner`: [B], each completion's prompt. `back`: [T], for every
    packed token its place among the G·P + B·C of the two rectangles.
    """

    prompts: Tensor
    completions: Tensor
    prompt_lengths: Tensor
    completion_lengths: Tensor
    owner: Tensor
    back: Tensor
    masks: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)
    """What attention made of the layout: every layer needs the same."""

    @cached_property
    def places(self) -> Tensor:
        """[G·P + B·C]: the packed place of each place in the rectangles."""
        return torch.cat([self.prompts.flatten(), self.completions.flatten()])

    @cached_property
    def filled(self) -> Tensor:
        """[G·P + B·C, 1, 1]: whether a place in the rectangles holds a token of its own."""
        filled = torch.zeros(self.places.shape[0], dtype=torch.bool, device=self.places.device)
        filled[self.back] = True
        return filled.view(-1, 1, 1)

    @cached_property
    def each(self) -> int | None:
        """Completions a prompt, where all have equally many and stand in the prompts' order."""
        prompts, completions = self.prompts.shape[0], self.owner.shape[0]
        if completions % prompts:
            return None
        n = completions // prompts
        regular = torch.arange(prompts, device=self.owner.device).repeat_interleave(n)
        return n if torch.equal(self.owner, regular) else None

    @cached_property
    def seats(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of every packed token: its prompt's number, its completion's (−1 in a prompt), its position. Each [T]."""
        prompts, completions = self.prompts.shape, self.completions.shape
        device = self.prompts.device
        rows = torch.arange(prompts[0], device=device)
        group = torch.cat([rows[:, None].expand(prompts).flatten(), self.owner[:, None].expand(completions).flatten()])
        number = torch.arange(completions[0], device=device)[:, None].expand(completions).flatten()
        answer = torch.cat([torch.full((prompts.numel(),), -1, device=device), number])
        within = torch.arange(prompts[1], device=device).expand(prompts).flatten()
        behind = self.prompt_lengths[self.owner][:, None] + torch.arange(completions[1], device=device)
        position = torch.cat([within, behind.flatten()])
        return group[self.back], answer[self.back], position[self.back]

    def prompt_mask(self, window: int | None) -> Tensor | None:
        """[1, 1, P, P], true where a query may look; None: plainly causal (the window never ends before the prompt)."""
        width = self.prompts.shape[1]
        if window is None or window >= width:
            return None
        at = torch.arange(width, device=self.prompts.device)
        back = at[:, None] - at[None, :]
        return ((back >= 0) & (back < window)).view(1, 1, width, width)

    def completion_mask(self, window: int | None) -> Tensor:
        """[B, 1, C, P + C], true where a completion's query may look: its own prompt, and itself up to the query."""
        device = self.prompts.device
        wide, long = self.prompts.shape[1], self.completions.shape[1]
        before = self.prompt_lengths[self.owner]
        query = torch.arange(long, device=device)
        key = torch.arange(wide, device=device)
        # Distances in positions, from a query to the prompt's keys and to the completion's own.
        to_prompt = (before[:, None, None] + query[None, :, None]) - key[None, None, :]
        to_own = (query[:, None] - query[None, :])[None].expand(before.shape[0], long, long)
        allowed = torch.cat([(key < before[:, None])[:, None, :].expand(-1, long, wide), to_own >= 0], dim=-1)
        if window is not None:
            allowed = allowed & (torch.cat([to_prompt, to_own], dim=-1) < window)
        return allowed.unsqueeze(1)


@dataclass(frozen=True)
class Packed:
    """A packed row of T tokens with N completion tokens in all.

    `token_ids`, `position_ids`: [1, T]. `predictors`: [N], the places whose logits predict the completion tokens (the
    first of each completion is predicted by its prompt's last token). `targets`: [N], those tokens, completion after
    completion. `lengths`: tokens a completion.
    """

    token_ids: Tensor
    position_ids: Tensor
    predictors: Tensor
    targets: Tensor
    lengths: tuple[int, ...]
    layout: Layout

    def to(self, device: torch.device) -> Packed:
        """The same row on `device`."""
        return _moved(self, device, layout=_moved(self.layout, device, masks={}))


def pack(items: Sequence[Item]) -> tuple[Packed, tuple[int, ...]]:
    """The items' distinct prompts and completions as one row; and which of its completions each item is.

    Raises `ValueError` on an empty prompt (its completion's first token would have no predictor) or completion.
    """
    if any(not len(prompt) or not len(completion) for prompt, completion in items):
        raise ValueError("a prompt and a completion need at least one token each")
    groups: dict[tuple[int, ...], dict[tuple[int, ...], int]] = {}
    for prompt, completion in items:
        groups.setdefault(tuple(prompt), {}).setdefault(tuple(completion), 0)
    number = 0
    for completions in groups.values():
        for completion in completions:
            completions[completion] = number
            number += 1
    return _row(groups), tuple(groups[tuple(prompt)][tuple(completion)] for prompt, completion in items)


def _row(groups: dict[tuple[int, ...], dict[tuple[int, ...], int]]) -> Packed:
    prompts = list(groups)
    completions = [(owner, answer) for owner, answers in enumerate(groups.values()) for answer in answers]
    tokens = [*prompts, *(answer for _, answer in completions)]
    starts = [0]
    for part in tokens:
        starts.append(starts[-1] + len(part))
    positions: list[int] = [place for prompt in prompts for place in range(len(prompt))]
    predictors: list[int] = []
    for number, (owner, answer) in enumerate(completions):
        first = len(prompts[owner])
        positions.extend(range(first, first + len(answer)))
        begin = starts[len(prompts) + number]
        predictors.append(starts[owner] + first - 1)
        predictors.extend(range(begin, begin + len(answer) - 1))
    return Packed(
        token_ids=torch.tensor([[token for part in tokens for token in part]]),
        position_ids=torch.tensor([positions]),
        predictors=torch.tensor(predictors),
        targets=torch.tensor([token for _, answer in completions for token in answer]),
        lengths=tuple(len(answer) for _, answer in completions),
        layout=_layout([len(part) for part in tokens], len(prompts), [owner for owner, _ in completions]),
    )


def _layout(lengths: Sequence[int], prompts: int, owner: Sequence[int]) -> Layout:
    starts = torch.tensor([0, *lengths]).cumsum(0)[:-1]
    sizes = torch.tensor(lengths)

    def rectangle(first: int, last: int) -> tuple[Tensor, Tensor]:
        """Packed places [rows, longest] of the parts from `first` to `last`, and which of them are filled."""
        within = torch.arange(int(sizes[first:last].max()))[None, :]
        filled = within < sizes[first:last, None]
        return (starts[first:last, None] + within) * filled, filled

    prompt_places, prompt_filled = rectangle(0, prompts)
    completion_places, completion_filled = rectangle(prompts, len(lengths))
    # Row by row, the filled places of the rectangles are the packed tokens in their order.
    back = torch.cat([prompt_filled.flatten(), completion_filled.flatten()]).nonzero().squeeze(-1)
    return Layout(
        prompts=prompt_places,
        completions=completion_places,
        prompt_lengths=sizes[:prompts],
        completion_lengths=sizes[prompts:],
        owner=torch.tensor(owner),
        back=back,
    )


def _moved(record: D, device: torch.device, **others: Any) -> D:
    values = {part.name: getattr(record, part.name) for part in fields(record)}  # type: ignore[arg-type]
    values = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in values.items()}
    return type(record)(**{**values, **others})
