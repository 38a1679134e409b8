"""Two processes do what one does: the same responses, weights and statistics, and nothing hangs."""

import copy
import os
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
from faults import wait_for
from helpers import assert_close, read_log, read_stats
from micro import flags, listing, question_flags
from processes import in_processes
from safetensors.torch import load_file
from test_train import QUERIES, count_a, other_policy, prompts_of, settings, tensors_of
from tiny_models import letter_tokenizer, tiny_gpt2, tiny_policy
from torch.nn import Parameter
from transformers import AutoModel, AutoModelForTextEncoding

import device
import distributed
import main
import run
import train
from config import Config, RunError, UsageError
from distributed import processes
from evaluation import evaluate_policy
from files import read_rows
from loading import thin_gradient
from model import PolicyModel, frozen_copy
from report import rollout_stats
from train import Fixed, Rollout, new_state

pytest_plugins = ["micro"]

COMMON = {"n_updates": 5, "learning_rate": 2e-3, "max_grad_norm": 1.0, "ppo_epochs": 2, "kl_coef": 0.1}
EARLY = "an early stop"
CASES = {  # the settings that differ from these and from `settings` of test_train.py
    "a row each": {"batch_size": 6, "mini_batch_size": 2},
    "a batch that two do not divide": {"batch_size": 7, "mini_batch_size": 7},
    "steps in which one has no row": {"batch_size": 3, "mini_batch_size": 1},
    "several minibatches a step": {
        "batch_size": 12,
        "mini_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "entropy_coef": 0.05,
        "temperature": 0.8,
    },
    "shaped scores": {
        "batch_size": 6,
        "mini_batch_size": 3,
        "normalize_scores": True,
        "missing_eos_penalty": 1.0,
        "kl_target": 1.3,  # so near to the first update's that the price is not moved by the most it can be
        "kl_horizon": 20.0,
        "kl_estimator": "k3",
    },
    "whitened scores": {"batch_size": 6, "mini_batch_size": 6, "whiten_scores": True, "score_clip": 1.0, "lam": 0.9},
    EARLY: {"batch_size": 8, "mini_batch_size": 2, "ppo_epochs": 4, "target_kl": 0.02, "learning_rate": 1e-2},
}


class Outcome(NamedTuple):
    """What a training leaves: each update's rollout and statistics, and the state at its end."""

    rollouts: list[Rollout]
    stats: list[dict]
    start: dict[str, torch.Tensor]
    end: dict[str, torch.Tensor]
    moments: dict
    numbers: tuple  # kl_coef, of scores, next_update
    table: list[dict]


def critic_of(kind: str, policy: PolicyModel) -> torch.nn.Module | None:
    """A trunk of the critic's own, with weights of its own."""
    if kind == "shared":
        return None
    torch.manual_seed(5)
    factory = AutoModel if kind == "separate" else AutoModelForTextEncoding
    return factory.from_config(copy.deepcopy(policy.language_model.config))  # an encoder's takes the decoder off it


def train_in_group(family: str, critic: str, dtype: torch.dtype, changes: dict) -> Outcome:
    """A training from some policy, in as many processes as there are."""
    with processes():
        return train_here(family, critic, dtype, changes)


def train_here(family: str, critic: str, dtype: torch.dtype, changes: dict) -> Outcome:
    config = settings(**COMMON | changes)
    started = other_policy(family).to(dtype)
    policy = PolicyModel(started.language_model, critic_of(critic, started), critic).to(dtype)
    policy.value_head.load_state_dict(started.value_head.state_dict())
    fixed = Fixed(frozen_copy(tiny_policy(family).to(dtype)), letter_tokenizer(), {"a": count_a})
    prompts = prompts_of((QUERIES * config.batch_size)[: config.batch_size + 3])
    start = {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}
    state = new_state(policy, config)
    rollouts, stats = [], []
    for rollout, own in train.train(state, fixed, prompts, config):
        rollouts.append(rollout)
        stats.append(rollout_stats(rollout) | own)
    return Outcome(
        rollouts=rollouts,
        stats=stats,
        start=start,
        end={name: parameter.detach() for name, parameter in policy.named_parameters()},
        moments=state.optimizer.state_dict(),
        numbers=(state.kl_coef, *state.moments, state.next_update),
        table=evaluate_policy(policy, fixed, prompts[:5], config),
    )


