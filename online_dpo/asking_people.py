"""Asking a person to rank a run's stored answers: what is asked, in which order, and what is kept. No terminal here.

Questions are blind: they hold a prompt and texts, not the arm, round or score that these belong to. Answers of a run
that is still at work can be asked about as well: only finished stages are read, and these are held against their
digests.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from online_dpo.config import NAME
from online_dpo.display import clean
from online_dpo.errors import ConfigError, RunFolderError, nearest, one_line
from online_dpo.files import sync_folder
from online_dpo.judging.people import (
    PersonAnswer,
    Ranking,
    answer_line,
    question_id,
    read_people,
    undo_line,
    whole_lines,
)
from online_dpo.records import read_candidates, read_held_out, read_prompts, read_round_prompts
from online_dpo.seeds import derive_seed
from online_dpo.store import RunStore
from online_dpo.types import Candidate, Message, Prompt, Split

MOST_SHOWN = 16
"""Answers in one question: more than a person can rank. Of more, some are drawn by chance."""
DEEPEST_INDENT = 16
"""Spaces kept at the start of a line: an answer cannot push its text out of sight."""


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and at least two texts to rank. `seen` groups the texts (by place) that look the same to a person."""

    prompt_id: str
    messages: tuple[Message, ...]
    texts: tuple[str, ...]
    seen: Ranking

    @property
    def id(self) -> str:
        """The same in every order of the texts."""
        return question_id(self.messages, self.texts)


@dataclass(frozen=True, slots=True)
class Choice:
    """Which of a run's answers are asked about; None: all. `against`: the round that held-out answers are held
    against (the initial policy's is round 0), beside those of `round` (None: the last finished one)."""

    stage: Split = "train"
    arm: str | None = None
    seed: int | None = None
    round: int | None = None
    against: int = 0


# --- what is asked ---


def gather(store: RunStore, choice: Choice, person: str) -> tuple[list[Question], int]:
    """The questions in `person`'s order, and how many were left out because all their answers look the same.

    The same answers in several arms or rounds are one question. Order of questions and of texts follows from the
    person's name and the question alone: it is random, the same after a restart, and another for another person.
    Raises `ConfigError` for an arm or seed that the run does not have, `RunFolderError` when there is nothing to rank.
    """
    _check(store, choice)
    prompts = {prompt.id: prompt for group in read_prompts(store.root / "prompts.parquet").values() for prompt in group}
    prompts |= read_round_prompts(store.root / "arms")
    found: dict[str, Question] = {}
    alike: set[tuple[tuple[Message, ...], str]] = set()
    groups = _train_groups(store, choice) if choice.stage == "train" else _held_out_groups(store, choice)
    for prompt_id, texts in groups:
        if prompt_id not in prompts:
            raise RunFolderError(
                f"{store.root}: an answer belongs to prompt '{prompt_id}', which prompts.parquet lacks"
            )
        question = _question(prompts[prompt_id], texts, person)
        if question is None:
            alike.add((prompts[prompt_id].messages, texts[0]))
        else:
            found.setdefault(question.id, question)
    if not found:
        reason = "nothing to rank: all answers to a prompt look the same" if alike else _nothing(choice)
        raise RunFolderError(f"{store.root}: {reason}")
    return sorted(found.values(), key=lambda question: derive_seed("order", person, question.id)), len(alike)


def take_sample(questions: Sequence[Question], size: int | None) -> list[Question]:
    """`size` of the questions, in their order; every person gets the same ones."""
    if size is None:
        return list(questions)
    drawn = sorted((question.id for question in questions), key=lambda one: derive_seed("sample", one))[:size]
    return [question for question in questions if question.id in set(drawn)]


