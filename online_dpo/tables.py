"""Parquet files row by row, written and read a part at a time: what is held does not grow with the file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice, pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from online_dpo.errors import RunFolderError, one_line

T = TypeVar("T")
GROUP = 32_768
"""Rows of a row group. Cut by number alone: a file's bytes do not depend on the parts that it was written in."""
READ = 8192
"""Rows that are decoded at once."""
BUFFER = 1 << 18
"""Bytes of a column that are read at once."""


class TableWriter:
    """One parquet file with exactly `schema`, written as rows come."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.schema = schema
        self._file = pq.ParquetWriter(path, schema, compression="zstd")
        self._waiting: list[pa.Table] = []
        self._rows = 0

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None:
                self._write(self._rows)  # of a file without rows too: it says what its columns are
        finally:
            self._file.close()

    def add(self, table: pa.Table) -> None:
        """More rows."""
        self._waiting.append(table)
        self._rows += len(table)
        while self._rows >= GROUP:
            self._write(GROUP)

    def _write(self, rows: int) -> None:
        whole = pa.concat_tables([self.schema.empty_table(), *self._waiting])
        self._file.write_table(whole.slice(0, rows).combine_chunks(), row_group_size=GROUP)
        self._rows -= rows
        self._waiting = [whole.slice(rows)] if self._rows else []


class TableReader:
    """The rows of a parquet file in their order."""

    def __init__(self, path: Path, schema: pa.Schema, columns: Sequence[str] | None = None) -> None:
        """`columns`: those that are read, in the file's order; None: all.

        Raises `RunFolderError` when the file is missing, damaged, or of other columns than `schema`.
        """
        self.path = path
        self.columns = [name for name in schema.names if columns is None or name in columns]
        with self._named():
            # Buffered ahead, every row group that was read would stay until the file is closed.
            self._file = pq.ParquetFile(path, pre_buffer=False, buffer_size=BUFFER)
        check_schema(path, self._file.schema_arrow, schema)
        self._batches = self._file.iter_batches(READ, columns=self.columns)
        self._rest: list[pa.RecordBatch] = []

    def __enter__(self) -> TableReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return int(self._file.metadata.num_rows)

    def batches(self) -> Iterator[pa.RecordBatch]:
        """All rows that are left, a part at a time."""
        while (batch := self._next()) is not None:
            yield batch

    def take(self, rows: int) -> pa.Table:
        """The next `rows` rows; fewer where the file ends."""
        taken: list[pa.RecordBatch] = []
        while rows > 0 and (batch := self._next()) is not None:
            taken.append(batch.slice(0, rows))
            if len(batch) > rows:
                self._rest = [batch.slice(rows)]
            rows -= len(taken[-1])
        schema = pa.schema([self._file.schema_arrow.field(name) for name in self.columns])
        return pa.Table.from_batches(taken, schema=schema)

    def _next(self) -> pa.RecordBatch | None:
        if self._rest:
            return self._rest.pop()
        with self._named():
            return next(self._batches, None)

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            raise RunFolderError(f"{self.path} is missing or damaged: {one_line(error)}") from error


def check_schema(path: Path, found: pa.Schema, schema: pa.Schema) -> None:
    """`RunFolderError` when the file at `path` has other columns, or columns of other types, than `schema`."""
    if found.names != schema.names:
        raise RunFolderError(f"{path} has columns {found.names}, expected {schema.names}")
    if found.types != schema.types:
        name = next(field.name for field in schema if found.field(field.name).type != field.type)
        raise RunFolderError(f"{path}: column '{name}' holds {found.field(name).type}, not {schema.field(name).type}")


def write_rows(path: Path, schema: pa.Schema, rows: Sequence[dict[str, Any]]) -> None:
    """Write `rows` as one parquet file with exactly `schema`."""
    with TableWriter(path, schema) as file:
        file.add(pa.Table.from_pylist(list(rows), schema=schema))


def read_rows(path: Path, schema: pa.Schema) -> list[dict[str, Any]]:
    """The rows of `path`; `RunFolderError` when the file is missing, damaged, or of other columns."""
    return list(each_row(path, schema))


def each_row(path: Path, schema: pa.Schema, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """As `read_rows`, one after another, with `columns` (None: all) alone."""
    with TableReader(path, schema, columns) as file:
        for batch in file.batches():
            values = [column_values(batch.column(name)) for name in file.columns]
            for row in zip(*values, strict=True):
                yield dict(zip(file.columns, row, strict=True))


def keep_rows(path: Path, schema: pa.Schema, places: Sequence[int]) -> None:
    """Leave in the file at `path` only the rows at `places`, ascending."""
    aside = path.with_name(f"{path.name}.all")
    path.rename(aside)
    wanted = np.array(places, dtype=np.int64)
    with TableReader(aside, schema) as whole, TableWriter(path, schema) as file:
        row = 0
        for batch in whole.batches():
            first, last = np.searchsorted(wanted, [row, row + len(batch)])
            file.add(pa.Table.from_batches([batch]).take(pa.array(wanted[first:last] - row)))
            row += len(batch)
    aside.unlink()


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """`items` in lists of `size`; the last has what is left."""
    left = iter(items)
    while part := list(islice(left, size)):
        yield part


def column_values(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    """The values of a column; lists of numbers as tuples."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if not pa.types.is_list(column.type) or column.null_count or column.flatten().null_count:
        values: list[Any] = column.to_pylist()
        return [tuple(value) if isinstance(value, list) else value for value in values]
    # Arrow makes an object for every number of a list; numpy makes all numbers at once.
    numbers = column.flatten().to_numpy(zero_copy_only=False).tolist()
    ends = column.offsets.to_numpy()
    ends = (ends - ends[0]).tolist()
    return [tuple(numbers[begin:end]) for begin, end in pairwise(ends)]
