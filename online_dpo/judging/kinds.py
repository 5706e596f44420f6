"""What counts as a judge: the two kinds, and objects that only look like one."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from online_dpo.errors import JudgeError
from online_dpo.judging.interface import Judge, PairwiseJudge, PointwiseJudge, Score
from online_dpo.types import Candidate, Prompt

ASKED = {"score": ("prompt", "candidates"), "prefer": ("prompt", "first", "second")}
"""How judges are asked."""


class _DuckPointwise(PointwiseJudge):
    """A user's object that has `score` without being a `PointwiseJudge`."""

    def __init__(self, wrapped: Any) -> None:
        self.wrapped = wrapped

    def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> Sequence[Score]:
        answer: Sequence[Score] = self.wrapped.score(prompt, candidates)
        return answer


class _DuckPairwise(PairwiseJudge):
    """A user's object that has `prefer` without being a `PairwiseJudge`."""

    def __init__(self, wrapped: Any) -> None:
        self.wrapped = wrapped

    def prefer(self, prompt: Prompt, first: Candidate, second: Candidate) -> Score:
        answer: Score = self.wrapped.prefer(prompt, first, second)
        return answer


def judge_name(judge: object) -> str:
    """The judge as "module:Class", for messages."""
    kind = type(getattr(judge, "wrapped", judge))
    return f"{kind.__module__}:{kind.__qualname__}"


def as_judge(judge: object) -> Judge:
    """`judge` as one of the two kinds; an object that only has `score` or `prefer` is wrapped.

    Raises `JudgeError` when it is neither kind, or both.
    """
    if isinstance(judge, PointwiseJudge | PairwiseJudge):
        _check_overridden(judge)
        _check_calls(judge)
        return judge
    scores, prefers = callable(getattr(judge, "score", None)), callable(getattr(judge, "prefer", None))
    if scores and prefers:
        raise JudgeError(f"judge '{judge_name(judge)}' has both 'score' and 'prefer': subclass one of the two kinds")
    _check_calls(judge)
    if scores:
        return _DuckPointwise(judge)
    if prefers:
        return _DuckPairwise(judge)
    raise JudgeError(f"'{judge_name(judge)}' is not a judge: it has neither 'score' nor 'prefer'")


def _check_calls(judge: object) -> None:
    """Whether `score` and `prefer`, where they are there, can be called as they will be, and answer at once."""
    for name, parameters in ASKED.items():
        method = getattr(judge, name, None)
        if not callable(method):
            continue
        if inspect.iscoroutinefunction(method):
            raise JudgeError(
                f"judge '{judge_name(judge)}': '{name}' must not be async: it is called from threads, and waited for"
            )
        try:
            inspect.signature(method).bind(*parameters)
        except TypeError as error:
            wanted = f"{name}(self, {', '.join(parameters)})"
            raise JudgeError(f"judge '{judge_name(judge)}': '{name}' must be {wanted}: {error}") from error
        except ValueError:  # a method written in C may have no signature
            continue


def _check_overridden(judge: Judge) -> None:
    """A judge that overrides nothing would abstain on everything, or recurse: say so at once."""
    kind: type[Any] = type(judge)
    if isinstance(judge, PairwiseJudge):
        own = kind.prefer is not PairwiseJudge.prefer or kind.prefer_batch is not PairwiseJudge.prefer_batch
    else:
        own = kind.score is not PointwiseJudge.score or kind.score_batch is not PointwiseJudge.score_batch
    missing = "" if own else ("prefer" if isinstance(judge, PairwiseJudge) else "score")
    if missing:
        raise JudgeError(f"judge '{judge_name(judge)}' does not define '{missing}'")
