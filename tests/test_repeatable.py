"""The same seed on the same machine with as many threads gives the same run to the byte, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import read_log, read_stats
from micro import flags, listing, question_flags, run_main

pytest_plugins = ["micro"]
ROOT = Path(__file__).parents[1]
# large enough that torch shares the work among threads: logits have 8 x 24 x 1,600 numbers
LARGER = flags(n_embd=64, vocab_size=1600, max_new_tokens=24, n_updates=3, batch_size=16, mini_batch_size=8)
RUNS = {"tiny": lambda t5: LARGER, "t5": lambda t5: [*question_flags(t5), "--n_updates", "3"]}


def left_by(folder: Path, arguments: list[str], n_threads: int) -> dict[str, bytes]:
    """Every file that a run in a fresh process leaves, with its bytes; timings, which no two runs share, apart."""
    environment = os.environ | {"OMP_NUM_THREADS": str(n_threads), "PYTHONHASHSEED": "random"}
    command = [sys.executable, ROOT / "main.py", "--task", "train", "--output_dir", "run", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(read_stats(folder / "run")) == 3 and len(read_log(folder / "run")) >= 12
    return {name: data for name, data in listing(folder).items() if "timings" not in name}


@pytest.mark.slow
@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("kind", RUNS)
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(kind, n_threads, t5_folder, questions):
    """Weights, value head, logs, statistics, stages and figures; another seed's weights and texts are others."""
    arguments = RUNS[kind](t5_folder)
    found = {}
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        folder = questions / name
        folder.mkdir()
        for file in ("prompts.jsonl", "rewards.py"):
            (folder / file).write_bytes((questions / file).read_bytes())
        found[name] = left_by(folder, [*arguments, "--seed", str(seed)], n_threads)
    first, again, other = found.values()
    assert first.keys() == again.keys()
    assert [name for name in first if first[name] != again[name]] == []
    for name in ("model.safetensors", "value_head.safetensors", "training_log.csv"):
        assert first[f"run/{name}"] != other[f"run/{name}"], name
    assert read_stats(questions / "first/run") == read_stats(questions / "again/run")
    assert read_stats(questions / "first/run") != read_stats(questions / "other/run")


def test_an_encoder_decoder_runs_alike_twice_in_one_process(t5_folder, questions, no_figures):
    """What one run has left behind in the process moves nothing of the next."""
    for name in ("one", "two"):
        assert run_main("--task", "train", "--output_dir", name, *question_flags(t5_folder)) == 0
    for name in ("model.safetensors", "value_head.safetensors", "training_log.csv"):
        assert (questions / "one" / name).read_bytes() == (questions / "two" / name).read_bytes()
    assert read_stats(questions / "one") == read_stats(questions / "two")
