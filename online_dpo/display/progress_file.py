"""How far a run is, in a file of its folder, for whoever watches from another process."""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from online_dpo.display.progress import QuietProgress
from online_dpo.files import read_json

NAME = "progress.json"
WRITE_SECONDS = 1.0
"""Between two writings while a stage goes on; beginning and end of a stage are written at once."""


class _Record:
    """The file, and what stands in it. Several threads may tell of stages: each has a place of its own."""

    def __init__(self, folder: Path, every: float, clock: Callable[[], float]) -> None:
        self.file = folder / NAME
        self.clock = clock
        self._every = every
        self._turn = threading.Lock()
        self._stages: dict[int, dict[str, Any]] = {}
        self._places = 0
        self._said = ""
        self._written = 0.0
        self.write()

    def place(self) -> int:
        """A place for the stages of one thread; 0 is the first's."""
        with self._turn:
            self._places += 1
            return self._places - 1

    def start(self, place: int, stage: dict[str, Any]) -> None:
        """`stage` begins."""
        with self._turn:
            self._stages[place] = {**stage, "ended": None, "began": self.clock()}
            self._write()

    def advance(self, place: int, amount: int, note: str) -> None:
        """It goes on: written from time to time."""
        with self._turn:
            stage = self._stages.get(place)
            if stage is not None:
                stage["done"] += amount
                stage["note"] = note or stage["note"]
                if self.clock() - self._written >= self._every:
                    self._write()

    def finish(self, place: int) -> None:
        """It is done: the first place's stays until the next begins."""
        with self._turn:
            stage = self._stages.get(place) if not place else self._stages.pop(place, None)
            if stage is not None:
                stage["ended"] = self.clock()
                self._write()

    def say(self, line: str) -> None:
        """The last line."""
        with self._turn:
            self._said = line
            self._write()

    def write(self) -> None:
        """Write the file anew."""
        with self._turn:
            self._write()

    def _write(self) -> None:
        self._written = self.clock()
        record = {
            "pid": os.getpid(),
            "host": platform.node(),
            "time": self._written,
            "said": self._said,
            "stage": self._stages.get(0),
            "beside": [stage for place, stage in sorted(self._stages.items()) if place],
        }
        aside = self.file.with_name(f".{NAME}.tmp")
        aside.unlink(missing_ok=True)  # a link there would be written through
        aside.write_text(json.dumps(record), encoding="utf-8")
        aside.replace(self.file)


class _Recorded(QuietProgress):
    """Shows what `shown` shows, and keeps it in `record`."""

    def __init__(self, shown: QuietProgress, record: _Record) -> None:
        self._shown = shown
        self._record = record
        self._place = record.place()

    def start(self, label: str, total: int, unit: str) -> None:
        """A stage of `total` units begins."""
        self._record.start(self._place, {"label": label, "done": 0, "total": total, "unit": unit, "note": ""})
        self._shown.start(label, total, unit)

    def advance(self, amount: int, note: str = "") -> None:
        """`amount` more units of the current stage are done."""
        self._record.advance(self._place, amount, note)
        self._shown.advance(amount, note)

    def finish(self) -> None:
        """The current stage is done."""
        self._record.finish(self._place)
        self._shown.finish()

    def say(self, line: str) -> None:
        """One line for the person who watches."""
        self._record.say(line)
        self._shown.say(line)

    def beside(self) -> QuietProgress:
        """Kept in the same file."""
        return _Recorded(self._shown.beside(), self._record)


class RecordedProgress(_Recorded):
    """Shows what `shown` shows, and keeps `folder/progress.json`, which is there while the process works.

    It holds `pid` and `host`, `time` (of writing), `said` (the last line), `stage`: `label`, `done`, `total`,
    `unit`, `note`, `began` and `ended` (null: it goes on), and `beside`: the stages that go on at the same time. Times
    are seconds of a clock that nobody sets: they tell how long, not when. It is replaced whole, and not synced: it is
    of no use after a crash.
    """

    def __init__(
        self,
        shown: QuietProgress,
        folder: Path,
        every: float = WRITE_SECONDS,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__(shown, _Record(folder, every, clock))

    def close(self) -> None:
        """Stop showing anything; the file goes."""
        self._record.file.unlink(missing_ok=True)
        self._shown.close()


def read_worker(folder: Path) -> str:
    """Which process works on the run in `folder`, as it says of itself: " (process 12 on host, label)", or ""."""
    try:
        record = read_json(folder / NAME)
        stage = f", {record['stage']['label']}" if record["stage"] else ""
        return f" (process {int(record['pid'])} on {record['host']}{stage})"
    except (OSError, ValueError, KeyError, TypeError):  # none yet, or one that is being replaced
        return ""
