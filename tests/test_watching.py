"""A run as its folder shows it: begun, under way, killed, finished, half laid out; and as a person sees it."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeLearner
from rich.console import Console
from test_loop import World, experiment
from typer.testing import CliRunner

from online_dpo.cli import app
from online_dpo.commands import watch as watch_command
from online_dpo.display.progress import QuietProgress
from online_dpo.display.progress_file import NAME, RecordedProgress
from online_dpo.display.watched import watched
from online_dpo.errors import RunFolderError
from online_dpo.files import digest
from online_dpo.judging import VerdictCache
from online_dpo.watching import Snapshot, WatchedRound, read_snapshot


class Killed(BaseException):
    """Stands for the process's death."""


class DyingLearner(FakeLearner):
    """The process is killed as the second round of the first arm trains."""

    def train(self, job: Any) -> Any:
        if job.policy_id.endswith("round_02"):
            raise Killed
        yield from super().train(job)


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def shown(run: Snapshot, now: float = 0.0, height: int | None = None) -> str:
    stream = io.StringIO()
    Console(file=stream, width=100).print(watched(run, now, height))
    return stream.getvalue()


def states(run: Snapshot) -> dict[tuple[str, int], str]:
    return {(one.arm, one.index): one.state for one in run.rounds}


def killed_run(root: Path) -> World:
    world = World(root, experiment(), learner=DyingLearner)
    with pytest.raises(Killed):
        world.go()
    return world


def recorded(root: Path, **changes: Any) -> None:
    """A progress file as a working process would have it."""
    stage = {"label": "on_policy · seed 0 · round 2 train", "done": 6, "total": 18, "unit": "pairs", "note": "loss 0.6"}
    stage |= {"began": 100.0, "ended": None}
    record = {"pid": os.getpid(), "host": os.uname().nodename, "time": 112.0, "said": "a line", "stage": stage}
    (root / NAME).write_text(json.dumps(record | changes), encoding="utf-8")


def test_a_finished_run(tmp_path: Path) -> None:
    world = World(tmp_path / "run", experiment()).go()
    run = read_snapshot(world.root)
    assert run.finished and not run.working
    assert set(states(run).values()) == {"done"}
    text = shown(run)
    assert "tiny: finished, 6 of 6 rounds closed" in text
    reward = world.metrics()["self_offline", 2]["held_out"]["reward"]["mean"]
    assert re.search(rf"self_offline +2 +{reward:.2f} ", text)


def test_a_run_under_way_says_stage_rate_and_time_left(tmp_path: Path) -> None:
    """6 of 18 pairs in 12 seconds: 0.5 a second, 24 seconds left."""
    world = killed_run(tmp_path / "run")
    recorded(world.root)
    run = read_snapshot(world.root)
    assert run.working and not run.finished
    assert run.stage is not None
    assert (run.stage.rate, run.stage.left) == (0.5, 24.0)
    assert states(run) == {
        ("on_policy", 0): "done",
        ("on_policy", 1): "done",
        ("on_policy", 2): "running",
        ("self_offline", 0): "waiting",
        ("self_offline", 1): "waiting",
        ("self_offline", 2): "waiting",
    }
    text = shown(run)
    assert "on_policy · seed 0 · round 2 train: 6 of 18 pairs, 0.500/s, 0:24 left, loss 0.6" in text
    assert "●●◐" in text and "round 2: train" in text and "···" in text and "waiting" in text
    assert "a line" in text


def test_stages_that_go_on_at_the_same_time_are_all_said(tmp_path: Path) -> None:
    """Two lanes: each has its line, and its arm's row says what is done."""
    world = killed_run(tmp_path / "run")
    beside = {"label": "self_offline · seed 0 · round 0 evaluate", "done": 1, "total": 3, "unit": "answers", "note": ""}
    recorded(world.root, beside=[beside | {"began": 111.0, "ended": None}])
    run = read_snapshot(world.root)
    assert states(run)["on_policy", 2] == states(run)["self_offline", 0] == "running"
    text = shown(run)
    assert "on_policy · seed 0 · round 2 train: 6 of 18 pairs" in text
    assert "self_offline · seed 0 · round 0 evaluate: 1 of 3 answers, 1.0/s, 0:02 left" in text
    assert "round 0: evaluate" in text


def test_a_killed_run_shows_where_it_stood(tmp_path: Path) -> None:
    """The folder beside the train stage tells its name; the process of the progress file is no more."""
    world = killed_run(tmp_path / "run")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    recorded(world.root, pid=gone.pid)
    run = read_snapshot(world.root)
    assert not run.working
    assert run.stage is None
    assert "no process works on it, 2 of 6 rounds closed" in shown(run)
    assert "round 2: train" in shown(run)


def test_a_process_of_another_machine_is_taken_at_its_word(tmp_path: Path) -> None:
    world = killed_run(tmp_path / "run")
    recorded(world.root, pid=2**22 + 1, host="elsewhere")
    assert read_snapshot(world.root).working


def test_between_two_stages_the_last_one_is_named(tmp_path: Path) -> None:
    world = killed_run(tmp_path / "run")
    shutil.rmtree(world.folder("on_policy", 2).path / ".train.tmp")
    assert "round 2: after pair" in shown(read_snapshot(world.root))


