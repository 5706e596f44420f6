"""Sees to it that nothing of a Ray of the run's own outlives the run, however that ends.

Ray's servers end with the process that started them, but two small agents of Ray's wait a minute for a dead server. So
a process that imports next to nothing waits for the end of a pipe, which comes when its parent ends, by whatever
signal; then it kills what still carries the parent's mark in its environment. Linux alone: it reads /proc.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

MARK = "ONLINE_DPO_OWN_RAY"
KEPT = "SPT_NOENV"
"""With it, Ray's processes do not write their titles over what /proc shows of their environment."""
PAUSE_S = 0.1
QUIET_PAUSES = 3
"""Looks in a row that find nothing, before it is believed: one misses a process that is just being started."""


class Caretaker:
    """What is started after `begin` and before `started` returns, and all of its children, ends with this process."""

    def __init__(self) -> None:
        self._mark = uuid.uuid4().hex
        self._process: subprocess.Popen[bytes] | None = None
        self._unset: list[str] = []

    def begin(self) -> None:
        """Start the process that waits, and put the mark into this process's environment."""
        self.end()
        if not sys.platform.startswith("linux"):
            return
        self._process = subprocess.Popen(  # noqa: S603 # this very file
            [sys.executable, "-I", "-S", __file__, self._mark],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in a terminal goes to all that share the parent's
        )
        os.environ[MARK] = self._mark
        self._unset = [MARK] if KEPT in os.environ else [MARK, KEPT]
        os.environ.setdefault(KEPT, "1")

    def started(self) -> None:
        """Take the mark back: what this process starts from now on is not seen to."""
        for name in self._unset:
            os.environ.pop(name, None)

    def end(self) -> None:
        """Let it do its work now; returns when nothing is left."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._process.wait()
            self._process = None


def marked(mark: str) -> list[int]:
    """The processes whose environment has the mark, this one left out."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
        except OSError:  # gone, or another user's
            continue
        if wanted in environment:
            found.append(int(entry.name))
    return found


def kill_marked(mark: str) -> None:
    """Kill until nothing with the mark is there."""
    quiet = 0
    while quiet < QUIET_PAUSES:
        there = marked(mark)
        for process in there:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        quiet = 0 if there else quiet + 1
        time.sleep(PAUSE_S)


if __name__ == "__main__":
    sys.stdin.buffer.read()
    kill_marked(sys.argv[1])
