"""Being told to leave: Ctrl-C by a person, SIGTERM by a scheduler that will kill the process after a while.

The first of either stops the run where it is; but while a policy is trained, SIGTERM lets the learner keep its state at
its next step first: it is asked by an empty file beside its checkpoint. A Ctrl-C after that ends the process at once,
and what it started ends with it. A further SIGTERM changes nothing: some schedulers send several, and kill anyway.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

SHOW_CURSOR = "\x1b[?25h"
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
"""Exit statuses, as a shell reports a process that a signal ended."""


def ask_file(checkpoint: Path) -> Path:
    """The file that asks the learner which keeps its state in folder `checkpoint` to leave."""
    return checkpoint.with_name(f"{checkpoint.name}.asked")


class Leaving:
    """What this process has been told so far."""

    def __init__(self) -> None:
        self.status: int | None = None
        """The exit status that the first signal asked for; None: no signal came."""
        self._trainings: list[Path] = []

    @contextmanager
    def by_checkpoint(self, checkpoint: Path | None) -> Iterator[None]:
        """Inside, a learner is at work that SIGTERM asks to keep its state in folder `checkpoint`; None: it cannot."""
        if checkpoint is None:
            yield
            return
        asked = ask_file(checkpoint)
        asked.unlink(missing_ok=True)  # of a process that was killed before its learner saw it
        self._trainings.append(asked)
        try:
            yield
        finally:
            self._trainings.remove(asked)
            asked.unlink(missing_ok=True)

    def wait_for_learners(self, seconds: float) -> None:
        """Until no learner is at work that was asked to leave, or so many seconds are over."""
        limit = time.monotonic() + seconds
        while self._trainings and time.monotonic() < limit:
            time.sleep(0.05)

    def leave_if_told(self) -> None:
        """Raise `KeyboardInterrupt` where SIGTERM came and no learner was left to heed it."""
        if self.status is not None:
            raise KeyboardInterrupt

    @contextmanager
    def heeded(self, leave_at_once: Callable[[int], None]) -> Iterator[None]:
        """Inside, signals are heeded; `leave_at_once(status)` is called at a second Ctrl-C and does not return."""

        def interrupted(_signal: int, _frame: FrameType | None) -> None:
            if self.status is not None:
                leave_at_once(INTERRUPTED)
            self.status = INTERRUPTED
            raise KeyboardInterrupt

        def terminated(_signal: int, _frame: FrameType | None) -> None:
            if self.status is None:
                self.status = TERMINATED
                if not self._ask_learners():
                    raise KeyboardInterrupt

        if threading.current_thread() is not threading.main_thread():  # Python leaves signals to the main thread
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        signal.signal(signal.SIGINT, interrupted)
        signal.signal(signal.SIGTERM, terminated)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self.status = None

    def _ask_learners(self) -> bool:
        """Whether every learner at work could be asked; False where none is."""
        try:
            for asked in self._trainings:
                asked.touch()
        except OSError:  # no room: what is not kept is trained again
            return False
        return bool(self._trainings)


LEAVING = Leaving()
"""Signals are the process's, so there is one."""


def leave_at_once(line: str, status: int) -> None:
    """Say `line` and end this process here and now: nothing is cleaned up, which a run folder does not need."""
    cursor = SHOW_CURSOR if sys.stderr.isatty() else ""
    os.write(sys.stderr.fileno(), f"{cursor}\n{line}\n".encode("utf-8", "replace"))
    os._exit(status)
