"""Pairs drawn from what the arm made in its last k rounds, this one's fresh pairs among them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from online_dpo.arms import Arm
from online_dpo.files import digest_json
from online_dpo.rounds import Pinned
from online_dpo.source_spec import SourceSpec
from online_dpo.sources.batch import Batch, put_together, read_batch
from online_dpo.sources.drawing import draw
from online_dpo.sources.fresh import fresh_prompts, gather_fresh
from online_dpo.sources.round_data import RoundData
from online_dpo.sources.saving import Given, audit_of, give_batch, record_of, with_parts
from online_dpo.store import RoundFolder
from online_dpo.types import Pair, Prompt

FRESH = "fresh"
"""The folder in a round's that holds what was sampled, judged and paired in this round."""


def history_prompts(arm: Arm, index: int) -> tuple[Prompt, ...]:
    """The prompts that round `index` samples, then those of the older rounds that it draws from, each once."""
    prompts = {prompt.id: prompt for age in ages(arm, index) for prompt in fresh_prompts(arm, index - age)}
    return tuple(prompts.values())


def ages(arm: Arm, index: int) -> range:
    """How many rounds ago the pairs that round `index` may train on were made: 0 to k − 1, as far as there are."""
    return range(min(_window(arm)[0], index))


def gather_history(arm: Arm, folder: RoundFolder, pinned: Pinned, own: Sequence[Prompt] | None = None) -> RoundData:
    """Sample, judge and pair `own` prompts (default: the round's), then draw as many pairs as that gave.

    A pair `a` rounds old is drawn with weight decay^a, without replacement. Each round draws from what the rounds
    before made, not from what they drew: no pair is older than k − 1 rounds.
    """
    prompts = tuple(fresh_prompts(arm, folder.index) if own is None else own)
    fresh = gather_fresh(arm, folder.inside(FRESH), replace(pinned, prompts=prompts))
    given = _given(arm, folder, {prompt.id: prompt for prompt in pinned.prompts})
    sample, judge, pair = give_batch(folder, given)
    return RoundData(
        with_parts(sample, [fresh.sample], fresh.sample.info),
        with_parts(judge, [fresh.judge], fresh.judge.info),
        audit_of(folder, [(folder.inside(FRESH), fresh.audit)]),
        with_parts(pair, [fresh.pair], {"dropped": fresh.pair.info["dropped"]}),
        # Drawn are as many as are fresh: where all that was drawn is fresh, it is the fresh ones.
        pinned.source if pair.info["by_age"]["0"] == pair.info["kept"] else None,
    )


def _given(arm: Arm, folder: RoundFolder, known: dict[str, Prompt]) -> Given:
    """The drawn pairs, all fresh answers, and the older ones that are in drawn pairs."""
    k, decay = _window(arm)
    made = {age: one for age in ages(arm, folder.index) if (one := _made(arm, folder, age)) is not None}
    seed = f"{arm.seed}/{folder.index}"

    @cache
    def lots() -> dict[int, tuple[Batch, list[Pair]]]:
        batches = {age: read_batch(one, known) for age, one in made.items()}
        return {age: (batches[age], pairs) for age, pairs in draw_pairs(batches, decay, seed).items()}

    def make() -> Batch:
        fresh, *older = lots().values()
        return put_together([replace(fresh[0], pairs=tuple(fresh[1])), *(batch.of_pairs(own) for batch, own in older)])

    def figures() -> dict[str, Any]:
        return {"by_age": {str(age): len(pairs) for age, (_, pairs) in lots().items()}}

    digests = [[age, record_of(one, "sample").outputs, record_of(one, "pair").outputs] for age, one in made.items()]
    decided = {"history": digest_json(digests), "window": f"{k} rounds, decay {decay!r}", "seed": seed}
    return Given(decided, f"the last {k} rounds", make, figures=figures)


def draw_pairs(batches: dict[int, Batch], decay: float, seed: str) -> dict[int, list[Pair]]:
    """Of the pairs of `batches` (by age, 0 first) as many as the youngest has, by age, in their order."""
    pairs = [(age, pair) for age, batch in batches.items() for pair in batch.pairs]
    names = [(age, pair.prompt.id, pair.chosen.index, pair.rejected.index) for age, pair in pairs]
    weights = [age * math.log(decay) for age, _ in pairs]
    drawn = [pairs[place] for place in draw(names, weights, len(batches[0].pairs), seed)]
    return {age: [pair for old, pair in drawn if old == age] for age in batches}


def _made(arm: Arm, folder: RoundFolder, age: int) -> RoundFolder | None:
    """Where the round `age` rounds before that of `folder` made its own pairs; None where it made none.

    `folder` may be a part's, inside the round's: the older one is at the same place in its round's.
    """
    index = folder.index - age
    inside = folder.path.relative_to(arm.folder(folder.index).path)
    older = RoundFolder(arm.run.store, arm.folder(index).path / inside / FRESH, index)
    return older if older.done("pair") is not None else None


def _window(arm: Arm) -> tuple[int, float]:
    """k and the decay of an arm whose source is its history."""
    source = arm.settings.source
    if not isinstance(source, SourceSpec) or source.history is None:
        raise ValueError(f"{arm.label}: source {source} is no history")
    return source.history, source.decay
