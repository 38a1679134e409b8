"""Where numbers are computed, how float32 is multiplied there, and what becomes of memory that is freed."""

import ctypes
import math
import os
import platform
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import torch

from config import Config, UsageError
from distributed import size
from files import state_folder

EXACT = 1e-6  # relative error of a product that is still one of float32
CLEARLY = 0.75  # of the time that torch's own products take: where it was 0.83, whole steps gained nothing
WIDEST, MOST_ROWS = 768, 256  # of the matrices that are timed; larger ones take longer, and say the same
LEAST_ROUNDS, MOST_ROUNDS, TIMING_S = 3, 100, 0.2  # of timing; the seconds end it in between


def prepare_device(config: Config) -> torch.device:
    """The device to compute on, with float32 multiplied there as --matmul_precision says; where that is `auto`, as by
    torch itself, until there is a model for `choose_precision`.
    """
    device = pick_device(config.device)
    set_precision("highest" if config.matmul_precision == "auto" else config.matmul_precision, config, device)
    return device


def set_precision(precision: str, config: Config, device: torch.device) -> None:
    """Have torch multiply float32 by that setting, and attend in the way that goes with it."""
    torch.set_float32_matmul_precision(precision)
    # Fused attention multiplies block by block, for which oneDNN in float32 is slow, but keeps no (time, time) tensor.
    by_onednn = device.type == "cpu" and precision != "highest" and config.mixed_precision == "no"
    longest = max(config.context_length, config.max_prompt_length + config.max_new_tokens)
    torch.backends.cuda.enable_flash_sdp(not by_onednn or longest > 256)


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
    usable = "auto, cpu or cuda" if torch.cuda.is_available() else "auto or cpu"
    raise UsageError(f"--device {name} cannot be used here; expected {usable}")


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


# --------------------------------------------------------------------------------------------------------------------
# --matmul_precision auto
# --------------------------------------------------------------------------------------------------------------------


def settle_precision(model: torch.nn.Module, work: Counter[int], config: Config) -> None:
    """Have torch multiply as `choose_precision` says for the model."""
    set_precision(choose_precision(model, work, config), config, model.device)


def choose_precision(model: torch.nn.Module, work: Counter[int], config: Config) -> str:
    """--matmul_precision; for `auto` the setting that multiplies matrices as wide as the model's, of so many rows by
    how often, fastest on this processor, of those with the error of float32: `highest` unless another clearly is.

    It is found once and noted: two starts of a run are to give the same bytes, and times vary.
    """
    if config.matmul_precision != "auto":
        return config.matmul_precision
    exact = exact_precisions(model.device)
    if len(exact) == 1:
        return exact[0]
    width = min(WIDEST, max(min(weight.shape) for weight in model.parameters() if weight.dim() == 2))
    passes = " and ".join(f"{n} x {rows} rows" for rows, n in work.items())
    situation = f"{processor()}, torch {torch.__version__}, {torch.get_num_threads()} threads, width {width}, {passes}"
    found = noted_precision(situation)
    if found is None:
        found = fastest(exact, work, width)
        if not config.dry_run:
            note_precision(situation, found)
        found = noted_precision(situation) or found  # of two processes, that of the first to note it
    return found if found in exact else exact[0]


def exact_precisions(device: torch.device) -> list[str]:
    """`highest`, and those of torch's settings that compute a product in another way, with the error of float32 still.

    `medium` lets a product be taken in bfloat16, which some processors do; on others it takes another library, oneDNN,
    that works in float32: on some of AMD's faster than MKL, on Intel's slower. `high` is for TF32, which GPUs have.
    """
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(512, 512, generator=generator).to(device)
    right = torch.randn(512, 512, generator=generator).to(device)
    before = torch.get_float32_matmul_precision()
    products = {}
    for precision in ("highest", "medium", "high"):
        torch.set_float32_matmul_precision(precision)
        product = left @ right
        if not any(torch.equal(product, other) for other in products.values()):
            products[precision] = product
    torch.set_float32_matmul_precision(before)
    exact = left.double() @ right.double()
    close = [name for name, product in products.items() if (product - exact).norm() < EXACT * exact.norm()]
    return ["highest", *(name for name in close if name != "highest")]


