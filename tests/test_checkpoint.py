"""A run that ends before its time, for whatever reason, goes on as if it had not; no piece of its state is spare."""

import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from statistics import fmean

import peft
import pytest
import safetensors.torch
import torch
from faults import ended, forked, start, wait_for, watching
from helpers import read_log, read_stats
from micro import assert_refused, flags, listing, question_flags, run_main
from test_train import QUERIES, fixed_for, prompts_of, settings
from tiny_models import tiny_gpt2, tiny_policy

import checkpoint
import files
import report
import run
import train
from checkpoint import Began, in_order, is_time_to_save, newest_checkpoint, read_numbers, restore, save_state
from config import Config, RunError, UsageError, to_json
from files import damage, described_files, is_locked, locked, read_rows
from folders import how_to_resume
from model import PolicyModel
from train import Fixed, State, new_state

pytest_plugins = ["micro"]

# ----------------------------------------------------------------------------------------------------------------
# Nothing is spare in a state
# ----------------------------------------------------------------------------------------------------------------

ALL_ON = {  # everything that makes one update hang on those before it
    "n_updates": 6,
    "save_every": 3,
    "learning_rate": 1e-3,
    "batch_size": 4,
    "mini_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "ppo_epochs": 2,
    "kl_target": 0.05,
    "kl_horizon": 20,
    "normalize_scores": True,
    "eval_every": 2,
}


def with_adapter() -> PolicyModel:
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_gpt2(), peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["c_attn"]))
    return PolicyModel(model)


def with_critic() -> PolicyModel:
    return PolicyModel(tiny_gpt2(), tiny_gpt2(seed=3).transformer, "separate")


SYSTEMS: dict[str, Callable[[], PolicyModel]] = {
    "causal": lambda: PolicyModel(tiny_gpt2()),
    "encoder-decoder": lambda: tiny_policy("t5"),
    "adapter": with_adapter,
    "separate critic": with_critic,
}


def nearness_to(start: PolicyModel) -> Callable:
    """In place of an evaluation: how near the weights are to where they began, which is best at the first look."""

    def nearness(policy: PolicyModel, *_) -> list[dict]:
        both = zip(start.language_model.parameters(), policy.language_model.parameters(), strict=True)
        return [{"reward": -sum((one - other).square().sum().item() for one, other in both)}]

    return nearness


def began_of(fixed: Fixed, config: Config) -> Began:
    return run.what_it_began_with(fixed, config)


def go_on(state: State, fixed: Fixed, config: Config, folder: Path) -> None:
    """The rest of a run whose logs so far are in the folder."""
    prompts = prompts_of(QUERIES)
    prompts = run.Prompts(train=prompts, validation=prompts, held_out=prompts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "evaluate_policy", nearness_to(fixed.reference))
        run.run_updates(state, fixed, prompts, config, folder, began_of(fixed, config))


def whole_run(system: str, folder: Path, **changes) -> Path:
    """A run from its beginning to its end."""
    folder.mkdir()
    policy = SYSTEMS[system]()
    config = settings(**(ALL_ON | changes))
    go_on(new_state(policy, config), fixed_for(policy), config, folder)
    return folder


def resumed_run(system: str, first: Path, folder: Path, forget: Callable[[State, State], None] = lambda *_: None):
    """The second half of that run, from its checkpoint in the middle, in another folder; with a piece forgotten."""
    shutil.copytree(first, folder)
    shutil.rmtree(folder / "checkpoints/step_6")
    config = settings(**ALL_ON)
    policy = SYSTEMS[system]()
    fixed = fixed_for(policy)
    state = new_state(policy, config)
    restore(state, first / "checkpoints/step_3", config)
    fresh_policy = SYSTEMS[system]()
    forget(state, new_state(fresh_policy, config))
    report.cut_logs(folder, state.next_update, read_numbers(first / "checkpoints/step_3")["log_bytes"])
    go_on(state, fixed, config, folder)
    return folder


def what_is_left(folder: Path) -> dict[str, bytes]:
    """All of a run's files but the timings."""
    return {name: content for name, content in listing(folder).items() if name != report.TIMINGS}


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_run_that_goes_on_ends_as_one_that_never_stopped(system, tmp_path):
    first = whole_run(system, tmp_path / "first")
    second = resumed_run(system, first, tmp_path / "second")
    assert what_is_left(first) == what_is_left(second)
    assert [row["step"] for row in read_rows(second / report.TIMINGS)] == list(range(6))
    kl_coefs = [row["kl_coef"] for row in read_stats(first)]
    assert len(set(kl_coefs)) == 6, "the price of KL was to adapt"


def without_moments(name: str) -> Callable[[State, State], None]:
    def forget(state: State, fresh: State) -> None:
        for own in state.optimizer.state.values():
            own[name].zero_()

    return forget


def copy_weights(state: State, fresh: State) -> None:
    state.policy.load_state_dict(fresh.policy.state_dict())


def attribute(name: str) -> Callable[[State, State], None]:
    return lambda state, fresh: setattr(state, name, getattr(fresh, name))


def other_best_weights(state: State, fresh: State) -> None:
    state.best = state.best._replace(weights=checkpoint.trained_weights(fresh.policy))


PIECES = {
    "weights": copy_weights,
    "exp_avg": without_moments("exp_avg"),
    "exp_avg_sq": without_moments("exp_avg_sq"),
    "adam's steps": without_moments("step"),
    "kl_coef": attribute("kl_coef"),
    "moments": attribute("moments"),
    "next_update": attribute("next_update"),
    "best": attribute("best"),
    "best's weights": other_best_weights,
}


