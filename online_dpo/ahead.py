"""Sampling a round while the one before it trains, or is evaluated.

`source: {lag: k}` with k ≥ 1 needs nothing of that training. Any round needs nothing of the evaluation before it, once
the engine has drawn the held-out answers: what is left of it is the judge's and the learner's.

A thread gives the engine and the judge their work as the loop would a moment later: seeds are of the request, a stage's
inputs are digests, and its files and records come to lie in the round's folder as ever, before the round is pinned. So
a run that is killed finds them finished or does them again, as it does any stage.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from online_dpo.arms import Arm
from online_dpo.errors import TrainingError
from online_dpo.files import remove
from online_dpo.judging import asks_policy
from online_dpo.protocols import Progress
from online_dpo.rounds import Sampled, source_index
from online_dpo.sample_stage import sample_round
from online_dpo.source_spec import source_kind
from online_dpo.sources import round_prompts
from online_dpo.sources.fresh import gather_fresh
from online_dpo.stopping import Stopping, StoppingProgress

SAMPLED_WHOLE = ("current", "initial", "every")
"""Sources whose rounds are sampled at once, by a policy that is there before the round before is evaluated."""
LEAVING_S = 10.0
"""Seconds in which a thread that is told to stop is expected at its next answer."""


@contextmanager
def round_ahead(arm: Arm, index: int) -> Iterator[None]:
    """Inside, round `index` of `arm` is sampled, judged and paired in a thread, where it needs nothing of what is done
    inside; else nothing happens. On leaving it is waited for, and what ended it is raised.

    A `TrainingError` inside stops the arm: what was made of round `index` goes, which in sequence there would not be.
    """
    if not may_run_ahead(arm, index):
        yield
        return
    ahead = _Ahead(arm, index, _gather)
    try:
        yield
    except TrainingError:
        # The engine is the next arm's.
        ahead.wait()
        remove(arm.folder(index).path)
        raise
    except BaseException:
        ahead.stop()
        raise
    ahead.result()


def may_run_ahead(arm: Arm, index: int) -> bool:
    """Whether round `index` can be sampled while the one before it trains."""
    settings = arm.settings
    if index > settings.rounds or source_kind(settings.source) != "lag" or arm.run.experiment.engine.share_gpu:
        return False
    # The round before, which trains, is index − 1: its start is there, its result is not.
    return source_index(settings, index) <= index - 2 and not arm.folder(index).closed


@contextmanager
def answers_ahead(arm: Arm, index: int) -> Iterator[Callable[[], None]]:
    """Gives what is to be called once the engine has nothing more to do inside: from then on the answers of round
    `index` are sampled in a thread, where that may be. On leaving it is waited for, and what ended it is raised."""
    begun: list[_Ahead] = []

    def begin() -> None:
        if may_sample_ahead(arm, index):
            # Here and not in the thread, which looks at it too: it is opened once.
            arm.run.judge(arm.settings.judge, arm.settings.comparing)
            begun.append(_Ahead(arm, index, _sample))

    try:
        yield begin
    except BaseException:
        for ahead in begun:
            ahead.stop()
        raise
    for ahead in begun:
        ahead.result()


def may_sample_ahead(arm: Arm, index: int) -> bool:
    """Whether round `index` can be sampled while the judge and the learner evaluate the round before it.

    As `cluster.sample_while_evaluating` says; else where engine and learner have a GPU each. Never where they share
    one, or where the judge of the held-out answers asks the engine.
    """
    run, settings = arm.run, arm.settings
    wanted = run.experiment.cluster.sample_while_evaluating
    if not (run.apart if wanted is None else wanted) or run.experiment.engine.share_gpu:
        return False
    if index > settings.rounds or source_kind(settings.source) not in SAMPLED_WHOLE or arm.folder(index).closed:
        return False
    judges = (run.experiment.evaluation_judge(arm.name), run.experiment.evaluation.gold)
    return not any(asks_policy(spec, run.judge_folders) for spec in judges if spec is not None)


def _gather(arm: Arm, index: int) -> None:
    gather_fresh(arm, arm.folder(index), _sampled(arm, index))


def _sample(arm: Arm, index: int) -> None:
    sample_round(arm, arm.folder(index), _sampled(arm, index))


def _sampled(arm: Arm, index: int) -> Sampled:
    return Sampled(arm.policies.at(source_index(arm.settings, index)), round_prompts(arm, index))


class _Ahead:
    """The thread."""

    def __init__(self, arm: Arm, index: int, work: Callable[[Arm, int], None]) -> None:
        self._stopping = Stopping()
        progress: Progress = StoppingProgress(arm.run.progress.beside(), self._stopping)
        self._arm = replace(arm, run=replace(arm.run, progress=progress))
        self._index = index
        self._do = work
        self._fault: BaseException | None = None
        # A daemon: an engine or a judge that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until it is done, or has failed."""
        self._thread.join()

    def stop(self) -> None:
        """Tell it to stop at its next answer; where it does not, the engine's end will end it."""
        self._stopping.set()
        self._thread.join(LEAVING_S)

    def result(self) -> None:
        """Wait for it; raises what it raised."""
        self.wait()
        if self._fault is not None:
            raise self._fault

    def _work(self) -> None:
        try:
            self._do(self._arm, self._index)
        except BaseException as error:  # handed to whoever waits for the thread
            self._fault = error
