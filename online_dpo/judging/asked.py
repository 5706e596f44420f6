"""A judge as the framework asks it: both orders, batches, threads, cache, abstentions, ledger."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from online_dpo.config import ComparingSpec
from online_dpo.errors import JudgeError, OnlineDPOError, one_line
from online_dpo.judging.answers import Answer, mean_numbers, read_list, read_probability, read_score
from online_dpo.judging.cache import VerdictCache, answer_key
from online_dpo.judging.calling import call_all
from online_dpo.judging.compared import Compared
from online_dpo.judging.interface import (
    Abstention,
    Comparison,
    Item,
    Judge,
    LiveModel,
    Opinion,
    PairwiseJudge,
    PointwiseJudge,
)
from online_dpo.judging.ranking import Outcomes, Place, next_comparisons, strengths
from online_dpo.judging.spending import Spending
from online_dpo.types import Prompt

ALONE = Abstention("no other candidate to compare with")
APART = Abstention("too few comparisons to place it")
Group: TypeAlias = tuple[int, ...]
"""Candidates of one item that are asked for together, by their places."""
Rows: TypeAlias = list[tuple[bytes, list[Answer]]]
"""Keys with what was said."""


@dataclass(frozen=True, slots=True)
class Asking:
    """How judges are asked. `limit_s`: the longest that one call may take; `budget`: what all calls may cost in sum,
    by the ledger's items (`cost`, `tokens`, `calls`)."""

    cache: VerdictCache | None = None
    comparing: ComparingSpec = field(default_factory=ComparingSpec)
    limit_s: float | None = None
    budget: Mapping[str, float] | None = None


