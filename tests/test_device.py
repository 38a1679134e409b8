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
from device import choose_precision, exact_precisions, fastest, pick_device, prepare_device, work_of_run

CPU = torch.device("cpu")


@pytest.fixture
def notes(tmp_path, monkeypatch):
    """What earlier tests have noted is not there."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "ppo/matmul_precision"


def choose(config: Config) -> str:
    return choose_precision(tiny_policy("gpt2").language_model, work_of_run(config), config)


def takes(monkeypatch, seconds: dict[str, list[float]]) -> list[str]:
    """A processor whose products take as long as this says, by setting, turn by turn; the settings that were timed."""
    asked = []

    def stub(*_):
        precision = torch.get_float32_matmul_precision()
        asked.append(precision)
        times = seconds[precision]
        return times[min(asked.count(precision), len(times)) - 1]

    monkeypatch.setattr(device, "product_seconds", stub)
    return asked


def test_devices():
    assert pick_device("cpu") == CPU
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    usable = "auto, cpu or cuda" if torch.cuda.is_available() else "auto or cpu$"
    for name in ("gpu", "cuda:99", "hpu", "privateuseone", "meta"):
        with pytest.raises(UsageError, match=f"--device {name} cannot be used here; expected {usable}"):
            pick_device(name)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_a_precision_that_is_asked_for_is_set(precision):
    assert prepare_device(Config(device="cpu", matmul_precision=precision)) == CPU
    assert torch.get_float32_matmul_precision() == precision


def test_where_none_is_asked_for_it_is_torchs_own_until_there_is_a_model():
    """Not what the stage before has left: what is computed on the way to a model does not hang on it."""
    torch.set_float32_matmul_precision("medium")
    prepare_device(Config(device="cpu"))
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("time", [1.0, 0.01])
def test_products_by_default_have_the_error_of_float32(time, notes, monkeypatch):
    """bfloat16 has 8 bits: its products are wrong by 2e-3. Other shapes than the one that is measured, and also where
    what is not torch's own is taken for faster."""
    takes(monkeypatch, {"highest": [1.0], "high": [time], "medium": [time]})
    torch.set_float32_matmul_precision(choose(Config()))
    generator = torch.Generator().manual_seed(1)
    for m, k, n in ((3, 700, 129), (64, 64, 64), (257, 128, 1)):
        left = torch.randn(m, k, generator=generator)
        right = torch.randn(k, n, generator=generator)
        exact = left.double() @ right.double()
        assert (left @ right - exact).norm() < 1e-6 * exact.norm()


ORDER = ("medium", "high", "highest")


def multiplies(monkeypatch, exact: str) -> None:
    """A processor that multiplies in bfloat16 at every setting that is looser than `exact`, and by a way of its own at
    every one that is not `highest`."""
    product = torch.Tensor.__matmul__

    def rounded(left, right):
        precision = torch.get_float32_matmul_precision()
        if ORDER.index(precision) < ORDER.index(exact) and left.dtype == torch.float32:
            left = left.bfloat16().float()
            right = right.bfloat16().float()
        differs = 0 if precision == "highest" else 1e-7
        return (product(left.double(), right.double()) * (1 + differs)).to(left.dtype)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)


@pytest.mark.parametrize("exact", ORDER)
def test_the_fastest_exact_precision_is_found_and_noted(exact, notes, monkeypatch):
    """What is not exact is not even timed, however fast it may be."""
    multiplies(monkeypatch, exact)
    asked = takes(monkeypatch, {"highest": [1.0], "high": [0.5], "medium": [0.1]})
    assert choose(Config()) == exact
    assert torch.get_float32_matmul_precision() == "highest"
    assert not asked if exact == "highest" else set(asked) <= set(ORDER[ORDER.index(exact) :])
    assert notes.exists() == (exact != "highest")


def test_a_setting_that_changes_no_product_is_none_of_its_own(monkeypatch):
    product = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda left, right: product(left.double(), right.double()).float())
    assert exact_precisions(CPU) == ["highest"]


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({"highest": [2.0], "medium": [1.0]}, "medium"),  # as on AMD's processors
        ({"highest": [1.0], "medium": [1.4]}, "highest"),  # as on Intel's
        ({"highest": [1.0], "medium": [1.0]}, "highest"),
        ({"highest": [1.0], "medium": [0.8]}, "highest"),  # too little for a whole step to gain
        ({"highest": [1.0, 1.0, 0.1], "medium": [0.5]}, "highest"),  # whatever once took it longer is not its own
        ({"highest": [1.0], "medium": [9.0, 0.6]}, "medium"),
    ],
)
def test_the_fastest_is_taken_where_it_clearly_is(seconds, expected, monkeypatch):
    asked = takes(monkeypatch, seconds)
    assert fastest(["highest", "medium"], {8: 10}, width=4) == expected
    assert device.LEAST_ROUNDS <= asked.count("highest") == asked.count("medium") <= device.MOST_ROUNDS


