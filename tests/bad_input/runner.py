"""Runs a case as its user would, and says what is wrong with how it ended."""

from __future__ import annotations

import gc
import hashlib
import os
import re
import signal
import sqlite3
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from io import TextIOWrapper
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

from case import Case

LONGEST = 600
"""Characters of the line that a user is expected to read."""
UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""What a terminal or a reader's eye obeys."""
PROGRAM = "from online_dpo.cli import main; main()"
SECONDS = 300
"""A command that takes longer hangs."""


@dataclass(frozen=True)
class Ended:
    """What a command said, and its exit status."""

    status: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """Of standard error, without empty ones."""
        return [line for line in self.err.splitlines() if line.strip()]


@dataclass(frozen=True)
class Outcome:
    """How a case ended; `faults` is empty when it ended as it should."""

    case: Case
    ended: Ended
    faults: tuple[str, ...]

    @property
    def went_on(self) -> bool:
        """Whether the input was right, or was to be."""
        return self.case.goes_on or (self.case.may_go_on and self.ended.status == 0)

    @property
    def traced(self) -> bool:
        """Whether a traceback was printed."""
        return "Traceback" in self.ended.err + self.ended.out

    @property
    def line(self) -> str:
        """What the user read: the one line, or of an input that goes on the first line of the output."""
        return next(iter(self.ended.lines or self.ended.out.splitlines()), "")


Run = Callable[[Sequence[str], Path], Ended]


def run_case(case: Case, run: Run | None = None) -> Outcome:
    """Arrange `case` in an empty folder, run its command there, and look at all that it left."""
    with TemporaryDirectory(prefix="bad-input-") as name:
        folder = Path(name)
        arguments = case.arrange(folder)
        before = snapshot(folder)
        with case.around():
            ended = (run or in_process)(arguments, folder)
        after = snapshot(folder)
    outcome = Outcome(case, ended, ())
    said = (_wrong_success if outcome.went_on else _wrong_refusal)(case, ended)
    return replace(outcome, faults=(*said, *_lost(before, after, new_may_be=outcome.went_on or case.begun)))


# --- running ---


def in_process(arguments: Sequence[str], folder: Path) -> Ended:
    """The program's own entry point in this process, in `folder`; what a case changes of the process is put back."""
    modules = set(sys.modules)
    argv, path, here = sys.argv, list(sys.path), Path.cwd()
    environment, bytecode = dict(os.environ), sys.dont_write_bytecode
    term = signal.getsignal(signal.SIGTERM)
    sys.argv, sys.dont_write_bytecode = ["online-dpo", *arguments], True
    os.chdir(folder)
    try:
        with _caught() as (out, err):
            status = _main()
            # What an object says as it goes (an unclosed file, an exception in __del__) belongs to this case.
            gc.collect()
        return Ended(status, _read(out), _read(err))
    finally:
        os.chdir(here)
        sys.argv, sys.path[:], sys.dont_write_bytecode = argv, path, bytecode
        os.environ.clear()
        os.environ.update(environment)
        signal.signal(signal.SIGTERM, term)
        for name in set(sys.modules) - modules:
            if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(folder)):
                del sys.modules[name]


