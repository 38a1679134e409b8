"""Requests to stop: a first one is kept until what has begun is done, a second one ends the process."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STOPPING = b"\nstopping after this update, with all that is trained saved; a second time, it stops at once\n"


@contextmanager
def requests_to_stop() -> Iterator[Callable[[], int]]:
    """Have SIGTERM and Ctrl-C in the block do no more than be noted: yields a function that gives the signal's number,
    or 0 where there was none. The second one ends the process. One that was ignored, as in a job in the background, is.
    """
    received = []

    def note(number: int, _) -> None:
        if received:
            os._exit(128 + number)
        received.append(number)
        os.write(2, STOPPING)

    numbers = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is not signal.SIG_IGN]
    if threading.current_thread() is not threading.main_thread():  # which alone may say what a signal does
        numbers = []
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield lambda: received[0] if received else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
