"""Shared by the tests: settings so small that the whole chain takes seconds, one finished run of it, a tiny T5, and the
command line from inside.

A test module gets the fixtures by `pytest_plugins = ["micro"]`. Nothing here, and no test, reaches the network.
(PYTEST_DONT_REWRITE: there are no tests in here.)
"""

import atexit
import contextlib
import functools
import io
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

SCRATCH = tempfile.mkdtemp(prefix="micro-")
atexit.register(shutil.rmtree, SCRATCH, ignore_errors=True)
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": SCRATCH}

import pytest  # noqa: E402
import torch  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers  # noqa: E402
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration  # noqa: E402

import dataset  # noqa: E402
import evaluation  # noqa: E402
import main  # noqa: E402
from config import PRESETS, Config  # noqa: E402
from reviews import movie_reviews  # noqa: E402
from sft import new_tokenizer  # noqa: E402

SETTINGS = {
    "n_layer": 1,
    "n_embd": 16,
    "n_head": 2,
    "vocab_size": 300,
    "context_length": 48,
    "max_new_tokens": 12,
    "temperature": 1.0,
    "n_reviews": 200,
    "sft_steps": 3,
    "reward_steps": 3,
    "n_updates": 2,
    "batch_size": 4,
    "mini_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "eval_samples": 4,
}
PPO = Path("saved_models/tiny/ppo")  # where the chain leaves its run


def flags(**changes) -> list[str]:
    """The micro settings, with changes, as command-line flags."""
    return [part for name, value in (SETTINGS | changes).items() for part in (f"--{name}", str(value))]


def micro_config(**changes) -> Config:
    """The tiny preset with the micro settings and changes."""
    return Config(**{"preset": "tiny"} | PRESETS["tiny"] | SETTINGS | changes)


def listing(folder: Path) -> dict[str, bytes]:
    """Everything below a folder, with the files' bytes; what Python itself caches is left out."""
    paths = [path for path in folder.rglob("*") if "__pycache__" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in sorted(paths)}


def run_main(*arguments) -> int:
    """The exit code of a command line, run in this process."""
    return main.main([str(argument) for argument in arguments])


def assert_refused(capsys, folder: Path, arguments: list, *words: str) -> None:
    """The command ends with code 2 and one sentence on standard error that has the words, below the line that names the
    run, if it uses one, and notes; the folder is as before.
    """
    before = listing(folder)
    code = run_main(*arguments)
    said = capsys.readouterr().err.splitlines(keepends=True)
    errors = "".join(line for line in said if not line.startswith(("using ", "note: ")))
    assert code == 2, (code, errors)
    assert errors.startswith("error: ") and errors.endswith("\n") and len(errors.splitlines()) == 1, errors
    for word in words:
        assert word in errors, (word, errors)
    after = listing(folder)
    assert after == before, sorted(name for name in before | after if before.get(name) != after.get(name))


def last_line_of_errors(capsys) -> str:
    """The last line on standard error, above which there may be a progress bar but no traceback."""
    errors = capsys.readouterr().err
    assert "Traceback" not in errors, errors
    return errors.splitlines()[-1]


def review_texts(n: int = 200) -> list[str]:
    return [review["text"] for review in movie_reviews(n, seed=0)]


@pytest.fixture(scope="session", autouse=True)
def reviews_are_written_once():
    """The built-in reviews are the same whenever they are asked for, and take a while to write."""
    written = functools.cache(movie_reviews)
    with pytest.MonkeyPatch.context() as patch:
        for module in (dataset, evaluation):
            patch.setattr(module, "movie_reviews", written)
        yield


class Chain(NamedTuple):
    """A finished run of `--task train` from nothing: the folder it ran in, and what it printed."""

    root: Path
    output: str
    errors: str


@pytest.fixture(scope="session")
def chain(tmp_path_factory) -> Chain:
    """The chain in micro settings, run once; not to be changed by a test."""
    root = tmp_path_factory.mktemp("chain")
    output, errors, here = io.StringIO(), io.StringIO(), Path.cwd()
    os.chdir(root)
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            assert run_main("--task", "train", *flags()) == 0
    finally:
        os.chdir(here)
    return Chain(root, output.getvalue(), errors.getvalue())


@pytest.fixture
def workplace(chain, tmp_path, monkeypatch) -> Path:
    """The current directory of a test: a copy of the chain's, with both stages and a PPO run in it."""
    shutil.copytree(chain.root / "saved_models", tmp_path / "saved_models")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def empty(tmp_path, monkeypatch) -> Path:
    """The current directory of a test, with nothing in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_figures(monkeypatch):
    """Training curves take seconds to draw: the chain's own are drawn, and those of the plot task."""
    monkeypatch.setattr("run.plot_training", lambda folder, notice="": folder / "plots/training.png")


@pytest.fixture
def no_bars(monkeypatch):
    """A comparison takes as long to draw: one test of the evaluate task does, and test_plot.py."""
    monkeypatch.setattr("plot.plot_comparison", lambda folder, notice="": folder / "plots/comparison.png")


QUESTIONS = [{"question": f'What did "{name}" cost, $5 or 5\'?', "answer": name} for name in "ABCDEFGHIJ" * 4]


@pytest.fixture
def questions(empty) -> Path:
    """The current directory of a test: prompts in it, and a reward function that needs the dataset's own rows."""
    (empty / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (empty / "rewards.py").write_text(
        "def reward(prompts, responses, rows):\n"
        "    assert all(row['question'] == prompt for row, prompt in zip(rows, prompts, strict=True))\n"
        "    return [response.count(row['answer'].lower()) for row, response in zip(rows, responses)]\n"
    )
    return empty


def question_flags(model: Path) -> list[str]:
    """Flags that train a model on the questions, rewarded by their function."""
    names = ("n_updates", "batch_size", "mini_batch_size", "eval_samples", "max_new_tokens")
    settings = {name: SETTINGS[name] for name in names} | {"max_prompt_length": 30}
    paths = {"dataset_path": "prompts.jsonl", "prompt_column": "question", "reward_fn": "rewards.py:reward"}
    options = {"base_model_name": model} | paths | settings | {"learning_rate": "1e-3"}
    return [str(part) for name, value in options.items() for part in (f"--{name}", value)]


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE tokenizer such as the sft stage makes."""
    return new_tokenizer(review_texts(), 400, 64)


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory) -> Path:
    """A T5 of random weights beside a tokenizer of its own: Unigram, spaces as ▁, EOS behind every text."""
    fast = Tokenizer(models.Unigram())
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    fast.train_from_iterator(
        review_texts(),
        trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False),
    )
    fast.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    t5_tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    model = T5ForConditionalGeneration(T5Config(vocab_size=len(t5_tokenizer), **sizes))
    folder = tmp_path_factory.mktemp("tiny-t5")
    model.save_pretrained(folder)
    t5_tokenizer.save_pretrained(folder)
    return folder
