"""Pairs in the form that TRL's DPOTrainer trains on: an explicit prompt, chat messages where the prompts were chats."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from online_dpo.errors import RunFolderError
from online_dpo.export.card import write_pairs_card
from online_dpo.export.selection import ChosenRound, Selection, chosen_rounds, new_folder, trusted_file
from online_dpo.records import PAIRS, read_candidates, read_prompts, read_round_prompts, read_rows
from online_dpo.store import RunStore
from online_dpo.types import Candidate, Prompt

FileKind = Literal["parquet", "jsonl"]

TURNS = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
BESIDE: list[tuple[str, pa.DataType]] = [
    ("chosen_score", pa.float64()),
    ("rejected_score", pa.float64()),
    ("chosen_ended", pa.bool_()),
    ("rejected_ended", pa.bool_()),
    ("prompt_id", pa.string()),
    ("arm", pa.string()),
    ("seed", pa.int64()),
    ("round", pa.int32()),
]
"""Columns that TRL leaves alone. `…_ended`: whether the end token was sampled, not cut off; null: not known."""

Continue = Callable[[Prompt, Candidate], str]
"""The text of an answer as it goes on from its prompt's text: with the space that a decoder drops in front."""


def export_trl(
    store: RunStore, selection: Selection, out: Path, continued: Continue, kind: FileKind = "parquet"
) -> int:
    """Write the pairs of `selection` to `out`/pairs.parquet (or .jsonl) and a card beside it; returns how many.

    Raises `RunFolderError` when there are none, or the folder is in use.
    """
    chat = bool(store.manifest["prompts"]["chat_template"])
    prompts = {p.id: p for group in read_prompts(store.root / "prompts.parquet").values() for p in group}
    rounds = list(chosen_rounds(store, selection))
    rows = [row for one in rounds for row in _rows(one, prompts, chat, continued)]
    if not rows:
        raise RunFolderError(f"{store.root}: no pairs in the closed rounds that were asked for")
    new_folder(out)
    file = out / f"pairs.{kind}"
    if kind == "parquet":
        text: pa.DataType = TURNS if chat else pa.string()
        schema = pa.schema([("prompt", text), ("chosen", text), ("rejected", text), *BESIDE])
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), file, compression="zstd")
    else:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_pairs_card(store, rounds, file, len(rows), chat)
    return len(rows)


def _rows(one: ChosenRound, prompts: Mapping[str, Prompt], chat: bool, continued: Continue) -> Iterator[dict[str, Any]]:
    pairs = trusted_file(one.folder, "pairs.parquet")
    if pairs is None:
        return
    answers = _answers(one)
    prompts = {**prompts, **read_round_prompts(one.folder.path)}
    for row in read_rows(pairs, PAIRS):
        prompt = prompts.get(row["prompt_id"])
        found: dict[str, Any] = {}
        for side in ("chosen", "rejected"):
            answer = answers.get((row["prompt_id"], row[f"{side}_index"], row[side]))
            text = row[side] if answer is None or prompt is None or chat else continued(prompt, answer)
            found[side] = [{"role": "assistant", "content": text}] if chat else text
            found[f"{side}_ended"] = None if answer is None else answer.finish_reason == "stop"
        yield {
            "prompt": _prompt(prompt, row["prompt"], chat),
            **found,
            **{name: row[name] for name in ("chosen_score", "rejected_score", "prompt_id")},
            "arm": one.arm,
            "seed": one.seed,
            "round": one.folder.index,
        }


def _answers(one: ChosenRound) -> dict[tuple[str, int, str], Candidate]:
    """The round's answers by prompt, index and text: pairs of other rounds or of people have none here."""
    file = trusted_file(one.folder, "candidates.parquet")
    found: Sequence[Candidate] = [] if file is None else read_candidates(file)
    return {(answer.prompt_id, answer.index, answer.text): answer for answer in found}


def _prompt(prompt: Prompt | None, text: str, chat: bool) -> Any:
    if not chat:
        return text if prompt is None else prompt.text
    if prompt is None:
        return [{"role": "user", "content": text}]
    return [{"role": message.role, "content": message.content} for message in prompt.messages]


def continuing(tokenizer: Any) -> Continue:
    """By the tokenizer's own decoder: what the prompt's and the answer's tokens together say after the prompt's."""

    def continued(prompt: Prompt, answer: Candidate) -> str:
        def text(ids: Sequence[int]) -> str:
            return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

        before, both = text(prompt.token_ids), text([*prompt.token_ids, *answer.token_ids])
        return both[len(before) :] if both.startswith(before) else answer.text

    return continued
