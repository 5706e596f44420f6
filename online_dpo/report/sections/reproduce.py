"""All that is needed to do it again: the resolved experiments, digests, versions, commands."""

from __future__ import annotations

import shlex
import unicodedata
from typing import Any

import yaml

from online_dpo.config import Experiment
from online_dpo.display import clean
from online_dpo.report.data import ReportedRun
from online_dpo.report.document import Cell, Listing, Section, Table, count, words
from online_dpo.report.subject import Subject
from online_dpo.store import dump_experiment

DIGEST = 12


def reproduce(subject: Subject) -> Section:
    """Commands and the configuration of each run; digests of model, prompts, judges, policies; versions."""
    listings = []
    for run in subject.runs:
        name = run.experiment.name
        lines = ["online-dpo check experiment.yaml", "online-dpo run experiment.yaml"]
        lines.append(f"online-dpo report {shlex.quote(clean(f'{run.experiment.output}/{name}'))}")
        listings.append(Listing(f"Commands for {name}", "\n".join(lines)))
        listings.append(Listing(f"experiment.yaml of {name}, every key", _as_yaml(run.experiment), folded=True))
    text = (
        "Save the configuration as experiment.yaml where the original lay (its prompts and judges are looked for "
        "beside it), with the same versions installed.",
    )
    tables = (_inputs(subject), _software(subject), _policies(subject))
    return Section("reproduce", "Configuration and digests", text, tables=tables, listings=tuple(listings))


def _as_yaml(experiment: Experiment) -> str:
    """To be copied; where a character cannot be seen (one that turns the direction, for instance), as escapes."""
    text = dump_experiment(experiment)
    seen = all(char == "\n" or unicodedata.category(char) not in ("Cc", "Cf", "Cs") for char in text)
    return text if seen else yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False)


def _inputs(subject: Subject) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for run in subject.runs:
        name, manifest = run.experiment.name, run.manifest
        rows += _digests(name, "model", run.experiment.model, manifest.get("model"))
        rows += _digests(name, "prompts", run.experiment.prompts.path, manifest.get("prompts"))
        for arm, digest in (manifest.get("judges") or {}).items():
            rows.append(
                (words(name), words(f"judges of {arm}"), words(run.experiment.arm(arm).judge.use), words(digest))
            )
    return Table("digests", "What went in", ("run", "part", "name", "SHA-256"), tuple(rows))


def _digests(run: str, part: str, name: str, found: Any) -> list[tuple[Cell, ...]]:
    digest = found.get("digest") if isinstance(found, dict) else None
    return [] if digest is None else [(words(run), words(part), words(name), words(digest))]


def _software(subject: Subject) -> Table:
    names = list(dict.fromkeys(name for run in subject.runs for name in _versions(run)))
    columns = ("package", *(run.experiment.name for run in subject.runs))
    rows = tuple((words(name), *(words(_versions(run).get(name)) for run in subject.runs)) for name in names)
    return Table("software", "Versions that the runs began with", columns, rows)


def _versions(run: ReportedRun) -> dict[str, str]:
    manifest = run.manifest
    own = {"online-dpo": manifest.get("online_dpo"), "python": manifest.get("python"), **manifest.get("packages", {})}
    return {name: str(version) for name, version in own.items() if version is not None}


def _policies(subject: Subject) -> Table:
    rows = tuple(
        (
            words(run.named(row["arm"])),
            count(row["seed"]),
            count(row["round"]),
            *(
                words(((row.get(role) or {}).get("digest") or "")[:DIGEST])
                for role in ("policy", "source", "reference")
            ),
        )
        for run in subject.runs
        for row in run.rows
    )
    columns = ("arm", "seed", "round", "policy", "source", "reference")
    note = f"the first {DIGEST} digits; round 0 is the initial policy; no source: pairs that no single policy sampled"
    return Table("policies", "Policies by digest", columns, rows, note, folded=True)
