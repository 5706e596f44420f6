"""Per-token log-probs of completions under saved policies, kept between rounds, arms and processes of a run.

The key is the digest of (policy, precision, prompt tokens, completion tokens): another policy or another answer is
another key, so nothing can be stale. Used for references whose log-probs the engine did not store.
"""

from __future__ import annotations

import hashlib
import sqlite3
from array import array
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

from online_dpo.errors import RunFolderError, one_line
from online_dpo.packing import Item

SCHEMA = "CREATE TABLE IF NOT EXISTS logps (key BLOB PRIMARY KEY, tokens BLOB NOT NULL) WITHOUT ROWID"
AT_ONCE = 500
"""Keys a query: SQLite takes a limited number of values in one."""


def cache_key(policy_digest: str, precision: str, item: Item) -> bytes:
    """The key of `item`'s completion under a policy computed in `precision` ("float32", "bfloat16")."""
    prompt, completion = item
    text = f"{policy_digest} {precision} {' '.join(map(str, prompt))} | {' '.join(map(str, completion))}"
    return hashlib.sha256(text.encode()).digest()


class LogpCache:
    """One SQLite file; opened for each call, so that processes can share it and nothing stays open."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def find(self, keys: Sequence[bytes]) -> dict[bytes, list[float]]:
        """What is known of `keys`. Raises `RunFolderError` when the file cannot be read as a cache."""
        if not self.file.exists():
            return {}
        found: dict[bytes, list[float]] = {}
        try:
            with closing(sqlite3.connect(self.file, timeout=60)) as base:
                base.execute(SCHEMA)
                for start in range(0, len(keys), AT_ONCE):
                    part = keys[start : start + AT_ONCE]
                    marks = ",".join("?" * len(part))
                    rows = base.execute(f"SELECT key, tokens FROM logps WHERE key IN ({marks})", part)  # noqa: S608
                    found.update((key, array("f", tokens).tolist()) for key, tokens in rows)
        except (sqlite3.DatabaseError, ValueError, TypeError) as error:
            raise RunFolderError(
                f"{self.file} cannot be read ({one_line(error)}); if it is damaged, delete it: it is a cache"
            ) from error
        return found

    def keep(self, values: Mapping[bytes, Sequence[float]]) -> None:
        """Add `values`; one transaction. Raises `RunFolderError` when the file cannot be written."""
        try:
            with closing(sqlite3.connect(self.file, timeout=60)) as base, base:
                base.execute(SCHEMA)
                rows = [(key, array("f", tokens).tobytes()) for key, tokens in values.items()]
                base.executemany("INSERT OR REPLACE INTO logps VALUES (?, ?)", rows)
        except sqlite3.DatabaseError as error:
            raise RunFolderError(f"{self.file} cannot be written: {one_line(error)}") from error
