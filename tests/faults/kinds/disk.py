"""A disk that is full in every stage: the run folder lies on a small file system in memory. The driver stops itself as
the stage's folder is made, the free room is taken, and it goes on.

The run ends in one line that names a file and how much is free, with status 1, without a trace; its finished stages are
whole. With room again it goes on, and ends with the undisturbed run's bits. The file system is mounted, which takes
root: without it the script starts itself anew in a user namespace of its own, and where that is not allowed the kind is
left out, which is said.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ground import Ground, Outcome, Reference, at_kill, injected
from victim import Victim

SIZE = "24m"
FREE = 6 * 2**20
"""What is left free until the stage begins: more than a round writes."""
STAGES = ("sample", "judge", "audit", "pair", "train", "off_policy", "evaluate")


def inject(ground: Ground) -> Iterator[Outcome]:
    """One a stage of a round."""
    if os.geteuid() != 0:
        print("disk: left out: a file system can be mounted by root alone; try: unshare -rm make faults", flush=True)
        return
    reference = ground.reference()
    for stage in STAGES:
        if ground.options.only in stage:
            folder, root = ground.lay()
            with _mounted(folder / "runs") as mount:
                yield _filled(ground, reference, stage, (folder, root, mount))


@contextmanager
def _mounted(place: Path) -> Iterator[Path]:
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def _fill(mount: Path, free: int, name: str) -> None:
    """Take the file system's room but for `free` bytes."""
    room = os.statvfs(mount)
    taken = room.f_bavail * room.f_frsize - free
    if taken > 0:
        with (mount / name).open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, taken)


def _filled(ground: Ground, reference: Reference, stage: str, place: tuple[Path, Path, Path]) -> Outcome:
    folder, root, mount = place
    what = f"no room while it writes '{stage}'"
    _fill(mount, FREE, "most")
    victim = Victim(folder, "run", "experiment.yaml", "--quiet", environment=injected("STOP", f".{stage}.tmp"))
    if not victim.until(lambda: victim.stands_still):
        return Outcome(what, False, f"was never at {stage}: {victim.said()}")
    while os.statvfs(mount).f_bavail:
        _fill(mount, 0, f"rest_{os.statvfs(mount).f_bavail}")
    victim.go_on()
    status, line = victim.end(), victim.error()
    left, _ = victim.gone()
    if status != 1 or not line.startswith("online-dpo: the disk is full: ") or " free of " not in line or left:
        return Outcome(what, False, f"ended with {status}: {victim.said()} {left}")
    kills = [at_kill(root)]
    for file in mount.glob("*"):
        if file.is_file():
            file.unlink()
    again = Victim(folder, "resume", str(root), "--quiet")
    difference = ground.same(root, reference, kills) if again.end() == 0 else again.said()
    return Outcome(what, not difference, difference or line.removeprefix("online-dpo: ")[:150])