def _check(store: RunStore, choice: Choice) -> None:
    experiment = store.experiment
    if choice.arm is not None and choice.arm not in experiment.arms:
        known = ", ".join(experiment.arms)
        raise ConfigError(
            f"{store.root} has no arm '{choice.arm}'{nearest(choice.arm, experiment.arms)}; arms: {known}"
        )
    if choice.seed is not None and choice.seed not in experiment.seeds:
        raise ConfigError(f"{store.root} has no seed {choice.seed}; seeds: {', '.join(map(str, experiment.seeds))}")
    if choice.round is not None and choice.round == choice.against and choice.stage == "held_out":
        raise ConfigError(f"round {choice.round} cannot be held against itself; choose another --round or --against")


def _nothing(choice: Choice) -> str:
    """Why there is no question, for a person who may have to wait."""
    if choice.stage == "train":
        which = "any round" if choice.round is None else f"round {choice.round}"
        return f"no answers were sampled yet in {which} of what was chosen"
    which = "a trained round" if choice.round is None else f"round {choice.round}"
    return f"{which} and round {choice.against} of what was chosen have no held-out answers yet"


def _chosen(store: RunStore, choice: Choice) -> Iterator[tuple[str, int, int]]:
    """Arm, seed and number of rounds of all that was chosen."""
    experiment = store.experiment
    for seed in experiment.seeds if choice.seed is None else [choice.seed]:
        for arm in experiment.arms if choice.arm is None else [choice.arm]:
            yield arm, seed, experiment.arm(arm).rounds


def _train_groups(store: RunStore, choice: Choice) -> Iterator[tuple[str, list[str]]]:
    """Prompt id and texts of every prompt of every finished sample stage."""
    for arm, seed, rounds in _chosen(store, choice):
        for index in range(1, rounds + 1) if choice.round is None else [choice.round]:
            folder = store.round(arm, seed, index)
            if folder.done("sample") is not None:
                folder.trust("sample")
                yield from _by_prompt(read_candidates(folder.path / "candidates.parquet")).items()


def _held_out_groups(store: RunStore, choice: Choice) -> Iterator[tuple[str, list[str]]]:
    """Prompt id and texts of every held-out prompt, a seed at a time: all chosen arms beside round `against`."""
    by_seed: dict[int, dict[str, list[str]]] = {}
    for arm, seed, rounds in _chosen(store, choice):
        before = _held_out(store, arm, seed, choice.against)
        indices = reversed(range(rounds + 1)) if choice.round is None else [choice.round]
        after = next((found for i in indices if i != choice.against and (found := _held_out(store, arm, seed, i))), [])
        if before and after:
            for prompt_id, texts in _by_prompt([*before, *after]).items():
                by_seed.setdefault(seed, {}).setdefault(prompt_id, []).extend(texts)
    for groups in by_seed.values():
        yield from groups.items()


def _held_out(store: RunStore, arm: str, seed: int, index: int) -> list[Candidate]:
    """The held-out answers of a round; none where it is not measured yet."""
    folder = store.round(arm, seed, index)
    if folder.done("evaluate") is None:
        return []
    folder.trust("evaluate")
    return [answer.candidate for answer in read_held_out(folder.path / "held_out.parquet")]


def _by_prompt(candidates: Iterable[Candidate]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for candidate in candidates:
        groups.setdefault(candidate.prompt_id, []).append(candidate.text)
    return groups


def _question(prompt: Prompt, texts: Sequence[str], person: str) -> Question | None:
    """None where a person would see one answer only."""
    distinct = set(texts)
    where = question_id(prompt.messages, list(distinct))
    drawn = sorted(distinct, key=lambda text: derive_seed("drawn", where, text))[:MOST_SHOWN]
    shown = sorted(drawn, key=lambda text: derive_seed("place", person, where, text))
    seen: dict[str, list[int]] = {}
    for place, text in enumerate(shown):
        seen.setdefault(readable(text), []).append(place)
    if len(seen) < 2:
        return None
    return Question(prompt.id, prompt.messages, tuple(shown), tuple(map(tuple, seen.values())))


def readable(text: str) -> str:
    """What a person sees of a text that a model wrote: no control characters; lines and their indent stay.

    Several empty lines become one; white space at either end goes.
    """
    unified = re.sub(r"\r\n?|[\v\f\x85\u2028\u2029]", "\n", text)
    lines = []
    for line in unified.expandtabs(4).split("\n"):
        words = clean(line)
        indent = len(line) - len(line.lstrip(" "))
        lines.append(" " * min(indent, DEEPEST_INDENT) + words if words else "")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines).strip())


