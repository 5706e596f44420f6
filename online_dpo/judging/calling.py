"""Calling a judge: one call or many at once, with a limit on how long one may take."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

from online_dpo.errors import JudgeError

Task = TypeVar("Task")
Result = TypeVar("Result")
POLL_S = 1.0


def call_all(
    tasks: Sequence[Task],
    call: Callable[[Task], Result],
    *,
    concurrent: int,
    limit_s: float | None,
    name: Callable[[Task], str],
    check: Callable[[Task], None],
) -> Iterator[tuple[Task, Result]]:
    """Each task with its result, as they come; in their order where `concurrent` is 1.

    `check` is called in this thread before each task begins: what it raises ends the calling. So does an exception
    of `call`, and a call that takes longer than `limit_s` (a `JudgeError` that names the task; its thread is left
    behind). Any of these is raised once the other calls that run have ended, or passed the limit too, and were
    yielded: what they cost is not lost. Without a limit and with `concurrent` 1 this very thread makes the calls.
    """
    if concurrent == 1 and limit_s is None:
        for task in tasks:
            check(task)
            yield task, call(task)
        return
    yield from _Threads(tasks, call, concurrent, limit_s, name, check).run()


class _Threads(Generic[Task, Result]):
    """Daemon threads: one that a judge never returns to does not keep the process from ending, as a pool's would."""

    def __init__(
        self,
        tasks: Sequence[Task],
        call: Callable[[Task], Result],
        concurrent: int,
        limit_s: float | None,
        name: Callable[[Task], str],
        check: Callable[[Task], None],
    ) -> None:
        self.tasks = tasks
        self.call = call
        self.limit_s = limit_s
        self.name = name
        self.check = check
        self.left = iter(range(len(tasks)))
        self.waiting: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self.ended: queue.SimpleQueue[tuple[int, Result | None, BaseException | None]] = queue.SimpleQueue()
        self.began: dict[int, float] = {}
        self.fault: BaseException | None = None
        self.workers = min(concurrent, len(tasks))

    def run(self) -> Iterator[tuple[Task, Result]]:
        for _ in range(self.workers):
            threading.Thread(target=self._work, daemon=True).start()
        try:
            for _ in range(self.workers):
                self._hand()
            while self.began:
                try:
                    ended = self.ended.get(timeout=self._patience())
                except queue.Empty:
                    self._give_up()
                    continue
                yield from self._end(*ended)
                if self.ended.empty():  # else an answer that came in time would be called late
                    self._give_up()
        finally:
            for _ in range(self.workers):
                self.waiting.put(None)
        if self.fault is not None:
            raise self.fault

    def _end(self, place: int, result: Result | None, error: BaseException | None) -> Iterator[tuple[Task, Result]]:
        if self.began.pop(place, None) is None:
            return  # given up before: it has been named as too late
        self.fault = error if self.fault is None else self.fault
        if error is None:
            # Kept by whoever asks before the next begins: what is checked then counts it.
            yield self.tasks[place], result  # type: ignore[misc] # a result of the call's own type
        self._hand()

    def _hand(self) -> None:
        """Let the next task begin; after a fault nothing new does, and what runs is waited for."""
        place = next(self.left, None) if self.fault is None else None
        if place is None:
            return
        try:
            self.check(self.tasks[place])
        except BaseException as error:  # raised at the end of `run`
            self.fault = error
            return
        self.began[place] = time.monotonic()
        self.waiting.put(place)

    def _work(self) -> None:
        while (place := self.waiting.get()) is not None:
            try:
                self.ended.put((place, self.call(self.tasks[place]), None))
            except BaseException as error:  # handed over to the caller's thread, which raises it
                self.ended.put((place, None, error))

    def _patience(self) -> float:
        """How long to wait for an answer before looking at the clock again (seconds)."""
        if self.limit_s is None:
            return POLL_S
        left = min(self.began.values()) + self.limit_s - time.monotonic()
        return min(POLL_S, max(left, 0.001))

    def _give_up(self) -> None:
        """No longer wait for the calls that are past the limit."""
        if self.limit_s is None:
            return
        now = time.monotonic()
        for place in [place for place, began in self.began.items() if now - began > self.limit_s]:
            del self.began[place]
            late = JudgeError(f"{self.name(self.tasks[place])} has not answered for {self.limit_s:g} s")
            self.fault = late if self.fault is None else self.fault
