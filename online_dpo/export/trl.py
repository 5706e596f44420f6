"""Pairs in the form that TRL's DPOTrainer trains on: an explicit prompt, chat messages where the prompts were chats."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from online_dpo.errors import ConfigError, RunFolderError
from online_dpo.export.card import write_pairs_card
from online_dpo.export.selection import ChosenRound, Selection, chosen_rounds, new_folder, trusted_file
from online_dpo.records import PAIRS, read_candidates, read_prompts, read_round_prompts
from online_dpo.store import RunStore
from online_dpo.tables import read_rows
from online_dpo.templates import DIALOGUE
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
"""Columns that TRL leaves alone. `…_ended`: whether the end token was sampled (or written), not cut off."""

Decode = Callable[[Sequence[int]], str]
"""Token ids as text, without special tokens."""


def export_trl(store: RunStore, selection: Selection, out: Path, decode: Decode, kind: FileKind = "parquet") -> int:
    """Write the pairs of `selection` to `out`/pairs.parquet (or .jsonl) and a card beside it; returns how many.

    Chats are messages where the tokenizer's own template writes them; dialogues (`prompts.template`), which it knows
    nothing of, are the text that the policy saw. Raises `RunFolderError` when there are no pairs, or the folder is in
    use; `ConfigError` for a template of the user's own, which TRL would have to be given.
    """
    chat = _as_messages(store)
    prompts = {p.id: p for group in read_prompts(store.root / "prompts.parquet").values() for p in group}
    rounds = list(chosen_rounds(store, selection))
    rows = [row for one in rounds for row in _rows(one, prompts, None if chat else decode)]
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


def _as_messages(store: RunStore) -> bool:
    template = store.experiment.prompts.template
    if template not in (None, DIALOGUE):
        raise ConfigError(
            f"prompts.template {template}: TRL takes chats by the tokenizer's own template; export --format parquet"
        )
    return template is None and bool(store.manifest["prompts"]["chat_template"])


def _rows(one: ChosenRound, prompts: Mapping[str, Prompt], decode: Decode | None) -> Iterator[dict[str, Any]]:
    """A row a pair, as text by `decode`; None: as messages."""
    pairs = trusted_file(one.folder, "pairs.parquet")
    if pairs is None:
        return
    answers = _answers(one)
    prompts = {**prompts, **read_round_prompts(one.folder.path)}
    for row in read_rows(pairs, PAIRS):
        if row["prompt_id"] not in prompts:
            raise RunFolderError(f"{pairs}: its prompt '{row['prompt_id']}' is in no prompts.parquet")
        prompt = prompts[row["prompt_id"]]
        sides = {side: answers[row["prompt_id"], row[f"{side}_index"]] for side in ("chosen", "rejected")}
        yield {
            "prompt": _messages(prompt) if decode is None else decode(prompt.token_ids),
            **{
                side: _turn(answer) if decode is None else text_after(prompt, answer, decode)
                for side, answer in sides.items()
            },
            **{f"{side}_ended": answer.finish_reason == "stop" for side, answer in sides.items()},
            **{name: row[name] for name in ("chosen_score", "rejected_score", "prompt_id")},
            "arm": one.arm,
            "seed": one.seed,
            "round": one.folder.index,
        }


def _answers(one: ChosenRound) -> dict[tuple[str, int], Candidate]:
    file = trusted_file(one.folder, "candidates.parquet")
    found: Sequence[Candidate] = [] if file is None else read_candidates(file)
    return {(answer.prompt_id, answer.index): answer for answer in found}


def _messages(prompt: Prompt) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in prompt.messages]


def _turn(answer: Candidate) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": answer.text}]


def text_after(prompt: Prompt, answer: Candidate, decode: Decode) -> str:
    """The answer's text as it goes on from the prompt's: with the space that a decoder drops in front."""
    before, both = decode(prompt.token_ids), decode([*prompt.token_ids, *answer.token_ids])
    return both[len(before) :] if both.startswith(before) else answer.text


def decoding(tokenizer: Any) -> Decode:
    """By the tokenizer's own decoder."""
    return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
