"""A dataset's rows as the policy sees them: tokenised once, without what must not or cannot be trained on."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from online_dpo.answers import AnswerEncoder
from online_dpo.errors import DataError
from online_dpo.given_answers import load_given_answers
from online_dpo.preferences import load_preferences
from online_dpo.prompts import message_id, with_system
from online_dpo.source_spec import DatasetSpec
from online_dpo.types import Candidate, Message, Prompt


@dataclass(frozen=True, slots=True)
class Answer:
    """A given answer's text and its tokens, the token that ends it included."""

    text: str
    token_ids: array[int]


@dataclass(frozen=True, slots=True)
class Row:
    """A prompt with its chosen and, of a preference pair, its rejected answer. `prompt.id` is the dataset's own."""

    prompt: Prompt
    chosen: Answer
    rejected: Answer | None

    def candidates(self, prompt_id: str) -> list[Candidate]:
        """The answers as candidates of the prompt that is called `prompt_id` in a round: 0 chosen, 1 rejected.

        They have no log-probs: nobody sampled them from a policy.
        """
        answers = [self.chosen] if self.rejected is None else [self.chosen, self.rejected]
        return [
            Candidate(prompt_id, index, answer.text, tuple(answer.token_ids), (), finish_reason="stop", seed=0)
            for index, answer in enumerate(answers)
        ]


@dataclass(frozen=True)
class DatasetRows:
    """The usable rows of a dataset.

    `rows`: in the dataset's order, their prompts' ids distinct, and different from those of another dataset's.
    `of_prompt`: the rows of each of the run's training prompts that has some. `dropped`: how many rows were left out,
    by reason. `digest`: of all texts and tokens.
    """

    rows: tuple[Row, ...]
    of_prompt: dict[str, tuple[Row, ...]]
    dropped: dict[str, int]
    digest: str
    path: str


@dataclass(frozen=True)
class Reading:
    """What a dataset is read for: whose tokens, the run's prompts, and how long rows may be.

    `system` is `prompts.system`. `longest_prompt` and `longest` (prompt and answer; None: any) are in tokens.
    """

    encoder: AnswerEncoder
    train: Sequence[Prompt]
    held_out: Sequence[Prompt]
    longest_prompt: int
    longest: int | None
    system: str | None = None
    folders: Sequence[Path] = field(default_factory=tuple)


@dataclass(frozen=True, slots=True)
class _Given:
    """A row as its file has it."""

    id: str
    messages: tuple[Message, ...]
    texts: tuple[str, ...]


def read_dataset(spec: DatasetSpec, reading: Reading, *, answers_alone: bool) -> DatasetRows:
    """The usable rows of `spec`: preference pairs, or with `answers_alone` one given answer a prompt.

    Left out and counted, beside what reading them leaves out: `held_out`, a row whose prompt the run keeps for
    measuring; `prompt_too_long`; `too_long`, prompt and answer together longer than the model takes (an answer cut
    short would be another one than was labelled); `has_end`, an answer with a token inside at which the policy would
    have stopped. A row of one of the run's prompts is given that prompt's tokens (a system message makes no other one).
    Raises `DataError`: what cannot be read, or no usable row.
    """
    given, lost = _given(spec, reading, answers_alone=answers_alone)
    dropped = Counter(lost)
    train = {_key(prompt.messages): prompt for prompt in reading.train}
    held_out = {_key(prompt.messages) for prompt in reading.held_out}
    rows, own = [], []
    for one in given:
        key = _key(one.messages)
        row = "held_out" if key in held_out else _tokenised(one, train.get(key), reading, spec.path)
        if isinstance(row, str):
            dropped[row] += 1
        else:
            rows.append(row)
            own.append(train[key].id if key in train else None)
    if not rows:
        raise DataError(f"{spec.path}: no usable row (dropped: {describe_dropped(dropped)})")
    return _collected(rows, own, dict(dropped), spec.path)


def describe_dropped(dropped: dict[str, int]) -> str:
    """`3 too long, 1 held out`, or `none`."""
    return ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in dropped.items() if count) or "none"


def _given(spec: DatasetSpec, reading: Reading, *, answers_alone: bool) -> tuple[Iterator[_Given], dict[str, int]]:
    if answers_alone:
        answers = load_given_answers(
            spec.path, folders=reading.folders, split=spec.split, limit=spec.limit, name=spec.name
        )
        return (_Given(one.id, one.messages, (one.text,)) for one in answers.answers), answers.dropped
    pairs = load_preferences(spec.path, folders=reading.folders, split=spec.split, limit=spec.limit, name=spec.name)
    return (_Given(one.id, one.messages, (one.chosen, one.rejected)) for one in pairs.pairs), pairs.dropped


def _key(messages: Sequence[Message]) -> str:
    """Tells what is asked apart, whatever system message stands before it: the experiment's, the dataset's or none."""
    return message_id(messages[1:] if messages[0].role == "system" else messages)


def _tokenised(one: _Given, known: Prompt | None, reading: Reading, path: str) -> Row | str:
    """The row, or why it is left out. `known`: the run's prompt that it belongs to."""
    where = f"{path}: row '{one.id}'"
    if known is not None:
        messages, prompt_ids = known.messages, known.token_ids
    else:
        messages = with_system(one.messages, reading.system) if len(one.messages) == 1 else one.messages
        prompt_ids = reading.encoder.prompt(messages, where)
    if len(prompt_ids) > reading.longest_prompt:
        return "prompt_too_long"
    answers = []
    encoded = reading.encoder.answers(messages, one.texts, prompt_ids, where)
    for text, token_ids in zip(one.texts, encoded, strict=True):
        if token_ids is None:
            return "has_end"
        if reading.longest is not None and len(prompt_ids) + len(token_ids) > reading.longest:
            return "too_long"
        answers.append(Answer(text, array("i", token_ids)))
    return Row(Prompt(one.id, messages, prompt_ids), answers[0], answers[1] if len(answers) > 1 else None)


def _collected(rows: Sequence[Row], own: Sequence[str | None], dropped: dict[str, int], path: str) -> DatasetRows:
    total = hashlib.sha256()
    for row in rows:
        answers = [row.chosen] if row.rejected is None else [row.chosen, row.rejected]
        parts = [row.prompt.id, list(row.prompt.token_ids), [[one.text, list(one.token_ids)] for one in answers]]
        total.update(json.dumps(parts).encode() + b"\n")
    digest = total.hexdigest()
    # The dataset's ids may be those of the run's prompts, or of another dataset's rows.
    named = [replace(row, prompt=replace(row.prompt, id=f"{digest[:8]}:{row.prompt.id}")) for row in rows]
    of_prompt: dict[str, list[Row]] = {}
    for row, prompt_id in zip(named, own, strict=True):
        if prompt_id is not None:
            of_prompt.setdefault(prompt_id, []).append(row)
    return DatasetRows(tuple(named), {key: tuple(found) for key, found in of_prompt.items()}, dropped, digest, path)
