"""What a running experiment is made of: its live parts, and one arm at one seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

from online_dpo.config import ArmSettings, ComparingSpec, Experiment, JudgeSpec
from online_dpo.dataset_rows import DatasetRows
from online_dpo.errors import JudgeError
from online_dpo.files import digest_json
from online_dpo.judging import (
    AskedJudge,
    Asking,
    Judge,
    JudgeAhead,
    LiveModel,
    Place,
    VerdictCache,
    judge_digest,
    open_judge,
)
from online_dpo.protocols import Engine, Learner, Progress
from online_dpo.rounds import ArmPolicies
from online_dpo.store import RoundFolder, RunStore
from online_dpo.tracking import Tracking
from online_dpo.types import Pair, Policy, Prompt


@dataclass
class Run:
    """One run's live parts: what every arm shares."""

    store: RunStore
    experiment: Experiment
    initial: Policy
    train_prompts: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]
    engine: Engine
    learner: Learner
    progress: Progress
    judge_folders: tuple[Path, ...] = ()
    human_pairs: tuple[Pair, ...] = ()
    """Preference pairs by people that policies are held against; training never sees them."""
    datasets: dict[str, DatasetRows] = field(default_factory=dict)
    """The datasets that arms take pairs or answers from, by `sources.datasets.dataset_key`."""
    cache: VerdictCache | None = None
    place_judge: Place | None = None
    live_model: Callable[[], LiveModel] | None = None
    """The engine as something to talk to, for judges that ask the policy."""
    tracking: Tracking | None = None
    apart: bool = False
    """Engine and learner have a GPU each: neither takes anything from the other."""
    open_lane: Callable[[], AbstractContextManager[Run]] | None = None
    """Starts another engine and learner, of the same kind, for arms that are at work side by side (`lane`)."""
    end_lanes: Callable[[], None] | None = None
    """Ends what the open lanes wait for: their processes."""
    judging_ahead: dict[Path, JudgeAhead] = field(default_factory=dict)
    """By round folder: answers that are judged while others are sampled."""
    _judges: dict[str, AskedJudge] = field(default_factory=dict)
    _digests: dict[str, str] = field(default_factory=dict)
    _processes: dict[str, Judge] = field(default_factory=dict)

    def lane(
        self,
        engine: Engine,
        learner: Learner,
        cache: VerdictCache | None = None,
        live_model: Callable[[], LiveModel] | None = None,
    ) -> Run:
        """This run with another engine and learner, and judges and a place on the screen of its own."""
        return replace(
            self,
            engine=engine,
            learner=learner,
            cache=cache,
            live_model=live_model,
            progress=self.progress.beside(),
            judging_ahead={},
            _judges={},
            _processes={},
        )

    def rest_engine(self) -> None:
        """The engine leaves the GPU to the learner, where they share one; else either may be at work at any time."""
        if self.experiment.engine.share_gpu:
            self.engine.rest()

    def rest_learner(self) -> None:
        """As `rest_engine`, the other way round."""
        if self.experiment.engine.share_gpu:
            self.learner.rest()

    def judge(self, spec: JudgeSpec, comparing: ComparingSpec) -> AskedJudge:
        """The judge of `spec`, opened once a run."""
        key = digest_json([spec.model_dump(mode="json"), comparing.model_dump()])
        if key not in self._judges:
            self._judges[key] = self.open_judge(spec, comparing, self.cache)
        return self._judges[key]

    def open_judge(self, spec: JudgeSpec, comparing: ComparingSpec, cache: VerdictCache | None) -> AskedJudge:
        """The judge of `spec` with a cache of the caller's; one of its own, but for what is in a process of its own."""
        asking = Asking(
            cache=cache,
            comparing=comparing,
            limit_s=self.experiment.judge_timeout,
            budget=self.experiment.judge_budget.model_dump(exclude_none=True),
        )
        place = None if self.place_judge is None else self._placed
        return open_judge(spec, self.judge_folders, asking, place, self.judge_digest(spec))

    def _placed(self, spec: JudgeSpec, folders: Sequence[Path]) -> Judge:
        """One process for each judge that wants its own, however many arms, panels and schedules ask it."""
        key = digest_json(spec.model_dump(mode="json"))
        if key not in self._processes:
            if self.place_judge is None:
                raise JudgeError(f"judge '{spec.use}' wants a process of its own, and there is nothing to start one")
            self._processes[key] = self.place_judge(spec, folders)
        return self._processes[key]

    def judge_digest(self, spec: JudgeSpec) -> str:
        """`judging.judge_digest`, computed once a run: a reward model's weights are part of it."""
        key = digest_json(spec.model_dump(mode="json"))
        if key not in self._digests:
            self._digests[key] = judge_digest(spec, self.judge_folders)
        return self._digests[key]


@dataclass(frozen=True)
class Arm:
    """One arm at one seed."""

    run: Run
    name: str
    seed: int
    settings: ArmSettings

    @property
    def label(self) -> str:
        """How the arm is called on the screen."""
        return f"{self.name} · seed {self.seed}"

    @property
    def policies(self) -> ArmPolicies:
        """The arm's policies by round."""
        return ArmPolicies(self.run.store, self.name, self.seed, self.run.initial)

    def folder(self, index: int) -> RoundFolder:
        """The folder of round `index`."""
        return self.run.store.round(self.name, self.seed, index)
