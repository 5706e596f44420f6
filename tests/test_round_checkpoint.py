"""A killed round goes on to the very weights that it would have had; a checkpoint is whole at every moment."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_parts import LORA, farthest, job_of, learner_of, result_of, weights_of

from online_dpo.backends import round_checkpoint
from online_dpo.backends.learner import LocalLearner
from online_dpo.backends.optimiser import make_optimiser
from online_dpo.backends.optimiser_state import MOMENTS
from online_dpo.backends.round_checkpoint import Progress, RoundCheckpoint
from online_dpo.config import DPOSpec, LoraSpec
from online_dpo.errors import LeftTraining, RunFolderError, TrainingError
from online_dpo.leaving import ask_file
from online_dpo.protocols import TrainJob, TrainStart, TrainStep
from online_dpo.types import Pair, Policy

DPO = DPOSpec(loss="bco_pair", bco_running_mean=True, lr=1e-3, batch_size=2, epochs=2, warmup=0.3, schedule="cosine")
"""Six steps; each depends on the weights, on Adam's moments, on the rate and on the running mean before it."""
SAVED_BOTH = pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])


@pytest.fixture
def job(initial: Policy, pairs: list[Pair], tmp_path: Path) -> TrainJob:
    return job_of(initial, pairs, DPO, tmp_path / "next", checkpoint=tmp_path / ".train.checkpoint")


def learner(initial: Policy, lora: LoraSpec | None = None, save_every: int | None = 2) -> LocalLearner:
    return learner_of(initial, lora=lora, save_every=save_every)


def taken(learner: LocalLearner, job: TrainJob, number: int) -> list[TrainStep]:
    """The first `number` steps; then the round is abandoned."""
    stream = learner.train(job)
    assert isinstance(next(stream), TrainStart)
    steps = [next(stream) for _ in range(number)]
    stream.close()  # type: ignore[attr-defined]
    assert all(isinstance(step, TrainStep) for step in steps)
    return [step for step in steps if isinstance(step, TrainStep)]


def untimed(steps: Sequence[TrainStep]) -> list[TrainStep]:
    return [replace(step, seconds=0.0) for step in steps]


def uninterrupted(
    initial: Policy, job: TrainJob, lora: LoraSpec | None = None
) -> tuple[list[TrainStep], list[Tensor], str]:
    whole = learner(initial, lora, save_every=None)
    _, steps, policy = result_of(whole, replace(job, out=job.out.with_name("whole"), checkpoint=None))
    return steps, weights_of(whole), policy.digest


# --- a round that was abandoned ---


@SAVED_BOTH
@pytest.mark.parametrize(("done", "kept"), [(2, 0), (3, 2), (4, 2), (5, 4), (6, 4)])
def test_abandoned_round_goes_on_as_if_nothing_had_been(
    initial: Policy, job: TrainJob, lora: LoraSpec | None, done: int, kept: int
) -> None:
    """After `done` of six steps, saved every two, once what was told of a step was taken: the weights, the policy's
    digest and every figure but seconds are an uninterrupted round's. Steps from the checkpoint are told as they were,
    seconds too; the others are computed again."""
    expected, weights, digest = uninterrupted(initial, job, lora)
    first = taken(learner(initial, lora), job, done)
    assert job.checkpoint is not None and job.checkpoint.exists() == (kept > 0)
    again = learner(initial, lora)
    computed = counted_steps(again)
    _, steps, policy = result_of(again, job)
    assert len(computed) == 6 - kept
    assert steps[:kept] == first[:kept]
    assert untimed(steps) == untimed(expected)
    assert farthest(weights_of(again), weights) == 0.0
    assert policy.digest == digest


def counted_steps(learner: LocalLearner) -> list[int]:
    """Grows by one with each forward that has gradients: one a step here."""
    seen: list[int] = []
    forward = learner.model.scores

    def counted(items: Any) -> Any:
        if torch.is_grad_enabled():
            seen.append(len(items))
        return forward(items)

    learner.model.scores = counted  # type: ignore[method-assign]
    return seen


def test_same_learner_goes_on_too(initial: Policy, job: TrainJob) -> None:
    """Ctrl-C and on again without a new process: what is in memory is not what counts."""
    _, weights, _ = uninterrupted(initial, job)
    one = learner(initial)
    taken(one, job, 5)
    result_of(one, job)
    assert farthest(weights_of(one), weights) == 0.0


def test_interrupted_twice(initial: Policy, job: TrainJob) -> None:
    expected, weights, _ = uninterrupted(initial, job)
    for done in (3, 5):
        taken(learner(initial), job, done)
    last = learner(initial)
    _, steps, _ = result_of(last, job)
    assert untimed(steps) == untimed(expected)
    assert farthest(weights_of(last), weights) == 0.0