def change_of(outcome: Outcome) -> torch.Tensor:
    return torch.cat([(outcome.end[name] - outcome.start[name]).flatten().double() for name in outcome.start])


def assert_same_bits(first: Outcome, other: Outcome) -> None:
    """Two processes of one training have nothing that differs, but for when they had it."""
    for one, two in zip(first.rollouts, other.rollouts, strict=True):
        assert [prompt.ids for prompt in one.prompts] == [prompt.ids for prompt in two.prompts]
        for name, tensor in tensors_of(one).items():
            assert torch.equal(tensor, tensors_of(two)[name]), name
    assert first.stats == other.stats
    assert first.numbers == other.numbers
    assert first.table == other.table
    for name, weight in first.end.items():
        assert torch.equal(weight, other.end[name]), name
    for number, moments in first.moments["state"].items():
        for name, tensor in moments.items():
            assert torch.equal(tensor, other.moments["state"][number][name]), (number, name)


def assert_same_training(one: Outcome, several: Outcome, tolerance: float) -> None:
    """The same responses, token for token; the change of the weights to a relative `tolerance`, and all else to it."""
    for own, theirs in zip(one.rollouts, several.rollouts, strict=True):
        assert own.texts == theirs.texts
        assert own.prompts == theirs.prompts
        for name, tensor in tensors_of(own).items():
            other = tensors_of(theirs)[name]
            assert other.shape == tensor.shape, name
            if name in ("logprobs", "ref_logprobs", "values", "entropy"):  # beyond the mask without meaning
                tensor, other = tensor[own.mask], other[own.mask]
            exact = tensor.dtype in (torch.bool, torch.int64)
            assert_close(other.double(), tensor.double(), atol=0 if exact else 10 * tolerance)
        assert_close(theirs.term_scores["a"], own.term_scores["a"], atol=0)
    for own, theirs in zip(one.stats, several.stats, strict=True):
        assert own.keys() == theirs.keys()
        assert theirs == pytest.approx(own, rel=100 * tolerance, abs=10 * tolerance)
    assert several.numbers == pytest.approx(one.numbers, rel=tolerance)
    assert (change_of(several) - change_of(one)).norm() < tolerance * change_of(one).norm()
    assert several.moments["state"].keys() == one.moments["state"].keys()
    for own, theirs in zip(one.table, several.table, strict=True):
        for name, value in own.items():
            assert theirs[name] == (pytest.approx(value, abs=10 * tolerance) if isinstance(value, float) else value)


def assert_two_are_one(
    family: str, changes: dict, tolerance: float = 1e-9, dtype: torch.dtype = torch.float64, critic: str = "shared"
) -> Outcome:
    """Two processes train as this one does, which is returned."""
    one = train_here(family, critic, dtype, changes)
    first, second = in_processes(train_in_group, family, critic, dtype, changes)
    assert_same_bits(first, second)
    assert_same_training(one, first, tolerance)
    return one


@pytest.mark.parametrize("family, case", [*(("gpt2", case) for case in CASES), ("t5", "a row each")])
def test_two_processes_train_as_one_does(family, case):
    outcome = assert_two_are_one(family, CASES[case])
    lengths = [length for rollout in outcome.rollouts for length in rollout.mask.sum(1).tolist()]
    assert len(set(lengths)) > 2  # or the token counts of the processes would be equal
    config = settings(**COMMON | CASES[case])
    steps = {int(moments["step"]) for moments in outcome.moments["state"].values()}
    all_steps = train.shuffled_steps(config.batch_size, config, 0)
    assert (steps == {5 * len(all_steps)}) == (case != EARLY)
    assert (outcome.numbers[0] == 0.1) == (case != "shaped scores")


def test_two_processes_train_as_one_does_in_float32():
    assert_two_are_one("llama", CASES["several minibatches a step"], tolerance=1e-4, dtype=torch.float32)


@pytest.mark.parametrize("family, critic", [("gpt2", "separate"), ("t5", "encoder")])
def test_two_processes_train_a_critic_of_its_own_as_one_does(family, critic):
    assert_two_are_one(family, CASES["a row each"], critic=critic)


def test_a_process_whose_responses_all_end_at_once_waits_for_the_other():
    """The second process has the last two rows."""
    outcome = assert_two_are_one("gpt2", {"batch_size": 4, "mini_batch_size": 2, "seed": 1663})
    assert outcome.rollouts[0].mask.sum(1).tolist() == [5, 6, 1, 1]


