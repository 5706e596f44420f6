"""Verdicts become pairs. Pure: the same input gives the same pairs, in any order of the candidates.

Random choices are read from a SHA-256 of the seed and the prompt's id, so a prompt's pairs do not depend on which
other prompts are in the round (but for the budget, which compares pairs of all prompts).
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from online_dpo.config import PairingSpec
from online_dpo.errors import DataError
from online_dpo.types import Abstain, Candidate, Pair, Prompt, Verdict

DROP_REASONS = ("too_few", "tie", "identical_text", "below_margin", "over_budget")


@dataclass(frozen=True, slots=True)
class Scored:
    """A judged candidate and its score."""

    candidate: Candidate
    score: float


@dataclass(frozen=True)
class PairingResult:
    """The round's pairs, and how many proposals were dropped for each of `DROP_REASONS` (those that occurred).

    `kept` plus all of `dropped` is the number of pairs that the rule proposed, one being counted as `too_few` for
    each prompt on which it could propose none.
    """

    pairs: tuple[Pair, ...]
    dropped: dict[str, int]

    @property
    def kept(self) -> int:
        """How many pairs there are."""
        return len(self.pairs)


def make_pairs(
    prompts: Mapping[str, Prompt],
    candidates: Sequence[Candidate],
    verdicts: Sequence[Verdict | Abstain],
    spec: PairingSpec,
    seed: int,
) -> PairingResult:
    """The pairs that `spec` makes of the judged candidates, in the order of `prompts`.

    A prompt of `prompts` without any candidate is passed over. Raises `DataError` when a candidate has no verdict,
    stands twice, or belongs to no prompt.
    """
    pairs, drops = propose_pairs(prompts, candidates, verdicts, spec, seed)
    within = within_budget(pairs, spec.max_pairs, seed)
    drops["over_budget"] += len(pairs) - len(within)
    return PairingResult(tuple(within), named_drops(drops))


def propose_pairs(
    prompts: Mapping[str, Prompt],
    candidates: Sequence[Candidate],
    verdicts: Sequence[Verdict | Abstain],
    spec: PairingSpec,
    seed: int,
) -> tuple[list[Pair], Counter[str]]:
    """As `make_pairs`, whatever the budget: that needs all prompts' pairs, the rest one prompt's answers."""
    judged = judged_answers(prompts, candidates, verdicts)
    pairs: list[Pair] = []
    drops: Counter[str] = Counter()
    for prompt_id, prompt in prompts.items():
        if prompt_id not in judged:
            continue
        if len(judged[prompt_id]) < 2:
            drops["too_few"] += 1
            continue
        for better, worse in _proposals(judged[prompt_id], spec, seed, prompt_id):
            reason = _fault(better, worse, spec.min_margin)
            if reason is None:
                pairs.append(Pair(prompt, better.candidate, worse.candidate, better.score, worse.score))
            else:
                drops[reason] += 1
    return pairs, drops


def named_drops(drops: Mapping[str, int]) -> dict[str, int]:
    """Those that occurred, in the order of `DROP_REASONS`."""
    return {reason: drops[reason] for reason in DROP_REASONS if drops.get(reason)}


def judged_answers(
    prompts: Mapping[str, Prompt], candidates: Sequence[Candidate], verdicts: Sequence[Verdict | Abstain]
) -> dict[str, list[Scored]]:
    """Each prompt's candidates that have a score, by index; an empty list where all abstained.

    Raises `DataError` when a candidate has no verdict, stands twice, or belongs to no prompt.
    """
    found = {(verdict.prompt_id, verdict.index): verdict for verdict in verdicts}
    seen: set[tuple[str, int]] = set()
    judged: dict[str, list[Scored]] = {}
    for candidate in candidates:
        key = (candidate.prompt_id, candidate.index)
        for wrong, fault in (
            (candidate.prompt_id not in prompts, "belongs to no prompt of the round"),
            (key in seen, "stands twice"),
            (key not in found, "has no verdict"),
        ):
            if wrong:
                raise DataError(f"candidate {candidate.index} of prompt '{candidate.prompt_id}' {fault}")
        seen.add(key)
        scores = judged.setdefault(candidate.prompt_id, [])
        verdict = found[key]
        if isinstance(verdict, Verdict):
            scores.append(Scored(candidate, verdict.score))
    for scores in judged.values():
        scores.sort(key=lambda scored: scored.candidate.index)
    return judged


def _proposals(judged: list[Scored], spec: PairingSpec, seed: int, prompt_id: str) -> Iterator[tuple[Scored, Scored]]:
    """What the rule proposes for one prompt as (better, worse); `judged` has two or more, sorted by index.

    The sorts are stable, so that of equal scores the lowest index comes first.
    """
    best = sorted(judged, key=lambda scored: -scored.score)
    worst = sorted(judged, key=lambda scored: scored.score)
    if spec.rule == "best_vs_worst":
        yield best[0], worst[0]
    elif spec.rule == "best_vs_random":
        others = [scored for scored in judged if scored is not best[0]]
        yield best[0], others[_draw(len(others), seed, "opponent", prompt_id)]
    elif spec.rule == "random":
        first = _draw(len(judged), seed, "first", prompt_id)
        second = _draw(len(judged) - 1, seed, "second", prompt_id)
        yield _ordered(judged[first], judged[second + (second >= first)])
    elif spec.rule == "all_pairs":
        yield from (_ordered(first, second) for first, second in combinations(judged, 2))
    else:  # top_k; past the middle the "best" would be the worse of the two
        yield from zip(best[: min(spec.k, len(judged) // 2)], worst, strict=False)


def _ordered(first: Scored, second: Scored) -> tuple[Scored, Scored]:
    return (first, second) if first.score >= second.score else (second, first)


def _fault(better: Scored, worse: Scored, min_margin: float) -> str | None:
    """Why the proposal makes no pair: the first of the reasons that holds, None when none does."""
    if better.score == worse.score:
        return "tie"
    one, other = better.candidate, worse.candidate
    if one.text == other.text or one.token_ids == other.token_ids:
        return "identical_text"
    if better.score - worse.score < min_margin:
        return "below_margin"
    return None


class Budget:
    """Which of a round's pairs are within `most` (None: all), drawn without replacement: the smallest lots, which are a
    hash of seed and pair. Pairs come one after another; what is kept of them is `most` lots."""

    def __init__(self, most: int | None, seed: int) -> None:
        self.most = most
        self.seed = seed
        self.count = 0
        self._drawn: list[tuple[int, int]] = []
        """A heap of the negative lots and places: the largest lot first."""

    def add(self, pair: Pair) -> None:
        """One more pair."""
        if self.most is not None:
            lot = _hash(self.seed, "budget", pair.prompt.id, str(pair.chosen.index), str(pair.rejected.index))
            entry = (-int.from_bytes(lot, "big"), -self.count)
            if len(self._drawn) < self.most:
                heapq.heappush(self._drawn, entry)
            elif self.most:
                heapq.heappushpop(self._drawn, entry)
        self.count += 1

    @property
    def over(self) -> int:
        """How many pairs are too many."""
        return 0 if self.most is None else max(0, self.count - self.most)

    def places(self) -> list[int]:
        """The places of the pairs that are kept, ascending."""
        return sorted(-place for _, place in self._drawn) if self.over else list(range(self.count))


def within_budget(pairs: list[Pair], most: int | None, seed: int) -> list[Pair]:
    """At most `most` of the pairs, drawn without replacement, in the order that they had."""
    budget = Budget(most, seed)
    for pair in pairs:
        budget.add(pair)
    return [pairs[place] for place in budget.places()]


def _draw(n: int, seed: int, purpose: str, prompt_id: str) -> int:
    """A uniform choice from range(n) that depends on the arguments alone."""
    return int.from_bytes(_hash(seed, purpose, prompt_id), "big") % n


def _hash(seed: int, *words: str) -> bytes:
    # Python's hash() changes from process to process, and `random` may change between Python versions. The zero
    # byte keeps ("a", "bc") and ("ab", "c") apart.
    return hashlib.sha256("\0".join((str(seed), *words)).encode()).digest()
