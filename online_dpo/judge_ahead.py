"""Judging a round's answers while others are being sampled: whether it is done, and what one stage leaves the other.

The two stages stay what they are on disk. A run that is killed between them, or within them, finds in the verdict cache
what was judged, as it does after a kill of the judge stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from online_dpo.arms import Arm
from online_dpo.errors import one_line
from online_dpo.judging import Ahead, AskedJudge, JudgeAhead, VerdictCache, asks_policy
from online_dpo.store import RoundFolder
from online_dpo.types import Prompt


def begin(arm: Arm, folder: RoundFolder, prompts: Sequence[Prompt]) -> JudgeAhead | None:
    """Start to judge what will be sampled for `prompts` in `folder`; None where it is judged afterwards."""
    if not _wanted(arm):
        return None
    settings = arm.settings

    @contextmanager
    def opened() -> Iterator[AskedJudge]:
        # A connection of the thread's own: SQLite's are for the thread that made them.
        cache = None if arm.run.cache is None else VerdictCache(arm.run.cache.path)
        try:
            yield arm.run.open_judge(settings.judge, settings.comparing, cache)
        finally:
            if cache is not None:
                cache.close()

    ahead = JudgeAhead(opened, prompts, settings.sampling.n, max_abstain=settings.max_abstain)
    arm.run.judging_ahead[folder.path] = ahead
    return ahead


def finish(arm: Arm, folder: RoundFolder) -> Ahead:
    """What was judged while the round of `folder` was sampled: nothing where it was not."""
    judging = arm.run.judging_ahead.pop(folder.path, None)
    if judging is None:
        return Ahead()
    ahead = judging.stop()
    if ahead.fault is not None:
        arm.run.progress.say(f"judging while sampling ended early: {one_line(ahead.fault)}")
    return ahead


def forget(arm: Arm, folder: RoundFolder) -> None:
    """Stop it where its answers will not be asked for."""
    judging = arm.run.judging_ahead.pop(folder.path, None)
    if judging is not None:
        judging.abandon()


def _wanted(arm: Arm) -> bool:
    """As the experiment says; else where judging takes nothing from the sampling: the judge waits for a server, or has
    a GPU. Never where the judge asks the engine that samples, or wants the whole round at once."""
    said = arm.run.experiment.cluster.judge_while_sampling
    spec = arm.settings.judge
    if said is False or asks_policy(spec, arm.run.judge_folders):
        return False
    asked = arm.run.judge(spec, arm.settings.comparing)
    if asked.batch is None:
        return False
    return bool(said) or asked.waits or (spec.actor is not None and spec.actor.gpus > 0)
