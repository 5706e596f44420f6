"""Preference data: pairs of answers of which people, or a model, chose one. Read from the common forms into one.

Four forms are known, told apart by their columns:

- `chosen`, `rejected` alone, whole dialogues: text of "Human:" and "Assistant:" turns with an empty line before each
  (HH-RLHF, Bai et al. 2022), or lists of {role, content};
- a prompt column (`prompt`, `question` or `instruction`), `chosen`, `rejected`, each text or a list of
  {role, content}; an answer's list may hold the answer alone or the whole chat (UltraFeedback);
- `instruction`, `input`, `chosen`, `rejected`: a non-empty input follows its instruction;
- `info`, `summaries`, `choice`: the TL;DR comparisons (Stiennon et al. 2020).
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from online_dpo.config import PromptsSpec
from online_dpo.errors import DataError
from online_dpo.measure import Interval, win_rate
from online_dpo.prompts import message_id, read_rows, to_message
from online_dpo.types import Candidate, Message, Prompt

PROMPT_COLUMNS = ("prompt", "question", "instruction")
SUMMARY_COLUMNS = {"info", "summaries", "choice"}
FORMS = (
    "chosen + rejected (dialogues), prompt|question|instruction + chosen + rejected, "
    "instruction + input + chosen + rejected, info + summaries + choice"
)
TURN = re.compile(r"\n\n(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}
Answered = tuple[tuple[Message, ...], str]
"""The messages before an answer, and the answer."""


@dataclass(frozen=True, slots=True)
class Preference:
    """Two different answers to one prompt; `chosen` was preferred. `messages` end with the user's turn."""

    id: str
    messages: tuple[Message, ...]
    chosen: str
    rejected: str


@dataclass(frozen=True)
class PreferenceSet:
    """Pairs in the order of their source, with distinct ids.

    `dropped` counts the rows left out: `prompts_differ`, `empty` (an answer or the prompt), `identical` (answers),
    `no_question` (the prompt does not end with the user's turn), `undecided` (no choice).
    `source` is the path or dataset id as it was given.
    """

    pairs: tuple[Preference, ...]
    dropped: dict[str, int]
    source: str


def load_preferences(
    path: str,
    *,
    folders: Sequence[Path] = (),
    split: str = "train",
    limit: int | None = None,
    seed: int = 0,
    name: str | None = None,
) -> PreferenceSet:
    """The pairs of `path`: a file (.jsonl, .json, .csv, .parquet, also compressed), a folder, or a hub dataset's id.

    `folders` are searched for a relative path before the current folder; `name` is a hub dataset's configuration.
    `limit` draws that many of the usable pairs; which ones follows from `seed` and their ids alone.
    Raises `DataError`: nothing there, unknown columns, a row that is no pair, no usable pair.
    """
    if limit is not None and limit < 1:
        raise DataError(f"{path}: limit must be at least 1, got {limit}")
    rows = read_rows(PromptsSpec(path=path, split=split, name=name), [*folders, Path.cwd()], "preference pairs")
    dropped: Counter[str] = Counter(prompts_differ=0, empty=0, identical=0, no_question=0, undecided=0)
    pairs = [pair for pair in parse_pairs(rows, path, dropped) if pair is not None]
    if not pairs:
        lost = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in dropped.items() if count)
        raise DataError(f"{path}: no usable preference pair" + (f" (dropped: {lost})" if lost else ""))
    return PreferenceSet(drawn(pairs, limit, seed), dict(dropped), path)


def is_preference_form(columns: Sequence[str]) -> bool:
    """Whether a table of these columns holds preference pairs."""
    return {"chosen", "rejected"} <= set(columns) or set(columns) >= SUMMARY_COLUMNS


