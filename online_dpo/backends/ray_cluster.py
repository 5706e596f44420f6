"""Engine and learner as Ray actors that live for the whole run."""

from __future__ import annotations

import os
import signal
import socket
import struct
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError, RayTaskError

from online_dpo.backends.allocator import learner_environment
from online_dpo.backends.caretaker import Caretaker
from online_dpo.backends.sharing import share
from online_dpo.config import EngineSpec, LearnerSpec, LoraSpec, SamplingSpec
from online_dpo.errors import ConfigError, EngineError, LearnerError, OnlineDPOError, TrainingError, one_line
from online_dpo.protocols import SampleRequest, TrainJob, TrainStart, TrainStep
from online_dpo.types import Candidate, Policy, Probe, Prompt


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """What engine and learner both need to know of the run's model."""

    initial: Policy
    name: str
    lora: LoraSpec | None
    trust_remote_code: bool


ADDRESS_OF_INTERFACE = 0x8915
"""Linux's SIOCGIFADDR."""
_caretaker = Caretaker()
ATTEMPTS = 3
"""To start a Ray of our own."""
IN_STEP_S = 20.0
"""Seconds in which workers that fail together are expected to have failed."""


class EngineActor:
    """Holds the engine in a process of its own. Built by `build`, so that a failure keeps its own error."""

    def build(self, kind: str, settings: ModelSettings, spec: EngineSpec, max_model_len: int) -> str:
        """Build the engine; returns its kind."""
        from online_dpo.backends.hf_engine import TransformersEngine
        from online_dpo.backends.vllm_engine import VllmEngine

        trust = settings.trust_remote_code
        if kind == "vllm":
            self.engine: Any = VllmEngine(
                settings.initial,
                spec,
                max_model_len=max_model_len,
                lora=settings.lora,
                trust_remote_code=trust,
            )
        else:
            self.engine = TransformersEngine(settings.initial, spec, trust_remote_code=trust)
        return kind

    def load(self, policy: Policy) -> float:
        """`protocols.Engine.load`."""
        gap: float = self.engine.load(policy)
        return gap

    def sample(self, requests: Sequence[SampleRequest], sampling: SamplingSpec) -> Iterator[list[Candidate]]:
        """`protocols.Engine.sample`, streamed."""
        yield from self.engine.sample(requests, sampling)

    def score(self, items: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
        """`protocols.Engine.score`."""
        rows: list[list[float]] = self.engine.score(items)
        return rows

    def score_parcel(self, items: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[list[list[float]]]:
        """`score` as a stream of one, for `RayEngines`."""
        yield self.score(items)

    def rest(self) -> None:
        """`protocols.Engine.rest`."""
        self.engine.rest()

    def notes(self) -> list[str]:
        """`protocols.Engine.notes`."""
        notes: list[str] = self.engine.notes()
        return notes


class LearnerActor:
    """One learner worker."""

    def address(self) -> str:
        """See `free_address`."""
        return free_address()

    def build(
        self,
        rank: int,
        world: int,
        address: str,
        settings: ModelSettings,
        spec: LearnerSpec,
        probe_token_ids: Sequence[int],
        share_gpu: bool,
    ) -> str:
        """Join the group and load the model; returns what the model could not do (`Forward.why`)."""
        import torch

        from online_dpo.backends.distributed import join
        from online_dpo.backends.learner import LocalLearner
        from online_dpo.backends.policy_model import PolicyModel

        if not torch.cuda.is_available():
            torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        if world > 1:
            # gloo would else look for an interface by the host's name, which may not be the cluster's, or not loopback.
            interface = interface_of(ray.util.get_node_ip_address())
            if interface is not None:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        join(rank, world, address)
        model = PolicyModel(
            settings.initial,
            model_name=settings.name,
            lora=settings.lora,
            dtype=spec.dtype,
            parallel=spec.parallel,
            activation_checkpointing=spec.activation_checkpointing,
            layout=spec.layout,
            tokens_per_pass=spec.tokens_per_pass,
            trust_remote_code=settings.trust_remote_code,
        )
        self.learner = LocalLearner(model, probe_token_ids, share_gpu=share_gpu, save_every=spec.save_every)
        return model.forward.why

    def train(self, job: TrainJob) -> Iterator[TrainStart | TrainStep | Policy]:
        """`protocols.Learner.train`, streamed."""
        yield from self.learner.train(job)

    def score(self, policy: Policy, items: Sequence[tuple[Prompt, Candidate]]) -> list[list[float]]:
        """`protocols.Learner.score`."""
        return self.learner.score(policy, items)

    def probe(self, policy: Policy, token_ids: Sequence[int]) -> Probe:
        """`protocols.Learner.probe`."""
        return self.learner.probe(policy, token_ids)

    def rest(self) -> None:
        """`protocols.Learner.rest`."""
        self.learner.rest()


class RayEngine:
    """`protocols.Engine` over an `EngineActor`."""

    def __init__(self, actor: ActorHandle, kind: str) -> None:
        self.actor = actor
        self.kind = kind

    def load(self, policy: Policy) -> float:
        """`protocols.Engine.load`."""
        gap: float = wait(self.actor.load.remote(policy), EngineError, "the engine")
        return gap

    def sample(self, requests: Sequence[SampleRequest], sampling: SamplingSpec) -> Iterator[list[Candidate]]:
        """`protocols.Engine.sample`."""
        stream = self.actor.sample.options(num_returns="streaming").remote(requests, sampling)
        for reference in stream:
            yield wait(reference, EngineError, "the engine")

    def score(self, items: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
        """`protocols.Engine.score`."""
        rows: list[list[float]] = wait(self.actor.score.remote(items), EngineError, "the engine")
        return rows

    def rest(self) -> None:
        """`protocols.Engine.rest`."""
        wait(self.actor.rest.remote(), EngineError, "the engine")

    def notes(self) -> list[str]:
        """`protocols.Engine.notes`."""
        notes: list[str] = wait(self.actor.notes.remote(), EngineError, "the engine")
        return notes


class RayLearner:
    """`protocols.Learner` over a group of `LearnerActor`s."""

    def __init__(self, workers: Sequence[ActorHandle]) -> None:
        self.workers = list(workers)

    def train(self, job: TrainJob) -> Iterator[TrainStart | TrainStep | Policy]:
        """`protocols.Learner.train`; what worker 0 says is passed on, the others work in step with it."""
        shared = share(job, LearnerError)
        yield from in_step([worker.train.options(num_returns="streaming").remote(shared) for worker in self.workers])

    def score(self, policy: Policy, items: Sequence[tuple[Prompt, Candidate]]) -> list[list[float]]:
        """`protocols.Learner.score`."""
        shared = list(items)
        results: list[list[list[float]]] = wait(
            [worker.score.remote(policy, shared) for worker in self.workers], LearnerError, "a learner worker"
        )
        return results[0]

    def probe(self, policy: Policy, token_ids: Sequence[int]) -> Probe:
        """`protocols.Learner.probe`."""
        probes: list[Probe] = wait(
            [worker.probe.remote(policy, token_ids) for worker in self.workers], LearnerError, "a learner worker"
        )
        return probes[0]

    def rest(self) -> None:
        """`protocols.Learner.rest`."""
        wait([worker.rest.remote() for worker in self.workers], LearnerError, "a learner worker")


def in_step(streams: Sequence[Any]) -> Iterator[Any]:
    """What worker 0 says, once each worker has said as much.

    Whoever speaks first is heard first: a worker that fails ends the work at once, also while the others wait for it.
    """
    while True:
        said: dict[int, Any] = {}
        pending = list(streams)
        while pending:
            [stream], pending = ray.wait(pending, num_returns=1)
            worker = streams.index(stream)
            try:
                reference = next(stream)
            except StopIteration:
                continue
            try:
                said[worker] = wait(reference, LearnerError, f"learner worker {worker}")
            except TrainingError as error:
                if _all_fail([other for other in streams if other is not stream]):
                    raise
                raise LearnerError(f"learner worker {worker} alone: {error}") from error
        if not said:
            return
        if len(said) < len(streams):
            raise LearnerError(f"only {len(said)} of {len(streams)} learner workers went on")
        yield said[0]


def _all_fail(streams: Sequence[Any]) -> bool:
    """Whether every worker ends with a `TrainingError` too, as they do when what they share is not finite.

    Then they are in step, and the next arm may use them. A worker that failed by itself has left the others inside a
    sum that it will never join.
    """
    for stream in streams:
        try:
            while True:
                ready, _ = ray.wait([stream], num_returns=1, timeout=IN_STEP_S)
                if not ready:
                    return False
                wait(next(stream), LearnerError, "a learner worker")
        except TrainingError:
            continue
        except (OnlineDPOError, StopIteration):
            return False
    return True


def free_address() -> str:
    """A free tcp address on this process's node for a group of workers to meet at."""
    host = ray.util.get_node_ip_address()
    with socket.socket() as probe:
        probe.bind((host, 0))
        return f"tcp://{host}:{probe.getsockname()[1]}"


def interface_of(host: str) -> str | None:
    """The network interface with the IPv4 address `host`; None where there is none, or it cannot be told."""
    if sys.platform != "linux":
        return None
    import fcntl

    for _, name in socket.if_nameindex():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                found = fcntl.ioctl(probe.fileno(), ADDRESS_OF_INTERFACE, struct.pack("256s", name[:15].encode()))
            except OSError:  # an interface without an address
                continue
        if socket.inet_ntoa(found[20:24]) == host:
            return name
    return None


def start_ray(address: str | None = None) -> None:
    """A Ray of this process's own, or the cluster at `address` (host:port); none where this process has one already.

    Raises `ConfigError` when the cluster cannot be joined, `OnlineDPOError` when a Ray of our own does not start.
    """
    if ray.is_initialized():
        return
    on_terminate = signal.getsignal(signal.SIGTERM)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray would otherwise warn of, and in a later version change, how accelerators are hidden from CPU actors.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address is not None:
        _join(address)
    else:
        _start_own()
    # Ray puts a handler of its own on SIGTERM, which ends the process with a trace: ours is put back.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_terminate)


def _start_own() -> None:
    # Ray's servers wait 15 seconds for each other, whatever else the machine has to do.
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return _start_once()
        except Exception as error:  # Ray raises bare ones
            stop_ray()
            if attempt == ATTEMPTS:
                raise OnlineDPOError(f"Ray does not start: {one_line(error, 400)}") from error


def _start_once() -> None:
    _caretaker.begin()
    try:
        ray.init(
            address="local",  # else a cluster that happens to run on this machine would be joined
            num_cpus=cores(),
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            object_store_memory=256 * 2**20,
        )
    finally:
        _caretaker.started()


def stop_ray() -> None:
    """Leave the cluster, or end a Ray of this process's own with all of its processes."""
    ray.shutdown()
    _caretaker.end()


def _join(address: str) -> None:
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # Ray raises bare ones here too: another version, another Python
        ray.shutdown()
        token = "" if os.environ.get("RAY_AUTH_MODE") else "; does it ask for a token? then set RAY_AUTH_MODE=token"
        raise ConfigError(
            f"cluster.address {address}: that Ray cannot be joined ({one_line(error, 300)}){token}"
        ) from error


def cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def start_engine_actor(environment: dict[str, str], gpus: float, options: dict[str, Any] | None = None) -> ActorHandle:
    """An `EngineActor` with `environment`, not built yet. `options`: where it is put, in the place of `gpus`."""
    remote = ray.remote(EngineActor)
    where = options or {"num_cpus": 0, "num_gpus": gpus}
    actor: ActorHandle = remote.options(**where, runtime_env={"env_vars": environment}).remote()
    return actor


def start_learner_actors(spec: LearnerSpec, gpus_per_worker: float, kind: type = LearnerActor) -> list[ActorHandle]:
    """`spec.workers` workers of `kind` on this machine, not built yet."""
    threads = spec.threads or max(1, cores() // spec.workers)
    options = {"num_cpus": 0, "num_gpus": gpus_per_worker}
    return [start_learner_actor(threads, options, kind) for _ in range(spec.workers)]


def start_learner_actor(threads: int, options: dict[str, Any], kind: type = LearnerActor) -> ActorHandle:
    """A worker of `kind`, not built yet; `options` say where. Ray would give it one thread: it is told here."""
    environment = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    if not options["num_gpus"]:
        environment |= learner_environment()
    actor: ActorHandle = ray.remote(kind).options(**options, runtime_env={"env_vars": environment}).remote()
    return actor


def build_learner(
    workers: Sequence[ActorHandle],
    settings: Sequence[ModelSettings],
    spec: LearnerSpec,
    probe_token_ids: Sequence[int],
    share_gpu: bool,
) -> list[Any]:
    """Let `workers` join into a group and load the model, each by its own of `settings`; returns what `wait` waits for,
    in their order."""
    world = len(workers)
    address = wait(workers[0].address.remote(), EngineError, "learner worker 0") if world > 1 else ""
    return [
        worker.build.remote(rank, world, address, own, spec, list(probe_token_ids), share_gpu)
        for rank, (worker, own) in enumerate(zip(workers, settings, strict=True))
    ]


def gpus_there() -> float:
    """The GPUs of the cluster's nodes."""
    return float(ray.cluster_resources().get("GPU", 0))


def wait(references: Any, kind: type[OnlineDPOError], who: str) -> Any:
    """`ray.get` whose failures are this project's errors again."""
    try:
        return ray.get(references)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, OnlineDPOError):
            raise cause from None
        raise kind(f"{who} failed: {one_line(cause, 400)}") from error
    except RayError as error:
        ended = "'s process ended" if isinstance(error, RayActorError) else ""
        lost = kind(f"{who}{ended}: {one_line(error, 300)}")
        lost.process_ended = True
        raise lost from error
