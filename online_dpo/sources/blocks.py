"""How a round is cut into blocks: the answers of each come from the policy that the one before has left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from online_dpo.budget import most_pairs
from online_dpo.config import ArmSettings
from online_dpo.source_spec import SourceSpec
from online_dpo.types import Prompt


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive prompts of a round; `number` counts from 1.

    `steps`: the most optimiser steps that its pairs may make. `pairs`: how many pairs this block and those before it
    may have in sum, None where `pairing.max_pairs` is not set.
    """

    number: int
    prompts: tuple[Prompt, ...]
    steps: int
    pairs: int | None


def cut_round(prompts: Sequence[Prompt], settings: ArmSettings) -> list[Block]:
    """The blocks of `source: {every_steps: k}`: each worth k steps if every prompt gives its most pairs.

    Block j ends with the prompt that makes it j·k·`dpo.batch_size` pairs so far; it has one prompt at least, and the
    last one takes the rest. All blocks' steps together are those of the round made in one go, also where a prompt's
    pairs do not divide a batch: a block may then hold a few pairs more than k batches. `pairing.max_pairs` is dealt out
    by prompts.
    """
    if not isinstance(settings.source, SourceSpec) or settings.source.every_steps is None:
        raise ValueError("only source: {every_steps: k} is cut into blocks")
    pairing, batch = settings.pairing, settings.dpo.batch_size
    count = len(prompts)
    most = count * most_pairs(pairing, settings.sampling.n)
    if pairing.max_pairs is not None:
        most = min(most, pairing.max_pairs)
    blocks: list[Block] = []
    begin = done = 0
    for end in _ends(count, most, settings.source.every_steps * batch):
        # Whole steps by then, were each prompt to give its share of the pairs; a rest makes a step at the end alone.
        steps = _up(most, batch) if end == count else end * most // (count * batch)
        allowed = None if pairing.max_pairs is None else pairing.max_pairs * end // count
        blocks.append(Block(len(blocks) + 1, tuple(prompts[begin:end]), steps - done, allowed))
        begin, done = end, steps
    return blocks


def _ends(prompts: int, pairs: int, worth: int) -> list[int]:
    """After how many prompts each block ends, where `prompts` give `pairs` and a block is worth `worth` of them."""
    if not pairs:
        return [prompts]
    wanted = (_up(number * worth * prompts, pairs) for number in range(1, _up(pairs, worth)))
    return [*sorted({end for end in wanted if end < prompts}), prompts]


def _up(number: int, by: int) -> int:
    """The quotient, rounded up."""
    return -(-number // by)