# ----------------------------------------------------------------------------------------------------------------
# Where they meet
# ----------------------------------------------------------------------------------------------------------------


def shares_in_group(lengths: list[int]) -> tuple:
    with processes():
        rows = torch.tensor(lengths)
        own = distributed.own_of_sorted(rows)
        return list(range(len(lengths)))[distributed.own_share(len(lengths))], own.tolist()


def test_every_row_is_one_process_and_lengths_are_dealt_out_evenly():
    lengths = [9, 1, 8, 2, 7, 3, 6]
    (first, first_of_sorted), (second, second_of_sorted) = in_processes(shares_in_group, lengths)
    assert (first, second) == ([0, 1, 2], [3, 4, 5, 6])
    assert [lengths[row] for row in first_of_sorted] == [1, 3, 7, 9]
    assert [lengths[row] for row in second_of_sorted] == [2, 6, 8]
    assert in_processes(shares_in_group, [5]) == [([], [0]), ([0], [])]


def gradients_in_group(shapes: dict[str, tuple[int, ...]], bucket: int) -> dict[str, torch.Tensor | None]:
    """Of `both` each process has a gradient, of `one` the second alone, of `none` neither; `frozen` takes none."""
    with processes():
        distributed.BUCKET = bucket
        number = distributed.rank() + 1
        parameters = {name: Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
        parameters["half"] = Parameter(torch.zeros(3, dtype=torch.bfloat16))
        parameters["frozen"].requires_grad_(False)
        for name, parameter in parameters.items():
            if name not in ("none", "frozen") and (name != "one" or number == 2):
                parameter.grad = torch.arange(parameter.numel()).view_as(parameter).to(parameter) * 10**number
        distributed.sum_gradients(parameters.values())
        return {name: parameter.grad for name, parameter in parameters.items()}


@pytest.mark.parametrize("bucket", [1, 7, 2**20])
def test_gradients_are_summed_where_any_process_has_one(bucket):
    shapes = {"both": (2, 3), "one": (4,), "none": (2,), "frozen": (2,), "both again": (5, 1)}
    for found in in_processes(gradients_in_group, shapes, bucket):
        assert found["none"] is None
        assert found["frozen"] is None
        assert_close(found["both"], 110.0 * torch.arange(6).view(2, 3), atol=0)
        assert_close(found["one"], 100.0 * torch.arange(4), atol=0)
        assert_close(found["both again"], 110.0 * torch.arange(5).view(5, 1), atol=0)
        assert found["half"].dtype == torch.bfloat16
        assert_close(found["half"], 110.0 * torch.arange(3), atol=0)


def test_a_sum_of_gradients_is_no_mean(monkeypatch):
    """As if another process had found the same: each loss has the whole step's count for its divisor already."""
    monkeypatch.setattr(distributed, "size", lambda: 2)
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda tensor: tensor.mul_(2))
    weight = Parameter(torch.zeros(3))
    weight.grad = torch.tensor([1.0, -2.0, 0.5])
    distributed.sum_gradients([weight])
    assert weight.grad.tolist() == [2.0, -4.0, 1.0]


def test_buckets_are_of_one_dtype_and_of_bounded_size(monkeypatch):
    monkeypatch.setattr(distributed, "BUCKET", 5)
    halves = [Parameter(torch.zeros(1, dtype=torch.bfloat16)) for _ in range(2)]
    floats = [Parameter(torch.zeros(n)) for n in (3, 3, 3, 20, 1)]
    found = [[p.numel() for p in bucket] for bucket in distributed.buckets([*halves, *floats])]
    assert found == [[1, 1], [3, 3], [3, 20], [1]]


def told_in_group() -> tuple:
    with processes():
        number = distributed.rank()
        calls = []
        first = distributed.from_first(lambda: calls.append(number) or f"of {number}")
        brought = distributed.gathered(10 * number)
        model = tiny_gpt2()
        thin_gradient(model)
        return distributed.is_first(), calls, first, brought, model.transformer.wte.sparse


def test_what_one_process_finds_is_told_to_all():
    first, second = in_processes(told_in_group)
    assert first == (True, [0], "of 0", [0, 10], False)
    assert second == (False, [], "of 0", [0, 10], False)


