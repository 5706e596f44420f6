"""Judges: what they are, how "module:Class" becomes one, and how a round's candidates get their verdicts.

A judge scores the candidates of one prompt (`PointwiseJudge`) or compares two of them (`PairwiseJudge`). What it
cannot judge becomes an `Abstain` with a reason, never a score.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import itertools
import json
import math
import numbers
import pkgutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, TypeAlias

from online_dpo.config import JudgeSpec
from online_dpo.errors import DataError, JudgeError, OnlineDPOError, nearest, one_line
from online_dpo.types import Abstain, Candidate, Prompt, Verdict

REASONS_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Abstention:
    """A judge's "I cannot judge this one", with the reason in a few constant words (reasons are counted)."""

    reason: str


Score: TypeAlias = float | Abstention | None
Item: TypeAlias = tuple[Prompt, Sequence[Candidate]]

DECLINED = Abstention("judge declined")


class PointwiseJudge:
    """Scores each candidate of a prompt; higher is better, in any unit that is the same for all prompts.

    Override `score`, or `score_batch` where many prompts at once are faster (then set `batch_prompts`); each has a
    default that calls the other. An exception makes what was asked abstain; raise `JudgeError` to end the run.
    """

    batch_prompts: int = 1
    """How many prompts one call of `score_batch` takes."""

    code_params: ClassVar[tuple[str, ...]] = ()
    """Constructor keys whose value names code as "module:name": its source file is part of `judge_digest`."""

    def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> Sequence[Score]:
        """One score per candidate, in their order; None or `Abstention` where it cannot judge one."""
        return self.score_batch([(prompt, candidates)])[0]

    def score_batch(self, items: Sequence[Item]) -> list[Sequence[Score]]:
        """The scores of several prompts' candidates: one sequence per item, as `score` gives it."""
        return [self.score(prompt, candidates) for prompt, candidates in items]


class PairwiseJudge:
    """Compares two candidates. Override `prefer`; it is called in both orders for all pairs of a prompt."""

    code_params: ClassVar[tuple[str, ...]] = ()
    """As for `PointwiseJudge`."""

    def prefer(self, prompt: Prompt, first: Candidate, second: Candidate) -> Score:
        """The probability in [0, 1] that `first` is better; None or `Abstention` where it cannot tell."""
        raise NotImplementedError(f"{type(self).__name__} does not define prefer")


Judge: TypeAlias = PointwiseJudge | PairwiseJudge


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
        return judge
    scores, prefers = callable(getattr(judge, "score", None)), callable(getattr(judge, "prefer", None))
    if scores and prefers:
        raise JudgeError(f"judge '{judge_name(judge)}' has both 'score' and 'prefer': subclass one of the two kinds")
    if scores:
        return _DuckPointwise(judge)
    if prefers:
        return _DuckPairwise(judge)
    raise JudgeError(f"'{judge_name(judge)}' is not a judge: it has neither 'score' nor 'prefer'")


def _check_overridden(judge: Judge) -> None:
    """A judge that overrides nothing would abstain on everything, or recurse: say so at once."""
    if isinstance(judge, PairwiseJudge):
        missing = "" if type(judge).prefer is not PairwiseJudge.prefer else "prefer"
    else:
        kind = type(judge)
        own = kind.score is not PointwiseJudge.score or kind.score_batch is not PointwiseJudge.score_batch
        missing = "" if own else "score"
    if missing:
        raise JudgeError(f"judge '{judge_name(judge)}' does not define '{missing}'")


# --- loading -----------------------------------------------------------------------------------------------------


def load_judge(spec: JudgeSpec, folders: Sequence[Path]) -> Judge:
    """Import `spec.use`, also from `folders` (the YAML's own, for instance), and construct it with `spec.params`.

    Raises `JudgeError`, one line, when the module or class is missing, a constructor key is wrong or missing, the
    constructor fails, or the class is not a judge.
    """
    judge_class = _judge_class(spec, folders)
    _check_params(spec, judge_class)
    try:
        judge = judge_class(**spec.params)
    except OnlineDPOError:
        raise
    except Exception as error:
        raise JudgeError(f"judge '{spec.use}' cannot be constructed: {one_line(error)}") from error
    return as_judge(judge)