def _main() -> int:
    """The exit status of the entry point, as Python would give it."""
    from online_dpo.cli import main

    try:
        main()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def in_subprocess(arguments: Sequence[str], folder: Path) -> Ended:
    """The program in a process of its own, in `folder`; one that hangs is ended, with all that it started."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONIOENCODING": "utf-8"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        err += f"\nhung for {SECONDS} seconds".encode()
    return Ended(process.returncode, out.decode("utf-8", "replace"), err.decode("utf-8", "replace"))


def _stream(errors: str) -> TextIOWrapper:
    return TextIOWrapper(TemporaryFile(buffering=0), encoding="utf-8", errors=errors, write_through=True)


# One of each for the whole process: a library's logger keeps the stream that it found when it was imported.
_OUT, _ERR = _stream("strict"), _stream("backslashreplace")


@contextmanager
def _caught() -> Iterator[tuple[TextIOWrapper, TextIOWrapper]]:
    """Standard output and error, of Python and of what lies below it, go into files."""
    former = sys.stdout, sys.stderr
    for stream in (*former, _OUT, _ERR):
        stream.flush()
    kept = os.dup(1), os.dup(2)
    for stream in (_OUT, _ERR):
        os.ftruncate(stream.fileno(), 0)
        os.lseek(stream.fileno(), 0, os.SEEK_SET)
    try:
        os.dup2(_OUT.fileno(), 1)
        os.dup2(_ERR.fileno(), 2)
        sys.stdout, sys.stderr = _OUT, _ERR
        yield _OUT, _ERR
    finally:
        sys.stdout, sys.stderr = former
        for number, (stream, old) in enumerate(zip((_OUT, _ERR), kept, strict=True), start=1):
            stream.flush()
            os.dup2(old, number)
            os.close(old)


def _read(stream: TextIOWrapper) -> str:
    size = os.fstat(stream.fileno()).st_size
    return os.pread(stream.fileno(), size, 0).decode("utf-8", "replace")


# --- looking ---


def _wrong_refusal(case: Case, ended: Ended) -> list[str]:
    """What is wrong with the way in which a bad input was refused."""
    lines, wrong = ended.lines, []
    if case.exit_code is None and ended.status == 0:
        wrong.append("was accepted")
    elif case.exit_code is not None and ended.status != case.exit_code:
        wrong.append(f"exit status {ended.status}, not {case.exit_code}")
    wrong += _trace(ended)
    if len(lines) != 1:
        wrong.append(f"{len(lines)} lines: {lines[:3]!r:.300}")
        return wrong
    if not lines[0].startswith("online-dpo: "):
        wrong.append("does not say which program speaks")
    if not re.search(case.says, lines[0]):
        wrong.append(f"does not say {case.says!r}")
    if len(lines[0]) > LONGEST:
        wrong.append(f"a line of {len(lines[0])} characters")
    if UNSEEN.search(lines[0]):
        wrong.append("control characters in the line")
    return wrong


def _wrong_success(case: Case, ended: Ended) -> list[str]:
    """What is wrong with the way in which an odd but right input went on."""
    if ended.status != 0:
        return [f"exit status {ended.status}", *_trace(ended)]
    wrong = _trace(ended)
    if ended.lines:
        wrong.append(f"on standard error: {ended.lines[:3]!r:.300}")
    if not re.search(case.says, ended.out):
        wrong.append(f"does not say {case.says!r}")
    if UNSEEN.search(ended.out):
        wrong.append("control characters in the output")
    return wrong


def _trace(ended: Ended) -> list[str]:
    return [f"a traceback: {ended.err[-300:]!r}"] if "Traceback" in ended.err + ended.out else []


def snapshot(folder: Path) -> dict[str, str]:
    """What lies under `folder`: relative path -> a digest of the file, where the link leads, or "folder"."""
    return {str(path.relative_to(folder)): _kind(path) for path in sorted(folder.rglob("*"))}


def _kind(path: Path) -> str:
    if path.is_symlink():
        return f"link to {os.readlink(path)}"
    if path.is_file():
        return hashlib.sha256(_rows(path) or path.read_bytes()).hexdigest()
    return "folder" if path.is_dir() else "neither file nor folder"


def _rows(path: Path) -> bytes:
    """What a database's tables hold: opening one may change its bytes. Empty for what is none."""
    if path.suffix != ".sqlite":
        return b""
    try:
        with closing(sqlite3.connect(f"file:{path}?immutable=1", uri=True)) as base:
            return "\n".join(base.iterdump()).encode()
    except sqlite3.Error:
        return b""


def _lost(before: dict[str, str], after: dict[str, str], *, new_may_be: bool) -> list[str]:
    """What was there and is not as it was; without `new_may_be` also what was left behind, but for a run's lock.

    With it a cache of verdicts may have grown.
    """
    wrong = [
        f"{name!r} was {'changed' if name in after else 'lost'}"
        for name in before
        if after.get(name) != before[name] and not (new_may_be and name in after and name.endswith(".sqlite"))
    ]
    if not new_may_be:
        new = [name for name in after if name not in before]
        wrong += [f"{name!r} was left behind" for name in new if Path(name).name != ".lock"]
    return wrong
