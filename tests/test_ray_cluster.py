"""Real Ray: errors that arrive as themselves, processes that die, and a learner of two workers."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from training_parts import PAIR_EACH, job_of, learner_of

from online_dpo.backends import ray_cluster as cluster
from online_dpo.backends.caretaker import marked
from online_dpo.backends.hf_engine import TransformersEngine
from online_dpo.config import DPOSpec, EngineSpec, LearnerSpec, SamplingSpec
from online_dpo.errors import (
    ConfigError,
    EngineError,
    JudgeError,
    LearnerError,
    ModelError,
    OnlineDPOError,
    TrainingError,
)
from online_dpo.protocols import SampleRequest, TrainStart, TrainStep
from online_dpo.types import Pair, Policy, Prompt

ROOT = Path(__file__).resolve().parents[1]
DPO = DPOSpec(lr=1e-3, batch_size=3, epochs=2, warmup=0.25)
"""Six pairs in batches of three: one worker has two of each, the other one."""


@pytest.fixture(scope="module")
def live_ray() -> Iterator[None]:
    """One Ray for the file. Actors import the project from this checkout; what is defined here is sent to them whole
    (importing this file would cost each a second torch)."""
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


@pytest.fixture(scope="module")
def settings(initial: Policy) -> cluster.ModelSettings:
    return cluster.ModelSettings(initial, "small", None, False)


@pytest.fixture(scope="module")
def workers(live_ray: None, settings: cluster.ModelSettings) -> Iterator[list[Any]]:
    """Two learner workers in a group, alive for the whole file as they are for a whole run."""
    assert settings.initial.probe is not None
    spec = LearnerSpec(workers=2, threads=1, tokens_per_pass=PAIR_EACH)
    actors = cluster.start_learner_actors(spec, 0)
    address = cluster.wait(actors[0].address.remote(), EngineError, "learner worker 0")
    building = [
        actor.build.remote(rank, 2, address, settings, spec, list(settings.initial.probe.token_ids), False)
        for rank, actor in enumerate(actors)
    ]
    cluster.wait(building, EngineError, "a learner worker")
    yield actors
    for actor in actors:
        ray.kill(actor)


@pytest.fixture(scope="module")
def engine(live_ray: None, settings: cluster.ModelSettings) -> cluster.RayEngine:
    actor = cluster.start_engine_actor({"OMP_NUM_THREADS": "1"}, 0)
    kind = cluster.wait(actor.build.remote("transformers", settings, EngineSpec(), 64), EngineError, "the engine")
    return cluster.RayEngine(actor, kind)


def one_line(error: OnlineDPOError) -> str:
    text = str(error)
    assert "\n" not in text
    assert len(text) < 600
    return text


# --- errors ---


class Faulty:
    """Fails as it is told, at once or in the middle of a stream."""

    def fail(self, error: Exception) -> None:
        raise error

    def stream(self, error: Exception) -> Iterator[int]:
        yield 1
        raise error

    def count(self, number: int) -> Iterator[int]:
        for value in range(number):  # noqa: UP028 - Ray asks a generator for `send`, which a range lacks
            yield value

    def answer(self) -> int:
        return 42


class Slow:
    """Streams until its process ends; the engine's and the learner's interface."""

    def process(self) -> int:
        return os.getpid()

    def sample(self, requests: object, sampling: object) -> Iterator[list[int]]:
        yield [1]
        time.sleep(600)
        yield [2]

    def train(self, job: object) -> Iterator[int]:
        yield 1
        time.sleep(600)
        yield 2


def slow() -> tuple[Any, int]:
    """The actor and its process."""
    actor: Any = ray.remote(Slow).options(num_cpus=0).remote()
    return actor, ray.get(actor.process.remote())


@pytest.fixture(scope="module")
def faulty(live_ray: None) -> Any:
    return ray.remote(Faulty).options(num_cpus=0).remote()


@pytest.mark.parametrize("kind", [TrainingError, ConfigError, EngineError, JudgeError])
def test_the_projects_own_errors_arrive_as_themselves(faulty: Any, kind: type[OnlineDPOError]) -> None:
    """Same class (so the same exit code) and the same words, with no remote trace in them."""
    with pytest.raises(OnlineDPOError) as caught:
        cluster.wait(faulty.fail.remote(kind("step 3: loss nan")), EngineError, "the engine")
    assert type(caught.value) is kind
    assert str(caught.value) == "step 3: loss nan"


def test_other_errors_are_told_in_one_line(faulty: Any) -> None:
    with pytest.raises(EngineError) as caught:
        cluster.wait(faulty.fail.remote(ValueError("first line\nsecond line")), EngineError, "the engine")
    assert one_line(caught.value) == "the engine failed: ValueError: first line second line"


def test_kind_of_error_is_the_callers(faulty: Any) -> None:
    with pytest.raises(TrainingError, match="learner worker 0 failed: RuntimeError: x"):
        cluster.wait(faulty.fail.remote(RuntimeError("x")), TrainingError, "learner worker 0")


def test_one_failure_among_several_answers(faulty: Any) -> None:
    with pytest.raises(ConfigError, match="bad"):
        cluster.wait([faulty.answer.remote(), faulty.fail.remote(ConfigError("bad"))], EngineError, "the engine")
    assert cluster.wait([faulty.answer.remote(), faulty.answer.remote()], EngineError, "the engine") == [42, 42]


def test_workers_that_do_not_end_together(live_ray: None) -> None:
    """One says two things, the other one: a fault of the project's own, told instead of a policy half trained."""
    actors = [ray.remote(Faulty).options(num_cpus=0).remote() for _ in range(2)]
    streams = [
        actor.count.options(num_returns="streaming").remote(number)
        for actor, number in zip(actors, (2, 1), strict=True)
    ]
    found = cluster.in_step(streams)
    assert next(found) == 0
    with pytest.raises(LearnerError, match="only 1 of 2 learner workers went on"):
        next(found)


