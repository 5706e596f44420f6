"""Several engines as one: prompts are dealt to whichever has room, answers come back as they are done."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ObjectLostError, RayActorError

from online_dpo.backends.node_files import NodeFiles
from online_dpo.backends.ray_cluster import wait
from online_dpo.config import SamplingSpec
from online_dpo.errors import EngineError
from online_dpo.protocols import SampleRequest
from online_dpo.types import Candidate, Policy

HELD = 2
"""Parcels that an engine holds: the one that it works on, and the next, so that it never waits for the driver."""
VLLM_PARCELS = 4
"""Parcels a vLLM engine, about: fewer leave engines idle at the end, more drain its running batch more often."""

Item = tuple[Sequence[int], Sequence[int]]


@dataclass
class Replica:
    """One engine: its number (from 1), its actor, the node that it is on, and how many prompts it answered."""

    number: int
    actor: ActorHandle
    node: str
    answered: int = 0


@dataclass
class _Flight:
    """A parcel at an engine; `seen`: places in the parcel whose results have come."""

    replica: Replica
    parcel: Sequence[int]
    seen: set[Any] = field(default_factory=set)


class RayEngines:
    """`protocols.Engine` over several `EngineActor`s that hold the same policy.

    Work is cut into parcels that do not depend on how many engines there are. The transformers engine's are the very
    batches that one engine would decode, so its answers are the same bit for bit, whoever gives them. An engine whose
    process ends is left out from then on, and the others do what it had not finished.
    """

    def __init__(
        self,
        replicas: Sequence[Replica],
        kind: str,
        batch_size: int,
        *,
        say: Callable[[str], None],
        files: NodeFiles | None = None,
    ) -> None:
        """`batch_size`: `engine.batch_size`. `files`: what brings policies to nodes; None: all see the run folder."""
        self.replicas = list(replicas)
        self.count = len(self.replicas)
        self.kind = kind
        self.batch_size = batch_size
        self.say = say
        self.files = files

    def load(self, policy: Policy) -> float:
        """`protocols.Engine.load`, by all engines at once; the largest gap of all."""
        at_node = {replica.node: policy for replica in self.replicas}
        if self.files is not None:
            at_node = self.files.bring(policy, at_node)
        loading = [(replica, replica.actor.load.remote(at_node[replica.node])) for replica in self.replicas]
        gaps: list[float] = [gap for replica, reference in loading for gap in self._result(replica, reference)]
        return max(gaps)

    def sample(self, requests: Sequence[SampleRequest], sampling: SamplingSpec) -> Iterator[list[Candidate]]:
        """`protocols.Engine.sample`: prompts in the order in which any engine answers them."""
        most = max((len(request.seeds) for request in requests), default=1)
        order = sorted(range(len(requests)), key=lambda i: (len(requests[i].prompt.token_ids), i))

        def start(replica: Replica, parcel: Sequence[int]) -> Any:
            chosen = [requests[place] for place in parcel]
            return replica.actor.sample.options(num_returns="streaming").remote(chosen, sampling)

        for flight, group in self._deal(cut(order, self._size(len(requests), max(1, self.batch_size // most))), start):
            # An engine that does a lost parcel again gives all of it; what had come is not wanted twice.
            if group[0].prompt_id not in flight.seen:
                flight.seen.add(group[0].prompt_id)
                flight.replica.answered += 1
                yield group

    def score(self, items: Sequence[Item]) -> list[list[float]]:
        """`protocols.Engine.score`."""
        order = sorted(range(len(items)), key=lambda i: len(items[i][0]) + len(items[i][1]))
        rows: dict[int, list[float]] = {}

        def start(replica: Replica, parcel: Sequence[int]) -> Any:
            chosen = [items[place] for place in parcel]
            return replica.actor.score_parcel.options(num_returns="streaming").remote(chosen)

        for flight, scored in self._deal(cut(order, self._size(len(items), self.batch_size)), start):
            rows.update(zip(flight.parcel, scored, strict=True))
        return [rows[place] for place in range(len(items))]

    def rest(self) -> None:
        """`protocols.Engine.rest`."""
        resting = [(replica, replica.actor.rest.remote()) for replica in self.replicas]
        for replica, reference in resting:
            self._result(replica, reference)

    def notes(self) -> list[str]:
        """`protocols.Engine.notes`, of all engines."""
        asking = [(replica, replica.actor.notes.remote()) for replica in self.replicas]
        lines = [(replica, self._result(replica, reference)) for replica, reference in asking]
        return [f"engine {replica.number}: {line}" for replica, found in lines for notes in found for line in notes]

    def _size(self, units: int, batch: int) -> int:
        """Units a parcel. By the engines that the run began with: not by which are left."""
        if self.kind == "transformers":
            return batch
        return max(1, units if self.count == 1 else -(-units // (VLLM_PARCELS * self.count)))

    def _deal(
        self, parcels: Sequence[Sequence[int]], start: Callable[[Replica, Sequence[int]], Any]
    ) -> Iterator[tuple[_Flight, Any]]:
        """What comes of `parcels`, each at one engine: an engine gets the next when it has fewer than `HELD`."""
        left = deque(_Flight(self.replicas[0], parcel) for parcel in parcels)
        flying: dict[Any, _Flight] = {}
        while left or flying:
            self._hand_out(left, flying, start)
            [stream], _ = ray.wait(list(flying), num_returns=1)
            flight = flying[stream]
            try:
                results = self._result(flight.replica, next(stream))
            except StopIteration:
                del flying[stream]
                continue
            if results:
                yield flight, results[0]
            else:
                self._take_back(flight.replica, left, flying)

    def _hand_out(
        self, left: deque[_Flight], flying: dict[Any, _Flight], start: Callable[[Replica, Sequence[int]], Any]
    ) -> None:
        """Give parcels to engines that hold fewer than `HELD`, to the one that holds the fewest first."""
        while left:
            held = {replica.number: 0 for replica in self.replicas}
            for flight in flying.values():
                held[flight.replica.number] += 1
            replica = min(self.replicas, key=lambda one: held[one.number])
            if held[replica.number] >= HELD:
                return
            flight = left.popleft()
            flight.replica = replica
            flying[start(replica, flight.parcel)] = flight

    def _take_back(self, replica: Replica, left: deque[_Flight], flying: dict[Any, _Flight]) -> None:
        """What an engine that is gone had not finished, for the others; said, with its number."""
        lost = [stream for stream, flight in flying.items() if flight.replica is replica]
        flights = [flying.pop(stream) for stream in lost]
        left.extendleft(reversed(flights))
        unfinished = sum(len(flight.parcel) - len(flight.seen) for flight in flights)
        self.say(f"{unfinished} unfinished prompts of engine {replica.number} go to the other engines")

    def _result(self, replica: Replica, reference: Any) -> list[Any]:
        """The one result of `reference`; none when the engine's process has ended and others are left.

        Raises `EngineError` when it was the last one, and what the engine itself raised.
        """
        try:
            return [wait(reference, EngineError, f"engine {replica.number}")]
        except EngineError as error:
            if not isinstance(error.__cause__, RayActorError | ObjectLostError):
                raise
            if replica in self.replicas:
                self.replicas.remove(replica)
                if self.replicas:
                    self.say(f"{error}; {len(self.replicas)} of {self.count} engines go on")
            if not self.replicas:
                last = EngineError(f"{error}; it was the last of {self.count}")
                last.process_ended = True
                raise last from error
            return []


def cut(order: Sequence[int], size: int) -> list[Sequence[int]]:
    """`order` in pieces of `size`, the last one shorter."""
    return [order[start : start + size] for start in range(0, len(order), size)]
