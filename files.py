"""Files and folders that appear whole or not at all, that are known to be whole later on, and that one process has.

What is written goes beside its place first, under a name that ends with `unfinished`, is flushed to the disk, and then
renamed: whoever looks sees what was there before, or all of what is new, also after a loss of power. A folder cannot be
renamed over another, so the old one steps aside, under a name that ends with `replaced`, until the new one is in place.
What a process that was killed leaves of either is put in order by `clear_leftovers`.
"""

import csv
import errno
import fcntl
import glob
import hashlib
import io
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from config import RunError, UsageError, first_line

LOST = "some are lost; bring it back as it was, or begin again in another folder"
MANIFEST = "manifest.json"  # what a folder's files are, with their hashes: the last to be written
FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}  # of data


OURS = re.compile(r"\..*\.\d+-[0-9a-f]{8}\.(unfinished|replaced)")  # names as `beside` makes them
HELD: set[int] = set()  # descriptors of this process's locks
os.register_at_fork(after_in_child=lambda: [os.close(descriptor) for descriptor in HELD])  # else a child has them, too


def state_folder() -> Path:
    """Where notes are kept that this user's runs leave for later ones, beyond the reach of any run's folder.

    Raises RuntimeError for a user without a home.
    """
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "ppo"


def beside(path: Path, state: str = "unfinished") -> Path:
    """A name in the same folder for what is not in its place; of a long name the first letters, lest it be too long."""
    return path.with_name(f".{path.name[:50]}.{os.getpid()}-{secrets.token_hex(4)}.{state}")


# --------------------------------------------------------------------------------------------------------------------
# Written whole
# --------------------------------------------------------------------------------------------------------------------


@contextmanager
def whole_folder(path: Path, replaces: str = "") -> Iterator[Path]:
    """Yield a scratch folder that becomes `path` when the block ends well, and is removed when it does not.

    A folder that holds the file `replaces` gives way to it (`.`: any folder). Raises RunError naming the folder if it
    cannot be written.
    """
    scratch = beside(path)
    try:
        scratch.mkdir(parents=True)
        with locked(scratch):
            yield scratch
            flush_tree(scratch)
            put_in_place(scratch, path, replaces)
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) in (errno.ENOTEMPTY, errno.EEXIST):
            raise RunError(
                f"{path} was made by another run meanwhile; start again, and it is used if it fits"
            ) from None
        reason = getattr(error, "strerror", None) or error
        raise RunError(f"{path} cannot be written: {reason}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def put_in_place(scratch: Path, path: Path, replaces: str) -> None:
    """Rename a finished folder to `path`, after one that is there and gives way has stepped aside; or leave that one
    where it is.
    """
    aside = beside(path, "replaced")
    if replaces and (path / replaces).exists():
        aside.mkdir()
        path.rename(aside / path.name)
    try:
        scratch.rename(path)
    except OSError:
        if aside.exists():
            (aside / path.name).rename(path)
            aside.rmdir()
        raise
    flush(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def flush_tree(folder: Path) -> None:
    """Flush all that is in a folder to the disk, and give its files the user's mode."""
    mode = usual_mode()
    for path in folder.rglob("*"):
        if path.is_file():
            with suppress(OSError):  # some file systems know no modes
                path.chmod(mode)  # safetensors lets nobody else read what it writes
        flush(path)
    flush(folder)


def usual_mode() -> int:
    """The mode of a new file, as the user's umask has it, which can be read only by setting another."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def flush(path: Path) -> None:
    """Have what a file holds, or which names a folder holds, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str | bytes) -> None:
    """Write a file, text in UTF-8, aside, flush it, and rename it: a reader sees the old file or the new one."""
    scratch = beside(path)
    try:
        scratch.touch()
        with locked(scratch):
            scratch.write_bytes(text if isinstance(text, bytes) else text.encode())
            flush(scratch)
            scratch.replace(path)
        flush(path.parent)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        scratch.unlink(missing_ok=True)


def write_table(path: Path, rows: list[dict], columns: list[str] | None = None) -> None:
    """Write rows as a CSV file, whole, with a heading: every column of the first row, or the given ones of them."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns or list(rows[0]), extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, buffer.getvalue())


def move_into(source: Path, target: Path, last: str) -> None:
    """Move a finished folder's files into an existing one, each by a rename, so that none is ever seen half-written.

    `last` is the file by which others know that all are there: of those that were there before, it goes first.
    """
    (target / last).unlink(missing_ok=True)
    for file in sorted(source.iterdir(), key=lambda file: file.name == last):
        place = target / file.name
        if place.is_dir():
            shutil.rmtree(place)
        file.replace(place)
    flush(target)
    source.rmdir()


# --------------------------------------------------------------------------------------------------------------------
# Rows, as they come
# --------------------------------------------------------------------------------------------------------------------


def append(path: Path, text: str) -> None:
    """Add text to a file. Raises RunError if it cannot be written."""
    try:
        with path.open("ab") as file:
            file.write(text.encode())
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror}") from None


def append_row(path: Path, row: dict) -> None:
    """Add a row to a file of JSON objects, one a line; a number that is none, which JSON does not know, as null."""
    values = {name: None if is_no_number(value) else value for name, value in row.items()}
    append(path, json.dumps(values, allow_nan=False) + "\n")


def is_no_number(value) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def append_to_table(path: Path, rows: list[dict]) -> None:
    """Add rows to a CSV file, which begins with a heading of their names."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, rows[0])
    if not path.exists() or path.stat().st_size == 0:
        writer.writeheader()
    writer.writerows(rows)
    append(path, buffer.getvalue())


def whole_lines(path: Path) -> list[bytes]:
    """The lines of a file, or none where there is no file, but for a last one that was not written to its end."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return lines[:-1] if lines and not lines[-1].endswith(b"\n") else lines


def format_of(path: str) -> str | None:
    """The format of a file of data; None for a folder, and for an id of the Hub. Raises UsageError for a file that is
    missing, or has none of the formats.
    """
    place = Path(path)
    kind = None if place.is_dir() else FORMATS.get(place.suffix.lower())
    if kind and not place.exists():
        raise UsageError(f"--dataset_path {path} does not exist")
    if place.exists() and not place.is_dir() and not place.is_file():
        raise UsageError(f"--dataset_path {path} is neither a file nor a folder")
    if place.is_file() and not kind:
        raise UsageError(f"--dataset_path {path} is a file, expected one that ends in {', '.join(FORMATS)}")
    return kind


def file_and_name(spec: str) -> tuple[str, str]:
    """The two parts of --reward_fn. Raises UsageError unless they are FILE.py:NAME, and the file is there."""
    path, _, name = spec.rpartition(":")
    if not Path(path).is_file() or Path(path).suffix != ".py":
        raise UsageError(f"--reward_fn {spec}: expected FILE.py:NAME with an existing file")
    return path, name


def read_rows(path: Path) -> list[dict]:
    """The rows of a file of JSON objects, with NaN for null."""
    rows = []
    for line in whole_lines(path):
        values = json.loads(line)
        rows.append({name: math.nan if value is None else value for name, value in values.items()})
    return rows


def cut_rows(path: Path, count: int) -> None:
    """Leave the first rows of a file, one a line. Raises RunError if it has not so many."""
    lines = whole_lines(path)
    if len(lines) < count:
        raise RunError(f"{path} has {len(lines)} rows, expected {count} at least: {LOST}")
    cut(path, sum(map(len, lines[:count])))


def cut(path: Path, n_bytes: int) -> None:
    """Leave the first bytes of a file. Raises RunError if it has not so many."""
    found = path.stat().st_size if path.exists() else 0
    if found < n_bytes:
        raise RunError(f"{path} has {found} bytes, expected {n_bytes} at least: {LOST}")
    if found > n_bytes:
        os.truncate(path, n_bytes)


# --------------------------------------------------------------------------------------------------------------------
# Known to be whole
# --------------------------------------------------------------------------------------------------------------------


def described_files(folder: Path) -> dict[str, dict]:
    """Size and SHA-256 of every file below a folder."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256}
    return files


def damage(folder: Path) -> str:
    """What a folder's files lack of what its manifest says of them, in words; nothing if they are whole."""
    try:
        expected = read_object(folder / MANIFEST)["files"]
    except (UsageError, KeyError, TypeError) as error:
        return f"{MANIFEST} is damaged or missing ({first_line(error)})"
    if not isinstance(expected, dict):
        return f"{MANIFEST} is damaged"
    try:
        found = described_files(folder)
    except OSError as error:
        return f"{error.filename or folder} cannot be read: {error.strerror}"
    found.pop(MANIFEST)
    for name in dict.fromkeys([*expected, *found]):
        if name not in found:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} is not in {MANIFEST}"
        if found[name] != expected[name]:
            return f"{name} is not what was written"
    return ""


