"""From a judge as an experiment names it to a judge that can be asked."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

from pydantic import ValidationError

from online_dpo.config import JudgeSpec
from online_dpo.errors import JudgeError, OnlineDPOError, nearest, one_line
from online_dpo.judging.asked import AskedJudge, Asking
from online_dpo.judging.importing import import_object
from online_dpo.judging.interface import Judge
from online_dpo.judging.kinds import as_judge
from online_dpo.key_faults import describe

Place: TypeAlias = Callable[[JudgeSpec, Sequence[Path]], Judge]
"""Puts a judge into a process of its own and returns what stands for it here."""


def load_judge(spec: JudgeSpec, folders: Sequence[Path]) -> Judge:
    """Import `spec.use`, also from `folders` (the YAML's own, for instance), and construct it with `spec.params`.

    Raises `JudgeError`, one line, when the module or class is missing, a constructor key is wrong or missing, the
    constructor fails, or the class is not a judge.
    """
    return open_judge(spec, folders).judge


def open_judge(
    spec: JudgeSpec,
    folders: Sequence[Path],
    asking: Asking | None = None,
    place: Place | None = None,
    digest: str | None = None,
) -> AskedJudge:
    """The judge of `spec`, ready to be asked, with the judges that it is made of.

    `digest`: the judge's, where it is known already (a reward model's weights are part of it).
    `place` is called for judges that want a process of their own (`own_process`, or `actor:` in the spec).
    Raises `JudgeError` as `load_judge` does.
    """
    from online_dpo.judging.digests import judge_digest

    kind = judge_class(spec, folders)
    _check_params(spec, kind)
    inner_keys = tuple(getattr(kind, "judge_params", ()))
    alone = getattr(kind, "own_process", False) or spec.actor is not None
    if alone and inner_keys:
        raise JudgeError(f"judge '{spec.use}' is made of judges: give 'actor' to those inside instead")
    inner = {
        key: [open_judge(one, folders, asking, place) for one in inner_specs(spec, key)]
        for key in inner_keys
        if spec.params.get(key) is not None
    }
    judge = place(spec, folders) if place is not None and alone else _construct(spec, kind, folders, inner)
    for item in asking.budget or {} if asking is not None else {}:
        if item in judge.uncounted:
            raise JudgeError(f"judge '{spec.use}' cannot count its {item}, so judge_budget.{item} would never hold")
    if digest is None:
        digest = judge_digest(spec, folders) if asking is not None else ""
    flat = [one for row in inner.values() for one in row]
    return AskedJudge(judge, spec.use, digest=digest, asking=asking, inner=flat)


def _construct(spec: JudgeSpec, kind: type, folders: Sequence[Path], inner: dict[str, list[AskedJudge]]) -> Judge:
    params = dict(spec.params)
    for key in getattr(kind, "file_params", ()):
        value = params.get(key)
        if isinstance(value, str):
            params[key] = find_file(value, folders)
        elif isinstance(value, list):
            params[key] = [find_file(one, folders) if isinstance(one, str) else one for one in value]
    for key, judges in inner.items():
        params[key] = judges if isinstance(params[key], list) else judges[0]
    try:
        judge = kind(**params)
    except OnlineDPOError:
        raise
    except (Exception, SystemExit) as error:
        raise JudgeError(f"judge '{spec.use}' cannot be constructed: {one_line(error)}") from error
    return as_judge(judge)


def inner_specs(spec: JudgeSpec, key: str) -> list[JudgeSpec]:
    """The judges that constructor key `key` names."""
    value = spec.params.get(key)
    entries = value if isinstance(value, list) else [value]
    try:
        return [JudgeSpec.model_validate(entry) for entry in entries]
    except ValidationError as error:
        raise JudgeError(f"judge '{spec.use}': {describe(error, JudgeSpec, prefix=f'{key}.')}") from error


def compares(spec: JudgeSpec, folders: Sequence[Path]) -> bool:
    """Whether the judge of `spec` says something of an answer only beside another (`AskedJudge.relative`)."""
    return any(
        callable(getattr(kind, "prefer", None)) or getattr(kind, "relative", False) for kind in _classes(spec, folders)
    )


def asks_policy(spec: JudgeSpec, folders: Sequence[Path]) -> bool:
    """Whether the judge of `spec`, or one that it is made of, asks the round's source policy (`uses_policy`)."""
    return any(getattr(kind, "uses_policy", False) for kind in _classes(spec, folders))


def _classes(spec: JudgeSpec, folders: Sequence[Path]) -> Iterator[type]:
    """The class of `spec` and those of the judges that it is made of."""
    kind = judge_class(spec, folders)
    yield kind
    for key in getattr(kind, "judge_params", ()):
        if spec.params.get(key) is not None:
            for one in inner_specs(spec, key):
                yield from _classes(one, folders)


def find_file(name: str, folders: Sequence[Path]) -> str:
    """The whole path of `name`: beside the experiment, else from the current folder; else `name` (a hub id)."""
    for folder in [*folders, Path.cwd()]:
        try:
            path = (folder / Path(name).expanduser()).absolute()
            if name and path.exists():
                return str(path)
        except (OSError, RuntimeError, ValueError):  # no path at all: too long, no such user, a null character
            break
    return name


def judge_class(spec: JudgeSpec, folders: Sequence[Path]) -> type:
    """The class that `spec.use` names; `JudgeError` when there is none, or it is no judge."""
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


def _check_params(spec: JudgeSpec, kind: type) -> None:
    """Name a wrong or missing constructor key before Python's own TypeError does it less clearly."""
    try:
        parameters = inspect.signature(kind).parameters.values()
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
