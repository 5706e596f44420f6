"""Which line of a data file is at fault: libraries say it in bytes, in blocks, or not at all."""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, cast

from online_dpo.errors import DataError

BLOCK = 1 << 20
"""Bytes that are looked at together."""
OPENERS: dict[str, Callable[[Path], object]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
CUT_OFF = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""What is raised by an archive that is none, or not whole."""
SURROGATE = re.compile("[\ud800-\udfff]")
KINDS = {list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number", type(None): "null"}


def opened(path: Path) -> IO[bytes]:
    """The bytes of `path`, decompressed where its name says that they are compressed.

    Python 3.11 opens no .zst: such a file's bytes are as they are, and `readable` says so.
    """
    opener = OPENERS.get(path.suffix)
    return path.open("rb") if opener is None else cast("IO[bytes]", opener(path))


def readable(path: Path) -> bool:
    """Whether `opened` gives what is in the file."""
    return path.suffix != ".zst"


def refuse_other_encodings(path: Path, name: str) -> None:
    """Raise `DataError`, calling the file `name`, where it is not UTF-8."""
    decoder, line = codecs.getincrementaldecoder("utf-8")(), 1
    with opened(path) as stream:
        while True:
            block = stream.read(BLOCK)
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                line += bytes(error.object)[: error.start].count(b"\n")
                raise DataError(f"{name} is not UTF-8 (line {line}): save it in that encoding") from None
            if not block:
                return
            line += block.count(b"\n")


def bad_json_line(path: Path) -> str:
    """What is wrong with the first line of `path` that is no mapping in JSON; "" where all are, or cannot be read."""
    if not readable(path):
        return ""
    try:
        with opened(path) as stream:
            faults = ((number, _line_fault(line)) for number, line in enumerate(stream, start=1))
            return next((f"line {number} {fault}" for number, fault in faults if fault), "")
    except CUT_OFF:
        return ""


def _line_fault(line: bytes) -> str:
    if not line.strip():
        return ""
    try:
        row = json.loads(line.rstrip(b"\r\n"))
    except json.JSONDecodeError as error:
        return f"is no JSON ({error.msg.removesuffix(' at')}, column {error.colno})"
    except (ValueError, RecursionError):
        return "is no JSON that can be read (a number too long, or nested too deep)"
    if not isinstance(row, dict):
        return f'is {KINDS[type(row)]}; each line is a mapping, as {{"prompt": "…"}}'
    if SURROGATE.search(json.dumps(row, ensure_ascii=False)):
        return "has half of a surrogate pair (\\ud800 to \\udfff), which is no character"
    return ""
