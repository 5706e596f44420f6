"""How fast kept verdicts are found again, and what memory that takes, by the number of rows in the cache.

`python tests/benchmarks/verdict_cache.py [ROWS ...]` (10000 and 100000 unless told) prints one JSON object a line:
{"figure", "value", "unit", "runs"}, the median of 5 runs, each a process of its own. Seconds are CPU seconds of the
process, so that another's work on the same machine counts little.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from online_dpo.judging import AskedJudge, Asking, Opinion, PointwiseJudge, Score, VerdictCache, judge_all
from online_dpo.judging.cache import answer_key
from online_dpo.types import Candidate, Message, Prompt

RUNS = 5
LOOKED_UP = 2000
"""Prompts that a measurement judges, whatever the number of rows."""
CANDIDATES = 4
DIGEST = "d" * 64
FILL = 10_000
"""Rows written together when the file is filled."""


class Constant(PointwiseJudge):
    """Costs nothing to ask: what is measured is the asking."""

    def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> Sequence[Score]:
        return [1.0] * len(candidates)


def question(number: int) -> tuple[Prompt, list[Candidate]]:
    """Prompt `number` with four answers of 50 tokens."""
    name = f"prompt {number}"
    prompt = Prompt(name, (Message("user", f"Tell me about {number}. " * 10),), ())
    return prompt, [
        Candidate(name, index, f"Answer {index} to {number}. " * 10, tuple(range(50)), (), "stop", index)
        for index in range(CANDIDATES)
    ]


def fill(path: Path, rows: int) -> None:
    """A cache of `rows` rows; the questions that are looked up lie spread over them."""
    asked = {number * (rows // LOOKED_UP): number for number in range(LOOKED_UP)}
    with VerdictCache(path) as cache:
        for start in range(0, rows, FILL):
            part = [
                (
                    answer_key(DIGEST, *question(asked[place])) if place in asked else place.to_bytes(40, "little"),
                    [Opinion(float(place), {"length": 50.0})] * CANDIDATES,
                )
                for place in range(start, min(start + FILL, rows))
            ]
            cache.keep(part, DIGEST, {})


def measure(path: Path, *, kept: bool) -> dict[str, float]:
    """One run in this process: µs of CPU a candidate, and the memory at its end."""
    questions = [question(number) for number in range(LOOKED_UP)]
    prompts = {prompt.id: prompt for prompt, _ in questions}
    candidates = [candidate for _, row in questions for candidate in row]
    before = peak_mib()
    with VerdictCache(path) as cache:
        asked = AskedJudge(Constant(), "constant", digest=DIGEST if kept else "e" * 64, asking=Asking(cache=cache))
        began = time.process_time()
        judge_all(asked, prompts, candidates, max_abstain=0)
        seconds = time.process_time() - began
    ledger = asked.take_ledger()
    assert ledger["cached" if kept else "asked"] == len(candidates), ledger
    peak = peak_mib()
    return {"us": seconds / len(candidates) * 1e6, "mib": peak, "grown_mib": peak - before}


def peak_mib() -> float:
    """The most memory that this process has held so far (Linux). `ru_maxrss` would count its parent's too."""
    (line,) = (row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def main(sizes: Sequence[int]) -> None:
    """Fill a cache of each size and measure in processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        for rows in sizes:
            path = Path(folder) / f"{rows}.sqlite"
            fill(path, rows)
            for kept in (True, False):
                # Asking writes: each run gets its own copy.
                runs = [_run(path, kept) for _ in range(RUNS)]
                what = "kept" if kept else "asked and written"
                _show(f"judge_all a candidate, {what}, {rows} rows", [run["us"] for run in runs], "CPU µs")
                if kept:
                    _show(f"verdicts found, {rows} rows", [1e6 / run["us"] for run in runs], "candidates/CPU s")
                    _show(f"peak memory, {rows} rows", [run["mib"] for run in runs], "MiB")
                    _show(f"memory grown by judging, {rows} rows", [run["grown_mib"] for run in runs], "MiB")


def _run(path: Path, kept: bool) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "verdicts.sqlite"
        shutil.copyfile(path, copy)
        command = [sys.executable, __file__, "--measure", str(copy), "kept" if kept else "asked"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def _show(figure: str, runs: Sequence[float], unit: str) -> None:
    value = float(f"{statistics.median(runs):.4g}")
    print(
        json.dumps({"figure": figure, "value": value, "unit": unit, "runs": len(runs)}, ensure_ascii=False), flush=True
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(Path(sys.argv[2]), kept=sys.argv[3] == "kept")))
    else:
        main([int(rows) for rows in sys.argv[1:]] or [10_000, 100_000])