def test_one_process_alone_meets_nobody():
    def never():
        raise AssertionError

    model = tiny_gpt2()
    thin_gradient(model)
    parameter = Parameter(torch.zeros(2))
    parameter.grad = torch.ones(2)
    gradient = parameter.grad
    with processes():
        assert not torch.distributed.is_initialized()
        assert (distributed.rank(), distributed.size(), distributed.is_first()) == (0, 1, True)
        assert distributed.gathered(never) == [never]
        assert distributed.from_first(lambda: 3) == 3
        distributed.sum_gradients([parameter])
    assert parameter.grad is gradient
    assert model.transformer.wte.sparse


def lonely_in_group() -> str:
    """The second process dies, and the first meets nobody, whatever the meeting is."""
    with processes():
        if distributed.rank():
            os.kill(os.getpid(), signal.SIGKILL)
        told = []
        parameter = Parameter(torch.zeros(2))
        for meet in (distributed.gathered, distributed.from_first, lambda _: distributed.sum_gradients([parameter])):
            with pytest.raises(RunError) as raised:
                meet(int)
            told.append(str(raised.value))
        return told


def test_a_meeting_that_cannot_be_is_told_in_a_sentence():
    told, nothing = in_processes(lonely_in_group)
    assert nothing is None
    assert len(told) == 3
    assert all(text.startswith("another process of this run has ended, or cannot be reached") for text in told)