def test_timing_ends(monkeypatch):
    """At once where the rounds that are needed have taken long already."""
    asked = takes(monkeypatch, {"highest": [1.0], "medium": [1.0]})
    monkeypatch.setattr(device, "TIMING_S", 0)
    fastest(["highest", "medium"], {8: 10}, width=4)
    assert len(asked) == 2 * device.LEAST_ROUNDS


def test_the_work_of_an_update_by_hand(monkeypatch):
    """8 rows for each of 5 tokens; 8 x (3 + 5) tokens, 16 at a time, in two forward passes and two epochs of three."""
    sizes = {"batch_size": 8, "mini_batch_size": 2, "max_prompt_length": 3, "max_new_tokens": 5, "ppo_epochs": 2}
    assert work_of_run(Config(**sizes)) == {8: 5, 16: 8 * 8 // 16 * (2 + 3 * 2)}
    monkeypatch.setattr(device, "MOST_ROWS", 4)  # as much work, in more and smaller products
    assert work_of_run(Config(**sizes)) == {4: 2 * 5 + 16 * 8}


def test_each_size_counts_by_how_often_it_occurs(monkeypatch):
    """Small products by the one, large ones by the other: what an update has more of decides."""
    times = {("highest", 8): 1.0, ("highest", 64): 8.0, ("medium", 8): 0.5, ("medium", 64): 9.0}
    monkeypatch.setattr(device, "product_seconds", lambda x, *_: times[torch.get_float32_matmul_precision(), len(x)])
    assert fastest(["highest", "medium"], {8: 100, 64: 1}, width=4) == "medium"
    assert fastest(["highest", "medium"], {8: 1, 64: 100}, width=4) == "highest"


def test_a_second_start_chooses_as_the_first_did(notes, monkeypatch):
    """Though the times have changed sides: else two runs of one seed would differ. Other sizes are another matter."""
    multiplies(monkeypatch, "medium")
    takes(monkeypatch, {"highest": [1.0], "high": [1.0], "medium": [0.5]})
    assert choose(Config()) == "medium"
    asked = takes(monkeypatch, {"highest": [0.5], "high": [1.0], "medium": [1.0]})
    assert choose(Config()) == "medium" and not asked
    assert choose(Config(mini_batch_size=1, max_prompt_length=8)) == "highest"
    torch.set_num_threads(2)
    try:
        assert choose(Config()) == "highest"
    finally:
        torch.set_num_threads(1)
    assert len(notes.read_text().splitlines()) == 3


def test_a_dry_run_notes_nothing(notes, monkeypatch):
    multiplies(monkeypatch, "medium")
    assert choose(Config(dry_run=True)) in ORDER and not notes.exists()


def test_of_two_starts_at_once_the_first_to_note_it_chooses_for_both(notes, monkeypatch):
    multiplies(monkeypatch, "medium")

    def meanwhile(*_):
        with monkeypatch.context() as other:
            other.setattr(device, "fastest", lambda *_: "medium")
            assert choose(Config()) == "medium"
        return "highest"

    monkeypatch.setattr(device, "fastest", meanwhile)
    assert choose(Config()) == "medium"


@pytest.mark.parametrize("text", ["what is this?\n", "\udcff", "{situation}: bfloat99\n"])
def test_notes_that_say_nothing_do_no_harm(text, notes, monkeypatch):
    multiplies(monkeypatch, "medium")
    takes(monkeypatch, {"highest": [1.0], "high": [1.0], "medium": [0.5]})
    assert choose(Config()) == "medium"
    situation = notes.read_text().rpartition(": ")[0]
    notes.write_text(text.format(situation=situation), errors="surrogateescape")
    assert choose(Config()) == ("highest" if "bfloat99" in text else "medium")


def test_where_nothing_can_be_noted_it_is_measured_at_every_start(tmp_path, monkeypatch):
    multiplies(monkeypatch, "medium")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        asked = takes(monkeypatch, {"highest": [1.0], "high": [1.0], "medium": [0.5]})
        assert choose(Config()) == "medium" and asked


def test_finding_it_draws_none_of_the_runs_random_numbers(notes, monkeypatch):
    multiplies(monkeypatch, "medium")
    model = tiny_policy("gpt2").language_model
    state = torch.get_rng_state()
    choose_precision(model, work_of_run(Config()), Config())
    assert torch.equal(torch.get_rng_state(), state) and notes.exists()


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