@pytest.mark.parametrize("together", [True, False])
def test_a_worker_that_fails_alone_ends_the_run(live_ray: None, together: bool) -> None:
    """Both fail: training cannot go on, and the next arm may use the workers. One alone has left the other inside a
    sum: a `TrainingError` would let the next arm begin with such a group."""
    actors = [ray.remote(Faulty).options(num_cpus=0).remote() for _ in range(2)]
    bad = actors[0].stream.options(num_returns="streaming").remote(TrainingError("not finite"))
    other = actors[1].stream if together else actors[1].count
    argument = TrainingError("not finite") if together else 2
    found = cluster.in_step([bad, other.options(num_returns="streaming").remote(argument)])
    next(found)
    kind, line = (TrainingError, "^not finite$") if together else (LearnerError, "^learner worker 0 alone: not finite$")
    with pytest.raises(kind, match=line):
        next(found)


def test_error_in_the_middle_of_a_stream(faulty: Any) -> None:
    """What came before it arrives, then the error itself."""
    stream = iter(faulty.stream.options(num_returns="streaming").remote(TrainingError("half way")))
    assert cluster.wait(next(stream), EngineError, "the engine") == 1
    with pytest.raises(TrainingError, match=r"^half way$"):
        cluster.wait(next(stream), EngineError, "the engine")


def test_killed_process_is_one_line(live_ray: None) -> None:
    """By the operating system, as for want of memory."""
    actor, process = slow()
    waiting = actor.sample.options(num_returns=2).remote([], None)[0]
    os.kill(process, signal.SIGKILL)
    with pytest.raises(EngineError) as caught:
        cluster.wait(waiting, EngineError, "the engine")
    assert one_line(caught.value).startswith("the engine's process ended: ")


def test_engine_killed_while_it_samples(live_ray: None) -> None:
    """Between two prompts: the first's answers came, then one line."""
    actor, process = slow()
    stream = cluster.RayEngine(actor, "slow").sample([], SamplingSpec())
    assert next(stream) == [1]  # type: ignore[comparison-overlap]
    os.kill(process, signal.SIGKILL)
    with pytest.raises(EngineError) as caught:
        next(stream)
    assert one_line(caught.value).startswith("the engine's process ended: ")


@pytest.mark.parametrize("victim", [0, 1])
def test_learner_worker_killed_while_it_trains(live_ray: None, initial: Policy, tmp_path: Path, victim: int) -> None:
    """Either of two, the other still at work: the round ends instead of waiting for the one that is gone."""
    actors, processes = zip(*(slow() for _ in range(2)), strict=True)
    learner = cluster.RayLearner(actors)
    stream = learner.train(job_of(initial, [], DPO, tmp_path / "x"))
    assert next(stream) == 1  # type: ignore[comparison-overlap]
    os.kill(processes[victim], signal.SIGKILL)
    with pytest.raises(LearnerError) as caught:
        next(stream)
    assert "process ended" in one_line(caught.value)
    ray.kill(actors[1 - victim])


# --- resources ---


def test_workers_have_the_threads_that_they_were_given(workers: list[Any]) -> None:
    """Ray would set OMP_NUM_THREADS itself; torch in the worker follows what `learner.threads` says."""

    def threads(_: Any) -> tuple[str, int]:
        return os.environ["OMP_NUM_THREADS"], torch.get_num_threads()

    assert ray.get([worker.__ray_call__.remote(threads) for worker in workers]) == [("1", 1), ("1", 1)]