def test_killed_between_the_last_step_and_the_policy(initial: Policy, job: TrainJob) -> None:
    """All six steps are in the checkpoint: the policy is saved from it without another."""
    expected, weights, digest = uninterrupted(initial, job)
    result_of(learner(initial), job)
    shutil.rmtree(job.out)
    again = learner(initial)
    computed = counted_steps(again)
    _, steps, policy = result_of(again, job)
    assert computed == []
    assert untimed(steps) == untimed(expected)
    assert farthest(weights_of(again), weights) == 0.0
    assert policy.digest == digest


def test_without_save_every_nothing_is_kept(initial: Policy, job: TrainJob) -> None:
    taken(learner(initial, save_every=None), job, 5)
    assert job.checkpoint is not None and not job.checkpoint.exists()


# --- a process that was killed ---


def train_and_tell(job: TrainJob, initial: Policy, lora: LoraSpec | None, pipe: Connection) -> None:
    """In a process of its own: says each step and waits to be told to go on."""
    torch.set_num_threads(1)
    for event in learner(initial, lora).train(job):
        pipe.send(event if isinstance(event, TrainStep) else None)
        pipe.recv()


@pytest.mark.slow
@SAVED_BOTH
@pytest.mark.parametrize(("done", "kept"), [(3, 2), (5, 4)])
def test_killed_process_goes_on_in_another(
    initial: Policy, job: TrainJob, lora: LoraSpec | None, done: int, kept: int
) -> None:
    """SIGKILL after the checkpoint of step 2 or 4: bit for bit the weights of a round without it."""
    expected, weights, digest = uninterrupted(initial, job, lora)
    here, there = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=train_and_tell, args=(job, initial, lora, there))
    process.start()
    first: list[TrainStep] = []
    while len(first) < done:
        assert here.poll(300)
        event = here.recv()
        first += [event] if event is not None else []
        if len(first) < done:
            here.send(None)
    process.kill()
    process.join(60)
    assert process.exitcode == -9

    again = learner(initial, lora)
    _, steps, policy = result_of(again, job)
    assert steps[:kept] == first[:kept]
    assert untimed(steps) == untimed(expected)
    assert farthest(weights_of(again), weights) == 0.0
    assert policy.digest == digest


# --- whose checkpoint it is ---


def other_jobs(job: TrainJob, other: Policy) -> dict[str, TrainJob]:
    first = job.pairs[0]
    changed = {
        "token": replace(first, chosen=replace(first.chosen, token_ids=(*first.chosen.token_ids[:-1], 300))),
        "score": replace(first, chosen_score=0.75),
    }
    return {
        "seed": replace(job, seed=1),
        "settings": replace(job, dpo=DPO.model_copy(update={"beta": 0.2})),
        "fewer pairs": replace(job, pairs=job.pairs[:5]),
        "policy": replace(job, policy=other),
        "reference": replace(job, reference=other),
        "source": replace(job, source=other),
        **{name: replace(job, pairs=(pair, *job.pairs[1:])) for name, pair in changed.items()},
    }


@pytest.mark.parametrize("name", ["seed", "settings", "fewer pairs", "policy", "reference", "source", "token", "score"])
def test_checkpoint_of_other_work_is_passed_over(
    initial: Policy, job: TrainJob, moved: Callable[..., Policy], name: str
) -> None:
    """Every step is computed, and the weights are those of a round that found no checkpoint."""
    taken(learner(initial), job, 5)
    work = other_jobs(job, moved())[name]
    found = learner(initial)
    computed = counted_steps(found)
    _, steps, _ = result_of(found, work)
    assert len(computed) == len(steps)
    expected, weights, _ = uninterrupted(initial, work)
    assert untimed(steps) == untimed(expected)
    assert farthest(weights_of(found), weights) == 0.0


def test_own_loss_whose_source_changed_is_other_work(initial: Policy, job: TrainJob, tmp_path: Path) -> None:
    """Its name and its keys are the same; half a round by the one and half by the other would be neither's."""
    folder = tmp_path / "losses"
    folder.mkdir()
    file = folder / "my_kept_loss.py"
    dpo = DPOSpec.model_validate({"loss": "my_kept_loss:mine", "lr": 1e-3, "batch_size": 2, "epochs": 2})
    work = replace(job, dpo=dpo, folders=(folder,))
    numbers: list[int] = []
    for target in (1.0, 1.0, 2.0):
        file.write_text(f"def mine(ratios, beta):\n    return (beta * ratios.delta - {target}) ** 2\n")
        again = learner(initial)
        computed = counted_steps(again)
        taken(again, work, 3 if not numbers else 4)
        numbers.append(len(computed))
    assert numbers == [3, 2, 4]


