"""Room on a cluster: what can never fit is told at once. Ray's answers are made up; test_cluster.py has real ones."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import ray

from online_dpo.backends.cluster_address import find_cluster, join_with_token, on_loopback
from online_dpo.backends.placement import Bundle, Placed, place
from online_dpo.backends.ray_cluster import cores, interface_of
from online_dpo.backends.ray_session import OWN_CPU, RaySession
from online_dpo.cluster_spec import ClusterSpec
from online_dpo.config import Experiment, validate_experiment
from online_dpo.errors import ConfigError
from online_dpo.store import changed_keys

ENGINE, WORKER = Bundle("engine", 1.0, 2.0), Bundle("learner worker", 2.0, 1.0)


def nodes(monkeypatch: pytest.MonkeyPatch, *resources: dict[str, float]) -> None:
    """A cluster of these nodes, and of one that is dead."""
    found = [{"NodeID": str(i), "Resources": one, "Alive": True} for i, one in enumerate(resources)]
    found.append({"NodeID": "dead", "Resources": {"CPU": 64.0, "GPU": 8.0}, "Alive": False})
    monkeypatch.setattr(ray, "nodes", lambda: found)


def test_a_bundle_that_no_node_can_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs in all, but not on one node."""
    nodes(monkeypatch, {"CPU": 8.0, "GPU": 1.0}, {"CPU": 16.0, "GPU": 1.0})
    line = (
        r"^no node of the cluster can hold an engine of 1 CPU, 2 GPU: there are 2 node\(s\), 24 CPU, 2 GPU in all, the "
        r"largest with 16 CPU, 1 GPU$"
    )
    with pytest.raises(ConfigError, match=line):
        place([ENGINE], "pack", 1)


def test_more_than_all_nodes_have(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes(monkeypatch, {"CPU": 4.0, "GPU": 2.0}, {"CPU": 4.0, "GPU": 2.0})
    line = (
        r"^the cluster is too small: the run asks for 2 × engine \(1 CPU, 2 GPU\) and 1 × learner worker \(2 CPU, 1 "
        r"GPU\), together 4 CPU, 5 GPU; there are 8 CPU, 4 GPU on 2 node\(s\)"
    )
    with pytest.raises(ConfigError, match=line):
        place([ENGINE, ENGINE, WORKER], "pack", 1)


def test_what_a_process_reserves_and_uses() -> None:
    """A machine of our own: next to nothing, and the cores are shared by its like. A cluster: what its threads are."""
    own, joined = RaySession(ClusterSpec()), RaySession(ClusterSpec(address="auto"))
    assert own.bundle("engine", 4, 0.5) == Bundle("engine", OWN_CPU, 0.5)
    assert joined.bundle("engine", 4, 0.5) == Bundle("engine", 4.0, 0.5)
    assert joined.bundle("engine", None, 0.0) == Bundle("engine", 1.0, 0.0)
    assert Bundle("x", 1.0, 0.0).resources == {"CPU": 1.0}
    placed = Placed(None, (ENGINE, ENGINE, WORKER, ENGINE), ("a", "a", "a", "b"))
    assert [placed.alike_on_node(at) for at in range(4)] == [2, 2, 1, 1]
    assert joined.threads(None, placed, 0) == 1
    assert joined.threads(3, placed, 0) == own.threads(3, placed, 0) == 3
    assert own.threads(None, placed, 0) == max(1, cores() // 2)
    assert own.threads(None, placed, 2) == cores()


def test_an_address_where_nothing_answers_is_known_within_seconds() -> None:
    with pytest.raises(ConfigError, match=r"^cluster\.address 127\.0\.0\.1:9: nothing answers there \(Connection"):
        find_cluster("127.0.0.1:9")


def test_auto_is_the_cluster_that_this_machine_was_made_part_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RAY_ADDRESS first, then what `ray start` wrote down; never just any Ray that runs here. One may have gone."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match=r"part of no Ray cluster .*ray_current_cluster\); start one with"):
        find_cluster("auto")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text(f"{address}\n")
        assert find_cluster("auto") == find_cluster(address) == address
        (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:9")
        with pytest.raises(ConfigError, match=r"auto \(127\.0\.0\.1:9\): nothing answers"):
            find_cluster("auto")
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert find_cluster("auto") == address


def test_auto_joins_with_the_token_that_this_machine_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `ray start` did where there is one; nothing else decides it, and what is said in the environment stands."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "any")  # put back at the end, whatever it was
    monkeypatch.delenv("RAY_AUTH_MODE")
    monkeypatch.setenv("HOME", str(tmp_path))
    join_with_token("auto")
    assert "RAY_AUTH_MODE" not in os.environ
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("t")
    join_with_token("10.0.0.1:6379")
    assert "RAY_AUTH_MODE" not in os.environ
    join_with_token("auto")
    assert os.environ["RAY_AUTH_MODE"] == "token"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    join_with_token("auto")
    assert os.environ["RAY_AUTH_MODE"] == "disabled"


def test_what_is_on_loopback() -> None:
    assert [on_loopback(a) for a in ("127.0.0.1:1", "[::1]:1", "localhost:1", "10.0.0.1:1", "head:1")] == [
        True, True, True, False, False,
    ]  # fmt: skip


def test_loopback_has_an_interface() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.7") is None


# --- the section ---

TINY = {"name": "t", "model": "m", "prompts": {"path": "p"}, "judge": "judges.length:LengthJudge"}


def experiment(**changes: Any) -> Experiment:
    return validate_experiment(TINY | changes, "test")


def test_where_a_run_is_may_change_within_it() -> None:
    """From a laptop to a cluster and back."""
    far = {"address": "10.0.0.1:6379", "engines": 4, "strategy": "spread", "wait_s": 5, "copy_weights": True}
    far |= {"judge_while_sampling": False, "sample_while_evaluating": True, "lanes": 2}
    there = experiment(cluster=far)
    assert changed_keys(experiment(), there) == []
    assert set(there.cluster.model_dump()) == set(far)
    machine = {"engine": {"threads": 4, "gpus": 2, "tensor_parallel_size": 2}, "learner": {"workers": 2, "threads": 8}}
    assert changed_keys(experiment(), experiment(**machine)) == []
    assert changed_keys(experiment(), experiment(seeds=[1], engine={"batch_size": 8})) == ["seeds", "engine.batch_size"]


@pytest.mark.parametrize(
    ("section", "line"),
    [
        ({"address": "ray://10.0.0.1:10001"}, "not a Ray client: give auto or host:port"),
        ({"address": "10.0.0.1"}, "null, auto or host:port is expected"),
        ({"adress": "auto"}, r"unknown key 'cluster\.adress' \(did you mean 'address'\?\)"),
        ({"engines": 0}, r"cluster\.engines"),
        ({"strategy": "packed"}, r"cluster\.strategy"),
    ],
)
def test_a_wrong_section_is_one_line(section: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line) as caught:
        experiment(cluster=section)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("address", ["auto", "10.0.0.1:6379", "head.example:6379", "[::1]:6379"])
def test_an_address_alone_is_short_for_the_section(address: str) -> None:
    assert experiment(cluster=address).cluster == ClusterSpec(address=address)
