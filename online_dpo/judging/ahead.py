"""Judging answers while others are still being sampled: a thread beside the sampling.

What is asked, in which company, and what comes of it are those of judging afterwards: prompts go one by one where a
call takes one, else in the same chunks. What has not been asked when the sampling ends is left to the caller.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from online_dpo.judging.answers import Answer
from online_dpo.judging.asked import AskedJudge
from online_dpo.judging.interface import Abstention, Item
from online_dpo.judging.verdicts import Abstained, chunk_size
from online_dpo.types import Candidate, Prompt


@dataclass
class Ahead:
    """What was judged meanwhile: answers by prompt id, one a candidate; what they cost; what ended it too early."""

    said: dict[str, Sequence[Answer]] = field(default_factory=dict)
    ledger: dict[str, float] = field(default_factory=dict)
    fault: BaseException | None = None

    def with_ledger(self, other: Mapping[str, float]) -> dict[str, float]:
        """This ledger and `other` in sum: nothing stands in both."""
        items = dict.fromkeys([*self.ledger, *other])
        return {item: self.ledger.get(item, 0) + other.get(item, 0) for item in items}


class JudgeAhead:
    """A thread that judges what `add` gives it, until `stop`. Made, and talked to, by one thread."""

    def __init__(
        self,
        opened: Callable[[], AbstractContextManager[AskedJudge]],
        prompts: Sequence[Prompt],
        candidates: int,
        *,
        max_abstain: float,
    ) -> None:
        """`opened` gives the judge, with a cache connection of its own; it is called in the thread. Each of `prompts`
        will have `candidates` candidates. `max_abstain`: as in `judge_all`."""
        self._opened = opened
        self._prompts = list(prompts)
        self._candidates = candidates
        self._max_abstain = max_abstain
        self._arrived: queue.SimpleQueue[list[Candidate] | None] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._groups: dict[str, list[Candidate]] = {}
        self._abstained = Abstained()
        self._ahead = Ahead()
        # A daemon: a judge that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def add(self, group: list[Candidate]) -> None:
        """All candidates of one prompt have been sampled."""
        self._arrived.put(group)

    def stop(self) -> Ahead:
        """Begin no further call, wait for the one that runs, and return what was judged."""
        self.abandon()
        self._thread.join()
        return self._ahead

    def abandon(self) -> None:
        """Begin no further call, and wait for nothing."""
        self._stopping.set()
        self._arrived.put(None)

    def _work(self) -> None:
        try:
            with self._opened() as asked:
                try:
                    for chunk in self._chunks(asked):
                        self._judge(asked, chunk)
                finally:
                    self._ahead.ledger = asked.take_ledger()
        except BaseException as error:  # handed to whoever stops the thread; judging afterwards meets it again
            self._ahead.fault = error

    def _judge(self, asked: AskedJudge, chunk: Sequence[Prompt]) -> None:
        items: list[Item] = [(prompt, self._groups.pop(prompt.id)) for prompt in chunk]
        for (prompt, _), answers in zip(items, asked.scores(items), strict=True):
            self._ahead.said[prompt.id] = answers
            for answer in answers:
                if isinstance(answer, Abstention):
                    self._abstained.add(prompt.id, answer.reason)
        done, total = (len(some) * self._candidates for some in (self._ahead.said, self._prompts))
        self._abstained.check(asked, done, total, self._max_abstain)

    def _chunks(self, asked: AskedJudge) -> Iterator[list[Prompt]]:
        """Prompts to be judged together, once all of them are here."""
        size = chunk_size(asked, self._candidates)
        if size is None:  # the judge wants to see the whole round at once
            return
        alone = asked.batch == 1
        step = 1 if alone else max(1, size)
        units = [self._prompts[start : start + step] for start in range(0, len(self._prompts), step)]
        unit_of = {prompt.id: number for number, unit in enumerate(units) for prompt in unit}
        missing = [len(unit) for unit in units]
        ready: deque[int] = deque()
        left = len(units)
        while left:
            for prompt_id in self._take(wait=not ready):
                missing[unit_of[prompt_id]] -= 1
                if not missing[unit_of[prompt_id]]:
                    ready.append(unit_of[prompt_id])
            if self._stopping.is_set():
                return
            now = [ready.popleft() for _ in range(min(len(ready), max(1, size) if alone else 1))]
            left -= len(now)
            if now:
                yield [prompt for number in now for prompt in units[number]]

    def _take(self, *, wait: bool) -> Iterator[str]:
        """The prompts whose candidates have come since; with `wait` at least one, or the end."""
        while True:
            try:
                group = self._arrived.get(block=wait)
            except queue.Empty:
                return
            if group is None:
                return
            wait = False
            self._groups[group[0].prompt_id] = group
            yield group[0].prompt_id
