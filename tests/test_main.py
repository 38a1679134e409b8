"""The command line, from outside: what it refuses and how, and the whole chain in micro settings."""

import csv
import io
import json
import math
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from micro import SETTINGS, flags, listing
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

import main
import train
from config import PRESETS, parse_args
from dataset import load_prompts
from loading import load_policy, load_tokenizer

pytest_plugins = ["micro"]
MAIN = Path(main.__file__)


def run(*arguments: str) -> int:
    return main.main([str(argument) for argument in arguments])


def assert_refused(capsys, folder: Path, arguments: list, *words: str, code: int = 2) -> None:
    """The program ends with the code and one sentence on standard error, in which the words are; files stay alike."""
    before = listing(folder)
    assert run(*arguments) == code
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.endswith("\n"), errors
    assert len(errors.splitlines()) == 1, errors
    assert "Traceback" not in errors
    for word in words:
        assert word in errors
    assert listing(folder) == before


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """Drawing takes seconds: the chain's own figure and the plot task are drawn, no others."""
    monkeypatch.setattr(train, "plot_training", lambda folder, notice="": folder / "plots/training.png")


@pytest.fixture
def empty(tmp_path, monkeypatch) -> Path:
    """An empty current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ----------------------------------------------------------------------------------------------------------------
# Refused before anything is read
# ----------------------------------------------------------------------------------------------------------------

MISTAKES = {
    "task": (["--task", "trian"], "did you mean train?"),
    "preset": (["--task", "train", "--preset", "tinny"], "did you mean tiny?"),
    "flag": (["--task", "train", "--clip_rang", "0.1"], "did you mean --clip_range?"),
    "abbreviated flag": (["--task", "train", "--clip_r", "0.1"], "unknown argument --clip_r"),
    "flag with =": (["--task", "train", "--n_update=3"], "did you mean --n_updates?"),
    "flag without value": (["--task", "train", "--seed"], "--seed"),
    "positional": (["train"], "train"),
    "choice": (["--task", "train", "--kl_estimator", "k11"], "did you mean k1?"),
    "reward output": (["--task", "train", "--reward_output", "logits"], "did you mean logit?"),
    "not a number": (["--task", "train", "--learning_rate", "fast"], "--learning_rate is 'fast', expected float"),
    "not whole": (["--task", "train", "--n_updates", "2.5"], "--n_updates is '2.5', expected int"),
    "nan": (["--task", "train", "--kl_coef", "nan"], "--kl_coef is nan"),
    "infinite": (["--task", "train", "--kl_coef", "inf"], "--kl_coef is inf"),
    "clip_range": (["--task", "train", "--clip_range", "0"], "--clip_range is 0.0, expected a value in (0, 1)"),
    "gamma": (["--task", "train", "--gamma", "1.5"], "--gamma is 1.5, expected a value in [0, 1]"),
    "lam": (["--task", "train", "--lam", "-0.1"], "--lam is -0.1"),
    "learning_rate": (["--task", "train", "--learning_rate", "0"], "--learning_rate is 0.0"),
    "n_updates": (["--task", "train", "--n_updates", "0"], "--n_updates is 0"),
    "seed": (["--task", "train", "--seed", "-1"], "--seed is -1"),
    "mini-batch": (["--task", "train", "--batch_size", "64", "--mini_batch_size", "15"], "nearest that does is 16"),
    "accumulation": (
        ["--task", "train", "--batch_size", "8", "--mini_batch_size", "2", "--gradient_accumulation_steps", "3"],
        "--gradient_accumulation_steps 3",
    ),
    "whitened and normalised": (
        ["--task", "train", "--whiten_scores", "--normalize_scores"],
        "--whiten_scores undoes --normalize_scores",
    ),
    "heads": (["--task", "train", "--n_embd", "16", "--n_head", "3"], "--n_head 3 does not divide --n_embd 16"),
    "top_k": (["--task", "train", "--top_k", "50"], "--top_k"),
    "top_p": (["--task", "train", "--top_p", "0.9"], "--top_p"),
    "min_new_tokens": (["--task", "train", "--min_new_tokens", "5"], "--min_new_tokens"),
    "greedy": (["--task", "train", "--temperature", "0"], "--temperature 0"),
    "weights": (["--task", "train", "--reward_weights", "reward_model=much"], "reward_model=much"),
    "weight of no term": (["--task", "train", "--reward_weights", "reward_modle=1"], "did you mean reward_model?"),
    "weight of no function": (["--task", "train", "--reward_weights", "reward_fn=1"], "needs --reward_fn FILE.py:NAME"),
    "no length range": (["--task", "train", "--reward_weights", "length=1"], "--length_range is ''"),
    "length range": (["--task", "train", "--length_range", "9,4"], "--length_range is '9,4', expected LOW,HIGH"),
    "device": (["--task", "train", "--device", "abacus"], "--device abacus"),
    "no file of a function": (["--task", "train", "--reward_fn", "nowhere.py:reward"], "nowhere.py:reward"),
    "no name of a function": (["--task", "train", "--reward_fn", "reward"], "FILE.py:NAME"),
    "no run to generate from": (["--task", "generate", "--prompt", "The film"], "--task train"),
    "no run to evaluate": (["--task", "evaluate"], "--task train"),
    "no run to plot": (["--task", "plot", "--output_dir", "elsewhere"], "elsewhere"),
    "no config file": (["--task", "train", "--config", "nowhere.yaml"], "nowhere.yaml"),
    "no dataset file": (["--task", "train", "--dataset_path", "nowhere.csv"], "nowhere.csv does not exist"),
    "no dataset folder": (["--task", "train", "--dataset_path", "nowhere/at/all"], "nowhere/at/all"),
    "no base model": (["--task", "train", "--base_model_name", "nowhere/at/all"], "--base_model_name nowhere/at/all"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_refused_in_one_sentence_before_anything_is_made(mistake, empty, capsys):
    """From nothing, so that no stage may be trained before the mistake is seen."""
    arguments, words = MISTAKES[mistake]
    rest = {name: value for name, value in SETTINGS.items() if f"--{name}" not in arguments}
    small = [part for name, value in rest.items() for part in (f"--{name}", value)] if "train" in arguments else []
    assert_refused(capsys, empty, [*arguments, *small], words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("clip_rang: 0.1", "did you mean clip_range?"),
        ("clip_range: 0", "--clip_range is 0"),
        ("clip_range: wide", "--clip_range is 'wide'"),
        ("whiten_scores: perhaps", "--whiten_scores is 'perhaps'"),
        ("seed: [1, 2]", "--seed is [1, 2]"),
        ("- clip_range", "holds a list"),
        ("clip_range: [0.1", "cannot be read"),
        ("3: 4", "unknown field 3"),
    ],
)
def test_a_bad_config_file_is_refused(text, words, empty, capsys):
    (empty / "run.yaml").write_text(text)
    assert_refused(capsys, empty, ["--task", "train", "--config", "run.yaml", *flags()], words)


def test_a_config_file_that_is_no_text_is_refused(empty, capsys):
    (empty / "run.yaml").write_bytes(b"\xff\xfe\x00seed: 1")
    assert_refused(capsys, empty, ["--task", "train", "--config", "run.yaml"], "run.yaml cannot be read")
    (empty / "folder.yaml").mkdir()
    assert_refused(capsys, empty, ["--task", "train", "--config", "folder.yaml"], "folder.yaml cannot be read")


def test_a_run_whose_settings_are_damaged_is_refused(workplace, capsys):
    settings = workplace / "saved_models/tiny/ppo/run_config.json"
    for damage in (lambda: settings.write_text('{"seed": '), settings.unlink):
        damage()
        assert_refused(capsys, workplace, ["--task", "generate", "--prompt", "The film"], "run_config.json")


def test_the_command_itself_ends_with_code_2_and_one_sentence(tmp_path):
    command = [sys.executable, MAIN, "--task", "trian"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --task 'trian' is not one of train, generate")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------------------------------------
# Data, models and folders
# ----------------------------------------------------------------------------------------------------------------

DATA = {
    "broken.jsonl": '{"text": "one"}\n{"text": \n',
    "broken.parquet": "no parquet",
    "empty.csv": "",
    "header.csv": "text,label\n",
    "few.csv": "text,label\nA film.,1\n",
    "columns.csv": "review,stars\n" + "A fine film.,4\n" * 40,
    "numbers.csv": "text,label\n" + "7,1\n" * 40,
    "gaps.jsonl": '{"text": "A film."}\n' * 39 + '{"text": null}\n',
}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("broken.jsonl", "broken.jsonl cannot be loaded"),
        ("broken.parquet", "broken.parquet cannot be loaded"),
        ("empty.csv", "empty.csv"),
        ("header.csv", "header.csv"),
        ("few.csv", "few.csv has no rows for train"),
        ("columns.csv", "--prompt_column 'text' is no column of the data; it has review, stars"),
        ("numbers.csv", "--prompt_column 'text' holds a int in row 0, expected a str"),
        ("gaps.jsonl", "--prompt_column 'text' holds a NoneType"),
    ],
)
@pytest.mark.parametrize("stages", ["trained", "untrained"])
def test_bad_data_is_refused(stages, name, words, chain, empty, capsys, caplog):
    """Beside models from elsewhere, and before any stage is trained on it; the library adds no words of its own."""
    (empty / name).write_text(DATA[name])
    here = chain.root / "saved_models/tiny"
    models = ["--base_model_name", here / "sft", "--reward_model_path", here / "reward"]
    arguments = ["--task", "train", "--dataset_path", name, *flags(), *(models if stages == "trained" else [])]
    assert_refused(capsys, empty, arguments, words)
    assert [record.message for record in caplog.records if record.name.startswith("datasets")] == []


def test_data_without_any_text_is_refused(chain, empty, capsys):
    (empty / "blank.jsonl").write_text('{"text": ""}\n' * 40)
    here = chain.root / "saved_models/tiny"
    models = ["--base_model_name", here / "sft", "--reward_model_path", here / "reward"]
    arguments = ["--task", "train", "--dataset_path", "blank.jsonl", *flags(), *models]
    assert_refused(capsys, empty, arguments, "--prompt_column 'text' holds no text")


def test_a_split_that_does_not_exist_is_refused_with_those_that_do(empty, capsys):
    (empty / "data.csv").write_text("text,label\n" + "A fine film.,1\n" * 40)
    arguments = ["--task", "train", "--dataset_path", "data.csv", "--dataset_split", "dev", *flags()]
    assert_refused(capsys, empty, arguments, "'dev' is not in data.csv; it has train")


def test_labels_that_are_no_classes_are_refused_before_training(empty, capsys):
    (empty / "data.csv").write_text("text,label\n" + "A fine film.,7\nA poor one.,9\n" * 40)
    arguments = ["--task", "train", "--dataset_path", "data.csv", *flags()]
    assert_refused(capsys, empty, arguments, "--label_column 'label' holds [7, 9]")


LONG = ["--prompt_tokens", "0", "--max_prompt_length", "5"]


def test_long_prompts_are_refused_on_request(workplace, capsys):
    arguments = ["--task", "train", *LONG, "--long_prompts", "refuse", *flags()]
    assert_refused(capsys, workplace, arguments, "8 of 8 prompts are longer than --max_prompt_length 5")


def test_long_prompts_are_cut_and_counted(workplace, capsys):
    assert run("--task", "train", "--dry_run", *LONG, *flags()) == 0
    assert "8 of 8 prompts were cut on the left to 5 tokens" in capsys.readouterr().out


def test_prompt_and_response_beyond_the_context_are_refused(workplace, capsys):
    arguments = ["--task", "train", *flags(max_new_tokens=40)]
    assert_refused(capsys, workplace, arguments, "--max_prompt_length 12", "--max_new_tokens 40", "48 tokens")


def test_a_context_too_short_is_refused_before_the_stages_are_trained(empty, capsys):
    arguments = ["--task", "train", *flags(max_new_tokens=40)]
    assert_refused(capsys, empty, arguments, "--max_prompt_length 12", "--max_new_tokens 40", "48 tokens")


def test_a_folder_that_is_no_model_is_refused(workplace, capsys):
    (workplace / "notes").mkdir()
    arguments = ["--task", "train", *flags()]
    assert_refused(capsys, workplace, [*arguments, "--base_model_name", "notes"], "--base_model_name notes")
    assert_refused(capsys, workplace, [*arguments, "--reward_model_path", "notes"], "--reward_model_path notes")


def test_damaged_weights_are_refused(workplace, capsys):
    (workplace / "saved_models/tiny/sft/model.safetensors").write_bytes(b"damaged")
    assert_refused(capsys, workplace, ["--task", "train", *flags()], "saved_models/tiny/sft")


def test_a_folder_that_holds_a_run_is_not_written_over(workplace, capsys):
    folder = "saved_models/tiny/ppo"
    assert_refused(capsys, workplace, ["--task", "train", "--output_dir", folder, *flags()], folder, "not empty")
    for stage in ("sft", "reward"):
        assert_refused(capsys, workplace, ["--task", stage, *flags()], f"saved_models/tiny/{stage} exists already")


@pytest.mark.parametrize("task", ["train", "sft", "reward"])
def test_a_folder_that_cannot_be_written_is_refused_before_training(task, workplace, capsys):
    (workplace / "file").write_text("no folder")
    arguments = ["--task", task, "--output_dir", "file/below", *flags()]
    assert_refused(capsys, workplace, arguments, "file/below cannot be written")


def test_a_reward_label_that_does_not_exist_is_refused_with_those_that_do(workplace, capsys):
    arguments = ["--task", "train", "--reward_label", "NEUTRAL", *flags()]
    assert_refused(capsys, workplace, arguments, "'NEUTRAL'", "0 (NEGATIVE), 1 (POSITIVE)")
    arguments = ["--task", "train", "--reward_label", "Negatve", *flags()]
    assert_refused(capsys, workplace, arguments, "did you mean negative?")


@pytest.fixture
def zoo(workplace, capsys) -> Path:
    """Beside the chain's models some that do not go together, by the names that the mistakes below use."""
    import peft  # once micro has told the Hub's library to stay offline

    tokenizer = AutoTokenizer.from_pretrained("saved_models/tiny/sft")
    size = {"n_positions": 48, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    plain = {"vocab_size": len(tokenizer), "n_embd": 16} | size
    for name, model in {
        "three": GPT2ForSequenceClassification(GPT2Config(**plain, num_labels=3)),
        "wide": GPT2LMHeadModel(GPT2Config(**plain | {"n_embd": 32})),
        "short": GPT2LMHeadModel(GPT2Config(**plain | {"vocab_size": len(tokenizer) - 7})),
        "endless": GPT2LMHeadModel(GPT2Config(**plain)),
    }.items():
        model.save_pretrained(name)
        tokenizer.save_pretrained(name)
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, pad_token=tokenizer.pad_token)
    endless.save_pretrained("endless")
    peft.get_peft_model(GPT2LMHeadModel.from_pretrained("wide"), peft.LoraConfig(r=2)).save_pretrained("adapter")
    capsys.readouterr()
    return workplace


