"""Workers that learn together meet on loopback alone: torch by itself listens on all addresses of a machine."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from watched_run import beyond_loopback, listening

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="sockets are looked up in /proc"),
]

WORKER = """
import sys, torch
from online_dpo.backends.distributed import join, summed
rank = int(sys.argv[1])
join(rank, 2, sys.argv[2])
print(int(summed(torch.tensor([rank + 1.0])).item()), flush=True)
sys.stdin.readline()
"""


def test_two_workers_listen_on_loopback_alone() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for rank in range(2)
    ]
    try:
        said = [worker.stdout.readline().strip() for worker in workers if worker.stdout]
        sockets = [one for worker in workers for one in listening(worker.pid)]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert said == ["3", "3"]
    assert any(place == address.removeprefix("tcp://") for place, _ in sockets), "the store is not found"
    assert beyond_loopback(set(sockets)) == set()


def test_the_search_sees_a_socket_that_others_can_reach() -> None:
    """One of a process of its own, open to all."""
    code = "import socket, sys; s = socket.create_server(('', 0)); print(1, flush=True); sys.stdin.readline()"
    opened = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert opened.stdout is not None and opened.stdout.readline() == b"1\n"
        assert len(beyond_loopback(listening(opened.pid))) == 1
    finally:
        opened.kill()
        opened.wait()
