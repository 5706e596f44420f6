"""Files that are there whole or not at all, and their digests."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MOST_JSON = 2**28
"""Bytes of a JSON file that are read: a record of a round has some thousands, with a long curve some millions."""


def write_json(path: Path, data: Any) -> None:
    """Write `data` to `path` by way of a file beside it: a reader sees the old one or the new one."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` the same way."""
    aside = path.with_name(f".{path.name}.tmp")
    aside.unlink(missing_ok=True)  # left by a killed process; or a link, which would be written through
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    sync_folder(path.parent)


def read_json(path: Path) -> Any:
    """What the JSON file at `path` holds; `OSError`, or `ValueError` for what `write_json` cannot have written."""
    size = path.stat().st_size
    if size > MOST_JSON:
        raise ValueError(f"{size} bytes are more than online-dpo writes")
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")


def sync_folder(path: Path) -> None:
    """Make renames in folder `path` durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(path: Path) -> None:
    """Make all files under `path` (a file or a folder) durable."""
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        else:
            sync_folder(file)
    if path.is_dir():
        sync_folder(path)


def digest(path: Path) -> str:
    """SHA-256 of a file, or of a folder's relative names and contents."""
    if path.is_file():
        return _file_digest(path)
    total = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        total.update(f"{file.relative_to(path).as_posix()}\0{_file_digest(file)}\n".encode())
    return total.hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_json(data: Any) -> str:
    """SHA-256 of `data` as canonical JSON."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def digest_list(items: Iterable[Any]) -> str:
    """`digest_json` of a list of `items`, which need not be held at once."""
    total = hashlib.sha256(b"[")
    for place, item in enumerate(items):
        total.update((", " if place else "").encode() + json.dumps(item, sort_keys=True, ensure_ascii=False).encode())
    total.update(b"]")
    return total.hexdigest()


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def link_tree(source: Path, target: Path) -> None:
    """`source` (a file or a folder) again at `target`: hard links, copies where the file system has none."""
    if source.is_dir():
        shutil.copytree(source, target, copy_function=_link)
    else:
        _link(str(source), str(target))


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target
