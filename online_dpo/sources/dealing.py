"""An arm's saved rounds, shuffled: what of all of them each round is dealt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Literal

from online_dpo.records import CANDIDATES, each_pair
from online_dpo.seeds import derive_seed
from online_dpo.sources.batch import Batch, put_together, read_batch
from online_dpo.sources.saving import record_of
from online_dpo.sources.streamed import StreamedArm
from online_dpo.tables import each_row
from online_dpo.types import Pair, Prompt

Take = Literal["pairs", "candidates"]
Card = tuple[int, str] | tuple[int, str, int, int]
"""What is dealt: of a round and a prompt, one pair (the indices of its two answers), or all answers together."""


def dealt(streamed: StreamedArm, index: int, take: Take, seed: int) -> list[Card]:
    """What round `index` gets, in its order.

    The cards of all rounds, in an order that the seed gives them, are cut into parts as large as the rounds' own.
    """
    cards = [_cards(streamed, index, take) for index in range(1, streamed.rounds + 1)]
    ends = [0, *accumulate(len(own) for own in cards)]
    order = sorted((card for own in cards for card in own), key=lambda card: (derive_seed(seed, "stream", *card), card))
    return order[ends[index - 1] : ends[index]]


def _cards(streamed: StreamedArm, index: int, take: Take) -> list[Card]:
    folder = streamed.folder(index)
    if take == "pairs":
        record_of(folder, "pair")
        rows = each_pair(folder.path / "pairs.parquet")
        return [(index, row["prompt_id"], row["chosen_index"], row["rejected_index"]) for row in rows]
    record_of(folder, "sample")
    rows = each_row(folder.path / "candidates.parquet", CANDIDATES, ["prompt_id"])
    return [(index, prompt_id) for prompt_id in dict.fromkeys(row["prompt_id"] for row in rows)]


def pairs_of(streamed: StreamedArm, cards: Sequence[Card], prompts: Mapping[str, Prompt]) -> Batch:
    """The pairs of `cards` that are of `prompts`, in the cards' order, and the answers in them."""
    place = {card: number for number, card in enumerate(cards)}
    batches: list[Batch] = []
    places: list[int] = []
    for index in sorted({card[0] for card in cards}):
        whole = read_batch(streamed.folder(index), prompts)
        found = {_card(index, pair): pair for pair in whole.pairs}
        pairs = {card: pair for card, pair in found.items() if card in place}
        batches.append(whole.of_pairs(list(pairs.values())))
        places += [place[card] for card in pairs]
    joined = put_together(batches)
    order = sorted(range(len(places)), key=places.__getitem__)
    return replace(joined, pairs=tuple(joined.pairs[number] for number in order))


def answers_of(streamed: StreamedArm, cards: Sequence[Card], prompts: Mapping[str, Prompt]) -> Batch:
    """The answers of `cards` to `prompts`. Those of one prompt from several rounds stand together."""
    rounds = sorted({card[0] for card in cards})
    wanted = {index: {card[1] for card in cards if card[0] == index} for index in rounds}
    return put_together([read_batch(streamed.folder(index), prompts).of_prompts(wanted[index]) for index in rounds])


def _card(index: int, pair: Pair) -> Card:
    return index, pair.prompt.id, pair.chosen.index, pair.rejected.index
