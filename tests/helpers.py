"""What many tests compare with, and how they read what a run leaves."""

import csv
from pathlib import Path

import torch

from files import read_rows


def assert_close(actual, expected, atol: float | None = None) -> None:
    """Equal in shape, and to `atol`: by itself 1e-9 for a tensor in double precision, 1e-5 for any other and a number.

    NaN is never close to anything.
    """
    if atol is None:
        atol = 1e-9 if torch.is_tensor(actual) and actual.dtype == torch.float64 else 1e-5
    actual = torch.as_tensor(actual, dtype=torch.float64)
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def assert_all_moved(start: Path, end: Path, family) -> None:
    """Plain transformers loads both folders as models of one family, and not one of their weights is the same."""
    before, after = (dict(family.from_pretrained(folder).named_parameters()) for folder in (start, end))
    assert before.keys() == after.keys(), before.keys() ^ after.keys()
    unmoved = [name for name in before if torch.equal(before[name], after[name])]
    assert not unmoved, unmoved


def read_table(path: Path) -> list[dict]:
    """The rows of a CSV file, by the names in its heading; every value is a text."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_log(run: Path) -> list[dict]:
    """A row a response."""
    return read_table(run / "training_log.csv")


def read_stats(run: Path) -> list[dict]:
    """A row an update."""
    return read_rows(run / "training_stats.jsonl")