def test_processes_that_cannot_find_each_other_are_told_how_to_start(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    words = r"the 2 processes that WORLD_SIZE names .* RANK .* torchrun --nproc_per_node 2"
    with pytest.raises(UsageError, match=words), processes():
        raise AssertionError


@pytest.mark.parametrize(
    "name, number, words",
    [
        ("cuda:0", 0, "--device cuda:0 is one GPU, and each of 3 processes needs its own; expected cuda"),
        ("cuda", 2, "process 2 of this machine has no GPU of its own: there are 2; .* --nproc_per_node 2, or --device"),
    ],
)
def test_processes_that_would_share_a_gpu_are_refused(name, number, words, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", str(number))
    monkeypatch.setattr(device, "size", lambda: 3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError, match=words):
        device.pick_device(name)


def test_each_process_takes_the_gpu_of_its_number(monkeypatch):
    taken = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(device, "size", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    device.own_gpu("cuda")
    assert taken == [1]


def precision_in_group(model: Path, settings: dict) -> str:
    """How a process multiplies, which by its own measurement would do so otherwise than the other."""
    own = ["medium", "highest"]
    with processes(), patch.object(run, "choose_precision", lambda *_: own[distributed.rank()]):
        run.load_models(Config(**settings), str(model), "")
        return torch.get_float32_matmul_precision()


def test_all_processes_multiply_as_the_first_one_chose(questions, t5_folder):
    data = {"dataset_path": str(questions / "prompts.jsonl"), "prompt_column": "question"}
    settings = data | {"base_model_name": str(t5_folder), "reward_fn": f"{questions / 'rewards.py'}:reward"}
    assert in_processes(precision_in_group, t5_folder, settings) == ["medium", "medium"]


# ----------------------------------------------------------------------------------------------------------------
# Whole runs
# ----------------------------------------------------------------------------------------------------------------


class Told(NamedTuple):
    code: int
    output: str
    errors: str
    touched: list[str]  # files and folders that were made, written or moved, by their names


def record_writes(folder: Path, names: list[str]) -> None:
    """Note from now on what this process changes in the folder."""

    def hook(event: str, arguments: tuple) -> None:
        is_write = event in ("os.mkdir", "os.rename", "os.remove") or (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if is_write and folder in Path(os.path.abspath(str(arguments[0]))).parents:
            names.append(Path(str(arguments[0])).name)

    sys.addaudithook(hook)


def command(folder: Path, arguments: list[str]) -> Told:
    """A command line, as one of the processes has it."""
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    output, errors, touched = StringIO(), StringIO(), []
    record_writes(folder, touched)
    with redirect_stdout(output), redirect_stderr(errors):
        code = main.main(arguments)
    return Told(code, output.getvalue(), errors.getvalue(), touched)


def test_a_run_from_nothing_is_that_of_one_process_and_written_once(tmp_path):
    arguments = ["--task", "train", *flags(batch_size=6, mini_batch_size=3, eval_every=1, n_updates=3)]
    [alone] = in_processes(command, tmp_path / "one", arguments, n=1)
    first, second = in_processes(command, tmp_path / "two", arguments)
    assert alone.code == first.code == second.code == 0, first.errors + second.errors
    assert second == (0, "", "", [])
    for name in ("training_log.csv", "training.png", "best", "policy"):
        assert any(name in touched for touched in first.touched), name
    said, said_alone = (
        [line for line in told.output.splitlines() if not line.startswith("start-up invariants")]  # their last digits
        for told in (first, alone)
    )
    said.remove("2 processes, each with its share of a rollout's prompts and of a step's rows")
    assert said == said_alone
    assert listing(tmp_path / "two").keys() == listing(tmp_path / "one").keys()
    one, two = (tmp_path / name / "saved_models/tiny/ppo" for name in ("one", "two"))
    for own, theirs in zip(read_log(one), read_log(two), strict=True):
        assert own["response"] == theirs["response"]
    for own, theirs in zip(read_stats(one), read_stats(two), strict=True):
        assert theirs.pop("alarms") == own.pop("alarms")
        assert theirs == pytest.approx(own, rel=1e-3, abs=1e-5)
    trained = load_file(one / "model.safetensors")
    for name, weight in load_file(two / "model.safetensors").items():
        assert (weight - trained[name]).norm() < 1e-2 * trained[name].norm(), name  # float32, and keys' bias is idle


def test_a_dry_run_leaves_nothing(tmp_path):
    arguments = ["--task", "train", "--dry_run", *flags()]
    first, second = in_processes(command, tmp_path / "new", arguments)
    assert "nothing was trained or written" in first.output
    assert (first.code, second) == (0, (0, "", "", []))
    assert listing(tmp_path / "new") == {}


FATAL = """
import os, signal, time
calls = 0
def reward(prompts, responses, rows):
    global calls
    calls += 1
    if calls == 2 and os.environ["RANK"] == "1":
        {what}
    return [len(response) for response in responses]
"""


@pytest.mark.parametrize(
    "what, last_words",
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", None),
        ("raise ValueError('no')", "error in process 1: --reward_fn rewards.py:reward raised ValueError: no"),
    ],
)
def test_a_process_that_ends_brings_the_other_down(questions, t5_folder, what, last_words):
    """At the second update: the first one's log is there, and nothing else was begun."""
    (questions / "rewards.py").write_text(FATAL.format(what=what))
    arguments = ["--task", "train", "--output_dir", "run", *question_flags(t5_folder)]
    first, second = in_processes(command, questions, arguments)
    assert first.code == 1
    assert first.errors.splitlines()[-1].startswith("error: another process of this run has ended")
    assert "Traceback" not in first.errors
    assert second == last_words or second.errors.startswith(last_words)
    assert [row["step"] for row in read_stats(questions / "run")] == [0]


ONCE = """
import os, pathlib, signal
calls = 0
def reward(prompts, responses, rows):
    global calls
    calls += 1
    marker = pathlib.Path("done")
    if calls == 3 and os.environ["RANK"] == "1" and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.{signal})
    return [len(response) for response in responses]
"""
RESUMED = ["--task", "train", "--resume", "--output_dir", "run", "--reward_fn", "rewards.py:reward"]


def goes_on(questions: Path, folder: Path, name: str, n: int) -> Path:
    """What becomes of an interrupted run in so many processes, in a copy of its folder."""
    place = questions / f"{name}-{n}"
    shutil.copytree(folder, place)
    told = in_processes(command, place, RESUMED, n=n)
    assert [each.code for each in told] == [0] * n, told[0].errors
    assert [row["step"] for row in read_stats(place / "run")] == [0, 1, 2, 3]
    return place / "run"


@pytest.mark.parametrize(("name", "code"), [("SIGKILL", 1), ("SIGTERM", 143)])
def test_an_interrupted_run_goes_on_in_as_many_processes_and_in_another_number(questions, t5_folder, name, code):
    """One of two is killed, or is asked to stop, in the third rollout: with two the run ends to the byte as one that
    was not, with one as one that had one process all along, but for rounding.
    """
    settings = ["--n_updates", "4", "--save_every", "2", "--keep_checkpoints", "1", "--kl_target", "3"]
    arguments = ["--task", "train", *question_flags(t5_folder), *settings, "--normalize_scores", "--output_dir", "run"]
    for folder in ("whole", "stopped"):
        (questions / folder).mkdir()
        shutil.copy(questions / "prompts.jsonl", questions / folder)
        (questions / folder / "rewards.py").write_text(ONCE.format(signal=name))
    (questions / "whole/done").touch()
    whole = in_processes(command, questions / "whole", arguments)
    assert [each.code for each in whole] == [0, 0]
    first, second = in_processes(command, questions / "stopped", arguments)
    assert first.code == code and (second is None if name == "SIGKILL" else second.code == code)
    assert "Traceback" not in first.errors
    done = 2 if name == "SIGKILL" else 3  # the update that was begun is finished by those who can
    assert [path.name for path in (questions / "stopped/run/checkpoints").iterdir()] == [f"step_{done}"]

    one, two = (goes_on(questions, questions / "stopped", name, n) for n in (1, 2))
    expected = listing(questions / "whole/run")
    found = listing(two)
    assert {name for name in expected | found if expected.get(name) != found.get(name)} == {"timings.jsonl"}
    for own, theirs in zip(read_log(one), read_log(two), strict=True):
        assert own["response"] == theirs["response"]
    for own, theirs in zip(read_stats(one), read_stats(two), strict=True):
        assert theirs.pop("alarms") == own.pop("alarms")
        assert theirs == pytest.approx(own, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--task", "sft"], "--task sft is work for one process, and torchrun has started 3; expected python main.py"),
        (["--task", "train", *flags(batch_size=2)], "--batch_size 2 leaves some of the 3 processes without a prompt"),
    ],
)
def test_what_several_processes_cannot_do_is_refused(tmp_path, arguments, words):
    everyone = in_processes(command, tmp_path, arguments, n=3)
    assert [told.code for told in everyone] == [2, 2, 2]
    assert [told.output for told in everyone] == [""] * 3
    for number, told in enumerate(everyone):
        who = f"error in process {number}" if number else "error"
        assert told.errors.startswith(f"{who}: {words}")
        assert told.errors.count("\n") == 1
    assert listing(tmp_path) == {}


@pytest.mark.parametrize("task", ["generate", "evaluate", "plot", "explain"])
def test_tasks_that_use_a_run_are_for_one_process(task, workplace, capsys, monkeypatch):
    monkeypatch.setattr(main, "N_PROCESSES", 2)
    assert main.main(["--task", task]) == 2
    assert f"--task {task} is work for one process" in capsys.readouterr().err


@pytest.mark.slow
def test_torchrun_ends_when_a_process_is_killed(questions, t5_folder):
    """While the other one waits for it, which then says so, before torchrun ends it."""
    (questions / "rewards.py").write_text(FATAL.format(what="time.sleep(2); os.kill(os.getpid(), signal.SIGKILL)"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", main.__file__]
    arguments = ["--task", "train", "--output_dir", "run", *question_flags(t5_folder)]
    done = subprocess.run([*launcher, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert any(line.startswith("error: another process of this run has ended") for line in done.stderr.splitlines())
    assert "Signal 9 (SIGKILL)" in done.stderr
    assert [row["step"] for row in read_stats(questions / "run")] == [0]


SLOW_SAVE = """
import os, time
import run
real = run.save_state
def save_state(*arguments):
    time.sleep(3)
    real(*arguments)
run.save_state = save_state
def reward(prompts, responses, rows):
    time.sleep(0.5)
    return [len(response) for response in responses]
"""


@pytest.mark.slow
def test_a_run_of_several_processes_that_is_asked_to_stop_waits_for_a_slow_save(questions, t5_folder):
    """By torchrun, which tells all of its processes, and by a signal of its own to each of them before."""
    (questions / "rewards.py").write_text(SLOW_SAVE)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", main.__file__]
    settings = ["--n_updates", "50", "--save_every", "50", "--output_dir", "run"]
    arguments = ["--task", "train", *question_flags(t5_folder), *settings]
    running = subprocess.Popen([*launcher, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(read_rows(questions / "run/training_stats.jsonl")) == 2)
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(running.pid)], capture_output=True, text=True, check=True)
    for worker in map(int, found.stdout.split()):
        os.kill(worker, signal.SIGTERM)
    running.send_signal(signal.SIGTERM)
    _, errors = running.communicate(timeout=60)
    done = len(read_rows(questions / "run/training_stats.jsonl"))
    assert [path.name for path in (questions / "run/checkpoints").iterdir()] == [f"step_{done}"], errors
    assert f"stopped after {done} of 50 updates, as SIGTERM asked" in errors
