"""What else the machine was doing, so that a time taken on a shared one can be judged; and the memory used. Linux."""

import os
import resource
import time
from pathlib import Path

QUIET = 0.15  # cores that other processes may take


def cpu_seconds() -> tuple[float, float]:
    """CPU time of this process, and of all together."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().split()[1:9]]
    return time.process_time(), (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # not idle, iowait


def foreign_cores(before: tuple[float, float], seconds: float) -> float:
    """How many cores other processes took on average in the `seconds` since `before`."""
    own, everyone = (now - then for now, then in zip(cpu_seconds(), before, strict=True))
    return max(0.0, everyone - own) / seconds


def wait_quiet(limit: float) -> None:
    """Sleep until other processes leave the cores idle for a second, at most `limit` seconds."""
    end, busy = time.perf_counter() + limit, QUIET
    while busy >= QUIET and time.perf_counter() < end:
        before = cpu_seconds()
        time.sleep(1)
        busy = foreign_cores(before, 1)


def peak_mb() -> float:
    """The most resident memory that this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
