"""A real run on a real Ray cluster of two nodes: the pairs of a run on one node, and the cluster is left as it was.

The nodes are two raylets on this machine, on loopback. They see the same files; `copy_weights` sends weights to them
all the same, as to machines that do not.
"""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from stories import Outcome, run

from online_dpo.backends.node_files import PREFIX
from online_dpo.files import digest
from online_dpo.records import read_candidates

SAME: dict[str, Any] = {
    "arms": {"on_policy": {}},
    # Two prompts a batch of the engine's: three batches a round for two engines, four for the held-out prompts.
    "engine": {"kind": "transformers", "threads": 1, "batch_size": 6},
}
FAR = {
    "engines": 2,
    "strategy": "spread",
    "copy_weights": True,
    "judge_while_sampling": True,
    "sample_while_evaluating": True,
    "wait_s": 120,
}


LOOK = """
import json, os, sys
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
import ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
seen = {
    "actors": [
        {"kind": one["ActorClassName"], "node": one["Address"]["NodeID"], "state": one["State"]}
        for one in ray._private.state.actors().values()
    ],
    "groups": [one["state"] for one in ray.util.placement_group_table().values()],
    "nodes": sum(node["Alive"] for node in ray.nodes()),
    "free": ray.available_resources()["CPU"],
    "all": ray.cluster_resources()["CPU"],
}
print(json.dumps(seen))
"""
"""A process of its own: what Ray takes 127.0.0.1 for is settled when it is imported (as in backends/factory.py)."""


@dataclass(frozen=True)
class TwoNodes:
    """The cluster's address."""

    address: str

    def seen(self) -> dict[str, Any]:
        """Every actor, alive or dead (class, node and state), placement groups, nodes, CPUs that are free and all."""
        command = [sys.executable, "-c", LOOK, self.address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found


def own_ports() -> dict[str, int]:
    """Free ports for a node's agents. Without them a raylet waits for its agents to say theirs, and dies after 15 s:
    less than they take to start on a busy machine."""
    names = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")
    held = [socket.create_server(("127.0.0.1", 0)) for _ in names]
    ports = {name: server.getsockname()[1] for name, server in zip(names, held, strict=True)}
    for server in held:
        server.close()
    return ports


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[TwoNodes]:
    """Two raylets of two CPUs: as many as two engines and two learner workers ask for, so that each has one of both."""
    import ray
    from ray.cluster_utils import Cluster

    changed = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_raylet_start_wait_time_s": "180"}
    before = {key: os.environ.get(key) for key in changed}
    os.environ.update(changed)
    node = {"node_ip_address": "127.0.0.1", "object_store_memory": 100 * 2**20}
    cluster = Cluster()
    try:
        cluster.add_node(**node, **own_ports(), num_cpus=2, include_dashboard=False)
        cluster.add_node(**node, **own_ports(), num_cpus=2)
        yield TwoNodes(cluster.address)
    finally:
        ray.shutdown()
        cluster.shutdown()
        for key, value in before.items():
            os.environ.pop(key)
            if value is not None:
                os.environ[key] = value


@pytest.fixture(scope="module")
def one(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The run on a Ray of its own: one engine, one learner worker."""
    return run(tmp_path_factory.mktemp("one"), small_model, "tiny", **SAME)


@pytest.fixture(scope="module")
def two(two_nodes: TwoNodes, small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The same on the cluster: two engines, two learner workers, and the judge at work meanwhile."""
    cluster = {"address": two_nodes.address, **FAR}
    changes = {"cluster": cluster, "learner": {"threads": 1, "workers": 2}}
    return run(tmp_path_factory.mktemp("two"), small_model, "tiny", **SAME | changes)


@pytest.mark.slow
def test_two_nodes_make_the_pairs_of_one(one: Outcome, two: Outcome) -> None:
    """Round 1 begins with the same weights: candidates, verdicts and pairs bit for bit, whichever engine answered.

    Two workers add gradients in another order than one, and Adam makes of that up to 0.2 % of the way the weights go
    (as on one node: test_ray_cluster.py). Round 2's answers are those of such weights: the same tokens.
    """
    assert (one.status, two.status) == (0, 0), one.stderr + two.stderr
    for table in ("candidates.parquet", "verdicts.parquet", "pairs.parquet"):
        assert digest(one.folder("on_policy", 1) / table) == digest(two.folder("on_policy", 1) / table), table
    for index in (1, 2):
        ways = [weights(outcome, index) for outcome in (one, two)]
        assert distance(*ways) < 2e-3 * distance(ways[0], weights(one, index - 1))
    answers = [
        [(c.prompt_id, c.token_ids) for c in read_candidates(outcome.folder("on_policy", 2) / "candidates.parquet")]
        for outcome in (one, two)
    ]
    assert answers[0] == answers[1]


def weights(outcome: Outcome, index: int) -> list[Any]:
    """The tensors of the policy after round `index`, by name; of the initial one the model's own."""
    import yaml
    from safetensors.torch import load_file

    if index:
        folder = outcome.folder("on_policy", index) / "policy"
    else:
        folder = Path(yaml.safe_load((outcome.root / "experiment.yaml").read_text(encoding="utf-8"))["model"])
    return [tensor.double() for _, tensor in sorted(load_file(folder / "model.safetensors").items())]


def distance(one: list[Any], other: list[Any]) -> float:
    return math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(one, other, strict=True)))


@pytest.mark.slow
def test_engines_and_workers_were_on_both_nodes_and_nothing_is_left(two: Outcome, two_nodes: TwoNodes) -> None:
    """No actor, no placement group, no CPU in use; no weights on a node's disk; and the cluster is up."""
    assert two.status == 0, two.stderr
    seen = two_nodes.seen()
    actors = seen["actors"]
    for kind, count in (("EngineActor", 2), ("LearnerActor", 2), ("NodeKeeper", 2)):
        assert len({one["node"] for one in actors if one["kind"] == kind}) == count, (kind, actors)
    assert {one["state"] for one in actors} == {"DEAD"}
    assert seen["groups"] == ["REMOVED"]
    assert (seen["nodes"], seen["free"], seen["all"]) == (2, 4, 4)
    assert list(Path(tempfile.gettempdir()).glob(f"{PREFIX}*")) == []


@pytest.mark.slow
def test_weights_travelled_once_a_node(two: Outcome) -> None:
    """The initial policy and those of two rounds, to two nodes that hold two actors each: 3 · 2 copies, not 3 · 4."""
    assert "weights: 6 copies to 2 node(s), each policy once a node" in two.stderr


@pytest.mark.slow
def test_a_cluster_that_is_too_small_is_one_line(two_nodes: TwoNodes, small_model: Path, tmp_path: Path) -> None:
    changes = {"cluster": {"address": two_nodes.address, "engines": 5}}
    found = run(tmp_path, small_model, "tiny", **SAME | changes)
    assert found.status == 2
    line = (
        "the cluster is too small: the run asks for 5 × engine (1 CPU) and 1 × learner worker (1 CPU), together 6 CPU"
    )
    assert line in found.stderr
    assert "Traceback" not in found.stderr
