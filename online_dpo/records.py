"""The nouns as parquet files, and back. A file says what its columns are; nothing in it can run code."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from online_dpo.tables import TableReader, TableWriter, column_values, each_row, read_rows, write_rows
from online_dpo.types import Abstain, Candidate, Message, Pair, Prompt, Split, Verdict

AT_ONCE = 8192
"""Prompts that are made rows at once."""
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


def write_candidates(path: Path, candidates: Sequence[Candidate]) -> None:
    """One row a candidate."""
    with TableWriter(path, CANDIDATES) as file:
        file.add(candidate_table(candidates))


def candidate_table(candidates: Sequence[Candidate]) -> pa.Table:
    """The candidates as rows of candidates.parquet."""
    columns = ([getattr(candidate, name) for candidate in candidates] for name, _ in CANDIDATE_FIELDS)
    return pa.table(
        [pa.array(values, type=kind) for values, (_, kind) in zip(columns, CANDIDATE_FIELDS, strict=True)],
        schema=CANDIDATES,
    )


def read_candidates(path: Path) -> list[Candidate]:
    """The candidates of `path`, in the file's order."""
    return list(each_candidate(path))


def each_candidate(path: Path, of: Collection[str] | None = None) -> Iterator[Candidate]:
    """As `read_candidates`, one after another; those `of` these prompts alone (their ids; None: all)."""
    wanted = None if of is None else pa.array(list(of), pa.string())
    with TableReader(path, CANDIDATES) as file:
        for batch in file.batches():
            # Before they are made: a row costs more to make than to read.
            yield from candidates_of(batch if wanted is None else batch.filter(pc.is_in(batch["prompt_id"], wanted)))


def candidates_of(table: pa.Table | pa.RecordBatch) -> list[Candidate]:
    """The candidates in rows of candidates.parquet. Where log-probs were not read they are empty."""
    columns = [
        column_values(table.column(name)) if name in table.schema.names else [()] * len(table)
        for name, _ in CANDIDATE_FIELDS
    ]
    return [Candidate(*row) for row in zip(*columns, strict=True)]


def candidate_of(row: Mapping[str, Any]) -> Candidate:
    """The candidate in the candidate columns of `row`."""
    values = {name: row[name] for name, _ in CANDIDATE_FIELDS}
    return Candidate(**values | {"token_ids": tuple(row["token_ids"]), "logprobs": tuple(row["logprobs"])})


def write_verdicts(path: Path, verdicts: Sequence[Verdict | Abstain]) -> None:
    """One row a candidate; an abstention has a reason and no score. Details are JSON, null where there are none."""
    with TableWriter(path, VERDICTS) as file:
        file.add(verdict_table(verdicts))


def verdict_table(verdicts: Sequence[Verdict | Abstain]) -> pa.Table:
    """The verdicts as rows of verdicts.parquet."""
    rows = [_verdict_row(verdict) for verdict in verdicts]
    columns = zip(*rows, strict=True) if rows else [()] * len(VERDICTS)
    return pa.table(
        [pa.array(column, type=field.type) for column, field in zip(columns, VERDICTS, strict=True)], VERDICTS
    )


def _verdict_row(verdict: Verdict | Abstain) -> tuple[str, int, float | None, str | None, str | None]:
    if isinstance(verdict, Abstain):
        return verdict.prompt_id, verdict.index, None, verdict.reason.encode("utf-8", "replace").decode(), None
    details = json.dumps(dict(verdict.details)) if verdict.details else None
    return verdict.prompt_id, verdict.index, verdict.score, None, details


def read_verdicts(path: Path) -> list[Verdict | Abstain]:
    """The verdicts and abstentions of `path`."""
    with TableReader(path, VERDICTS) as file:
        return [verdict for batch in file.batches() for verdict in verdicts_of(batch)]


def verdicts_of(table: pa.Table | pa.RecordBatch) -> list[Verdict | Abstain]:
    """The verdicts and abstentions in rows of verdicts.parquet."""
    return [
        Abstain(prompt_id, index, reason)
        if score is None
        else Verdict(prompt_id, index, score, json.loads(details) if details else {})
        for prompt_id, index, score, reason, details in zip(
            *(column_values(table.column(name)) for name in VERDICTS.names), strict=True
        )
    ]


