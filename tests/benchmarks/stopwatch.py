"""Seconds and peak memory of a step, on a CPU (memory of the process) or on a GPU (memory that torch took there)."""

from __future__ import annotations

import time

import torch
import turns


class Stopwatch:
    """`start`, work, `stop`."""

    def __init__(self) -> None:
        self.on_gpu = torch.cuda.is_available()
        self.began = 0.0

    def start(self) -> None:
        """Begin, with the peak of memory at what is held now."""
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            turns.reset_peak()
        self.began = time.perf_counter()

    def stop(self) -> turns.Said:
        """Seconds since `start`, and the peak in MiB."""
        if self.on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.began
        peak = torch.cuda.max_memory_allocated() / 2**20 if self.on_gpu else turns.peak_mib()
        return {"seconds": seconds, "peak_mib": peak}
