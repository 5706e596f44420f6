"""The run folder: what a person can read, and what a resumed run trusts.

::

    RUN/experiment.yaml                     the resolved experiment
    RUN/manifest.json                       model, prompts and software, by digest; the initial policy's probe
    RUN/prompts.parquet                     all prompts, tokenised, with their split
    RUN/human_pairs.parquet                 pairs by people, tokenised (evaluation.pairs)
    RUN/verdicts.sqlite, logps.sqlite       what judges said; references' log-probs that no engine stored
    RUN/sft/policy/, sft/stages/            the initial policy where the experiment fine-tunes it first
    RUN/progress.json                       while a process works on the run: how far its stage is
    RUN/tracked.json, tensorboard/          rounds that trackers have; TensorBoard's event files
    RUN/arms/ARM/seed_S/round_RR/           round_00 measures the initial policy
        round.json                          source, reference and prompts: pinned before anything is sampled (with
                                            source: lag, once the round before it is trained)
        prompts.parquet                     a dataset's own prompts, where the round has such
        candidates|verdicts|pairs|held_out.parquet, audit.json, audit.png, audit.svg, policy/
        off_policy|human_pairs.parquet      log-probs of the round's pairs, and of held-out human ones, by policy
        reference/                          the round's reference where it is an average of policies
        stages/STAGE.json                   written last: a stage is done when its record is there
        metrics.json                        written when the round is closed
        fresh/, part_N/                     what the round's own files were put together from (source: history, mixture)
        block_NNN/                          the same, of a round whose source is refreshed within it (every_steps)
    RUN/forked_from/…/round_RR/             of a fork: the stages of the round it was forked at, to be taken over

A stage writes into a folder aside; its files are synced, renamed into place, and then its record is written with
the digests of what it read and what it wrote. A kill at any moment leaves a stage whole or to be done again.
Two arms whose stages have the same inputs do the work once: the second takes the first one's files.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

from online_dpo.config import Experiment, flatten, validate_experiment
from online_dpo.disk_full import told_when_full
from online_dpo.errors import ConfigError, RunFolderError
from online_dpo.experiment_seal import sealed
from online_dpo.files import (
    digest,
    digest_json,
    link_tree,
    read_json,
    remove,
    sync_folder,
    sync_tree,
    write_json,
    write_text,
)
from online_dpo.leaving import LEAVING
from online_dpo.links import refuse_links, refuse_links_at
from online_dpo.manifest_check import check_initial
from online_dpo.metrics_check import checked_metrics
from online_dpo.run_hint import no_run
from online_dpo.run_lock import hold
from online_dpo.yaml_file import read_yaml

FORMAT = 4
MAY_CHANGE = frozenset(
    {
        "output",
        "contrasts",
        "judge_cache",
        "judge_timeout",
        "judge_budget.cost",
        "judge_budget.tokens",
        "judge_budget.calls",
        "learner.save_every",
        "cluster.address",
        "cluster.engines",
        "cluster.strategy",
        "cluster.wait_s",
        "cluster.copy_weights",
        "cluster.judge_while_sampling",
        "cluster.sample_while_evaluating",
        "cluster.lanes",
        "engine.threads",
        "engine.gpus",
        "engine.tensor_parallel_size",
        "engine.gpu_memory_utilization",
        "engine.kv_cache_gb",
        "engine.share_gpu",
        "learner.workers",
        "learner.threads",
        "learner.gpus_per_worker",
        "tracking.tensorboard",
        "tracking.wandb",
        "tracking.mlflow",
    }
)
"""Keys that a resumed experiment may change: they decide nothing about the results. Those of engine and learner say
what a machine has: a run goes on where that is another one, and sums are rounded in another order there."""


class Turns(Protocol):
    """Where several arms are at work in one process: in which order, so that the order is none of their results."""

    def wait(self, folder: RoundFolder, stage: str) -> None:
        """Until no other arm is to do the same work first."""

    def lasting(self, folder: Path, stage: str) -> bool:
        """Whether another arm may count on a stage's files: they will not be given up while it is at work."""


