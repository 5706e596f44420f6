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
) -> Iterator[tuple[Task, Result]]:
    """Each task with its result, as they come; in their order where `concurrent` is 1.

    An exception of `call` is raised once the other calls that run have ended and were yielded: what they cost is not
    lost. A call that takes longer than `limit_s` raises `JudgeError` naming the task; its thread is left behind.
    Without a limit and with `concurrent` 1 the calls are made in this very thread.
    """
    if concurrent == 1 and limit_s is None:
        for task in tasks:
            yield task, call(task)
        return
    yield from _Threads(tasks, call, concurrent, limit_s, name).run()


class _Threads(Generic[Task, Result]):
    """Daemon threads: one that a judge never returns to does not keep the process from ending, as a pool's would."""

    def __init__(
        self,
        tasks: Sequence[Task],
        call: Callable[[Task], Result],
        concurrent: int,
        limit_s: float | None,
        name: Callable[[Task], str],
    ) -> None:
        self.tasks = tasks
        self.call = call
        self.limit_s = limit_s
        self.name = name
        self.waiting: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self.ended: queue.SimpleQueue[tuple[int, Result | None, BaseException | None]] = queue.SimpleQueue()
        self.began: dict[int, float] = {}
        self.workers = min(concurrent, len(tasks))

    def run(self) -> Iterator[tuple[Task, Result]]:
        handed = iter(range(len(self.tasks)))
        for _ in range(self.workers):
            threading.Thread(target=self._work, daemon=True).start()
        fault: BaseException | None = None
        try:
            running = sum(self._hand(handed) for _ in range(self.workers))
            while running:
                place, result, error = self._next()
                running -= 1
                fault = fault or error
                # After a fault nothing new begins, and what runs is waited for.
                running += self._hand(handed) if fault is None else 0
                if error is None:
                    yield self.tasks[place], result  # type: ignore[misc] # a result of the call's own type
        finally:
            for _ in range(self.workers):
                self.waiting.put(None)
        if fault is not None:
            raise fault

    def _hand(self, handed: Iterator[int]) -> int:
        place = next(handed, None)
        if place is None:
            return 0
        self.began[place] = time.monotonic()
        self.waiting.put(place)
        return 1

    def _work(self) -> None:
        while (place := self.waiting.get()) is not None:
            try:
                self.ended.put((place, self.call(self.tasks[place]), None))
            except BaseException as error:  # handed over to the caller's thread, which raises it
                self.ended.put((place, None, error))

    def _next(self) -> tuple[int, Result | None, BaseException | None]:
        while True:
            try:
                ended = self.ended.get(timeout=POLL_S if self.limit_s is None else min(POLL_S, self.limit_s))
            except queue.Empty:
                self._check_limit()
                continue
            del self.began[ended[0]]
            return ended

    def _check_limit(self) -> None:
        if self.limit_s is None or not self.began:
            return
        place, began = min(self.began.items(), key=lambda item: item[1])
        if time.monotonic() - began > self.limit_s:
            raise JudgeError(f"{self.name(self.tasks[place])} has not answered for {self.limit_s:g} s")
