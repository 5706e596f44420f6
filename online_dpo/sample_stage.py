"""The stage that samples a round's candidates, and the sampling that evaluation shares with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from online_dpo import judge_ahead
from online_dpo.arms import Arm
from online_dpo.config import SamplingSpec
from online_dpo.files import digest_json, digest_list
from online_dpo.protocols import SampleRequest
from online_dpo.records import CANDIDATES, candidate_table
from online_dpo.rounds import Sampled
from online_dpo.seeds import derive_seed
from online_dpo.store import RoundFolder, StageRecord
from online_dpo.tables import TableWriter
from online_dpo.types import Candidate, Prompt

Seeds = Callable[[Prompt], tuple[int, ...]]
"""The seeds of a prompt's candidates."""
ANSWERS_AT_ONCE = 32_768
"""Answers that the engine is asked for at once. At a block's end it waits for its longest answer: a small part of these
many. A round of fewer is one block."""


def sample_round(arm: Arm, folder: RoundFolder, pinned: Sampled) -> StageRecord:
    sampling = arm.settings.sampling

    def produce(out: Path) -> dict[str, Any]:
        # Before the engine takes its memory back, where the two share a GPU.
        arm.run.rest_learner()
        probe_gap = arm.run.engine.load(pinned.source)
        figures = _write_judged(arm, folder, pinned.prompts, out)
        return {**figures, "probe_gap": probe_gap}

    inputs = {
        "source": pinned.source.digest,
        "prompts": prompts_digest(pinned.prompts),
        "sampling": digest_json(sampling.model_dump()),
        "seed": f"{arm.seed}/{folder.index}",
        "engine": arm.run.engine.kind,
    }
    return folder.stage("sample", inputs, ["candidates.parquet"], produce)


def round_seeds(arm: Arm, index: int) -> Seeds:
    """The seeds of the candidates of a prompt of round `index`."""
    n = arm.settings.sampling.n
    return lambda prompt: tuple(derive_seed(arm.seed, "sample", index, prompt.id, i) for i in range(n))


def _write_judged(arm: Arm, folder: RoundFolder, prompts: Sequence[Prompt], out: Path) -> dict[str, Any]:
    """Sample into `out`; the judge, where it can, judges what has come while the rest is sampled."""
    ahead = judge_ahead.begin(arm, folder, prompts)
    taken = None if ahead is None else ahead.add
    seeds = round_seeds(arm, folder.index)
    asked = Generation(arm, f"{folder.title} sample", prompts, seeds, arm.settings.sampling, taken)
    try:
        with TableWriter(out / "candidates.parquet", CANDIDATES) as file:
            for candidates in asked.blocks():
                file.add(candidate_table(candidates))
    except BaseException:
        judge_ahead.forget(arm, folder)
        raise
    return asked.figures()


@dataclass
class Generation:
    """What the engine is asked for, a block of prompts at a time, so that what is held does not grow with the prompts.

    `seeds`: of each prompt's candidates. `taken` gets each prompt's candidates as they come.
    """

    arm: Arm
    label: str
    prompts: Sequence[Prompt]
    seeds: Seeds
    sampling: SamplingSpec
    taken: Callable[[list[Candidate]], None] | None = None
    candidates: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def blocks(self) -> Iterator[list[Candidate]]:
        """The candidates in the prompts' order.

        A block is given out when the engine has answered the first prompt of the next: it is at work while the caller
        is. Within a block prompts come in any order.
        """
        progress, began = self.arm.run.progress, time.perf_counter()
        progress.start(f"{self.arm.label} · {self.label}", len(self.prompts) * self.sampling.n, "answers")
        size = max(1, ANSWERS_AT_ONCE // self.sampling.n)
        done: list[Candidate] | None = None
        for start in range(0, len(self.prompts), size):
            prompts = self.prompts[start : start + size]
            answers: dict[str, list[Candidate]] = {}
            for group in self.arm.run.engine.sample(
                [SampleRequest(one, self.seeds(one)) for one in prompts], self.sampling
            ):
                self._take(group, began)
                answers[group[0].prompt_id] = group
                if done is not None:
                    yield done
                    done = None
            done = [candidate for prompt in prompts for candidate in answers.pop(prompt.id)]
        progress.finish()
        self.seconds = time.perf_counter() - began
        for line in self.arm.run.engine.notes():
            progress.say(f"{self.arm.label}: {line}")
        if done is not None:
            yield done

    def _take(self, group: list[Candidate], began: float) -> None:
        if self.taken is not None:
            self.taken(group)
        self.candidates += len(group)
        self.tokens += sum(len(candidate.token_ids) for candidate in group)
        self.arm.run.progress.advance(len(group), f"{self.tokens / (time.perf_counter() - began):.0f} tokens/s")

    def figures(self) -> dict[str, Any]:
        """What the sampling took, once all blocks were given out."""
        return {
            "candidates": self.candidates,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(self.tokens / self.seconds, 1),
        }


def generate(
    arm: Arm, label: str, prompts: Sequence[Prompt], seeds: Seeds, sampling: SamplingSpec
) -> tuple[list[Candidate], dict[str, Any]]:
    """All candidates in the prompts' order, and what the sampling took."""
    asked = Generation(arm, label, prompts, seeds, sampling)
    return [candidate for block in asked.blocks() for candidate in block], asked.figures()


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """What tells the prompts of a round from others: their ids and tokens."""
    return digest_list([prompt.id, list(prompt.token_ids)] for prompt in prompts)
