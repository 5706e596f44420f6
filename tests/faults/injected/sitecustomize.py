"""Read by every Python that has this folder in PYTHONPATH, before anything else: does to it what the environment says.

ONLINE_DPO_FAULTS_CLOCK: `time.time` jumps. ONLINE_DPO_FAULTS_ROWS=N: the transformers engine has memory for N sequences
at once; for more, torch's own allocator is asked for more than any machine has. ONLINE_DPO_FAULTS_STOP=PATH: the
process stops (SIGSTOP) once it has made a folder whose path ends so, for the first time.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import signal
import sys
import time
from collections.abc import Sequence
from types import ModuleType
from typing import Any

JUMPS_S = (0.0, -3600.0, 3.2e8, -3600.0)
EVERY_S = 3.0
ENGINE = "online_dpo.backends.hf_engine"


def jump() -> None:
    """The time of day is another after every `EVERY_S` seconds; clocks that nobody sets go on as they do."""
    real, steady = time.time, time.monotonic
    time.time = lambda: real() + JUMPS_S[int(steady() / EVERY_S) % len(JUMPS_S)]


def stop_at(end: str) -> None:
    """Whoever waits for it does its fault, and lets the process go on."""
    real = os.mkdir

    def mkdir(path: Any, *given: Any, **named: Any) -> None:
        real(path, *given, **named)
        if os.path.abspath(path).endswith(f"/{end}"):
            os.mkdir = real
            os.kill(os.getpid(), signal.SIGSTOP)

    os.mkdir = mkdir


class LittleMemory(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads the engine's module as it is, then lets its decoding fail for more than `rows` sequences."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Only of that module."""
        if name != ENGINE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None:
            self.loader, spec.loader = spec.loader, self
        return spec

    def exec_module(self, module: ModuleType) -> None:
        """The module, with the limit."""
        assert self.loader is not None
        self.loader.exec_module(module)
        engine, rows = module.TransformersEngine, self.rows
        decode = engine._decode

        def limited(self: Any, part: Sequence[Any], sampling: Any) -> Any:
            if len(part) > rows:
                import torch

                torch.empty(2**60, dtype=torch.uint8)
            return decode(self, part, sampling)

        engine._decode = limited


if os.environ.get("ONLINE_DPO_FAULTS_CLOCK"):
    jump()
if os.environ.get("ONLINE_DPO_FAULTS_STOP"):
    stop_at(os.environ["ONLINE_DPO_FAULTS_STOP"])
if os.environ.get("ONLINE_DPO_FAULTS_ROWS"):
    sys.meta_path.insert(0, LittleMemory(int(os.environ["ONLINE_DPO_FAULTS_ROWS"])))