# --- two workers ---


def test_two_workers_train_the_policy_that_one_does(
    workers: list[Any], initial: Policy, pairs: list[Pair], tmp_path: Path
) -> None:
    """Four steps on three pairs each, split 2 and 1, a pass for each pair; alone, all in one pass. Gradients are added
    in another order, so float error, which Adam turns into at most 0.2 % of the way that the weights go (0.04 %
    measured)."""
    single = learner_of(initial)
    before = [p.detach().clone() for p in single.model.trainable]
    expected = list(single.train(job_of(initial, pairs, DPO, tmp_path / "one", seed=3)))
    found = list(cluster.RayLearner(workers).train(job_of(initial, pairs, DPO, tmp_path / "two", seed=3)))

    assert [type(item) for item in found] == [TrainStart, *[TrainStep] * 4, Policy]
    start, *steps, policy = found
    assert isinstance(start, TrainStart) and start.reference_from == "engine"
    for step, other in zip(steps, expected[1:-1], strict=True):
        assert isinstance(step, TrainStep) and isinstance(other, TrainStep)
        assert step.loss == pytest.approx(other.loss, abs=1e-5)
        assert step.margin == pytest.approx(other.margin, abs=1e-4)
        assert step.accuracy == other.accuracy or other.margin == pytest.approx(0.0, abs=1e-5)
        assert step.grad_norm == pytest.approx(other.grad_norm, rel=1e-3)
        assert (step.r_w, step.r_l) == pytest.approx((other.r_w, other.r_l), abs=1e-3)
        assert (step.step, step.steps, step.lr, step.tokens) == (other.step, other.steps, other.lr, other.tokens)

    one = [p.detach().clone() for p in single.model.trainable]
    assert isinstance(policy, Policy)
    assert (policy.id, policy.path) == ("next", tmp_path / "two")
    single.model.load(policy)
    two = [p.detach().clone() for p in single.model.trainable]
    between = math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(one, two, strict=True)))
    went = math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(one, before, strict=True)))
    assert went > 0.1
    assert between / went < 2e-3


def test_workers_hold_the_same_weights_afterwards(
    workers: list[Any], initial: Policy, pairs: list[Pair], tmp_path: Path
) -> None:
    """Bit for bit: each added the same sums. Were a gradient not shared, they would part at the first step."""
    stream = cluster.RayLearner(workers).train(job_of(initial, pairs, DPO, tmp_path / "next"))
    assert isinstance(list(stream)[-1], Policy)

    def weights(actor: Any) -> list[torch.Tensor]:
        return [p.detach() for p in actor.learner.model.trainable]

    first, second = ray.get([worker.__ray_call__.remote(weights) for worker in workers])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_worker_without_a_share(workers: list[Any], initial: Policy, pairs: list[Pair], tmp_path: Path) -> None:
    """One pair for two workers: the second adds zeros, and the step is that of one worker alone. The reference's
    log-probs are computed (falsified ones do not serve), so the share of that pass is empty too."""
    chosen = replace(pairs[0].chosen, logprobs=tuple(value + 1.0 for value in pairs[0].chosen.logprobs))
    changed = [replace(pairs[0], chosen=chosen)]
    results = [
        list(learner.train(job_of(initial, changed, DPO, tmp_path / name)))
        for name, learner in (("one", learner_of(initial)), ("two", cluster.RayLearner(workers)))
    ]
    for start, first, second, _ in results:
        assert isinstance(start, TrainStart) and start.reference_from == "learner"
        assert isinstance(first, TrainStep) and isinstance(second, TrainStep)
    (_, _, one, _), (_, _, two, _) = results
    assert isinstance(one, TrainStep) and isinstance(two, TrainStep)
    assert two.loss == pytest.approx(one.loss, abs=1e-5)
    assert two.grad_norm == pytest.approx(one.grad_norm, rel=1e-3)
    assert two.tokens == one.tokens


def test_scores_of_two_workers_keep_the_order(workers: list[Any], initial: Policy, pairs: list[Pair]) -> None:
    """Eleven items, six to one and five to the other."""
    items = [(p.prompt, answer) for p in pairs for answer in (p.chosen, p.rejected)][:11]
    found = cluster.RayLearner(workers).score(initial, items)
    assert len(found) == 11
    for values, (_, answer) in zip(found, items, strict=True):
        assert values == pytest.approx(list(answer.logprobs), abs=1e-4)


def test_one_item_for_two_workers(workers: list[Any], initial: Policy, pairs: list[Pair]) -> None:
    [values] = cluster.RayLearner(workers).score(initial, [(pairs[0].prompt, pairs[0].chosen)])
    assert values == pytest.approx(list(pairs[0].chosen.logprobs), abs=1e-4)


