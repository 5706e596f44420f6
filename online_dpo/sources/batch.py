"""Answers, their verdicts and pairs that belong together, and several of these put together into one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from online_dpo.records import read_candidates, read_pairs, read_verdicts
from online_dpo.store import RoundFolder
from online_dpo.types import Abstain, Candidate, Pair, Prompt, Verdict

Key = tuple[str, int]
"""An answer: its prompt's id and its index."""
Item = TypeVar("Item", Candidate, Verdict | Abstain)


@dataclass(frozen=True, slots=True)
class Batch:
    """Candidates with one verdict or abstention each, and pairs of them."""

    candidates: tuple[Candidate, ...]
    verdicts: tuple[Verdict | Abstain, ...]
    pairs: tuple[Pair, ...]

    def of_pairs(self, pairs: Sequence[Pair]) -> Batch:
        """`pairs`, which are of this batch, and nothing but the answers in them."""
        used = {_key(answer) for pair in pairs for answer in (pair.chosen, pair.rejected)}
        return replace(self._where(lambda answer: _key(answer) in used), pairs=tuple(pairs))

    def of_prompts(self, prompt_ids: Collection[str]) -> Batch:
        """What belongs to these prompts."""
        kept = self._where(lambda answer: answer.prompt_id in prompt_ids)
        return replace(kept, pairs=tuple(pair for pair in self.pairs if pair.prompt.id in prompt_ids))

    def _where(self, wanted: Callable[[Candidate | Verdict | Abstain], bool]) -> Batch:
        candidates = tuple(candidate for candidate in self.candidates if wanted(candidate))
        return Batch(candidates, tuple(verdict for verdict in self.verdicts if wanted(verdict)), self.pairs)


def read_batch(folder: RoundFolder, prompts: Mapping[str, Prompt]) -> Batch:
    """What the stages sample, judge and pair left in `folder` for `prompts` (by id), held against their records."""
    for stage in ("sample", "judge", "pair"):
        folder.trust(stage)
    candidates = read_candidates(folder.path / "candidates.parquet")
    verdicts = read_verdicts(folder.path / "verdicts.parquet")
    pairs = read_pairs(folder.path / "pairs.parquet", prompts, candidates, other_prompts=True)
    return Batch(tuple(candidates), tuple(verdicts), tuple(pairs)).of_prompts(prompts)


def put_together(batches: Sequence[Batch]) -> Batch:
    """All of `batches` in their order.

    Where an earlier batch has answers to the same prompt, a later one's get indices after those; nothing else of an
    answer changes: its tokens and log-probs stay what was sampled.
    """
    used: dict[str, int] = {}
    candidates: list[Candidate] = []
    verdicts: list[Verdict | Abstain] = []
    pairs: list[Pair] = []
    for batch in batches:
        first = dict(used)
        moved = {_key(answer): _moved(answer, first) for answer in batch.candidates}
        candidates += moved.values()
        verdicts += [_moved(verdict, first) for verdict in batch.verdicts]
        pairs += [
            replace(pair, chosen=moved[_key(pair.chosen)], rejected=moved[_key(pair.rejected)]) for pair in batch.pairs
        ]
        for answer in moved.values():
            used[answer.prompt_id] = max(used.get(answer.prompt_id, 0), answer.index + 1)
    return Batch(tuple(candidates), tuple(verdicts), tuple(pairs))


def _moved(item: Item, first: Mapping[str, int]) -> Item:
    """`item` with its index counted from the first free one of its prompt."""
    return replace(item, index=item.index + first.get(item.prompt_id, 0))


def _key(item: Candidate | Verdict | Abstain) -> Key:
    return item.prompt_id, item.index