def write_pairs(path: Path, pairs: Sequence[Pair]) -> None:
    """One row a pair; the texts are for reading, the tokens stay in candidates.parquet."""
    with TableWriter(path, PAIRS) as file:
        file.add(pair_table(pairs))


def pair_table(pairs: Sequence[Pair]) -> pa.Table:
    """The pairs as rows of pairs.parquet."""
    columns = {
        "prompt_id": [pair.prompt.id for pair in pairs],
        "chosen_index": [pair.chosen.index for pair in pairs],
        "rejected_index": [pair.rejected.index for pair in pairs],
        "chosen_score": [pair.chosen_score for pair in pairs],
        "rejected_score": [pair.rejected_score for pair in pairs],
        "prompt": [pair.prompt.text for pair in pairs],
        "chosen": [pair.chosen.text for pair in pairs],
        "rejected": [pair.rejected.text for pair in pairs],
    }
    return pa.table([pa.array(columns[field.name], type=field.type) for field in PAIRS], schema=PAIRS)


def read_pairs(
    path: Path,
    prompts: Mapping[str, Prompt],
    candidates: Iterable[Candidate],
    *,
    other_prompts: bool = False,
    only: Collection[int] | None = None,
) -> list[Pair]:
    """The pairs of `path` with the very tokens and log-probs of `candidates`, of which no others are kept.

    With `other_prompts` the file may hold pairs of prompts that are not among `prompts`; they are left out. `only`: the
    places of the pairs that are wanted, None for all.
    """
    rows = [
        row
        for place, row in enumerate(each_pair(path))
        if (only is None or place in only) and (not other_prompts or row["prompt_id"] in prompts)
    ]
    wanted = {(row["prompt_id"], row[index]) for row in rows for index in ("chosen_index", "rejected_index")}
    known = {key: one for one in candidates if (key := (one.prompt_id, one.index)) in wanted}
    return [
        Pair(
            prompt=prompts[row["prompt_id"]],
            chosen=known[row["prompt_id"], row["chosen_index"]],
            rejected=known[row["prompt_id"], row["rejected_index"]],
            chosen_score=row["chosen_score"],
            rejected_score=row["rejected_score"],
        )
        for row in rows
    ]


def mean_margin(path: Path) -> float | None:
    """The mean difference of scores of the pairs of `path`; None without a pair."""
    total, count = 0.0, 0
    for row in each_pair(path):
        total += row["chosen_score"] - row["rejected_score"]
        count += 1
    return total / count if count else None


def each_pair(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of pairs.parquet without their texts, one after another."""
    return each_row(path, PAIRS, [name for name in PAIRS.names if name not in ("prompt", "chosen", "rejected")])


def write_prompts(path: Path, prompts: Mapping[Split, Sequence[Prompt]]) -> None:
    """All prompts of a run with their split."""
    with TableWriter(path, PROMPTS) as file:
        for split, group in prompts.items():
            for start in range(0, len(group), AT_ONCE):
                file.add(_prompt_table(split, group[start : start + AT_ONCE]))


def _prompt_table(split: Split, prompts: Sequence[Prompt]) -> pa.Table:
    columns = {
        "id": [prompt.id for prompt in prompts],
        "split": [split] * len(prompts),
        "messages": [
            json.dumps([asdict(message) for message in prompt.messages], ensure_ascii=False) for prompt in prompts
        ],
        "token_ids": [prompt.token_ids for prompt in prompts],
    }
    return pa.table([pa.array(columns[field.name], type=field.type) for field in PROMPTS], schema=PROMPTS)


def read_prompts(path: Path) -> dict[Split, tuple[Prompt, ...]]:
    """The prompts of `path` by split, in the file's order."""
    groups: dict[Split, list[Prompt]] = {"train": [], "held_out": []}
    shared: dict[int, int] = {}
    for row in each_row(path, PROMPTS):
        messages = tuple(Message(**message) for message in json.loads(row["messages"]))
        # One object for each token, however many prompts have it: they are most of what a million prompts take.
        token_ids = tuple(map(shared.setdefault, row["token_ids"], row["token_ids"]))
        groups[row["split"]].append(Prompt(row["id"], messages, token_ids))
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