@pytest.mark.parametrize("piece", PIECES)
def test_without_any_one_piece_of_its_state_a_run_ends_elsewhere(piece, tmp_path):
    first = whole_run("causal", tmp_path / "first")
    second = resumed_run("causal", first, tmp_path / "second", PIECES[piece])
    before, after = what_is_left(first), what_is_left(second)
    if not piece.startswith("best"):
        assert before["training_stats.jsonl"] != after["training_stats.jsonl"]
    assert before["checkpoints/step_6/manifest.json"] != after["checkpoints/step_6/manifest.json"]


def test_a_piece_that_is_not_in_this_table_would_be_seen():
    """Of all that training changes, and of all that a checkpoint holds beside it."""
    names = {"policy", "optimizer", "kl_coef", "moments", "next_update", "best", "idle_updates", "is_half_done"}
    assert {field.name for field in fields(State)} == names


class Infinite:
    """A score that is infinite from one rollout on; `asked` rollouts were before the first."""

    def __init__(self, start: int, asked: int = 0) -> None:
        self.start, self.asked = start, asked

    def __call__(self, prompts, responses, rows) -> torch.Tensor:
        self.asked += 1
        return torch.full((len(responses),), float("inf") if self.asked > self.start else 1.0)


IDLE = {"n_updates": 8, "save_every": 1, "keep_checkpoints": 9, "batch_size": 4, "mini_batch_size": 4}


def test_steps_that_are_no_number_are_not_taken_and_end_a_run_when_there_are_no_others(tmp_path, capsys):
    """From the third rollout on: the three updates are logged, and the weights are those of the second's."""
    policy = PolicyModel(tiny_gpt2())
    config = settings(**IDLE, learning_rate=1e-2)
    words = r"^stopped after 5 of 8 updates: in the last 3 no loss or gradient was finite.*--learning_rate$"
    with pytest.raises(RunError, match=words):
        go_on(new_state(policy, config), fixed_for(policy, letter=Infinite(2)), config, tmp_path)
    rows = read_stats(tmp_path)
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 1, 1]
    assert [math.isnan(row["loss"]) for row in rows] == [False, False, True, True, True]
    assert ["1 of the update's steps" in " ".join(row["alarms"]) for row in rows] == [False, False, True, True, True]
    assert "NaN" not in (tmp_path / report.STATS).read_text()
    one, two, *others = [(tmp_path / f"checkpoints/step_{n}/weights.safetensors").read_bytes() for n in range(1, 6)]
    assert one != two and others == [two] * 3
    assert "alarm at update 2: 1 of the update's steps were not taken" in capsys.readouterr().out


def test_how_many_updates_were_idle_is_part_of_the_state(tmp_path):
    """After the second of three idle updates a run goes on for one more, and forgetting would make it three."""
    policy = PolicyModel(tiny_gpt2())
    config = settings(**IDLE)
    with pytest.raises(RunError, match="stopped after 5 of 8"):
        go_on(new_state(policy, config), fixed_for(policy, letter=Infinite(2)), config, tmp_path)
    for idle, end in ((None, 5), (0, 7)):
        state = new_state(policy, config)
        restore(state, tmp_path / "checkpoints/step_4", config)
        assert state.idle_updates == 2
        state.idle_updates = state.idle_updates if idle is None else idle
        report.cut_logs(tmp_path, 4, read_numbers(tmp_path / "checkpoints/step_4")["log_bytes"])
        with pytest.raises(RunError, match=f"stopped after {end} of 8"):
            go_on(state, fixed_for(policy, letter=Infinite(2, asked=4)), config, tmp_path)


@pytest.mark.parametrize("gradient", [float("inf"), float("nan")])
def test_a_gradient_that_is_no_number_is_not_applied(gradient, tmp_path, monkeypatch):
    """Of four steps in an update the second: three are taken, and count in its means; the run goes on."""
    policy = PolicyModel(tiny_gpt2())
    config = settings(n_updates=1, batch_size=4, mini_batch_size=1, learning_rate=1e-2)
    real, seen = train.accumulate_gradient, []

    def spoilt(policy, rollout, rows, config):
        stats = real(policy, rollout, rows, config)
        seen.append(stats)
        if len(seen) == 2:
            next(policy.parameters()).grad[0] = gradient
        return stats

    monkeypatch.setattr(train, "accumulate_gradient", spoilt)
    go_on(new_state(policy, config), fixed_for(policy), config, tmp_path)
    (row,) = read_stats(tmp_path)
    assert row["skipped_steps"] == 1
    assert row["loss"] == fmean(stats["loss"] for number, stats in enumerate(seen) if number != 1)
    assert all(weight.isfinite().all() for weight in policy.parameters())


# ----------------------------------------------------------------------------------------------------------------
# When it is saved
# ----------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_made_every_few_updates_and_after_the_last_and_the_newest_are_kept(tmp_path):
    for name, changes, kept in (
        ("two", {"save_every": 1}, [6, 5]),
        ("all", {"save_every": 2, "keep_checkpoints": 9}, [6, 4, 2]),
        ("last", {"save_every": 5, "keep_checkpoints": 1}, [6]),
        ("none", {"save_every": 1, "keep_checkpoints": 0}, []),
    ):
        folder = whole_run("causal", tmp_path / name, **changes)
        assert [checkpoint.number_of(path) for path in in_order(folder)] == kept, name