UNFIT = {
    "no label of three": (["--reward_model_path", "three"], "--reward_label must name one of", "2 (LABEL_2)"),
    "label of three": (["--reward_model_path", "three", "--reward_label", "LABEL_3"], "'LABEL_3'", "2 (LABEL_2)"),
    "no classifier": (
        ["--reward_model_path", "wide", "--reward_label", "0"],
        "--reward_model_path wide is no classifier",
    ),
    "short classifier": (["--reward_model_path", "short"], "--reward_model_path short", "300 tokens", "embeds 293"),
    "adapter": (
        ["--base_model_name", "endless", "--peft_model_path", "adapter"],
        "its tokenizer has no end-of-sequence",
    ),
    "adapter of wide": (["--base_model_name", "SFT", "--peft_model_path", "adapter"], "an adapter of wide, not of "),
    "no adapter": (["--base_model_name", "SFT", "--peft_model_path", "three"], "three lacks adapter_config.json or"),
    "short": (["--base_model_name", "short"], "--base_model_name short", "300 tokens", "embeds 293"),
    "endless": (["--base_model_name", "endless"], "--base_model_name endless", "no end-of-sequence token"),
    "8 bits": (["--base_model_name", "SFT", "--load_in_8bit"], "--load_in_8bit", "--lora_r"),
    "4 bits": (["--base_model_name", "SFT", "--load_in_4bit"], "--load_in_4bit", "--lora_r"),
    "merge": (["--base_model_name", "SFT", "--lora_r", "2", "--load_in_4bit", "--merge"], "--merge would round"),
}


