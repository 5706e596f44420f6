"""Many rounds of one run on a very small model: memory, open files, shared memory and seconds a round must stay flat.

    make soak
    python tests/faults/soak.py --rounds 200

One process runs all rounds; it is looked at from outside each time a round is closed. Prints a row for every ten rounds
(means), then what a straight line through the second half of all rounds says of each figure: its slope a round, with a
95 % interval (Student's t; rounds are taken to be independent), and one line of JSON. The first half is left out of the
line: allocators and caches fill up there. Memory is proportional (PSS): what n processes share counts a n-th in each.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ground import MODEL, SMALL, Ground
from scipy import stats
from victim import Victim

ACTORS = {"engine": "ray::EngineActor", "learner": "ray::LearnerActor"}
MB = 1e6


@dataclass(frozen=True)
class Seen:
    """What was seen when a round was closed. Memory is resident, in MB; `store_mb`: what lies in /dev/shm."""

    round: int
    seconds: float
    driver_mb: float
    engine_mb: float
    learner_mb: float
    driver_files: float
    engine_files: float
    learner_files: float
    processes: float
    store_mb: float


FIGURES = tuple(field.name for field in fields(Seen) if field.name != "round")


@dataclass(frozen=True)
class Line:
    """A straight line through a figure: its slope a round with a 95 % interval, and the mean."""

    slope: float
    low: float
    high: float
    mean: float


def resident(process: int) -> float:
    """MB of memory in which the process lies, what it shares with others in equal parts."""
    for line in Path(f"/proc/{process}/smaps_rollup").read_text(encoding="utf-8").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024 / MB
    raise ValueError(f"/proc/{process}/smaps_rollup has no line Pss")


def open_files(process: int) -> int:
    """How many files, sockets and pipes it holds."""
    return len(os.listdir(f"/proc/{process}/fd"))


def shared(processes: Sequence[int]) -> float:
    """MB of /dev/shm that any of them has mapped, each file once."""
    found: dict[str, int] = {}
    for process in processes:
        try:
            maps = Path(f"/proc/{process}/smaps").read_text(encoding="utf-8").splitlines()
        except OSError:  # gone meanwhile
            continue
        file = ""
        for line in maps:
            if "-" in line.split(" ", 1)[0]:
                file = line.split(maxsplit=5)[5] if "/dev/shm/" in line else ""  # noqa: S108
            elif file and line.startswith("Rss:"):
                found[file] = max(found.get(file, 0), int(line.split()[1]) * 1024)
    return sum(found.values()) / MB


def look(victim: Victim, number: int, seconds: float) -> Seen:
    """The run as it is now."""
    there = victim.processes()
    of = {who: next(process for process, line in there.items() if name in line) for who, name in ACTORS.items()}
    driver = victim.process.pid
    return Seen(
        round=number,
        seconds=seconds,
        driver_mb=resident(driver),
        engine_mb=resident(of["engine"]),
        learner_mb=resident(of["learner"]),
        driver_files=open_files(driver),
        engine_files=open_files(of["engine"]),
        learner_files=open_files(of["learner"]),
        processes=len(there),
        store_mb=shared(list(there)),
    )


def fitted(rows: Sequence[Seen], figure: str) -> Line:
    """Least squares over the rounds."""
    x, y = [row.round for row in rows], [float(getattr(row, figure)) for row in rows]
    found = stats.linregress(x, y)
    half = float(stats.t.ppf(0.975, len(rows) - 2) * found.stderr) if len(rows) > 2 else math.inf
    slope = float(found.slope)
    return Line(slope, slope - half, slope + half, sum(y) / len(y))


def soak(rounds: int, model: Path, work: Path) -> list[Seen]:
    """Run them; what was seen at each. Raises `RuntimeError` when the run does not end well."""
    ground = Ground(work, model, argparse.Namespace())
    # A rate at which the policy is still alive at the end: one that says one word alone makes no pairs.
    small = {**SMALL["dpo"], "lr": 1e-6}
    # One round more than are looked at: after the last one the processes end.
    folder, root = ground.lay({"rounds": rounds + 1, "arms": {"on_policy": {}}, "keep": "last", "dpo": small})
    victim = Victim(folder, "run", "experiment.yaml", "--quiet")
    seen: list[Seen] = []
    before = 0.0
    for number in range(rounds + 1):
        closed = root / "arms" / "on_policy" / "seed_0" / f"round_{number:02d}" / "metrics.json"
        while not closed.exists():
            if victim.ended:
                raise RuntimeError(f"ended with {victim.process.wait()}: {victim.said()}")
            time.sleep(0.02)
        now = time.monotonic()
        if number:
            seen.append(look(victim, number, now - before))
        before = now
    if victim.end() != 0:
        raise RuntimeError(victim.said())
    left, _ = victim.gone()
    if left:
        raise RuntimeError(f"left {left}")
    return seen


def table(rows: Sequence[Seen]) -> str:
    """Means of every ten rounds."""
    lines = ["  ".join(["rounds   ", *(f"{figure:>13}" for figure in FIGURES)])]
    for start in range(0, len(rows), 10):
        some = rows[start : start + 10]
        means = [sum(float(getattr(row, figure)) for row in some) / len(some) for figure in FIGURES]
        lines.append("  ".join([f"{some[0].round:>3} – {some[-1].round:>3}", *(f"{mean:>13.2f}" for mean in means)]))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Prints all; the exit status is 0 when the run ended well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--model", type=Path, default=MODEL, help="a small model's folder")
    options = parser.parse_args(arguments)
    if options.rounds < 8:
        parser.error("--rounds must be at least 8: a line is drawn through the second half")
    with tempfile.TemporaryDirectory(prefix="online-dpo-soak-") as folder:
        rows = soak(options.rounds, options.model, Path(folder))
    print(table(rows))
    lines: dict[str, Any] = {figure: fitted(rows[len(rows) // 2 :], figure) for figure in FIGURES}
    print(f"\na round, over rounds {rows[len(rows) // 2].round} to {rows[-1].round}:")
    for figure, line in lines.items():
        print(f"{figure:>13}  {line.slope:+.4f} [{line.low:+.4f}, {line.high:+.4f}]  (mean {line.mean:.2f})")
    print(json.dumps({"rounds": len(rows), "slopes": {figure: asdict(line) for figure, line in lines.items()}}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