def test_by_itself_a_run_saves_as_often_as_costs_a_hundredth_of_its_time():
    config = Config(n_updates=10)
    assert [is_time_to_save(config, 3, since, cost=0.5) for since in (49.9, 50.1)] == [False, True]
    assert is_time_to_save(config, 10, since=0, cost=9)
    assert not is_time_to_save(Config(n_updates=10, keep_checkpoints=0), 10, since=1e9, cost=0)


def test_what_is_newer_than_the_state_is_not_whole_and_goes(tmp_path):
    for number in (12, 10, 8, 6):
        (tmp_path / f"checkpoints/step_{number}").mkdir(parents=True)
    checkpoint.remove_outdated(tmp_path, n_updates=10, keep=2)
    assert [path.name for path in in_order(tmp_path)] == ["step_10", "step_8"]


# ----------------------------------------------------------------------------------------------------------------
# What is read back
# ----------------------------------------------------------------------------------------------------------------


def small_checkpoints(folder: Path) -> list[Path]:
    """Two of a model of a few numbers, the newest first."""
    policy = PolicyModel(tiny_gpt2())
    for weight in policy.parameters():
        weight.requires_grad_(weight.numel() < 20)
    config = settings(n_updates=9)
    state = new_state(policy, config)
    (folder / report.RESPONSES).write_text("")
    for number in (1, 2):
        state.next_update = number
        save_state(state, began_of(fixed_for(policy), config), 0, folder, keep=2)
    return in_order(folder)


def test_every_beginning_of_every_file_is_known_not_to_be_whole(tmp_path):
    """A file that a loss of power has cut, at any byte of it, and one in which a bit has fallen over."""
    newest, _ = small_checkpoints(tmp_path)
    assert damage(newest) == ""
    for path in sorted(newest.iterdir()):
        whole = path.read_bytes()
        assert len(whole) < 20_000
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            assert path.name in damage(newest), (path.name, length)
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 1
        path.write_bytes(flipped)
        assert damage(newest) != "", path.name
        path.write_bytes(whole)
    assert damage(newest) == ""


def test_a_checkpoint_that_cannot_be_read_is_passed_over(tmp_path, monkeypatch, capsys):
    """Also by an error of the disk's, and with a manifest of another form."""
    newest, older = small_checkpoints(tmp_path)
    real = files.described_files

    def broken(folder: Path) -> dict:
        if folder == newest:
            raise OSError(5, "Input/output error", "weights.safetensors")
        return real(folder)

    with monkeypatch.context() as patch:
        patch.setattr(files, "described_files", broken)
        assert newest_checkpoint(tmp_path) == older
    assert "not used: weights.safetensors cannot be read: Input/output error" in capsys.readouterr().out
    for content in ('{"files": []}', "{}", "[]"):
        (newest / "manifest.json").write_text(content)
        assert newest_checkpoint(tmp_path) == older


