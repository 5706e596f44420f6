"""Judges an answer by what people said of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar, TypeAlias

from online_dpo.errors import DataError, JudgeError
from online_dpo.judging import Abstention, Opinion, PointwiseJudge, Score
from online_dpo.judging.people import PersonAnswer, Ranking, read_people
from online_dpo.types import Candidate, Message, Prompt

UNRANKED = Abstention("no person ranked it")
SKIPPED = Abstention("skipped by those who saw it")

Key: TypeAlias = tuple[tuple[Message, ...], str]


class HumanJudge(PointwiseJudge):
    """The share of the other answers beside it that an answer beats, ties half: 1 the best, 0 the worst, in [0, 1].

    `answers` is a file that `online-dpo judge ask` wrote, a folder of them (`RUN/human`), or a list of both. An answer
    is known by the prompt's messages and its text, so it may stand in another run, too. One that a person ranked in
    several questions gets the mean over these; several people's shares are averaged, each person counting once.
    Files of the same name are one person's.

    Details: `people` who ranked it and, where these are several, `disagreement`: the largest difference between two
    people's shares. Constructing raises `JudgeError` when there is no such file, or it is damaged.
    """

    cached: ClassVar[bool] = False
    each_alone: ClassVar[bool] = True
    relative: ClassVar[bool] = True
    file_params: ClassVar[tuple[str, ...]] = ("answers",)
    batch_prompts = None

    def __init__(self, answers: str | list[str]) -> None:
        named = [answers] if isinstance(answers, str) else answers
        if not isinstance(named, list) or not named or not all(isinstance(name, str) for name in named):
            raise JudgeError(f"HumanJudge: answers must be a file or a list of files, found {answers!r}")
        self.shares: dict[Key, dict[str, list[float]]] = {}
        self.skipped: set[Key] = set()
        files = {file.resolve() for name in named for file in _files(Path(name).expanduser())}
        for file in sorted(files):
            try:
                found = read_people(file)
            except DataError as error:
                raise JudgeError(f"HumanJudge: {error}") from error
            for answer in found.values():
                self._take(answer, file.stem)

    def _take(self, answer: PersonAnswer, person: str) -> None:
        if answer.ranking is None:
            self.skipped.update((answer.messages, text) for text in answer.texts)
            return
        for text, share in zip(answer.texts, shares_beaten(answer.ranking), strict=True):
            self.shares.setdefault((answer.messages, text), {}).setdefault(person, []).append(share)

    def score_batch(self, items: Sequence[tuple[Prompt, Sequence[Candidate]]]) -> list[list[Score]]:
        """One score per candidate of each item: the mean share in [0, 1] over people."""
        return [[self._look_up((prompt.messages, one.text)) for one in candidates] for prompt, candidates in items]

    def _look_up(self, key: Key) -> Score:
        people = self.shares.get(key)
        if people is None:
            return SKIPPED if key in self.skipped else UNRANKED
        means = [math.fsum(shares) / len(shares) for shares in people.values()]
        details: dict[str, float | str | bool | None] = {"people": len(means)}
        if len(means) > 1:
            details["disagreement"] = max(means) - min(means)
        return Opinion(math.fsum(means) / len(means), details)


def shares_beaten(ranking: Ranking) -> list[float]:
    """For each text of a ranking of n > 1 the share of the other n − 1 that it beats, a tie counting half.

    This is (n − r)/(n − 1) for rank r from 1, texts that tie sharing the mean of their ranks.
    """
    others = sum(map(len, ranking)) - 1
    shares = [0.0] * (others + 1)
    below = others + 1
    for group in ranking:
        below -= len(group)
        for place in group:
            shares[place] = (below + (len(group) - 1) / 2) / others
    return shares


def _files(path: Path) -> Iterator[Path]:
    """The file itself, or those in the folder."""
    if path.is_dir():
        found = sorted(path.glob("*.jsonl"))
        if not found:
            raise JudgeError(f"HumanJudge: no answers (*.jsonl) in the folder {path}")
        yield from found
    elif path.is_file():
        yield path
    else:
        raise JudgeError(f"HumanJudge: no answers at '{path}'; online-dpo judge ask RUN writes them to RUN/human")