def parse_pairs(rows: Any, path: str, dropped: Counter[str]) -> Iterator[Preference | None]:
    """The pair of each row of a `datasets.Dataset`; None, counted into `dropped`, for a row that holds none.

    Raises `DataError`: unknown columns, a row that is no pair.
    """
    if not is_preference_form(rows.column_names):
        columns = rows.column_names
        raise DataError(
            f"{path}: no preference pairs in columns {', '.join(columns)}{_misspelt(columns)}; known forms: {FORMS}"
        )
    for number, (pair_id, row) in enumerate(zip(row_ids(rows), rows, strict=True), start=1):
        yield _preference(pair_id, row, f"{path}: row {number}", dropped)


def _misspelt(columns: Sequence[str]) -> str:
    """Which column may have been meant as one that is missing; empty where none looks like it."""
    for wanted in ("chosen", "rejected"):
        close = difflib.get_close_matches(wanted, columns, n=1, cutoff=0.6) if wanted not in columns else []
        if close:
            return f" (is '{close[0]}' meant to be '{wanted}'?)"
    return ""


def as_comparison(preference: Preference) -> tuple[Prompt, Candidate, Candidate]:
    """(prompt, chosen, rejected) as judges take them: nothing tokenised, chosen has index 0 and rejected 1.

    The prompt's id is the preference's: two pairs of one prompt stay two questions.
    """
    prompt = Prompt(preference.id, preference.messages, ())
    chosen, rejected = (
        Candidate(preference.id, index, text, token_ids=(), logprobs=(), finish_reason="stop", seed=0)
        for index, text in enumerate((preference.chosen, preference.rejected))
    )
    return prompt, chosen, rejected


def group_of(preference: Preference) -> str:
    """A digest of the prompt: equal for pairs of one prompt, which a split must keep together."""
    return message_id(preference.messages)


def longer_wins(pairs: Sequence[Preference]) -> Interval:
    """How often the longer answer was chosen, ties counting one half, with Wilson's interval over the pairs.

    Length is in characters, without white space at the ends: what a judge that has learned length alone would reach.
    """
    return win_rate([len(pair.chosen.strip()) for pair in pairs], [len(pair.rejected.strip()) for pair in pairs])


# --- rows ---


def row_ids(rows: Any) -> list[str]:
    """The rows' own `id`s where all are there and different; else the rows' numbers, counted from 1."""
    if "id" in rows.column_names:
        own = [str(value).strip() if value is not None else "" for value in rows["id"]]
        if all(own) and len(set(own)) == len(own):
            return own
    return [str(number) for number in range(1, len(rows) + 1)]


def _preference(pair_id: str, row: Mapping[str, Any], where: str, dropped: Counter[str]) -> Preference | None:
    """The row's pair; None, counted into `dropped`, where it holds none."""
    both = summaries(row, where) if set(row) >= SUMMARY_COLUMNS else _dialogues(row, where)
    if both is None:
        dropped["undecided"] += 1
        return None
    (messages, chosen), (other, rejected) = both
    reason = None
    if messages != other:
        reason = "prompts_differ"
    elif not chosen or not rejected or not messages or not messages[-1].content.strip():
        reason = "empty"
    elif chosen == rejected:
        reason = "identical"
    elif messages[-1].role != "user":
        reason = "no_question"
    if reason is not None:
        dropped[reason] += 1
        return None
    return Preference(pair_id, messages, chosen, rejected)


def _dialogues(row: Mapping[str, Any], where: str) -> tuple[Answered, Answered]:
    prompt = prompt_column(row, where)
    return (
        split_answer(prompt, row["chosen"], f"{where}: column 'chosen'"),
        split_answer(prompt, row["rejected"], f"{where}: column 'rejected'"),
    )


def prompt_column(row: Mapping[str, Any], where: str) -> tuple[Message, ...] | None:
    """The messages of the row's prompt column; None when there is no such column."""
    column = next((column for column in PROMPT_COLUMNS if column in row), None)
    if column is None:
        return None
    value = row[column]
    if isinstance(value, list):
        return tuple(to_message(turn, f"{where}: column '{column}'") for turn in value)
    if value is not None and not isinstance(value, str):
        raise DataError(
            f"{where}: column '{column}': text or a list of {{role, content}} is needed, found {value!r:.80}"
        )
    text = value or ""
    turns = prompt_turns(text)
    if turns:
        return turns
    extra = row.get("input") if column == "instruction" else None
    return (Message("user", f"{text}\n\n{extra}" if isinstance(extra, str) and extra.strip() else text),)


