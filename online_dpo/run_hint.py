"""What somebody may have meant who named a folder that is no run folder."""

from __future__ import annotations

from pathlib import Path

from online_dpo.errors import RunFolderError, nearest

MANIFEST = "manifest.json"
MOST = 200
"""Folders that are looked into."""


def no_run(root: Path) -> RunFolderError:
    """The error for `root`, with the nearest run where there is one."""
    return RunFolderError(f"{root} is no run folder (no {MANIFEST} in it){run_hint(root)}")


def run_hint(root: Path) -> str:
    """What was meant: the run in this folder, one of a name like it, or the command for an experiment's file; or ""."""
    if root.suffix in (".yaml", ".yml") and root.is_file():
        return f"; an experiment is begun, or gone on with, by 'online-dpo run {root}'"
    inside = _runs(root)
    if len(inside) == 1:
        return f" (did you mean '{root / inside[0]}'?)"
    if inside:
        return f"; runs in it: {', '.join(inside[:5])}{', …' if len(inside) > 5 else ''}"
    beside = {str(root.parent / name): name for name in _runs(root.parent)}
    return nearest(str(root), beside)


def _runs(folder: Path) -> list[str]:
    """The names of the run folders in `folder`."""
    try:
        return [path.name for path in sorted(folder.iterdir())[:MOST] if (path / MANIFEST).is_file()]
    except OSError:
        return []
