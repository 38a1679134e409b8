"""What the tests provoke faults with: processes of their own, and what kills them at a moment that is asked for."""

import os
import signal
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch


def forked(work: Callable[[], int | None]) -> int:
    """The exit code of a process in which `work` was done, or the number of the signal that ended it, below 0.

    It begins with all that is imported here, as a process of its own would have after seconds, and with no run's state.
    """
    child = start(work)
    return ended(child)


def start(work: Callable[[], int | None]) -> int:
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = work() or 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def ended(child: int) -> int:
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


class Moments:
    """Counts what is done to files in a process, and kills it at a moment: before or after a flush, a renaming or a
    removal, or with a file half written.
    """

    def __init__(self, fatal: int) -> None:
        self.fatal = fatal
        self.count = 0
        self.names = []

    def passed(self, name: str) -> None:
        self.names.append(name)
        if self.count == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1

    def around(self, real: Callable) -> Callable:
        def watched(*arguments, **named):
            self.passed(f"before {real.__name__}")
            result = real(*arguments, **named)
            self.passed(f"after {real.__name__}")
            return result

        return watched

    def half_written(self, real: Callable) -> Callable:
        """Of one that writes a file whole: the first half is on the disk at the moment."""

        def watched(tensors: dict, path, *others) -> None:
            content = safetensors.torch.save(tensors)
            with open(path, "wb") as file:
                file.write(content[: len(content) // 2])
            self.passed("half a file")
            real(tensors, path, *others)

        return watched

    def half_of_bytes(self, real: Callable) -> Callable:
        def watched(path: Path, content: bytes) -> None:
            real(path, content[: len(content) // 2])
            self.passed("half a file")
            real(path, content)

        return watched


@contextmanager
def watching(fatal: int = -1):
    """Moments that are counted, and one that is fatal, in the block; each of them once in a process."""
    import checkpoint

    moments = Moments(fatal)
    real = {name: getattr(os, name) for name in ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir")}
    save_file, write_bytes = checkpoint.save_file, Path.write_bytes
    try:
        for name, function in real.items():
            setattr(os, name, moments.around(function))
        checkpoint.save_file = moments.half_written(save_file)
        Path.write_bytes = moments.half_of_bytes(write_bytes)
        yield moments
    finally:
        for name, function in real.items():
            setattr(os, name, function)
        checkpoint.save_file, Path.write_bytes = save_file, write_bytes


def wait_for(is_so: Callable[[], bool], seconds: float = 60) -> None:
    """Raises AssertionError if it does not become so."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "it has not become so"
        time.sleep(0.01)
