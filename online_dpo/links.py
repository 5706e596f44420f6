"""Links and special files in a run folder: refused, wherever they lead.

A folder that somebody else packed could otherwise have this process read, overwrite or delete what lies elsewhere, or
wait for ever at a pipe. The run folder's own path, and what is above it, is the user's choice and may be a link.
"""

from __future__ import annotations

import os
from pathlib import Path

from online_dpo.errors import RunFolderError

NOT_READ = frozenset({"wandb"})
"""Folders of a run that a tracker keeps for itself, links and all; nothing here reads or removes them."""


def refuse_links(root: Path) -> None:
    """Raise `RunFolderError` unless everything in folder `root` is a plain file or a folder; absent is empty."""
    folders = [str(root)]
    while folders:
        folder = folders.pop()
        try:
            entries = list(os.scandir(folder))
        except (FileNotFoundError, NotADirectoryError):  # removed since it was listed: a run may be at work
            continue
        except OSError as error:
            raise RunFolderError(f"{folder} cannot be read: {error}") from error
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                if folder != str(root) or entry.name not in NOT_READ:
                    folders.append(entry.path)
            elif not entry.is_file(follow_symlinks=False):
                _refuse(Path(entry.path))


def refuse_links_at(root: Path, path: Path) -> None:
    """The same of `path` inside the run folder `root`, of what is in it, and of the folders between the two."""
    place = root
    for part in path.relative_to(root).parts:
        place = place / part
        if place.is_symlink():
            _refuse(place)
    if path.is_dir():
        refuse_links(path)


def _refuse(path: Path) -> None:
    try:
        kind = "a symbolic link" if path.is_symlink() else "neither a file nor a folder"
        if not path.is_symlink() and not path.exists():  # removed since it was listed
            return
    except OSError as error:
        raise RunFolderError(f"{path} cannot be read: {error}") from error
    raise RunFolderError(f"{path} is {kind}: in a run folder such are not followed; put the file itself there")
