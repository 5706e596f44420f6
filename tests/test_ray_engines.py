"""Several engines as one, and policies brought to nodes: real Ray, real processes."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from training_parts import job_of, learner_of

from online_dpo.backends import ray_cluster as cluster
from online_dpo.backends.hf_engine import TransformersEngine
from online_dpo.backends.node_files import KEPT, PREFIX, NodeFiles, NodeKeeper, pieces
from online_dpo.backends.ray_engines import HELD, RayEngines, Replica, cut
from online_dpo.backends.spread_learner import SpreadLearner
from online_dpo.config import DPOSpec, EngineSpec, LearnerSpec, SamplingSpec
from online_dpo.errors import ConfigError, EngineError
from online_dpo.policies import read_policy, write_policy
from online_dpo.protocols import RoundPart, SampleRequest
from online_dpo.types import Candidate, Pair, Policy, Prompt

ROOT = Path(__file__).resolve().parents[1]
TWO = SamplingSpec(n=2, max_tokens=12)


@pytest.fixture(scope="module")
def live_ray() -> Iterator[None]:
    """One Ray for the file; actors import the project from this checkout."""
    before = os.environ.get("PYTHONPATH")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([before] if before else [])])
    cluster.start_ray()
    yield
    ray.shutdown()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


class Paced:
    """An engine without a model: `delay` seconds a prompt; its process ends at prompt `dies`."""

    def __init__(self, name: str, delay: float, dies: str = "") -> None:
        self.name, self.delay, self.dies = name, delay, dies

    def load(self, policy: Policy) -> float:
        if self.dies == "load":
            os.kill(os.getpid(), signal.SIGKILL)
        return self.delay

    def rest(self) -> None:
        pass

    def sample(self, requests: Sequence[SampleRequest], sampling: SamplingSpec) -> Iterator[list[Candidate]]:
        for request in requests:
            if request.prompt.id == self.dies:
                time.sleep(0.5)  # what it gave before is on its way
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(self.delay)
            yield [
                Candidate(request.prompt.id, i, self.name, (1,), (-1.0,), "stop", s)
                for i, s in enumerate(request.seeds)
            ]

    def score_parcel(self, items: Sequence[Any]) -> Iterator[list[list[float]]]:
        yield [[float(sum(context) + sum(rest))] for context, rest in items]


class Watched(RayEngines):
    """Keeps the most parcels that one engine held."""

    held = 0

    def _hand_out(self, left: Any, flying: Any, start: Any) -> None:
        super()._hand_out(left, flying, start)
        numbers = [flight.replica.number for flight in flying.values()]
        self.held = max([self.held, *(numbers.count(number) for number in numbers)])


def paced(*engines: tuple[str, float, str], batch: int = 4) -> tuple[Watched, list[str]]:
    """Engines by name, delay and where they die; and what they say."""
    replicas = [
        Replica(number, ray.remote(Paced).options(num_cpus=0).remote(*given), "here")
        for number, given in enumerate(engines, 1)
    ]
    said: list[str] = []
    return Watched(replicas, "transformers", batch, say=said.append), said


def asked_for(count: int) -> list[SampleRequest]:
    """Prompts of growing length, two seeds each: with `batch` 4, two a parcel."""
    return [SampleRequest(Prompt(f"p{i}", (), (1,) * (i + 1)), (2 * i, 2 * i + 1)) for i in range(count)]


def test_parcels_keep_the_order_and_leave_nothing_out() -> None:
    assert cut([3, 1, 2, 5, 4], 2) == [[3, 1], [2, 5], [4]]
    assert cut([], 2) == []


@pytest.mark.slow
def test_the_faster_engine_gets_more_and_none_gets_more_than_it_may_hold(live_ray: None) -> None:
    """Thirty prompts, two a parcel; one engine is ten times as slow. Every prompt is answered once."""
    engines, said = paced(("slow", 0.3, ""), ("fast", 0.03, ""))
    assert engines.load(Policy("p", Path("x"), "d")) == 0.3
    groups = list(engines.sample(asked_for(30), TWO))
    assert sorted(group[0].prompt_id for group in groups) == sorted(f"p{i}" for i in range(30))
    assert all([c.seed for c in group] == list(asked_for(30)[int(group[0].prompt_id[1:])].seeds) for group in groups)
    counts = {name: sum(group[0].text == name for group in groups) for name in ("slow", "fast")}
    assert counts["fast"] > 2 * counts["slow"] >= 4
    assert [replica.answered for replica in engines.replicas] == [counts["slow"], counts["fast"]]
    assert engines.held == HELD
    assert said == []


@pytest.mark.slow
def test_a_dead_engines_prompts_go_to_the_others(live_ray: None) -> None:
    """The second dies at p3, of parcel (p2, p3), holding another one. p2 is not given twice; one line says how many."""
    engines, said = paced(("a", 0.2, ""), ("b", 0.0, "p3"))
    groups = list(engines.sample(asked_for(12), TWO))
    ids = [group[0].prompt_id for group in groups]
    assert sorted(ids) == sorted({f"p{i}" for i in range(12)})
    assert [replica.number for replica in engines.replicas] == [1]
    [ended, moved] = said
    assert ended.startswith("engine 2's process ended: ") and ended.endswith("; 1 of 2 engines go on")
    assert "\n" not in ended
    assert moved in [f"{n} unfinished prompts of engine 2 go to the other engines" for n in (3, 4)]
    # From now on it is left out.
    assert engines.load(Policy("p", Path("x"), "d")) == 0.2
    assert len(list(engines.sample(asked_for(4), TWO))) == 4


@pytest.mark.slow
def test_the_last_engine_that_dies_ends_the_run_in_one_line(live_ray: None) -> None:
    engines, said = paced(("a", 0.0, "p1"), ("b", 0.0, "load"))
    engines.load(Policy("p", Path("x"), "d"))
    assert len(said) == 1
    with pytest.raises(EngineError, match=r"^engine 1's process ended: .*it was the last of 2$") as caught:
        list(engines.sample(asked_for(4), TWO))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_scores_come_back_in_the_order_of_the_items(live_ray: None) -> None:
    engines, _ = paced(("a", 0.0, ""), ("b", 0.0, ""))
    items = [((7 * i % 11,) * (1 + i % 5), (i,)) for i in range(23)]
    assert engines.score(items) == [[float(sum(context) + sum(rest))] for context, rest in items]
    assert engines.score([]) == []


@pytest.mark.slow
def test_two_engines_answer_bit_for_bit_as_one(live_ray: None, initial: Policy, prompts: list[Prompt]) -> None:
    """The transformers engine, parcels being its own batches: tokens and log-probs of one engine in this process."""
    spec = EngineSpec(batch_size=4)
    settings = cluster.ModelSettings(initial, "small", None, False)
    actors = [cluster.start_engine_actor({"OMP_NUM_THREADS": "1"}, 0) for _ in range(2)]
    for actor in actors:
        cluster.wait(actor.build.remote("transformers", settings, spec, 64), EngineError, "the engine")
    replicas = [Replica(number, actor, "here") for number, actor in enumerate(actors, 1)]
    engines = RayEngines(replicas, "transformers", spec.batch_size, say=print)
    one = TransformersEngine(initial, spec)
    assert engines.load(initial) == one.load(initial)
    requests = [SampleRequest(prompt, (5 * i, 5 * i + 1)) for i, prompt in enumerate(prompts)]
    found = {group[0].prompt_id: group for group in engines.sample(requests, TWO)}
    assert found == {group[0].prompt_id: group for group in one.sample(requests, TWO)}
    assert all(replica.answered for replica in replicas)
    items = [(prompt.token_ids, found[prompt.id][0].token_ids) for prompt in prompts]
    assert engines.score(items) == one.score(items)


# --- policies on nodes ---


def test_files_travel_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three bytes at a time: 3 + 3 + 1, an empty file once with nothing, none twice."""
    monkeypatch.setattr("online_dpo.backends.node_files.CHUNK", 3)
    (tmp_path / "a").write_bytes(b"1234567")
    (tmp_path / "b").write_bytes(b"")
    assert list(pieces(tmp_path / "a")) == [("a", b"123"), ("a", b"456"), ("a", b"7")]
    assert list(pieces(tmp_path / "b")) == [("b", b"")]