def work_of_run(config: Config) -> Counter[int]:
    """How often an update multiplies matrices of how many rows by each weight matrix: all prompts' next tokens when it
    samples; the tokens of a minibatch when it scores, twice, and, forward and backward, when it learns.
    """
    tokens = config.batch_size * (config.max_prompt_length + config.max_new_tokens)
    sampling = products(config.batch_size, config.batch_size * config.max_new_tokens)
    minibatch = min(config.mini_batch_size, config.batch_size) * tokens // config.batch_size
    return sampling + products(minibatch, tokens * (2 + 3 * config.ppo_epochs))


def products(rows: int, total: int = 1) -> Counter[int]:
    """So many rows, `total` of them, as products of at most MOST_ROWS each: the same work in what is timed soon."""
    rows = min(rows, MOST_ROWS)
    return Counter({rows: math.ceil(total / rows)})


def fastest(precisions: list[str], work: Counter[int], width: int) -> str:
    """The setting by which the work, products of so many rows by how often, takes the least time; the first of them
    where none is clearly faster. Each has its turn in every round, and its shortest time counts.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = {rows: ((rows, width), (width, 4 * width), (rows, 4 * width)) for rows in work}
    operands = {rows: [torch.randn(*shape, generator=generator) for shape in shapes[rows]] for rows in work}
    before = torch.get_float32_matmul_precision()
    times = {precision: dict.fromkeys(work, math.inf) for precision in precisions}
    started = time.perf_counter()
    for done in range(MOST_ROUNDS):
        if done >= LEAST_ROUNDS and time.perf_counter() - started > TIMING_S:
            break
        for precision in precisions:
            torch.set_float32_matmul_precision(precision)
            for rows in work:
                times[precision][rows] = min(times[precision][rows], product_seconds(*operands[rows]))
    torch.set_float32_matmul_precision(before)
    totals = {name: sum(n * times[name][rows] for rows, n in work.items()) for name in precisions}
    best = min(precisions, key=totals.get)
    return best if totals[best] < CLEARLY * totals[precisions[0]] else precisions[0]


def product_seconds(x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor) -> float:
    """CPU time of a layer's product and its two gradients, of all threads: how long other processes keep them waiting
    is no part of it.
    """
    started = time.process_time()
    x @ weight
    grad @ weight.T
    x.T @ grad
    return time.process_time() - started


def processor() -> str:
    """What kind of processor this is."""
    names = ("vendor_id", "cpu family", "model", "CPU implementer", "CPU part")
    lines = []
    with suppress(OSError):  # Linux alone has it
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0].split("\n")
    values = [line.partition(":")[2].strip() for line in lines if line.startswith(names)]
    return " ".join(values) or f"{platform.machine()} {platform.processor()}"


def notes_file() -> Path:
    return state_folder() / "matmul_precision"


def noted_precision(situation: str) -> str | None:
    """What was noted first for the situation."""
    with suppress(OSError, ValueError, RuntimeError):
        for line in notes_file().read_text(encoding="utf-8").split("\n"):
            known, _, precision = line.rpartition(": ")
            if known == situation:
                return precision
    return None


def note_precision(situation: str, precision: str) -> None:
    """Add a line to what is noted. Where nothing can be noted, each start finds out for itself."""
    with suppress(OSError, RuntimeError):
        notes_file().parent.mkdir(parents=True, exist_ok=True)
        with notes_file().open("a", encoding="utf-8") as file:
            file.write(f"{situation}: {precision}\n")


# --------------------------------------------------------------------------------------------------------------------
# Memory
# --------------------------------------------------------------------------------------------------------------------


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
