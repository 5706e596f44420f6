"""The nouns as parquet files, and back. A file says what its columns are; nothing in it can run code."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from online_dpo.errors import RunFolderError, one_line
from online_dpo.types import Abstain, Candidate, Message, Pair, Prompt, Split, Verdict

CANDIDATE_FIELDS: list[tuple[str, pa.DataType]] = [
    ("prompt_id", pa.string()),
    ("index", pa.int32()),
    ("text", pa.string()),
    ("token_ids", pa.list_(pa.int32())),
    ("logprobs", pa.list_(pa.float32())),
    ("finish_reason", pa.string()),
    ("seed", pa.int64()),
]
CANDIDATES = pa.schema(CANDIDATE_FIELDS)
VERDICTS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("index", pa.int32()),
        ("score", pa.float64()),
        ("abstain_reason", pa.string()),
        ("details", pa.string()),
    ]
)
PAIRS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("chosen_index", pa.int32()),
        ("rejected_index", pa.int32()),
        ("chosen_score", pa.float64()),
        ("rejected_score", pa.float64()),
        ("prompt", pa.string()),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
    ]
)
PROMPTS = pa.schema(
    [("id", pa.string()), ("split", pa.string()), ("messages", pa.string()), ("token_ids", pa.list_(pa.int32()))]
)
HELD_OUT = pa.schema(
    [
        *CANDIDATE_FIELDS,
        ("score", pa.float64()),
        ("abstain_reason", pa.string()),
        ("initial_logprobs", pa.list_(pa.float32())),
        ("reference_logprobs", pa.list_(pa.float32())),
        ("gold_score", pa.float64()),
        ("gold_abstain_reason", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class HeldOutAnswer:
    """A held-out answer, its score (None: abstained, and why), π₀'s log-probs of it, those of the reference of the
    round that trained the policy (None: no round did), and the gold judge's score (None without a reason: there is no
    gold judge)."""

    candidate: Candidate
    score: float | None
    abstain_reason: str | None
    initial_logprobs: tuple[float, ...]
    reference_logprobs: tuple[float, ...] | None = None
    gold_score: float | None = None
    gold_abstain_reason: str | None = None


def write_rows(path: Path, schema: pa.Schema, rows: Sequence[dict[str, Any]]) -> None:
    """Write `rows` as one parquet file with exactly `schema`."""
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), path, compression="zstd")


def read_rows(path: Path, schema: pa.Schema) -> list[dict[str, Any]]:
    """The rows of `path`; `RunFolderError` when the file is missing, damaged, or of other columns."""
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise RunFolderError(f"{path} is missing or damaged: {one_line(error)}") from error
    if table.schema.names != schema.names:
        raise RunFolderError(f"{path} has columns {table.schema.names}, expected {schema.names}")
    if table.schema.types != schema.types:
        name = next(field.name for field in schema if table.schema.field(field.name).type != field.type)
        raise RunFolderError(
            f"{path}: column '{name}' holds {table.schema.field(name).type}, not {schema.field(name).type}"
        )
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def write_candidates(path: Path, candidates: Sequence[Candidate]) -> None:
    """One row a candidate."""
    write_rows(path, CANDIDATES, [asdict(candidate) for candidate in candidates])


def read_candidates(path: Path) -> list[Candidate]:
    """The candidates of `path`, in the file's order."""
    return [candidate_of(row) for row in read_rows(path, CANDIDATES)]


def candidate_of(row: Mapping[str, Any]) -> Candidate:
    """The candidate in the candidate columns of `row`."""
    values = {name: row[name] for name, _ in CANDIDATE_FIELDS}
    return Candidate(**values | {"token_ids": tuple(row["token_ids"]), "logprobs": tuple(row["logprobs"])})


def write_verdicts(path: Path, verdicts: Sequence[Verdict | Abstain]) -> None:
    """One row a candidate; an abstention has a reason and no score. Details are JSON, null where there are none."""
    write_rows(path, VERDICTS, [_verdict_row(verdict) for verdict in verdicts])


def _verdict_row(verdict: Verdict | Abstain) -> dict[str, Any]:
    score = verdict.score if isinstance(verdict, Verdict) else None
    reason = verdict.reason if isinstance(verdict, Abstain) else None
    details = json.dumps(dict(verdict.details)) if isinstance(verdict, Verdict) and verdict.details else None
    return {
        "prompt_id": verdict.prompt_id,
        "index": verdict.index,
        "score": score,
        "abstain_reason": None if reason is None else reason.encode("utf-8", "replace").decode(),
        "details": details,
    }