def judge_digest(spec: JudgeSpec, folders: Sequence[Path]) -> str:
    """SHA-256 (hex) over `use`, the params as canonical JSON, and the source file of the judge's module.

    The judge is imported, not constructed. Source files named by its `code_params` count too; files that the judge
    reads otherwise (a reward model's weights, modules it imports) do not. Raises `JudgeError` as `load_judge` does.
    """
    judge_class = _judge_class(spec, folders)
    named = [spec.params.get(key) for key in getattr(judge_class, "code_params", ())]
    code = [spec.use, *(name for name in named if isinstance(name, str))]
    sources = [_source_digest(name, folders) for name in code]
    try:
        text = json.dumps([spec.use, spec.params, sources], sort_keys=True, separators=(",", ":"), default=str)
    except (TypeError, ValueError) as error:
        raise JudgeError(f"judge '{spec.use}': its settings cannot be written as JSON: {error}") from error
    return hashlib.sha256(text.encode()).hexdigest()


def import_object(name: str, folders: Sequence[Path] = (), what: str = "judge") -> Any:
    """The object named "module:name", imported from the Python path or `folders`; `JudgeError` when there is none."""
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute.isidentifier():
        raise JudgeError(f"{what} '{name}': write it as \"module:name\"")
    module = _import_module(module_name, folders, f"{what} '{name}'")
    if not hasattr(module, attribute):
        raise JudgeError(
            f"{what} '{name}': module '{module_name}' has no '{attribute}'{_other_names(module, attribute)}"
        )
    return getattr(module, attribute)


def _judge_class(spec: JudgeSpec, folders: Sequence[Path]) -> type:
    found = import_object(spec.use, folders)
    if inspect.isfunction(found):
        raise JudgeError(
            f"judge '{spec.use}' is a function, not a class; "
            f"write use: judges.function:FunctionJudge with function: {spec.use}"
        )
    if not isinstance(found, type):
        raise JudgeError(f"judge '{spec.use}' is a {type(found).__name__}, not a class")
    if not (callable(getattr(found, "score", None)) or callable(getattr(found, "prefer", None))):
        raise JudgeError(
            f"class '{spec.use}' is not a judge: it has neither 'score' (PointwiseJudge) nor 'prefer' (PairwiseJudge)"
        )
    return found


def _check_params(spec: JudgeSpec, judge_class: type) -> None:
    """Name a wrong or missing constructor key before Python's own TypeError does it less clearly."""
    try:
        parameters = inspect.signature(judge_class).parameters.values()
    except (TypeError, ValueError):  # a class written in C may have no signature: its constructor must tell
        return
    by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    known = [p.name for p in by_name]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for key in spec.params:
            if key not in known:
                hint = nearest(key, known) or (f"; known: {', '.join(known)}" if known else "; it takes no keys")
                raise JudgeError(f"judge '{spec.use}': unknown key '{key}'{hint}")
    for parameter in by_name:
        if parameter.default is parameter.empty and parameter.name not in spec.params:
            raise JudgeError(f"judge '{spec.use}': key '{parameter.name}' is missing")


def _import_module(name: str, folders: Sequence[Path], asked: str) -> ModuleType:
    _search_in(folders)
    root = name.partition(".")[0]
    if root == "judges":
        _check_judges_package(asked)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            raise JudgeError(f"{asked}: no module '{name}'{nearest(name, _siblings(name, folders))}") from error
        raise JudgeError(f"{asked}: module '{name}' needs '{error.name}', which is not installed") from error
    except Exception as error:
        raise JudgeError(f"{asked}: module '{name}' cannot be imported: {one_line(error)}") from error
    if root != "judges":
        _check_not_hidden(module, name, folders, asked)
    return module


def _search_in(folders: Sequence[Path]) -> None:
    """Put `folders` last on sys.path, once each, for good: a user's judge may import its neighbours later.

    Last, so that a file beside an experiment never takes the place of an installed package.
    """
    for folder in folders:
        path = str(folder.resolve())
        if path not in sys.path:
            sys.path.append(path)
    importlib.invalidate_caches()


def _check_judges_package(asked: str) -> None:
    """Another project on PyPI also installs a package `judges`: tell it from ours by our marker."""
    try:
        package = importlib.import_module("judges")
    except ModuleNotFoundError as error:
        if error.name == "judges":
            raise JudgeError(f"{asked}: online-dpo's package 'judges' is not installed") from error
        package = None  # ours imports nothing, so a package that lacks something is the other one
    except Exception:  # likewise: ours cannot fail to import
        package = None
    if package is None or getattr(package, "ONLINE_DPO", None) is not True:
        where = f" ({package.__file__})" if package is not None and getattr(package, "__file__", None) else ""
        raise JudgeError(
            f"{asked}: the 'judges' that Python finds{where} is not online-dpo's; another project on PyPI has "
            f"the same name: uninstall it or use a separate environment"
        )