@pytest.mark.parametrize("mistake", UNFIT)
def test_models_that_do_not_go_together_are_refused(mistake, zoo, capsys):
    """Beside a reward model that would do, where the mistake is not in that."""
    arguments, *words = UNFIT[mistake]
    named = [argument.replace("SFT", "saved_models/tiny/sft") for argument in arguments]
    reward = [] if "--reward_model_path" in named else ["--reward_model_path", "saved_models/tiny/reward"]
    assert_refused(capsys, zoo, ["--task", "train", *flags(), *named, *reward], *words)


def test_a_mistake_in_the_reward_is_seen_before_the_stages_are_trained(zoo, capsys):
    shutil.rmtree("saved_models")
    arguments = ["--task", "train", *flags(), "--reward_model_path"]
    assert_refused(capsys, zoo, [*arguments, "three"], "--reward_label must name one of")
    assert_refused(capsys, zoo, [*arguments, "nowhere/at/all"], "--reward_model_path nowhere/at/all is no folder")


def test_data_that_cannot_be_reached_ends_the_command_without_a_second_try(tmp_path, tmp_path_factory):
    """A second try would be announced on standard error."""
    settings = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    settings |= {
        "HF_ENDPOINT": "http://127.0.0.1:1",
        "NO_PROXY": "127.0.0.1",
        "HF_HOME": str(tmp_path_factory.mktemp("hf")),
    }
    command = [sys.executable, MAIN, "--task", "train", "--preset", "gpt2-imdb"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, env=settings)
    assert done.returncode == 2 and done.stdout.startswith("settings: preset gpt2-imdb")
    start = "error: --dataset_path stanfordnlp/imdb cannot be loaded: http://127.0.0.1:1 cannot be reached ("
    assert done.stderr.startswith(start) and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------------------------------------
# Reward functions
# ----------------------------------------------------------------------------------------------------------------

REWARDS = """
def reward(prompts, responses, rows):
    return [len(response) / 10 for response in responses]

def too_few(prompts, responses, rows):
    return [1.0]

def nested(prompts, responses, rows):
    return [[1.0] for _ in responses]

def text(prompts, responses, rows):
    return ["good" for _ in responses]

def nothing(prompts, responses, rows):
    pass

def nan(prompts, responses, rows):
    return [float("nan") for _ in responses]

def raising(prompts, responses, rows):
    return [1 / 0 for _ in responses]
"""


def test_a_reward_function_that_cannot_be_loaded_is_refused(empty, capsys):
    (empty / "rewards.py").write_text(REWARDS)
    (empty / "broken.py").write_text("import nowhere_at_all")
    (empty / "syntax.py").write_text("def reward(")
    arguments = ["--task", "train", *flags(), "--reward_fn"]
    assert_refused(capsys, empty, [*arguments, "rewards.py:rewrad"], "no function 'rewrad'; did you mean reward?")
    assert_refused(capsys, empty, [*arguments, "broken.py:reward"], "broken.py", "No module named 'nowhere_at_all'")
    assert_refused(capsys, empty, [*arguments, "syntax.py:reward"], "syntax.py", "SyntaxError")


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("too_few", "returned [1] scores, expected 4, one a response"),
        ("nested", "returned [4, 1] scores"),
        ("text", "returned list, expected a list of numbers"),
        ("nothing", "returned NoneType"),
        ("nan", "returned nan for response 0"),
        ("raising", "raised ZeroDivisionError: division by zero"),
    ],
)
def test_a_reward_function_that_misbehaves_ends_the_run(function, words, workplace, capsys):
    """At run time, hence code 1; a progress bar may stand above the sentence, but not on its line."""
    (workplace / "rewards.py").write_text(REWARDS)
    before = listing(workplace)
    assert run("--task", "train", "--reward_fn", f"rewards.py:{function}", *flags()) == 1
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith(f"error: --reward_fn rewards.py:{function} {words}")
    assert listing(workplace) == before


