"""A small finished run, made once a process by a toy model, and copied into the folder of each case."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from hostile_runs import small_run

RUN = "runs/words"


@functools.cache
def finished() -> Path:
    """Two arms, one seed, one round. Read only."""
    folder = Path(tempfile.mkdtemp(prefix="small-runs-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return small_run(folder / "words")


def copied(folder: Path) -> Path:
    """The run at `runs/words`, to be changed there."""
    return Path(shutil.copytree(finished(), folder / RUN))


def of_run(*arguments: str, change: Callable[[Path], object] = lambda root: None) -> Callable[[Path], list[str]]:
    """This command line in a folder that has the run, after `change` of it."""

    def arrange(folder: Path) -> list[str]:
        change(copied(folder))
        return list(arguments)

    return arrange
