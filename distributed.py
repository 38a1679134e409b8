"""Several processes that train one policy: who this one is, and how they tell each other what they have found.

`torchrun` starts them, and says in the environment who is who. Each has the whole policy, works on its share of the
rows, and gets from every meeting what all of them have: so all go on alike, with the functions that one process has.
One process alone has everything for its share, and its meetings give back what it brings.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from config import RunError, UsageError, first_line

PATIENCE = timedelta(days=1)  # for one that works; one that has died is noticed at once, as its connections close
BUCKET = 2**23  # numbers that are summed at a time


@contextmanager
def processes() -> Iterator[None]:
    """In the block, the processes that torchrun has started are a group; nothing happens to one that is alone.

    On CPUs they talk by gloo, about tensors on GPUs by nccl. Raises UsageError where they cannot find each other.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(backend, timeout=PATIENCE)
    except (ValueError, RuntimeError) as error:
        count = os.environ["WORLD_SIZE"]
        raise UsageError(
            f"the {count} processes that WORLD_SIZE names cannot find each other ({first_line(error)}): "
            f"expected a start by torchrun --nproc_per_node {count} main.py ..., or no WORLD_SIZE"
        ) from error
    yield
    dist.destroy_process_group()  # after an error it would wait for those that wait for this one


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the process that writes files, and is heard."""
    return rank() == 0


def own_share(n: int) -> slice:
    """Which of n rows are this process's: neighbours, and as many as the others have, or one fewer."""
    return slice(n * rank() // size(), n * (rank() + 1) // size())


def own_of_sorted(lengths: torch.Tensor) -> torch.Tensor:
    """The numbers of the rows that are this process's, of like lengths as the others have; none may be left for it."""
    return lengths.argsort(stable=True)[rank() :: size()]


@contextmanager
def meeting() -> Iterator[None]:
    """Raise RunError where the others cannot be met."""
    try:
        yield
    except RuntimeError as error:  # of gloo and nccl
        raise RunError(
            "another process of this run has ended, or cannot be reached, and none can go on without it; "
            "what ended it is told by itself, or by torchrun"
        ) from error


def gathered(value) -> list:
    """What each process brings, in their order; tensors are to be in the CPU's memory, where they arrive."""
    if size() == 1:
        return [value]
    values = [None] * size()
    with meeting():
        dist.all_gather_object(values, value)
    return values


def from_first(make: Callable):
    """What `make` gives in the first process, which alone calls it; the others wait until they are told."""
    box = [make() if is_first() else None]
    if size() > 1:
        with meeting():
            dist.broadcast_object_list(box)
    return box[0]


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Let every process have the sum of all processes' gradients, the same to the bit.

    That is the gradient of the whole step, as each loss has the whole step's token count for its divisor. It is done
    once a step, here, and not by DistributedDataParallel during `backward`: that takes means, which are not the step's
    unless all have as many tokens; it waits for as many backward passes in every process, and for a gradient of every
    parameter, where a process may have no row of a step at all; and it sees only what is called through its wrapper.
    """
    if size() == 1:
        return
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    counts = torch.tensor([parameter.grad is not None for parameter in trained]).int()
    with meeting():
        dist.all_reduce(counts)
    used = [parameter for parameter, count in zip(trained, counts.tolist(), strict=True) if count]
    for bucket in buckets(used):
        sum_bucket(bucket)


def buckets(parameters: list[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    """The parameters, in order, in lists of one dtype with about BUCKET numbers: few meetings, and little memory."""
    bucket = []
    for parameter in parameters:
        is_full = sum(other.numel() for other in bucket) >= BUCKET
        if bucket and (is_full or bucket[0].dtype != parameter.dtype):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


def sum_bucket(parameters: list[torch.nn.Parameter]) -> None:
    """The sums of some parameters' gradients, in one meeting; where this process has no gradient, it brings zeros."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    with meeting():
        dist.all_reduce(flat)
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)
