"""A judge as the framework asks it: both orders, batches, threads, cache, abstentions, ledger."""

from __future__ import annotations

import hashlib
import math
import numbers
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from online_dpo.config import ComparingSpec
from online_dpo.errors import JudgeError, OnlineDPOError, one_line
from online_dpo.judging.cache import Answer, VerdictCache, answer_key
from online_dpo.judging.calling import call_all
from online_dpo.judging.interface import (
    Abstention,
    BaseJudge,
    Comparison,
    Item,
    Judge,
    LiveModel,
    Opinion,
    PairwiseJudge,
    PointwiseJudge,
)
from online_dpo.judging.ranking import Outcomes, Place, next_comparisons, strengths
from online_dpo.types import Candidate, Prompt

DECLINED = Abstention("judge declined")
ALONE = Abstention("no other candidate to compare with")
APART = Abstention("too few comparisons to place it")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Asking:
    """How judges are asked. `limit_s`: the longest that one call may take; `budget`: what all calls may cost in sum,
    by the ledger's items (`cost`, `tokens`, `calls`)."""

    cache: VerdictCache | None = None
    comparing: ComparingSpec = field(default_factory=ComparingSpec)
    limit_s: float | None = None
    budget: Mapping[str, float] | None = None


@dataclass(frozen=True, slots=True)
class Compared:
    """What a pairwise judge said of candidates `first` < `second` of one prompt, in both orders.

    `there` is its answer for (first, second), `back` for (second, first); `back` is None where one order is enough.
    """

    first: int
    second: int
    there: Answer
    back: Answer | None

    def swapped(self) -> bool | None:
        """Whether the verdict went with the place and not with the answer; None where that cannot be said."""
        if not isinstance(self.there, Opinion) or not isinstance(self.back, Opinion):
            return None
        return (self.there.value - 0.5) * (self.back.value - 0.5) > 0.0

    def outcome(self, disagreement: str) -> float | Abstention:
        """The probability that `first` is better: (p + 1 − q)/2, which cancels a preference for either place.

        One order alone would let that preference in: both were answered, or it is an abstention.
        """
        if isinstance(self.there, Abstention):
            return self.there
        if self.back is None:
            return self.there.value
        if isinstance(self.back, Abstention):
            return self.back
        if self.swapped() and disagreement != "average":
            return 0.5 if disagreement == "tie" else Abstention("the two orders disagree")
        return (self.there.value + 1.0 - self.back.value) / 2.0


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
        self.amounts: Counter[str] = Counter()

    @property
    def pairwise(self) -> bool:
        """Whether the judge compares; else it scores."""
        return isinstance(self.judge, PairwiseJudge)

    @property
    def batch(self) -> int | None:
        """How many prompts, or comparisons, one call takes; None: as many as there are."""
        if isinstance(self.judge, PairwiseJudge):
            return self._whole("batch_comparisons", self.judge.batch_comparisons, may_be_none=True)
        return self._whole("batch_prompts", self.judge.batch_prompts, may_be_none=True)

    @property
    def concurrent(self) -> int:
        """How many calls run at once."""
        return self._whole("concurrent", self.judge.concurrent, may_be_none=False) or 1

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
        if self.judge.uses_policy:
            self.policy = policy
            self.judge.attach(model)

    def take_ledger(self) -> dict[str, float]:
        """What was spent since the last call, those it is made of included.

        `asked`: scores or comparisons that the judge was asked for; `cached`: those that were on disk.
        """
        amounts = Counter(self.amounts)
        self.amounts.clear()
        for judge in self.inner:
            amounts.update(judge.take_ledger())
        return dict(amounts)

    # --- scoring ---

    def scores(self, items: Sequence[Item]) -> list[list[Answer]]:
        """One answer a candidate of each item. A pairwise judge's scores are the strengths of its comparisons."""
        if not isinstance(self.judge, PairwiseJudge):
            return self._pointwise(self.judge, items)
        return [
            self._strengths(len(candidates), row)
            for (_, candidates), row in zip(items, self.comparisons(items), strict=True)
        ]

    def _pointwise(self, judge: PointwiseJudge, items: Sequence[Item]) -> list[list[Answer]]:
        """Units of asking are single candidates where the judge sees each alone, else an item's candidates."""
        units: list[tuple[int, tuple[int, ...]]] = []
        for number, (_, candidates) in enumerate(items):
            places = range(len(candidates))
            units += [(number, group) for group in ([(i,) for i in places] if judge.each_alone else [tuple(places)])]
        keys = [self._key(items[number][0], [items[number][1][i] for i in group]) for number, group in units]
        known = self._find(keys)
        said: dict[tuple[int, int], Answer] = {}
        missing: dict[int, list[tuple[int, tuple[int, ...], bytes]]] = {}
        for (number, group), key in zip(units, keys, strict=True):
            if key in known:
                said.update(((number, i), answer) for i, answer in zip(group, known[key], strict=True))
            else:
                missing.setdefault(number, []).append((number, group, key))
        self._count(sum(len(group) for groups in missing.values() for _, group, _ in groups), len(said))

        def call(batch: list[int]) -> list[list[Answer]]:
            asked: list[Item] = [
                (items[n][0], [items[n][1][i] for _, group, _ in missing[n] for i in group]) for n in batch
            ]
            return [[_answer(value) for value in row] for row in self._ask_scores(judge, asked)]

        tasks = list(_batches(list(missing), self.batch))
        for batch, rows in self._call_all(tasks, call, lambda batch: items[batch[0]][0].id):
            kept: list[tuple[bytes, list[Answer]]] = []
            for number, row in zip(batch, rows, strict=True):
                answers = iter(row)
                for _, group, key in missing[number]:
                    own = [next(answers) for _ in group]
                    said.update(((number, i), answer) for i, answer in zip(group, own, strict=True))
                    kept.append((key, own))
            self._keep(kept, items[batch[0]][0])
        return [[said[number, i] for i in range(len(candidates))] for number, (_, candidates) in enumerate(items)]

    def _ask_scores(self, judge: PointwiseJudge, items: list[Item]) -> list[list[Any]]:
        """The judge's raw answers, one list per item, each as long as the item's candidates."""
        try:
            rows = self._as_list(judge.score_batch(items), items[0][0], len(items), "lists of scores")
            return [
                self._as_list(row, prompt, len(candidates), "scores")
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
        keys = [self._key(prompt, [first, second]) for prompt, first, second in comparisons]
        known = self._find(keys)
        said: dict[int, Answer] = {place: known[key][0] for place, key in enumerate(keys) if key in known}
        missing = [place for place in range(len(comparisons)) if place not in said]
        self._count(len(missing), len(said))

        def call(batch: list[int]) -> list[Answer]:
            return self._ask_preferences(judge, [comparisons[place] for place in batch])

        tasks = list(_batches(missing, self.batch))
        for batch, answers in self._call_all(tasks, call, lambda batch: comparisons[batch[0]][0].id):
            said.update(zip(batch, answers, strict=True))
            rows = [(keys[place], [answer]) for place, answer in zip(batch, answers, strict=True)]
            self._keep(rows, comparisons[batch[0]][0])
        return [said[place] for place in range(len(comparisons))]

    def _ask_preferences(self, judge: PairwiseJudge, comparisons: list[Comparison]) -> list[Answer]:
        try:
            raw = judge.prefer_batch(comparisons)
            row = self._as_list(raw, comparisons[0][0], len(comparisons), "probabilities")
        except OnlineDPOError:
            raise
        except Exception as error:
            if len(comparisons) > 1:
                return [answer for one in comparisons for answer in self._ask_preferences(judge, [one])]
            return [Abstention(one_line(error), passing=True)]
        return [_probability(value) for value in row]

    def _outcomes(self, found: Mapping[Place, Compared]) -> Outcomes:
        outcomes = {place: compared.outcome(self._disagreement) for place, compared in found.items()}
        return {place: None if isinstance(p, Abstention) else p for place, p in outcomes.items()}

    @property
    def _disagreement(self) -> str:
        return self.judge.disagreement if isinstance(self.judge, PairwiseJudge) else "average"

    def _strengths(self, n: int, compared: Sequence[Compared]) -> list[Answer]:
        outcomes = self._outcomes({(row.first, row.second): row for row in compared})
        faults: dict[int, Abstention] = {}
        for row in compared:
            outcome = row.outcome(self._disagreement)
            if isinstance(outcome, Abstention):
                faults.setdefault(row.first, outcome)
                faults.setdefault(row.second, outcome)
        values = strengths(n, outcomes, self.asking.comparing)
        other = ALONE if n < 2 else APART
        return [faults.get(i, other) if value is None else Opinion(value) for i, value in enumerate(values)]

    # --- asking ---

    def _call_all(
        self, tasks: list[list[int]], call: Callable[[list[int]], T], first_prompt: Callable[[list[int]], str]
    ) -> Iterator[tuple[list[int], T]]:
        if tasks:
            self._check_budget(first_prompt(tasks[0]))
        # A judge made of judges waits for them: the limit is theirs.
        limit = None if self.inner else self.asking.limit_s
        yield from call_all(
            tasks,
            call,
            concurrent=self.concurrent,
            limit_s=limit,
            name=lambda batch: f"judge '{self.name}' at prompt '{first_prompt(batch)}'",
        )

    def _as_list(self, answer: Any, prompt: Prompt, wanted: int, noun: str) -> list[Any]:
        """`answer` as a list of `wanted` things; `JudgeError` when it is not that many, or no sequence."""
        asked = f"judge '{self.name}' at prompt '{prompt.id}'"
        if isinstance(answer, str | bytes | Mapping) or not hasattr(answer, "__iter__"):
            raise JudgeError(f"{asked}: returned {type(answer).__name__} instead of {wanted} {noun}")
        values = list(answer)
        if len(values) != wanted:
            raise JudgeError(f"{asked}: returned {len(values)} {noun} instead of {wanted}")
        return values

    def _key(self, prompt: Prompt, candidates: Sequence[Candidate]) -> bytes:
        if self._cache is None:
            return b""
        digest = hashlib.sha256(f"{self.digest}\n{self.policy}".encode()).hexdigest() if self.policy else self.digest
        return answer_key(digest, prompt, candidates)

    @property
    def _cache(self) -> VerdictCache | None:
        return self.asking.cache if self.digest and self.judge.cached else None

    def _find(self, keys: Sequence[bytes]) -> dict[bytes, list[Answer]]:
        return self._cache.find(keys) if self._cache is not None else {}

    def _count(self, asked: int, cached: int) -> None:
        self.amounts.update({"asked": asked, "cached": cached})

    def _keep(self, rows: list[tuple[bytes, list[Answer]]], prompt: Prompt) -> None:
        """Store answers with what they cost, then see whether that was too much."""
        spent = self.judge.ledger()
        self.amounts.update(spent)
        if self._cache is not None:
            self._cache.keep(rows, self.digest, spent)
        self._check_budget(prompt.id)

    def _check_budget(self, prompt_id: str) -> None:
        """`JudgeError` when what all judges spent, in this and earlier processes, reaches the budget."""
        if not self.asking.budget or type(self.judge).ledger is BaseJudge.ledger:
            return
        so_far = self.asking.cache.spent() if self.asking.cache is not None else dict(self.amounts)
        for item, most in self.asking.budget.items():
            if so_far.get(item, 0.0) >= most:
                raise JudgeError(
                    f"judge '{self.name}' at prompt '{prompt_id}': the budget is used up: {item} {so_far[item]:g} of "
                    f"{most:g}; what was judged is kept: raise judge_budget.{item} and run again"
                )


def _batches(places: list[int], size: int | None) -> Iterator[list[int]]:
    if places:
        step = len(places) if size is None else size
        for start in range(0, len(places), step):
            yield places[start : start + step]


def _answer(value: Any) -> Answer:
    """`value` as a finite number with its details, or why it is none. Numbers of numpy and torch count; text never."""
    if value is None:
        return DECLINED
    if isinstance(value, Abstention):
        return value
    details: Mapping[str, Any] = {}
    if isinstance(value, Opinion):
        value, details = value.value, value.details
    if not isinstance(value, numbers.Real) and getattr(value, "ndim", None) == 0:
        value = value.item()  # a numpy or torch scalar
    if not isinstance(value, numbers.Real):
        return Abstention(f"returned {type(value).__name__}, not a number")
    try:
        number = float(value)
    except OverflowError:
        return Abstention("returned a number too large for a float")
    return Opinion(number, details) if math.isfinite(number) else Abstention(f"returned {number}")


def _probability(value: Any) -> Answer:
    answer = _answer(value)
    if isinstance(answer, Opinion) and not 0.0 <= answer.value <= 1.0:
        return Abstention("returned a number outside [0, 1]")
    return answer
