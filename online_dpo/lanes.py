"""Arms and seeds side by side: lanes, each with an engine and a learner of its own, take them in their order.

Their results are those of one after the other: `turns` says who does what several of them need, and the store keeps two
from doing it at the same time. An arm whose pairs another one streams is finished before that one begins.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace

from online_dpo.arms import Arm, Run
from online_dpo.errors import ConfigError, LeftTraining
from online_dpo.leaving import LEAVING
from online_dpo.stopping import Stopped, Stopping, StoppingProgress
from online_dpo.turns import ArmTurns, Work

LEAVING_S = 60.0
"""Seconds that lanes have to end once their processes have."""

RunArm = Callable[[Arm], str | None]
"""Runs an arm to its end; why training stopped it, None where it did not."""


def run_side_by_side(run: Run, arms: Sequence[Arm], run_arm: RunArm, lanes: int) -> list[str | None]:
    """`run_arm` of each of `arms` in `lanes` lanes, or as many as there is room for; what it returned, in their order.

    The first lane has the parts of `run`. Whatever else ends a lane ends all of them, and is raised.
    """
    side_by_side = _Lanes(run, arms, run_arm)
    # Daemons: an engine or a judge that hangs must not keep the process from ending.
    threads = [threading.Thread(target=side_by_side.work, args=(number,), daemon=True) for number in range(lanes)]
    try:
        for thread in threads:
            thread.start()
        while not side_by_side.over.wait(1.0):  # in short waits: signals are heeded between two
            pass
        if isinstance(side_by_side.fault, LeftTraining):
            LEAVING.wait_for_learners(LEAVING_S)  # those of other lanes keep their state too
        if side_by_side.fault is not None:
            raise side_by_side.fault
    except BaseException:
        side_by_side.stop()
        for thread in threads:
            thread.join(LEAVING_S)
        raise
    finally:
        run.store.turns = None
    for thread in threads:
        thread.join()
    return [side_by_side.results[work] for work in side_by_side.order]


class _Lanes:
    """What lanes share: the arms that are left, and what has come of the others."""

    def __init__(self, run: Run, arms: Sequence[Arm], run_arm: RunArm) -> None:
        self._run = run
        self._run_arm = run_arm
        self._arms = {Work(arm.seed, arm.name): arm for arm in arms}
        self.order = list(self._arms)
        self._stopping = Stopping()
        self._turns = ArmTurns(run.store, run.experiment, self.order, self._stopping)
        run.store.turns = self._turns
        self._changed = threading.Condition()
        self._left = list(self.order)
        self.results: dict[Work, str | None] = {}
        self.fault: BaseException | None = None
        self.over = threading.Event()
        """Set when all arms have ended, or one lane has failed."""

    def stop(self) -> None:
        """Tell the lanes to stop, and end what they wait for."""
        with self._changed:
            self._stopping.set()
            self._changed.notify_all()
        if self._run.end_lanes is not None:
            self._run.end_lanes()

    def work(self, number: int) -> None:
        """One lane, in a thread of its own."""
        try:
            if number == 0:
                self._go(self._run)
            else:
                self._go_with_own(number)
        except Stopped:
            return
        except BaseException as error:  # handed to the thread that waits for the lanes
            with self._changed:
                if self.fault is None and not self._stopping.told:
                    self.fault = error
            self.over.set()

    def _go_with_own(self, number: int) -> None:
        """A lane that starts an engine and a learner first; where there is no room, the others go on without it."""
        if self._run.open_lane is None:
            raise ConfigError("cluster.lanes: nothing here can start another engine")
        with ExitStack() as stack:
            try:
                own = stack.enter_context(self._run.open_lane())
            except ConfigError as error:
                self._run.progress.say(f"lane {number + 1} does not fit, the others go on without it: {error}")
                return
            self._go(own)

    def _go(self, run: Run) -> None:
        mine = replace(run, progress=StoppingProgress(run.progress, self._stopping))
        while (work := self._take()) is not None:
            result = self._run_arm(replace(self._arms[work], run=mine))
            with self._changed:
                self.results[work] = result
                self._turns.end(work)
                self._changed.notify_all()
                if len(self.results) == len(self.order):
                    self.over.set()

    def _take(self) -> Work | None:
        """The first arm left whose sources are finished; None where none is left."""
        with self._changed:
            while True:
                self._stopping.check()
                if not self._left:
                    return None
                ready = next((work for work in self._left if self._ready(work)), None)
                if ready is not None:
                    self._left.remove(ready)
                    return ready
                self._changed.wait()

    def _ready(self, work: Work) -> bool:
        streamed = self._run.experiment.streamed(work.arm)
        return all(Work(work.seed, other) in self.results for other in streamed)
