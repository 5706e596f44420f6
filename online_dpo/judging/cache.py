"""What judges said, on disk: asked once, never again. One SQLite file; memory does not grow with it.

A key ends with the SHA-256 of the judge's digest, the prompt's id and messages, and the candidates' texts, tokens and
finish reasons in their order: a changed judge, prompt or answer is another key. It begins with 8 bytes of the SHA-256
of judge and prompt alone, so that a prompt's answers lie side by side in the file: one page is read or written for all
of them, and not one for each once the file is larger than memory. Beside the answers stands the ledger: what each judge
has spent, over all processes that shared the file.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from array import array
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from online_dpo.errors import RunFolderError, one_line
from online_dpo.judging.answers import Answer
from online_dpo.judging.interface import Abstention, Opinion
from online_dpo.types import Candidate, Prompt

LOOKED_UP_AT_ONCE = 500
PAGES_KEPT_KIB = 65_536
"""Memory for pages, at most."""
PAGES_LOGGED = 16_384
"""Pages of 4 KiB that the log holds before they are written to their places: 64 MiB."""
PLACE = 8
"""Bytes of a key that say where in the file it lies."""
FORMAT = 2


def answer_key(judge: str, prompt: Prompt, candidates: Sequence[Candidate]) -> bytes:
    """The key of what judge `judge` (a digest) says of these candidates, in this order."""
    hasher = hashlib.sha256()
    for text in (judge, prompt.id, *(part for message in prompt.messages for part in (message.role, message.content))):
        _add(hasher, text)
    place = hasher.digest()[:PLACE]
    for candidate in candidates:
        hasher.update(b"\x00candidate")
        _add(hasher, candidate.text)
        _add(hasher, candidate.finish_reason)
        hasher.update(array("q", [len(candidate.token_ids), *candidate.token_ids]).tobytes())
    return place + hasher.digest()


def _add(hasher: hashlib._Hash, text: str) -> None:
    data = text.encode("utf-8", "surrogatepass")
    # The length first: ("ab", "c") and ("a", "bc") are not the same.
    hasher.update(len(data).to_bytes(8, "big") + data)


class VerdictCache:
    """The file. Any number of threads and processes may share it; those that share an object take turns."""

    def __init__(self, path: Path) -> None:
        """Open or make `path`; `RunFolderError` when it cannot be, or is no such file."""
        self.path = path
        self._turn = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.connection = sqlite3.connect(path, timeout=60.0, isolation_level=None, check_same_thread=False)
            # A killed process loses nothing that was committed; a power cut may lose the last transactions.
            self.connection.execute("PRAGMA journal_mode=WAL")
            self.connection.execute("PRAGMA synchronous=NORMAL")
            # Keys are digests: each prompt meets another page. So pages stay in memory, and many prompts share the
            # writing of one; by SQLite's own 2 MB and 1,000 pages inserting slows down as the file grows.
            self.connection.execute(f"PRAGMA cache_size=-{PAGES_KEPT_KIB}")
            self.connection.execute(f"PRAGMA wal_autocheckpoint={PAGES_LOGGED}")
            with self.connection:
                self.connection.execute("BEGIN IMMEDIATE")
                found = self.connection.execute("PRAGMA user_version").fetchone()[0]
                if found not in (0, FORMAT):
                    raise RunFolderError(f"{path} has cache format {found}, this version reads format {FORMAT}")
                self.connection.execute(
                    "CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, said TEXT NOT NULL) WITHOUT ROWID"
                )
                self.connection.execute(
                    "CREATE TABLE IF NOT EXISTS ledger (judge TEXT, item TEXT, amount REAL, PRIMARY KEY (judge, item))"
                )
                self.connection.execute(f"PRAGMA user_version={FORMAT}")
        except (sqlite3.Error, OSError) as error:
            raise RunFolderError(f"the verdict cache {path} cannot be opened: {one_line(error)}") from error

    def __enter__(self) -> VerdictCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        self.connection.close()

    def __len__(self) -> int:
        return int(self._read("SELECT COUNT(*) FROM answers")[0][0])

    def find(self, keys: Sequence[bytes]) -> dict[bytes, list[Answer]]:
        """What was said, of those of `keys` that were asked before."""
        found: dict[bytes, list[Answer]] = {}
        for start in range(0, len(keys), LOOKED_UP_AT_ONCE):
            some = keys[start : start + LOOKED_UP_AT_ONCE]
            marks = ",".join("?" * len(some))
            for key, said in self._read(f"SELECT key, said FROM answers WHERE key IN ({marks})", some):  # noqa: S608
                found[bytes(key)] = _decode(said, self.path)
        return found

    def keep(self, rows: Iterable[tuple[bytes, Sequence[Answer]]], judge: str, spent: Mapping[str, float]) -> None:
        """Write answers and what they cost, together or not at all. Passing abstentions are left out.

        What another process wrote meanwhile stays: an answer once kept never changes.
        """
        lasting = sorted((key, _encode(said)) for key, said in rows if not any(_passing(answer) for answer in said))
        if not lasting and not spent:
            return
        try:
            with self._turn, self.connection:
                self.connection.execute("BEGIN IMMEDIATE")
                self.connection.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?)", lasting)
                self.connection.executemany(
                    "INSERT INTO ledger VALUES (?, ?, ?) "
                    "ON CONFLICT (judge, item) DO UPDATE SET amount = amount + excluded.amount",
                    [(judge, item, amount) for item, amount in spent.items()],
                )
        except sqlite3.Error as error:
            raise RunFolderError(f"the verdict cache {self.path} cannot be written: {one_line(error)}") from error

    def spent(self, judge: str | None = None) -> dict[str, float]:
        """The ledger's totals: of one judge (its digest), or of all."""
        return dict(
            self._read(
                "SELECT item, SUM(amount) FROM ledger WHERE ? IS NULL OR judge = ? GROUP BY item", (judge, judge)
            )
        )

    def _read(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        try:
            with self._turn:
                return self.connection.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise RunFolderError(f"the verdict cache {self.path} cannot be read: {one_line(error)}") from error


def read_spent(path: Path) -> dict[str, float]:
    """The ledger's totals in the cache at `path`, by a connection that cannot write; empty where there is none yet."""
    if not path.is_file():
        return {}
    # Even a reader would lay out the log of what is not in the file yet, where no writer has.
    alone = not path.with_name(f"{path.name}-wal").exists()
    address = f"{path.resolve().as_uri()}?mode=ro{'&immutable=1' if alone else ''}"
    try:
        with closing(sqlite3.connect(address, uri=True)) as connection:
            rows = connection.execute("SELECT item, SUM(amount) FROM ledger GROUP BY item").fetchall()
    except sqlite3.Error:
        # No table yet, or a write of another process at this very moment: the next look will tell.
        return {}
    return {str(item): float(amount) for item, amount in rows if isinstance(amount, int | float)}


def _passing(answer: Answer) -> bool:
    return isinstance(answer, Abstention) and answer.passing


def _encode(said: Sequence[Answer]) -> str:
    rows = [
        {"abstains": answer.reason}
        if isinstance(answer, Abstention)
        else {"value": answer.value, **({"details": dict(answer.details)} if answer.details else {})}
        for answer in said
    ]
    return json.dumps(rows, separators=(",", ":"))


def _decode(said: str, path: Path) -> list[Answer]:
    try:
        return [
            Abstention(row["abstains"]) if "abstains" in row else Opinion(float(row["value"]), row.get("details", {}))
            for row in json.loads(said)
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunFolderError(f"the verdict cache {path} is damaged: {one_line(error)}") from error
