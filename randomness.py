"""Random numbers that need no memory: each is a function of (seed, what it is for, number).

A generator is made for them on the spot and thrown away. So none has a state to save, nothing that one part of a run
draws moves another, two evaluations draw alike, and a run goes on from the number of its next update alone. Whoever
needs a part of a batch makes the numbers of the whole batch, which are few, and keeps its rows.

Initial weights are the one exception: torch draws them from its global generator, which is seeded before each stage.
"""

import numpy as np
import torch
from torchtyping import TensorType

PURPOSES = (  # and what `number` counts
    "prompts",  # passes over the prompts of PPO
    "sampling",  # updates
    "steps",  # updates, and in each the epochs: the order of the rows
    "evaluation",  # nothing: every evaluation draws alike
    "generate",  # responses of the generate task
    "texts",  # passes over the texts of a stage
    "cuts",  # batches of the reward stage
)


def generator(seed: int, purpose: str, number: int, part: int = 0) -> np.random.Generator:
    """A new generator for one purpose; `part` tells the draws of one number apart. Below 2³² each, none negative."""
    return np.random.default_rng([seed, PURPOSES.index(purpose), number, part])


def uniforms(seed: int, purpose: str, number: int, shape: tuple[int, int]) -> TensorType["rows", "columns"]:
    """Numbers in [0, 1), float64. The first rows are the same however many rows there are."""
    return torch.from_numpy(generator(seed, purpose, number).random(shape))


def permutation(seed: int, purpose: str, number: int, n: int, part: int = 0) -> TensorType["n"]:
    """0, 1, ..., n - 1 in random order, in 32 bits: they may be ten million."""
    numbers = np.arange(n, dtype=np.int32)
    generator(seed, purpose, number, part).shuffle(numbers)
    return torch.from_numpy(numbers)
