"""Test-wide settings: torchtyping's runtime checks work, and a skip that nobody agreed to fails the run."""

import atexit
import os
import shutil
import sys
import tempfile

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # before its library is imported: what it saves says how it was loaded
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="state-")  # where trust.py keeps notes, in place of the user's
atexit.register(shutil.rmtree, os.environ["XDG_STATE_HOME"], ignore_errors=True)

# torchtyping 0.1.5 reads Tensor.names, which PyTorch 2.13 no longer has.
if not hasattr(torch.Tensor, "names"):
    torch.Tensor.names = property(lambda tensor: (None,) * tensor.ndim)

torch.set_num_threads(1)  # the tests' tensors are small, and two test processes share the cores

AGREED_SKIPS = {  # names of tests that may be skipped, with the reason beside each
    "test_freed_memory_is_used_again_without_the_system",  # macOS and musl have allocators of their own
    "test_wandb_keeps_a_run_offline",  # the three are large, each of use to its users alone, and not in
    "test_trackio_keeps_a_run_in_its_folder",  # requirements.txt: pip install wandb trackio swanlab to test them
    "test_swanlab_keeps_a_run_offline",
}

unexpected_skips: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    agreed = report.nodeid.split("::")[-1].split("[")[0] in AGREED_SKIPS or "browser" in report.keywords
    if report.skipped and not agreed:
        unexpected_skips.append(report.nodeid)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if unexpected_skips and session.exitstatus == 0:
        print("\nskipped, and not on the list of agreed skips:", *unexpected_skips, sep="\n  ")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(autouse=True)
def same_numbers():
    """No test's result hangs on those that ran before it in the same process."""
    if "dataset" in sys.modules:  # it is not to be imported before typeguard looks
        sys.modules["dataset"].split_parts.cache_clear()  # of files that have one name in the folders of several tests
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.enable_flash_sdp(True)