def a_policy(folder: Path, number: int) -> Policy:
    from fakes import fake_policy

    return fake_policy(folder / str(number), f"round {number}", number)


def test_a_keeper_refuses_what_is_not_what_was_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One byte of the weights differs. The keeper's folder is another process's that has ended: it is deleted."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    dead = tmp_path / f"{PREFIX}999999999-x"
    dead.mkdir()
    keeper = NodeKeeper()
    assert not dead.exists()
    policy = a_policy(tmp_path, 1)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.1")
    for damage in (False, True):
        for file in sorted(policy.path.iterdir()):
            for name, data in pieces(file):
                keeper.append(policy.digest, name, data[:-1] + b"\0" if damage and name.endswith("tensors") else data)
        if damage:
            with pytest.raises(EngineError, match="arrived damaged on node"):
                keeper.finish(policy.digest)
        else:
            assert read_policy(keeper.finish(policy.digest)).digest == policy.digest
            keeper.drop(policy.digest)
    assert list(keeper.root.iterdir()) == []
    keeper.close()
    assert not keeper.root.exists()


@pytest.mark.parametrize("change", ["weights", "record", "gone", "more"])
def test_another_policy_under_the_same_path_is_seen(tmp_path: Path, change: str) -> None:
    """As on a machine of a cluster where the path holds another run's policy."""
    from online_dpo.backends.node_files import file_sizes

    policy = a_policy(tmp_path, 1)
    sizes = file_sizes(policy.path)
    keeper = NodeKeeper()
    try:
        assert keeper.has(policy, sizes)
        if change == "weights":  # no record beside them: they are read
            (policy.path / "policy.json").unlink()
            sizes = file_sizes(policy.path)
            assert keeper.has(policy, sizes)
            data = bytearray((policy.path / "model.safetensors").read_bytes())
            data[-1] ^= 1
            (policy.path / "model.safetensors").write_bytes(bytes(data))
        elif change == "record":
            write_policy(Policy(policy.id, policy.path, "e" * 64, probe=policy.probe))
            sizes = file_sizes(policy.path)
        elif change == "gone":
            (policy.path / "config.json").unlink()
        else:
            (policy.path / "extra.json").write_text("{}")
        assert not keeper.has(policy, sizes)
    finally:
        keeper.close()


