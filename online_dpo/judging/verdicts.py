"""A round's candidates get their verdicts."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from online_dpo.errors import DataError, JudgeError
from online_dpo.judging.answers import Answer, mean_numbers
from online_dpo.judging.asked import AskedJudge
from online_dpo.judging.interface import Abstention, Item, PairwiseJudge
from online_dpo.judging.kinds import as_judge, judge_name
from online_dpo.judging.ranking import schedule_size
from online_dpo.types import Abstain, Candidate, Prompt, Verdict

REASONS_SHOWN = 5
ROUNDING = 1e-6
"""0.29 · 100 is a little less than 29, and 29 of 100 are allowed all the same."""
ROUNDS_OF_CALLS = 8
"""Calls that each thread makes between two looks at the abstentions: enough to keep all threads busy."""


def as_asked(judge: object) -> AskedJudge:
    """`judge` itself where it is an `AskedJudge`; else it is wrapped, without a cache."""
    return judge if isinstance(judge, AskedJudge) else AskedJudge(as_judge(judge), judge_name(judge))


class Abstained:
    """How many of a judge's answers were abstentions, and why: what grows is the reasons, not the answers."""

    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()
        self.count = 0
        self._first = ""

    def add(self, prompt_id: str, reason: str) -> None:
        """One abstained at a prompt."""
        self._first = self._first if self.count else prompt_id
        self.count += 1
        self.reasons[reason] += 1

    def check(self, asked: AskedJudge, done: int, total: int, max_abstain: float) -> None:
        """`JudgeError` as soon as `total` cannot stay within the share `max_abstain`: judge calls may cost money."""
        if self.count <= max_abstain * total + ROUNDING:
            return
        reasons = dict(self.reasons.most_common())
        shown = "; ".join(f"{reason} ({count})" for reason, count in itertools.islice(reasons.items(), REASONS_SHOWN))
        more = f"; and {len(reasons) - REASONS_SHOWN} other reasons" if len(reasons) > REASONS_SHOWN else ""
        raise JudgeError(
            f"judge '{asked.name}' abstained on {self.count} of the {done} candidates judged so far (of {total}), "
            f"more than max_abstain {max_abstain:g} allows: {shown}{more}; first at prompt '{self._first}'"
        )


class Judging:
    """A judge over the `total` candidates of a round, which come in parts: abstentions are counted over all of them.

    `known`: what the judge has said already, by prompt id, one answer a candidate; it is not asked for these.
    `on_progress` receives the number of candidates judged since its last call. Raises `JudgeError` when more than
    the share `max_abstain` (0 to 1) of all candidates has abstained in `known`.
    """

    def __init__(
        self,
        judge: object,
        total: int,
        *,
        max_abstain: float,
        on_progress: Callable[[int], None] | None = None,
        known: Mapping[str, Sequence[Answer]] | None = None,
    ) -> None:
        self.asked = as_asked(judge)
        self.total = total
        self.max_abstain = max_abstain
        self.known = known or {}
        self._on_progress = on_progress
        self._abstained = Abstained()
        self._done = 0
        self._check_known()

    def judge(self, prompts: Mapping[str, Prompt], candidates: Sequence[Candidate]) -> list[Verdict | Abstain]:
        """One verdict or abstention a candidate, in the candidates' order. All of a prompt's candidates stand in one
        part. Raises as `judge_all` does."""
        groups = _by_prompt(prompts, candidates)
        results: dict[int, Verdict | Abstain] = {}
        for chunk in _chunks(list(groups.items()), self.asked):
            new: list[Item] = [
                (prompts[name], [candidates[i] for i in at]) for name, at in chunk if name not in self.known
            ]
            said = iter(self.asked.scores(new) if new else [])
            for prompt_id, places in chunk:
                answers = self.known[prompt_id] if prompt_id in self.known else next(said)
                for place, answer in zip(places, answers, strict=True):
                    results[place] = self._result(candidates[place], answer)
            self._abstained.check(self.asked, self._done, self.total, self.max_abstain)
            if self._on_progress is not None:
                self._on_progress(sum(len(places) for _, places in chunk))
        return [results[place] for place in range(len(candidates))]

    def _result(self, candidate: Candidate, answer: Answer) -> Verdict | Abstain:
        self._done += 1
        if isinstance(answer, Abstention):
            self._abstained.add(candidate.prompt_id, answer.reason)
            return Abstain(candidate.prompt_id, candidate.index, answer.reason)
        return Verdict(candidate.prompt_id, candidate.index, answer.value, answer.details)

    def _check_known(self) -> None:
        """Before anything is asked: whether too many have abstained already."""
        abstained, done = Abstained(), 0
        for prompt_id, answers in self.known.items():
            done += len(answers)
            for answer in answers:
                if isinstance(answer, Abstention):
                    abstained.add(prompt_id, answer.reason)
        abstained.check(self.asked, done, self.total, self.max_abstain)


