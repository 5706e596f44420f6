"""Room for a run's processes on Ray's nodes: one placement group a set, all of it or nothing.

All or nothing, so that two runs that start at once cannot each hold half of what they need and wait for the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from online_dpo.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Bundle:
    """What one process asks of one node: `who` it is, its CPUs and its GPUs. A node gives all of it."""

    who: str
    cpus: float
    gpus: float

    @property
    def resources(self) -> dict[str, float]:
        """As Ray takes it: nothing that is zero."""
        return {name: amount for name, amount in (("CPU", self.cpus), ("GPU", self.gpus)) if amount}


@dataclass(frozen=True, slots=True)
class Placed:
    """Bundles that have room: their placement group, and each one's node (its id)."""

    group: Any
    bundles: tuple[Bundle, ...]
    nodes: tuple[str, ...]

    def options(self, place: int) -> dict[str, Any]:
        """The options of the actor that takes bundle `place`."""
        bundle = self.bundles[place]
        strategy = PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=place)
        return {"num_cpus": bundle.cpus, "num_gpus": bundle.gpus, "scheduling_strategy": strategy}

    def alike_on_node(self, place: int) -> int:
        """How many processes of its kind bundle `place` shares its node with, itself counted."""
        mine = self.bundles[place].who, self.nodes[place]
        return [(b.who, node) for b, node in zip(self.bundles, self.nodes, strict=True)].count(mine)

    def release(self) -> None:
        """Give the room back; what runs in it ends."""
        remove_placement_group(self.group)


def place(bundles: Sequence[Bundle], strategy: Literal["pack", "spread"], wait_s: float) -> Placed:
    """Room for all of `bundles`.

    Raises `ConfigError`, with what was asked for and what there is: at once when no cluster of this size can hold them,
    else when there was no room for `wait_s` seconds.
    """
    nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    _check_possible(bundles, nodes)
    group = placement_group([bundle.resources for bundle in bundles], strategy=strategy.upper())
    try:
        there = group.wait(wait_s)
    except BaseException:
        remove_placement_group(group)
        raise
    if not there:
        remove_placement_group(group)
        free = ray.available_resources()
        raise ConfigError(
            f"no room on the cluster for {wait_s:g} s: the run asks for {_asked(bundles)}; there are "
            f"{_amounts(_total(nodes))} on {len(nodes)} node(s), free of them {_amounts(free)}; ask for less, or wait "
            "longer with cluster.wait_s"
        )
    where = placement_group_table(group)["bundles_to_node_id"]
    return Placed(group, tuple(bundles), tuple(where[index] for index in range(len(bundles))))


def _check_possible(bundles: Sequence[Bundle], nodes: Mapping[str, Mapping[str, float]]) -> None:
    """`ConfigError` when one bundle is more than any node has, or all are more than all nodes have."""
    there = _total(nodes)
    wanted: Counter[str] = Counter()
    for bundle in bundles:
        wanted.update(bundle.resources)
        if not any(_fits(bundle, node) for node in nodes.values()):
            largest = max(nodes.values(), key=lambda node: (node.get("GPU", 0), node.get("CPU", 0)), default={})
            raise ConfigError(
                f"no node of the cluster can hold {_with_article(bundle.who)} of {_amounts(bundle.resources)}: there "
                f"are {len(nodes)} node(s), {_amounts(there)} in all, the largest with {_amounts(largest)}"
            )
    if any(amount > there.get(name, 0.0) + 1e-6 for name, amount in wanted.items()):
        raise ConfigError(
            f"the cluster is too small: the run asks for {_asked(bundles)}, together {_amounts(wanted)}; there are "
            f"{_amounts(there)} on {len(nodes)} node(s); ask for less (cluster.engines, learner.workers, threads, "
            "gpus), or add nodes"
        )


def _fits(bundle: Bundle, node: Mapping[str, float]) -> bool:
    return all(amount <= node.get(name, 0.0) + 1e-6 for name, amount in bundle.resources.items())


def _total(nodes: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    total: Counter[str] = Counter()
    for node in nodes.values():
        total.update({name: node.get(name, 0.0) for name in ("CPU", "GPU")})
    return dict(total)


def _asked(bundles: Sequence[Bundle]) -> str:
    """`2 × engine (1 CPU) and 2 × learner worker (2 CPU)`"""
    counts = Counter(bundles)
    return " and ".join(f"{count} × {bundle.who} ({_amounts(bundle.resources)})" for bundle, count in counts.items())


def _amounts(resources: Mapping[str, float]) -> str:
    shown = [f"{resources[name]:g} {name}" for name in ("CPU", "GPU") if resources.get(name)]
    return ", ".join(shown) or "nothing"


def _with_article(who: str) -> str:
    return f"an {who}" if who[0] in "aeiou" else f"a {who}"