@pytest.mark.slow
def test_weights_reach_a_node_once(live_ray: None, tmp_path: Path) -> None:
    """Asked for by three actors of the node, and again later: sent once. The oldest go, but for what stays."""
    here = ray.get_runtime_context().get_node_id()
    files = NodeFiles([here, here], copy=True)
    policies = [a_policy(tmp_path, number) for number in range(KEPT + 3)]
    first = files.bring(policies[0], [here] * 3, stay=True)[here]
    assert first.path != policies[0].path
    assert (first.digest, first.probe) == (policies[0].digest, policies[0].probe)
    for policy in policies[1:]:
        for _ in range(3):
            assert read_policy(files.bring(policy, [here])[here].path).digest == policy.digest
    assert files.sent == {here: len(policies)}
    kept = sorted(path.name for path in first.path.parent.iterdir())
    assert kept == sorted(policy.digest for policy in [policies[0], *policies[-KEPT:]])
    files.bring(policies[1], [here])
    assert files.sent == {here: len(policies) + 1}, "it had been dropped"

    trained = files.empty(here)
    for file in policies[2].path.iterdir():
        trained.mkdir(exist_ok=True)
        (trained / file.name).write_bytes(file.read_bytes())
    files.fetch(here, trained, tmp_path / "home")
    assert read_policy(tmp_path / "home").digest == policies[2].digest
    assert not trained.exists()
    files.close()
    assert not first.path.parent.exists()


