"""What a process started for its Ray does not outlive it, however it ends; what else it started does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from online_dpo.backends.caretaker import KEPT, MARK, Caretaker, marked

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it reads /proc")

PARENT = """
import subprocess, sys, time
from online_dpo.backends.caretaker import Caretaker, MARK
import os
caretaker = Caretaker()
caretaker.begin()
# A child that started a grandchild in a session of its own, as Ray's servers do, and died.
code = "import subprocess; print(subprocess.Popen(['sleep', '100'], start_new_session=True).pid, flush=True)"
subprocess.run([sys.executable, "-c", code], check=True)
mark = os.environ[MARK]
caretaker.started()
other = subprocess.Popen(["sleep", "100"])
print(other.pid, mark, flush=True)
{end}
"""


@pytest.mark.parametrize(
    ("end", "sent"),
    [
        ("time.sleep(100)", signal.SIGKILL),
        ("time.sleep(100)", signal.SIGTERM),
        ("caretaker.end(); time.sleep(100)", None),
    ],
)
def test_nothing_of_it_is_left(end: str, sent: signal.Signals | None) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT.format(end=end)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        mine = int(parent.stdout.readline())
        other, mark = parent.stdout.readline().split()
        try:
            assert sent is None or marked(mark) == [mine]
            if sent is not None:
                parent.send_signal(sent)
            for _ in range(200):
                if not Path(f"/proc/{mine}").exists() or not marked(mark):
                    break
                time.sleep(0.05)
            assert marked(mark) == []
            assert Path(f"/proc/{other}").exists(), "started after, and no business of the caretaker's"
        finally:
            os.kill(int(other), signal.SIGKILL)
            parent.kill()


def test_the_mark_is_there_only_while_ray_is_started() -> None:
    caretaker = Caretaker()
    caretaker.begin()
    assert MARK in os.environ
    caretaker.started()
    assert MARK not in os.environ
    caretaker.end()
    caretaker.end()


def test_it_imports_next_to_nothing() -> None:
    """It stays for as long as the run."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-I", "-S", "-c", f"import runpy; runpy.run_path({_file()!r})"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "online_dpo" not in done.stderr
    assert "torch" not in done.stderr


def _file() -> str:
    from online_dpo.backends import caretaker

    return str(caretaker.__file__)


def test_titles_of_processes_leave_their_environment_to_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's agents would write theirs over it, mark included; what a user says of it stands."""
    monkeypatch.setenv(KEPT, "0")  # put back at the end, whatever it was
    monkeypatch.delenv(KEPT)
    caretaker = Caretaker()
    caretaker.begin()
    assert os.environ[KEPT] == "1"
    caretaker.started()
    assert KEPT not in os.environ
    monkeypatch.setenv(KEPT, "0")
    caretaker.begin()
    caretaker.started()
    assert KEPT in os.environ
    caretaker.end()