COMPOSITE = ["--reward_weights", "reward_model=1.0,repetition=-0.5,length=0.1", "--length_range", "2,6"]


def test_a_composite_reward_is_logged_term_by_term(workplace):
    """The terms of every logged response, worked out anew from its text, and their weighted sum."""
    assert run("--task", "train", *COMPOSITE, *flags(batch_size=8)) == 0
    folder = workplace / "saved_models/tiny/ppo-2"
    rows = log(folder)
    names = ["reward_reward_model", "reward_repetition", "reward_length"]
    assert list(rows[0]) == ["step", "query", "response", "reward", *names]
    for row in rows:
        words = row["response"].lower().split()
        again = sum(word in words[:i] for i, word in enumerate(words))
        assert float(row["reward_repetition"]) == pytest.approx(again / max(1, len(words)), abs=1e-6)
        assert float(row["reward_length"]) == (0 if len(words) in (2, 3, 4, 5, 6) else -1)
        model, repeated, length = (float(row[name]) for name in names)
        assert float(row["reward"]) == pytest.approx(model - 0.5 * repeated + 0.1 * length, abs=1e-6)
    assert {row["reward_length"] for row in rows} == {"0.0", "-1.0"}
    for row in stats(folder):
        own = [r for r in rows if int(r["step"]) == row["step"]]
        for name in names:
            assert row[name] == pytest.approx(sum(float(r[name]) for r in own) / 8, abs=1e-6)


def test_scores_normalised_on_request_have_the_moments_of_the_run(workplace):
    """The mean score of each step, worked out from the rewards of every response logged up to it."""
    assert run("--task", "train", "--normalize_scores", "--missing_eos_penalty", "0", *flags()) == 0
    folder = workplace / "saved_models/tiny/ppo-2"
    rewards = [float(row["reward"]) for row in log(folder)]
    for row in stats(folder):
        so_far = rewards[: 4 * row["step"] + 4]
        wanted = (statistics.mean(so_far[-4:]) - statistics.mean(so_far)) / statistics.stdev(so_far)
        assert row["score"] == pytest.approx(wanted, abs=1e-3)
        assert row["reward"] == pytest.approx(statistics.mean(so_far[-4:]), abs=1e-6)
    assert rewards[:4] != [0.0] * 4


def test_a_composite_without_the_classifier_trains_none(workplace, capsys):
    shutil.rmtree(workplace / "saved_models/tiny/reward")
    weights = ["--reward_weights", "length=1,repetition=-1", "--length_range", "2,6"]
    assert run("--task", "train", "--dry_run", *weights, *flags()) == 0
    assert not (workplace / "saved_models/tiny/reward").exists()
    output = capsys.readouterr().out
    assert len(re.findall(r"^  length -?[01]\.000, repetition 0\.\d{3}$", output, re.MULTILINE)) == 3


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
def test_running_out_of_memory_names_the_settings_that_need_less(error, workplace, monkeypatch, capsys):
    def update(*_):
        raise error

    monkeypatch.setattr(train, "update", update)
    assert run("--task", "train", *flags()) == 1
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    sentence = errors.splitlines()[-1]
    assert sentence.startswith("error: ") and "memory" in sentence
    assert "--mini_batch_size" in sentence and "--gradient_checkpointing" in sentence