@pytest.mark.slow
def test_what_a_node_sees_does_not_travel(live_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths relative to the driver's folder become whole ones: actors of a cluster are in another folder."""
    here = ray.get_runtime_context().get_node_id()
    policy = a_policy(tmp_path, 1)
    monkeypatch.chdir(tmp_path)
    relative = Policy(policy.id, Path("1"), policy.digest, probe=policy.probe)
    files = NodeFiles([here], copy=False)
    assert files.bring(relative, [here])[here].path == policy.path
    assert files.keepers == {}
    files.close()


# --- a learner without a shared run folder ---


@pytest.fixture
def blind(live_ray: None, initial: Policy) -> Iterator[tuple[SpreadLearner, NodeFiles]]:
    """One worker on a node that, it says, does not see the run folder."""
    here = ray.get_runtime_context().get_node_id()
    files = NodeFiles([here], copy=True)
    spec = LearnerSpec(threads=1)
    actor = cluster.start_learner_actor(1, {"num_cpus": 0, "num_gpus": 0})
    near = files.bring(initial, [here], stay=True)[here]
    settings = cluster.ModelSettings(near, "small", None, False)
    assert initial.probe is not None
    cluster.wait(
        cluster.build_learner([actor], [settings], spec, initial.probe.token_ids, False),
        EngineError,
        "a learner worker",
    )
    files.all_see = lambda folder, nodes: dict.fromkeys(nodes, False)  # type: ignore[method-assign]
    yield SpreadLearner([actor], [here], files, checkpoints=True), files
    files.close()
    ray.kill(actor)


@pytest.mark.slow
def test_a_policy_trained_elsewhere_comes_home(
    blind: tuple[SpreadLearner, NodeFiles], initial: Policy, pairs: list[Pair], tmp_path: Path
) -> None:
    """The same bytes as one trained in this process; nothing of it stays there; scores and probe by what was sent."""
    learner, files = blind
    job = job_of(initial, pairs, DPOSpec(lr=1e-3, batch_size=3), tmp_path / "one")
    *_, expected = learner_of(initial).train(job)
    *_, found = learner.train(replace(job, out=tmp_path / "two", cache=tmp_path / "logps.sqlite"))
    assert isinstance(expected, Policy) and isinstance(found, Policy)
    assert found.path == tmp_path / "two"
    assert found.digest == expected.digest
    assert read_policy(found.path).digest == found.digest
    assert not (tmp_path / "logps.sqlite").exists()
    assert files.sent.total() == 1, "the initial policy, once"
    [keeper] = files.keepers.values()
    root = ray.get(keeper.empty.remote()).parent
    assert [path.name for path in root.iterdir()] == [initial.digest]
    items = [(pair.prompt, pair.chosen) for pair in pairs]
    assert learner.score(found, items) == learner_of(initial).score(found, items)
    assert initial.probe is not None and found.probe is not None
    assert learner.probe(found, found.probe.token_ids) == found.probe
    assert files.sent.total() == 2


@pytest.mark.slow
def test_what_workers_keep_on_disk_needs_a_shared_folder(
    blind: tuple[SpreadLearner, NodeFiles], initial: Policy, pairs: list[Pair], tmp_path: Path
) -> None:
    learner, _ = blind
    job = job_of(initial, pairs, DPOSpec(lr=1e-3, batch_size=3), tmp_path / "next")
    with pytest.raises(ConfigError, match=r"^learner\.save_every .*1 of 1 nodes do not see .*shared file system"):
        list(learner.train(replace(job, checkpoint=tmp_path / "checkpoint")))
    with pytest.raises(ConfigError, match=r"^source: every_steps .*1 of 1 nodes do not see .*shared file system"):
        list(learner.train(replace(job, part=RoundPart(0, 1, 2, end=tmp_path / "end"))))
    assert not (tmp_path / "next").exists()
