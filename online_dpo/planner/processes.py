"""The processes that a run started on this machine: the most memory that each has held, and how old. Linux alone."""

from __future__ import annotations

import os
from pathlib import Path

ROLES = {"ray::EngineActor": "engine", "ray::LearnerActor": "learner"}
"""How the titles of engine and learner workers begin, as Ray writes them."""


def peaks(root: int | None = None) -> dict[str, int]:
    """Bytes of resident memory at its highest (VmHWM), by role, of the largest process of each role among those that
    descend from process `root` (None: this one), which is the `driver`. Empty where the system has no /proc."""
    top = os.getpid() if root is None else root
    found: dict[str, int] = {}
    for process in descendants(top):
        role = "driver" if process == top else _role(process)
        if role is not None:
            found[role] = max(found.get(role, 0), _peak(process))
    return found


def age() -> float:
    """Seconds since this process began; 0 where the system has no /proc."""
    try:
        began = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
        up = float(Path("/proc/uptime").read_text(encoding="utf-8").split()[0])
    except OSError:
        return 0.0
    return up - began / os.sysconf("SC_CLK_TCK")


def descendants(root: int) -> list[int]:
    """Process `root` and all that descend from it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
        except OSError:  # gone meanwhile
            continue
        children.setdefault(parent, []).append(int(entry.name))
    found, waiting = [], [root]
    while waiting:
        found.append(waiting.pop())
        waiting += children.get(found[-1], [])
    return found


def _role(process: int) -> str | None:
    try:
        title = Path("/proc", str(process), "cmdline").read_bytes().decode(errors="replace")
    except OSError:  # gone meanwhile
        return None
    return next((role for start, role in ROLES.items() if title.startswith(start)), None)


def _peak(process: int) -> int:
    try:
        lines = Path("/proc", str(process), "status").read_text(encoding="utf-8").splitlines()
    except OSError:  # gone meanwhile
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)