def test_nothing_is_written(tmp_path: Path) -> None:
    world = killed_run(tmp_path / "run")
    VerdictCache(world.root / "verdicts.sqlite").close()
    recorded(world.root)
    before = digest(world.root)
    shown(read_snapshot(world.root))
    assert digest(world.root) == before


def test_what_judges_spent_is_read_from_the_cache(tmp_path: Path) -> None:
    world = killed_run(tmp_path / "run")
    with VerdictCache(world.root / "verdicts.sqlite") as cache:
        cache.keep([], "judge", {"asked": 12, "cost": 0.25})
    assert "judges spent: asked 12, cost 0.25" in shown(read_snapshot(world.root))


def test_the_last_change_is_the_youngest_file(tmp_path: Path) -> None:
    world = killed_run(tmp_path / "run")
    for path in world.root.rglob("*"):
        os.utime(path, (1000, 1000))
    os.utime(world.root, (1000, 1000))
    os.utime(world.folder("on_policy", 1).path / "metrics.json", (1500, 1500))
    run = read_snapshot(world.root)
    assert run.changed == 1500
    assert "last change 1:05:00 ago" in shown(run, now=1500 + 3900)


# --- half-written folders ---


def test_no_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no run folder at"):
        read_snapshot(tmp_path / "none")


def test_any_part_of_a_folder_may_be_missing(tmp_path: Path) -> None:
    """Every file of a killed run is taken away in turn, and then cut in half: the rest is shown."""
    world = killed_run(tmp_path / "run")
    recorded(world.root)
    files = [path for path in sorted(world.root.rglob("*")) if path.is_file() and path.name != "experiment.yaml"]
    assert len(files) > 20
    for path in files:
        whole = path.read_bytes()
        path.unlink()
        shown(read_snapshot(world.root))
        path.write_bytes(whole[: len(whole) // 2])
        shown(read_snapshot(world.root))
        path.write_bytes(whole)
    assert states(read_snapshot(world.root))["on_policy", 1] == "done"


def test_a_folder_that_holds_nothing_yet(tmp_path: Path) -> None:
    run = read_snapshot(tmp_path)
    assert not run.finished
    assert "its folder is being laid out" in shown(run)


def test_an_experiment_of_another_version_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "experiment.yaml").write_text("name: x\nno_such_key: 1\n", encoding="utf-8")
    with pytest.raises(RunFolderError, match=r"experiment\.yaml cannot be read by this version: .*no_such_key"):
        read_snapshot(tmp_path)


# --- the screen ---


def many(rounds: int) -> Snapshot:
    closed = [
        WatchedRound("a", 0, i, "done", metrics={"arm": "a", "seed": 0, "round": i, "held_out": {"win_rate": None}})
        for i in range(rounds)
    ]
    return Snapshot("x", tuple(closed), True, None, "", 0.0, {})


def test_a_low_terminal_shows_the_last_rounds(tmp_path: Path) -> None:
    text = shown(many(40), height=24)
    assert len(text.splitlines()) <= 24
    assert "Closed rounds (the last 9 of 40)" in text
    rows = [line.split()[1] for line in text.splitlines() if line.startswith("a ") and len(line.split()) > 2]
    assert rows[-1] == "39"


def test_a_table_that_fits_is_whole() -> None:
    assert "the last" not in shown(many(4), height=24)
    assert "the last" not in shown(many(40))


def test_hostile_text_in_a_run_stays_text(tmp_path: Path) -> None:
    world = killed_run(tmp_path / "run")
    recorded(world.root, said="\x1b]0;owned\x07[red]line[/red]\x1b[2J")
    text = shown(read_snapshot(world.root))
    assert "\x1b" not in text and "\x07" not in text
    assert "[red]line[/red]" in text


# --- the command ---


def test_without_a_terminal_it_prints_once(tmp_path: Path) -> None:
    world = killed_run(tmp_path / "run")
    recorded(world.root)
    result = CliRunner().invoke(app, ["watch", str(world.root)])
    assert result.exit_code == 0, result.output
    assert result.stdout.count("2 of 6 rounds closed") == 1


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["watch", str(tmp_path / "none")])
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1 and "no run folder at" in result.stderr


def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100, height=40)
    monkeypatch.setattr("online_dpo.display.make_console", lambda: console)
    return stream


def test_on_a_terminal_it_goes_on_until_the_run_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = killed_run(tmp_path / "run")
    recorded(world.root)
    stream = terminal(monkeypatch)
    looks = []

    def later(seconds: float) -> None:
        looks.append(seconds)
        world.parts.pop("learner", None)
        world.reopen().go()

    monkeypatch.setattr(time, "sleep", later)
    watch_command.watch(world.root)
    assert looks == [2.0]
    assert "6 of 6 rounds closed" in stream.getvalue()


def test_it_ends_when_the_process_has_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = killed_run(tmp_path / "run")
    progress = RecordedProgress(QuietProgress(), world.root)
    stream = terminal(monkeypatch)
    monkeypatch.setattr(time, "sleep", lambda seconds: progress.close())
    watch_command.watch(world.root)
    assert "its process has ended; go on with: online-dpo resume" in stream.getvalue()


def test_ctrl_c_leaves_without_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = killed_run(tmp_path / "run")
    stream = terminal(monkeypatch)

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupt)
    watch_command.watch(world.root)
    assert "2 of 6 rounds closed" in stream.getvalue()
