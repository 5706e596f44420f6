"""kill -9 of the server that an LLM judge asks, in the middle of a judging; it is started again two seconds later.

The run waits, asks again what it had no answer to, and ends with the undisturbed run's bits. The server writes down
every question that it answered: none whose answer had arrived is asked again, and the ledger counts one call for each.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ground import HERE, SMALL, Ground, Outcome, kept, results, spent
from victim import Victim

AT_ONCE = 2


class Server:
    """`chat_server.py` in a process of its own."""

    def __init__(self, log: Path) -> None:
        self.log = log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self.start()

    def start(self) -> None:
        command = [sys.executable, str(HERE / "chat_server.py"), str(self.port), str(self.log)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.process.stdout.readline()  # it is up

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()

    def answered(self) -> list[str]:
        return self.log.read_text(encoding="utf-8").split() if self.log.exists() else []


def _judge(server: Server) -> dict[str, Any]:
    keys = {"model": "m", "base_url": f"http://127.0.0.1:{server.port}/v1", "concurrency": AT_ONCE, "patience_s": 300.0}
    # Of eight prompts some always have a preference, whatever the digests say of the questions.
    return {"judge": {"use": "judges.llm:LLMJudge", **keys}, "prompts": {**SMALL["prompts"], "per_round": 8}}


def inject(ground: Ground) -> Iterator[Outcome]:
    """One."""
    what = "the LLM judge's server while it is asked"
    whole, server = Server(ground.work / "whole.log"), Server(ground.work / "killed.log")
    try:
        folder, root = ground.lay(_judge(whole))
        first = Victim(folder, "run", "experiment.yaml", "--quiet")
        if first.end() != 0:
            yield Outcome(what, False, f"failed undisturbed: {first.said()}")
            return
        folder, killed = ground.lay(_judge(server))
        victim = Victim(folder, "run", "experiment.yaml", "--quiet")
        victim.until(lambda: len(server.answered()) >= 5)
        server.kill()
        time.sleep(2)
        server.start()
        status = victim.end()
        left, _ = victim.gone()
        yield Outcome(what, *_compared(status, victim, left, (root, killed), (whole, server)))
    finally:
        whole.kill()
        server.kill()


def _compared(
    status: int, victim: Victim, left: list[str], roots: tuple[Path, Path], servers: tuple[Server, Server]
) -> tuple[bool, str]:
    root, killed = roots
    whole, server = (one.answered() for one in servers)
    if status != 0 or left:
        return False, f"ended with {status}: {victim.said()} {left}"
    if results(root) != results(killed):
        return False, "another result"
    again = len(server) - len(set(server))
    calls = spent(killed), spent(root)
    fine = set(server) == set(whole) and again <= AT_ONCE and calls[0] == calls[1] == kept(killed)
    return fine, f"{len(set(server))} questions, {again} answered twice (under way at the kill), {calls[0]:g} paid"
