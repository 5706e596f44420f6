"""The held-out answers of all arms, seeds and rounds, as the page's answer browser reads them.

Columns are read straight from parquet: the browser shows texts and scores, and log-probs are most of a file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from online_dpo.display import clean
from online_dpo.errors import RunFolderError, one_line
from online_dpo.records import read_prompts
from online_dpo.report.data import ReportedRun, Row
from online_dpo.types import Prompt

MOST = 20_000
"""Answers in one page: about 8 MB of 64-token answers."""
_COLUMNS = (
    "prompt_id", "text", "token_ids", "finish_reason", "score", "abstain_reason", "gold_score", "gold_abstain_reason",
)  # fmt: skip
_DIGITS = 6


def collect_answers(runs: Sequence[ReportedRun], most: int = MOST) -> dict[str, Any]:
    """The browser's data, ready for JSON.

    `columns`: one a closed round (arm, seed, round) with the number of its set; `sets`: the answers of one policy, one
    value a prompt in the order of `prompts` (null: no answer there); rounds that share a file share a set. Where all
    would be more than `most` answers, later prompts are left out: `left_out` counts them.
    """
    prompts = _prompts(runs)
    sets: list[dict[str, list[Any]]] = []
    known: dict[str, int] = {}
    columns = []
    stored: list[tuple[ReportedRun, Row]] = []
    for run in runs:
        for row in run.rows:
            digest = _digest(run, row)
            if digest not in known:
                known[digest] = len(stored)
                stored.append((run, row))
            column = {"arm": run.named(row["arm"]), "seed": row["seed"], "round": row["round"], "set": known[digest]}
            columns.append(column)
    shown = prompts[: max(1, most // max(1, len(stored)))]
    places = {prompt.id: place for place, prompt in enumerate(shown)}
    for run, row in stored:
        sets.append(_answers(run.folder(row).path / "held_out.parquet", places))
    return {
        "prompts": [_prompt(prompt) for prompt in shown],
        "left_out": len(prompts) - len(shown),
        "columns": columns,
        "sets": sets,
    }


def readable(text: str) -> str:
    """`text` without control, format and escape characters; lines, blank lines and indentation stay."""
    lines = re.split(r"\r\n|[\n\r\v\f\x85\u2028\u2029]", text.replace("\t", "    "))
    return "\n".join(" " * (len(line) - len(line.lstrip(" "))) + clean(line) for line in lines).strip("\n")


def _prompts(runs: Sequence[ReportedRun]) -> list[Prompt]:
    """The held-out prompts of all runs, each once."""
    found: dict[str, Prompt] = {}
    for run in runs:
        for prompt in read_prompts(run.store.root / "prompts.parquet")["held_out"]:
            found.setdefault(prompt.id, prompt)
    return list(found.values())


def _prompt(prompt: Prompt) -> dict[str, Any]:
    turns = [[clean(message.role), readable(message.content)] for message in prompt.messages]
    return {"id": clean(prompt.id), "turns": turns}


def _digest(run: ReportedRun, row: Row) -> str:
    """What tells a round's file of answers from others."""
    record = run.folder(row).done("evaluate")
    where = f"{run.name}/{row['arm']}/{row['seed']}/{row['round']}"
    return where if record is None else record.outputs.get("held_out.parquet", where)


def _answers(path: Path, places: Mapping[str, int]) -> dict[str, list[Any]]:
    """One file of answers, column by column, at the places of their prompts."""
    table = _read(path)
    own = [places.get(name) for name in table["prompt_id"].to_pylist()]
    columns: dict[str, list[Any]] = {
        "text": [readable(text) for text in table["text"].to_pylist()],
        "tokens": pc.list_value_length(table["token_ids"]).to_pylist(),
        "ended": [reason == "stop" for reason in table["finish_reason"].to_pylist()],
        "reward": [_short(score) for score in table["score"].to_pylist()],
        "abstained": [_reason(reason) for reason in table["abstain_reason"].to_pylist()],
        "gold": [_short(score) for score in table["gold_score"].to_pylist()],
        "gold_abstained": [_reason(reason) for reason in table["gold_abstain_reason"].to_pylist()],
    }
    found: dict[str, list[Any]] = {}
    for name, values in columns.items():
        row: list[Any] = [None] * len(places)
        for place, value in zip(own, values, strict=True):
            if place is not None:
                row[place] = value
        # A column that says nothing is left out: most runs have no abstention and many no gold judge.
        if any(value is not None for value in row):
            found[name] = row
    return found


def _read(path: Path) -> pa.Table:
    try:
        return pq.read_table(path, columns=list(_COLUMNS))
    except (OSError, pa.ArrowException) as error:
        raise RunFolderError(f"{path} is missing or damaged: {one_line(error)}") from error


def _short(score: float | None) -> float | None:
    return None if score is None else float(f"{score:.{_DIGITS}g}")


def _reason(reason: str | None) -> str | None:
    return None if reason is None else clean(reason)
