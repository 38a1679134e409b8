"""Where numbers are computed, how float32 is multiplied there, and what becomes of memory that is freed."""

import ctypes
import os
import sys
from contextlib import suppress

import torch

from config import Config, UsageError
from distributed import size

EXACT = 1e-6  # relative error of a product that is still one of float32


def prepare_device(config: Config) -> torch.device:
    """The device to compute on, with torch set to the matrix products that --matmul_precision asks for there."""
    device = pick_device(config.device)
    precision = config.matmul_precision
    if precision == "auto":
        precision = loosest_exact(device)
    torch.set_float32_matmul_precision(precision)
    # Fused attention multiplies block by block, for which oneDNN in float32 is slow, but keeps no (time, time) tensor.
    by_onednn = device.type == "cpu" and precision != "highest" and config.mixed_precision == "no"
    longest = max(config.context_length, config.max_prompt_length + config.max_new_tokens)
    torch.backends.cuda.enable_flash_sdp(not by_onednn or longest > 256)
    return device


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU. Raises UsageError for a device that is not here.

    Of several processes, each takes a GPU of its own.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if size() > 1 and name.startswith("cuda"):
        own_gpu(name)
    with suppress(RuntimeError, AssertionError):
        if torch.device(name).type in ("cpu", "cuda"):
            return torch.empty(0, device=name).device
    raise UsageError(f"--device {name} cannot be used here; expected auto, cpu or cuda")


def own_gpu(name: str) -> None:
    """Let `cuda` be the GPU that no other process of this machine takes. Raises UsageError if there is none."""
    number, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if name != "cuda":
        raise UsageError(f"--device {name} is one GPU, and each of {size()} processes needs its own; expected cuda")
    if number >= there:
        raise UsageError(
            f"process {number} of this machine has no GPU of its own: there {'is' if there == 1 else 'are'} {there}; "
            f"expected torchrun --nproc_per_node {there}, or --device cpu"
        )
    torch.cuda.set_device(number)


def loosest_exact(device: torch.device) -> str:
    """The loosest of torch's settings that computes a product in another way, and with the error of float32 still.

    `medium` lets a product be taken in bfloat16, which some processors do; on others it takes another library, oneDNN,
    that works in float32, on AMD's with AVX-512 twice as fast. `high` is for TF32, which GPUs have.
    """
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(512, 512, generator=generator).to(device)
    right = torch.randn(512, 512, generator=generator).to(device)
    before = torch.get_float32_matmul_precision()
    products = {}
    for precision in ("medium", "high", "highest"):
        torch.set_float32_matmul_precision(precision)
        products[precision] = left @ right
    torch.set_float32_matmul_precision(before)
    exact = left.double() @ right.double()
    for precision, product in products.items():
        differs = not torch.equal(product, products["highest"])
        if differs and (product - exact).norm() < EXACT * exact.norm():
            return precision
    return "highest"


def keep_freed_memory() -> None:
    """Have memory that is freed wait in this process for its next use, where the allocator is glibc's, until the next
    call; call it after an update, when little is in use.

    The habit is to give large blocks back to the system at once, and they return page by page and zeroed: a sixth of a
    step's time with GPT-2 on two cores. What is free at the call is given back, lest holes between what stays add up.
    The first update runs as ever, so that Adam's moments, which are made in it and stay, have mappings of their own.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own, which would end with it
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap is not cut when its end is freed