@pytest.mark.parametrize("name", ["weights.safetensors", "exp_avg.safetensors", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(name, tmp_path, capsys):
    newest, older = small_checkpoints(tmp_path)
    assert newest_checkpoint(tmp_path) == newest
    (newest / name).unlink()
    assert newest_checkpoint(tmp_path) == older
    said = capsys.readouterr().out
    assert said.startswith(f"note: {newest} is damaged and not used: {name} is") and said.count("\n") == 1
    (older / name).write_bytes(b"{}")
    with pytest.raises(RunError, match=r"^no checkpoint of .* is whole; nothing was changed there: begin again"):
        newest_checkpoint(tmp_path)


def test_a_file_that_the_manifest_does_not_name_is_damage(tmp_path):
    """Also one by another name than it was, and one that lies elsewhere."""
    newest, _ = small_checkpoints(tmp_path)
    (newest / "more").write_text("")
    assert damage(newest) == "more is not in manifest.json"
    (newest / "more").unlink()
    for name in ("../../elsewhere", "/etc/hostname"):
        manifest = {"files": described_files(newest) | {name: {"bytes": 1, "sha256": ""}}}
        manifest["files"].pop("manifest.json")
        (newest / "manifest.json").write_text(json.dumps(manifest))
        assert damage(newest) == f"{name} is missing"


def test_a_checkpoint_of_another_model_or_of_more_updates_is_refused(tmp_path):
    newest, _ = small_checkpoints(tmp_path)
    config = settings(n_updates=9)
    with pytest.raises(UsageError, match="holds other weights than those that train here"):
        restore(new_state(PolicyModel(tiny_gpt2()), config), newest, config)
    policy = PolicyModel(tiny_gpt2())
    for weight in policy.parameters():
        weight.requires_grad_(weight.numel() < 20)
    with pytest.raises(UsageError, match=r"--n_updates 1 is less than the 2 that .* has done"):
        restore(new_state(policy, config), newest, replace(config, n_updates=1))


def test_a_reference_of_other_weights_is_refused(tmp_path):
    policy = PolicyModel(tiny_gpt2())
    began = began_of(fixed_for(policy), settings())
    checkpoint.check_reference(PolicyModel(tiny_gpt2()).language_model, began, tmp_path)
    with pytest.raises(UsageError, match=r"the model that .* began with is another one now"):
        checkpoint.check_reference(PolicyModel(tiny_gpt2(seed=7)).language_model, began, tmp_path)


# ----------------------------------------------------------------------------------------------------------------
# Killed, and started again
# ----------------------------------------------------------------------------------------------------------------

RUN = {
    "n_updates": 4,
    "save_every": 2,
    "keep_checkpoints": 1,
    "batch_size": 8,
    "gradient_accumulation_steps": 2,
    "eval_every": 2,
}
RUN |= {"kl_target": 3, "learning_rate": 1e-3, "output_dir": "run"}


def train_command(**changes) -> list[str]:
    return ["--task", "train", "--normalize_scores", *flags(**(RUN | changes))]


def run_of(folder: Path) -> dict[str, bytes]:
    """All that a run leaves but for its timings."""
    return {name: content for name, content in listing(folder / "run").items() if name != report.TIMINGS}


@pytest.fixture(scope="module")
def never_stopped(chain, tmp_path_factory) -> Path:
    """Where the run was made at one go."""
    root = tmp_path_factory.mktemp("never")
    shutil.copytree(chain.root / "saved_models", root / "saved_models")

    def work() -> int:
        os.chdir(root)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("run.plot_training", lambda folder, notice="": folder / "plots/training.png")
            return run_main(*train_command())

    assert forked(work) == 0
    return root


def killed_in_its_second_save(fatal: int) -> list[str]:
    """The names of the moments of the second save, in which a run is killed at the one asked for, if there is it."""
    real, saves = run.save_state, []

    def save_and_count(*arguments) -> None:
        saves.append(arguments)
        if len(saves) == 1:
            return real(*arguments)
        with watching(fatal) as moments:
            report.flush_logs(Path("run"))
            real(*arguments)
        Path("moments.json").write_text(json.dumps(moments.names))

    def work() -> int:
        run.save_state = save_and_count
        return run_main(*train_command())

    exit_code = forked(work)
    assert exit_code == (0 if fatal < 0 else -signal.SIGKILL)
    return json.loads(Path("moments.json").read_text()) if fatal < 0 else []


def check_goes_on(never_stopped: Path, workplace: Path) -> None:
    """Resuming, in a process of its own, makes the run what it would have been, and leaves nothing else."""
    assert forked(lambda: run_main("--task", "train", "--resume", "--output_dir", "run")) == 0
    assert run_of(workplace) == run_of(never_stopped)
    assert [row["step"] for row in read_rows(workplace / "run" / report.TIMINGS)] == [0, 1, 2, 3]


N_MOMENTS = 80  # more than there are
MOMENTS: list[str] = []  # their names, once they have been counted


@pytest.mark.parametrize(
    "fatal", [pytest.param(n, marks=[pytest.mark.slow] if n not in (3, 33) else []) for n in range(N_MOMENTS)]
)
def test_a_run_killed_at_any_moment_of_a_save_goes_on(fatal, never_stopped, workplace, no_figures):
    """With a file half written, and before and after every flush, renaming and removal."""
    MOMENTS[:] = MOMENTS or killed_in_its_second_save(-1)
    assert 50 < len(MOMENTS) < N_MOMENTS and MOMENTS.count("half a file") == 6
    if fatal < len(MOMENTS):
        shutil.rmtree(workplace / "run", ignore_errors=True)
        killed_in_its_second_save(fatal)
        assert newest_checkpoint(workplace / "run") is not None
        check_goes_on(never_stopped, workplace)


def test_a_run_killed_before_its_first_checkpoint_begins_again(never_stopped, workplace, no_figures, monkeypatch):
    """Between its first row and its first save; and once more before it has a row."""

    def killed(*_) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(run, "is_time_to_save", killed)
        assert forked(lambda: run_main(*train_command())) == -signal.SIGKILL
    assert len(read_rows(workplace / "run" / report.STATS)) == 1
    with monkeypatch.context() as patch:
        patch.setattr(report, "write_logs", killed)
        assert forked(lambda: run_main("--task", "train", "--resume", "--output_dir", "run")) == -signal.SIGKILL
    check_goes_on(never_stopped, workplace)


def test_a_run_killed_while_its_policy_is_put_in_place_goes_on(never_stopped, workplace, no_figures, monkeypatch):
    """When half of the files are there, it is no policy yet; what is left of the others goes."""

    def half(source: Path, target: Path, last: str) -> None:
        for file in sorted(source.iterdir())[:3]:
            file.replace(target / file.name)
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(run, "move_into", half)
        assert forked(lambda: run_main(*train_command())) == -signal.SIGKILL
    assert not (workplace / "run/value_head.safetensors").exists()
    check_goes_on(never_stopped, workplace)


# ----------------------------------------------------------------------------------------------------------------
# Asked to stop
# ----------------------------------------------------------------------------------------------------------------


def begun(arguments: list[str]) -> int:
    """A process that trains and has logged its first update, and waits there for a file `go`."""

    def work() -> int:
        real = report.write_logs

        def write_and_wait(*arguments) -> None:
            real(*arguments)
            wait_for(Path("go").exists)

        report.write_logs = write_and_wait
        return run_main(*arguments)

    child = start(work)
    wait_for(lambda: len(read_rows(Path("run") / report.STATS)) == 1)
    return child


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_ends_a_run_after_its_update_with_all_saved(name, never_stopped, workplace, no_figures, capfd):
    number = getattr(signal, name)
    child = begun(train_command())
    os.kill(child, number)
    Path("go").touch()
    assert ended(child) == 128 + number
    done = len(read_rows(workplace / "run" / report.STATS))
    assert done == 1 and checkpoint.number_of(in_order(workplace / "run")[0]) == done
    said = capfd.readouterr().err
    assert "stopping after this update" in said
    assert f"error: stopped after {done} of 4 updates, as {name} asked; how it goes on: python main.py" in said
    check_goes_on(never_stopped, workplace)


def test_a_second_signal_ends_a_run_at_once(workplace, no_figures, capfd):
    child = begun(train_command())
    os.kill(child, signal.SIGTERM)
    wait_for(lambda: "stopping after this update" in capfd.readouterr().err)
    os.kill(child, signal.SIGTERM)
    assert ended(child) == 128 + signal.SIGTERM
    said = capfd.readouterr().err
    assert "error" not in said and said.endswith("stopped at once; --resume goes on with what had been saved\n")
    assert [path.name for path in in_order(workplace / "run")] == []


# ----------------------------------------------------------------------------------------------------------------
# What else can go wrong
# ----------------------------------------------------------------------------------------------------------------


def test_a_disk_that_is_full_ends_a_run_and_leaves_what_was_saved(never_stopped, workplace, no_figures, capfd):
    """From the second save on no file may be as large as the weights."""
    real, saves = run.save_state, []

    def without_room(*arguments) -> None:
        saves.append(arguments)
        if len(saves) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))
        real(*arguments)

    def work() -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        run.save_state = without_room
        return run_main(*train_command())

    assert forked(work) == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("error: run/checkpoints/step_4 cannot be written: ") and "File too large" in last
    assert [path.name for path in in_order(workplace / "run")] == ["step_2"]
    check_goes_on(never_stopped, workplace)


