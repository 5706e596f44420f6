"""The arm whose saved rounds another arm trains on: found, and held against what this run needs of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from online_dpo.arms import Arm
from online_dpo.config import Experiment
from online_dpo.errors import ConfigError, OnlineDPOError, RunFolderError, TrainingError, nearest
from online_dpo.files import digest_json
from online_dpo.records import read_prompts
from online_dpo.rounds import ArmPolicies
from online_dpo.source_spec import SourceSpec, parts_of
from online_dpo.store import RoundFolder, RunStore
from online_dpo.types import Policy, Prompt


@dataclass(frozen=True, slots=True)
class StreamedArm:
    """One arm at one seed, of this run or of another (`elsewhere`). `rounds`: how many it has."""

    store: RunStore
    name: str
    seed: int
    rounds: int
    elsewhere: bool

    @property
    def label(self) -> str:
        """How it is called in messages and figures."""
        place = f"{self.store.root}:" if self.elsewhere else ""
        return f"{place}{self.name} · seed {self.seed}"

    def folder(self, index: int) -> RoundFolder:
        """Its round `index`, which is finished: `TrainingError` where an arm of this run stopped before it."""
        folder = self.store.round(self.name, self.seed, index)
        if not folder.closed:
            fault = f"its source, {self.label}, stopped before it had finished round {index}"
            raise RunFolderError(f"{fault}: resume that run first") if self.elsewhere else TrainingError(fault)
        return folder

    def place(self, index: int) -> str:
        """Where round `index` lies, for the figures: without a path of this machine, which may change."""
        place = f"{self.store.experiment.name}:" if self.elsewhere else ""
        return f"{place}{self.name}/seed_{self.seed}/round_{index:02d}"

    def sampler(self, index: int) -> dict[str, Any] | None:
        """Id and digest of the one policy that sampled round `index`, and `after_round` where its folder may be."""
        folder = self.folder(index)
        source = folder.metrics.get("source")
        if source is None:
            return None
        pinned = folder.pinned.get("source", {})
        return {
            **source,
            "after_round": pinned.get("after_round") if pinned.get("digest") == source["digest"] else None,
        }

    def policy(self, after_round: int, initial: Policy) -> Policy | None:
        """Its policy after round `after_round`; None where it was not kept, or is an adapter of other weights than
        `initial`, this run's."""
        if after_round and self.folder(after_round).pruned("policy"):
            return None
        policy = ArmPolicies(self.store, self.name, self.seed, initial).at(after_round)
        return None if policy.adapter and self.initial_digest() not in (None, initial.digest) else policy

    def initial_digest(self) -> str | None:
        """The digest of the policy that another run began with; None for this run, which has one alone."""
        record = self.store.initial if self.elsewhere else None
        return None if record is None else str(record["digest"])


def streamed_arm(arm: Arm) -> StreamedArm:
    """The arm that the source of `arm`, a stream, names."""
    stream = stream_of(arm).stream or ""
    if ":" not in stream:
        settings = arm.run.experiment.arm(stream)
        return StreamedArm(arm.run.store, stream, arm.seed, settings.rounds, elsewhere=False)
    return find_streamed(stream, arm.seed, arm.run.judge_folders, _model(arm.run.store))


def stream_of(arm: Arm) -> SourceSpec:
    """The arm's source, where it is a stream."""
    if not isinstance(arm.settings.source, SourceSpec) or arm.settings.source.stream is None:
        raise ValueError(f"{arm.label}: source {arm.settings.source} is no stream")
    return arm.settings.source


def find_streamed(stream: str, seed: int, folders: Sequence[Path], model: str | None) -> StreamedArm:
    """The arm that `stream`, "RUN:ARM", names. A relative RUN is searched in `folders`, then in the current folder.

    `model`: digest of this run's model; None: unknown. Raises `ConfigError`: no such arm or seed, another model;
    `RunFolderError`: no such run.
    """
    path, _, name = stream.rpartition(":")
    tried = [base / Path(path).expanduser() for base in [*folders, Path.cwd()]]
    store = RunStore.open(next((root for root in tried if RunStore.exists(root)), tried[-1]))
    other = store.experiment
    if name not in other.arms:
        raise ConfigError(f"no arm '{name}' in {store.root}{nearest(name, other.arms)}; arms: {', '.join(other.arms)}")
    if seed not in other.seeds:
        raise ConfigError(f"{store.root} was not run with seed {seed} but {', '.join(map(str, other.seeds))}")
    if None not in (model, _model(store)) and model != _model(store):
        raise ConfigError(f"{store.root} is a run of another model: its tokens are not this model's")
    return StreamedArm(store, name, seed, other.arm(name).rounds, elsewhere=True)


def check_streams(experiment: Experiment, folders: Sequence[Path], model: str) -> None:
    """Find what every arm streams from other runs; the error names the arm of what is not there or not finished."""
    for name in experiment.arms:
        settings = experiment.arm(name)
        parts = [part for part in parts_of(settings.source) if isinstance(part, SourceSpec)]
        for stream in [part.stream for part in parts if part.stream is not None and ":" in part.stream]:
            for seed in experiment.seeds:
                try:
                    _check_rounds(find_streamed(stream, seed, folders, model), settings.rounds)
                except OnlineDPOError as error:
                    raise type(error)(f"arms.{name}.source.stream: {error}") from error


def _check_rounds(streamed: StreamedArm, wanted: int) -> None:
    if streamed.rounds < wanted:
        raise ConfigError(f"{streamed.label} has {streamed.rounds} rounds, this arm {wanted}")
    for index in range(1, streamed.rounds + 1):
        streamed.folder(index)


def stored_prompts(streamed: StreamedArm) -> dict[str, Prompt]:
    """The prompts of another run by id, held against its manifest."""
    file = streamed.store.root / "prompts.parquet"
    prompts = read_prompts(file)
    if all_prompts_digest(prompts["train"], prompts["held_out"]) != streamed.store.manifest["prompts"]["digest"]:
        raise RunFolderError(f"{file} was changed after the run began")
    return {prompt.id: prompt for prompt in prompts["train"]}


def all_prompts_digest(train: Sequence[Prompt], held_out: Sequence[Prompt]) -> str:
    """What tells the prompts of a run from another's."""
    return digest_json([[[p.id, list(p.token_ids)] for p in group] for group in (train, held_out)])


def _model(store: RunStore) -> str | None:
    found: str | None = store.manifest.get("model", {}).get("digest")
    return found
