"""Held-out preference pairs by people, tokenised once, as the policy would see and sample them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa

from online_dpo.dataset_rows import DatasetRows, Reading
from online_dpo.errors import DataError
from online_dpo.files import digest_json
from online_dpo.preferences import Preference, drawn, group_of, load_preferences
from online_dpo.prompts import message_id, with_system
from online_dpo.source_spec import DatasetSpec
from online_dpo.tables import read_rows, write_rows
from online_dpo.types import Candidate, Message, Pair, Prompt

TOKENS = pa.list_(pa.int32())
GIVEN_PAIRS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("messages", pa.string()),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("prompt_token_ids", TOKENS),
        ("chosen_token_ids", TOKENS),
        ("rejected_token_ids", TOKENS),
    ]
)


@dataclass(frozen=True, slots=True)
class HumanPairs:
    """The pairs, and how many were left out, by reason. Prompts that are the same have the same id."""

    pairs: tuple[Pair, ...] = ()
    dropped: dict[str, int] | None = None


def load_human_pairs(spec: DatasetSpec | None, reading: Reading, datasets: Iterable[DatasetRows] = ()) -> HumanPairs:
    """Read and tokenise the pairs of `spec` (None: there are none).

    Left out beside what `load_preferences` leaves out: `trained_on`, a prompt that the run or one of its `datasets`
    trains on; of the others at most `spec.limit` are drawn, and of these left out `too_long`, prompt and answer
    together longer than the model takes, and `has_end`, an answer with a token inside at which the policy would have
    stopped. Raises `DataError` when no pair is left, and for what cannot be read.
    """
    if spec is None:
        return HumanPairs()
    found = load_preferences(spec.path, folders=reading.folders, split=spec.split, name=spec.name)
    trained = {_key(prompt.messages) for prompt in reading.train}
    trained |= {_key(row.prompt.messages) for rows in datasets for row in rows.rows}
    others = [preference for preference in found.pairs if _key(preference.messages) not in trained]
    dropped = found.dropped | {"trained_on": len(found.pairs) - len(others), "too_long": 0, "has_end": 0}
    pairs = []
    for preference in drawn(others, spec.limit, seed=0):
        pair = _tokenised(preference, reading, f"{spec.path}: pair '{preference.id}'")
        if pair is None:
            dropped["has_end"] += 1
        elif reading.longest is not None and _length(pair) > reading.longest:
            dropped["too_long"] += 1
        else:
            pairs.append(pair)
    if not pairs:
        lost = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in dropped.items() if count)
        raise DataError(f"evaluation.pairs: {spec.path} has no pair to measure by (dropped: {lost})")
    return HumanPairs(tuple(pairs), dropped)


def _key(messages: Sequence[Message]) -> str:
    """Tells what is asked apart, whatever system message stands before it."""
    return message_id(messages[1:] if messages[0].role == "system" else messages)


def _tokenised(preference: Preference, reading: Reading, where: str) -> Pair | None:
    asked = preference.messages
    messages = with_system(asked, reading.system) if len(asked) == 1 else asked
    prompt = Prompt(group_of(preference), messages, reading.encoder.prompt(messages, where))
    answers = []
    for index, text in enumerate((preference.chosen, preference.rejected)):
        token_ids = reading.encoder.answer(messages, text, where)
        if token_ids is None:
            return None
        answers.append(_answer(prompt.id, index, text, token_ids))
    return _pair(prompt, *answers)


def _length(pair: Pair) -> int:
    """Tokens of the prompt with the longer answer."""
    return len(pair.prompt.token_ids) + max(len(pair.chosen.token_ids), len(pair.rejected.token_ids))


def _answer(prompt_id: str, index: int, text: str, token_ids: Sequence[int]) -> Candidate:
    return Candidate(prompt_id, index, text, tuple(token_ids), logprobs=(), finish_reason="stop", seed=0)


def _pair(prompt: Prompt, chosen: Candidate, rejected: Candidate) -> Pair:
    return Pair(prompt, chosen, rejected, chosen_score=1.0, rejected_score=0.0)


def pairs_digest(pairs: Sequence[Pair]) -> str:
    """What tells these pairs from others: their tokens."""
    return digest_json(
        [[list(p.prompt.token_ids), list(p.chosen.token_ids), list(p.rejected.token_ids)] for p in pairs]
    )


def write_given_pairs(path: Path, pairs: Sequence[Pair]) -> None:
    """One row a pair, with its tokens."""
    rows = [
        {
            "prompt_id": pair.prompt.id,
            "messages": json.dumps([asdict(message) for message in pair.prompt.messages], ensure_ascii=False),
            "chosen": pair.chosen.text,
            "rejected": pair.rejected.text,
            "prompt_token_ids": pair.prompt.token_ids,
            "chosen_token_ids": pair.chosen.token_ids,
            "rejected_token_ids": pair.rejected.token_ids,
        }
        for pair in pairs
    ]
    write_rows(path, GIVEN_PAIRS, rows)


def read_given_pairs(path: Path) -> tuple[Pair, ...]:
    """The pairs of `path`, in the file's order."""
    return tuple(
        _pair(
            Prompt(
                row["prompt_id"],
                tuple(Message(**message) for message in json.loads(row["messages"])),
                tuple(row["prompt_token_ids"]),
            ),
            _answer(row["prompt_id"], 0, row["chosen"], row["chosen_token_ids"]),
            _answer(row["prompt_id"], 1, row["rejected"], row["rejected_token_ids"]),
        )
        for row in read_rows(path, GIVEN_PAIRS)
    )