REWARD = (
    "def reward(prompts, responses, rows):\n"
    "    with open('calls', 'a') as file:\n"
    "        file.write('x')\n"
    "    if len(open('calls').read()) > {calls}:\n"
    "        {fault}\n"
    "    return [len(response) / 10 for response in responses]\n"
)
FAULTS = {
    "raise ValueError('no judge')": ("raised ValueError: no judge (rewards.py, line 5), for the prompt '", 1),
    "return [0.5] * 7 + [float('nan')]": ("returned nan for response 7, expected a finite number: the prompt '", 1),
    "return [0.5]": ("returned 1 scores, expected 8, one a response; the first of them is for the prompt '", 1),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_reward_that_fails_ends_a_run_with_what_it_failed_for_and_all_saved(fault, workplace, no_figures, capfd):
    """Then it is put right, and the run goes on to where it would have been."""
    words, _ = FAULTS[fault]
    command = train_command(reward_fn="rewards.py:reward", eval_every=0, save_every=4)
    path = workplace / "rewards.py"
    path.write_text(REWARD.format(calls=999, fault="pass"))
    assert forked(lambda: run_main(*command)) == 0
    whole = run_of(workplace)
    (workplace / "run").rename(workplace / "whole")
    (workplace / "calls").unlink()
    path.write_text(REWARD.format(calls=3, fault=fault))
    capfd.readouterr()
    assert forked(lambda: run_main(*command)) == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert words in last and " and the response '" in last and "what was trained before is saved: python main" in last
    done = len(read_rows(workplace / "run" / report.STATS))
    assert 0 < done < 4 and [path.name for path in in_order(workplace / "run")] == [f"step_{done}"]
    path.write_text(REWARD.format(calls=999, fault="pass"))
    assert forked(lambda: run_main("--task", "train", "--resume", "--output_dir", "run")) == 0
    again = run_of(workplace)
    assert {name for name in whole if whole[name] != again.get(name)} <= {f"checkpoints/step_{done}"}
    assert {name for name in again if name not in whole and f"step_{done}" not in name} == set()


def test_a_run_that_another_process_is_at_is_left_alone(workplace, capsys):
    shutil.copytree(workplace / "saved_models/tiny/ppo", workplace / "run")
    (workplace / "run/training_stats.json").unlink()
    with locked(workplace / "run"):
        assert_refused(
            capsys,
            workplace,
            ["--task", "train", "--resume", "--output_dir", "run"],
            "another process is at work on run",
        )
        assert run_main("--task", "train", "--output_dir", "run", *flags()) == 2
        assert "is not empty" in capsys.readouterr().err


def test_a_reward_that_fails_at_once_leaves_nothing_and_promises_nothing(workplace, no_figures, capsys):
    (workplace / "rewards.py").write_text(REWARD.format(calls=0, fault="raise ValueError('no judge')"))
    assert run_main(*train_command(reward_fn="rewards.py:reward", eval_every=0)) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert "raised ValueError: no judge" in last and "resume" not in last and "saved" not in last
    assert not (workplace / "run").exists()


def test_what_has_to_be_given_again_is_in_the_command_that_goes_on(tmp_path):
    command = f"python main.py --task train --resume --output_dir {tmp_path}"
    assert how_to_resume(tmp_path) == command
    elsewhere = Config(final_dir="the end", log_with="wandb", push_to_hub="a/b", allow_pickle=True)
    said = " --allow_pickle --final_dir 'the end' --log_with wandb --push_to_hub a/b"
    for config, again in ((Config(), ""), (elsewhere, said)):
        (tmp_path / "run_config.json").write_text(to_json(config))
        assert how_to_resume(tmp_path) == command + again


def test_a_lock_ends_with_its_process(tmp_path):
    """However it ends: here it is killed. While it lives, nobody else has it, another process or this one."""
    ready = tmp_path / "ready"

    def hold() -> None:
        with locked(tmp_path) as is_free:
            ready.write_text(str(is_free))
            time.sleep(60)

    child = start(hold)
    wait_for(ready.exists)
    with locked(tmp_path) as is_free:
        assert not is_free
    os.kill(child, signal.SIGKILL)
    ended(child)
    with locked(tmp_path) as is_free:
        assert is_free
        with locked(tmp_path) as is_free_twice:
            assert not is_free_twice
    assert [path.name for path in tmp_path.iterdir()] == ["ready"]


def test_a_child_of_the_process_does_not_keep_its_lock(tmp_path):
    """As a pool of a reward function's, which lives on when its parent is killed."""

    def hold() -> None:
        with locked(tmp_path):
            child = start(lambda: time.sleep(60))
            (tmp_path / "child").write_text(str(child))
            time.sleep(60)

    parent = start(hold)
    wait_for(lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text() != "")
    assert is_locked(tmp_path)
    os.kill(parent, signal.SIGKILL)
    ended(parent)
    assert not is_locked(tmp_path)
    os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)


