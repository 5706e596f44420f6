"""A run by the real program, made once a process in one process, and copied to be spoilt and resumed."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from one_process import one_process
from runner import in_process

from experiments import written

ROOT = "runs/tiny"
Change = Callable[[Path], object]


@functools.cache
def made() -> Path:
    """A folder with experiment.yaml, its prompts and a finished run of two rounds at `ROOT`. Read only."""
    folder = Path(tempfile.mkdtemp(prefix="real-runs-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with one_process():
        ended = in_process([*written(folder, "run", rounds=2), "--quiet"], folder)
    if ended.status:
        raise RuntimeError(f"the run that cases begin with ended in: {ended.err}")
    return folder


def finished(*arguments: str, change: Change = lambda root: None) -> Callable[[Path], list[str]]:
    """This command line beside the finished run, after `change` of its folder."""

    def arrange(folder: Path) -> list[str]:
        shutil.copytree(made(), folder, dirs_exist_ok=True)
        change(folder / ROOT)
        return list(arguments)

    return arrange


def unclosed(*arguments: str, change: Change = lambda root: None) -> Callable[[Path], list[str]]:
    """The same beside a run that was stopped before it closed its second round."""

    def stopped(root: Path) -> None:
        (round_of(root, 2) / "metrics.json").unlink()
        change(root)

    return finished(*arguments, change=stopped)


def round_of(root: Path, index: int = 1) -> Path:
    """The folder of a round."""
    return root / "arms" / "on_policy" / "seed_0" / f"round_{index:02d}"