def _check_not_hidden(module: ModuleType, name: str, folders: Sequence[Path], asked: str) -> None:
    """A file beside the experiment must not be passed over silently for a like-named module elsewhere."""
    stem = Path(*name.split("."))
    for folder in folders:
        for file in (folder / stem / "__init__.py", folder / f"{stem}.py"):
            if file.is_file():
                loaded = getattr(module, "__file__", None)
                if loaded is None or Path(loaded).resolve() != file.resolve():
                    raise JudgeError(f"{asked}: {file} is hidden by {loaded or 'a built-in module'}: rename it")
                return


def _siblings(name: str, folders: Sequence[Path]) -> list[str]:
    """The modules that `name` may have been meant to be: its package's, or those in `folders`."""
    parent = name.rpartition(".")[0]
    paths = getattr(sys.modules.get(parent), "__path__", ()) if parent else folders
    prefix = f"{parent}." if parent else ""
    return [prefix + module.name for module in pkgutil.iter_modules([str(path) for path in paths])]


def _other_names(module: ModuleType, wanted: str) -> str:
    """The name in `module` nearest to `wanted`, else all that the module itself defines."""
    own = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and callable(value) and getattr(value, "__module__", None) == module.__name__
    ]
    return nearest(wanted, own) or (f"; it has: {', '.join(own)}" if own else "")


def _source_digest(name: str, folders: Sequence[Path]) -> str:
    import_object(name, folders)
    module_name = name.partition(":")[0]
    file = getattr(sys.modules[module_name], "__file__", None)
    if file is None:
        raise JudgeError(f"judge '{name}': module '{module_name}' has no source file; put the judge in one")
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


# --- judging -----------------------------------------------------------------------------------------------------


def judge_all(
    judge: object,
    prompts: Mapping[str, Prompt],
    candidates: Sequence[Candidate],
    *,
    max_abstain: float,
    on_progress: Callable[[int], None] | None = None,
) -> list[Verdict | Abstain]:
    """One verdict or abstention per candidate, in the candidates' order.

    `prompts` holds each candidate's prompt by id. A candidate whose judge raises, declines, or returns something
    that is not a finite number abstains with the reason. `on_progress` receives the number of candidates judged
    since its last call. Raises `JudgeError` when the judge gives the wrong number of scores, or as soon as more
    than the share `max_abstain` (0 to 1) of all candidates has abstained; `DataError` for an unknown prompt.
    """
    known = as_judge(judge)
    groups = _by_prompt(prompts, candidates)
    results: dict[int, Verdict | Abstain] = {}
    for batch in _batches(list(groups.items()), _batch_prompts(known)):
        items: list[Item] = [(prompts[prompt_id], [candidates[i] for i in places]) for prompt_id, places in batch]
        for (_, places), scores in zip(batch, _scores(known, items), strict=True):
            for place, score in zip(places, scores, strict=True):
                results[place] = _result(candidates[place], score)
        _check_abstentions(known, list(results.values()), len(candidates), max_abstain)
        if on_progress is not None:
            on_progress(sum(len(places) for _, places in batch))
    return [results[place] for place in range(len(candidates))]


def abstain_reasons(verdicts: Iterable[Verdict | Abstain]) -> dict[str, int]:
    """How many abstained for each reason, the most frequent first."""
    return dict(Counter(v.reason for v in verdicts if isinstance(v, Abstain)).most_common())


def _by_prompt(prompts: Mapping[str, Prompt], candidates: Sequence[Candidate]) -> dict[str, list[int]]:
    """The places of each prompt's candidates, prompts in order of first appearance."""
    groups: dict[str, list[int]] = {}
    for place, candidate in enumerate(candidates):
        if candidate.prompt_id not in prompts:
            raise DataError(f"candidate {candidate.index} belongs to an unknown prompt '{candidate.prompt_id}'")
        groups.setdefault(candidate.prompt_id, []).append(place)
    return groups


def _batches(groups: list[tuple[str, list[int]]], size: int) -> Iterator[list[tuple[str, list[int]]]]:
    for start in range(0, len(groups), size):
        yield groups[start : start + size]


def _batch_prompts(judge: Judge) -> int:
    size = getattr(judge, "batch_prompts", 1)
    if not isinstance(size, int) or size < 1:
        raise JudgeError(f"judge '{judge_name(judge)}': batch_prompts must be a whole number from 1, found {size!r}")
    return size


def _scores(judge: Judge, items: list[Item]) -> list[list[float | Abstention]]:
    if isinstance(judge, PairwiseJudge):
        return [_borda(judge, prompt, candidates) for prompt, candidates in items]
    return [[_number(value) for value in row] for row in _ask(judge, items)]


