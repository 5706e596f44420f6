"""One set of actors: the engines and the learner's workers that rounds are made with, in one placement group."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle

from online_dpo.backends import ray_cluster as cluster
from online_dpo.backends.node_files import NodeFiles
from online_dpo.backends.placement import Placed
from online_dpo.backends.ray_engines import RayEngines, Replica
from online_dpo.backends.ray_session import RaySession
from online_dpo.backends.spread_learner import SpreadLearner
from online_dpo.backends.vllm_engine import vllm_environment
from online_dpo.config import Experiment
from online_dpo.errors import EngineError
from online_dpo.gpus import gpu_shares
from online_dpo.protocols import Engine, Learner
from online_dpo.types import Policy

ENGINE = "engine"
WORKER = "learner worker"


@dataclass(frozen=True)
class Actors:
    """A set's actors, not built yet, with the node of each; and the initial policy as each node can read it.

    `files` brings policies to nodes; None on this machine alone, where all read the run folder. `apart`: engines and
    workers have whole GPUs of their own.
    """

    engines: tuple[ActorHandle, ...]
    engine_nodes: tuple[str, ...]
    workers: tuple[ActorHandle, ...]
    worker_nodes: tuple[str, ...]
    initial: dict[str, Policy]
    files: NodeFiles | None
    apart: bool


@contextmanager
def start(
    session: RaySession, experiment: Experiment, initial: Policy, *, engines: bool, say: Callable[[str], None]
) -> Iterator[Actors]:
    """Start the actors of a set (with `engines`, or the learner's workers alone); they and their room go on leaving.

    Raises `ConfigError` where there is no room for all of them.
    """
    replicas = experiment.cluster.engines if engines else 0
    engine_gpus, worker_gpus = gpu_shares(experiment.engine, experiment.learner, cluster.gpus_there(), replicas)
    bundles = [session.bundle(ENGINE, experiment.engine.threads, engine_gpus)] * replicas
    bundles += [session.bundle(WORKER, experiment.learner.threads, worker_gpus)] * experiment.learner.workers
    placed = session.place(bundles)
    started: list[ActorHandle] = []
    files: NodeFiles | None = None
    try:
        if session.joined or experiment.cluster.copy_weights:
            files = NodeFiles(placed.nodes, copy=experiment.cluster.copy_weights)
        for place in range(replicas):
            threads = session.threads(experiment.engine.threads, placed, place)
            environment = vllm_environment(experiment.engine, threads)
            started.append(cluster.start_engine_actor(environment, engine_gpus, placed.options(place)))
        ranks = _ranks(placed, replicas)
        for place in ranks:
            threads = session.threads(experiment.learner.threads, placed, place)
            started.append(cluster.start_learner_actor(threads, placed.options(place)))
        here = dict.fromkeys(placed.nodes, initial)
        yield Actors(
            tuple(started[:replicas]),
            placed.nodes[:replicas],
            tuple(started[replicas:]),
            tuple(placed.nodes[place] for place in ranks),
            here if files is None else files.bring(initial, placed.nodes, stay=True),
            files,
            apart=min(engine_gpus, worker_gpus) >= 1,
        )
    finally:
        if files is not None:
            if files.sent:
                say(files.describe())
            files.close()
        session.release(placed, started)


def _ranks(placed: Placed, first: int) -> list[int]:
    """The learner's bundles, those on this node first: worker 0, which saves, sees the run folder if any does."""
    here = ray.get_runtime_context().get_node_id()
    return sorted(range(first, len(placed.nodes)), key=lambda place: (placed.nodes[place] != here, place))


def _settings(actors: Actors, experiment: Experiment, name: str) -> dict[str, cluster.ModelSettings]:
    """By node; `name`: what adapters say they sit on."""
    return {
        node: cluster.ModelSettings(policy, name, experiment.lora, experiment.trust_remote_code)
        for node, policy in actors.initial.items()
    }


def build_learner(
    actors: Actors, experiment: Experiment, name: str, probe_token_ids: Sequence[int], *, share_gpu: bool | None = None
) -> list[Any]:
    """Let the workers load the model; `wait_for_learner` waits for it. `share_gpu`: None as the engine says."""
    settings = _settings(actors, experiment, name)
    shared = experiment.engine.share_gpu if share_gpu is None else share_gpu
    own = [settings[node] for node in actors.worker_nodes]
    return cluster.build_learner(actors.workers, own, experiment.learner, probe_token_ids, shared)


def build_engines(actors: Actors, experiment: Experiment, name: str, kind: str, max_model_len: int) -> list[Any]:
    """Let the engines load the model; `wait_for_engines` waits for it."""
    settings = _settings(actors, experiment, name)
    return [
        actor.build.remote(kind, settings[node], experiment.engine, max_model_len)
        for actor, node in zip(actors.engines, actors.engine_nodes, strict=True)
    ]


def wait_for_learner(building: list[Any], say: Callable[[str], None]) -> None:
    """Until the workers have the model; says what the model could not do."""
    why, *_ = cluster.wait(building, EngineError, "a learner worker")
    if why:
        say(f"learner: {why}")


def wait_for_engines(building: list[Any]) -> None:
    """Until the engines have the model."""
    cluster.wait(building, EngineError, "the engine")


def engine_of(actors: Actors, experiment: Experiment, kind: str, say: Callable[[str], None]) -> Engine:
    """The set's engines as one."""
    if actors.files is None and len(actors.engines) == 1:
        return cluster.RayEngine(actors.engines[0], kind)
    replicas = [
        Replica(number, actor, node)
        for number, (actor, node) in enumerate(zip(actors.engines, actors.engine_nodes, strict=True), 1)
    ]
    return RayEngines(replicas, kind, experiment.engine.batch_size, say=say, files=actors.files)


def learner_of(actors: Actors, experiment: Experiment) -> Learner:
    """The set's workers as one."""
    if actors.files is None:
        return cluster.RayLearner(actors.workers)
    checkpoints = experiment.learner.save_every is not None
    return SpreadLearner(actors.workers, actors.worker_nodes, actors.files, checkpoints=checkpoints)