def split_answer(prompt: tuple[Message, ...] | None, value: Any, where: str) -> Answered:
    """The messages before the answer that `value` holds, and the answer; "" where it does not end with one."""
    if value is None:
        return prompt or (), ""
    if isinstance(value, str):
        turns = read_turns(value)
        if not turns and prompt is not None:
            return prompt, value.strip()
        if not turns and value.strip():
            raise DataError(f"{where}: no prompt before the answer, and no column {', '.join(PROMPT_COLUMNS)}")
    elif isinstance(value, list):
        turns = tuple(to_message(turn, where) for turn in value)
        if len(turns) == 1 and prompt is not None and turns[0].role == "assistant":
            return prompt, turns[0].content.strip()
    else:
        raise DataError(f"{where}: text or a list of {{role, content}} is needed, found {type(value).__name__}")
    if not turns or turns[-1].role != "assistant":
        return turns, ""
    return turns[:-1], turns[-1].content.strip()


def read_turns(text: str) -> tuple[Message, ...]:
    """The turns of a "Human:"/"Assistant:" dialogue; empty where `text` is none."""
    before, *parts = TURN.split("\n\n" + text.lstrip())
    if before or not parts:
        return ()
    return tuple(Message(ROLES[who], said.strip()) for who, said in zip(parts[::2], parts[1::2], strict=True))


def prompt_turns(text: str) -> tuple[Message, ...]:
    """`read_turns` of a prompt, which may end with the bare name of who speaks next."""
    turns = read_turns(text)
    return turns[:-1] if turns[-1:] == (Message("assistant", ""),) else turns


def summaries(row: Mapping[str, Any], where: str) -> tuple[Answered, Answered] | None:
    """Both summaries of a post or article, the chosen one first; None where nobody chose."""
    info, summaries, choice = row["info"], row["summaries"], row["choice"]
    texts = [one.get("text") for one in summaries or () if isinstance(one, Mapping)]
    if not isinstance(info, Mapping) or len(texts) != 2 or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where}: `info` and two `summaries` with a text each are needed")
    if choice is None:
        return None
    if choice not in {0, 1}:
        raise DataError(f"{where}: choice must be 0 or 1, found {choice!r:.80}")
    messages = (Message("user", _summary_prompt(info)),)
    return (messages, texts[choice].strip()), (messages, texts[1 - choice].strip())


def _summary_prompt(info: Mapping[str, Any]) -> str:
    """The request that the summaries answer, laid out as Stiennon et al. 2020 give it to their models."""
    parts = (("SUBREDDIT", "subreddit"), ("TITLE", "title"), ("POST", "post"), ("ARTICLE", "article"))
    lines = [f"{label}: {info[key]}" for label, key in parts if info.get(key)]
    return "\n\n".join([*lines, "TL;DR:"]) if lines else ""


class HasId(Protocol):
    """A row that can be drawn."""

    @property
    def id(self) -> str:
        """Different from those of all other rows."""


Drawn = TypeVar("Drawn", bound=HasId)


def drawn(rows: Sequence[Drawn], limit: int | None, seed: int) -> tuple[Drawn, ...]:
    """`limit` of `rows`, in their own order; all where `limit` is None. Which follows from `seed` and their ids."""
    if limit is None or limit >= len(rows):
        return tuple(rows)

    def rank(row: Drawn) -> bytes:
        return hashlib.sha256(f"{seed}\0{row.id}".encode("utf-8", "surrogatepass")).digest()

    kept = {row.id for row in sorted(rows, key=rank)[:limit]}
    return tuple(row for row in rows if row.id in kept)
