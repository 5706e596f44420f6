"""What ends a run from outside, and how it goes on: signals, a process that dies, a full disk, another place.

Engine and learner are fakes; the command line, the loop and the run folder are the real ones."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeEngine, FakeLearner
from test_cli import Desk, interrupting, one_line

from online_dpo.config import SamplingSpec
from online_dpo.errors import EngineError, LeftTraining
from online_dpo.files import digest
from online_dpo.leaving import ask_file
from online_dpo.protocols import SampleRequest, TrainJob, TrainStart, TrainStep
from online_dpo.types import Candidate, Policy

JUDGE = """
from online_dpo.judging import PointwiseJudge
class Mine(PointwiseJudge):
    def score(self, prompt, candidates):
        return [float(len(candidate.text)) for candidate in candidates]
"""


@pytest.fixture
def desk(tmp_path: Path, small_model: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    folder = tmp_path / "here"
    folder.mkdir()
    made = Desk(folder, small_model, monkeypatch)
    made.write()
    return made


def tables(root: Path) -> dict[str, str]:
    """Digests of all that a run computed."""
    files = [*root.rglob("*.parquet"), *root.rglob("*.safetensors")]
    return {file.relative_to(root).as_posix(): digest(file) for file in files}


def whole(desk: Desk) -> dict[str, str]:
    """Those of the run that nobody disturbs."""
    desk.engine, desk.learner = FakeEngine, FakeLearner
    assert desk("run", desk.file, "--set", "name=whole").exit_code == 0
    return tables(desk.root.with_name("whole"))


def dying(times: int) -> Callable[[list[tuple[Any, ...]]], FakeEngine]:
    """Engines of which the first `times` lose their process after one answer of their second sampling."""
    left = [times]

    class Dying(FakeEngine):
        def sample(self, requests: Sequence[SampleRequest], sampling: SamplingSpec) -> Iterator[list[Candidate]]:
            answers = super().sample(requests, sampling)
            yield next(answers)
            if left[0] and sum(call[0] == "sample" for call in self.calls) > 1:
                left[0] -= 1
                lost = EngineError("the engine's process ended")
                lost.process_ended = True
                raise lost
            yield from answers

    return Dying


def test_a_process_that_ends_is_started_anew_once(desk: Desk) -> None:
    desk.engine = dying(times=1)
    result = desk("run", desk.file)
    assert result.exit_code == 0, result.stderr
    assert result.stderr.count("the engine's process ended; all processes are started anew, once") == 1
    assert tables(desk.root) == whole(desk)


@pytest.mark.slow
def test_one_that_ends_twice_ends_the_run(desk: Desk) -> None:
    desk.engine = dying(times=2)
    result = desk("run", desk.file, "--quiet")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "online-dpo: the engine's process ended"
    desk.engine = FakeEngine
    assert desk("resume", desk.root).exit_code == 0
    assert tables(desk.root) == whole(desk)


def test_another_error_is_not_tried_again(desk: Desk) -> None:
    desk.engine = interrupting(at=2, error=EngineError("the engine holds other weights"))
    assert "anew" not in desk("run", desk.file).stderr
    assert sum(call[0] == "sample" for call in desk.calls) == 2


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_run_goes_on(desk: Desk) -> None:
    desk.engine = interrupting(at=3, error=OSError(errno.ENOSPC, "No space left on device"))
    line = one_line(desk("run", desk.file, "--quiet"), code=1)
    assert line.startswith(f"the disk is full: {desk.root}/arms/on_policy/seed_0/round_01/")
    assert " free of " in line
    desk.engine = FakeEngine
    assert desk("resume", desk.root).exit_code == 0
    assert tables(desk.root) == whole(desk)


class Terminated(FakeLearner):
    """Told by a scheduler, in the first training, to end; does at its next step what the real one does."""

    told = False

    def train(self, job: TrainJob) -> Iterator[TrainStart | TrainStep | Policy]:
        for event in super().train(job):
            yield event
            if isinstance(event, TrainStep) and not Terminated.told:
                Terminated.told = True
                os.kill(os.getpid(), signal.SIGTERM)
                assert job.checkpoint is not None and ask_file(job.checkpoint).exists()
                raise LeftTraining(f"training is kept after {event.step} steps")


def test_sigterm_lets_training_keep_its_state(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Terminated, "told", False)
    desk.learner = Terminated
    result = desk("run", desk.file, "--quiet")
    assert (result.exit_code, result.stderr) == (143, "")
    go_on = f"stopped; go on with: online-dpo resume {desk.root}\n"
    assert result.stdout == f"training is kept after 1 steps; {go_on}"
    assert list(desk.root.rglob("*.asked")) == []
    assert desk("resume", desk.root).exit_code == 0
    assert tables(desk.root) == whole(desk)


class Late(FakeLearner):
    """Told to end at the last moment: it has no step left at which it would look."""

    def train(self, job: TrainJob) -> Iterator[TrainStart | TrainStep | Policy]:
        for event in super().train(job):
            if isinstance(event, Policy):
                os.kill(os.getpid(), signal.SIGTERM)
            yield event


@pytest.mark.slow
def test_sigterm_at_the_end_of_training_keeps_the_policy(desk: Desk) -> None:
    desk.learner = Late
    assert desk("run", desk.file).exit_code == 143
    first = desk.root / "arms" / "on_policy" / "seed_0" / "round_01"
    assert sorted(path.stem for path in (first / "stages").iterdir()) == ["audit", "judge", "pair", "sample", "train"]
    desk.learner = FakeLearner
    assert desk("resume", desk.root).exit_code == 0
    assert tables(desk.root) == whole(desk)


def test_sigterm_elsewhere_leaves_at_once(desk: Desk) -> None:
    class Told(FakeEngine):
        def sample(self, requests: Sequence[SampleRequest], sampling: SamplingSpec) -> Iterator[list[Candidate]]:
            os.kill(os.getpid(), signal.SIGTERM)
            yield from super().sample(requests, sampling)

    desk.engine = Told
    result = desk("run", desk.file, "--quiet")
    assert (result.exit_code, result.stderr) == (143, "")
    assert result.stdout == f"stopped; go on with: online-dpo resume {desk.root}\n"


def test_what_breaks_while_it_is_taken_down_is_not_told(desk: Desk) -> None:
    """A backend that was interrupted raises what it likes; the person pressed Ctrl-C and knows."""

    class Broken(FakeEngine):
        def sample(self, requests: Sequence[SampleRequest], sampling: SamplingSpec) -> Iterator[list[Candidate]]:
            try:
                os.kill(os.getpid(), signal.SIGINT)
                yield from super().sample(requests, sampling)
            finally:
                raise RuntimeError("the connection was lost")

    desk.engine = Broken
    result = desk("run", desk.file, "--quiet")
    assert (result.exit_code, result.stderr) == (130, "")
    assert result.stdout == f"stopped; go on with: online-dpo resume {desk.root}\n"


def test_a_run_goes_on_where_it_was_moved_to(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the folder of its experiment, which holds a judge of the user's own."""
    (desk.folder / "mine.py").write_text(JUDGE, encoding="utf-8")
    desk.write(judge={"use": "mine:Mine"})
    desk.engine = interrupting(at=4)
    assert desk("run", desk.file).exit_code == 130
    desk.engine = FakeEngine
    expected = whole(desk)
    elsewhere = desk.folder.parent / "elsewhere" / "deeper"
    elsewhere.parent.mkdir()
    shutil.move(desk.folder, elsewhere)
    monkeypatch.chdir(elsewhere)
    monkeypatch.delitem(sys.modules, "mine")  # of the old place; another process has not imported it
    resumed = desk("resume", Path("runs") / "tiny")
    assert resumed.exit_code == 0, resumed.stderr
    assert tables(elsewhere / "runs" / "tiny") == expected
