"""One round of any size without a language model: rows as an engine makes them, in a real run folder.

`python tests/benchmarks/growth_round.py PROMPTS FOLDER` does it and prints what it took as one JSON line. Everything
that a real round does but training: pinned, sampled, judged through the verdict cache, paired, measured. Then the
judge's stage is taken away and the round is done again, as one that was killed before the stage was recorded: its
verdicts are found in the cache, and all other files are read and held against their digests.
"""

from __future__ import annotations

import gc
import json
import random
import sys
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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

    def __init__(self, pool: int = POOL) -> None:
        drawn = random.Random(0)
        self.pool = pool
        self.tokens = array("i", [drawn.randrange(VOCABULARY) for _ in range(pool)])
        self.logprobs = array("f", [-drawn.expovariate(1.0) for _ in range(pool)])
        words = ["".join(drawn.choices("etaoinshrdlu", k=drawn.randint(2, 7))) for _ in range(5000)]
        self.words = [drawn.choice(words) for _ in range(pool)]

    def place(self, number: int) -> tuple[int, int]:
        """Where row `number` begins, and its length in tokens."""
        mixed = number * 2654435761 + 40503
        return mixed % (self.pool - LONGEST), SHORTEST + (mixed >> 21) % (LONGEST - SHORTEST + 1)

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


class Tenths:
    """`protocols.Progress` that nobody watches: the CPU seconds that each tenth of a stage's answers took."""

    def __init__(self) -> None:
        self.took: dict[str, list[float]] = {}
        self._stage, self._total, self._done, self._began = "", 0, 0, 0.0

    def start(self, label: str, total: int, unit: str) -> None:
        self._stage, self._total, self._done = label.rpartition(" ")[2], total, 0
        self.took[self._stage] = []
        self._began = time.process_time()

    def advance(self, amount: int, note: str = "") -> None:
        self._done += amount
        own = self.took[self._stage]
        if self._done * 10 >= self._total * (len(own) + 1):
            now = time.process_time()
            own.append(now - self._began)
            self._began = now

    def finish(self) -> None: ...

    def say(self, line: str) -> None: ...

    def beside(self) -> Tenths:
        return self


class TimedFolder(RoundFolder):
    """A round's folder that keeps what each stage took: wall and CPU seconds."""

    def __init__(self, run: RunStore, path: Path, index: int) -> None:
        super().__init__(run, path, index)
        self.clock = Clock()

    def stage(
        self,
        name: str,
        inputs: Mapping[str, str],
        outputs: Sequence[str],
        produce: Callable[[Path], Mapping[str, Any]],
    ) -> StageRecord:
        self.clock.lap("between")
        try:
            return super().stage(name, inputs, outputs, produce)
        finally:
            self.clock.lap(name)


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


@dataclass(frozen=True)
class Done:
    """A round that was gone through: its folder, its stages, and what they took."""

    folder: RoundFolder
    records: dict[str, StageRecord]
    clock: Clock
    tenths: dict[str, list[float]]


def do_round(store: RunStore, rows: Rows, train: tuple[Prompt, ...], cache: VerdictCache) -> Done:
    """All but training; a stage that is done is held against its digests, as in a resumed run."""
    learner: Learner = RowLearner()  # type: ignore[assignment]
    initial, progress = Policy("initial", store.root / "initial", "initial"), Tenths()
    run = Run(store, store.experiment, initial, train, train[:1], RowEngine(rows), learner, progress, cache=cache)
    arm = Arm(run, "on_policy", 0, store.experiment.arm("on_policy"))
    folder = TimedFolder(store, arm.folder(1).path, 1)
    pinned = pin(folder, arm.policies, arm.settings, round_prompts(arm, folder.index))
    data = gather(arm, folder, pinned)
    off_policy = score_off_policy(arm, folder, pinned, data, Policy("trained", initial.path, "trained"))
    assert off_policy is not None
    records = {record.stage: record for record in (data.sample, data.judge, data.pair, off_policy)}
    return Done(folder, records, folder.clock, progress.took)


def measure(prompts: int, root: Path) -> dict[str, Any]:
    """Seconds, bytes and memory of a round of `prompts` prompts in this process."""
    rows = Rows()
    base = memory()[0]
    train, clock = keep_prompts(rows, prompts, root / "prompts.parquet")
    gc.collect()
    held = memory()[0] - base
    reset_peak()
    (root / "run").mkdir()
    store = RunStore.create(root / "run", validate_experiment(settings(prompts), "growth"), {})
    with VerdictCache(root / "run" / "verdicts.sqlite") as cache:
        first = do_round(store, rows, train, cache)
        take_judging_away(first.folder)
        again = do_round(RunStore.open(root / "run"), rows, train, cache)
    judged = again.records["judge"].info["ledger"]
    assert judged == {"asked": 0, "cached": prompts * CANDIDATES}, judged
    found = again.clock.laps.pop("judge")
    return {
        "prompts": prompts,
        "rows": first.records["sample"].info["candidates"],
        "pairs": first.records["pair"].info["kept"],
        "seconds": {**clock.laps, **first.clock.laps, "found": found, "verify": again.clock.total()},
        "tenths": {**first.tenths, "found": again.tenths["judge"]},
        "mib": {"base": base, "prompts": held, "round": memory()[1] - base - held},
        "bytes": {path.name: path.stat().st_size for path in [*first.folder.path.glob("*.parquet"), cache.path]},
    }


def keep_prompts(rows: Rows, prompts: int, path: Path) -> tuple[tuple[Prompt, ...], Clock]:
    """The prompts as a run has them, written and read again."""
    clock = Clock()
    write_prompts(path, {"train": [rows.prompt(number) for number in range(prompts)], "held_out": []})
    train = read_prompts(path)["train"]
    clock.lap("prompts")
    return train, clock


def take_judging_away(folder: RoundFolder) -> None:
    """Leave the round as it is when a process is killed before the stage is recorded."""
    for path in (folder.path / "stages" / "judge.json", folder.path / "verdicts.parquet"):
        path.unlink()


class Clock:
    """Wall and CPU seconds between laps, added up by name."""

    def __init__(self) -> None:
        self.laps: dict[str, tuple[float, float]] = {}
        self._began = time.perf_counter(), time.process_time()

    def lap(self, name: str) -> None:
        now = time.perf_counter(), time.process_time()
        wall, cpu = self.laps.get(name, (0.0, 0.0))
        self.laps[name] = (wall + now[0] - self._began[0], cpu + now[1] - self._began[1])
        self._began = now

    def total(self) -> tuple[float, float]:
        """The sum of all laps."""
        walls, cpus = zip(*self.laps.values(), strict=True)
        return sum(walls), sum(cpus)


def memory() -> tuple[float, float]:
    """MiB that this process holds, and the most that it held since `reset_peak` (Linux)."""
    lines = dict(row.split(":", 1) for row in Path("/proc/self/status").read_text().splitlines())
    held, most = (int(lines[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM"))
    return held, most


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]), Path(sys.argv[2]))))
