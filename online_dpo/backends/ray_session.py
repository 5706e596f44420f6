"""The Ray that a run's processes live in: one of its own, or a running cluster, which is left as it was found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import ray
from ray.actor import ActorHandle

from online_dpo.backends.placement import Bundle, Placed, place
from online_dpo.backends.ray_cluster import cores, start_ray, stop_ray
from online_dpo.cluster_spec import ClusterSpec

OWN_CPU = 0.01
"""What a process reserves of the CPUs of a Ray of the run's own: next to nothing, since engine, learner and judges take
turns there. On a cluster that is shared with others it reserves what it uses."""
OWN_WAIT_S = 120.0
"""A Ray of the run's own has room as soon as it is up, however busy the machine is."""


@dataclass
class RaySession:
    """Where processes are put, and what has to go when the run ends."""

    spec: ClusterSpec
    placed: list[Placed] = field(default_factory=list)

    @property
    def joined(self) -> bool:
        """Whether the cluster is somebody else's."""
        return self.spec.address is not None

    @property
    def gpus_there(self) -> bool | None:
        """Whether the cluster that was joined has GPUs; None on this machine alone, which can be asked itself."""
        return bool(ray.cluster_resources().get("GPU")) if self.joined else None

    def bundle(self, who: str, threads: int | None, gpus: float) -> Bundle:
        """What a process with so many threads asks for; None: it does not say."""
        return Bundle(who, float(threads or 1) if self.joined else OWN_CPU, gpus)

    def place(self, bundles: Sequence[Bundle]) -> Placed:
        """Room for `bundles` until the session ends, or `release` is called; `placement.place` says what it raises."""
        wait_s = self.spec.wait_s if self.joined else OWN_WAIT_S
        placed = place(bundles, self.spec.strategy, wait_s)
        self.placed.append(placed)
        return placed

    def end_sets(self) -> None:
        """Take back all room: what runs there ends, and whoever waits for it is told so."""
        for placed in list(self.placed):
            self.release(placed, [])

    def release(self, placed: Placed, actors: Sequence[ActorHandle]) -> None:
        """End `actors` and give their room back."""
        for actor in actors:
            ray.kill(actor)
        if placed in self.placed:
            self.placed.remove(placed)
            placed.release()

    def threads(self, said: int | None, placed: Placed, at: int) -> int:
        """CPU threads of the process in bundle `at`: what the experiment says; else what it reserved of a cluster, and
        of a machine of our own the cores that it shares with its like, in its own set and those of other lanes."""
        if said is not None or self.joined:
            return said or 1
        return max(1, cores() // (placed.alike_on_node(at) * self.spec.lanes))


@contextmanager
def open_session(spec: ClusterSpec, address: str | None) -> Iterator[RaySession]:
    """Start a Ray, or join the one at `address` (host:port, what `spec.address` means).

    On leaving, what is still placed is given back; a Ray that was started here is ended.
    Raises `ConfigError` when the cluster cannot be joined, `OnlineDPOError` when Ray does not start.
    """
    ours = not ray.is_initialized()
    start_ray(address)
    session = RaySession(spec)
    try:
        yield session
    finally:
        session.end_sets()
        if ours:
            stop_ray()
