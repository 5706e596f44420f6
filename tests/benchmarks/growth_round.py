"""One round of any size without a language model: rows as an engine makes them, in a real run folder.

`python tests/benchmarks/growth_round.py PROMPTS FOLDER` does it and prints what it took as one JSON line. Everything
that a real round does but training: pinned, sampled, judged through the verdict cache, paired, measured, and read again
as a resumed run reads it.
"""

from __future__ import annotations

import gc
import json
import random
import sys
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from judges.length import LengthJudge
from online_dpo.arms import Arm, Run
from online_dpo.config import SamplingSpec, validate_experiment
from online_dpo.judging import VerdictCache
from online_dpo.off_policy_stage import score_off_policy
from online_dpo.protocols import Learner, SampleRequest
from online_dpo.records import read_prompts, write_prompts
from online_dpo.rounds import pin
from online_dpo.sources import gather, round_prompts
from online_dpo.store import RoundFolder, RunStore, StageRecord
from online_dpo.types import Candidate, Message, Policy, Prompt

CANDIDATES = 8
SHORTEST, LONGEST = 32, 64
"""Tokens of an answer, and of a prompt."""
POOL = 1 << 20
VOCABULARY = 50_000


class KeptLength(LengthJudge):
    """A judge that costs next to nothing, asked and kept as one that costs a lot: each answer alone."""

    cached: ClassVar[bool] = True
    each_alone = True
    batch_prompts = 64


