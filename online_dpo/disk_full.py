"""A full disk as one line: which file, how much is free, and how to go on."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from online_dpo.errors import DiskFullError, one_line

CODES = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
WORDS = ("No space left on device", "Disk quota exceeded", "File too large", "disk is full", "os error 28")
"""What libraries say that raise something else than an `OSError`: safetensors, SQLite, a worker in another process."""


def says_full(error: BaseException) -> bool:
    """Whether `error`, or what it came from, is a disk (or a quota) that is full."""
    seen: BaseException | None = error
    for _ in range(20):  # a chain may be a ring
        if seen is None:
            return False
        if isinstance(seen, OSError) and seen.errno in CODES:
            return True
        if any(word in str(seen) for word in WORDS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


@contextmanager
def told_when_full(place: Path) -> Iterator[None]:
    """Turns what a full disk makes of writing `place` (a file, or a folder of files) into a `DiskFullError`."""
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        if not says_full(error):
            raise
        raise DiskFullError(_line(_file(error, place), error)) from error


def _line(file: Path, error: BaseException) -> str:
    usage = shutil.disk_usage(_there(file))
    return (
        f"the disk is full: {file} cannot be written ({readable(usage.free)} free of {readable(usage.total)}; "
        f"{one_line(error)}); all finished stages are kept: make room and resume the run"
    )


def _file(error: BaseException, place: Path) -> Path:
    """The file that could not be written: the one that the error names, else the one that `place` was left at."""
    if isinstance(error, OSError) and isinstance(error.filename, str):
        return Path(error.filename)
    files = [path for path in place.rglob("*") if path.is_file()] if place.is_dir() else []
    return max(files, key=lambda path: path.stat().st_mtime_ns, default=place)


def _there(path: Path) -> Path:
    """`path`, or the nearest folder above it that is there."""
    return next((place for place in (path, *path.parents) if place.exists()), Path("."))


def readable(size: float) -> str:
    """Bytes for people: "0 B", "12.0 KB", "3.4 GB"."""
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
