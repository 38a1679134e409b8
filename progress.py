"""How far a long piece of work is: a bar on a terminal, and a line now and then where standard error is a file."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from tqdm import tqdm

SECONDS = 30  # between two lines in a file
STEERING = (*range(32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A))  # the last: letters' order
LINE = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


def visible(text: str, keep: str = "\n\t") -> str:
    """The text with escapes in place of the characters that a terminal would obey: control characters, but for those to
    keep, and what has the letters behind it stand in another order. What models and data say is only to be read.
    """
    return text.translate({code: repr(chr(code))[1:-1] for code in STEERING if chr(code) not in keep})


def tell(text: str) -> None:
    """A line on standard error; nothing where it is closed, or its disk is full: no work fails for that."""
    if sys.stderr:
        with suppress(OSError):
            print(visible(text, keep=""), file=sys.stderr, flush=True)


def say(text: str) -> None:
    """Text on standard output, above the bars where it is a terminal that has some."""
    tqdm.write(visible(text))


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