# --- what is kept ---


class AnswersFile:
    """A person's answers to a run: every change is on the disk before its call returns."""

    def __init__(self, path: Path) -> None:
        """Read `path`, or make it; a half-written last line is cut off. `open_answers` holds the lock."""
        self.path = path
        try:
            if path.exists():
                data = path.read_bytes()
                if len(whole_lines(data)) < len(data):
                    os.truncate(path, len(whole_lines(data)))
            else:
                path.touch()
                sync_folder(path.parent)
        except OSError as error:
            raise RunFolderError(f"{path} cannot be opened: {one_line(error)}") from error
        self.answers = read_people(path)

    def keep(self, answer: PersonAnswer) -> None:
        """Add `answer`; an earlier one to the same question counts no more."""
        self._append(answer_line(answer))
        self.answers.pop(answer.id, None)
        self.answers[answer.id] = answer

    def take_back(self, question: str) -> None:
        """Undo the answer to `question`."""
        self._append(undo_line(question, _now()))
        del self.answers[question]

    def _append(self, line: bytes) -> None:
        try:
            with self.path.open("ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunFolderError(f"{self.path} cannot be written: {one_line(error)}") from error


@contextmanager
def open_answers(root: Path, person: str) -> Iterator[AnswersFile]:
    """The answers of `person` to the run in folder `root`, held against a second session under the same name.

    Raises `ConfigError` for a name that is no file name, `RunFolderError` when it is in use.
    """
    from filelock import FileLock, Timeout

    if not NAME.fullmatch(person):
        raise ConfigError(f"--name {person}: letters, digits, '.', '_' and '-' only, at most 64")
    # Not in human/: that folder's digest is part of the judge that reads it.
    lock = FileLock(root / f".human-{person}.lock")
    try:
        (root / "human").mkdir(exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise RunFolderError(f"somebody is answering as '{person}' already; choose another --name") from None
    except OSError as error:
        raise RunFolderError(f"{root} cannot be written: {one_line(error)}") from error
    try:
        yield AnswersFile(root / "human" / f"{person}.jsonl")
    finally:
        lock.release()


class Sitting:
    """One person at the questions: which comes next, and what was said."""

    def __init__(self, questions: Sequence[Question], file: AnswersFile) -> None:
        self.questions = {question.id: question for question in questions}
        self.file = file

    @property
    def done(self) -> int:
        """Questions answered or skipped, in earlier sittings too."""
        return sum(one in self.file.answers for one in self.questions)

    @property
    def skipped(self) -> int:
        """Questions skipped."""
        return sum(self.file.answers[one].ranking is None for one in self.questions if one in self.file.answers)

    def current(self) -> Question | None:
        """The question that is asked now; None when all are done."""
        return next((question for one, question in self.questions.items() if one not in self.file.answers), None)

    def rank(self, question: Question, order: Ranking, seconds: float) -> None:
        """Keep a ranking; `order` counts the groups of `question.seen`, which a person cannot tell apart within."""
        ranking = tuple(tuple(place for group in tied for place in question.seen[group]) for tied in order)
        self._keep(question, ranking, "", seconds)

    def skip(self, question: Question, reason: str, seconds: float) -> None:
        """Keep that the person cannot rank it."""
        self._keep(question, None, reason, seconds)

    def _keep(self, question: Question, ranking: Ranking | None, reason: str, seconds: float) -> None:
        self.file.keep(
            PersonAnswer(
                question.prompt_id, question.messages, question.texts, ranking, reason, round(seconds, 3), _now()
            )
        )

    def undo(self) -> bool:
        """Take the latest answer back, so that its question is open again; False when there is none."""
        latest = next((one for one in reversed(self.file.answers) if one in self.questions), None)
        if latest is None:
            return False
        self.file.take_back(latest)
        return True


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