def _ask(judge: PointwiseJudge, items: list[Item]) -> list[list[object]]:
    """The judge's raw answers, one list per item, each as long as the item's candidates."""
    try:
        rows = _as_list(judge, judge.score_batch(items), items[0][0], len(items), "lists of scores")
        return [
            _as_list(judge, row, prompt, len(candidates), "scores")
            for row, (prompt, candidates) in zip(rows, items, strict=True)
        ]
    except OnlineDPOError:
        raise
    except Exception as error:
        if len(items) > 1:  # one bad prompt must not make its neighbours abstain: ask for each alone
            return [row for item in items for row in _ask(judge, [item])]
        return [[Abstention(one_line(error))] * len(items[0][1])]


def _as_list(judge: PointwiseJudge, answer: Any, prompt: Prompt, wanted: int, noun: str) -> list[object]:
    """`answer` as a list of `wanted` things; `JudgeError` when it is not that many, or no sequence."""
    asked = f"judge '{judge_name(judge)}' at prompt '{prompt.id}'"
    if isinstance(answer, str | bytes | Mapping) or not hasattr(answer, "__iter__"):
        raise JudgeError(f"{asked}: returned {type(answer).__name__} instead of {wanted} {noun}")
    values = list(answer)
    if len(values) != wanted:
        raise JudgeError(f"{asked}: returned {len(values)} {noun} instead of {wanted}")
    return values


def _number(value: Any) -> float | Abstention:
    """`value` as a finite float, or why it is none. Numbers of numpy and torch count; text never does."""
    if value is None:
        return DECLINED
    if isinstance(value, Abstention):
        return value
    if not isinstance(value, numbers.Real) and getattr(value, "ndim", None) == 0:
        value = value.item()  # a numpy or torch scalar
    if not isinstance(value, numbers.Real):
        return Abstention(f"returned {type(value).__name__}, not a number")
    try:
        number = float(value)
    except OverflowError:
        return Abstention("returned a number too large for a float")
    return number if math.isfinite(number) else Abstention(f"returned {number}")


def _borda(judge: PairwiseJudge, prompt: Prompt, candidates: Sequence[Candidate]) -> list[float | Abstention]:
    """Each candidate's mean probability of winning over the others it could be compared with.

    With p = prefer(a, b) and q = prefer(b, a), a beats b with (p + 1 - q)/2, which cancels a preference for either
    place. A pair counts only when both orders were answered: one alone would let that preference in.
    """
    wins: list[list[float]] = [[] for _ in candidates]
    faults: list[list[Abstention]] = [[] for _ in candidates]
    for i, j in itertools.combinations(range(len(candidates)), 2):
        there = _prefer(judge, prompt, candidates[i], candidates[j])
        back = _prefer(judge, prompt, candidates[j], candidates[i])
        if isinstance(there, Abstention):
            faults[i].append(there)
            faults[j].append(there)
        elif isinstance(back, Abstention):
            faults[i].append(back)
            faults[j].append(back)
        else:
            wins[i].append((there + 1.0 - back) / 2.0)
            wins[j].append((back + 1.0 - there) / 2.0)
    alone = [Abstention("no other candidate to compare with")]
    return [math.fsum(won) / len(won) if won else (bad or alone)[0] for won, bad in zip(wins, faults, strict=True)]


def _prefer(judge: PairwiseJudge, prompt: Prompt, first: Candidate, second: Candidate) -> float | Abstention:
    try:
        answer = _number(judge.prefer(prompt, first, second))
    except OnlineDPOError:
        raise
    except Exception as error:
        return Abstention(one_line(error))
    if not isinstance(answer, Abstention) and not 0.0 <= answer <= 1.0:
        return Abstention("returned a number outside [0, 1]")
    return answer


def _result(candidate: Candidate, score: float | Abstention) -> Verdict | Abstain:
    if isinstance(score, Abstention):
        return Abstain(candidate.prompt_id, candidate.index, score.reason)
    return Verdict(candidate.prompt_id, candidate.index, score)


def _check_abstentions(judge: Judge, done: list[Verdict | Abstain], total: int, max_abstain: float) -> None:
    """Stop as soon as the whole round cannot stay within `max_abstain`: judge calls may cost money."""
    abstained = [verdict for verdict in done if isinstance(verdict, Abstain)]
    if len(abstained) <= max_abstain * total:
        return
    reasons = abstain_reasons(abstained)
    shown = "; ".join(f"{reason} ({count})" for reason, count in itertools.islice(reasons.items(), REASONS_SHOWN))
    more = f"; and {len(reasons) - REASONS_SHOWN} other reasons" if len(reasons) > REASONS_SHOWN else ""
    raise JudgeError(
        f"judge '{judge_name(judge)}' abstained on {len(abstained)} of the {len(done)} candidates judged so far "
        f"(of {total}), more than max_abstain {max_abstain:g} allows: {shown}{more}; "
        f"first at prompt '{abstained[0].prompt_id}'"
    )