def test_other_errors_are_not_taken_for_a_lack_of_memory(workplace, monkeypatch):
    """A mistake in the program must be seen with its traceback."""

    def update(*_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(train, "update", update)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run("--task", "train", *flags())


def test_a_loss_that_is_no_number_ends_the_run(workplace, monkeypatch, capsys):
    monkeypatch.setattr(train, "update", lambda *_: {"loss": float("nan")})
    assert run("--task", "train", *flags()) == 1
    assert "the loss is nan at update 0" in capsys.readouterr().err.splitlines()[-1]


def test_an_interrupted_run_says_so_without_a_traceback(workplace, monkeypatch, capsys):
    def update(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "update", update)
    assert run("--task", "train", *flags()) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "error: interrupted"


# ----------------------------------------------------------------------------------------------------------------
# The chain: what a run leaves and says
# ----------------------------------------------------------------------------------------------------------------

PPO = Path("saved_models/tiny/ppo")
STATISTICS = {
    "step",
    "reward",
    "variance",
    "reward_reward_model",
    "score",
    "kl",
    "kl_k1",
    "kl_k3",
    "kl_coef",
    "entropy",
    "value",
    "return",
    "explained_variance",
    "response_length",
    "distinct_bigrams",
    "ref_perplexity",
    "ended",
    "alarms",
    "loss",
    "policy_loss",
    "value_loss",
    "clip_fraction",
    "value_clip_fraction",
    "approx_kl_k1",
    "approx_kl_k3",
    "ratio",
    "ratio_min",
    "ratio_max",
    "learning_rate",
}


def stats(folder: Path) -> list[dict]:
    return json.loads((folder / "training_stats.json").read_text())


def log(folder: Path) -> list[dict]:
    with (folder / "training_log.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_chain_leaves_its_stages_and_its_run_and_nothing_else(chain):
    model = {"config.json", "model.safetensors", "run_config.json", "tokenizer.json", "tokenizer_config.json"}
    folders = {name: set(os.listdir(chain.root / "saved_models/tiny" / name)) for name in ("sft", "reward", "ppo")}
    assert set(os.listdir(chain.root)) == {"saved_models"}
    assert set(os.listdir(chain.root / "saved_models/tiny")) == set(folders)
    assert folders["sft"] == model | {"generation_config.json"}
    assert folders["reward"] == model | {"plots"}
    assert folders["ppo"] == model | {
        "generation_config.json",
        "value_head.safetensors",
        "training_log.csv",
        "training_stats.json",
        "timings.json",
        "plots",
        "NOTICE.txt",
        "manifest.json",
    }
    assert (chain.root / PPO / "plots/training.png").read_bytes().startswith(b"\x89PNG")


def test_the_policy_loads_without_this_project(chain):
    """Plain transformers gives a model that differs from the one before PPO, and continues a text."""
    policy, before = (AutoModelForCausalLM.from_pretrained(chain.root / PPO.with_name(n)) for n in ("ppo", "sft"))
    assert any(not torch.equal(a, b) for a, b in zip(policy.parameters(), before.parameters(), strict=True))
    tokenizer = AutoTokenizer.from_pretrained(chain.root / PPO)
    ids = tokenizer("The film", return_tensors="pt").input_ids
    assert policy.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, ids.shape[1] + 3)


def test_the_value_head_is_saved_and_has_learned(chain):
    head = load_file(chain.root / PPO / "value_head.safetensors")
    assert {name: list(tensor.shape) for name, tensor in head.items()} == {"weight": [1, 16], "bias": [1]}
    assert all(tensor.abs().max() > 0 for tensor in head.values())


def test_the_resolved_configuration_is_saved(chain):
    saved = json.loads((chain.root / PPO / "run_config.json").read_text())
    assert {name: saved[name] for name in SETTINGS} == SETTINGS
    assert (saved["preset"], saved["kl_coef"], saved["gamma"]) == ("tiny", PRESETS["tiny"]["kl_coef"], 1.0)


def test_the_log_has_a_row_a_response(chain):
    rows = log(chain.root / PPO)
    assert list(rows[0]) == ["step", "query", "response", "reward", "reward_reward_model"]
    assert [row["step"] for row in rows] == ["0"] * 4 + ["1"] * 4
    assert all(row["query"] and float(row["reward"]) == float(row["reward_reward_model"]) for row in rows)


def test_the_statistics_have_a_row_a_step_with_every_figure(chain):
    rows = stats(chain.root / PPO)
    assert [row["step"] for row in rows] == [0, 1]
    for row in rows:
        assert set(row) >= STATISTICS
        assert row.pop("alarms") == []
        assert all(math.isfinite(value) for value in row.values())
    assert not any(re.search("second|time", name) for name in rows[0])


def test_the_statistics_agree_with_the_log_and_the_settings(chain):
    rows, responses, rate = stats(chain.root / PPO), log(chain.root / PPO), PRESETS["tiny"]["learning_rate"]
    for row in rows:
        rewards = [float(r["reward"]) for r in responses if int(r["step"]) == row["step"]]
        assert row["reward"] == pytest.approx(sum(rewards) / 4, abs=1e-5)
    assert rows[0]["kl_k1"] == rows[0]["kl_k3"] == 0 and rows[1]["kl_k3"] > 0
    assert [row["learning_rate"] for row in rows] == pytest.approx([rate, rate / 2], abs=1e-9)
    assert all(0 < row["response_length"] <= 12 and 0 <= row["ended"] <= 1 for row in rows)


def test_timings_are_in_a_file_of_their_own(chain):
    timings = json.loads((chain.root / PPO / "timings.json").read_text())
    assert [set(row) for row in timings] == [{"step", "seconds_rollout", "seconds_update", "tokens_per_second"}] * 2


def test_the_notice_comes_first_and_last_and_is_saved(chain):
    notice = (chain.root / PPO / "NOTICE.txt").read_text().rstrip("\n")
    assert notice.startswith("This is a teaching demonstration") and "--preset gpt2-imdb" in notice
    assert "8,897 parameters" in notice
    assert chain.output.rstrip("\n").endswith(notice)
    assert chain.output.startswith("This is a teaching demonstration")


def test_the_run_ends_with_rewards_samples_and_paths(chain):
    number, interval = r"-?\d+\.\d{3}", r"\[[+-]\d+\.\d{3}, [+-]\d+\.\d{3}\]"
    pattern = (
        rf"reward on 4 held-out prompts: {number} before, {number} after; difference [+-]\d+\.\d{{3}}, 95 % interval"
    )
    assert re.search(f"{pattern} {interval}", chain.output)
    for heading in (r"^prompt  '", r"^  before \(", r"^  after  \("):
        assert len(re.findall(heading, chain.output, re.MULTILINE)) == 3
    assert str(PPO / "plots/training.png") in chain.output
    assert "Traceback" not in chain.errors


def test_the_printed_command_generates(chain, workplace, capsys):
    command = re.search("now try: (.*)", chain.output)[1]
    program, script, *arguments = shlex.split(command)
    assert (program, script) == ("python", "main.py")
    assert run(*arguments) == 0
    prompt = arguments[arguments.index("--prompt") + 1]
    assert f"\n{prompt}" in capsys.readouterr().out


def test_a_second_run_stands_beside_the_first_and_equals_it(workplace, capsys):
    """Same seed, same bytes; the stages are used as they are."""
    before = listing(workplace)
    assert run("--task", "train", *flags()) == 0
    after, second = listing(workplace), workplace / "saved_models/tiny/ppo-2"
    assert {name: after[name] for name in before} == before
    for name in ("model.safetensors", "value_head.safetensors", "training_stats.json", "training_log.csv"):
        assert (second / name).read_bytes() == (workplace / PPO / name).read_bytes()
    assert "language model:" not in capsys.readouterr().out


def test_another_seed_gives_another_run(workplace):
    assert run("--task", "train", "--seed", "1", *flags()) == 0
    second = workplace / "saved_models/tiny/ppo-2"
    for name in ("model.safetensors", "value_head.safetensors", "training_stats.json"):
        assert (second / name).read_bytes() != (workplace / PPO / name).read_bytes()


def test_a_dry_run_samples_and_leaves_nothing(workplace, capsys):
    before = listing(workplace)
    assert run("--task", "train", "--dry_run", *flags()) == 0
    assert listing(workplace) == before
    output = capsys.readouterr().out
    assert "invariants hold" in output
    assert len(re.findall(r"^prompt '", output, re.MULTILINE)) == 3
    assert len(re.findall(r"reward_model -?\d+\.\d{3}$", output, re.MULTILINE)) == 3


def test_stages_run_alone_into_a_folder_of_their_own(workplace, capsys):
    """With the seed of the chain they are the chain's own, byte for byte."""
    for stage in ("sft", "reward"):
        assert run("--task", stage, "--output_dir", f"my-{stage}", *flags()) == 0
        files = listing(workplace / f"my-{stage}")
        files = {n: b for n, b in files.items() if n != "run_config.json" and not n.startswith("plots")}  # they name it
        assert files == {name: (workplace / "saved_models/tiny" / stage / name).read_bytes() for name in files}
        assert f"in my-{stage}" in capsys.readouterr().out


def test_an_explicit_folder_is_used_for_the_run_and_found_by_generate(workplace, capsys):
    assert run("--task", "train", "--output_dir", "mine", *flags()) == 0
    assert (workplace / "mine/model.safetensors").read_bytes() == (workplace / PPO / "model.safetensors").read_bytes()
    capsys.readouterr()
    assert run("--task", "generate", "--output_dir", "mine", "--prompt", "The film") == 0
    assert capsys.readouterr().out.startswith("using mine\nThe film")


# ----------------------------------------------------------------------------------------------------------------
# generate, evaluate, plot
# ----------------------------------------------------------------------------------------------------------------


def generated(capsys, *arguments: str) -> str:
    """What `generate` prints below the line that names the run."""
    assert run("--task", "generate", *arguments) == 0
    first, rest = capsys.readouterr().out.split("\n", 1)
    assert first == f"using {PPO}"
    return rest


def test_generate_answers_each_prompt_and_repeats_itself(workplace, capsys):
    both = ["--prompt", "The film", "--prompt", "A comedy"]
    output = generated(capsys, *both)
    assert output.startswith("The film") and "\nA comedy" in output
    assert generated(capsys, *both) == output
    assert generated(capsys, *both, "--seed", "5") != output


def test_generate_takes_options_that_training_refuses(workplace, capsys):
    greedy = generated(capsys, "--prompt", "The film", "--temperature", "0")
    assert generated(capsys, "--prompt", "The film", "--top_k", "1") == greedy
    assert generated(capsys, "--prompt", "The film", "--seed", "9", "--top_p", "0.000001") == greedy


def test_generate_draws_several_samples(workplace, capsys):
    generated(capsys, "--prompt", "The film", "--num_samples", "3", "--output", "out.jsonl")
    rows = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["The film"] * 3
    assert len({row["response"] for row in rows}) == 3


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("prompts.txt", "The film\n\nA comedy\n"),
        ("prompts.jsonl", '{"prompt": "The film"}\n{"query": "A comedy"}\n'),
        ("prompts.json", '["The film", {"prompt": "A comedy"}]'),
    ],
)
def test_generate_reads_prompts_from_a_file_and_writes_json_lines(name, text, workplace, capsys):
    (workplace / name).write_text(text)
    assert "2 responses: out.jsonl" in generated(capsys, "--prompts", name, "--output", "out.jsonl")
    rows = [json.loads(line) for line in (workplace / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [list(row) for row in rows] == [["prompt", "response", "reward"]] * 2
    assert [row["prompt"] for row in rows] == ["The film", "A comedy"]
    assert all(isinstance(row["response"], str) and math.isfinite(row["reward"]) for row in rows)


def test_generate_answers_lines_from_standard_input(workplace, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("The film\n\nA comedy\n"))
    output = generated(capsys)
    assert output.startswith("The film") and "\nA comedy" in output
    monkeypatch.setattr(sys, "stdin", io.StringIO("The film\n"))
    assert "2 responses: new/out.jsonl" in generated(capsys, "--num_samples", "2", "--output", "new/out.jsonl")
    assert len((workplace / "new/out.jsonl").read_text().splitlines()) == 2


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_generate_asks_on_a_terminal_until_the_input_ends(workplace, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", Terminal("The film\n\nA comedy\n"))
    asked, *answers = generated(capsys).split("> ")
    assert "end with Ctrl-D" in asked
    first, blank, second, end = answers
    assert (first.startswith("The film"), second.startswith("A comedy")) == (True, True)
    assert (blank.strip(), end.strip()) == ("", "")


BAD_PROMPTS = {
    "nowhere.txt": None,
    "empty.txt": "\n \n",
    "broken.json": '["The film"',
    "broken.jsonl": '{"prompt": "The film"}\n{"prompt":\n',
    "keys.jsonl": '{"title": "The film"}\n',
    "numbers.json": "[1, 2]",
    "mapping.json": '{"prompt": "The film"}',
    "blank.json": '["The film", " "]',
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_generate_refuses_prompts_that_it_cannot_read(name, workplace, capsys):
    if BAD_PROMPTS[name] is not None:
        (workplace / name).write_text(BAD_PROMPTS[name])
    assert_refused(capsys, workplace, ["--task", "generate", "--prompts", name], "prompt")


def test_generate_refuses_an_empty_prompt_and_what_cannot_be_done(workplace, monkeypatch, capsys):
    generate = ["--task", "generate"]
    assert_refused(capsys, workplace, [*generate, "--prompt", ""], "a prompt is empty")
    assert_refused(capsys, workplace, [*generate, "--prompt", "The film", "--prompt", " "], "a prompt is empty")
    for stdin in (io.StringIO(), io.StringIO("\n \n")):
        monkeypatch.setattr(sys, "stdin", stdin)
        assert_refused(capsys, workplace, generate, "there is no prompt; give --prompt")
    monkeypatch.setattr(sys, "stdin", Terminal())
    assert_refused(capsys, workplace, [*generate, "--output", "out.jsonl"], "--prompt")
    assert_refused(capsys, workplace, [*generate, "--prompt", "A", "--max_new_tokens", "40"], "--max_new_tokens 40")
    (workplace / "file").write_text("no folder")
    output = [*generate, "--prompt", "The film", "--output", "file/out.jsonl"]
    assert_refused(capsys, workplace, output, "file is not a folder")
    output[-1] = "file"
    assert_refused(capsys, workplace, output, "--output file exists already; name another file")
    assert (workplace / "file").read_text() == "no folder"


def test_generate_takes_the_newest_run(workplace, capsys):
    (workplace / PPO).rename(workplace / PPO.with_name("ppo-7"))
    assert run("--task", "generate", "--prompt", "The film") == 0
    assert capsys.readouterr().out.startswith("using saved_models/tiny/ppo-7\n")


def test_evaluate_prints_its_figures_and_writes_them(workplace, capsys):
    before = listing(workplace)
    assert run("--task", "evaluate") == 0
    output, after = capsys.readouterr().out, listing(workplace)
    figures = ["positive", "length", "distinct_bigrams", "ended", "kl", "perplexity"]
    for name in figures:
        assert re.search(rf"^{name} +-?\d+\.\d{{3}} +-?\d+\.\d{{3}}   .*: (yes|NO)$", output, re.MULTILINE)
    assert "reward on 4 held-out prompts" in output and "independent judge" in output
    results = {"comparison.json", "samples.csv", "test_results_reviews.csv"}
    results = {f"{PPO}/results", f"{PPO}/plots/comparison.png", *(f"{PPO}/results/{name}" for name in results)}
    made = {name for name in after.keys() - before.keys() if not name.startswith("saved_models/tiny/judge")}
    assert made == results and {name: after[name] for name in before} == before
    comparison = json.loads(after[f"{PPO}/results/comparison.json"])
    assert comparison["policies"] == {"before": "saved_models/tiny/sft", "after": str(PPO)}
    assert list(comparison["splits"]) == ["test"]
    own = comparison["splits"]["test"]["figures"]
    assert set(own) == {"before", "after"} and own["before"]["kl"] == 0
    assert all({*figures, "reward", "reward_reward_model_std", "repetition"} <= set(own[name]) for name in own)
    assert_samples(workplace / PPO / "results/samples.csv")


def assert_samples(path: Path) -> None:
    """Best difference first."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    names = ["query", "response_before", "response_after", "reward_before", "reward_after", "reward_diff"]
    assert list(rows[0]) == names
    differences = [float(row["reward_diff"]) for row in rows]
    assert differences == sorted(differences, reverse=True)
    for row in rows:
        difference = float(row["reward_after"]) - float(row["reward_before"])
        assert difference == pytest.approx(float(row["reward_diff"]), abs=1e-9)


def read_table(path: Path) -> list[dict]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def no_bars(monkeypatch):
    """Bars are drawn in the first test of `evaluate`, and in test_plot.py."""
    monkeypatch.setattr("plot.plot_comparison", lambda folder, notice="": folder / "plots/comparison.png")


def test_evaluate_compares_any_number_of_policies(workplace, no_bars, capsys):
    """The first is the reference; a policy that is it twice differs from it in nothing."""
    sft = "saved_models/tiny/sft"
    policies = {"base": sft, "ppo": str(PPO), "again": sft}
    flag = [part for name, path in policies.items() for part in ("--policies", f"{name}={path}")]
    assert run("--task", "evaluate", *flag) == 0
    output = capsys.readouterr().out
    assert "should be" not in output
    number, interval = r"-?\d+\.\d{3}", r"[+-]\d+\.\d{3} \[[+-]\d+\.\d{3}, [+-]\d+\.\d{3}\]"
    line = rf"^reward +({number}) +{number} +({number})   ppo - base {interval}   again - base (.*)$"
    base, again, difference = re.search(line, output, re.MULTILINE).groups()
    assert base == again and difference == "+0.000 [+0.000, +0.000]"
    assert re.search(r"^  base .*\n  ppo .*\n  again .*$", output, re.MULTILINE)
    comparison = json.loads((workplace / PPO / "results/comparison.json").read_text())
    assert comparison["policies"] == policies
    split = comparison["splits"]["test"]
    figures = split["figures"]
    assert list(figures) == [*policies] and figures["base"] == figures["again"] != figures["ppo"]
    assert set(split["differences"]) == {"ppo", "again"}
    shift = figures["ppo"]["length"] - figures["base"]["length"]
    assert split["differences"]["ppo"]["length"]["difference"] == pytest.approx(shift)
    rows = read_table(workplace / PPO / "results/samples.csv")
    columns = [f"{kind}_{name}" for kind in ("response", "reward") for name in policies]
    assert list(rows[0]) == ["query", *columns, "reward_diff"]
    assert [float(row["reward_diff"]) for row in rows] == [0.0] * 4  # from first to last


def test_evaluate_refuses_policies_that_it_cannot_compare(workplace, t5_folder, capsys):
    sft = "saved_models/tiny/sft"
    for flag, words in {
        sft: f"--policies '{sft}': expected NAME=FOLDER_OR_ID",
        "base=nowhere/at/all": "--policies nowhere/at/all is no folder",
        f"t5={t5_folder}": f"--policies {t5_folder} has another vocabulary than the first policy",
    }.items():
        assert_refused(capsys, workplace, ["--task", "evaluate", "--policies", f"a={sft}", "--policies", flag], words)
    arguments = ["--task", "evaluate", "--reference_column", "summary"]
    assert_refused(capsys, workplace, arguments, "--reference_column 'summary' is no column of the data")
    assert_refused(capsys, workplace, ["--task", "evaluate", "--max_new_tokens", "40"], "--max_new_tokens 40")


def test_plot_draws_again(workplace, capsys):
    figure = workplace / PPO / "plots/training.png"
    figure.unlink()
    assert run("--task", "plot") == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert str(PPO / "plots/training.png") in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------
# Models from elsewhere, and a plain function as reward
# ----------------------------------------------------------------------------------------------------------------

PROMPTS = [{"question": f'What did "{name}" cost, $5 or 5\'?', "answer": name} for name in "ABCDEFGHIJ" * 4]


@pytest.fixture
def plain(empty) -> Path:
    """A folder with prompts and a reward function that needs the dataset's own rows."""
    (empty / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    (empty / "rewards.py").write_text(
        "def reward(prompts, responses, rows):\n"
        "    assert all(row['question'] == prompt for row, prompt in zip(rows, prompts, strict=True))\n"
        "    return [response.count(row['answer'].lower()) for row, response in zip(rows, responses)]\n"
    )
    return empty


def plain_flags(model: Path) -> list[str]:
    names = ("n_updates", "batch_size", "mini_batch_size", "eval_samples", "max_new_tokens")
    settings = {name: SETTINGS[name] for name in names} | {"max_prompt_length": 30}
    paths = {"dataset_path": "prompts.jsonl", "prompt_column": "question", "reward_fn": "rewards.py:reward"}
    options = {"base_model_name": model} | paths | settings | {"learning_rate": "1e-3"}
    return [str(part) for name, value in options.items() for part in (f"--{name}", value)]


def test_an_encoder_decoder_trains_on_a_plain_function(t5_folder, plain, capsys):
    """No classifier is trained beside it, no notice is printed, and the command that it prints works in a shell."""
    assert run("--task", "train", *plain_flags(t5_folder)) == 0
    output = capsys.readouterr().out
    runs = list(plain.glob("saved_models/*/*"))
    assert [run.name for run in runs] == ["ppo"]
    assert "teaching demonstration" not in output
    model = AutoModelForSeq2SeqLM.from_pretrained(runs[0])
    start = AutoModelForSeq2SeqLM.from_pretrained(t5_folder)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters(), strict=True))
    assert list(log(runs[0])[0]) == ["step", "query", "response", "reward", "reward_reward_fn"]
    *_, arguments = re.search("now try: (python) (main.py) (.*)", output).groups()
    assert run(*shlex.split(arguments)) == 0
    assert f"\n{PROMPTS[0]['question'][:10]}" in capsys.readouterr().out


def test_evaluate_reports_rouge_and_values_on_both_splits(t5_folder, plain, no_bars, monkeypatch, capsys):
    """No judge is trained where the model was not: their rows are not set apart there."""
    assert run("--task", "train", *plain_flags(t5_folder)) == 0
    capsys.readouterr()
    monkeypatch.setattr("evaluation.load_text_judge", lambda *_: pytest.fail("a judge was trained"))
    assert run("--task", "evaluate", "--eval_split", "both", "--reference_column", "answer") == 0
    output = capsys.readouterr().out
    assert re.search(r"^rougeL +\d\.\d{3} +\d\.\d{3}$", output, re.MULTILINE)
    (results,) = plain.glob("saved_models/*/ppo/results")
    splits = json.loads((results / "comparison.json").read_text())["splits"]
    files = {"validation": ("val_results_prompts.csv", 4), "test": ("test_results_prompts.csv", 4)}
    assert list(splits) == list(files)
    answers = {row["question"]: row["answer"] for row in PROMPTS}
    for split, (name, count) in files.items():
        rows = read_table(results / name)
        assert f"on {count} {split} prompts" in output and len(rows) == splits[split]["n_prompts"] == count
        assert all(row["reference"] == answers[row["query"]] for row in rows)
        for policy, figures in splits[split]["figures"].items():
            for column in ("reward", "reward_reward_fn", "rouge1", "rouge2", "rougeL", "value", "length"):
                values = [float(row[f"{column}_{policy}"]) for row in rows]
                assert figures[column] == pytest.approx(sum(values) / count, abs=1e-9)
        assert all({"response_before", "response_after", "reward_diff"} <= set(row) for row in rows)
    samples = read_table(results / "samples.csv")
    assert len(samples) == 8 and "reference" not in samples[0]


def test_a_causal_model_trains_on_a_plain_function(chain, plain, capsys):
    """The chain's language model as any other: a folder with a model in Hugging Face format."""
    assert run("--task", "train", *plain_flags(chain.root / "saved_models/tiny/sft")) == 0
    assert [path.name for path in plain.glob("saved_models/*/*")] == ["ppo"]
    assert "reward model:" not in capsys.readouterr().out


def test_a_reward_model_named_by_the_user_is_never_trained(workplace, monkeypatch):
    trained = []
    (workplace / "saved_models/tiny/reward").rename(workplace / "sentiment")
    monkeypatch.setattr("classifier.run_reward", lambda *arguments: trained.append("reward"))
    monkeypatch.setattr("train.train", lambda config, base, reward, folder: trained.append(reward))
    assert run("--task", "train", "--reward_model_path", "sentiment", *flags()) == 0
    assert trained == ["sentiment"]


def test_a_reward_model_named_by_the_user_may_come_from_other_data(workplace, plain, capsys):
    """The settings of a stage must agree with this run's only where the stage is this run's own."""
    own = str(workplace / "saved_models/tiny/reward")
    arguments = [*plain_flags(workplace / "saved_models/tiny/sft"), "--reward_fn", "", "--reward_model_path", own]
    assert run("--task", "train", "--dry_run", *arguments) == 0
    assert len(re.findall(r"reward_model -?\d+\.\d{3}$", capsys.readouterr().out, re.MULTILINE)) == 3


@pytest.mark.parametrize("change", [{"n_embd": 32}, {"sft_steps": 4}, {"reward_steps": 4}])
def test_a_stage_trained_with_other_settings_is_not_used_silently(change, workplace, capsys):
    (name, value), *_ = change.items()
    words = f"trained with --{name} {SETTINGS[name]}, and this run asks for --{name} {value}"
    assert_refused(capsys, workplace, ["--task", "train", *flags(**change)], words)


def test_evaluation_refuses_what_training_refuses(workplace, capsys):
    """A KL is only a KL under the distribution that was sampled; and responses must fit the model."""
    for flag in (["--top_k", "5"], ["--temperature", "0"], ["--top_p", "0.9"]):
        assert_refused(capsys, workplace, ["--task", "evaluate", *flag], "are for --task generate")
    assert_refused(capsys, workplace, ["--task", "evaluate", "--max_new_tokens", "400"], "--max_new_tokens 400")
    assert_refused(capsys, workplace, ["--task", "train", *flags(dtype="bfloat16")], "train in float32")


def test_the_best_policy_by_held_out_reward_is_kept_and_judged_on_other_prompts(workplace, monkeypatch, capsys):
    """Rewards .2, .5 and .3 on the validation prompts: the second policy is saved, and reported on test prompts."""
    script, asked, weights, real = iter([0.2, 0.5, 0.3]), [], [], train.evaluate_policy

    def scripted(policy, reference, tokenizer, terms, prompts, config):
        asked.append([prompt.text for prompt in prompts])
        weights.append(policy.language_model.transformer.wte.weight.detach().clone())
        reward = next(script, None)
        return [
            row if reward is None else row | {"reward": reward}
            for row in real(policy, reference, tokenizer, terms, prompts, config)
        ]

    monkeypatch.setattr(train, "evaluate_policy", scripted)
    assert run("--task", "train", *flags(n_updates=5, eval_every=2, output_dir="best")) == 0
    folder = workplace / "best"
    assert [row.get("eval_reward") for row in stats(folder)] == [
        None,
        pytest.approx(0.2),
        None,
        0.5,
        pytest.approx(0.3),
    ]
    assert not (folder / "checkpoints").exists()
    assert "the policy of update 3 is kept, with a reward of 0.500 on validation prompts" in capsys.readouterr().out
    config = parse_args(["--task", "train", *flags()])
    tokenizer = load_tokenizer(str(folder))
    validation, test = ([p.text for p in load_prompts(config, tokenizer, part, 4)] for part in ("validation", "test"))
    assert asked == [validation] * 3 + [test] * 2 and not set(validation) & set(test)
    saved = load_policy(config, str(folder), torch.device("cpu")).language_model.transformer.wte.weight
    assert torch.equal(saved, weights[1]) and torch.equal(saved, weights[4]) and not torch.equal(saved, weights[2])


def test_the_newest_policy_is_also_put_where_final_dir_says(workplace, capsys):
    """In place of the one before it; a folder of something else is refused before work starts."""
    for _ in range(2):
        assert run("--task", "train", *flags(final_dir="final", seed=1)) == 0
        (newest,) = (json.loads((workplace / "final" / "manifest.json").read_text()),)
    assert (workplace / "final/model.safetensors").read_bytes() == (
        workplace / PPO.with_name("ppo-3") / "model.safetensors"
    ).read_bytes()
    assert "AutoModelForCausalLM" in newest["loads_with"]
    (workplace / "other").mkdir()
    (workplace / "other/thing").write_text("mine")
    capsys.readouterr()
    assert_refused(capsys, workplace, ["--task", "train", *flags(final_dir="other")], "--final_dir other holds")


def test_the_sft_stage_comes_first_where_that_is_asked_for(t5_folder, plain, no_bars, capsys):
    """An encoder-decoder is taught the answers, then trained by PPO from there; a second run finds the stage done."""
    arguments = [*plain_flags(t5_folder), "--sft_first", "--sft_steps", "3", "--completion_column", "answer"]
    assert run(*["--task", "train", *arguments]) == 0
    output = capsys.readouterr().out
    assert "language model: held-out perplexity" in output and "/sft: " in output
    assert run(*["--task", "train", *arguments]) == 0
    assert "held-out perplexity" not in capsys.readouterr().out
