"""Where numbers are computed, and how float32 is multiplied there: as fast as it goes while it stays float32."""

import ctypes
import sys
from contextlib import suppress

import torch

from config import Config, UsageError

EXACT = 1e-6  # relative error of a product that is still one of float32


def prepare_device(config: Config) -> torch.device:
    """The device to compute on, with torch set to the matrix products that --matmul_precision asks for there."""
    device = pick_device(config.device)
    precision = config.matmul_precision
    torch.set_float32_matmul_precision(fastest_exact(device) if precision == "auto" else precision)
    if device.type == "cpu":
        # Fused attention multiplies block by block: slow by oneDNN, but short of memory that grows with length squared.
        fused = torch.get_float32_matmul_precision() == "highest"
        torch.backends.cuda.enable_flash_sdp(fused or config.max_prompt_length + config.max_new_tokens > 256)
    return device


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU. Raises UsageError for a device that is not here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    with suppress(RuntimeError, AssertionError):
        if torch.device(name).type in ("cpu", "cuda"):
            return torch.empty(0, device=name).device
    raise UsageError(f"--device {name} cannot be used here; expected auto, cpu or cuda")


def fastest_exact(device: torch.device) -> str:
    """The loosest of torch's settings at which a product here still has the error of float32.

    `medium` lets a product be taken in bfloat16, which some processors do; on others it takes another library, oneDNN,
    that works in float32, on AMD's with AVX-512 twice as fast. `high` is for TF32, which GPUs have.
    """
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(512, 512, generator=generator).to(device) for _ in range(2))
    exact = left.double() @ right.double()
    for precision in ("medium", "high"):
        torch.set_float32_matmul_precision(precision)
        if (left @ right - exact).norm() < EXACT * exact.norm():
            return precision
    return "highest"


def keep_freed_memory() -> None:
    """Have memory that is freed wait in this process for its next use, where the allocator is glibc's.

    Given back to the system, as is its habit with large blocks, memory returns page by page and zeroed: a sixth of a
    step's time with GPT-2 on a CPU. To be called after an update, when little is in use: what is free then does go
    back, or holes between what stays would add up. The first update runs as ever, so that Adam's moments, which are
    made in it and stay, lie in mappings of their own.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.malloc_trim(0)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own, which would end with it
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap is not cut when its end is freed
