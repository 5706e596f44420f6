"""How a learner on a CPU asks its memory of the operating system.

A step allocates and frees some gigabytes in pieces of a few megabytes. By glibc's defaults much of that goes back to
the system at once, and the next step pays for every page anew. Here freed memory stays, in huge pages where the system
has them: the process holds its peak between steps, which the next step needs anyway.
"""

from __future__ import annotations

import os

TUNABLES = {
    "hugetlb": 1,  # ask for transparent huge pages
    "mmap_max": 0,  # large pieces come from the heap, which is kept, not from mappings, which are not
    "trim_threshold": 2**34,
}
"""Of glibc's malloc; another C library does not read them."""


def learner_environment() -> dict[str, str]:
    """Environment variables for a learner's process; none where the user has set the allocator up already."""
    if "GLIBC_TUNABLES" in os.environ or "LD_PRELOAD" in os.environ:
        return {}
    return {"GLIBC_TUNABLES": ":".join(f"glibc.malloc.{name}={value}" for name, value in TUNABLES.items())}