def read_verdicts(path: Path) -> list[Verdict | Abstain]:
    """The verdicts and abstentions of `path`."""
    return [
        Abstain(row["prompt_id"], row["index"], row["abstain_reason"])
        if row["score"] is None
        else Verdict(row["prompt_id"], row["index"], row["score"], json.loads(row["details"] or "{}"))
        for row in read_rows(path, VERDICTS)
    ]


def write_pairs(path: Path, pairs: Sequence[Pair]) -> None:
    """One row a pair; the texts are for reading, the tokens stay in candidates.parquet."""
    rows = [
        {
            "prompt_id": pair.prompt.id,
            "chosen_index": pair.chosen.index,
            "rejected_index": pair.rejected.index,
            "chosen_score": pair.chosen_score,
            "rejected_score": pair.rejected_score,
            "prompt": pair.prompt.text,
            "chosen": pair.chosen.text,
            "rejected": pair.rejected.text,
        }
        for pair in pairs
    ]
    write_rows(path, PAIRS, rows)


def read_pairs(
    path: Path, prompts: Mapping[str, Prompt], candidates: Sequence[Candidate], *, other_prompts: bool = False
) -> list[Pair]:
    """The pairs of `path` with the very tokens and log-probs of `candidates`.

    With `other_prompts` the file may hold pairs of prompts that are not among `prompts`; they are left out.
    """
    known = {(candidate.prompt_id, candidate.index): candidate for candidate in candidates}
    return [
        Pair(
            prompt=prompts[row["prompt_id"]],
            chosen=known[row["prompt_id"], row["chosen_index"]],
            rejected=known[row["prompt_id"], row["rejected_index"]],
            chosen_score=row["chosen_score"],
            rejected_score=row["rejected_score"],
        )
        for row in read_rows(path, PAIRS)
        if not other_prompts or row["prompt_id"] in prompts
    ]


def write_prompts(path: Path, prompts: Mapping[Split, Sequence[Prompt]]) -> None:
    """All prompts of a run with their split."""
    rows = [
        {
            "id": prompt.id,
            "split": split,
            "messages": json.dumps([asdict(message) for message in prompt.messages], ensure_ascii=False),
            "token_ids": prompt.token_ids,
        }
        for split, group in prompts.items()
        for prompt in group
    ]
    write_rows(path, PROMPTS, rows)


def read_prompts(path: Path) -> dict[Split, tuple[Prompt, ...]]:
    """The prompts of `path` by split, in the file's order."""
    groups: dict[Split, list[Prompt]] = {"train": [], "held_out": []}
    for row in read_rows(path, PROMPTS):
        messages = tuple(Message(**message) for message in json.loads(row["messages"]))
        groups[row["split"]].append(Prompt(row["id"], messages, tuple(row["token_ids"])))
    return {split: tuple(group) for split, group in groups.items()}


def read_round_prompts(folder: Path) -> dict[str, Prompt]:
    """The prompts of a round in `folder` that are a dataset's and not the run's, by id; empty where it has none.

    They lie in prompts.parquet beside the round's answers, or beside those of its parts.
    """
    files = sorted(folder.rglob("prompts.parquet"))
    return {prompt.id: prompt for file in files for prompt in read_prompts(file)["train"]}


def write_held_out(path: Path, answers: Sequence[HeldOutAnswer]) -> None:
    """One row a held-out answer."""
    rows = [
        asdict(answer.candidate)
        | {
            "score": answer.score,
            "abstain_reason": answer.abstain_reason,
            "initial_logprobs": answer.initial_logprobs,
            "reference_logprobs": answer.reference_logprobs,
            "gold_score": answer.gold_score,
            "gold_abstain_reason": answer.gold_abstain_reason,
        }
        for answer in answers
    ]
    write_rows(path, HELD_OUT, rows)


def read_held_out(path: Path) -> list[HeldOutAnswer]:
    """The held-out answers of `path`."""
    return [
        HeldOutAnswer(
            candidate_of(row),
            row["score"],
            row["abstain_reason"],
            tuple(row["initial_logprobs"]),
            None if row["reference_logprobs"] is None else tuple(row["reference_logprobs"]),
            row["gold_score"],
            row["gold_abstain_reason"],
        )
        for row in read_rows(path, HELD_OUT)
    ]
