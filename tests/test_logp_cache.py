"""The cache of log-probs: exact, keyed by all that they depend on, shared by processes, one line when damaged."""

from __future__ import annotations

import math
import sqlite3
import struct
import subprocess
import sys
from array import array
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from online_dpo.backends.logp_cache import AT_ONCE, LogpCache, cache_key
from online_dpo.errors import RunFolderError

ROOT = Path(__file__).resolve().parents[1]
ITEM = ([1, 2, 3], [4, 5])


def key(number: int) -> bytes:
    return cache_key("policy", "float32", ([1], [number]))


# --- keys ---


def test_key_is_of_policy_precision_and_every_token() -> None:
    """Nothing else: lists and tuples of the same tokens are the same."""
    same = cache_key("policy", "float32", ITEM)
    assert cache_key("policy", "float32", ((1, 2, 3), (4, 5))) == same
    others = [
        cache_key("other", "float32", ITEM),
        cache_key("policy", "bfloat16", ITEM),
        cache_key("policy", "float32", ([1, 2, 4], [4, 5])),
        cache_key("policy", "float32", ([1, 2, 3], [4, 6])),
        # The same tokens in a row, parted elsewhere or written alike.
        cache_key("policy", "float32", ([1, 2, 3, 4], [5])),
        cache_key("policy", "float32", ([1, 2], [3, 4, 5])),
        cache_key("policy", "float32", ([12, 3], [4, 5])),
        cache_key("policy", "float32", ([1, 23], [4, 5])),
        cache_key("policy", "float32", ([1, 2, 3], [45])),
    ]
    assert len({same, *others}) == 10


# --- what is kept comes back ---


@given(st.lists(st.floats(width=32), max_size=8))
def test_float32_comes_back_bit_for_bit(values: list[float]) -> None:
    """Denormals, −0, infinities and NaN too."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        cache = LogpCache(Path(folder) / "logps.sqlite")
        cache.keep({b"k": values})
        [found] = cache.find([b"k"]).values()
    assert len(found) == len(values)
    for a, b in zip(found, values, strict=True):
        assert (math.isnan(a) and math.isnan(b)) or struct.pack("<d", a) == struct.pack("<d", b)


def test_only_what_is_known_is_found(tmp_path: Path) -> None:
    """More keys than one query takes, every third unknown; kept in two calls."""
    cache = LogpCache(tmp_path / "logps.sqlite")
    numbers = range(3 * AT_ONCE)
    known = {key(n): [-float(n), 0.5] for n in numbers if n % 3}
    half = len(known) // 2
    cache.keep(dict(list(known.items())[:half]))
    cache.keep(dict(list(known.items())[half:]))
    assert LogpCache(tmp_path / "logps.sqlite").find([key(n) for n in numbers]) == known


def test_nothing_there(tmp_path: Path) -> None:
    """Looking makes no file; asking for nothing finds nothing."""
    cache = LogpCache(tmp_path / "logps.sqlite")
    assert cache.find([key(1)]) == {}
    assert not cache.file.exists()
    cache.keep({})
    assert cache.find([]) == {}
    assert cache.find([key(1)]) == {}


def test_keeping_again_changes_nothing_else(tmp_path: Path) -> None:
    cache = LogpCache(tmp_path / "logps.sqlite")
    cache.keep({key(1): [1.0], key(2): [2.0]})
    cache.keep({key(2): [3.0]})
    assert cache.find([key(1), key(2)]) == {key(1): [1.0], key(2): [3.0]}


# --- several processes ---

WRITER = """
import sys
from pathlib import Path
from online_dpo.backends.logp_cache import LogpCache, cache_key

cache = LogpCache(Path(sys.argv[1]))
first = int(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
for start in range(first, first + 120, 3):
    numbers = range(start, start + 3)
    cache.keep({cache_key("policy", "float32", ([1], [n])): [float(n)] * 50 for n in numbers})
    found = cache.find([cache_key("policy", "float32", ([1], [n])) for n in numbers])
    assert sorted(found.values()) == [[float(n)] * 50 for n in numbers]
"""


def test_two_processes_write_at_once(tmp_path: Path) -> None:
    """Forty transactions each into one file that neither finds there, half of the keys the same: none is lost."""
    file = tmp_path / "logps.sqlite"
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(file), first],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for first in ("0", "60")
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    ends = []
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        _, error = writer.communicate(timeout=120)
        ends.append((writer.returncode, error))
    assert ends == [(0, ""), (0, "")]
    found = LogpCache(file).find([key(n) for n in range(180)])
    assert found == {key(n): [float(n)] * 50 for n in range(180)}


def test_transaction_cut_short_is_not_there(tmp_path: Path) -> None:
    """A value that is no number in the middle: nothing of that call is kept, and the file serves on."""
    cache = LogpCache(tmp_path / "logps.sqlite")
    cache.keep({key(1): [1.0]})
    with pytest.raises(TypeError):
        cache.keep({key(2): [2.0], key(3): ["x"]})  # type: ignore[list-item]
    assert cache.find([key(1), key(2)]) == {key(1): [1.0]}


# --- damage ---


@pytest.mark.parametrize("content", [b"not a database at all, but long enough to be read as one" * 20, b"short"])
def test_file_that_is_no_cache_is_one_line(tmp_path: Path, content: bytes) -> None:
    cache = LogpCache(tmp_path / "logps.sqlite")
    cache.file.write_bytes(content)
    for use in (lambda: cache.find([key(1)]), lambda: cache.keep({key(1): [1.0]})):
        with pytest.raises(RunFolderError, match=r"logps\.sqlite cannot be") as caught:
            use()
        assert "\n" not in str(caught.value)
    assert cache.file.read_bytes() == content


def test_file_cut_in_the_middle_is_one_line(tmp_path: Path) -> None:
    """As a copy that was interrupted: the first page is whole, the others are gone."""
    cache = LogpCache(tmp_path / "logps.sqlite")
    cache.keep({key(n): [float(n)] * 200 for n in range(50)})
    whole = cache.file.read_bytes()
    cache.file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RunFolderError, match="delete it: it is a cache") as caught:
        cache.find([key(n) for n in range(50)])
    assert "\n" not in str(caught.value)


def test_row_of_another_kind_is_one_line(tmp_path: Path) -> None:
    """Seven bytes are no float32 values."""
    cache = LogpCache(tmp_path / "logps.sqlite")
    cache.keep({key(1): [1.0]})
    with sqlite3.connect(cache.file) as base:
        base.execute("UPDATE logps SET tokens = ?", (array("f", [1.0]).tobytes() + b"abc",))
    base.close()
    with pytest.raises(RunFolderError, match="delete it: it is a cache") as caught:
        cache.find([key(1)])
    assert "\n" not in str(caught.value)


def test_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="cannot be written") as caught:
        LogpCache(tmp_path / "no" / "logps.sqlite").keep({key(1): [1.0]})
    assert "\n" not in str(caught.value)
