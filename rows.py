"""Rows that stay in Arrow, in files that are mapped into memory: what a dataset costs is an index, four bytes a row.

Parts, shuffles and selections are indices. What is asked of a whole column is asked of Arrow; a row becomes a Python
object when it is drawn, and nobody keeps it here.
"""

import mmap
import operator
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.compute

from hub import one_sentence

NEIGHBOURS = 1000  # rows that are read together where they lie near each other
AT_ONCE = 16  # and where they do not: until their pages are let go, each may take 2 MB of its own
IN_A_BATCH = 100_000  # rows that are written together: the fewer parts a file has, the less of it is read to open it


class Row(dict):
    """A row of the data, by column, and its number in the file: rows are shuffled."""

    __slots__ = ("number",)

    def __init__(self, columns: dict, number: int) -> None:
        super().__init__(columns)
        self.number = number  # counted from 1


class Table(NamedTuple):
    """A split in Arrow, as it is on the disk."""

    name: str  # of the dataset, to tell of what cannot be read
    batches: list[pyarrow.RecordBatch]
    starts: np.ndarray  # the number of each batch's first row, and behind them that of all rows
    pages: list[mmap.mmap]  # of its files

    def let_go(self) -> None:
        """Give back the memory that what was read of the files takes; the system keeps it as long as it has room."""
        for each in self.pages:
            each.madvise(mmap.MADV_DONTNEED)

    def gather(self, indices: np.ndarray, names: list[str]) -> list[dict]:
        """The rows of these indices, as Python objects. A value of JSON is decoded, an image is not."""
        import datasets

        if not names:  # what has no column has no rows in Arrow
            return [{} for _ in indices]
        parts = []
        numbers = np.searchsorted(self.starts, indices, side="right") - 1
        for number, place in zip(numbers.tolist(), (indices - self.starts[numbers]).tolist(), strict=True):
            parts.append(self.batches[number].select(names).slice(place, 1))
        table = pyarrow.Table.from_batches(parts).replace_schema_metadata(None)  # it speaks of all columns
        found = datasets.Dataset(table, fingerprint="drawn")  # or it would be made of all values
        with one_sentence(f"--dataset_path {self.name} cannot be loaded"):  # only now is text decoded
            rows = found.to_list()
        self.let_go()
        return rows


def open_table(split, name: str) -> Table:
    """The rows of a split of `datasets`, mapped from its files where it has some, so that their pages can be let go."""
    pages, tables = [], []
    for each in split.cache_files:
        with open(each["filename"], "rb") as file:
            pages.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        tables.append(pyarrow.ipc.open_stream(pyarrow.py_buffer(pages[-1])).read_all())
    if sum(map(len, tables)) != len(split):  # it is held in memory, or is a selection
        tables, pages = [split.with_format("arrow")[:]], []
    batches = [batch for table in tables for batch in table.to_batches() if len(batch) > 0]
    return Table(name, batches, starts=np.cumsum([0, *map(len, batches)]), pages=pages)


class Rows(Sequence):
    """Rows of a split, in an order of their own: as a list of `Row`, but each is made anew whenever it is asked for."""

    def __init__(self, table: Table, order: np.ndarray, names: list[str] | None = None) -> None:
        self.table = table
        self.order = order
        self.names = table.batches[0].schema.names if names is None else names

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, key):
        if isinstance(key, slice):
            return Rows(self.table, self.order[key], self.names)
        [row] = self.made(self.order[operator.index(key)][None])
        return row

    def __iter__(self) -> Iterator[Row]:
        for start in range(0, len(self), NEIGHBOURS):
            indices = self.order[start : start + NEIGHBOURS]
            size = NEIGHBOURS if np.ptp(indices) < 20 * NEIGHBOURS else AT_ONCE
            for first in range(0, len(indices), size):
                yield from self.made(indices[first : first + size])

    def made(self, indices: np.ndarray) -> list[Row]:
        """The rows of these indices of the split."""
        rows = self.table.gather(indices, self.names)
        return [Row(columns, number + 1) for columns, number in zip(rows, indices.tolist(), strict=True)]

    def only(self, names: list[str]) -> "Rows":
        """The same rows, of which these columns alone are read, as far as there are any."""
        return Rows(self.table, self.order, [name for name in names if name in self.names])

    def in_file_order(self) -> "Rows":
        return Rows(self.table, np.sort(self.order), self.names)

    def at(self, places: np.ndarray | list[int]) -> "Rows":
        """Those at these places, or where a mask of all of them is true."""
        return Rows(self.table, self.order[places], self.names)

    def of_each(self, name: str, compute, dtype: type) -> np.ndarray:
        """What `compute` makes of a column's array in Arrow, a number for each of the rows."""
        values = np.empty(self.table.starts[-1], dtype)
        for (start, end), batch in zip(pairwise(self.table.starts), self.table.batches, strict=True):
            values[start:end] = compute(batch.column(name)).to_numpy(zero_copy_only=False)
            self.table.let_go()
        return values[self.order]

    def type_of(self, name: str) -> pyarrow.DataType:
        return self.table.batches[0].schema.field(name).type

    def suspects(self, name: str, kind: type | tuple[type, ...]) -> "Rows":
        """Those that may hold something else than `kind` in a column: where Arrow has one type for all of them, and it
        is the right one, those that hold a null.
        """
        if isinstance(self.type_of(name), pyarrow.JsonType) or not self.has_type(name, kind):
            return self
        if all(batch.column(name).null_count == 0 for batch in self.table.batches):
            return self[:0]
        return self.at(self.of_each(name, pyarrow.compute.is_null, bool))

    def has_type(self, name: str, kind: type | tuple[type, ...]) -> bool:
        """Whether the first value there is in a column is one of `kind`; so are then all, but for nulls."""
        for number, batch in enumerate(self.table.batches):
            place = pyarrow.compute.index(batch.column(name).is_valid(), True).as_py()
            if place >= 0:
                [row] = self.table.gather(self.table.starts[number : number + 1] + place, [name])
                return isinstance(row[name], kind)
        return True

    def lengths(self, name: str) -> np.ndarray | None:
        """The letters of each row's text; None where the column is none of texts alone."""
        if self.type_of(name) not in (pyarrow.string(), pyarrow.large_string()) or len(self.suspects(name, str)):
            return None
        return self.of_each(name, pyarrow.compute.utf8_length, np.uint32)

    def distinct(self, name: str) -> set:
        """The values of a column, each once; they are numbers or texts."""
        if isinstance(self.type_of(name), pyarrow.JsonType):
            return {row[name] for row in self.only([name])}
        is_own = np.zeros(self.table.starts[-1], bool)
        is_own[self.order] = True
        found = set()
        for (start, end), batch in zip(pairwise(self.table.starts), self.table.batches, strict=True):
            own = batch.column(name).filter(pyarrow.array(is_own[start:end]))
            found.update(own.unique().to_pylist())
            self.table.let_go()
        return found


def check_is_utf_8(table: Table) -> None:
    """Raise UsageError where a text is none: Arrow takes whatever bytes a file has."""
    for (start, end), batch in zip(pairwise(table.starts), table.batches, strict=True):
        try:
            batch.validate(full=True)
        except pyarrow.ArrowInvalid:
            for _ in Rows(table, np.arange(start, end)):  # as Python, which says what stands there
                pass
        table.let_go()