class Rows:
    """Texts, tokens and log-probs that follow from a number, as long and as unlike as real ones."""

    def __init__(self) -> None:
        drawn = random.Random(0)
        self.tokens = array("i", [drawn.randrange(VOCABULARY) for _ in range(POOL)])
        self.logprobs = array("f", [-drawn.expovariate(1.0) for _ in range(POOL)])
        words = ["".join(drawn.choices("etaoinshrdlu", k=drawn.randint(2, 7))) for _ in range(5000)]
        self.words = [drawn.choice(words) for _ in range(POOL)]

    def place(self, number: int) -> tuple[int, int]:
        """Where row `number` begins, and its length in tokens."""
        mixed = number * 2654435761 + 40503
        return mixed % (POOL - LONGEST), SHORTEST + (mixed >> 21) % (LONGEST - SHORTEST + 1)

    def prompt(self, number: int) -> Prompt:
        first, length = self.place(-number - 1)
        text = " ".join(self.words[first : first + length * 3 // 4])
        return Prompt(f"prompt-{number:07d}", (Message("user", text),), tuple(self.tokens[first : first + length]))

    def candidate(self, number: int, prompt_id: str, index: int, seed: int) -> Candidate:
        first, length = self.place(number)
        return Candidate(
            prompt_id,
            index,
            f"{number} {' '.join(self.words[first : first + length * 3 // 4])}",
            tuple(self.tokens[first : first + length]),
            tuple(self.logprobs[first : first + length]),
            "stop" if length % 8 else "length",
            seed,
        )


class RowEngine:
    """`protocols.Engine`: answers of `Rows`, a few prompts out of order."""

    kind = "rows"

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def load(self, policy: Policy) -> float:
        return 0.0

    def sample(self, requests: Sequence[SampleRequest], sampling: SamplingSpec) -> Iterator[list[Candidate]]:
        for start in range(0, len(requests), 64):
            for request in reversed(requests[start : start + 64]):
                number = int(request.prompt.id.rpartition("-")[2]) * CANDIDATES
                yield [
                    self.rows.candidate(number + index, request.prompt.id, index, seed)
                    for index, seed in enumerate(request.seeds)
                ]

    def score(self, items: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
        return [[-1.0] * len(continuation) for _, continuation in items]

    def rest(self) -> None: ...

    def notes(self) -> list[str]:
        return []


class RowLearner:
    """What measuring asks of a learner: log-probs."""

    def score(self, policy: Policy, items: Sequence[tuple[Prompt, Candidate]]) -> list[list[float]]:
        return [[value - 0.1 for value in candidate.logprobs] for _, candidate in items]

    def rest(self) -> None: ...


class Silent:
    """`protocols.Progress` that nobody watches."""

    def start(self, label: str, total: int, unit: str) -> None: ...

    def advance(self, amount: int, note: str = "") -> None: ...

    def finish(self) -> None: ...

    def say(self, line: str) -> None: ...

    def beside(self) -> Silent:
        return self


class TimedFolder(RoundFolder):
    """A round's folder that keeps what each stage took: wall and CPU seconds."""

    took: dict[str, tuple[float, float]]

    def stage(
        self,
        name: str,
        inputs: Mapping[str, str],
        outputs: Sequence[str],
        produce: Callable[[Path], Mapping[str, Any]],
    ) -> StageRecord:
        began = time.perf_counter(), time.process_time()
        try:
            return super().stage(name, inputs, outputs, produce)
        finally:
            self.took[name] = (time.perf_counter() - began[0], time.process_time() - began[1])


def settings(prompts: int) -> dict[str, Any]:
    return {
        "name": "growth",
        "model": "none",
        "prompts": {"path": "none.jsonl", "per_round": prompts, "held_out": 1},
        "sampling": {"n": CANDIDATES},
        "judge": {"use": "growth_round:KeptLength"},
        "rounds": 1,
        "arms": {"on_policy": {}},
        "audit": {"prompts": 20},
    }


def do_round(arm: Arm, folder: TimedFolder) -> dict[str, StageRecord]:
    """All but training; a stage that is done is held against its digests, as in a resumed run."""
    policy = arm.run.initial
    pinned = pin(folder, arm.policies, arm.settings, round_prompts(arm, folder.index))
    data = gather(arm, folder, pinned)
    end = Policy("trained", policy.path, "trained")
    off_policy = score_off_policy(arm, folder, pinned, data, end)
    assert off_policy is not None
    return {record.stage: record for record in (data.sample, data.judge, data.pair, off_policy)}


def measure(prompts: int, root: Path) -> dict[str, Any]:
    """Seconds, bytes and memory of a round of `prompts` prompts in this process."""
    rows = Rows()
    base = memory()[0]
    clock = Clock()
    write_prompts(
        root / "prompts.parquet", {"train": [rows.prompt(number) for number in range(prompts)], "held_out": []}
    )
    train = read_prompts(root / "prompts.parquet")["train"]
    clock.lap("prompts")
    gc.collect()
    held = memory()[0] - base
    reset_peak()
    experiment = validate_experiment(settings(prompts), "growth")
    initial = Policy("initial", root / "initial", "initial")
    (root / "run").mkdir()
    store = RunStore.create(root / "run", experiment, {})
    learner: Learner = RowLearner()  # type: ignore[assignment]
    took: dict[str, dict[str, tuple[float, float]]] = {"first": {}, "again": {}}
    with VerdictCache(root / "run" / "verdicts.sqlite") as cache:
        for turn, own in took.items():
            run = Run(store, experiment, initial, train, train[:1], RowEngine(rows), learner, Silent(), cache=cache)
            arm = Arm(run, "on_policy", 0, experiment.arm("on_policy"))
            place = arm.folder(1)
            folder = TimedFolder(store, place.path, 1)
            folder.took = own
            records = do_round(arm, folder)
            clock.lap(turn)
            store = RunStore.open(root / "run")
    return {
        "prompts": prompts,
        "rows": records["sample"].info["candidates"],
        "pairs": records["pair"].info["kept"],
        "seconds": {
            "prompts": clock.laps["prompts"],
            **took["first"],
            "all": clock.laps["first"],
            "again": clock.laps["again"],
        },
        "mib": {"base": base, "prompts": held, "round": memory()[1] - base - held},
        "bytes": {path.name: path.stat().st_size for path in [*folder.path.glob("*.parquet"), cache.path]},
    }


class Clock:
    """Wall and CPU seconds between laps."""

    def __init__(self) -> None:
        self.laps: dict[str, tuple[float, float]] = {}
        self._began = time.perf_counter(), time.process_time()

    def lap(self, name: str) -> None:
        now = time.perf_counter(), time.process_time()
        self.laps[name] = (now[0] - self._began[0], now[1] - self._began[1])
        self._began = now


def memory() -> tuple[float, float]:
    """MiB that this process holds, and the most that it held since `reset_peak` (Linux)."""
    lines = dict(row.split(":", 1) for row in Path("/proc/self/status").read_text().splitlines())
    held, most = (int(lines[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM"))
    return held, most


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]), Path(sys.argv[2]))))
