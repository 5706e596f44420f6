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
    that is not a finite number abstains with the reason. `on_progress` receives the number of candidates judged
    since its last call. `known`: what the judge has said already, by prompt id, one answer a candidate; it is not asked
    for these. Raises `JudgeError` when the judge gives the wrong number of scores, or as soon as more
    than the share `max_abstain` (0 to 1) of all candidates has abstained; `DataError` for an unknown prompt.
    """
    asked = as_asked(judge)
    groups = _by_prompt(prompts, candidates)
    results: dict[int, Verdict | Abstain] = {}
    abstained: list[Abstain] = []
    known = known or {}
    _check_known(asked, groups, candidates, known, max_abstain)
    for chunk in _chunks(list(groups.items()), asked):
        new: list[Item] = [(prompts[name], [candidates[i] for i in at]) for name, at in chunk if name not in known]
        said = iter(asked.scores(new) if new else [])
        for prompt_id, places in chunk:
            answers = known[prompt_id] if prompt_id in known else next(said)
            for place, answer in zip(places, answers, strict=True):
                result = results[place] = _result(candidates[place], answer)
                if isinstance(result, Abstain):
                    abstained.append(result)
        check_abstentions(asked, abstained, len(results), len(candidates), max_abstain)
        if on_progress is not None:
            on_progress(sum(len(places) for _, places in chunk))
    return [results[place] for place in range(len(candidates))]


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


def _check_known(
    asked: AskedJudge,
    groups: Mapping[str, Sequence[int]],
    candidates: Sequence[Candidate],
    known: Mapping[str, Sequence[Answer]],
    max_abstain: float,
) -> None:
    """Before anything is asked: whether too many have abstained already."""
    results = [
        _result(candidates[place], answer)
        for prompt_id, answers in known.items()
        for place, answer in zip(groups[prompt_id], answers, strict=True)
    ]
    abstained = [result for result in results if isinstance(result, Abstain)]
    check_abstentions(asked, abstained, len(results), len(candidates), max_abstain)


def _result(candidate: Candidate, answer: Answer) -> Verdict | Abstain:
    if isinstance(answer, Abstention):
        return Abstain(candidate.prompt_id, candidate.index, answer.reason)
    return Verdict(candidate.prompt_id, candidate.index, answer.value, answer.details)


def check_abstentions(
    asked: AskedJudge, abstained: Sequence[Abstain], done: int, total: int, max_abstain: float
) -> None:
    """`JudgeError` as soon as all `total` cannot stay within the share `max_abstain`: judge calls may cost money."""
    if len(abstained) <= max_abstain * total + ROUNDING:
        return
    reasons = abstain_reasons(abstained)
    shown = "; ".join(f"{reason} ({count})" for reason, count in itertools.islice(reasons.items(), REASONS_SHOWN))
    more = f"; and {len(reasons) - REASONS_SHOWN} other reasons" if len(reasons) > REASONS_SHOWN else ""
    raise JudgeError(
        f"judge '{asked.name}' abstained on {len(abstained)} of the {done} candidates judged so far (of {total}), "
        f"more than max_abstain {max_abstain:g} allows: {shown}{more}; first at prompt '{abstained[0].prompt_id}'"
    )