EVALUATED = (
    "import pathlib\n"
    "def reward(prompts, responses, rows):\n"
    "    if len(responses) == 4 and pathlib.Path('fails').exists():\n"
    "        raise ValueError('not now')\n"
    "    return [len(response) / 10 for response in responses]\n"
)


def test_a_reward_that_fails_in_an_evaluation_ends_a_run_with_all_saved(workplace, no_figures, capfd):
    """Then that is made up for, also where the process ends once more in the middle of it."""
    command = train_command(reward_fn="rewards.py:reward", save_every=9)
    (workplace / "rewards.py").write_text(EVALUATED)
    assert forked(lambda: run_main(*command)) == 0
    whole = run_of(workplace)
    (workplace / "run").rename(workplace / "whole")
    (workplace / "fails").touch()
    assert forked(lambda: run_main(*command)) == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert "raised ValueError: not now" in last and "what was trained before is saved: python main.py" in last
    assert [path.name for path in in_order(workplace / "run")] == ["step_2"]
    assert [row.get("eval_reward") for row in read_stats(workplace / "run")] == [None, None]
    (workplace / "fails").unlink()

    def killed(*_) -> int:
        run.cut_rows = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        return run_main("--task", "train", "--resume", "--output_dir", "run")

    assert forked(killed) == -signal.SIGKILL
    assert forked(lambda: run_main("--task", "train", "--resume", "--output_dir", "run")) == 0
    assert run_of(workplace) == whole


def test_what_fails_for_want_of_memory_has_all_saved(workplace, no_figures, monkeypatch, capfd):
    def no_room(*_) -> None:
        raise MemoryError

    def work() -> int:
        real, calls = train.collect_rollout, []

        def collect(*arguments):
            calls.append(arguments)
            return real(*arguments) if len(calls) < 3 else no_room()

        train.collect_rollout = collect
        return run_main(*train_command(save_every=9, eval_every=0))

    assert forked(work) == 1
    said = capfd.readouterr().err
    assert "what was trained before is saved: python main.py" in said and "error: out of memory" in said
    assert [path.name for path in in_order(workplace / "run")] == ["step_2"]


def test_a_policy_that_is_broken_is_not_saved_over_what_it_was(tmp_path):
    """One step of an absurd length, which is finite itself: after it no probability is a number."""
    policy = PolicyModel(tiny_gpt2())
    config = settings(n_updates=5, save_every=1, learning_rate=1e-3, **{name: IDLE[name] for name in SIZES})
    real, calls = train.update, []

    def explode(policy, *others):
        stats = real(policy, *others)
        calls.append(stats)
        if len(calls) == 3:
            with torch.no_grad():
                next(policy.parameters()).mul_(1e38)
        return stats

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "update", explode)
        patch.setattr(run, "is_time_to_save", lambda config, n_updates, *_: n_updates == 2)
        with pytest.raises(RunError, match=r"probabilities are no numbers.*what it was before is in .*step_2$"):
            go_on(new_state(policy, config), fixed_for(policy), config, tmp_path)
    assert [path.name for path in in_order(tmp_path)] == ["step_2"]


SIZES = ("batch_size", "mini_batch_size")


def test_a_run_that_goes_on_meanwhile_elsewhere_is_not_taken_back(interrupted, workplace, monkeypatch, capsys):
    """Between the look for its newest checkpoint and the lock."""
    real = run.load_models

    def slow(*arguments):
        (interrupted / "checkpoints/step_2").rename(interrupted / "checkpoints/step_3")
        return real(*arguments)

    monkeypatch.setattr(run, "load_models", slow)
    assert run_main("--task", "train", "--resume") != 0
    assert (interrupted / "checkpoints/step_3").exists()


