"""A full disk is one line that names a file and the room there is, whoever says it and in whatever words."""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from online_dpo.disk_full import readable, told_when_full
from online_dpo.errors import DiskFullError, LearnerError, RunFolderError


def no_room() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def quota() -> None:
    raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "/home/x")


def by_sqlite() -> None:
    try:
        raise sqlite3.OperationalError("database or disk is full")
    except sqlite3.Error as error:
        raise RunFolderError("the verdict cache verdicts.sqlite cannot be written") from error


def by_a_worker() -> None:
    raise LearnerError("a learner worker failed: SafetensorError: I/O error: No space left on device (os error 28)")


def while_another_error_is_handled() -> None:
    try:
        no_room()
    finally:
        raise RuntimeError("the writer was not closed")  # as pyarrow's writers do


@pytest.mark.parametrize("fails", [no_room, quota, by_sqlite, by_a_worker, while_another_error_is_handled])
def test_it_is_one_line(tmp_path: Path, fails: Callable[[], None]) -> None:
    with pytest.raises(DiskFullError) as caught, told_when_full(tmp_path):
        fails()
    line = str(caught.value)
    assert line.startswith("the disk is full: /")
    assert " free of " in line
    assert "resume the run" in line
    assert "\n" not in line


def test_the_file_named_is_the_one_under_way(tmp_path: Path) -> None:
    """The error does not name one: of those in the folder it is the last that was written to."""
    for number, name in enumerate(("candidates.parquet", "policy/model.safetensors", "a.json")):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("x")
        os.utime(file, (1000 + number % 2, 1000 + number % 2))
    named = r"the disk is full: \S+/policy/model\.safetensors cannot"
    with pytest.raises(DiskFullError, match=named), told_when_full(tmp_path):
        no_room()


def test_the_error_says_the_file_where_it_knows(tmp_path: Path) -> None:
    with pytest.raises(DiskFullError, match="/dev/full cannot be written"), told_when_full(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device", "/dev/full")


def test_a_device_that_is_really_full(tmp_path: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    with pytest.raises(DiskFullError), told_when_full(tmp_path), open("/dev/full", "w") as file:
        file.write("x")


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "denied"), ValueError("x"), LearnerError("a worker ended")])
def test_other_errors_stay_what_they_are(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as caught, told_when_full(tmp_path):
        raise error
    assert caught.value is error


def test_it_is_told_once(tmp_path: Path) -> None:
    """The stage tells of its file; the command, which would tell of the run, leaves that as it is."""
    with pytest.raises(DiskFullError) as caught, told_when_full(tmp_path), told_when_full(tmp_path / "inner"):
        no_room()
    assert str(caught.value).count("the disk is full") == 1
    assert "/inner" in str(caught.value)


def test_sizes() -> None:
    assert [readable(size) for size in (0, 999, 1000, 12_345_678, 3.4e9, 2e12)] == [
        "0 B", "999 B", "1.0 KB", "12.3 MB", "3.4 GB", "2.0 TB",
    ]  # fmt: skip
