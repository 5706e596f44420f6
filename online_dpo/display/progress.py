"""How far a run is: nothing, lines, or a bar."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from online_dpo.display.text import clean

PLAIN_SECONDS = 10.0
"""At most one progress line in this time where there is no terminal."""


@dataclass(slots=True)
class _Stage:
    """The stage under way."""

    label: str
    total: int
    unit: str
    began: float
    done: int = 0
    note: str = ""

    def line(self, now: float, *, finished: bool) -> str:
        """How far it is, at what rate, and how long it took or will take."""
        seconds = now - self.began
        rate = self.done / seconds if seconds > 0 else 0.0
        parts = [f"{self.done} {self.unit}" if finished and self.done == self.total else self._count()]
        if finished:
            parts[0] += f" in {seconds:.1f} s"
        if rate > 0:
            parts.append(f"{rate:.{1 if rate >= 1 else 3}f}/s")
            if not finished:
                parts.append(f"{clock_time((self.total - self.done) / rate)} left")
        if self.note:
            parts.append(self.note)
        return f"{self.label}: {', '.join(parts)}"

    def _count(self) -> str:
        return f"{self.done} of {self.total} {self.unit}"


class QuietProgress:
    """Says nothing. The other two build on it; all are context managers, which stop the display on an error."""

    def start(self, label: str, total: int, unit: str) -> None:
        """A stage of `total` units begins."""

    def advance(self, amount: int, note: str = "") -> None:
        """`amount` more units of the current stage are done."""

    def finish(self) -> None:
        """The current stage is done."""

    def say(self, line: str) -> None:
        """One line for the person who watches."""

    def beside(self) -> QuietProgress:
        """Where another thread tells of stages that go on at the same time. What it shows ends with this display."""
        return QuietProgress()

    def close(self) -> None:
        """Stop showing anything; a stage that is under way was interrupted."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class PlainProgress(QuietProgress):
    """Lines for output that is no terminal: one about every ten seconds, and one when a stage is done."""

    def __init__(
        self, console: Console, every: float = PLAIN_SECONDS, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._console = console
        self._every = every
        self._clock = clock
        self._stage: _Stage | None = None
        self._printed = 0.0

    def start(self, label: str, total: int, unit: str) -> None:
        """A stage of `total` units begins."""
        self._printed = self._clock()
        self._stage = _Stage(clean(label), total, clean(unit), self._printed)

    def advance(self, amount: int, note: str = "") -> None:
        """`amount` more units of the current stage are done."""
        stage = self._stage
        if stage is None:
            return
        stage.done += amount
        stage.note = clean(note) or stage.note
        now = self._clock()
        if stage.done < stage.total and now - self._printed >= self._every:
            self._printed = now
            self.say(stage.line(now, finished=False))

    def finish(self) -> None:
        """The current stage is done: its line, with rate and seconds."""
        if self._stage is not None:
            self.say(self._stage.line(self._clock(), finished=True))
        self._stage = None

    def say(self, line: str) -> None:
        """One line for the person who watches."""
        self._console.print(Text(clean(line)), soft_wrap=True)

    def beside(self) -> PlainProgress:
        """Lines among the others'."""
        return PlainProgress(self._console, self._every, self._clock)

    def close(self) -> None:
        """A stage that is under way was interrupted: no line of success for it."""
        self._stage = None


class _Rate(ProgressColumn):
    """Units a second, over the last half minute."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.{1 if speed >= 1 else 3}f}/s" if speed else "")


class _Bars:
    """The bars of all stages that go on at the same time, one below the other: a terminal has one place for them."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._turn = threading.Lock()
        self._shown: Progress | None = None

    def add(self, label: str, total: int, unit: str) -> TaskID:
        """One more bar."""
        with self._turn:
            if self._shown is None:
                self._shown = self._begun()
            return self._shown.add_task(label, total=total, unit=unit, note="")

    def advance(self, task: TaskID, amount: int, note: str) -> None:
        """A bar grows."""
        with self._turn:
            if self._shown is not None:
                self._shown.update(task, advance=amount, note=note)

    def remove(self, task: TaskID) -> None:
        """A bar goes, and with the last one their place."""
        with self._turn:
            if self._shown is None or task not in self._shown.task_ids:
                return
            if len(self._shown.task_ids) == 1:
                self._end()
            else:
                self._shown.remove_task(task)

    def close(self) -> None:
        """Take all of them away; the terminal is left as it was."""
        with self._turn:
            self._end()

    def _begun(self) -> Progress:
        bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=16),
            TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]}", markup=False),
            _Rate(),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            TextColumn("{task.fields[note]}", markup=False),
            console=self._console,
            transient=True,
        )
        bars.start()
        return bars

    def _end(self) -> None:
        if self._shown is not None:
            self._shown.stop()
        self._shown = None


class RichProgress(PlainProgress):
    """A bar with count, rate and time left on a terminal; the line of a finished stage stays."""

    def __init__(self, console: Console, beside: _Bars | None = None) -> None:
        """`beside`: the bars that its own are shown with; None: it has a display of its own."""
        super().__init__(console, every=float("inf"))
        self._own = beside is None
        self._bars = beside or _Bars(console)
        self._task: TaskID | None = None

    def start(self, label: str, total: int, unit: str) -> None:
        """A stage of `total` units begins: a bar appears."""
        self._stop()
        super().start(label, total, unit)
        self._task = self._bars.add(clean(label), total, clean(unit))

    def advance(self, amount: int, note: str = "") -> None:
        """`amount` more units of the current stage are done."""
        super().advance(amount, note)
        if self._task is not None and self._stage is not None:
            self._bars.advance(self._task, amount, self._stage.note)

    def finish(self) -> None:
        """The current stage is done: its bar becomes a line."""
        self._stop()
        super().finish()

    def beside(self) -> RichProgress:
        """Bars below the others'."""
        return RichProgress(self._console, self._bars)

    def close(self) -> None:
        """Take the bars away; the terminal is left as it was."""
        self._stop()
        if self._own:
            self._bars.close()
        super().close()

    def _stop(self) -> None:
        if self._task is not None:
            self._bars.remove(self._task)
        self._task = None


def make_progress(quiet: bool, console: Console) -> QuietProgress:
    """The display that fits: nothing, a bar on a terminal, or lines."""
    if quiet:
        return QuietProgress()
    return RichProgress(console) if console.is_terminal else PlainProgress(console)


def clock_time(seconds: float) -> str:
    """`minutes:seconds`, with hours where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
