"""How far a long piece of work is: a bar on a terminal, and a line now and then where standard error is a file."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from tqdm import tqdm

SECONDS = 30  # between two lines in a file
LINE = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


def tell(text: str) -> None:
    """A line on standard error; nothing where it is closed, or its disk is full: no work fails for that."""
    if sys.stderr:
        with suppress(OSError):
            print(text, file=sys.stderr, flush=True)


def say(text: str) -> None:
    """A line on standard output, above the bars where it is a terminal that has some."""
    tqdm.write(text)


@contextmanager
def progress(total: int, name: str, unit: str, done: int = 0) -> Iterator[Callable[[dict[str, str], int], None]]:
    """Yield a function to be told of each part that is done: the numbers that matter now, and how many units it had;
    `done` units were done before.

    On a terminal it draws a bar, which vanishes at its end if it is within another one. Elsewhere it writes a line
    every 30 seconds, and one at the end.
    """
    is_terminal = bool(sys.stderr) and sys.stderr.isatty()
    started = told = time.monotonic()
    initial = done
    with tqdm(total=total, initial=initial, desc=name, unit=unit, leave=None, disable=not is_terminal) as bar:

        def advance(numbers: dict[str, str], count: int = 1) -> None:
            nonlocal done, told
            done += count
            if is_terminal:
                bar.set_postfix(numbers, refresh=False)
                bar.update(count)
                return
            now = time.monotonic()
            if done >= total or now - told >= SECONDS:
                shown = ", ".join(f"{key}={value}" for key, value in numbers.items())
                elapsed = now - started
                form = {"prefix": name, "unit": unit, "postfix": shown, "bar_format": LINE, "initial": initial}
                tell(tqdm.format_meter(done, total, elapsed, **form))
                told = now

        yield advance
