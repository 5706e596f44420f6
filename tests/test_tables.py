"""Parquet files a part at a time: what is in them does not depend on the parts."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from online_dpo import tables
from online_dpo.errors import RunFolderError
from online_dpo.files import digest, digest_json, digest_list
from online_dpo.tables import TableReader, TableWriter, column_values, each_row, keep_rows, read_rows, write_rows

SCHEMA = pa.schema([("name", pa.string()), ("tokens", pa.list_(pa.int32())), ("score", pa.float64())])
GROUP = 7
rows = st.lists(
    st.fixed_dictionaries(
        {
            "name": st.text(st.characters(codec="utf-8"), max_size=5),
            "tokens": st.lists(st.integers(-(2**31), 2**31 - 1), max_size=4).map(tuple),
            "score": st.none() | st.floats(allow_nan=False),
        }
    ),
    max_size=40,
)
"""Up to six row groups."""
sizes = st.lists(st.integers(0, 12), min_size=1, max_size=12)


@pytest.fixture(autouse=True, scope="module")
def small_parts() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "GROUP", GROUP)
        patch.setattr(tables, "READ", 3)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tables")


def write_in_parts(path: Path, whole: list[dict[str, Any]], parts: list[int]) -> None:
    with TableWriter(path, SCHEMA) as file:
        start = 0
        for size in [*parts, len(whole)]:
            file.add(pa.Table.from_pylist(whole[start : start + size], schema=SCHEMA))
            start += size


@settings(max_examples=15, deadline=None)
@given(whole=rows, parts=sizes, other=sizes)
def test_bytes_do_not_depend_on_the_parts_that_were_written(
    folder: Path, whole: list[dict[str, Any]], parts: list[int], other: list[int]
) -> None:
    for name, own in (("one", parts), ("other", other)):
        write_in_parts(folder / name, whole, own)
    assert digest(folder / "one") == digest(folder / "other")
    assert read_rows(folder / "one", SCHEMA) == whole
    groups = pq.ParquetFile(folder / "one").metadata
    found = [groups.row_group(i).num_rows for i in range(groups.num_row_groups)]
    assert sum(found) == len(whole)
    assert all(size == GROUP for size in found[:-1])


@settings(max_examples=15, deadline=None)
@given(whole=rows, parts=sizes)
def test_rows_are_taken_in_any_parts(folder: Path, whole: list[dict[str, Any]], parts: list[int]) -> None:
    write_rows(folder / "taken", SCHEMA, whole)
    with TableReader(folder / "taken", SCHEMA, ["score", "name"]) as file:
        assert len(file) == len(whole)
        found = [row for size in parts for row in file.take(size).to_pylist()]
        found += [row for batch in file.batches() for row in batch.to_pylist()]
        assert file.take(1).num_rows == 0
    assert found == [{"name": row["name"], "score": row["score"]} for row in whole]


@settings(max_examples=15, deadline=None)
@given(whole=rows, data=st.data())
def test_only_the_rows_at_these_places_stay(folder: Path, whole: list[dict[str, Any]], data: st.DataObject) -> None:
    places = sorted(data.draw(st.sets(st.integers(0, len(whole) - 1)) if whole else st.just(set())))
    write_rows(folder / "kept", SCHEMA, whole)
    keep_rows(folder / "kept", SCHEMA, places)
    assert read_rows(folder / "kept", SCHEMA) == [whole[place] for place in places]
    assert not (folder / "kept.all").exists()


def test_what_a_reader_holds_does_not_grow_with_the_file(folder: Path) -> None:
    """Texts that hardly can be compressed, 7 kB a row group."""
    random = Random(0)
    held = []
    for groups in (2, 40):
        whole = [{"name": random.randbytes(GROUP * 1000).hex(), "tokens": (), "score": None} for _ in range(groups)]
        with TableWriter(folder / "long", SCHEMA) as file:
            for row in whole:
                file.add(pa.Table.from_pylist([row] + [{**row, "name": ""}] * (GROUP - 1), schema=SCHEMA))
        del whole
        before = pa.total_allocated_bytes()
        with TableReader(folder / "long", SCHEMA) as reader:
            held.append(max(pa.total_allocated_bytes() - before for _ in reader.batches()))
    assert held[1] < 1.5 * held[0]


def test_a_file_that_was_cut_off_is_named_wherever_it_is_read(folder: Path) -> None:
    path = folder / "cut"
    write_rows(path, SCHEMA, [{"name": "a", "tokens": (1,), "score": None}] * 50)
    data = bytearray(path.read_bytes())
    data[40 : len(data) // 2] = bytes(len(data) // 2 - 40)  # the pages, not the footer that says where they are
    path.write_bytes(bytes(data))
    with pytest.raises(RunFolderError, match="cut is missing or damaged"):
        read_rows(path, SCHEMA)


def test_columns_of_another_form_are_named(folder: Path) -> None:
    write_rows(folder / "form", SCHEMA, [])
    other = pa.schema([*list(SCHEMA)[:2], ("score", pa.int64())])
    with pytest.raises(RunFolderError, match="column 'score' holds double, not int64"):
        list(each_row(folder / "form", other))
    with pytest.raises(RunFolderError, match="has columns"):
        TableReader(folder / "form", pa.schema([("name", pa.string())]))


@pytest.mark.parametrize(
    "values",
    [[], [[]], [[1, 2], [], [3]], [[1], None, [2]], [[1, None], [2]]],
    ids=["no row", "empty", "full", "a row that is null", "a number that is null"],
)
def test_lists_are_tuples_also_in_a_slice(values: list[Any]) -> None:
    wanted = [None if value is None else tuple(value) for value in values]
    column = pa.array([[9, 9], *values, [8]], pa.list_(pa.int32())).slice(1, len(values))
    assert column_values(column) == wanted
    assert column_values(pa.chunked_array([column.slice(0, 1), column.slice(1)])) == wanted


things = st.recursive(
    st.none() | st.integers() | st.text(max_size=3), lambda inner: st.lists(inner, max_size=3), max_leaves=5
)


@settings(max_examples=30, deadline=None)
@given(st.lists(things, max_size=4))
def test_the_digest_of_a_list_is_that_of_its_json(items: list[Any]) -> None:
    assert digest_list(iter(items)) == digest_json(items)
