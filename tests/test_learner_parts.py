"""A round that is trained in parts ends where the round in one go ends, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from training_parts import LORA, farthest, job_of, learner_of, result_of, weights_of

from online_dpo.backends import ray_cluster as cluster
from online_dpo.backends.learner import batch_order
from online_dpo.backends.optimiser import make_optimiser
from online_dpo.backends.optimiser_state import load_state, save_state
from online_dpo.config import DPOSpec, LearnerSpec, LoraSpec
from online_dpo.errors import LearnerError, RunFolderError
from online_dpo.protocols import RoundPart, TrainJob, TrainStep
from online_dpo.types import Pair, Policy

DPO = DPOSpec(loss="bco_pair", bco_running_mean=True, lr=1e-3, batch_size=2, warmup=0.4, schedule="cosine")
"""Three steps on six pairs; each depends on the weights, on Adam's moments, on the rate and on the running mean before
it."""
BOTH = pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])


def parts_of(job: TrainJob, k: int) -> Iterator[TrainJob]:
    """`job` in parts of `k` steps, whose pairs come in the very order of the round in one go; each begins with what is
    in the folders of the one before."""
    whole = batch_order(len(job.pairs), job.dpo, job.seed)
    for number, first in enumerate(range(0, len(whole), k)):
        batches = whole[first : first + k]
        wanted = [job.pairs[place] for batch in batches for place in batch]
        seed = job.seed + number
        shuffled = [place for batch in batch_order(len(wanted), job.dpo, seed) for place in batch]
        pairs = [wanted[shuffled.index(place)] for place in range(len(wanted))]
        folder = job.out.with_name(f"{job.out.name}-{k}-{number}")
        before = job.out.with_name(f"{job.out.name}-{k}-{number - 1}")
        begin = before / "optimiser" if number else None
        part = RoundPart(first, len(batches), len(whole), begin, folder / "optimiser")
        yield replace(job, pairs=tuple(pairs), out=folder / "policy", seed=seed, part=part)


def go(learners: Iterator[Any] | Sequence[Any], jobs: Iterator[TrainJob]) -> tuple[list[TrainStep], Policy]:
    """Each job by the next learner, from the policy that the one before has left."""
    policy: Policy | None = None
    steps: list[TrainStep] = []
    for learner, job in zip(learners, jobs, strict=False):
        _, own, policy = result_of(learner, job if policy is None else replace(job, policy=policy))
        steps += own
    assert policy is not None
    return steps, policy


def untimed(steps: Sequence[TrainStep]) -> list[TrainStep]:
    return [replace(step, seconds=0.0) for step in steps]


@BOTH
@pytest.mark.parametrize("k", [1, 2])
def test_parts_end_where_the_round_in_one_go_ends(
    initial: Policy, pairs: list[Pair], tmp_path: Path, lora: LoraSpec | None, k: int
) -> None:
    """Bit for bit, each part by a learner of its own: nothing but the folders goes from one to the next."""
    job = job_of(initial, pairs, DPO, tmp_path / "whole")
    one = learner_of(initial, lora=lora)
    _, expected, policy = result_of(one, job)
    parts = list(parts_of(job, k))
    learners = [learner_of(initial, lora=lora) for _ in parts]
    found, last = go(learners, iter(parts))
    assert len(learners) == -(-3 // k)
    assert untimed(found) == untimed(expected)
    assert farthest(weights_of(learners[-1]), weights_of(one)) == 0.0
    assert last.digest == policy.digest


def test_one_learner_goes_on_with_its_own_parts(initial: Policy, pairs: list[Pair], tmp_path: Path) -> None:
    """As in a run, where the learner lives on; and with the reference's log-probs from the cache, not the engine."""
    cache = tmp_path / "logps.sqlite"
    job = job_of(initial, pairs, DPO, tmp_path / "whole", source=None, cache=cache)
    learner = learner_of(initial)
    _, expected, policy = result_of(learner, job)
    found, last = go([learner] * 3, parts_of(job, 1))
    assert untimed(found) == untimed(expected)
    assert last.digest == policy.digest


def test_a_part_without_the_state_before_it_goes_elsewhere(initial: Policy, pairs: list[Pair], tmp_path: Path) -> None:
    """What the parts hand on matters: the second one with a fresh optimiser ends at other weights."""
    job = job_of(initial, pairs, DPO, tmp_path / "whole")
    first, second, _ = parts_of(job, 1)
    learner = learner_of(initial)
    _, _, policy = result_of(learner, first)
    assert second.part is not None
    gone_on = result_of(learner, replace(second, policy=policy))[2]
    fresh = replace(second, policy=policy, part=replace(second.part, begin=None, end=None), out=tmp_path / "fresh")
    assert result_of(learner, fresh)[2].digest != gone_on.digest


