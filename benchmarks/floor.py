"""The least time that a PPO step on a GPT-2 can take here: its matrix products alone, at the rate of large square ones.

They are counted exactly, but for the value head's, whose output is one column wide: sampling with a cache, scoring by
policy and reference, forward and backward passes of every PPO epoch; logits of response positions only. Attention
counts what a mask hides (1 to 2 % of the whole), as the products that libraries compute do.
"""

import time
from collections import Counter
from typing import NamedTuple

import torch

SQUARE = {"cpu": 2048, "cuda": 8192}  # rows and columns of the large products


class Size(NamedTuple):
    """A GPT-2, and a step of PPO on prompts of `query_len` and responses of `response_len` tokens."""

    hidden: int
    layers: int
    heads: int
    vocab: int
    batch: int
    minibatch: int
    query_len: int
    response_len: int
    ppo_epochs: int


def forward_products(size: Size, rows: int, new: int, context: int, predicted: int) -> Counter:
    """How often each product, (matrices, m, k, n), occurs in a forward pass of `rows` rows of `new` tokens each.

    Every token attends to `context` tokens, itself and what is masked included; `predicted` a row have logits.
    """
    tokens, width, head, matrices = rows * new, size.hidden, size.hidden // size.heads, rows * size.heads
    attention = [(1, tokens, width, 3 * width), (matrices, new, head, context), (matrices, new, context, head)]
    linear = [(1, tokens, width, width), (1, tokens, width, 4 * width), (1, tokens, 4 * width, width)]
    return Counter((attention + linear) * size.layers + [(1, rows * predicted, width, size.vocab)])


def backward_products(products: Counter) -> Counter:
    """C = AB has two gradients: that of A is (m, n) by (n, k), that of B is (k, m) by (m, n)."""
    found = Counter()
    for (matrices, m, k, n), times in products.items():
        found += Counter({(matrices, m, n, k): times}) + Counter({(matrices, k, m, n): times})
    return found


def repeated(products: Counter, times: int) -> Counter:
    return Counter({product: count * times for product, count in products.items()})


def matrix_products(size: Size) -> dict[str, Counter]:
    """A step's matrix products, by its parts. A response's last token is only drawn: what would follow is not asked."""
    length = size.query_len + size.response_len - 1
    sampling = forward_products(size, size.batch, size.query_len, size.query_len, 1)
    for context in range(size.query_len + 1, length + 1):
        sampling += forward_products(size, size.batch, 1, context, 1)
    one_pass = forward_products(size, size.minibatch, length, length, size.response_len)
    scoring = repeated(one_pass, size.batch // size.minibatch)
    update = repeated(scoring, size.ppo_epochs)
    parts = {"sampling": sampling, "scoring": scoring, "reference": scoring}
    return parts | {"update forward": update, "update backward": backward_products(update)}


def flops(products: Counter) -> int:
    return sum(2 * matrices * m * k * n * times for (matrices, m, k, n), times in products.items())


def product_seconds(product: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> float:
    """The best time of a matrix product, of four runs or more in 20 ms, or of as many as start within two seconds."""
    matrices, m, k, n = product
    left, right = (torch.randn(matrices, *shape, device=device).to(dtype).squeeze(0) for shape in ((m, k), (k, n)))
    runs, wait = (20, torch.cuda.synchronize) if device.type == "cuda" else (1, lambda: None)  # a wait takes a while
    times = []
    while sum(times) < (2 if len(times) < 4 else 0.02):
        wait()
        started = time.perf_counter()
        for _ in range(runs):
            left @ right
        wait()
        times.append((time.perf_counter() - started) / runs)
    return min(times)


def measure_floor(size: Size, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """A step's work, the rates here of large squares and of the step's own shapes one by one, and its time at each."""
    side = SQUARE[device.type]
    square = 2 * side**3 / product_seconds((1, side, side, side), dtype, device)
    products = sum(matrix_products(size).values(), Counter())
    own = sum(product_seconds(product, dtype, device) * times for product, times in products.items())
    work = flops(products)
    rates = {"gflops_squares": square / 1e9, "gflops_own_shapes": work / own / 1e9}
    return {"gflop": work / 1e9, **rates, "floor_s": work / square, "floor_own_shapes_s": own}