def test_refused_first_step_is_not_kept(initial: Policy, job: TrainJob, tmp_path: Path) -> None:
    """Log-probs falsified outside of the compared sample, every step saved: tried again, it is refused again."""
    answer = job.pairs[2].chosen
    false = replace(answer, logprobs=tuple(value - 30.0 for value in answer.logprobs))
    dpo = DPOSpec(lr=1e-3, batch_size=6, epochs=3)
    pairs = (*job.pairs[:2], replace(job.pairs[2], chosen=false), *job.pairs[3:])
    for _ in range(2):
        with pytest.raises(TrainingError, match="the reference's log-probs are not this policy's"):
            result_of(learner(initial, save_every=1), replace(job, dpo=dpo, pairs=pairs))
    assert job.checkpoint is not None and not job.checkpoint.exists()


# --- the files ---


class Killed(BaseException):
    """The process ends here."""


class Work:
    """A layer of three weights in training, and its checkpoint."""

    def __init__(self, folder: Path, key: str = "work") -> None:
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 1)
        self.parameters = list(self.layer.parameters())
        self.optimiser = make_optimiser(self.parameters, DPO)
        self.steps = 0
        self.checkpoint = RoundCheckpoint(folder, key)

    def step(self, number: int = 1) -> Work:
        for _ in range(number):
            self.steps += 1
            self.optimiser.zero_grad()
            (self.layer(torch.full((3,), float(self.steps))) ** 2).sum().backward()
            self.optimiser.step()
        return self

    @property
    def progress(self) -> Progress:
        steps = [
            TrainStep(n, 9, 0.1 * n, 1e-30, 0.5, 1 / 3, 1e-6, -0.1, 0.1, 7, 0.25) for n in range(1, self.steps + 1)
        ]
        return Progress(tuple(steps), delta=1 / 7, seen=3 * self.steps)

    def save(self) -> Work:
        self.checkpoint.save(self.progress, self.parameters, self.optimiser)
        return self

    def load(self) -> Progress:
        found = self.checkpoint.load(self.parameters, self.optimiser)
        self.steps = len(found.steps)
        return found

    def state(self) -> list[Tensor]:
        moments = [self.optimiser.state[p][name] for p in self.parameters for name in MOMENTS]
        return [t.detach().clone() for t in (*self.parameters, *moments)]


def same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_state_comes_back_whole(tmp_path: Path) -> None:
    """Weights, moments and counts bit for bit, what was reported to the last digit; and the next step is the same."""
    kept = Work(tmp_path / "c").step(2).save()
    found = Work(tmp_path / "c")
    assert found.load() == kept.progress
    assert same(found.state(), kept.state())
    assert same(found.step().state(), kept.step().state())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c"]


def test_nothing_there_changes_nothing(tmp_path: Path) -> None:
    work = Work(tmp_path / "c")
    before = [p.detach().clone() for p in work.parameters]
    assert work.load() == Progress()
    assert same(work.parameters, before)
    assert list(tmp_path.iterdir()) == []


def test_other_works_checkpoint_changes_nothing_and_gives_way(tmp_path: Path) -> None:
    Work(tmp_path / "c", "other").step(3).save()
    work = Work(tmp_path / "c")
    before = [p.detach().clone() for p in work.parameters]
    assert work.load() == Progress()
    assert same(work.parameters, before)
    work.step().save()
    assert len(Work(tmp_path / "c").load().steps) == 1
    assert Work(tmp_path / "c", "other").load() == Progress()


