"""Ctrl-C and SIGTERM: what the first does, what a second does, and that nothing of it stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from online_dpo.leaving import INTERRUPTED, TERMINATED, Leaving, ask_file


class AtOnce(BaseException):
    """In these tests the process does not end."""


def at_once(status: int) -> NoReturn:
    raise AtOnce(status)


def heeding(leaving: Leaving, told: Callable[[], None]) -> BaseException | None:
    """What ends `told` while signals are heeded."""
    with leaving.heeded(at_once):
        try:
            told()
        except BaseException as error:  # whatever it is
            return error
    return None


def tell(*signals: signal.Signals) -> None:
    for number in signals:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, INTERRUPTED), (signal.SIGTERM, TERMINATED)])
def test_the_first_signal_stops_the_run(number: signal.Signals, status: int) -> None:
    leaving, seen = Leaving(), []

    def told() -> None:
        try:
            tell(number)
        finally:
            seen.append(leaving.status)

    assert isinstance(heeding(leaving, told), KeyboardInterrupt)
    assert seen == [status] == [128 + number]


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_after_a_signal_leaves_at_once(first: signal.Signals) -> None:
    def told() -> None:
        try:
            tell(first)
        except KeyboardInterrupt:
            tell(signal.SIGINT)

    error = heeding(Leaving(), told)
    assert isinstance(error, AtOnce)
    assert error.args == (INTERRUPTED,)


def test_a_scheduler_may_send_sigterm_twice() -> None:
    """The second one, while the first is heeded, changes nothing."""

    def told() -> None:
        try:
            tell(signal.SIGTERM)
        finally:
            tell(signal.SIGTERM)

    assert isinstance(heeding(Leaving(), told), KeyboardInterrupt)


def test_sigterm_in_training_asks_the_learner_and_waits(tmp_path: Path) -> None:
    leaving, checkpoint = Leaving(), tmp_path / ".train.checkpoint"
    ask_file(checkpoint).touch()  # of a process that was killed

    def told() -> None:
        with leaving.by_checkpoint(checkpoint):
            assert not ask_file(checkpoint).exists()
            tell(signal.SIGTERM)
            assert ask_file(checkpoint).exists()
        assert list(tmp_path.iterdir()) == []
        leaving.leave_if_told()

    assert isinstance(heeding(leaving, told), KeyboardInterrupt)


def test_ctrl_c_in_training_waits_for_nobody(tmp_path: Path) -> None:
    leaving = Leaving()

    def told() -> None:
        with leaving.by_checkpoint(tmp_path / "c"):
            tell(signal.SIGINT)

    assert isinstance(heeding(leaving, told), KeyboardInterrupt)


def test_without_room_for_the_question_the_run_stops(tmp_path: Path) -> None:
    leaving = Leaving()

    def told() -> None:
        with leaving.by_checkpoint(tmp_path / "no" / "such" / "folder" / "c"):
            tell(signal.SIGTERM)

    assert isinstance(heeding(leaving, told), KeyboardInterrupt)


def test_handlers_and_what_was_told_are_gone_afterwards() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    leaving = Leaving()
    heeding(leaving, lambda: tell(signal.SIGINT))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert leaving.status is None
    leaving.leave_if_told()


TWICE = """
import time
from online_dpo.leaving import LEAVING, leave_at_once
with LEAVING.heeded(lambda status: leave_at_once("stopped; go on with: X", status)):
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("cleaning", flush=True)
        time.sleep(60)
"""


def test_a_real_process_told_twice_is_gone_without_a_trace() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", TWICE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "cleaning\n"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=20)
    assert process.returncode == INTERRUPTED
    assert said == "\nstopped; go on with: X\n"
