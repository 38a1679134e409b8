"""The command line itself: exit codes, what ends a run, and which stages a task runs."""

import io
import os
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from micro import PPO, SETTINGS, assert_refused, flags, last_line_of_errors, listing, run_main

import main
from config import VERSION

pytest_plugins = ["micro"]
pytestmark = pytest.mark.usefixtures("no_figures")


def run_command(folder: Path, *arguments: str, **options) -> subprocess.CompletedProcess:
    """The command line as a user starts it: in a process of its own."""
    command = [sys.executable, main.__file__, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, **options)


def test_the_command_itself_ends_with_code_2_and_one_sentence(tmp_path):
    done = run_command(tmp_path, "--task", "trian")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --task 'trian' is not one of train, generate")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_data_that_cannot_be_reached_ends_the_command_without_a_second_try(tmp_path, tmp_path_factory):
    """A second try would be announced on standard error."""
    settings = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    settings |= {
        "HF_ENDPOINT": "http://127.0.0.1:1",
        "NO_PROXY": "127.0.0.1",
        "HF_HOME": str(tmp_path_factory.mktemp("hf")),
    }
    done = run_command(tmp_path, "--task", "train", "--preset", "gpt2-imdb", env=settings)
    assert done.returncode == 2 and done.stdout.startswith("settings: preset gpt2-imdb")
    start = "error: --dataset_path stanfordnlp/imdb cannot be loaded: http://127.0.0.1:1 cannot be reached ("
    assert done.stderr.startswith(start) and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_version_is_told_without_importing_what_it_names(tmp_path):
    """By modules of these names that cannot be imported."""
    for name in ("torch", "transformers"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(9)")
    done = run_command(tmp_path, "--version", env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stderr) == (0, "")
    python = ".".join(map(str, sys.version_info[:3]))
    assert done.stdout == (
        f"ppo {VERSION} (Python {python}, torch {version('torch')}, transformers {version('transformers')})\n"
    )


@pytest.mark.parametrize("module", ["yaml", "torch"])
def test_an_interruption_among_the_imports_ends_the_command(module, tmp_path):
    """By a module that is interrupted while it is imported and, as some do, goes on."""
    (tmp_path / f"{module}.py").write_text(
        "import os, signal, time\n"
        "try: os.kill(os.getpid(), signal.SIGINT); time.sleep(1)\n"
        "except KeyboardInterrupt: pass\n"
    )
    done = run_command(tmp_path, "--task", "train", env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stderr) == (130, "error: interrupted\n")


def test_a_job_that_was_started_deaf_to_interruptions_stays_so(tmp_path):
    """As those that a shell's script puts in the background: an interruption is meant for what is in front."""
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nraise SystemExit(7)")
    deaf = {
        "env": os.environ | {"PYTHONPATH": str(tmp_path)},
        "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    }
    assert run_command(tmp_path, "--task", "train", **deaf).returncode == 7


def test_an_interruption_of_the_work_is_raised_where_it_is_done(workplace):
    """There it can be put in order; by a module that the figures of a run need."""
    (workplace / "matplotlib.py").write_text(
        "import os, signal, time\n"
        "try: os.kill(os.getpid(), signal.SIGINT); time.sleep(1)\n"
        "finally: print('put in order')\n"
    )
    done = run_command(workplace, "--task", "plot", env=os.environ | {"PYTHONPATH": str(workplace)})
    assert (done.returncode, done.stderr.splitlines()[-1]) == (130, "error: interrupted")
    assert done.stdout.endswith("put in order\n")


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_a_reader_that_has_gone_away_ends_the_command_without_a_word(flag, tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, main.__file__, flag]
    settings = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(command, cwd=tmp_path, env=settings, stdout=writing, stderr=subprocess.PIPE, timeout=60)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def test_streams_that_are_closed_or_of_few_letters_can_be_printed_to(monkeypatch):
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="cp1252", write_through=True))
    monkeypatch.setattr(sys, "stderr", None)
    main.open_streams()
    print("Café 你")
    print("error", file=sys.stderr)
    assert printed.getvalue() == b"Caf\xe9 \\u4f60\n"
    assert sys.stdin.read() == ""
    for stream in (sys.stdin, sys.stderr):
        assert stream.name == os.devnull
        stream.close()


# ----------------------------------------------------------------------------------------------------------------
# What ends a run
# ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def update(monkeypatch) -> Mock:
    """Stands in for the loop's update: a test says what it raises or returns."""
    stand_in = Mock()
    monkeypatch.setattr("train.update", stand_in)
    return stand_in


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: not enough memory: you tried 9 bytes."
        ),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_running_out_of_memory_names_the_settings_that_need_less(error, workplace, update, capsys):
    update.side_effect = error
    assert run_main("--task", "train", *flags()) == 1
    sentence = last_line_of_errors(capsys)
    assert sentence.startswith("error: out of memory; ")
    assert "--mini_batch_size" in sentence and "--gradient_checkpointing" in sentence


