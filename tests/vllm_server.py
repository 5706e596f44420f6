"""A real vLLM server with SmolLM2 on loopback, in a process group of its own that can be killed and started again."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType

from online_dpo.backends.vllm_engine import vllm_environment
from online_dpo.config import EngineSpec
from online_dpo.models import resolve_model

MODEL = "smollm2-135m-instruct"
LONGEST_START_S = 400.0


class VllmServer:
    """`url` is its chat interface. `start` waits until it answers; `kill` ends it as a crash would."""

    def __init__(self, log: Path, threads: int = 2) -> None:
        self.log = log
        self.folder = resolve_model(MODEL).path
        self.threads = threads
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.process: subprocess.Popen[bytes] | None = None

    def launch(self) -> None:
        """Start it and do not wait."""
        # The command `vllm serve` of vLLM's CPU build asks for a package named vllm and fails; the module does not.
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.folder)]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", MODEL]
        command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "2048", "--block-size", "32"]
        environment = {**os.environ, **vllm_environment(EngineSpec(), self.threads)}
        # The server keeps its engine in a process of its own.
        environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING")
        environment.pop("VLLM_LOGGING_LEVEL")
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)

    def start(self) -> float:
        """Start it; the seconds until it answers."""
        began = time.monotonic()
        self.launch()
        while not self.answers():
            assert self.process is not None
            if self.process.poll() is not None or time.monotonic() - began > LONGEST_START_S:
                self.kill()
                raise RuntimeError(f"vLLM did not start: {self.log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.5)
        return time.monotonic() - began

    def answers(self) -> bool:
        """Whether it is there."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            return False

    def kill(self) -> None:
        """SIGKILL to the server and all that it has started."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):  # ended by itself
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def completions(self) -> int:
        """How many chat requests it has answered with status 200, by its log, over all its starts."""
        return self.log.read_text(errors="replace").count('"POST /v1/chat/completions HTTP/1.1" 200')

    def __enter__(self) -> VllmServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
