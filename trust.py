"""What is not taken on trust: a folder that was downloaded says what is in it, never what is run, read or written
elsewhere. Its links, the names in its files and the function that a run of it was rewarded by are looked at first.
"""

import math
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path, PurePosixPath

from config import UsageError
from files import state_folder


def root_of(folder: Path) -> Path:
    """Within what a folder's links may lead: itself, or of one in the Hub's cache, whose files are links, all that is
    kept there of its repository.
    """
    whole = folder.resolve()
    repository = whole.parent.parent
    return repository if whole.parent.name == "snapshots" and (repository / "blobs").is_dir() else whole


def check_links(folder: Path, flag: str, depth: float = math.inf) -> None:
    """Raise UsageError for a symbolic link in the folder that leads out of it: nobody has named what is behind it.

    Hidden folders, such as .git, are not looked into, nor those that are `depth` folders down.
    """
    root = root_of(folder)
    for place, folders, files in os.walk(folder):
        for name in folders + files:
            link = Path(place) / name
            if link.is_symlink() and not Path(os.path.realpath(link)).is_relative_to(root):
                raise UsageError(
                    f"--{flag} {folder}: {link.relative_to(folder)} is a link to {os.readlink(link)}, which is outside "
                    "of the folder; expected the file itself"
                )
        is_deepest = len(Path(place).relative_to(folder).parts) + 1 >= depth
        folders[:] = [name for name in folders if not is_deepest and not name.startswith(".")]


def check_names(names: Iterable, place: str) -> None:
    """Raise UsageError unless all are names, or patterns, of files below the folder that they are written in: none that
    is absolute, climbs, is hidden, or has a protocol. `place` is the file with the names.
    """
    for name in names:
        is_text = isinstance(name, str)
        is_elsewhere = is_text and (name.startswith("/") or ":" in name or "\\" in name)
        if not is_text or is_elsewhere or any(part.startswith((".", "~")) for part in PurePosixPath(name).parts):
            raise UsageError(f"{place} names {name!r}, expected a file in its own folder")


def known_file() -> Path:
    """Where it is noted which functions this user's runs were trained with.

    Raises RuntimeError for a user without a home.
    """
    return state_folder() / "reward_functions"


def known_functions() -> list[str]:
    with suppress(OSError, ValueError, RuntimeError):
        return known_file().read_text(encoding="utf-8").split("\n")
    return []


def whole_name(spec: str) -> str:
    """FILE.py:NAME with the file as it is found from anywhere."""
    path, _, name = spec.rpartition(":")
    return f"{os.path.abspath(path)}:{name}"


def remember_function(spec: str) -> None:
    """Note a --reward_fn with which a run is trained, so that the run's folder may name it later on. Where nothing can
    be noted, it has to be given again.
    """
    if whole_name(spec) in known_functions():
        return
    with suppress(OSError, ValueError, RuntimeError):
        known_file().parent.mkdir(parents=True, exist_ok=True)
        with known_file().open("a", encoding="utf-8") as file:
            file.write(whole_name(spec) + "\n")


def check_function(spec: str, run: Path) -> None:
    """Raise UsageError for a --reward_fn that a run's folder names and this user has never trained with: whoever made
    the folder may have written the function, too.
    """
    if whole_name(spec) not in known_functions():
        raise UsageError(
            f"{run} was rewarded by the function {spec}, which no run of yours was trained with, and code is not run "
            f"because a folder says so: look at it, and give --reward_fn {spec}"
        )
