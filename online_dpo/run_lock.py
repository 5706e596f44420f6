"""One process at a time works on a run folder.

The lock is the kernel's, on the open file `.lock`: it goes with the process however that ends, so a file that a killed
process left behind holds nothing, and no process id is ever compared with one that may be another's by now. Where a
file system has no such locks, `filelock` writes its holder into a file of its own and looks whether that still lives.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from online_dpo.errors import RunFolderError, one_line
from online_dpo.run_hint import no_run

NAME = ".lock"


def check_room(root: Path) -> None:
    """Raise `RunFolderError` where the run folder `root` could not be made; makes nothing."""
    there = next(path for path in (root, *root.parents, Path()) if os.path.lexists(path))
    if not there.is_dir():
        raise RunFolderError(f"the run folder {root} cannot be made: {there} is no folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise RunFolderError(f"the run folder {root} cannot be made: {there} cannot be written to")


@contextmanager
def hold(root: Path, *, new: bool = False) -> Iterator[None]:
    """Hold the run folder `root`, which is made first with `new`.

    Raises `RunFolderError` when another process holds it, there is none, or it cannot be made or written to.
    """
    from filelock import FileLock, Timeout

    if new:
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(f"the run folder {root} cannot be made: {error}") from error
    elif not (root / "manifest.json").exists():  # nothing is put into a folder that is none
        raise no_run(root)
    if (root / NAME).is_symlink():
        raise RunFolderError(f"{root / NAME} is a symbolic link: in a run folder such are not followed; remove it")
    lock = FileLock(root / NAME)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        from online_dpo.display.progress_file import read_worker

        raise RunFolderError(f"{root} is in use by another process{read_worker(root)}") from None
    except OSError as error:
        raise RunFolderError(f"the run folder {root} cannot be written to: {one_line(error)}") from error
    try:
        yield
    finally:
        lock.release()