def deadly(monkeypatch: pytest.MonkeyPatch, last: int) -> list[str]:
    """From now on the process ends at the `last`-th call (from 1) that changes the disk, half way through it where it
    has a half; returns the names of the calls made."""
    made: list[str] = []

    def wrap(owner: Any, name: str, half: Callable[..., None]) -> None:
        original = getattr(owner, name)

        def called(*args: Any, **kwargs: Any) -> Any:
            made.append(name)
            if len(made) == last:
                half(*args)
                raise Killed
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, called)

    def half_removed(path: Path, *_: Any) -> None:
        for file in sorted(path.iterdir())[:1] if path.exists() else ():
            file.unlink()

    def half_written(path: Path, text: str, *_: Any) -> None:
        path.write_bytes(text.encode()[: len(text) // 2])

    def half_saved(_: Any, path: Path, *__: Any) -> None:
        path.write_bytes(b"\x40\x00")

    wrap(shutil, "rmtree", half_removed)
    wrap(Path, "mkdir", lambda *_: None)
    wrap(Path, "rename", lambda *_: None)
    wrap(Path, "write_text", half_written)
    wrap(os, "fsync", lambda *_: None)
    wrap(round_checkpoint, "save_file", half_saved)
    return made


KILL_POINTS = range(1, 20)
"""More than there are."""


def test_killed_at_any_point_of_saving(tmp_path: Path) -> None:
    """Steps 2 and 4 saved, killed while step 6 is saved: what is found is step 4 or 6, whole, and saving goes on."""
    found_steps = []
    for last in KILL_POINTS:
        folder = tmp_path / str(last) / "c"
        folder.parent.mkdir()
        work = Work(folder).step(2).save().step(2).save()
        states = {4: work.state()}
        states[6] = work.step(2).state()
        with pytest.MonkeyPatch.context() as patch:
            made = deadly(patch, last)
            with suppress(Killed):
                work.save()
        again = Work(folder)
        progress = again.load()
        found_steps.append(len(progress.steps))
        assert same(again.state(), states[found_steps[-1]])
        assert progress == again.progress
        again.step().save()
        assert len(Work(folder).load().steps) == again.steps
        assert [path.name for path in folder.parent.iterdir()] == ["c"]
        if len(made) < last:
            break
    else:
        pytest.fail("saving never ended")
    # rmtree, mkdir, both files, two fsyncs, rmtree, two renames and the last rmtree: killed in each, and in none.
    assert len(found_steps) >= 11
    assert found_steps == sorted(found_steps) and set(found_steps) == {4, 6}


def test_killed_at_any_point_of_saving_the_first(tmp_path: Path) -> None:
    """Nothing, or the whole of it."""
    found_steps = []
    for last in KILL_POINTS:
        folder = tmp_path / str(last) / "c"
        folder.parent.mkdir()
        work = Work(folder).step(2)
        with pytest.MonkeyPatch.context() as patch:
            made = deadly(patch, last)
            with suppress(Killed):
                work.save()
        again = Work(folder)
        found_steps.append(len(again.load().steps))
        again.step().save()
        assert len(Work(folder).load().steps) == again.steps
        if len(made) < last:
            break
    else:
        pytest.fail("saving never ended")
    assert found_steps == sorted(found_steps) and set(found_steps) == {0, 2}


# --- damage ---


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def other_keys(path: Path) -> None:
    path.write_text(json.dumps({"key": "work", "steps": [{"step": 1}], "delta": 0.0, "seen": 1}))


def other_shape(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    save_file({**tensors, "0.exp_avg": torch.zeros(2)}, path)


def one_less(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    del tensors["1.exp_avg_sq"]
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("state.json", cut),
        ("state.json", other_keys),
        ("state.json", lambda path: path.write_text("[]")),
        ("state.json", lambda path: path.write_bytes(b"\xff\xfe\x00")),
        ("tensors.safetensors", cut),
        ("tensors.safetensors", Path.unlink),
        ("tensors.safetensors", other_shape),
        ("tensors.safetensors", one_less),
    ],
)
def test_damaged_file_is_one_line(tmp_path: Path, file: str, damage: Callable[[Path], object]) -> None:
    folder = tmp_path / "c"
    Work(folder).step(2).save()
    damage(folder / file)
    with pytest.raises(RunFolderError, match=r"c.* is damaged \(.*\); delete it to train anew") as caught:
        Work(folder).load()
    assert "\n" not in str(caught.value)
    shutil.rmtree(folder)
    assert Work(folder).load() == Progress()


def test_damaged_checkpoint_stops_the_learner_with_one_line(initial: Policy, job: TrainJob) -> None:
    taken(learner(initial), job, 3)
    assert job.checkpoint is not None
    cut(job.checkpoint / "tensors.safetensors")
    with pytest.raises(RunFolderError, match="is damaged"):
        result_of(learner(initial), job)
    shutil.rmtree(job.checkpoint)
    assert len(result_of(learner(initial), job)[1]) == 6


# --- told to leave ---


@SAVED_BOTH
@pytest.mark.parametrize("save_every", [None, 2])
@pytest.mark.parametrize("after", [1, 6])
def test_told_to_leave_it_keeps_its_state_at_the_next_step(
    initial: Policy, job: TrainJob, lora: LoraSpec | None, save_every: int | None, after: int
) -> None:
    """Asked while step `after` of six is told of: it leaves with that step kept, and goes on as if nothing had been,
    with and without checkpoints of its own. The last step is no exception."""
    expected, weights, digest = uninterrupted(initial, job, lora)
    assert job.checkpoint is not None
    stream = learner(initial, lora, save_every).train(job)
    for _ in range(after + 1):  # the start, and the steps
        next(stream)
    ask_file(job.checkpoint).touch()
    with pytest.raises(LeftTraining, match=f"kept after {after} steps"):
        next(stream)
    assert not job.out.exists()
    ask_file(job.checkpoint).unlink()

    again = learner(initial, lora, save_every)
    computed = counted_steps(again)
    _, steps, policy = result_of(again, job)
    assert len(computed) == 6 - after
    assert untimed(steps) == untimed(expected)
    assert farthest(weights_of(again), weights) == 0.0
    assert policy.digest == digest
