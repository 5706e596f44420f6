"""A step's units in passes of a worker's token budget, and dealt to the workers; neither changes the gradient."""

from __future__ import annotations

from collections.abc import Sequence

from online_dpo.backends.policy_model import PolicyModel
from online_dpo.packing import Item
from online_dpo.passes import deal, fill, tokens_of


class StepPasses:
    """`units`: the items that must be in one pass, for each unit that a batch may name."""

    def __init__(self, model: PolicyModel, units: Sequence[Sequence[Item]]) -> None:
        self.model = model
        self.units = units
        self.costs = [tokens_of(unit, packed=model.forward.packed) for unit in units]

    def of(self, batch: Sequence[int]) -> list[tuple[list[int], int]]:
        """This worker's passes over `batch`, as numbers of units, with 1 for those that count.

        Workers that hold shards of one model must make equally many passes: those that have fewer repeat one for
        nothing.
        """
        hands = deal([self.costs[i] for i in batch], self.model.world)
        cut = [self._cut([batch[i] for i in hand]) for hand in hands]
        passes = cut[self.model.rank]
        counted = [(chosen, 1) for chosen in passes]
        if self.model.sharded:
            spare = min(batch, key=lambda i: (self.costs[i], i))
            counted += [([spare], 0)] * (max(map(len, cut)) - len(passes))
        return counted

    def items(self, chosen: Sequence[int]) -> list[Item]:
        """The items of some units, unit after unit."""
        return [item for i in chosen for item in self.units[i]]

    def tokens(self, chosen: Sequence[int]) -> int:
        """Tokens that a pass over some units computes."""
        return tokens_of(self.items(chosen), packed=self.model.forward.packed)

    def _cut(self, indices: Sequence[int]) -> list[list[int]]:
        filled = fill([self.units[i] for i in indices], self.model.tokens_per_pass, packed=self.model.forward.packed)
        return [[indices[i] for i in chosen] for chosen in filled]
