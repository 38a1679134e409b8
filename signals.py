"""Requests to stop: a first one is kept until what has begun is done, a second one ends the process."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

AT_ONCE = b"\nstopped at once; --resume goes on with what had been saved\n"
STOPPING = b"\nstopping after this update, with all that is trained saved; a second time, it stops at once\n"


@contextmanager
def requests_to_stop() -> Iterator[Callable[[], int]]:
    """Have SIGTERM, SIGHUP and Ctrl-C in the block do no more than be noted: yields a function that gives the signal's
    number, or 0 where there was none. The second one ends the process, but for those that torchrun sends on to all of
    its processes. One that was ignored, as in a job in the background, is.
    """
    received = []
    is_sent_on = "TORCHELASTIC_RUN_ID" in os.environ

    def note(number: int, _) -> None:
        if received and (number == signal.SIGINT or not is_sent_on):
            os.write(2, AT_ONCE)
            os._exit(128 + number)
        if not received and os.environ.get("RANK", "0") == "0":
            os.write(2, STOPPING)
        received.append(number)

    requests = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    numbers = [number for number in requests if signal.getsignal(number) is not signal.SIG_IGN]
    if threading.current_thread() is not threading.main_thread():  # which alone may say what a signal does
        numbers = []
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield lambda: received[0] if received else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