# ----------------------------------------------------------------------------------------------------------------
# What a resumed run may be asked
# ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def interrupted(workplace, no_figures, monkeypatch):
    """A run that was killed after three of four updates, in the current directory."""

    def killed(*arguments) -> None:
        if arguments[1] == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return is_time_to_save(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(run, "is_time_to_save", killed)
        assert forked(lambda: run_main(*train_command(output_dir="saved_models/tiny/ppo-2"))) == -signal.SIGKILL
    return workplace / "saved_models/tiny/ppo-2"


HOW = "python main.py --task train --resume --output_dir saved_models/tiny/ppo-2"


def test_the_next_start_says_how_an_interrupted_run_goes_on(interrupted, workplace, capsys):
    assert run_main("--task", "train", "--dry_run", *flags()) == 0
    said = capsys.readouterr().out
    assert f"note: saved_models/tiny/ppo-2 was interrupted after 3 of 4 updates: {HOW}\n" in said
    for task in ("generate", "evaluate"):
        folder = ["--output_dir", "saved_models/tiny/ppo-2"]
        (interrupted / "checkpoints/best").rename(workplace / "best")
        assert_refused(capsys, workplace, ["--task", task, *folder], "was not finished", "--task train --resume")
        (workplace / "best").rename(interrupted / "checkpoints/best")
    folder = ["--output_dir", "saved_models/tiny/ppo-2"]
    assert_refused(capsys, workplace, ["--task", "train", *flags(), *folder], "was interrupted", HOW)


def test_the_newest_interrupted_run_is_found_and_its_settings_are_kept(interrupted, capsys):
    assert run_main("--task", "train", "--resume", "--kl_target", "3", "--dry_run") == 0
    said = capsys.readouterr().out
    assert "saved_models/tiny/ppo-2 goes on after 2 of 4 updates\n" in said
    assert "output_dir saved_models/tiny/ppo-2, resume True" in said and "kl_target 3.0" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--kl_coef", "3"], ["--resume: --kl_coef is 3.0, and the run began with 0.07", "--n_updates"]),
        (["--seed", "1"], ["--seed is 1, and the run began with 0"]),
        (["--no-normalize_scores"], ["--normalize_scores is False"]),
        (["--n_updates", "1"], ["--n_updates 1 is less than the 2 that saved_models/tiny/ppo-2 has done"]),
        (["--output_dir", "nowhere"], ["--output_dir nowhere holds no run"]),
        (["--output_dir", "saved_models/tiny/sft"], ["--output_dir saved_models/tiny/sft holds no run of PPO"]),
        (["--output_dir", "saved_models/tiny/reward"], ["--output_dir saved_models/tiny/reward holds no run of PPO"]),
        (["--output_dir", "saved_models/tiny/ppo-2/checkpoints/best"], ["checkpoints/best holds no run of PPO"]),
        (["--output_dir", "saved_models/tiny/ppo-2/checkpoints/step_2"], ["checkpoints/step_2 holds no run of PPO"]),
        (["--output_dir", "saved_models/tiny/ppo-2", "--preset", "gpt2-imdb"], ["--preset is 'gpt2-imdb'"]),
        (["--output_dir", "saved_models/tiny/ppo-2", "--run_name", "x"], ["--run_name is 'x'"]),
        (["--output_dir", "saved_models/tiny/ppo"], ["is over, with 2 updates; a larger --n_updates"]),
    ],
)
def test_what_a_run_did_not_begin_with_is_refused(arguments, words, interrupted, workplace, capsys):
    assert_refused(capsys, workplace, ["--task", "train", "--resume", *arguments], *words)


def test_more_updates_are_done_also_by_a_run_that_began_with_epochs(workplace, no_figures):
    assert run_main(*train_command(epochs=0.05, eval_every=0)) == 0
    before = len(read_stats(workplace / "run"))
    assert 0 < before < 9
    assert run_main("--task", "train", "--resume", "--output_dir", "run", "--n_updates", str(before + 1)) == 0
    assert len(read_stats(workplace / "run")) == before + 1


def test_a_damaged_run_does_not_stop_others(interrupted, capsys):
    (interrupted / "run_config.json").write_text("")
    assert run_main("--task", "train", "--dry_run", *flags()) == 0
    assert "was interrupted" not in capsys.readouterr().out


def test_a_run_that_is_resumed_writes_elsewhere_only_if_that_is_said_again(interrupted, workplace, capsys):
    path = interrupted / "run_config.json"
    path.write_text(path.read_text().replace('"final_dir": ""', '"final_dir": "elsewhere"'))
    assert run_main("--task", "train", "--resume") == 0
    assert "note: --final_dir elsewhere of saved_models/tiny/ppo-2 has to be given again" in capsys.readouterr().err
    assert not (workplace / "elsewhere").exists()


def test_without_an_interrupted_run_there_is_nothing_to_resume(workplace, capsys):
    assert_refused(capsys, workplace, ["--task", "train", "--resume"], "holds no run that was interrupted")


def test_a_run_whose_data_or_start_are_others_now_is_not_resumed(questions, t5_folder, tmp_path, capsys, no_figures):
    shutil.copytree(t5_folder, tmp_path / "t5")
    command = ["--task", "train", *question_flags(tmp_path / "t5"), "--save_every", "1", "--output_dir", "run"]
    assert run_main(*command) == 0
    capsys.readouterr()
    assert_goes_on = ["--task", "train", "--resume", "--output_dir", "run", "--n_updates", "3"]
    lines = (questions / "prompts.jsonl").read_text().splitlines()
    (questions / "other.jsonl").write_text("\n".join(lines).replace("cost", "weigh"))
    settings_file = questions / "run/run_config.json"
    whole = settings_file.read_text()
    settings_file.write_text(whole.replace('"prompts.jsonl"', '"other.jsonl"'))
    assert_refused(capsys, questions, assert_goes_on, "run began with", "prompts of other rows")
    settings_file.write_text(whole)
    weights = safetensors.torch.load_file(tmp_path / "t5/model.safetensors")
    weights["shared.weight"][5] += 1e-3
    safetensors.torch.save_file(weights, tmp_path / "t5/model.safetensors", metadata={"format": "pt"})
    assert_refused(capsys, questions, assert_goes_on, "the model that run began with is another one now")


