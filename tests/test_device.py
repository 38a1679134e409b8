"""Where numbers are computed: on the device asked for, at the speed that float32's own error allows."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_close
from tiny_models import tiny_policy

import device
from config import Config, UsageError
from dataset import pad
from device import loosest_exact, pick_device, prepare_device

CPU = torch.device("cpu")


def test_devices():
    assert pick_device("cpu") == CPU
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu", "cuda:99", "hpu", "privateuseone", "meta"):
        with pytest.raises(UsageError, match=f"--device {name} cannot be used here; expected auto, cpu or cuda"):
            pick_device(name)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_a_precision_that_is_asked_for_is_set(precision):
    assert prepare_device(Config(device="cpu", matmul_precision=precision)) == CPU
    assert torch.get_float32_matmul_precision() == precision


def test_products_by_default_have_the_error_of_float32():
    """bfloat16 has 8 bits: its products are wrong by 2e-3. Other shapes than the one that is measured."""
    prepare_device(Config(device="cpu"))
    generator = torch.Generator().manual_seed(1)
    for m, k, n in ((3, 700, 129), (64, 64, 64), (257, 128, 1)):
        left = torch.randn(m, k, generator=generator)
        right = torch.randn(k, n, generator=generator)
        exact = left.double() @ right.double()
        assert (left @ right - exact).norm() < 1e-6 * exact.norm()


@pytest.mark.parametrize(("exact", "expected"), [("medium", "medium"), ("high", "high"), ("highest", "highest")])
def test_the_loosest_exact_precision_is_found(exact, expected, monkeypatch):
    """A processor that multiplies in bfloat16 at every setting that is looser than `exact`."""
    order = ("medium", "high", "highest")
    product = torch.Tensor.__matmul__

    def rounded(left, right):
        precision = torch.get_float32_matmul_precision()
        if order.index(precision) < order.index(exact) and left.dtype == torch.float32:
            left = left.bfloat16().float()
            right = right.bfloat16().float()
        differs = 0 if precision == "highest" else 1e-7
        return (product(left.double(), right.double()) * (1 + differs)).to(left.dtype)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    assert loosest_exact(CPU) == expected
    assert torch.get_float32_matmul_precision() == "highest"
    prepare_device(Config(device="cpu"))
    assert torch.get_float32_matmul_precision() == expected


def test_a_setting_that_changes_no_product_is_not_taken(monkeypatch):
    product = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda left, right: product(left.double(), right.double()).float())
    assert loosest_exact(CPU) == "highest"


def test_finding_it_draws_none_of_the_runs_random_numbers():
    state = torch.get_rng_state()
    prepare_device(Config(device="cpu"))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("settings", "fused"),
    [
        ({"max_new_tokens": 128, "context_length": 256}, False),
        ({"max_new_tokens": 129, "context_length": 8}, True),
        ({"max_new_tokens": 8, "context_length": 257}, True),
        ({"max_new_tokens": 8, "context_length": 8, "matmul_precision": "highest"}, True),
        ({"max_new_tokens": 8, "context_length": 8, "mixed_precision": "bf16"}, True),
    ],
)
def test_attention_is_fused_where_that_is_fast_or_texts_are_long(settings, fused):
    prepare_device(Config(**{"device": "cpu", "matmul_precision": "medium", "max_prompt_length": 128} | settings))
    assert torch.backends.cuda.flash_sdp_enabled() == fused


def test_attention_is_the_same_fused_or_not():
    policy = tiny_policy("gpt2")
    query_ids, query_mask = pad([[5, 3, 8, 2], [4]], 0, "left")
    response_ids, mask = pad([[3, 4, 9], [5]], 0, "right")
    found = {}
    for fused in (True, False):
        torch.backends.cuda.enable_flash_sdp(fused)
        with torch.profiler.profile() as profile, torch.no_grad():
            scores = policy.score(
                query_ids=query_ids, query_mask=query_mask, response_ids=response_ids, response_mask=mask
            )
        kernels = [event.name for event in profile.events()]
        assert any("flash_attention" in name for name in kernels) == fused
        found[fused] = scores
    assert_close(found[True].logprobs[mask], found[False].logprobs[mask])
    assert_close(found[True].values[mask], found[False].values[mask])


FAULTS = """
import resource
import torch
from device import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for i in range(10):
        torch.zeros(2**24 - 1024 * i)  # 64 MiB, and a little less each time, as glibc looks for a little more
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first = faults()
keep_freed_memory()
print(first, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator than glibc's")
def test_freed_memory_is_used_again_without_the_system():
    """Ten tensors one after another: the system gives each its pages, of 4 KiB or 2 MiB; kept, the first alone."""
    here = Path(device.__file__).parent
    done = subprocess.run([sys.executable, "-c", FAULTS], cwd=here, capture_output=True, text=True, check=True)
    first, kept = (int(number) for number in done.stdout.split())
    assert first > 10 * 64 / 2 and kept < first / 5
