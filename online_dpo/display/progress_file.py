"""How far a run is, in a file of its folder, for whoever watches from another process."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from online_dpo.display.progress import QuietProgress
from online_dpo.files import read_json

NAME = "progress.json"
WRITE_SECONDS = 1.0
"""Between two writings while a stage goes on; beginning and end of a stage are written at once."""


class RecordedProgress(QuietProgress):
    """Shows what `shown` shows, and keeps `folder/progress.json`, which is there while the process works.

    It holds `pid` and `host`, `time` (of writing), `said` (the last line) and `stage`: `label`, `done`, `total`,
    `unit`, `note`, `began` and `ended` (null: it goes on). Times are seconds of a clock that nobody sets: they tell how
    long, not when. It is replaced whole, and not synced: it is of no use after a crash.
    """

    def __init__(
        self,
        shown: QuietProgress,
        folder: Path,
        every: float = WRITE_SECONDS,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._shown = shown
        self._file = folder / NAME
        self._every = every
        self._clock = clock
        self._stage: dict[str, Any] | None = None
        self._said = ""
        self._written = 0.0
        self._write()

    def start(self, label: str, total: int, unit: str) -> None:
        """A stage of `total` units begins."""
        self._stage = {"label": label, "done": 0, "total": total, "unit": unit, "note": "", "ended": None}
        self._stage["began"] = self._clock()
        self._write()
        self._shown.start(label, total, unit)

    def advance(self, amount: int, note: str = "") -> None:
        """`amount` more units of the current stage are done."""
        if self._stage is not None:
            self._stage["done"] += amount
            self._stage["note"] = note or self._stage["note"]
            if self._clock() - self._written >= self._every:
                self._write()
        self._shown.advance(amount, note)

    def finish(self) -> None:
        """The current stage is done."""
        if self._stage is not None:
            self._stage["ended"] = self._clock()
            self._write()
        self._shown.finish()

    def say(self, line: str) -> None:
        """One line for the person who watches."""
        self._said = line
        self._write()
        self._shown.say(line)

    def close(self) -> None:
        """Stop showing anything; the file goes."""
        self._file.unlink(missing_ok=True)
        self._shown.close()

    def _write(self) -> None:
        self._written = self._clock()
        record = {
            "pid": os.getpid(),
            "host": platform.node(),
            "time": self._written,
            "said": self._said,
            "stage": self._stage,
        }
        aside = self._file.with_name(f".{NAME}.tmp")
        aside.unlink(missing_ok=True)  # a link there would be written through
        aside.write_text(json.dumps(record), encoding="utf-8")
        aside.replace(self._file)


def read_worker(folder: Path) -> str:
    """Which process works on the run in `folder`, as it says of itself: " (process 12 on host, label)", or ""."""
    try:
        record = read_json(folder / NAME)
        stage = f", {record['stage']['label']}" if record["stage"] else ""
        return f" (process {int(record['pid'])} on {record['host']}{stage})"
    except (OSError, ValueError, KeyError, TypeError):  # none yet, or one that is being replaced
        return ""
