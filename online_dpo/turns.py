"""Which arm does a piece of work that several arms share, where arms are at work side by side: the one that would do it
if they came one after the other. So neither names nor what is said to be reused depend on who is faster.

An arm waits with a stage for an earlier arm that has not come so far, but only where the two may have the same work to
do: with policies of different weights they never will again. Nobody waits for a later arm, so there is no deadlock.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from online_dpo.config import Experiment
from online_dpo.errors import RunFolderError
from online_dpo.leaving import LEAVING
from online_dpo.policies import read_policy
from online_dpo.rounds import reference_index, source_index
from online_dpo.source_spec import source_kind
from online_dpo.stopping import Stopping
from online_dpo.store import RoundFolder, RunStore

SAMPLING = ("current", "initial", "every", "lag")
"""Sources whose answers one of the arm's policies samples for the round: another policy gives other answers."""
OF_START, OF_END = ("reference", "train"), ("off_policy", "evaluate", "human_pairs")
"""Stages whose inputs hold the policy that begins the round, and the one that it trained."""
LOOK_S = 0.02
"""Between two looks at how far the others are."""


class Work(NamedTuple):
    """One arm at one seed."""

    seed: int
    arm: str


class Place(NamedTuple):
    """A stage of an arm: of round `number`, in the folder `inside` the round's ("." for its own)."""

    number: int
    inside: str
    stage: str


class ArmTurns:
    """A `store.Turns` over the arms of an experiment, in the order of `work`."""

    def __init__(self, store: RunStore, experiment: Experiment, work: Sequence[Work], stopping: Stopping) -> None:
        self._store = store
        self._keep = experiment.keep
        self._settings = {name: experiment.arm(name) for name in experiment.arms}
        self._work = list(work)
        self._stopping = stopping
        self._ended: set[Work] = set()
        self._digests: dict[tuple[Work, int], str] = {}

    def end(self, work: Work) -> None:
        """The arm is finished, or was stopped: nobody waits for it any more."""
        self._ended.add(work)

    def wait(self, folder: RoundFolder, stage: str) -> None:
        """See `store.Turns`. Raises `Stopped` when the threads are told to stop."""
        found = self._find(folder.path)
        if found is None:
            return
        mine, inside = found
        place = Place(folder.index, inside, stage)
        for other in self._work[: self._work.index(mine)]:
            while self._must_wait(mine, other, place):
                LEAVING.leave_if_told()
                self._stopping.pause(LOOK_S)

    def lasting(self, folder: Path, stage: str) -> bool:
        """See `store.Turns`: a policy that goes before its arm ends is there for no arm that comes after it."""
        found = self._find(folder)
        if found is None or stage not in OF_START:
            return True
        work, inside = found
        if inside != ".":  # a block's weights go once the next block is trained
            return False
        if self._keep == "all" or work in self._ended:
            return True
        # With keep: best the arm has ended: `_must_wait` sees to it.
        return stage == "train" and folder == self._folder(work, self._settings[work.arm].rounds).path

    def _find(self, path: Path) -> tuple[Work, str] | None:
        """Whose round folder `path` is, and where in it; None for what is no arm's at work."""
        parts = path.relative_to(self._store.root).parts
        if len(parts) < 4 or parts[0] != "arms":
            return None
        work = Work(int(parts[2].removeprefix("seed_")), parts[1])
        return (work, "/".join(parts[4:]) or ".") if work in self._work else None

    def _folder(self, work: Work, index: int) -> RoundFolder:
        return self._store.round(work.arm, work.seed, index)

    def _must_wait(self, mine: Work, other: Work, place: Place) -> bool:
        if other in self._ended:
            return False
        if place.stage in OF_START and self._keep == "best" and self._same_stage(mine, other, place):
            return True  # which of its policies stay is known at its end
        return any(not self._past(other, one) for one in self._shared(mine, other, place))

    def _past(self, work: Work, place: Place) -> bool:
        """Whether `work` has done what `place` names, or closed its round without it."""
        if place.number > self._settings[work.arm].rounds:
            return True
        folder = self._folder(work, place.number)
        return folder.closed or (folder.path / place.inside / "stages" / f"{place.stage}.json").exists()

    def _shared(self, mine: Work, other: Work, place: Place) -> Iterator[Place]:
        """The stages of `other` whose work, or what they leave in the cache of log-probs, `place` of `mine` may use."""
        if self._same_stage(mine, other, place):
            yield place
        if place.stage == "train":
            yield from (Place(index, ".", "train") for index in self._same_reference(mine, other, place.number))

    def _same_stage(self, mine: Work, other: Work, place: Place) -> bool:
        """Whether `other` may do the same work at `place`."""
        if place.stage in OF_START:
            return mine.seed == other.seed and self._same_policy(mine, other, max(0, place.number - 1))
        if place.stage in OF_END:
            seedless = place.stage == "human_pairs"
            return (seedless or mine.seed == other.seed) and self._same_policy(mine, other, place.number)
        return self._same_answers(mine, other, place.number)

    def _same_answers(self, mine: Work, other: Work, index: int) -> bool:
        """Whether round `index` of both may have the same answers. Given ones may be the same whatever the policies."""
        own, others = self._settings[mine.arm], self._settings[other.arm]
        sampled = [source_kind(one.source) in SAMPLING for one in (own, others)]
        if any(sampled) and mine.seed != other.seed:
            return False
        if not all(sampled):
            return True
        after = source_index(own, index)
        return after == source_index(others, index) and self._same_policy(mine, other, after)

    def _same_reference(self, mine: Work, other: Work, index: int) -> list[int]:
        """The rounds of `other` that may compute log-probs that round `index` of `mine` would find in the cache: of the
        same reference, of answers that others gave. Those that a policy samples are its own, with what it samples."""
        own, others = self._settings[mine.arm], self._settings[other.arm]
        after = reference_index(own, index)
        if after is None or any(source_kind(one.source) in SAMPLING for one in (own, others)):
            return []
        if not self._same_policy(mine, other, after):
            return []
        return [one for one in range(1, others.rounds + 1) if reference_index(others, one) == after]

    def _same_policy(self, mine: Work, other: Work, after: int) -> bool:
        """Whether the policies after round `after` may be of the same weights: not, once those of a round are not."""
        if after == 0:
            return True
        if mine.seed != other.seed:
            return False
        for index in range(after, 0, -1):
            one, two = self._digest(mine, index), self._digest(other, index)
            if one is not None and two is not None:
                return one == two
        return True

    def _digest(self, work: Work, index: int) -> str | None:
        """The digest of the policy after round `index`; None while it is not there."""
        key = (work, index)
        if key not in self._digests:
            folder = self._folder(work, index)
            try:
                if not folder.closed and folder.done("train") is not None:
                    self._digests[key] = read_policy(folder.path / "policy", verify=False).digest
            except RunFolderError:  # closed and given up since
                if not folder.closed:
                    raise
            if folder.closed:
                self._digests[key] = folder.metrics["policy"]["digest"]
        return self._digests.get(key)
