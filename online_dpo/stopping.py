"""Threads that work on a run are told to stop; each does at its next stage, or the next answer of the one under way."""

from __future__ import annotations

import threading

from online_dpo.protocols import Progress


class Stopped(Exception):
    """A thread was told to stop. Never seen by a person: whoever told it knows why."""


class Stopping:
    """Whether threads were told to stop."""

    def __init__(self) -> None:
        self._told = threading.Event()

    def set(self) -> None:
        """Tell them."""
        self._told.set()

    @property
    def told(self) -> bool:
        """Whether they were."""
        return self._told.is_set()

    def check(self) -> None:
        """Raise `Stopped` where they were."""
        if self.told:
            raise Stopped

    def pause(self, seconds: float) -> None:
        """Wait so long, or until they are told; then as `check`."""
        self._told.wait(seconds)
        self.check()


class StoppingProgress:
    """`protocols.Progress` by which a thread learns at its next step that it is to stop."""

    def __init__(self, shown: Progress, stopping: Stopping) -> None:
        self._shown = shown
        self._stopping = stopping

    def start(self, label: str, total: int, unit: str) -> None:
        """See `protocols.Progress`."""
        self._stopping.check()
        self._shown.start(label, total, unit)

    def advance(self, amount: int, note: str = "") -> None:
        """See `protocols.Progress`."""
        self._stopping.check()
        self._shown.advance(amount, note)

    def finish(self) -> None:
        """See `protocols.Progress`."""
        self._shown.finish()

    def say(self, line: str) -> None:
        """See `protocols.Progress`."""
        self._shown.say(line)

    def beside(self) -> Progress:
        """See `protocols.Progress`."""
        return StoppingProgress(self._shown.beside(), self._stopping)
