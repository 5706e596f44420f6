"""Contenders in processes of their own that take turns: one computes while the others wait.

Each side then has its own peak of memory, and the sides alternate on the same machine within one run. The parent
says "go" on a contender's standard input and reads one JSON line when that turn is done. What the contender or its
libraries print goes to a log file.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
GO = "go\n"
Said = dict[str, float]
"""What a contender tells of one turn."""


def cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


class Contender:
    """The parent's side: the script `script` of this folder, started with `options` as its one argument, JSON."""

    def __init__(
        self,
        name: str,
        script: str,
        options: Mapping[str, object],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.log = tempfile.NamedTemporaryFile("w+", prefix=f"{name}-", suffix=".log")  # noqa: SIM115 - `close` does
        variables = {**os.environ, "OMP_NUM_THREADS": str(cores()), "TOKENIZERS_PARALLELISM": "false"}
        variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / script), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**variables, **(environment or {})},
        )

    def turn(self) -> Said:
        """Let the contender work until it speaks; what it says.

        Raises `RuntimeError` with the end of its log when it ended instead.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(GO)
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            log = Path(self.log.name).read_text(encoding="utf-8", errors="replace")
            raise RuntimeError(f"{self.name} ended (exit {self.process.wait()}): {log[-3000:]}")
        said: Said = json.loads(line)
        return said

    def close(self) -> None:
        """End the process, whatever it does."""
        self.process.kill()
        # Waits, and closes the pipes.
        self.process.communicate()
        self.log.close()

    def __enter__(self) -> Contender:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Floor:
    """The contender's side: `wait` for the turn, work, `tell`. Make it before anything else prints."""

    def __init__(self) -> None:
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def wait(self) -> None:
        """Block until it is this process's turn. Ends the process when the parent is gone."""
        if sys.stdin.readline() != GO:
            os._exit(0)

    def tell(self, said: Mapping[str, float]) -> None:
        """This turn is done."""
        print(json.dumps(said), file=self.out, flush=True)


def serve(turns: Iterable[Mapping[str, float]]) -> None:
    """Compute one item of `turns` at each turn, and tell it."""
    floor = Floor()
    found = iter(turns)
    while True:
        floor.wait()
        try:
            floor.tell(next(found))
        except StopIteration:
            return


def options() -> dict[str, Any]:
    """What the parent passed to this contender."""
    given: dict[str, Any] = json.loads(sys.argv[1])
    return given


# --- memory (Linux) ---


def peak_mib() -> float:
    """The most memory that this process has held since its start, or the last `reset_peak`."""
    return _status("VmHWM")


def held_mib() -> float:
    """The memory that this process holds now."""
    return _status("VmRSS")


def held_beside(weights: Iterable[Tensor]) -> float:
    """What this process holds beside these weights, all of which are read first: loading may only have mapped them."""
    size = 0.0
    for weight in weights:
        weight.detach().sum().item()
        size += weight.numel() * weight.element_size() / 2**20
    give_memory_back()
    return held_mib() - size


def reset_peak() -> None:
    """Let `peak_mib` start anew from what is held now (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def give_memory_back() -> None:
    """Give freed memory back to the system (malloc_trim(3)): several contenders must fit side by side."""
    ctypes.CDLL(None).malloc_trim(0)


def _status(key: str) -> float:
    (line,) = (row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(key))
    return int(line.split()[1]) / 1024