@dataclass(frozen=True, slots=True)
class StageRecord:
    """A finished stage. `info` holds its own figures; `reused_from` the round (in this run) whose files it shares."""

    stage: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    info: dict[str, Any]
    seconds: float
    reused_from: str | None = None


class RunStore:
    """One run folder."""

    def __init__(self, root: Path) -> None:
        """Raises `RunFolderError` where a link lies in the folder, or a stage's record is none."""
        refuse_links(root)
        self.root = root
        self.trusted: set[tuple[Path, str]] = set()
        """Stages (round folder, name) that this process did itself or held against their records."""
        self.turns: Turns | None = None
        """Set where several arms are at work."""
        self._asking = threading.Lock()
        self._making: defaultdict[str, threading.RLock] = defaultdict(threading.RLock)
        self._index: dict[str, Path] = {}
        for record in sorted(root.glob("arms/**/stages/*.json")) + sorted(root.glob("forked_from/**/stages/*.json")):
            found = _read_record(record)
            self._index.setdefault(_key(found.stage, found.inputs), record.parent.parent)

    @staticmethod
    def exists(root: Path) -> bool:
        """Whether `root` holds a run that got as far as its manifest."""
        return (root / "manifest.json").exists()

    @classmethod
    def create(cls, root: Path, experiment: Experiment, manifest: Mapping[str, Any]) -> RunStore:
        """Write `experiment.yaml` and, last, `manifest.json`; files of the caller's are there already."""
        (root / "arms").mkdir(parents=True, exist_ok=True)
        write_text(root / "experiment.yaml", dump_experiment(experiment))
        write_json(root / "manifest.json", {"format": FORMAT, **manifest})
        return cls(root)

    @classmethod
    def open(cls, root: Path) -> RunStore:
        """The run in folder `root`; `RunFolderError` when there is none or another version wrote it."""
        if not cls.exists(root):
            raise no_run(root)
        store = cls(root)
        if store.manifest.get("format") != FORMAT:
            raise RunFolderError(
                f"{root} has run format {store.manifest.get('format')}, this version reads format {FORMAT}"
            )
        return store

    @property
    def manifest(self) -> dict[str, Any]:
        """What the run began with."""
        return _read_json(self.root / "manifest.json")

    @property
    def initial(self) -> dict[str, Any] | None:
        """The digest of the policy that the run began with, and its probe; None before it was measured."""
        file = self.root / "initial.json"
        if not file.exists():
            return None
        record = _read_json(file)
        check_initial(record, file)
        return record

    @property
    def folder(self) -> Path:
        """The folder of the experiment's YAML: where it was, or, where the two were moved together, as the run folder
        sees it."""
        manifest = self.manifest
        there = Path(manifest["folder"])
        moved = self.root / manifest.get("folder_from_run", ".")
        return there if there.is_dir() or not moved.is_dir() else moved.resolve()

    @property
    def experiment(self) -> Experiment:
        """The resolved experiment."""
        file = self.root / "experiment.yaml"
        try:
            data = read_yaml(file)
        except ConfigError as error:
            raise RunFolderError(f"{file} is missing or damaged: {error}") from error
        return validate_experiment(data, str(file))

    def take_experiment(self, experiment: Experiment) -> None:
        """Write `experiment` in the place of the run's own; the two may differ in keys of `MAY_CHANGE` alone."""
        if experiment != self.experiment:
            write_text(self.root / "experiment.yaml", dump_experiment(experiment))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run folder; `RunFolderError` when another process does. A killed process holds nothing."""
        with hold(self.root):
            yield

    def round(self, arm: str, seed: int, index: int) -> RoundFolder:
        """The folder of round `index` (0: the initial policy)."""
        return RoundFolder(self, self.root / "arms" / arm / f"seed_{seed}" / f"round_{index:02d}", index)

    def find(self, stage: str, inputs: Mapping[str, str]) -> Path | None:
        """A round folder of this run in which `stage` was done from the same inputs."""
        return self._index.get(_key(stage, inputs))

    def remember(self, record: StageRecord, folder: Path) -> None:
        """Let other arms find this stage."""
        self._index.setdefault(_key(record.stage, record.inputs), folder)

    @contextmanager
    def alone(self, stage: str, inputs: Mapping[str, str]) -> Iterator[None]:
        """Inside, no other thread does this stage: it waits, and takes over what was made."""
        with self._asking:
            making = self._making[_key(stage, inputs)]
        with making:
            yield

    def relative(self, path: Path) -> str:
        """`path` as written into the run's files: relative to the run, so that the folder can be moved."""
        return path.relative_to(self.root).as_posix()


