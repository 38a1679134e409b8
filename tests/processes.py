"""Several processes of a test's own, in the environment that torchrun would give them.

They are forked from one that has imported what takes seconds to import, and does nothing else, so that a start costs
tenths of a second.
(PYTEST_DONT_REWRITE: there are no tests in here.)
"""

import multiprocessing
import os
import pickle
import socket
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "transformers", "train", "tiny_models"])


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def child(environment: dict[str, str], task: bytes, answer: Connection) -> None:
    os.environ |= environment
    torch.set_num_threads(1)
    work, arguments = pickle.loads(task)  # here, as what it imports reads the environment
    answer.send_bytes(pickle.dumps(work(*arguments)))


def in_processes(work: Callable, *arguments, n: int = 2, seconds: float = 60) -> list:
    """What `work(*arguments)` gives in each of n processes; None for one that has died before.

    Raises AssertionError if one takes longer than so many seconds. None lives on.
    """
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(n)}
    running = []
    for number in range(n):
        here, there = FORKS.Pipe(duplex=False)
        own = shared | {"RANK": str(number), "LOCAL_RANK": str(number)}
        process = FORKS.Process(target=child, args=(own, pickle.dumps((work, arguments)), there))
        process.start()
        there.close()  # so that the end of the process is the end of what it says
        running.append((process, here))
    try:
        return [result_of(connection, seconds) for _, connection in running]
    finally:
        for process, _ in running:
            process.kill()
            process.join()


def result_of(connection: Connection, seconds: float):
    assert connection.poll(seconds), "a process hangs"
    try:
        return pickle.loads(connection.recv_bytes())
    except EOFError:
        return None
