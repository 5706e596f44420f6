"""A run folder has one owner: a living process, never what a dead one left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from online_dpo.display.progress import QuietProgress
from online_dpo.display.progress_file import RecordedProgress
from online_dpo.errors import RunFolderError
from online_dpo.run_lock import NAME, hold

HOLD = """
import sys
from pathlib import Path
from online_dpo.run_lock import hold
with hold(Path(sys.argv[1]), new=True):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_second_one_is_told_who_is_first(tmp_path: Path) -> None:
    with hold(tmp_path / "runs" / "a", new=True):
        with RecordedProgress(QuietProgress(), tmp_path / "runs" / "a") as progress:
            progress.start("on_policy · seed 0 · round 1 train", 4, "pairs")
            with pytest.raises(RunFolderError) as caught, hold(tmp_path / "runs" / "a", new=True):
                pytest.fail("both hold it")
        assert f"is in use by another process (process {os.getpid()} on " in str(caught.value)
        assert str(caught.value).endswith(", on_policy · seed 0 · round 1 train)")
    with hold(tmp_path / "runs" / "a", new=True):
        pass


def test_of_two_first_runs_one_goes_on(tmp_path: Path) -> None:
    """Eight threads make the same new folder at once: one is in, seven are told so."""
    root, ready, seen = tmp_path / "new", threading.Barrier(8), []
    done = threading.Barrier(8)

    def first() -> None:
        ready.wait()
        try:
            with hold(root, new=True):
                seen.append("in")
                done.wait()
        except RunFolderError:
            seen.append("out")
            done.wait()

    threads = [threading.Thread(target=first) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == ["in"] + ["out"] * 7


def test_what_a_killed_process_left_holds_nothing(tmp_path: Path) -> None:
    """Its lock file and its progress are there, and name a process that lives: a reused id is no owner."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(RunFolderError, match="in use by another process"), hold(tmp_path, new=True):
        pytest.fail("both hold it")
    process.kill()
    process.communicate()
    assert (tmp_path / NAME).exists()
    (tmp_path / "progress.json").write_text(json.dumps({"pid": os.getpid(), "host": "h", "stage": None}))
    with hold(tmp_path, new=True):
        pass


def test_a_folder_that_is_no_run_stays_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"is no run folder \(no manifest.json in it\)"), hold(tmp_path):
        pytest.fail("held")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(RunFolderError, match="cannot be made"), hold(tmp_path / "runs" / "a", new=True):
        pytest.fail("held")


def test_a_lock_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / NAME).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunFolderError, match="symbolic link"), hold(tmp_path, new=True):
        pytest.fail("held")
    assert not (tmp_path / "elsewhere").exists()
