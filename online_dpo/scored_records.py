"""Given answers with their log-probs under several policies, as parquet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from online_dpo.tables import read_rows, write_rows

LOGPROBS = pa.list_(pa.float32())
OFF_POLICY = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("index", pa.int32()),
        ("role", pa.string()),
        ("behaviour_logprobs", LOGPROBS),
        ("start_logprobs", LOGPROBS),
        ("end_logprobs", LOGPROBS),
        ("reference_logprobs", LOGPROBS),
    ]
)
HUMAN_PAIRS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("chosen_logprob", pa.float64()),
        ("rejected_logprob", pa.float64()),
        ("initial_chosen_logprob", pa.float64()),
        ("initial_rejected_logprob", pa.float64()),
    ]
)
Row = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ScoredAnswer:
    """One answer of a pair that a round trained on, with its log-probs, one a token, under the policy that sampled it
    (None: not stored), the one that began the round, the one that it trained, and the round's reference."""

    prompt_id: str
    index: int
    role: Literal["chosen", "rejected"]
    behaviour_logprobs: Row | None
    start_logprobs: Row
    end_logprobs: Row
    reference_logprobs: Row


@dataclass(frozen=True, slots=True)
class RankedPair:
    """A pair of people's, with the summed log-probs of both answers under a policy and under the initial one."""

    prompt_id: str
    chosen_logprob: float
    rejected_logprob: float
    initial_chosen_logprob: float
    initial_rejected_logprob: float


def write_off_policy(path: Path, answers: Sequence[ScoredAnswer]) -> None:
    """One row an answer: each pair's chosen one, then its rejected one."""
    write_rows(path, OFF_POLICY, [asdict(answer) for answer in answers])


def read_off_policy(path: Path) -> list[ScoredAnswer]:
    """The answers of `path`, in the file's order."""
    return [ScoredAnswer(**{name: _tuple(value) for name, value in row.items()}) for row in read_rows(path, OFF_POLICY)]


def write_human_pairs(path: Path, pairs: Sequence[RankedPair]) -> None:
    """One row a pair."""
    write_rows(path, HUMAN_PAIRS, [asdict(pair) for pair in pairs])


def read_human_pairs(path: Path) -> list[RankedPair]:
    """The pairs of `path`, in the file's order."""
    return [RankedPair(**row) for row in read_rows(path, HUMAN_PAIRS)]


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
