"""Calls in threads: order, limits, faults, and what was under way when one came."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from online_dpo.errors import JudgeError
from online_dpo.judging.calling import call_all

ROOT = Path(__file__).resolve().parents[1]


def nothing(task: int) -> None:
    """A check that lets everything pass."""


def name(task: int) -> str:
    return f"call {task}"


@pytest.mark.parametrize("limit", [None, 30.0])
def test_one_at_a_time_keeps_the_order_and_begins_none_early(limit: float | None) -> None:
    seen: list[str] = []

    def call(task: int) -> int:
        seen.append(f"call {task}")
        return task * task

    for task, result in call_all(
        [3, 1, 2], call, concurrent=1, limit_s=limit, name=name, check=lambda task: seen.append(f"check {task}")
    ):
        assert result == task * task
        seen.append(f"kept {task}")
    assert seen == [f"{what} {task}" for task in (3, 1, 2) for what in ("check", "call", "kept")]


def test_without_a_limit_one_at_a_time_needs_no_thread() -> None:
    here = threading.current_thread()
    found = call_all([1], lambda task: threading.current_thread(), concurrent=1, limit_s=None, name=name, check=nothing)
    assert [thread for _, thread in found] == [here]


def test_as_many_run_at_once_as_are_asked_for_and_no_more() -> None:
    """Three calls wait for each other: fewer at once would never end. A fourth at once would break the count."""
    barrier = threading.Barrier(3, timeout=30)
    lock = threading.Lock()
    running, most = 0, 0

    def call(task: int) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        barrier.wait()
        time.sleep(0.01)
        with lock:
            running -= 1
        return task

    tasks = list(range(12))
    found = dict(call_all(tasks, call, concurrent=3, limit_s=None, name=name, check=nothing))
    assert found == {task: task for task in tasks}
    assert most == 3


def test_no_tasks_are_no_calls() -> None:
    assert list(call_all([], nothing, concurrent=4, limit_s=1.0, name=name, check=nothing)) == []


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), JudgeError("wrong key")])
def test_after_a_fault_what_runs_is_kept_and_nothing_begins(error: BaseException) -> None:
    """0 fails while 1 runs: 1 is yielded, 2 and 3 never begin, then the fault is raised."""
    both, failed = threading.Barrier(2, timeout=30), threading.Event()
    begun: list[int] = []

    def call(task: int) -> int:
        begun.append(task)
        both.wait()
        if task == 0:
            failed.set()
            raise error
        failed.wait(30)
        time.sleep(0.05)
        return task

    kept = []
    with pytest.raises(type(error)):
        for task, _ in call_all(range(4), call, concurrent=2, limit_s=None, name=name, check=nothing):
            kept.append(task)
    assert kept == [1]
    assert sorted(begun) == [0, 1]


def test_a_check_that_fails_ends_the_calling_and_keeps_what_runs() -> None:
    together = threading.Barrier(2, timeout=30)
    kept: list[int] = []

    def check(task: int) -> None:
        if kept:
            raise JudgeError("used up")

    def call(task: int) -> int:
        together.wait()
        time.sleep(0.05 * task)
        return task

    with pytest.raises(JudgeError, match="used up"):
        for task, _ in call_all(range(6), call, concurrent=2, limit_s=None, name=name, check=check):
            kept.append(task)
    assert sorted(kept) == [0, 1]


def test_a_call_past_the_limit_is_named_while_others_go_on_answering() -> None:
    """0 never answers; 1, 2, … answer every few milliseconds, so there is never a pause in which to look."""
    never = threading.Event()
    kept: list[int] = []

    def call(task: int) -> int:
        if task == 0:
            never.wait(60)
        time.sleep(0.005)
        return task

    with pytest.raises(JudgeError, match=r"^call 0 has not answered for 0\.3 s$"):
        for task, _ in call_all(range(100_000), call, concurrent=3, limit_s=0.3, name=name, check=nothing):
            kept.append(task)
    never.set()
    assert 0 not in kept
    assert kept


def test_an_answer_that_came_in_time_is_not_late_because_nobody_looked() -> None:
    """Both calls answer at once; whoever asks takes longer than the limit over the first."""
    kept = []
    for task, _ in call_all([0, 1], lambda task: task, concurrent=2, limit_s=0.2, name=name, check=nothing):
        kept.append(task)
        time.sleep(0.5)
    assert sorted(kept) == [0, 1]


def test_all_past_the_limit_is_one_error_naming_the_first() -> None:
    never = threading.Event()
    with pytest.raises(JudgeError, match=r"^call [012] has not answered for 0\.1 s$"):
        list(call_all(range(3), lambda task: never.wait(60), concurrent=3, limit_s=0.1, name=name, check=nothing))
    never.set()


def test_a_process_ends_though_a_call_never_does() -> None:
    program = (
        "import time\n"
        "from online_dpo.judging.calling import call_all\n"
        "from online_dpo.errors import JudgeError\n"
        "try:\n"
        "    list(call_all([7], lambda t: time.sleep(3600), concurrent=1, limit_s=0.2,\n"
        "                  name=lambda t: f\"judge 'x' at prompt '{t}'\", check=lambda t: None))\n"
        "except JudgeError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == "judge 'x' at prompt '7' has not answered for 0.2 s\n"
    assert done.stderr == ""
