"""Files and folders appear whole or not at all, are known to be whole, and are one process's."""

import csv
import json
import math
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from faults import ended, start
from safetensors.torch import save_file

import files
from config import RunError, UsageError
from files import (
    append_row,
    append_to_table,
    beside,
    clear_leftovers,
    cut,
    cut_rows,
    is_locked,
    locked,
    move_into,
    read_object,
    read_rows,
    whole_folder,
    write_table,
    write_whole,
)


def names(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_table_is_written_with_all_its_columns_or_those_asked_for(tmp_path):
    rows = [{"a": 1, "b": 'x, "y",\nz', "c": "é"}, {"a": 2, "b": "", "c": "w"}]
    read = {}
    for name, columns in (("all.csv", None), ("some.csv", ["c", "a"])):
        write_table(tmp_path / name, rows, columns)
        with (tmp_path / name).open(newline="", encoding="utf-8") as file:
            read[name] = list(csv.reader(file))
    assert read["all.csv"] == [["a", "b", "c"], ["1", 'x, "y",\nz', "é"], ["2", "", "w"]]
    assert read["some.csv"] == [["c", "a"], ["é", "1"], ["w", "2"]]
    assert names(tmp_path) == {"all.csv", "some.csv"}


def test_whole_folder_appears_with_its_files_when_the_block_ends(tmp_path):
    target = tmp_path / "deep" / "model"
    with whole_folder(target) as scratch:
        (scratch / "weights").write_text("all of them")
        assert not target.exists()
    assert names(tmp_path) == {"deep", "deep/model", "deep/model/weights"}
    assert (target / "weights").read_text() == "all of them"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_saved_files_have_the_mode_that_the_umask_gives(umask, mode, tmp_path):
    """safetensors alone would have weights that nobody else can read: another user is told that there is no file."""
    before = os.umask(umask)
    try:
        with whole_folder(tmp_path / "model") as scratch:
            (scratch / "critic").mkdir()
            save_file({"a": torch.zeros(1)}, scratch / "critic/model.safetensors")
            write_whole(scratch / "a.json", "{}")
    finally:
        assert os.umask(before) == umask
    for file in ("critic/model.safetensors", "a.json"):
        assert (tmp_path / "model" / file).stat().st_mode & 0o777 == mode


def test_a_folder_is_saved_where_modes_cannot_be_set(tmp_path, monkeypatch):
    """As on some network drives: a finished policy is worth more than its mode."""

    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("pathlib.Path.chmod", refuse)
    with whole_folder(tmp_path / "model") as scratch:
        (scratch / "a.json").write_text("{}")
    assert (tmp_path / "model/a.json").read_text() == "{}"


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_whole_folder_leaves_nothing_behind_an_exception(error, tmp_path):
    with pytest.raises(type(error)), whole_folder(tmp_path / "model") as scratch:
        (scratch / "weights").write_text("half of them")
        raise error
    assert names(tmp_path) == set()


def test_whole_folder_tells_a_full_disk_in_one_sentence_and_leaves_nothing(tmp_path):
    with pytest.raises(RunError, match="model cannot be written: No space left"), whole_folder(tmp_path / "model"):
        raise OSError(28, "No space left on device")
    assert names(tmp_path) == set()


def test_whole_folder_keeps_what_is_there_already(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("old")
    words = "model was made by another run meanwhile; start again"
    with pytest.raises(RunError, match=words), whole_folder(tmp_path / "model") as scratch:
        (scratch / "weights").write_text("new")
    assert names(tmp_path) == {"model", "model/weights"}
    assert (tmp_path / "model" / "weights").read_text() == "old"


def test_whole_folder_below_a_file_is_a_run_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file/model cannot be written"), whole_folder(tmp_path / "file" / "model"):
        pytest.fail("the block must not run")


def test_write_whole_replaces_a_file_only_at_the_end(tmp_path, monkeypatch):
    """Until the rename, a reader finds the old text under the name, whatever has been written aside."""
    path = tmp_path / "log"
    write_whole(path, "old")
    seen = []
    fsync = os.fsync

    def watched(number):
        seen.append(path.read_text(encoding="utf-8"))
        fsync(number)

    monkeypatch.setattr(os, "fsync", watched)
    write_whole(path, "nëw")
    assert seen == ["old", "nëw"]  # the file's, and that of the folder that names it
    assert path.read_text(encoding="utf-8") == "nëw"
    assert names(tmp_path) == {"log"}


def test_write_whole_keeps_the_old_file_when_it_cannot_finish(tmp_path, monkeypatch):
    path = tmp_path / "log"
    write_whole(path, "old")

    def fsync(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(RunError, match="log cannot be written: No space left on device"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == {"log"}


def test_the_longest_of_names_can_be_written(tmp_path):
    """What is not finished has a longer name, and is hidden by it."""
    name = "é" * 127
    write_whole(tmp_path / name, "text")
    with whole_folder(tmp_path / f"{name}f") as scratch:
        assert scratch.name.startswith(".é") and scratch.name.endswith(".unfinished")
    assert names(tmp_path) == {name, f"{name}f"}


def test_move_into_moves_every_file_over_what_is_there(tmp_path):
    source = tmp_path / "source"
    target = tmp_path / "target"
    for folder, letters in ((source, "ab"), (target, "bc")):
        folder.mkdir()
        for name in letters:
            (folder / name).write_text(folder.name)
    move_into(source, target, last="b")
    assert {path.name: path.read_text() for path in target.iterdir()} == {"a": "source", "b": "source", "c": "target"}
    assert not source.exists()


def test_move_into_takes_the_last_file_away_first_and_puts_it_last(tmp_path, monkeypatch):
    """Whoever looks for it never finds it among files of which some are old and some are new; a folder gives way."""
    source, target = tmp_path / "source", tmp_path / "target"
    for folder in (source, target):
        (folder / "critic").mkdir(parents=True)
        for name in ("a", "last", "z", "critic/weights"):
            (folder / name).write_text(folder.name)
    (target / "critic/old").write_text("old")
    seen = []
    real = Path.replace

    def watched(path: Path, place: Path) -> None:
        seen.append((target / "last").exists())
        real(path, place)

    monkeypatch.setattr(Path, "replace", watched)
    move_into(source, target, last="last")
    assert seen == [False] * 4
    assert {name: (target / name).read_text() for name in ("a", "last", "z", "critic/weights")} == dict.fromkeys(
        ("a", "last", "z", "critic/weights"), "source"
    )
    assert names(target) == {"a", "last", "z", "critic", "critic/weights"}


def test_a_folder_that_gives_way_is_on_the_disk_until_the_new_one_is(tmp_path, monkeypatch):
    """At every renaming, a whole one is there, under its name or where it has stepped aside."""
    path = tmp_path / "best"

    def fill(content: str) -> None:
        with whole_folder(path, replaces="weights") as scratch:
            (scratch / "weights").write_text(content)

    fill("old")
    seen = []
    real = Path.rename

    def watched(source: Path, place: Path):
        result = real(source, place)
        seen.append(sorted(file.read_text() for file in tmp_path.rglob("weights")))
        return result

    monkeypatch.setattr(Path, "rename", watched)
    fill("new")
    assert seen == [["new", "old"]] * 2
    assert names(tmp_path) == {"best", "best/weights"} and (path / "weights").read_text() == "new"


def test_a_folder_that_gives_way_comes_back_where_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    path = tmp_path / "best"
    path.mkdir()
    (path / "weights").write_text("old")
    real = Path.rename

    def full(source: Path, place: Path):
        if source.suffix == ".unfinished":
            raise OSError(28, "No space left on device")
        return real(source, place)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(RunError, match="best cannot be written: No space left"), whole_folder(path, "weights"):
        pass
    assert names(tmp_path) == {"best", "best/weights"} and (path / "weights").read_text() == "old"


NOT_OURS = (".hidden", ".mine.unfinished", ".kept.1.replaced", ".a.1-xyz.unfinished")


@pytest.mark.parametrize("kills", [1, 2])
def test_what_a_dead_process_has_begun_is_put_in_order(kills, tmp_path):
    """Killed when the old folder has stepped aside, or when the new one has taken its place and the old one is left."""
    path = tmp_path / "best"
    path.mkdir()
    (path / "weights").write_text("old")
    for name in NOT_OURS:
        (tmp_path / name).write_text("not ours")

    def work() -> None:
        real, count = Path.rename, 0

        def fatal(source: Path, place: Path):
            nonlocal count
            real(source, place)
            count += 1
            if count == kills:
                os.kill(os.getpid(), signal.SIGKILL)

        Path.rename = fatal
        beside(tmp_path / "log").write_text("half")
        with whole_folder(path, replaces="weights") as scratch:
            (scratch / "weights").write_text("new")

    assert ended(start(work)) == -signal.SIGKILL
    assert len(names(tmp_path)) > 3 + len(NOT_OURS)
    clear_leftovers(tmp_path, "log")
    assert any("replaced" in name and "best" in name for name in names(tmp_path))
    clear_leftovers(tmp_path)
    assert names(tmp_path) == {"best", "best/weights", *NOT_OURS}
    assert (path / "weights").read_text() == ("old" if kills == 1 else "new")


def test_what_a_living_process_has_begun_is_left_to_it(tmp_path):
    def work() -> None:
        with whole_folder(tmp_path / "stage") as scratch:
            (scratch / "weights").write_text("half")
            (tmp_path / "ready").write_text("")
            time.sleep(60)

    child = start(work)
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    before = names(tmp_path)
    clear_leftovers(tmp_path)
    assert names(tmp_path) == before and len(before) == 3
    os.kill(child, signal.SIGKILL)
    ended(child)
    clear_leftovers(tmp_path)
    assert names(tmp_path) == {"ready"}


# ----------------------------------------------------------------------------------------------------------------
# Rows
# ----------------------------------------------------------------------------------------------------------------


def test_rows_are_read_as_they_were_written_and_what_is_no_number_is_null(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert read_rows(path) == []
    append_row(path, {"a": 0.1 + 0.2, "b": math.nan, "c": ["é\u2028"]})
    append_row(path, {"a": math.inf, "b": -1e300})
    assert path.read_text().splitlines()[1] == '{"a": null, "b": -1e+300}'
    first, second = read_rows(path)
    assert first["a"] == 0.1 + 0.2 and math.isnan(first["b"]) and first["c"] == ["é\u2028"]
    assert math.isnan(second["a"]) and second["b"] == -1e300


def test_a_row_that_was_not_written_to_its_end_is_none(tmp_path):
    """Every beginning of a last row; and with it cut off, the next stands where it should."""
    path = tmp_path / "rows.jsonl"
    append_row(path, {"a": 1})
    whole = path.read_bytes()
    last = b'{"a": 2}\n'
    for length in range(len(last)):
        path.write_bytes(whole + last[:length])
        assert read_rows(path) == [{"a": 1}], length
    cut_rows(path, 1)
    append_row(path, {"a": 3})
    assert read_rows(path) == [{"a": 1}, {"a": 3}]
    cut_rows(path, 0)
    assert read_rows(path) == []
    with pytest.raises(RunError, match=r"rows\.jsonl has 0 rows, expected 1 at least: some are lost"):
        cut_rows(path, 1)


def test_a_table_grows_under_its_heading_and_is_cut_to_a_size(tmp_path):
    path = tmp_path / "table.csv"
    append_to_table(path, [{"a": 1, "b": "x\ny"}])
    size = path.stat().st_size
    append_to_table(path, [{"a": 2, "b": '"'}])
    with path.open(newline="") as file:
        assert list(csv.reader(file)) == [["a", "b"], ["1", "x\ny"], ["2", '"']]
    cut(path, size)
    with path.open(newline="") as file:
        assert list(csv.reader(file)) == [["a", "b"], ["1", "x\ny"]]
    with pytest.raises(RunError, match=rf"table\.csv has {size} bytes, expected {size + 1} at least: some are lost"):
        cut(path, size + 1)
    cut(tmp_path / "none", 0)
    assert not (tmp_path / "none").exists()


# ----------------------------------------------------------------------------------------------------------------
# One process's
# ----------------------------------------------------------------------------------------------------------------


def test_several_may_ask_whether_something_is_locked_at_a_time(tmp_path):
    assert not is_locked(tmp_path)
    with locked(tmp_path, files.fcntl.LOCK_SH):
        assert not is_locked(tmp_path)
    with locked(tmp_path):
        assert is_locked(tmp_path)


def test_where_a_file_system_knows_no_locks_everything_is_free(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with locked(tmp_path) as is_free:
        assert is_free


@pytest.mark.parametrize("text", ["", "[]", "{", "nul", '"a"'])
def test_what_is_no_object_is_named(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UsageError, match=r"a\.json cannot be read: "):
        read_object(tmp_path / "a.json")
    (tmp_path / "a.json").write_text(json.dumps({"a": 1}))
    assert read_object(tmp_path / "a.json") == {"a": 1}
