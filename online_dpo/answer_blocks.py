"""A round's stored answers, prompts at a time: what a stage holds does not grow with the round."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from online_dpo.errors import DataError
from online_dpo.records import CANDIDATES, VERDICTS, candidates_of, verdicts_of
from online_dpo.tables import TableReader
from online_dpo.types import Abstain, Candidate, Prompt, Verdict

AT_ONCE = 8192
"""Answers that a stage reads at once."""


@dataclass(frozen=True, slots=True)
class AnswerBlock:
    """Consecutive prompts of a round, some perhaps without an answer, and all their answers in the file's order."""

    prompts: Sequence[Prompt]
    candidates: list[Candidate]


def prompts_at_once(candidates: int, multiple_of: int = 1) -> int:
    """How many prompts of so many candidates a block has: about `AT_ONCE` answers."""
    return max(1, AT_ONCE // (max(1, candidates) * multiple_of)) * multiple_of


def answer_blocks(path: Path, prompts: Sequence[Prompt], size: int, *, logprobs: bool = True) -> Iterator[AnswerBlock]:
    """The answers of candidates.parquet at `path`, with log-probs or without, `size` prompts at a time.

    All `prompts` stand in one block each, in their order. Where the file's order is another, or a prompt's answers
    stand apart (put together from several rounds), a block is as long as it must be for that.
    Raises `RunFolderError` where the file is damaged; `DataError` where an answer belongs to no prompt.
    """
    columns = [name for name in CANDIDATES.names if logprobs or name != "logprobs"]
    with TableReader(path, CANDIDATES, columns) as file:
        begin = row = 0
        for end, last in _cuts(path, prompts, size):
            yield AnswerBlock(prompts[begin:end], candidates_of(file.take(last - row)))
            begin, row = end, last


def judged_blocks(
    folder: Path, prompts: Sequence[Prompt], size: int
) -> Iterator[tuple[AnswerBlock, list[Verdict | Abstain]]]:
    """As `answer_blocks` of a round's folder, without log-probs, with the verdicts, which stand in the same order."""
    with TableReader(folder / "verdicts.parquet", VERDICTS) as file:
        for block in answer_blocks(folder / "candidates.parquet", prompts, size, logprobs=False):
            yield block, verdicts_of(file.take(len(block.candidates)))
        if len(file.take(1)):
            raise DataError(f"{file.path}: more verdicts than answers")


def count_candidates(folder: Path) -> int:
    """How many answers a round's folder has."""
    with TableReader(folder / "candidates.parquet", CANDIDATES) as file:
        return len(file)


def _cuts(path: Path, prompts: Sequence[Prompt], size: int) -> Iterator[tuple[int, int]]:
    """Where each block ends: after how many prompts and how many rows."""
    with TableReader(path, CANDIDATES, ["prompt_id"]) as file:
        rows = len(file)
        places, starts = _runs(path, prompts, file)
    if len(places):
        # Before run j when all that stands behind is of later prompts than all that stands before.
        before, behind = np.maximum.accumulate(places), np.minimum.accumulate(places[::-1])[::-1]
        allowed = np.flatnonzero(before[:-1] < behind[1:]) + 1
        run = 0
        while (found := np.searchsorted(allowed, run + size)) < len(allowed):
            run = int(allowed[found])
            yield int(before[run - 1]) + 1, int(starts[run])
    yield len(prompts), rows


Numbers = npt.NDArray[np.int64]


def _runs(path: Path, prompts: Sequence[Prompt], file: TableReader) -> tuple[Numbers, Numbers]:
    """Runs of rows of one prompt: the prompt's place in the round, and the first row."""
    places, starts = array("q"), array("q")
    place_of: dict[str, int] | None = None
    row, last = 0, None
    for batch in file.batches():
        for name in batch.column("prompt_id").to_pylist():
            if name != last:
                last, place = name, len(places)
                # Mostly the next prompt; the table of all is made where it is not.
                if place_of is None and (place == len(prompts) or prompts[place].id != name):
                    place_of = {prompt.id: number for number, prompt in enumerate(prompts)}
                if place_of is not None:
                    if name not in place_of:
                        raise DataError(f"{path}: an answer belongs to no prompt of the round: '{name}'")
                    place = place_of[name]
                places.append(place)
                starts.append(row)
            row += 1
    return np.array(places), np.array(starts)
