"""Real prompts and answers as token rows of wanted lengths, from people's preferences (HH-RLHF helpful-base)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rows import Row

from online_dpo.preferences import Preference, load_preferences

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
PREFERENCES = SHARED / "pairs" / "helpful-base.test.jsonl.gz"


def preferences() -> list[Preference]:
    """All usable pairs. Ends the program with one line where the file is absent."""
    if not PREFERENCES.is_file():
        raise SystemExit("the preference pairs (../shared/data/pairs/helpful-base.test.jsonl.gz) are not here")
    return list(load_preferences(str(PREFERENCES)).pairs)


def exact_rows(tokenizer: Any, count: int, prompt: int, completion: int) -> list[Row]:
    """`count` rows of exactly `prompt` and twice `completion` tokens, so that nobody computes padding.

    A prompt is the end of all dialogues so far, which makes it long enough and different from every other one.
    """
    rows: list[Row] = []
    before: list[int] = []
    for preference in preferences():
        before += _prompt_ids(tokenizer, preference)
        chosen, rejected = _answer_ids(tokenizer, preference)
        if min(len(chosen), len(rejected)) >= completion and len(before) >= prompt:
            rows.append(Row(before[-prompt:], chosen[:completion], rejected[:completion]))
        if len(rows) == count:
            return rows
    raise SystemExit(f"the preference pairs hold only {len(rows)} of {count} pairs of these lengths")


def natural_rows(tokenizer: Any, count: int, longest: int, seed: int = 0) -> list[Row]:
    """`count` rows as long as people wrote them, drawn from those with both sequences within `longest` tokens."""
    found = list(preferences())
    random.Random(seed).shuffle(found)
    return [row for row, _ in zip(_whole(tokenizer, found, longest), range(count), strict=False)]


def single_turn_questions(count: int, longest_characters: int = 300) -> list[str]:
    """`count` different first questions of people."""
    asked = dict.fromkeys(
        p.messages[0].content
        for p in preferences()
        if len(p.messages) == 1 and len(p.messages[0].content) <= longest_characters
    )
    if len(asked) < count:
        raise SystemExit(f"the preference pairs hold only {len(asked)} of {count} short questions")
    return list(asked)[:count]


def _whole(tokenizer: Any, found: Sequence[Preference], longest: int) -> Iterator[Row]:
    for preference in found:
        row = Row(_prompt_ids(tokenizer, preference), *_answer_ids(tokenizer, preference))
        if min(row.lengths) > 0 and len(row.prompt) + max(row.lengths[1:]) <= longest:
            yield row


def _prompt_ids(tokenizer: Any, preference: Preference) -> list[int]:
    if tokenizer.chat_template is None:
        text = "\n".join(message.content for message in preference.messages)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    messages = [{"role": message.role, "content": message.content} for message in preference.messages]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _answer_ids(tokenizer: Any, preference: Preference) -> tuple[list[int], list[int]]:
    chosen, rejected = (
        list(tokenizer(text, add_special_tokens=False)["input_ids"])
        for text in (preference.chosen, preference.rejected)
    )
    return chosen, rejected
