"""Judges in Ray actors of their own: a reward model beside the policy, on its own GPU or share of one."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError

from online_dpo.backends.ray_cluster import cores, wait
from online_dpo.backends.ray_session import RaySession
from online_dpo.config import JudgeSpec
from online_dpo.errors import ConfigError, JudgeError, one_line
from online_dpo.files import digest_json
from online_dpo.judging import Comparison, Item, Judge, PairwiseJudge, PointwiseJudge, Score, load_judge
from online_dpo.judging.loading import judge_class


class JudgeActor:
    """Holds one judge. Built by `build`, so that a failure keeps its own error."""

    def build(self, spec: JudgeSpec, folders: Sequence[Path]) -> dict[str, Any]:
        """Construct the judge; returns what the driver must know of it."""
        import torch

        if not torch.cuda.is_available():
            torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        self.judge: Any = load_judge(spec, folders)
        judge = self.judge
        told = {"concurrent": judge.concurrent}
        if isinstance(judge, PairwiseJudge):
            return {**told, "batch_comparisons": judge.batch_comparisons, "disagreement": judge.disagreement}
        return {**told, "batch_prompts": judge.batch_prompts}

    def score_batch(self, items: Sequence[Item]) -> tuple[list[list[Score]], dict[str, float]]:
        """The judge's scores, and what they cost."""
        return [list(row) for row in self.judge.score_batch(items)], self.judge.ledger()

    def prefer_batch(self, comparisons: Sequence[Comparison]) -> tuple[list[Score], dict[str, float]]:
        """The judge's preferences, and what they cost."""
        return list(self.judge.prefer_batch(comparisons)), self.judge.ledger()


class _Remote:
    """What stands in the driver for the judge in `actor`."""

    def __init__(self, actor: ActorHandle, told: dict[str, Any], use: str) -> None:
        self.actor = actor
        self.told = told
        self.use = use
        self.amounts: dict[str, float] = {}
        self.lock = threading.Lock()
        for key, value in told.items():
            setattr(self, key, value)

    def ledger(self) -> dict[str, float]:
        """See `judging.BaseJudge`."""
        with self.lock:
            amounts, self.amounts = self.amounts, {}
        return amounts

    def _ask(self, reference: Any) -> Any:
        try:
            answer, spent = ray.get(reference)
        except RayTaskError as error:
            # The judge raised: what was asked abstains, as it does for a judge in this process.
            raise error.cause if isinstance(error.cause, Exception) else error from None
        except RayError as error:
            lost = JudgeError(f"judge '{self.use}': its process ended: {one_line(error)}")
            lost.process_ended = True
            raise lost from error
        with self.lock:
            for item, amount in spent.items():
                self.amounts[item] = self.amounts.get(item, 0.0) + amount
        return answer


class RemotePointwiseJudge(_Remote, PointwiseJudge):
    """A `PointwiseJudge` in another process."""

    def score_batch(self, items: Sequence[Item]) -> Sequence[Sequence[Score]]:
        """See `judging.PointwiseJudge`."""
        rows: Sequence[Sequence[Score]] = self._ask(self.actor.score_batch.remote(list(items)))
        return rows


class RemotePairwiseJudge(_Remote, PairwiseJudge):
    """A `PairwiseJudge` in another process."""

    def prefer_batch(self, comparisons: Sequence[Comparison]) -> Sequence[Score]:
        """See `judging.PairwiseJudge`."""
        row: Sequence[Score] = self._ask(self.actor.prefer_batch.remote(list(comparisons)))
        return row


def place_judge(spec: JudgeSpec, folders: Sequence[Path]) -> Judge:
    """Start the judge of `spec` in an actor of its own on this machine: a `judging.Place`.

    Raises `ConfigError` when it asks for GPUs that are not there, and the judge's own errors.
    """
    gpus, threads = _asked(spec)
    return _start(spec, folders, gpus, threads or cores(), {"num_cpus": 0, "num_gpus": gpus})


@dataclass(frozen=True)
class JudgePlacer:
    """`place_judge` in a session: judges live until it ends. On a cluster each has a placement group of its own.

    One process a judge, whoever asks for it: each gets something to ask it by, with a ledger of its own.
    """

    session: RaySession
    started: dict[str, Any] = field(default_factory=dict)
    starting: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, spec: JudgeSpec, folders: Sequence[Path]) -> Judge:
        """Start the judge of `spec`: a `judging.Place`. Raises what `place_judge` does, and `ConfigError` where there
        is no room."""
        key = digest_json([spec.model_dump(mode="json"), [str(folder) for folder in folders]])
        with self.starting:
            if key not in self.started:
                self.started[key] = self._start(spec, folders)
        one = self.started[key]
        judge: Judge = type(one)(one.actor, one.told, one.use)
        return judge

    def _start(self, spec: JudgeSpec, folders: Sequence[Path]) -> Judge:
        if not self.session.joined:
            return place_judge(spec, folders)
        gpus, threads = _asked(spec)
        placed = self.session.place([self.session.bundle(f"judge '{spec.use}'", threads, gpus)])
        return _start(spec, [folder.absolute() for folder in folders], gpus, threads or 1, placed.options(0))


def _asked(spec: JudgeSpec) -> tuple[float, int | None]:
    """The GPUs and the CPU threads that a judge asks for. Raises `ConfigError` for GPUs that are not there."""
    gpus = spec.actor.gpus if spec.actor is not None else 0.0
    there = float(ray.cluster_resources().get("GPU", 0))
    if gpus > there:
        raise ConfigError(f"judge '{spec.use}': actor.gpus asks for {gpus:g} GPUs, there are {there:g}")
    return gpus, spec.actor.threads if spec.actor is not None else None


def _start(spec: JudgeSpec, folders: Sequence[Path], gpus: float, threads: int, options: dict[str, Any]) -> Judge:
    environment = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    if not gpus:
        # Ray would leave all GPUs in sight, and "device: auto" would take the memory that the engine counts on.
        environment["CUDA_VISIBLE_DEVICES"] = ""
    actor = ray.remote(JudgeActor).options(**options, runtime_env={"env_vars": environment}).remote()
    told = wait(actor.build.remote(spec, list(folders)), JudgeError, f"judge '{spec.use}'")
    remote_kind = RemotePairwiseJudge if "batch_comparisons" in told else RemotePointwiseJudge
    judge: Judge = _with_flags_of(judge_class(spec, folders), remote_kind)(actor, told, spec.use)
    return judge


def _with_flags_of(kind: type, remote: type[Any]) -> type[Any]:
    """`remote` with the class attributes by which `kind` tells how it is to be asked."""
    flags = {
        key: getattr(kind, key) for key in ("cached", "each_alone", "both_orders", "relative") if hasattr(kind, key)
    }
    return type(remote.__name__, (remote,), flags)
