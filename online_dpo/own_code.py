"""Which code an experiment brings along: judges and losses that are not online-dpo's run with the user's rights.

Said before any of it is imported; nothing is imported to say it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from online_dpo.config import Experiment, JudgeSpec
from online_dpo.dpo_spec import LossSpec
from online_dpo.spec import DOTTED

OURS = ("judges", "online_dpo")


def own_code(experiment: Experiment, folders: Sequence[Path]) -> list[str]:
    """A line for each judge, function and loss of `experiment` that is not online-dpo's, with its file.

    `folders`: where modules are looked for after Python's own path, as `judging.import_object` does.
    """
    found = []
    for kind, name in dict.fromkeys(_named(experiment)):
        file = _file(name, folders)
        # Without a file there is nothing to run: importing it will say so.
        if file is not None and name.partition(":")[0].partition(".")[0] not in OURS:
            found.append(f"own code: {kind} '{name}' from {file} is no part of online-dpo: it runs with your rights")
    return found


def _named(experiment: Experiment) -> Iterator[tuple[str, str]]:
    """What is imported by name: (what it is, "module:name")."""
    arms = [experiment.arm(name) for name in experiment.arms]
    judges: list[JudgeSpec | None] = [arm.judge for arm in arms]
    judges += [experiment.evaluation.judge, experiment.evaluation.gold, experiment.audit.against]
    for judge in judges:
        if judge is not None:
            yield "judge", judge.use
            yield from _inside(judge.params)
    for arm in arms:
        if isinstance(arm.dpo.loss, LossSpec):
            yield "loss", arm.dpo.loss.use


def _inside(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Judges inside a judge, and functions that one may be given by name: what reads like "module:name"."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _inside(inner, str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _inside(inner, key)
    elif isinstance(value, str) and re.fullmatch(DOTTED, value):
        yield ("judge" if key in ("use", "judge", "judges") else "function"), value


def _file(name: str, folders: Sequence[Path]) -> Path | None:
    """The file of the module that "module:name" names; None where there is none."""
    package, *parts = name.partition(":")[0].split(".")
    try:
        spec = PathFinder.find_spec(package, [*sys.path, *(str(folder.resolve()) for folder in folders)])
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    places = [Path(place) for place in spec.submodule_search_locations or ()]
    files = [place.joinpath(*parts).with_suffix(".py") for place in places if parts]
    return next((file for file in files if file.is_file()), None) or (Path(spec.origin) if spec.origin else None)