class AskedJudge:
    """Wraps a judge; this is also what a judge made of judges gets for each of them."""

    def __init__(
        self,
        judge: Judge,
        name: str,
        *,
        digest: str = "",
        asking: Asking | None = None,
        inner: Sequence[AskedJudge] = (),
    ) -> None:
        """`digest` names the judge in the cache (empty: no cache). `inner`: the judges that `judge` is made of."""
        self.judge = judge
        self.name = name
        self.digest = digest
        self.asking = asking or Asking()
        self.inner = tuple(inner)
        self.policy = ""
        self.spending = Spending(judge, name, digest or name, self.asking.cache, self.asking.budget or {})

    @property
    def pairwise(self) -> bool:
        """Whether the judge compares; else it scores."""
        return isinstance(self.judge, PairwiseJudge)

    @property
    def relative(self) -> bool:
        """Whether an answer's score means something only beside another's."""
        return self.pairwise or self.judge.relative or any(judge.relative for judge in self.inner)

    @property
    def batch(self) -> int | None:
        """How many prompts, or comparisons, one call takes; None: as many as there are."""
        if isinstance(self.judge, PairwiseJudge):
            return self._whole("batch_comparisons", self.judge.batch_comparisons, may_be_none=True)
        return self._whole("batch_prompts", self.judge.batch_prompts, may_be_none=True)

    @property
    def _one_by_one(self) -> bool:
        """Whether the candidates of a prompt are calls of their own: a call that fails then loses no other's answer."""
        alone = isinstance(self.judge, PointwiseJudge) and self.judge.each_alone
        return alone and self.concurrent > 1 and self.batch == 1

    @property
    def concurrent(self) -> int:
        """How many calls run at once. A judge made of judges is asked one by one: the threads are theirs."""
        return 1 if self.inner else self._whole("concurrent", self.judge.concurrent, may_be_none=False) or 1

    @property
    def waits(self) -> bool:
        """Whether it, or a judge that it is made of, mostly waits for a network: it takes several calls at once."""
        return self.concurrent > 1 or any(judge.waits for judge in self.inner)

    def _whole(self, key: str, value: Any, *, may_be_none: bool) -> int | None:
        """A number that the judge's author set, checked."""
        if value is None and may_be_none:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise JudgeError(f"judge '{self.name}': {key} must be a whole number from 1, found {value!r}")
        return value

    @property
    def uses_policy(self) -> bool:
        """Whether this judge, or one that it is made of, asks the round's source policy."""
        return self.judge.uses_policy or any(judge.uses_policy for judge in self.inner)

    def attach(self, model: LiveModel, policy: str) -> None:
        """Give the source policy (`policy` is its digest) to the judges that ask it."""
        for judge in self.inner:
            judge.attach(model, policy)
        if self.uses_policy:
            self.policy = policy
        if self.judge.uses_policy:
            self.judge.attach(model)

    def take_ledger(self) -> dict[str, float]:
        """What was spent since the last call, those it is made of included.

        `asked`: scores or comparisons that the judge was asked for; `cached`: those that were known from before.
        """
        amounts = self.spending.take()
        for judge in self.inner:
            amounts.update(judge.take_ledger())
        return dict(amounts)

    # --- scoring ---

    def scores(self, items: Sequence[Item]) -> list[list[Answer]]:
        """One answer a candidate of each item. A pairwise judge's scores are the strengths of its comparisons.

        Their details are the means of the numeric details of the comparisons that the candidate was in.
        """
        if not isinstance(self.judge, PairwiseJudge):
            return self._pointwise(self.judge, items)
        return [
            self._strengths(len(candidates), row)
            for (_, candidates), row in zip(items, self.comparisons(items), strict=True)
        ]

    def _pointwise(self, judge: PointwiseJudge, items: Sequence[Item]) -> list[list[Answer]]:
        """Single candidates are asked for where the judge sees each alone, else all of an item together."""
        units: list[tuple[int, Group]] = []
        for number, (_, candidates) in enumerate(items):
            places = range(len(candidates))
            units += [(number, (i,)) for i in places] if judge.each_alone else [(number, tuple(places))]
        keys = self._keys([(items[number][0], [items[number][1][i] for i in group]) for number, group in units])
        said = self._find(keys)
        missing: dict[tuple[int, Group | None], dict[bytes, Group]] = {}
        seen = set(said)
        for (number, group), key in zip(units, keys, strict=True):
            if key not in seen:
                seen.add(key)
                missing.setdefault((number, group if self._one_by_one else None), {})[key] = group
        questions = [(number, groups) for (number, _), groups in missing.items()]
        asked = sum(len(group) for _, groups in questions for group in groups.values())
        self.spending.count(asked, sum(len(group) for _, group in units) - asked)

        def call(batch: list[int]) -> Rows:
            parts = [questions[place] for place in batch]
            batch_items: list[Item] = [
                (items[number][0], [items[number][1][i] for group in groups.values() for i in group])
                for number, groups in parts
            ]
            rows: Rows = []
            for (_, groups), raw in zip(parts, self._ask_scores(judge, batch_items), strict=True):
                answers = iter(raw)
                rows += [(key, [read_score(next(answers)) for _ in group]) for key, group in groups.items()]
            return rows

        said |= self._ask_all(list(range(len(questions))), call, lambda place: items[questions[place][0]][0].id)
        found: list[list[Answer]] = [[] for _ in items]
        for (number, _), key in zip(units, keys, strict=True):
            found[number] += said[key]
        return found

    def _ask_scores(self, judge: PointwiseJudge, items: list[Item]) -> list[list[Any]]:
        """The judge's raw answers, one list per item, each as long as the item's candidates."""
        try:
            rows = read_list(judge.score_batch(items), len(items), "lists of scores", self._at(items[0][0]))
            return [
                read_list(row, len(candidates), "scores", self._at(prompt))
                for row, (prompt, candidates) in zip(rows, items, strict=True)
            ]
        except OnlineDPOError:
            raise
        except Exception as error:
            if len(items) > 1:  # one bad prompt must not make its neighbours abstain: ask for each alone
                return [row for item in items for row in self._ask_scores(judge, [item])]
            return [[Abstention(one_line(error), passing=True)] * len(items[0][1])]

    # --- comparing ---

    def comparisons(self, items: Sequence[Item]) -> list[list[Compared]]:
        """What the judge says of each item's candidates, by the schedule; `JudgeError` where it does not compare."""
        if not isinstance(self.judge, PairwiseJudge):
            raise JudgeError(f"judge '{self.name}' scores, it does not compare")
        found: list[dict[Place, Compared]] = [{} for _ in items]
        while True:
            wave = [
                (number, place)
                for number, (_, candidates) in enumerate(items)
                for place in next_comparisons(len(candidates), self.asking.comparing, self._outcomes(found[number]))
            ]
            if not wave:
                return [list(row.values()) for row in found]
            for (number, place), compared in zip(wave, self._compare(self.judge, items, wave), strict=True):
                found[number][place] = compared

    def _compare(
        self, judge: PairwiseJudge, items: Sequence[Item], wave: Sequence[tuple[int, Place]]
    ) -> list[Compared]:
        asked: list[Comparison] = []
        for number, (i, j) in wave:
            prompt, candidates = items[number]
            asked.append((prompt, candidates[i], candidates[j]))
            if judge.both_orders:
                asked.append((prompt, candidates[j], candidates[i]))
        answers = iter(self.prefer(asked))
        return [Compared(i, j, next(answers), next(answers) if judge.both_orders else None) for _, (i, j) in wave]

    def prefer(self, comparisons: Sequence[Comparison]) -> list[Answer]:
        """The judge's answers to comparisons, in their order: from the cache, or asked for in batches."""
        if not isinstance(self.judge, PairwiseJudge):
            raise JudgeError(f"judge '{self.name}' scores, it does not compare")
        judge = self.judge
        keys = self._keys([(prompt, [first, second]) for prompt, first, second in comparisons])
        said = self._find(keys)
        missing = {key: place for place, key in reversed(list(enumerate(keys))) if key not in said}
        places = sorted(missing.values())
        self.spending.count(len(places), len(keys) - len(places))

        def call(batch: list[int]) -> Rows:
            answers = self._ask_preferences(judge, [comparisons[place] for place in batch])
            return [(keys[place], [read_probability(answer)]) for place, answer in zip(batch, answers, strict=True)]

        said |= self._ask_all(places, call, lambda place: comparisons[place][0].id)
        return [said[key][0] for key in keys]

    def _ask_preferences(self, judge: PairwiseJudge, comparisons: list[Comparison]) -> list[Any]:
        """The judge's raw answers, one a comparison."""
        try:
            raw = judge.prefer_batch(comparisons)
            return read_list(raw, len(comparisons), "probabilities", self._at(comparisons[0][0]))
        except OnlineDPOError:
            raise
        except Exception as error:
            if len(comparisons) > 1:
                return [answer for one in comparisons for answer in self._ask_preferences(judge, [one])]
            return [Abstention(one_line(error), passing=True)]

    def _outcomes(self, found: Mapping[Place, Compared]) -> Outcomes:
        outcomes = {place: self.outcome(compared) for place, compared in found.items()}
        return {place: None if isinstance(p, Abstention) else p for place, p in outcomes.items()}

    def outcome(self, compared: Compared) -> float | Abstention:
        """The probability that the first of two is better, by the judge's own rule for orders that disagree."""
        return compared.outcome(self.judge.disagreement if isinstance(self.judge, PairwiseJudge) else "average")

    def _strengths(self, n: int, compared: Sequence[Compared]) -> list[Answer]:
        outcomes = self._outcomes({(row.first, row.second): row for row in compared})
        faults: dict[int, Abstention] = {}
        for row in compared:
            outcome = self.outcome(row)
            if isinstance(outcome, Abstention):
                faults.setdefault(row.first, outcome)
                faults.setdefault(row.second, outcome)
        values = strengths(n, outcomes, self.asking.comparing)
        other = ALONE if n < 2 else APART
        return [
            faults.get(i, other) if value is None else Opinion(value, _details_of(i, compared))
            for i, value in enumerate(values)
        ]

    # --- asking ---

    def _ask_all(
        self, missing: list[int], call: Callable[[list[int]], Rows], prompt_id: Callable[[int], str]
    ) -> dict[bytes, list[Answer]]:
        """The answers to what is `missing`; each call's are kept as it ends, and what a failed one has cost."""
        said: dict[bytes, list[Answer]] = {}
        calls = call_all(
            list(_batches(missing, self.batch)),
            call,
            concurrent=self.concurrent,
            # A judge made of judges waits for them: the limit is theirs.
            limit_s=None if self.inner else self.asking.limit_s,
            name=lambda batch: f"judge '{self.name}' at prompt '{prompt_id(batch[0])}'",
            check=lambda batch: self.spending.check(prompt_id(batch[0])),
        )
        try:
            for _, rows in calls:
                said.update(rows)
                self.spending.keep(rows if self._cached else [])
        except BaseException:
            self.spending.keep([])
            raise
        return said

    def _at(self, prompt: Prompt) -> str:
        return f"judge '{self.name}' at prompt '{prompt.id}'"

    @property
    def _cached(self) -> bool:
        return self.asking.cache is not None and bool(self.digest) and self.judge.cached

    def _keys(self, asked: Sequence[Item]) -> list[bytes]:
        """What tells one question from another. Where answers are not kept, no two are taken for the same."""
        if not self._cached:
            return [str(place).encode() for place in range(len(asked))]
        if self.uses_policy and not self.policy:
            raise JudgeError(f"judge '{self.name}' asks the round's source policy, and was given none")
        digest = hashlib.sha256(f"{self.digest}\n{self.policy}".encode()).hexdigest() if self.policy else self.digest
        return [answer_key(digest, prompt, candidates) for prompt, candidates in asked]

    def _find(self, keys: Sequence[bytes]) -> dict[bytes, list[Answer]]:
        return self.asking.cache.find(keys) if self._cached and self.asking.cache is not None else {}


def _batches(places: list[int], size: int | None) -> Iterator[list[int]]:
    if places:
        step = len(places) if size is None else size
        for start in range(0, len(places), step):
            yield places[start : start + step]


def _details_of(candidate: int, compared: Sequence[Compared]) -> dict[str, float]:
    """The means of the numeric details of a candidate's comparisons, both orders."""
    said = [answer for row in compared if candidate in (row.first, row.second) for answer in (row.there, row.back)]
    return mean_numbers(answer.details for answer in said if isinstance(answer, Opinion))
