"""Whether an error is a want of memory, on a GPU or on a CPU."""

from __future__ import annotations

import torch

CPU_WORDS = ("DefaultCPUAllocator", "not enough memory")
"""What torch's allocator on a CPU says in a plain `RuntimeError` (Linux, Windows)."""


def wants_memory(error: BaseException) -> bool:
    """Whether `error` says that memory did not suffice."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in CPU_WORDS)
