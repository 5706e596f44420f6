"""`online-dpo` in a process that a fault is done to; all that it starts is told by a mark in its environment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

MARK = "ONLINE_DPO_FAULTS_MARK"
CALLS = "ONLINE_DPO_FAULTS_CALLS"
"""The file that the counting judge writes to."""
LONGEST_S = 1200.0
LISTENS = "0A"
"""The state of a listening socket in /proc/net/tcp."""


class Victim:
    """A command at work in `folder`. What it prints is kept in files beside the experiment, one pair a command."""

    def __init__(self, folder: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.mark = uuid.uuid4().hex
        self.out, self.err = folder / f"{self.mark}.out", folder / f"{self.mark}.err"
        self.began = time.monotonic()
        own = {MARK: self.mark, CALLS: str(folder / "calls.txt"), "OMP_NUM_THREADS": "1", **(environment or {})}
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "online_dpo.cli", *arguments],
                cwd=folder,
                stdout=out,
                stderr=err,
                env={**os.environ, **own},
                start_new_session=True,
            )
        self.held: tuple[set[str], set[int]] = (set(), set())

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def label(self, root: Path) -> str:
        """The stage that it is at, as its run folder says; empty before the first, and between two."""
        try:
            record = json.loads((root / "progress.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return ""
        if record["pid"] != self.process.pid or not record["stage"] or record["stage"]["ended"]:
            return ""
        return str(record["stage"]["label"])

    def until(self, condition: Callable[[], bool], seconds: float = LONGEST_S) -> bool:
        """Whether `condition` came to hold before the process ended. Raises `TimeoutError`."""
        limit = time.monotonic() + seconds
        while not condition():
            if self.ended:
                return False
            if time.monotonic() > limit:
                self.kill()
                raise TimeoutError(f"nothing happened for {seconds:.0f} s: {self.said()}")
            time.sleep(0.002)
        return True

    def end(self, seconds: float = LONGEST_S) -> int:
        """Wait for its end; the exit status."""
        self.until(lambda: self.ended, seconds)
        return int(self.process.wait())

    def kill(self) -> None:
        """kill -9 of the driver alone."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stand_still(self) -> None:
        """SIGSTOP to the driver: nothing of it goes on until `go_on`."""
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """SIGCONT."""
        self.process.send_signal(signal.SIGCONT)

    @property
    def stands_still(self) -> bool:
        """Whether the driver was stopped and not let go on."""
        try:
            text = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="utf-8")
        except OSError:  # gone meanwhile
            return False
        return text.rpartition(")")[2].split()[0] == "T"

    def interrupt(self) -> None:
        """Ctrl-C: a terminal sends SIGINT to the whole process group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def said(self) -> str:
        """The ends of what it wrote, to stdout and to stderr."""
        texts = [file.read_text(encoding="utf-8", errors="replace") for file in (self.out, self.err)]
        return " / ".join(text[-1500:].strip() for text in texts if text.strip())

    def error(self) -> str:
        """The line by which it says what went wrong; empty when there is none, or a trace beside it."""
        text = self.err.read_text(encoding="utf-8", errors="replace")
        lines = [line for line in text.splitlines() if line.startswith("online-dpo: ")]
        return lines[0] if len(lines) == 1 and "Traceback" not in text else ""

    # --- what it holds ---

    def processes(self) -> dict[int, str]:
        """Id -> command line of all that carry the mark and still run."""
        found = {}
        wanted = f"{MARK}={self.mark}".encode()
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                    found[int(entry.name)] = line
            except OSError:  # gone meanwhile, or somebody else's
                continue
        return found

    def find(self, name: str) -> list[int]:
        """Ids of its processes whose command line holds `name`."""
        return sorted(process for process, line in self.processes().items() if name in line)

    def note(self) -> None:
        """Keep in mind which shared-memory files and ports it holds now."""
        files, sockets = set(), set()
        for process in self.processes():
            try:
                maps = Path(f"/proc/{process}/maps").read_text(encoding="utf-8", errors="replace")
                files |= {line.split()[-1] for line in maps.splitlines() if line.split()[-1].startswith("/dev/shm/")}  # noqa: S108
                for handle in Path(f"/proc/{process}/fd").iterdir():
                    target = os.readlink(handle)
                    if target.startswith("socket:["):
                        sockets.add(int(target[8:-1]))
            except OSError:  # gone meanwhile
                continue
        self.held = files, set(listening(sockets))

    def left(self) -> list[str]:
        """What is still there of it: processes, shared memory, ports (those it held when `note` looked)."""
        files, ports = self.held
        there = set(listening(None)) if ports else set()
        return [
            *(line[:80] for line in self.processes().values()),
            *sorted(file for file in files if Path(file).exists()),
            *(f"port {port}" for port in sorted(ports & there)),
        ]

    def gone(self, seconds: float = 30.0) -> tuple[list[str], float]:
        """What is left after at most `seconds`, and how long it took."""
        began = time.monotonic()
        while True:
            left = self.left()
            took = time.monotonic() - began
            if not left or took > seconds:
                return left, took
            time.sleep(0.05)


def listening(sockets: set[int] | None) -> list[int]:
    """TCP ports that are listened on by `sockets` (inodes); None: by any."""
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text(encoding="utf-8").splitlines()[1:]:
            columns = line.split()
            if columns[3] == LISTENS and (sockets is None or int(columns[9]) in sockets):
                found.append(int(columns[1].rpartition(":")[2], 16))
    return found