def judge_all(
    judge: object,
    prompts: Mapping[str, Prompt],
    candidates: Sequence[Candidate],
    *,
    max_abstain: float,
    on_progress: Callable[[int], None] | None = None,
    known: Mapping[str, Sequence[Answer]] | None = None,
) -> list[Verdict | Abstain]:
    """One verdict or abstention per candidate, in the candidates' order.

    `prompts` holds each candidate's prompt by id. A candidate whose judge raises, declines, or returns something
    that is not a finite number abstains with the reason. `on_progress`, `known`: as in `Judging`. Raises `JudgeError`
    when the judge gives the wrong number of scores, or as soon as more than the share `max_abstain` (0 to 1) of all
    candidates has abstained; `DataError` for an unknown prompt.
    """
    judging = Judging(judge, len(candidates), max_abstain=max_abstain, on_progress=on_progress, known=known)
    return judging.judge(prompts, candidates)


def abstain_reasons(verdicts: Iterable[Verdict | Abstain]) -> dict[str, int]:
    """How many abstained for each reason, the most frequent first."""
    return dict(Counter(v.reason for v in verdicts if isinstance(v, Abstain)).most_common())


def mean_details(verdicts: Iterable[Verdict | Abstain]) -> dict[str, float]:
    """The mean of each numeric detail (true is 1) over the verdicts that have it."""
    return mean_numbers(verdict.details for verdict in verdicts if isinstance(verdict, Verdict))


def _by_prompt(prompts: Mapping[str, Prompt], candidates: Sequence[Candidate]) -> dict[str, list[int]]:
    """The places of each prompt's candidates, prompts in order of first appearance."""
    groups: dict[str, list[int]] = {}
    for place, candidate in enumerate(candidates):
        if candidate.prompt_id not in prompts:
            raise DataError(f"candidate {candidate.index} belongs to an unknown prompt '{candidate.prompt_id}'")
        groups.setdefault(candidate.prompt_id, []).append(place)
    return groups


def _chunks(groups: list[tuple[str, list[int]]], asked: AskedJudge) -> Iterator[list[tuple[str, list[int]]]]:
    """Prompts that are judged before the abstentions are looked at: calls may cost money."""
    size = chunk_size(asked, max((len(places) for _, places in groups), default=1))
    step = max(1, len(groups) if size is None else size)
    for start in range(0, len(groups), step):
        yield groups[start : start + step]


def chunk_size(asked: AskedJudge, candidates: int) -> int | None:
    """How many prompts of so many candidates are judged between two looks at the abstentions; None: all at once.

    A judge made of judges says itself how many it takes (`batch_prompts`).
    """
    calls = asked.concurrent * (ROUNDS_OF_CALLS if asked.concurrent > 1 else 1)
    if asked.batch is None:
        return None
    if not isinstance(asked.judge, PairwiseJudge):
        return asked.batch * calls
    comparisons = schedule_size(candidates, asked.asking.comparing) * (2 if asked.judge.both_orders else 1)
    return -(-asked.batch * calls // max(1, comparisons))