def test_probe_of_two_workers(workers: list[Any], initial: Policy, moved: Callable[..., Policy]) -> None:
    """By another process than the one that saved the policy: up to rounding."""
    policy = moved()
    assert policy.probe is not None
    probe = cluster.RayLearner(workers).probe(policy, policy.probe.token_ids)
    assert probe.token_ids == policy.probe.token_ids
    assert list(probe.logprobs) == pytest.approx(list(policy.probe.logprobs), abs=1e-5)
    cluster.RayLearner(workers).rest()


def test_failed_round_leaves_the_workers_usable(
    workers: list[Any], initial: Policy, pairs: list[Pair], tmp_path: Path
) -> None:
    """A loss that is not finite on both: a TrainingError, no policy, and the next round trains."""
    learner = cluster.RayLearner(workers)
    wild = DPO.model_copy(update={"lr": 1e20, "warmup": 0.0, "clip": 1e9})
    with pytest.raises(TrainingError, match="the last good policy is kept"):
        list(learner.train(job_of(initial, pairs, wild, tmp_path / "bad")))
    assert not (tmp_path / "bad").exists()
    *_, policy = learner.train(job_of(initial, pairs, DPO, tmp_path / "next"))
    assert isinstance(policy, Policy)


# --- the engine's process ---


def test_engine_in_its_process_answers_as_in_this_one(
    engine: cluster.RayEngine, initial: Policy, prompts: list[Prompt], moved: Callable[..., Policy]
) -> None:
    """Loaded, sampled and switched through Ray: the same tokens from the same seeds."""
    policy = moved(scale=0.1)
    local = TransformersEngine(initial, EngineSpec())
    requests = [SampleRequest(prompt, (5, 6)) for prompt in prompts]
    sampling = SamplingSpec(n=2, max_tokens=12)
    for held in (initial, policy):
        assert engine.load(held) < 1e-4
        local.load(held)
        found, expected = list(engine.sample(requests, sampling)), list(local.sample(requests, sampling))
        assert [[c.token_ids for c in g] for g in found] == [[c.token_ids for c in g] for g in expected]
    engine.rest()


def test_engine_with_the_wrong_weights_says_so(
    engine: cluster.RayEngine, initial: Policy, moved: Callable[..., Policy]
) -> None:
    with pytest.raises(EngineError, match="does not hold the weights of moved-1"):
        engine.load(replace(moved(), probe=initial.probe))


def test_model_that_does_not_load_keeps_its_own_error(engine: cluster.RayEngine, tmp_path: Path) -> None:
    """Built in the actor by a call, not by its constructor: Ray would tell of a dead actor instead."""
    (tmp_path / "config.json").write_text("{}")
    nothing = cluster.ModelSettings(Policy("initial", tmp_path, "d"), "nothing", None, False)
    with pytest.raises(OnlineDPOError) as caught:
        cluster.wait(engine.actor.build.remote("transformers", nothing, EngineSpec(), 64), EngineError, "the engine")
    assert type(caught.value) is ModelError
    assert str(tmp_path) in one_line(caught.value)


# --- at the end: it takes one of the file's two workers away ---


def test_other_worker_notices_that_its_group_is_broken(
    workers: list[Any], initial: Policy, pairs: list[Pair], tmp_path: Path
) -> None:
    """Real training, the second worker killed between two of many steps: no policy, one line, and no endless wait."""
    process = ray.get(workers[1].__ray_call__.remote(lambda _: os.getpid()))
    long = DPO.model_copy(update={"epochs": 2000})
    stream = cluster.RayLearner(workers).train(job_of(initial, pairs, long, tmp_path / "next"))
    assert isinstance(next(stream), TrainStart)
    assert isinstance(next(stream), TrainStep)
    os.kill(process, signal.SIGKILL)
    with pytest.raises(LearnerError) as caught:
        list(stream)
    assert one_line(caught.value).startswith("learner worker ")
    assert not (tmp_path / "next").exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it reads /proc")
def test_what_ends_rays_processes_sees_them_all(live_ray: None) -> None:
    """Also its two agents, which write a title where /proc shows a process's environment."""
    agents = {"ray::DashboardAgent", "ray::RuntimeEnvAgent"}
    limit = time.monotonic() + 60
    while time.monotonic() < limit:
        lines = [Path(f"/proc/{process}/cmdline").read_bytes() for process in marked(cluster._caretaker._mark)]
        titles = {line.replace(b"\0", b" ").decode(errors="replace").strip() for line in lines}
        if agents <= titles:
            break
        time.sleep(0.1)
    assert agents <= titles
    assert any("raylet/raylet" in title for title in titles)
