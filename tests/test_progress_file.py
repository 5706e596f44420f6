"""The file by which another process sees how far a run is: whole at any moment, seldom written, gone at the end."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from online_dpo.display.progress import QuietProgress
from online_dpo.display.progress_file import NAME, RecordedProgress


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Told(QuietProgress):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def start(self, label: str, total: int, unit: str) -> None:
        self.calls.append(("start", label, total, unit))

    def advance(self, amount: int, note: str = "") -> None:
        self.calls.append(("advance", amount, note))

    def finish(self) -> None:
        self.calls.append(("finish",))

    def say(self, line: str) -> None:
        self.calls.append(("say", line))

    def close(self) -> None:
        self.calls.append(("close",))


def written(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / NAME).read_text(encoding="utf-8"))
    return found


def test_the_file_says_what_goes_on(tmp_path: Path) -> None:
    clock = Clock()
    progress = RecordedProgress(QuietProgress(), tmp_path, clock=clock)
    assert written(tmp_path)["stage"] is None
    assert written(tmp_path)["pid"] == os.getpid()
    progress.say("the engine starts")
    progress.start("a · seed 0 · round 1 sample", 12, "answers")
    clock.now += 2
    progress.advance(3, "90 tokens/s")
    found = written(tmp_path)
    assert (found["said"], found["time"]) == ("the engine starts", 1002.0)
    assert found["stage"] == {
        "label": "a · seed 0 · round 1 sample",
        "done": 3,
        "total": 12,
        "unit": "answers",
        "note": "90 tokens/s",
        "began": 1000.0,
        "ended": None,
    }
    clock.now += 0.5
    progress.finish()
    assert written(tmp_path)["stage"]["ended"] == 1002.5


def test_it_is_written_at_most_once_a_second(tmp_path: Path) -> None:
    """Ten units in 2.5 seconds: the moments 1.0 and 2.0 after the beginning are the ones that are written."""
    clock = Clock()
    progress = RecordedProgress(QuietProgress(), tmp_path, clock=clock)
    progress.start("judge", 10, "answers")
    seen = set()
    for _ in range(10):
        clock.now += 0.25
        progress.advance(1)
        seen.add(written(tmp_path)["stage"]["done"])
    assert seen == {0, 4, 8}
    progress.finish()
    assert written(tmp_path)["stage"]["done"] == 10


def test_all_is_shown_as_before(tmp_path: Path) -> None:
    told = Told()
    with RecordedProgress(told, tmp_path) as progress:
        progress.start("pair", 1, "prompts")
        progress.advance(1, "1 pairs")
        progress.finish()
        progress.say("done")
    assert told.calls == [
        ("start", "pair", 1, "prompts"),
        ("advance", 1, "1 pairs"),
        ("finish",),
        ("say", "done"),
        ("close",),
    ]


def test_nothing_is_left_of_it_however_the_run_ends(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), RecordedProgress(QuietProgress(), tmp_path) as progress:
        progress.start("train", 4, "pairs")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_progress_without_a_stage_is_harmless(tmp_path: Path) -> None:
    progress = RecordedProgress(QuietProgress(), tmp_path)
    progress.advance(1)
    progress.finish()
    assert written(tmp_path)["stage"] is None


def test_a_clock_that_is_set_back_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of day falls by an hour in the middle of a stage, then jumps ten years ahead: the file is written on,
    and the stage took no negative time and no years."""
    now = [1.0e9]
    monkeypatch.setattr(time, "time", lambda: now[0])
    progress = RecordedProgress(QuietProgress(), tmp_path, every=0.0)
    progress.start("judge", 3, "answers")
    for jump in (-3600.0, 3.0e8, -3.0e8):
        now[0] += jump
        progress.advance(1)
        stage = written(tmp_path)["stage"]
        assert 0.0 <= written(tmp_path)["time"] - stage["began"] < 60.0
    assert stage["done"] == 3
    progress.finish()
    stage = written(tmp_path)["stage"]
    assert 0.0 <= stage["ended"] - stage["began"] < 60.0


def test_stages_of_other_threads_stand_beside_while_they_go_on(tmp_path: Path) -> None:
    told = Told()
    progress = RecordedProgress(told, tmp_path)
    progress.start("a · seed 0 · round 1 train", 4, "pairs")
    beside = progress.beside()
    beside.start("a · seed 0 · round 2 sample", 12, "answers")
    progress.finish()
    assert written(tmp_path)["stage"]["label"] == "a · seed 0 · round 1 train"
    assert [(one["label"], one["total"], one["ended"]) for one in written(tmp_path)["beside"]] == [
        ("a · seed 0 · round 2 sample", 12, None)
    ]
    beside.advance(12)
    beside.finish()
    assert written(tmp_path)["beside"] == []
    assert told.calls == [("start", "a · seed 0 · round 1 train", 4, "pairs"), ("finish",)]


def test_threads_that_tell_at_once_leave_the_file_whole(tmp_path: Path) -> None:
    """Each writing replaces the file by the same one beside it: two at a time would find it gone."""
    progress = RecordedProgress(QuietProgress(), tmp_path, every=0.0)
    faults: list[BaseException] = []

    def tell(shown: QuietProgress) -> None:
        try:
            shown.start("sample", 100, "answers")
            for _ in range(100):
                shown.advance(1)
            shown.finish()
        except OSError as error:
            faults.append(error)

    threads = [threading.Thread(target=tell, args=(progress.beside(),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert written(tmp_path)["beside"] == []