def read_object(path: Path) -> dict:
    """The JSON object in a file. Raises UsageError if it is missing, unreadable, or holds something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read: {first_line(error)}") from None
    if not isinstance(found, dict):
        raise UsageError(f"{path} cannot be read: it holds a {type(found).__name__}, expected an object")
    return found


# --------------------------------------------------------------------------------------------------------------------
# One process's
# --------------------------------------------------------------------------------------------------------------------


@contextmanager
def locked(path: Path, kind: int = fcntl.LOCK_EX) -> Iterator[bool]:
    """Have a file or folder to oneself in the block, and yield whether nobody else has it.

    The lock is the system's: it ends with the process, however that ends, and leaves nothing on the disk. Where a file
    system knows no locks, everything is free.
    """
    descriptor = os.open(path, os.O_RDONLY)
    HELD.add(descriptor)
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        is_free = True
    except OSError as error:
        is_free = error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    try:
        yield is_free
    finally:
        HELD.discard(descriptor)
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Whether some process has a file or folder to itself; several may ask at a time."""
    with locked(path, fcntl.LOCK_SH) as is_free:
        return not is_free


def leftovers(folder: Path, name: str = "") -> list[Path]:
    """What has been begun in a folder and is not finished, if named of that file alone; nothing that is not ours."""
    return [path for path in folder.glob(f".{glob.escape(name[:50])}*") if OURS.fullmatch(path.name)]


def clear_leftovers(folder: Path, name: str = "") -> None:
    """Remove what processes that are dead have begun in a folder; what stepped aside for it comes back."""
    for path in leftovers(folder, name):
        with suppress(OSError), locked(path) as is_dead:
            if not is_dead:
                continue
            if path.suffix == ".replaced":
                for old in path.iterdir():
                    if not (folder / old.name).exists():
                        old.rename(folder / old.name)
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


def check_writable(folder: Path) -> None:
    """Raise UsageError unless the folder, or the nearest of its parents that exists, can be written."""
    existing = next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UsageError(f"{folder} cannot be written: {existing} is not a folder that this user may write to")


def is_empty_folder(path: Path) -> bool:
    """Whether a folder has nothing in it, but for what a process has begun there and not finished."""
    return path.is_dir() and len(list(path.iterdir())) == len(leftovers(path))