@BOTH
def test_an_abandoned_part_goes_on_from_its_checkpoint(
    initial: Policy, pairs: list[Pair], tmp_path: Path, lora: LoraSpec | None
) -> None:
    """Parts of two steps and of one, every step kept: the first part is abandoned after one step, the second after its
    only one. Its checkpoint comes before what the part before left."""
    job = job_of(initial, pairs, DPO, tmp_path / "whole")
    _, _, expected = result_of(learner_of(initial, lora=lora), job)
    first, second = (replace(part, checkpoint=tmp_path / "kept") for part in parts_of(job, 2))
    made = initial
    for part in (first, second):
        work = replace(part, policy=made)
        stream = learner_of(initial, lora=lora, save_every=1).train(work)
        for _ in range(3 if part is first else 2):  # the start, then steps; one is kept when the next is asked for
            next(stream)
        stream.close()  # type: ignore[attr-defined]
        _, _, made = result_of(learner_of(initial, lora=lora, save_every=1), work)
    assert made.digest == expected.digest


def test_a_last_step_takes_what_is_left() -> None:
    """Seven units in at most two steps of three: the second one has four."""
    whole = batch_order(7, DPOSpec(batch_size=3), seed=5)
    assert [len(batch) for batch in whole] == [3, 3, 1]
    assert batch_order(7, DPOSpec(batch_size=3), 5, 2) == [whole[0], whole[1] + whole[2]]
    assert batch_order(7, DPOSpec(batch_size=3), 5, 3) == batch_order(7, DPOSpec(batch_size=3), 5, 9) == whole


def test_only_the_first_step_of_the_round_is_checked(initial: Policy, pairs: list[Pair], tmp_path: Path) -> None:
    """The second part begins away from the reference: its first loss is not ln 2, and it is not refused."""
    job = job_of(initial, pairs, DPOSpec(lr=1e-2, batch_size=2, beta=1.0), tmp_path / "whole")
    steps, _ = go([learner_of(initial)] * 3, parts_of(job, 1))
    assert [step.step for step in steps] == [1, 2, 3]
    assert abs(steps[0].loss - 0.6931) < 1e-3 < abs(steps[1].loss - 0.6931)


# --- the state's files ---


def stepped(steps: int) -> tuple[torch.nn.Linear, torch.optim.AdamW]:
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    optimiser = make_optimiser(layer.parameters(), DPO)
    for number in range(steps):
        optimiser.zero_grad()
        (layer(torch.full((3,), 1.0 + number)) ** 2).sum().backward()
        optimiser.step()
    return layer, optimiser


def test_state_comes_back_whole(tmp_path: Path) -> None:
    layer, optimiser = stepped(3)
    parameters = list(layer.parameters())
    save_state(tmp_path / "o", parameters, optimiser, delta=1 / 7, seen=6)
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["state.json", "tensors.safetensors"]
    fresh = make_optimiser(parameters, DPO)
    assert load_state(tmp_path / "o", parameters, fresh) == (1 / 7, 6)
    for p in parameters:
        assert sorted(fresh.state[p]) == ["exp_avg", "exp_avg_sq", "step"]
        for name, tensor in fresh.state[p].items():
            assert torch.equal(tensor, optimiser.state[p][name]), name
    assert float(fresh.state[parameters[0]]["step"]) == 3.0


@pytest.mark.parametrize("file", ["state.json", "tensors.safetensors"])
@pytest.mark.parametrize("damage", ["gone", "cut", "other model"])
def test_damaged_state_is_one_line(tmp_path: Path, file: str, damage: str) -> None:
    layer, optimiser = stepped(1)
    save_state(tmp_path / "o", list(layer.parameters()), optimiser, 0.0, 2)
    path = tmp_path / "o" / file
    parameters = list(layer.parameters())
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:9])
    else:
        parameters = list(torch.nn.Linear(2, 2).parameters())
    with pytest.raises(RunFolderError, match=r"the optimiser's state in .*o is missing or damaged \(") as caught:
        load_state(tmp_path / "o", parameters, make_optimiser(parameters, DPO))
    assert "\n" not in str(caught.value)


# --- several workers ---


@pytest.fixture(params=["ddp", "fsdp"])
def group(request: pytest.FixtureRequest, initial: Policy) -> Iterator[cluster.RayLearner]:
    """Two workers, each in a process of its own."""
    assert initial.probe is not None
    cluster.start_ray()
    spec = LearnerSpec(workers=2, parallel=request.param, threads=1)
    actors = cluster.start_learner_actors(spec, 0)
    settings = cluster.ModelSettings(initial, "small", None, False)
    cluster.wait(
        cluster.build_learner(actors, [settings] * 2, spec, initial.probe.token_ids, False), LearnerError, "a worker"
    )
    yield cluster.RayLearner(actors)
    ray.shutdown()


@pytest.mark.slow
def test_parts_of_two_workers(group: cluster.RayLearner, initial: Policy, pairs: list[Pair], tmp_path: Path) -> None:
    """Workers that each hold the model, or shares of it and of the optimiser's state: the same bits as in one go."""
    job = job_of(initial, pairs, DPO, tmp_path / "whole")
    _, expected, policy = result_of(group, job)
    found, last = go([group] * 3, parts_of(job, 1))
    assert untimed(found) == untimed(expected)
    assert last.digest == policy.digest