class RoundFolder:
    """One round of one arm and seed."""

    def __init__(self, run: RunStore, path: Path, index: int, title: str = "") -> None:
        self.run = run
        self.path = path
        self.index = index
        self.title = title or f"round {index}"
        """How it is called on the screen."""

    def inside(self, name: str, title: str = "") -> RoundFolder:
        """Folder `name` of this round, for stages of a part of its pairs, called `title` behind the round's own."""
        return RoundFolder(self.run, self.path / name, self.index, f"{self.title} {title}".rstrip())

    @property
    def closed(self) -> bool:
        """Whether the round has been measured and closed."""
        return (self.path / "metrics.json").exists()

    @property
    def metrics(self) -> dict[str, Any]:
        """The closed round's figures."""
        file = self.path / "metrics.json"
        return checked_metrics(_read_json(file), file)

    def close(self, metrics: Mapping[str, Any]) -> None:
        """Write the round's figures: the round is done."""
        write_json(self.path / "metrics.json", metrics)

    def pin(self, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What the round works with, as first decided: written once, read ever after."""
        file = self.path / "round.json"
        refuse_links_at(self.run.root, file)
        if not file.exists():
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(file, make())
        return _read_json(file)

    @property
    def pinned(self) -> dict[str, Any]:
        """What the round was pinned to."""
        return _read_json(self.path / "round.json")

    def done(self, stage: str) -> StageRecord | None:
        """The record of `stage`, if it is done."""
        file = self.path / "stages" / f"{stage}.json"
        return _read_record(file) if file.exists() else None

    def stage(
        self,
        name: str,
        inputs: Mapping[str, str],
        outputs: Sequence[str],
        produce: Callable[[Path], Mapping[str, Any]],
    ) -> StageRecord:
        """Do stage `name` once. `inputs` are digests by name; `produce(folder)` writes `outputs` into `folder`
        and returns the stage's own figures.

        Raises `RunFolderError` when the stage was done from other inputs, or its files were changed since.
        """
        refuse_links_at(self.run.root, self.path)
        record = self.done(name)
        if record is None:
            if self.run.turns is not None:
                self.run.turns.wait(self, name)
            with self.run.alone(name, inputs):
                record = self._reuse(name, inputs, outputs) or self._produce(name, inputs, outputs, produce)
                self.run.remember(record, self.path)
                self.run.trusted.add((self.path, name))
            return record
        if record.inputs != dict(inputs):
            changed = [k for k in inputs if record.inputs.get(k) != inputs[k]] or sorted(record.inputs)
            raise RunFolderError(f"{self.path}: stage '{name}' was done from another {', '.join(changed)}")
        self.verify(record)
        return record

    def verify(self, record: StageRecord) -> None:
        """Hold the stage's files against the digests in its record."""
        for output, expected in record.outputs.items():
            path = self.path / output
            if self.pruned(output):
                continue
            refuse_links_at(self.run.root, path)
            if not path.exists() or digest(path) != expected:
                state = "was changed" if path.exists() else "is missing"
                files = [f"stages/{record.stage}.json", *(["metrics.json"] if self.closed else [])]
                raise RunFolderError(
                    f"{path} {state} after stage '{record.stage}' wrote it (digest differs); restore it, or delete "
                    f"{' and '.join(files)} in {self.path} to do the stage again"
                )
        self.run.trusted.add((self.path, record.stage))

    def trust(self, stage: str) -> None:
        """Verify a finished stage of a closed round before its files are used again, once in a process."""
        if (self.path, stage) not in self.run.trusted:
            record = self.done(stage)
            if record is None:
                raise RunFolderError(f"{self.path}: stage '{stage}' has no record in stages/{stage}.json")
            self.verify(record)

    def prune(self, output: str) -> None:
        """Give up a stage's output for good (a policy that the experiment does not keep)."""
        refuse_links_at(self.run.root, self.path / output)
        write_text(self.path / f".{output}.pruned", "")
        remove(self.path / output)

    def pruned(self, output: str) -> bool:
        """Whether `output` was given up."""
        return (self.path / f".{output}.pruned").exists()

    def _produce(
        self,
        name: str,
        inputs: Mapping[str, str],
        outputs: Sequence[str],
        produce: Callable[[Path], Mapping[str, Any]],
    ) -> StageRecord:
        LEAVING.leave_if_told()
        began = time.perf_counter()
        aside = self.path / f".{name}.tmp"
        with told_when_full(aside):
            remove(aside)
            aside.mkdir(parents=True)
            info = dict(produce(aside))
            sync_tree(aside)
            digests = {output: digest(aside / output) for output in outputs}
            self._place(aside, outputs)
            record = StageRecord(name, dict(inputs), digests, info, round(time.perf_counter() - began, 3))
            self._commit(record)
        return record

    def _reuse(self, name: str, inputs: Mapping[str, str], outputs: Sequence[str]) -> StageRecord | None:
        """The same stage of another arm, its files linked here; None when there is none (any more)."""
        folder = self.run.find(name, inputs)
        if folder is None or folder == self.path:
            return None
        if self.run.turns is not None and not self.run.turns.lasting(folder, name):
            return None
        other = RoundFolder(self.run, folder, -1)
        record = other.done(name)
        if record is None or any(other.pruned(output) for output in outputs):
            return None
        began = time.perf_counter()
        other.verify(record)
        aside = self.path / f".{name}.tmp"
        remove(aside)
        aside.mkdir(parents=True)
        for output in outputs:
            link_tree(folder / output, aside / output)
        sync_tree(aside)
        self._place(aside, outputs)
        seconds = round(time.perf_counter() - began, 3)
        mine = StageRecord(name, record.inputs, record.outputs, record.info, seconds, self.run.relative(folder))
        self._commit(mine)
        return mine

    def _place(self, aside: Path, outputs: Sequence[str]) -> None:
        for output in outputs:
            remove(self.path / output)
            (aside / output).rename(self.path / output)
        shutil.rmtree(aside)
        sync_folder(self.path)

    def _commit(self, record: StageRecord) -> None:
        (self.path / "stages").mkdir(exist_ok=True)
        sync_folder(self.path)
        write_json(self.path / "stages" / f"{record.stage}.json", asdict(record))


def dump_experiment(experiment: Experiment) -> str:
    """The resolved experiment as YAML, with its digest below."""
    return sealed(yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def changed_keys(old: Experiment, new: Experiment) -> list[str]:
    """Dotted keys in which two experiments differ, but for those that may change."""
    before, after = flatten(old.model_dump(mode="json")), flatten(new.model_dump(mode="json"))
    keys = [*before, *(key for key in after if key not in before)]
    # An absent key is no null: an arm may be added with no settings of its own.
    absent = object()
    return [k for k in keys if before.get(k, absent) != after.get(k, absent) and k not in MAY_CHANGE]


def _key(stage: str, inputs: Mapping[str, str]) -> str:
    return digest_json([stage, dict(inputs)])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = read_json(path)
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path} is missing or damaged: {error}") from error
    if not isinstance(data, dict):
        raise RunFolderError(f"{path} is damaged: expected a mapping")
    return data


def _read_record(path: Path) -> StageRecord:
    try:
        record = StageRecord(**_read_json(path))
        whole = all(isinstance(part, dict) for part in (record.inputs, record.outputs, record.info))
        # A name that leads elsewhere would be read, linked or removed there.
        if record.stage != path.stem or not whole or not all(map(_is_name, record.outputs)):
            raise TypeError("it is no record of this stage")
    except TypeError as error:
        raise RunFolderError(f"{path} is damaged: {error}") from error
    return record


def _is_name(output: str) -> bool:
    return output not in ("", ".", "..") and not set(output) & {"/", "\\", "\0"}
