"""A trace in the terminal: aligned whatever the tokens are, within 100 columns, with colours where they are seen."""

import io
import re
import sys

import pytest
from test_explain import traced

import tables

ODD = ['"', "\n", "映画", "e\u0301", "\ufffd", "", " a very long token indeed, longer than there is room", "\x1b[2J"]


@pytest.fixture(scope="module")
def trace() -> dict:
    trace, _ = traced("gpt2")
    tokens = [token for row in trace["rows"] for token in row["tokens"]]
    for token, text in zip(tokens, ODD, strict=False):
        token["text"] = text
    return trace


def rows_of(text: str) -> list[list[str]]:
    """The lines of each table in a text: a heading, and all up to a line that is none of its own."""
    found, lines = [], text.splitlines()
    for start, line in enumerate(lines):
        if re.match(r" +token ", line):
            end = next(n for n in range(start + 1, len(lines)) if not re.match(r" *\d+ \"| {8,}10\^-", lines[n]))
            found.append(lines[start:end])
    return found


def shown_at(line: str, column: int) -> str:
    """What stands in a column of the terminal."""
    return next((line[n] for n in range(len(line)) if tables.columns_of(line[: n + 1]) > column), " ")


def test_every_number_ends_where_its_heading_does(trace):
    found = rows_of(tables.text_of(trace, in_colour=False))
    assert len(found) == 4 * 4  # responses, and a rollout and three epochs of each
    for heading, *lines in found:
        ends = [match.end() for match in re.finditer(r"\S+", heading)][1:]
        for line in lines:
            for end in ends:
                is_empty = not shown_at(line, end - 1).strip()
                assert shown_at(line, end) == " "
                assert not is_empty or "branch" in heading or "10^-" in line, (line, end)


def test_nothing_is_wider_than_a_hundred_columns(trace):
    text = tables.text_of(trace | {"title": "update 7 of " + "a/long/folder/" * 12, "note": "word " * 60}, False)
    assert max(map(tables.columns_of, text.splitlines())) <= 100
    assert "\x1b" not in text and '"\\x1b[2J"' in text


def test_colours_change_nothing_else(trace):
    plain, coloured = tables.text_of(trace, False), tables.text_of(trace, True)
    assert "\x1b" not in plain and re.sub(r"\x1b\[\d*m", "", coloured) == plain
    token = trace["rows"][0]["tokens"][0]
    assert ("\x1b[32m" if token["whitened"] > 0 else "\x1b[31m") in coloured
    assert re.search(r"\x1b\[33m clipped (above|below)|\x1b\[33mclipped (above|below)", coloured)


def test_colours_are_for_a_terminal_that_has_them(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    assert not tables.is_coloured()
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert tables.is_coloured()
    monkeypatch.setenv("TERM", "dumb")
    assert not tables.is_coloured()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not tables.is_coloured()


@pytest.mark.parametrize(
    ("values", "texts", "unit"),
    [
        ([0.0, -1.2345], ["0", "-1.234"], ""),
        ([12.345, -0.0004], ["12.35", "0.00"], ""),
        ([123.45, 1.0], ["123.5", "1.0"], ""),
        ([123456.0, -0.5], ["1.23e+05", "-5.00e-01"], ""),
        ([0.00123, -0.0000004], ["1.230", "0.000"], "10^-3"),
        ([1e-7, 0.0], ["0.100", "0"], "10^-6"),
        ([float("nan"), 2.0], ["nan", "2.000"], ""),
        (["unclipped", "clipped above"], ["", "clipped above"], ""),
    ],
)
def test_a_column_has_the_digits_that_its_largest_number_needs(values, texts, unit):
    assert tables.cells(values) == (texts, unit)


def test_the_legend_has_the_settings(trace):
    text = tables.text_of(trace, False)
    assert "max(-q Â, -clip(q, 0.9, 1.1) Â)" in text and "β = 0.3" in text and "λ = 0.9" in text
    assert "up to ± 0.05" in text
    assert text.count("log ρ(y_t)") == 1  # once, below the first rollout
    assert "= adv, as --no_whiten_advantages asks" in tables.text_of(trace | {"whitening": None}, False)


def test_which_tokens_became_likelier_is_told(trace):
    row = trace["rows"][0]
    ratios = [token["ratio"] for token in row["epochs"][-1]["tokens"]]
    first = max(range(len(ratios)), key=ratios.__getitem__)
    assert tables.likelier(row).startswith(f"likelier     {first} {tables.quoted(row['tokens'][first]['text'])} x")
    kl = sum(token["kl"] for token in row["tokens"])
    assert tables.balance(row, trace) == (
        f"rewards: score {row['score']:.4f} - 0.3 x kl {kl:.4f} = {row['score'] - 0.3 * kl:.4f}"
    )
