"""Gradients of embedding and head added in place are those that autograd adds up by itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from online_dpo.scored_head import scored
from online_dpo.vocabulary_gradients import embed_in_place, lay_out, memory_of

V, H = 23, 6


class Tied(nn.Module):
    """An embedding, a layer and a head; with `tied` the head's matrix is the embedding's."""

    def __init__(self, *, tied: bool, padding: int | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(V, H, padding_idx=padding)
        self.layer = nn.Linear(H, H)
        self.head = nn.Linear(H, V, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def loss(self, ids: Tensor, targets: Tensor, *, chunked: bool) -> Tensor:
        h = torch.tanh(self.layer(self.embedding(ids)))
        if chunked:
            return -scored(h, self.head, targets).logps.sum()
        return nn.functional.cross_entropy(self.head(h), targets, reduction="sum")


def passes() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randint(0, V, (9,), generator=generator), torch.randint(0, V, (9,), generator=generator))] * 2


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("padding", [None, 0, 5])
def test_sums_are_those_of_autograd(tied: bool, padding: int | None) -> None:
    """Two passes, each use of a matrix added where the first one's gradient lies; ids that repeat add up."""
    plain, mine = Tied(tied=tied, padding=padding), Tied(tied=tied, padding=padding)
    embed_in_place(mine)
    lay_out(mine)
    memory = mine.embedding.weight.grad
    for ids, targets in passes():
        plain.loss(ids, targets, chunked=False).backward()  # type: ignore[no-untyped-call]
        mine.loss(ids, targets, chunked=True).backward()  # type: ignore[no-untyped-call]
    assert mine.embedding.weight.grad is memory
    for (name, theirs), (_, ours) in zip(plain.named_parameters(), mine.named_parameters(), strict=True):
        assert theirs.grad is not None
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_without_room_laid_out_autograd_does_it() -> None:
    plain, mine = Tied(tied=True, padding=None), Tied(tied=True, padding=None)
    embed_in_place(mine)
    ids, targets = passes()[0]
    plain.loss(ids, targets, chunked=False).backward()  # type: ignore[no-untyped-call]
    mine.loss(ids, targets, chunked=True).backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(mine.embedding.weight.grad, plain.embedding.weight.grad, rtol=1e-4, atol=1e-5)


def test_frozen_or_narrow_matrices_are_left_to_autograd() -> None:
    frozen = nn.Parameter(torch.zeros(3, 2), requires_grad=False)
    narrow = nn.Parameter(torch.zeros(3, 2, dtype=torch.bfloat16))
    narrow.grad = torch.zeros_like(narrow)
    assert memory_of(frozen) is None
    assert memory_of(narrow) is None
    trained = nn.Parameter(torch.zeros(3, 2))
    assert memory_of(trained) is None
    trained.grad = torch.zeros_like(trained)
    assert memory_of(trained) is trained.grad


def test_gradients_cleared_between_the_two_ways_are_not_added_to() -> None:
    """The first pass's gradient is dropped after the second one's forward: what is left is the second's alone."""
    plain, mine = Tied(tied=True, padding=None), Tied(tied=True, padding=None)
    embed_in_place(mine)
    lay_out(mine)
    ids, targets = passes()[0]
    mine.loss(ids, targets, chunked=True).backward()  # type: ignore[no-untyped-call]
    second = mine.loss(ids, targets, chunked=True)
    mine.zero_grad()
    second.backward()  # type: ignore[no-untyped-call]
    plain.loss(ids, targets, chunked=False).backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(mine.embedding.weight.grad, plain.embedding.weight.grad, rtol=1e-4, atol=1e-5)