def test_other_errors_are_not_taken_for_a_lack_of_memory(workplace, update):
    """A mistake in the program must be seen with its traceback."""
    update.side_effect = RuntimeError("shapes do not match")
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run_main("--task", "train", *flags())


def test_an_answer_of_the_system_is_told_in_a_sentence(workplace, update, capsys):
    """With the file that it names; without one it is of the stream that everything is printed to."""
    for error, words in (
        (OSError(24, "Too many open files", "log.csv"), "error: log.csv: Too many open files"),
        (
            OSError(28, "No space left on device"),
            "error: standard output, a file or a folder cannot be used: No space left",
        ),
    ):
        update.side_effect = error
        assert run_main("--task", "train", *flags()) == 1
        assert last_line_of_errors(capsys).startswith(words)
    update.side_effect = OSError("of a library")
    with pytest.raises(OSError, match="of a library"):
        run_main("--task", "train", *flags())


def test_what_cannot_be_printed_is_told(monkeypatch, capsys):
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    assert run_main("--version") == 1
    words = "error: standard output, a file or a folder cannot be used: No space left on device\n"
    assert capsys.readouterr().err == words


def test_an_interrupted_run_says_so_without_a_traceback(workplace, update, capsys):
    update.side_effect = KeyboardInterrupt
    assert run_main("--task", "train", *flags()) == 130
    assert last_line_of_errors(capsys) == "error: interrupted"


def test_a_run_interrupted_behind_its_updates_says_how_it_is_finished(workplace, monkeypatch, capsys):
    def interrupted(*_) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("run.plot_training", interrupted)
        assert run_main("--task", "train", *flags(), "--output_dir", "run") == 130
    how = "python main.py --task train --resume --output_dir run"
    assert f"all updates are done, and saved; what comes after them: {how}\n" in capsys.readouterr().err
    assert run_main("--task", "train", "--resume", "--output_dir", "run") == 0
    assert (workplace / "run" / "training_stats.json").exists()


# ----------------------------------------------------------------------------------------------------------------
# Which stages a task runs
# ----------------------------------------------------------------------------------------------------------------


def test_stages_run_alone_into_a_folder_of_their_own(workplace, capsys):
    """With the seed of the chain they are the chain's own, byte for byte, but for the files that name the folder."""

    def weights_and_tokenizer(folder: Path) -> dict[str, bytes]:
        files = listing(folder).items()
        return {name: content for name, content in files if name != "run_config.json" and not name.startswith("plots")}

    for stage in ("sft", "reward"):
        assert run_main("--task", stage, "--output_dir", f"my-{stage}", *flags()) == 0
        alone = weights_and_tokenizer(workplace / f"my-{stage}")
        assert "model.safetensors" in alone and alone == weights_and_tokenizer(workplace / PPO.with_name(stage))
        assert f"in my-{stage}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("task", "changes", "file"),
    [
        ("sft", {}, "model.safetensors"),
        ("reward", {}, "model.safetensors"),
        ("train", {"lora_r": 2}, "adapter_model.safetensors"),
    ],
)
def test_first_weights_are_a_function_of_the_seed_whatever_was_drawn_before(
    task, changes, file, workplace, monkeypatch
):
    """Those of a model from scratch, of a classifier's head, of an adapter."""
    monkeypatch.setattr("classifier.plot_reliability", lambda *_, **named: "")
    made = []
    for drawn, seed in ((1, 0), (2, 0), (1, 7)):
        torch.manual_seed(drawn)
        folder = workplace / f"{drawn}-{seed}"
        assert run_main("--task", task, *flags(output_dir=folder, seed=seed, **changes)) == 0
        made.append((folder / file).read_bytes())
    assert made[0] == made[1] != made[2]


def test_a_reward_model_named_by_the_user_is_never_trained(workplace, monkeypatch):
    trained = []
    (workplace / "saved_models/tiny/reward").rename(workplace / "sentiment")
    monkeypatch.setattr("classifier.run_reward", lambda *arguments: trained.append("reward"))
    monkeypatch.setattr("run.run_ppo", lambda config, base, reward, folder: trained.append(reward))
    assert run_main("--task", "train", "--reward_model_path", "sentiment", *flags()) == 0
    assert trained == ["sentiment"]


@pytest.mark.parametrize("change", [{"n_embd": 32}, {"sft_steps": 4}, {"reward_steps": 4}])
def test_a_stage_trained_with_other_settings_is_not_used_silently(change, workplace, capsys):
    (name, value), *_ = change.items()
    words = f"trained with --{name} {SETTINGS[name]}, and this run asks for --{name} {value}"
    assert_refused(capsys, workplace, ["--task", "train", *flags(**change)], words)


def test_plot_draws_again(workplace, capsys):
    figure = workplace / PPO / "plots/training.png"
    figure.unlink()
    assert run_main("--task", "plot") == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert str(PPO / "plots/training.png") in capsys.readouterr().out
