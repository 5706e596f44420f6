"""Real runs on a real, tiny model, each by the real command in a process of its own."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from online_dpo.files import digest

TIMINGS = ("seconds", "tokens_per_second", "ledger")
NAMES = ("Tom", "Lily", "Ben", "Mia", "Sam", "Anna", "Max", "Sue")
THINGS = ("a red ball", "a big dog", "an old tree")
TINY = {
    "seeds": [0],
    "prompts": {"path": "prompts.jsonl", "per_round": 6, "held_out": 8},
    "sampling": {"n": 3, "max_tokens": 24},
    "judge": {"use": "judges.length:LengthJudge", "unit": "characters"},
    "pairing": {"rule": "best_vs_worst"},
    "dpo": {"lr": 1.0e-3, "batch_size": 2, "epochs": 4},
    "rounds": 2,
    "engine": {"kind": "transformers", "threads": 1},
    "learner": {"threads": 1},
    "arms": {"on_policy": {}, "self_offline": {"source": "initial"}},
    "output": "runs",
}


@dataclass(frozen=True)
class Outcome:
    """A run that ended by itself: its folder, what it printed, how it ended."""

    root: Path
    stdout: str
    stderr: str
    status: int

    def folder(self, arm: str, index: int) -> Path:
        return self.root / "arms" / arm / "seed_0" / f"round_{index:02d}"

    def metrics(self, arm: str, index: int) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder(arm, index) / "metrics.json").read_text(encoding="utf-8"))
        return found


class Started:
    """`online-dpo` at work, in a session of its own, by which all of its processes can be told."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.out, self.err = folder / "stdout.txt", folder / "stderr.txt"
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "online_dpo.cli", *arguments],
                cwd=folder,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    def wait_for(self, condition: Callable[[], bool], seconds: float = 240) -> None:
        """Until `condition` holds. Fails when the process ends before, or the time is up."""
        limit = time.monotonic() + seconds
        while not condition():
            status = self.process.poll()
            assert status is None, f"ended with {status}: {self.err.read_text()[-2000:]}"
            assert time.monotonic() < limit, f"waited for {seconds} s: {self.err.read_text()[-2000:]}"
            time.sleep(0.002)

    def end(self, seconds: float = 240) -> int:
        """Wait for its end; returns the exit status."""
        try:
            return self.process.wait(seconds)
        finally:
            if self.process.poll() is None:
                self.kill()

    def kill(self) -> None:
        """kill -9 of the driver alone."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def interrupt(self) -> None:
        """Ctrl-C: a terminal sends SIGINT to the whole process group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def alive(self) -> list[str]:
        """The command lines of what is left of its session; zombies, which hold nothing, are left out."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if not entry.name.isdigit() or os.getsid(int(entry.name)) != self.process.pid:
                    continue
                state = (entry / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            except OSError:  # gone meanwhile
                continue
            if state != "Z":
                found.append(line)
        return sorted(found)

    def outlived(self, seconds: float, expected: tuple[str, ...] = ()) -> list[str]:
        """What is still alive after at most `seconds`, but for lines that contain one of `expected`."""
        limit = time.monotonic() + seconds
        while True:
            left = [line for line in self.alive() if not any(name in line for name in expected)]
            if not left or time.monotonic() > limit:
                return left
            time.sleep(0.2)


def write_experiment(folder: Path, model: Path, name: str, **changes: Any) -> Path:
    """An experiment of two rounds and 24 prompts in `folder`; returns the run folder that it will have."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"prompt": f"Once upon a time, {name} had {thing}."}) for name in NAMES for thing in THINGS]
    (folder / "prompts.jsonl").write_text("\n".join(rows), encoding="utf-8")
    spec = {"name": name, "model": str(model), **TINY, **changes}
    (folder / "experiment.yaml").write_text(yaml.safe_dump(spec), encoding="utf-8")
    return folder / "runs" / name


def run(folder: Path, model: Path, name: str, **changes: Any) -> Outcome:
    """Write the experiment and run it to its end."""
    root = write_experiment(folder, model, name, **changes)
    started = Started(folder, "run", "experiment.yaml")
    status = started.end()
    assert started.outlived(15) == []
    return Outcome(root, started.out.read_text(encoding="utf-8"), started.err.read_text(encoding="utf-8"), status)


@functools.cache
def uninterrupted(folder: Path, model: Path) -> Outcome:
    """The run of two arms that nobody stops; done once a test session."""
    return run(folder, model, "tiny")


def results(root: Path) -> dict[str, Any]:
    """All that a run computed: digests of tables and policies, pins, metrics; nothing that a clock says."""
    arms = root / "arms"
    found: dict[str, Any] = {}
    for path in sorted([*arms.rglob("*.parquet"), *arms.rglob("*.safetensors"), *arms.rglob("policy.json")]):
        found[path.relative_to(arms).as_posix()] = digest(path)
    for path in sorted([*arms.rglob("round.json"), *arms.rglob("metrics.json")]):
        found[path.relative_to(arms).as_posix()] = without_timings(json.loads(path.read_text(encoding="utf-8")))
    return found


def without_timings(data: Any) -> Any:
    """`data` but for what a clock says."""
    if isinstance(data, dict):
        return {key: without_timings(value) for key, value in data.items() if key not in TIMINGS}
    return data