def test_a_run_that_is_over_goes_on_with_more_updates(workplace, no_figures, capsys):
    """Its old rows stay, its rate is that of the longer run, and its policy gives way to the new one."""
    command = train_command(save_every=0, critic="separate", eval_every=0)
    assert run_main(*command) == 0
    before = run_of(workplace)
    old = before[["run", "training_stats.jsonl"][1]]
    capsys.readouterr()
    assert run_main("--task", "train", "--resume", "--output_dir", "run", "--n_updates", "6") == 0
    said = capsys.readouterr().out
    rate = 1e-3 * (1 - 4 / 6)
    assert f"--n_updates was 4: the learning rate, which falls to 0 over all updates, goes on at {rate:.3g}\n" in said
    after = run_of(workplace)
    assert after["training_stats.jsonl"].startswith(old) and after["training_log.csv"].startswith(
        before["training_log.csv"]
    )
    assert [row["step"] for row in read_stats(workplace / "run")] == list(range(6))
    assert read_stats(workplace / "run")[4]["learning_rate"] == pytest.approx(rate)
    for name in ("model.safetensors", "critic/model.safetensors", "value_head.safetensors"):
        assert before[name] != after[name]
    assert json.loads(after["run_config.json"])["n_updates"] == 6
    assert json.loads(after["training_stats.json"]) == [
        json.loads(line) for line in after["training_stats.jsonl"].splitlines()
    ]
    assert len(read_log(workplace / "run")) == 6 * 8


# ----------------------------------------------------------------------------------------------------------------
# Killed whenever it may be
# ----------------------------------------------------------------------------------------------------------------

BASE = {"n_updates": 6, "save_every": 2, "batch_size": 8, "gradient_accumulation_steps": 2, "eval_every": 3}
BASE |= {"kl_target": 3, "learning_rate": 1e-3}


def system_flags(system: str, root: Path, t5_folder: Path) -> list[str]:
    """The arguments of a run of the kind, where the chain's stages and the questions are."""
    switched_on = ["--task", "train", "--normalize_scores"]
    if system == "encoder-decoder":
        settings = [str(part) for name, value in BASE.items() for part in (f"--{name}", value)]
        return [*switched_on, *question_flags(t5_folder), *settings, "--output_dir", "run"]
    changes = dict(BASE)
    if system == "adapter":
        changes["lora_r"] = 2
    if system == "separate critic":
        changes["critic"] = "separate"
    return [*switched_on, *flags(**changes), "--output_dir", "run"]


def command_of(arguments: list[str]) -> list[str]:
    return [sys.executable, str(Path(run.__file__).with_name("main.py")), *map(str, arguments)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("system", "kills"), [("causal", 20), ("adapter", 3), ("encoder-decoder", 3), ("separate critic", 3)]
)
def test_a_run_killed_at_random_moments_goes_on(system, kills, chain, questions, t5_folder, tmp_path_factory):
    """In processes of their own, by SIGKILL, anywhere between the start of its updates and its end; every third is
    killed once more after it was resumed.
    """
    root = tmp_path_factory.mktemp("killed")

    cwd, whole = root / "here", root / "whole"

    def new_place() -> None:
        shutil.copytree(chain.root / "saved_models", cwd / "saved_models")
        for file in ("prompts.jsonl", "rewards.py"):
            shutil.copy(questions / file, cwd)

    new_place()
    arguments = command_of(system_flags(system, cwd, t5_folder))
    resumed = [*command_of(["--task", "train", "--resume", "--output_dir", "run"])]
    subprocess.run(arguments, cwd=cwd, check=True, capture_output=True)
    cwd.rename(whole)
    numbers = random.Random(kills)
    where = []
    for number in range(kills):
        new_place()
        for attempt in range(2 if number % 3 == 2 else 1):
            again = attempt > 0 and (cwd / "run/run_config.json").exists()
            child = subprocess.Popen(
                resumed if again else arguments, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            rows = numbers.randrange(7)
            while len(read_rows(cwd / "run" / report.STATS)) < rows and child.poll() is None:
                time.sleep(0.005)
            time.sleep(numbers.random() * 0.3)
            child.kill()
            child.wait()
            where.append(len(read_rows(cwd / "run" / report.STATS)))
        if not (cwd / "run" / "training_stats.json").exists():
            is_begun = (cwd / "run/run_config.json").exists()
            subprocess.run(resumed if is_begun else arguments, cwd=cwd, check=True, capture_output=True)
        assert run_of(cwd) == run_of(whole), (number, where)
        shutil.rmtree(cwd)
    print(f"{system}: killed after {where} updates of 6")


def test_a_run_that_goes_on_multiplies_as_it_began(questions, t5_folder, monkeypatch):
    """Though it would choose otherwise by now, on another machine or with its notes lost."""
    monkeypatch.setenv("XDG_STATE_HOME", str(questions / "state"))
    monkeypatch.setattr("device.exact_precisions", lambda _: ["highest", "medium"])
    monkeypatch.setattr("device.fastest", lambda *_: "highest")
    config = Config(dataset_path="prompts.jsonl", prompt_column="question", reward_fn="rewards.py:reward")
    began = Began(reference="", n_prompts=None, matmul_precision="medium")
    for before, expected in ((None, "highest"), (began, "medium"), (None, "highest")):
        run.load_models(config, str(t5_folder), "", before)
        assert torch.get_float32_matmul_precision() == expected
