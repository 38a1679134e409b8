"""Mistakes in flags, settings, data and folders are refused in one sentence, before anything is made."""

import itertools
import json
from pathlib import Path

import pytest
from micro import SETTINGS, assert_refused, flags, run_main

import main
from config import first_line

pytest_plugins = ["micro"]

# ----------------------------------------------------------------------------------------------------------------
# Flags and files of settings
# ----------------------------------------------------------------------------------------------------------------

SAMPLING = "are for --task generate: training and its evaluation must score the very distribution they sample from"
MISTAKES = {
    "task": (["--task", "trian"], "did you mean train?"),
    "preset": (["--task", "train", "--preset", "tinny"], "did you mean tiny?"),
    "flag": (["--task", "train", "--clip_rang", "0.1"], "did you mean --clip_range?"),
    "abbreviated flag": (["--task", "train", "--clip_r", "0.1"], "unknown argument --clip_r"),
    "flag with =": (["--task", "train", "--n_update=3"], "did you mean --n_updates?"),
    "flag without value": (["--task", "train", "--seed"], "argument --seed: expected one argument"),
    "positional": (["train"], "unknown argument train; did you mean --task train?"),
    "choice": (["--task", "train", "--kl_estimator", "k11"], "did you mean k1?"),
    "reward output": (["--task", "train", "--reward_output", "logits"], "did you mean logit?"),
    "not a number": (["--task", "train", "--learning_rate", "fast"], "--learning_rate is 'fast', expected float"),
    "not whole": (["--task", "train", "--n_updates", "2.5"], "--n_updates is '2.5', expected int"),
    "nan": (["--task", "train", "--kl_coef", "nan"], "--kl_coef is nan, expected a value in [0, inf)"),
    "infinite": (["--task", "train", "--kl_coef", "inf"], "--kl_coef is inf, expected a value in [0, inf)"),
    "beyond float32": (["--task", "train", "--score_clip", "1e39"], "--score_clip is 1e+39, expected 3.4e+38 at most"),
    "a horizon that turns the price of KL around": (
        ["--task", "train", "--batch_size", "64", "--kl_target", "6", "--kl_horizon", "12.8"],
        "--kl_horizon 12.8 would let one update of --batch_size 64 take all of kl_coef away; expected more than 12.8",
    ),
    "clip_range": (["--task", "train", "--clip_range", "0"], "--clip_range is 0.0, expected a value in (0, 1)"),
    "gamma": (["--task", "train", "--gamma", "1.5"], "--gamma is 1.5, expected a value in [0, 1]"),
    "lam": (["--task", "train", "--lam", "-0.1"], "--lam is -0.1, expected a value in [0, 1]"),
    "learning_rate": (["--task", "train", "--learning_rate", "0"], "--learning_rate is 0.0, expected a value in (0,"),
    "n_updates": (["--task", "train", "--n_updates", "0"], "--n_updates is 0, expected a value in [1, inf)"),
    "seed": (["--task", "train", "--seed", "-1"], "--seed is -1, expected a value in [0, 4294967296)"),
    "mini-batch": (["--task", "train", "--batch_size", "64", "--mini_batch_size", "15"], "nearest that does is 16"),
    "batch of a prime": (
        ["--task", "train", "--batch_size", "999983", "--mini_batch_size", "32"],
        "does not divide --batch_size 999983; the nearest that does is 1 rows",
    ),
    "batch beyond all": (
        ["--task", "train", "--batch_size", "1000000001"],
        "--batch_size is 1000000001, expected a value in [1, 1000000]",
    ),
    "more than 64 bits": (["--task", "train", "--n_updates", "9" * 400], "--n_updates is '9999"),
    "long name": (
        ["--task", "train", "--output_dir", f"runs/{'é' * 128}"],
        "can name no file: expected 255 bytes at most between slashes, of which none is NUL, found 256",
    ),
    "long name of data": (["--task", "train", "--dataset_path", "a" * 252 + ".csv"], "--dataset_path 'aaa"),
    "long name of a run": (
        ["--task", "train", "--dataset_path", "b" * 200 + ".csv", "--run_name", "{dataset}" + "a" * 100],
        "slashes, of which none is NUL, found 300",
    ),
    "version": (["--vresion"], "did you mean --version?"),
    "accumulation": (
        ["--task", "train", "--batch_size", "8", "--mini_batch_size", "2", "--gradient_accumulation_steps", "3"],
        "--mini_batch_size 2 x --gradient_accumulation_steps 3 does not divide --batch_size 8",
    ),
    "whitened and normalised": (
        ["--task", "train", "--whiten_scores", "--normalize_scores"],
        "--whiten_scores undoes --normalize_scores",
    ),
    "critic of no encoder": (
        ["--task", "train", "--critic", "encoder"],
        "--critic encoder is for encoder-decoders; the model made here is none",
    ),
    "chat of no template": (
        ["--task", "train", "--chat"],
        "the tokenizer made here has no template for them; expected a --base_model_name of chat",
    ),
    "no text of a length": (
        ["--task", "train", "--min_prompt_chars", "1000000"],
        "holds no text of --min_prompt_chars to --max_prompt_chars letters in train",
    ),
    "heads": (["--task", "train", "--n_embd", "16", "--n_head", "3"], "--n_head 3 does not divide --n_embd 16"),
    "dtype": (["--task", "train", "--dtype", "bfloat16"], "--dtype bfloat16 would round most of Adam's small steps"),
    "top_k": (["--task", "train", "--top_k", "50"], SAMPLING),
    "top_p": (["--task", "train", "--top_p", "0.9"], SAMPLING),
    "min_new_tokens": (["--task", "train", "--min_new_tokens", "5"], SAMPLING),
    "greedy": (["--task", "train", "--temperature", "0"], SAMPLING),
    "weights": (["--task", "train", "--reward_weights", "reward_model=much"], "is 'reward_model=much', expected name="),
    "weight of no term": (["--task", "train", "--reward_weights", "reward_modle=1"], "did you mean reward_model?"),
    "weight of no function": (["--task", "train", "--reward_weights", "reward_fn=1"], "needs --reward_fn FILE.py:NAME"),
    "no length range": (["--task", "train", "--reward_weights", "length=1"], "--length_range is '', expected LOW,HIGH"),
    "length range": (["--task", "train", "--length_range", "9,4"], "--length_range is '9,4', expected LOW,HIGH"),
    "device": (["--task", "train", "--device", "abacus"], "--device abacus cannot be used here; expected auto"),
    "no file of a function": (["--task", "train", "--reward_fn", "nowhere.py:reward"], "with an existing file"),
    "no name of a function": (
        ["--task", "train", "--reward_fn", "reward"],
        "--reward_fn reward: expected FILE.py:NAME",
    ),
    "no run to generate from": (["--task", "generate", "--prompt", "The film"], "saved_models/ holds no trained run"),
    "no run to evaluate": (["--task", "evaluate"], "saved_models/ holds no trained run; run `python main.py --task t"),
    "no run to plot": (["--task", "plot", "--output_dir", "elsewhere"], "--output_dir elsewhere holds no trained run"),
    "no config file": (
        ["--task", "train", "--config", "nowhere.yaml"],
        "--config nowhere.yaml cannot be read: [Errno 2]",
    ),
    "a name of two lines": (
        ["--task", "train", "--reward_model_path", "a\nb"],
        r"--reward_model_path a\nb is no folder",
    ),
    "no dataset file": (["--task", "train", "--dataset_path", "nowhere.csv"], "nowhere.csv does not exist"),
    "no dataset folder": (["--task", "train", "--dataset_path", "nowhere/at/all"], "nowhere/at/all cannot be loaded: "),
    "no base model": (["--task", "train", "--base_model_name", "nowhere/at/all"], "nowhere/at/all is no folder"),
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
        ("clip_range: 0", "--clip_range is 0.0, expected a value in (0, 1)"),
        ("clip_range: wide", "--clip_range is 'wide', expected float"),
        ("whiten_scores: perhaps", "--whiten_scores is 'perhaps', expected bool"),
        ("seed: [1, 2]", "--seed is ['1', '2'], expected int"),
        ("- clip_range", "holds a list"),
        ("clip_range: [0.1", "run.yaml cannot be read: while parsing"),
        ("3: 4", "unknown field '3'"),
    ],
)
def test_a_bad_config_file_is_refused(text, words, empty, capsys):
    (empty / "run.yaml").write_text(text)
    assert_refused(capsys, empty, ["--task", "train", "--config", "run.yaml", *flags()], words)


LETTERS = "bcdefghijklmnopqrst"
BOMB = "b: &b [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in itertools.pairwise(LETTERS))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("deep.yaml", "seed: " + "[" * 2000 + "]" * 2000),
        ("deep.json", '{"seed": ' + '{"a":' * 2000 + "1" + "}" * 2000 + "}"),
        ("bomb.yaml", "seed: [" + "[" * 50 + "]" * 50 + "]"),
        ("aliases.yaml", BOMB + "seed: *t\n"),
    ],
)
def test_a_config_file_of_any_depth_is_refused_in_a_short_sentence(name, text, empty, capsys):
    (empty / name).write_text(text)
    assert main.main(["--task", "train", "--config", name]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1 and len(message) < 400


@pytest.mark.parametrize("content", ["[1, 2]", "3", "null", '"text"', "[" * 100_000, ""])
@pytest.mark.parametrize("task", ["generate", "evaluate", "plot", "explain"])
def test_a_runs_settings_that_are_no_object_are_refused(task, content, workplace, capsys):
    (workplace / "saved_models/tiny/ppo/run_config.json").write_text(content)
    flags = ["--prompt", "A"] if task == "generate" else []
    assert_refused(capsys, workplace, ["--task", task, *flags], "run_config.json cannot be read: ")


@pytest.mark.parametrize("content", ['{"splits": {}}', '{"splits": []}', "{}", "[]", '{"splits": {"test": {}}}', "3"])
def test_a_comparison_that_is_damaged_is_refused(content, workplace, capsys):
    """In `--task plot`, where it is drawn beside the run's own curves."""
    results = workplace / "saved_models/tiny/ppo/results"
    results.mkdir()
    (results / "comparison.json").write_text(content)
    assert_refused(capsys, workplace, ["--task", "plot"], "results holds no comparison.json of a run, or a damaged one")


def test_two_numbers_of_bits_at_once_are_refused(empty, capsys):
    both = ["--task", "train", "--base_model_name", "x", "--lora_r", "2", "--load_in_8bit", "--load_in_4bit"]
    assert_refused(capsys, empty, both, "--load_in_8bit and --load_in_4bit were both given: choose one of them")


def test_a_template_with_a_width_is_refused_before_memory_is_asked_for(empty, capsys):
    wide = ["--task", "train", "--base_model_name", "x", "--prompt_template", "{text:1000000000}"]
    assert_refused(capsys, empty, wide, "expected columns' names in braces, and nothing else there")


def test_a_name_that_no_file_can_have_is_refused(empty, capsys):
    """In a file of settings it may hold a NUL."""
    (empty / "run.yaml").write_text('output_dir: "a\\0b"\n')
    words = "--output_dir 'a\\x00b' can name no file: expected 255 bytes at most between slashes, of which none is NUL"
    assert_refused(capsys, empty, ["--task", "train", "--config", "run.yaml"], words)


def test_a_config_file_that_is_no_text_is_refused(empty, capsys):
    (empty / "run.yaml").write_bytes(b"\xff\xfe\x00seed: 1")
    assert_refused(capsys, empty, ["--task", "train", "--config", "run.yaml"], "run.yaml cannot be read: 'utf-8'")
    (empty / "folder.yaml").mkdir()
    assert_refused(capsys, empty, ["--task", "train", "--config", "folder.yaml"], "folder.yaml cannot be read: [Errno")


def test_a_run_whose_settings_are_damaged_is_refused(workplace, capsys):
    settings = workplace / "saved_models/tiny/ppo/run_config.json"
    generate = ["--task", "generate", "--prompt", "The film"]
    settings.write_text('{"seed": ')
    assert_refused(capsys, workplace, generate, "run_config.json cannot be read: Expecting value: line 1")
    settings.unlink()
    assert_refused(capsys, workplace, generate, "run_config.json cannot be read: [Errno 2]")


# ----------------------------------------------------------------------------------------------------------------
# Data
# ----------------------------------------------------------------------------------------------------------------

DATA = {
    "broken.jsonl": ('{"text": "one"}\n{"text": \n', "broken.jsonl cannot be loaded: line 2 is no JSON: Expecting"),
    "broken.parquet": ("no parquet", "broken.parquet cannot be loaded: Parquet magic bytes not found"),
    "empty.csv": ("", "empty.csv is empty, expected rows"),
    "empty.jsonl": ("", "empty.jsonl is empty, expected rows"),
    "blank.csv": ("\n\n", "blank.csv cannot be loaded: No columns"),
    "header.csv": ("text,label\n", "header.csv holds no rows"),
    "none.json": ("[]", "none.json holds no rows"),
    "few.csv": ("text,label\nA film.,1\n", "few.csv has no rows for train"),
    "columns.csv": (
        "review,stars\n" + "A fine film.,4\n" * 40,
        "--prompt_column 'text' is no column of the data; it has review, stars",
    ),
    "numbers.csv": (
        "text,label\n" + "7,1\n" * 40,
        "--prompt_column 'text' holds a whole number in row 1, expected a text or list",
    ),
    "gaps.jsonl": (
        '{"text": "A film."}\n' * 39 + '{"text": null}\n',
        "--prompt_column 'text' holds a null in row 40, expected a text or list",
    ),
}


@pytest.fixture
def trained_models(chain) -> list:
    """The chain's models, named as a user names models from elsewhere."""
    here = chain.root / "saved_models/tiny"
    return ["--base_model_name", here / "sft", "--reward_model_path", here / "reward"]


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("stages", ["trained", "untrained"])
def test_bad_data_is_refused(stages, name, trained_models, empty, capsys, caplog):
    """Beside models from elsewhere, and before any stage is trained on it; the library adds no words of its own."""
    content, words = DATA[name]
    (empty / name).write_text(content)
    arguments = ["--task", "train", "--dataset_path", name, *flags(), *(trained_models if stages == "trained" else [])]
    assert_refused(capsys, empty, arguments, words)
    assert [record.message for record in caplog.records if record.name.startswith("datasets")] == []


def test_data_without_any_text_is_refused(trained_models, empty, capsys):
    (empty / "blank.jsonl").write_text('{"text": ""}\n' * 40)
    arguments = ["--task", "train", "--dataset_path", "blank.jsonl", *flags(), *trained_models]
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


LATE = {  # what only PPO would meet, behind a language model that is to be fine-tuned first
    "critic": (["--critic", "encoder", "--lam", "1"], "saved_models/tiny/sft has no encoder: --critic separate"),
    "context": (
        ["--max_prompt_length", "500", "--max_new_tokens", "46"],
        "the model can read 2 at most: let prompts be cut",
    ),
    "held out": (["--eval_every", "1", "--prompt_column", "hole"], "in row 1 holds no message to answer: []"),
}


@pytest.mark.parametrize("mistake", LATE)
def test_what_ppo_cannot_do_is_refused_before_the_stage_before_it(mistake, workplace, capsys):
    arguments, words = LATE[mistake]
    rows = [{"text": f"A film {n}.", "hole": []} for n in range(40)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("r.py").write_text("def reward(prompts, responses, rows):\n    return [1.0 for _ in responses]\n")
    first = ["--run_name", "new", "--sft_first", "--completion_column", "text", "--dataset_path", "rows.jsonl"]
    first += ["--base_model_name", "saved_models/tiny/sft", "--reward_fn", "r.py:reward", "--max_prompt_length", "12"]
    assert_refused(capsys, workplace, ["--task", "train", *flags(), *first, *arguments], words)


def test_long_prompts_are_cut_and_counted(workplace, capsys):
    assert run_main("--task", "train", "--dry_run", *LONG, *flags()) == 0
    assert "8 of 8 prompts were cut on the left to 5 tokens" in capsys.readouterr().out


def test_prompt_and_response_beyond_the_context_are_refused(workplace, capsys):
    arguments = ["--task", "train", *flags(max_new_tokens=40)]
    assert_refused(capsys, workplace, arguments, "--max_prompt_length 12", "--max_new_tokens 40", "48 tokens")


def test_a_context_too_short_is_refused_before_the_stages_are_trained(empty, capsys):
    arguments = ["--task", "train", *flags(max_new_tokens=40)]
    assert_refused(capsys, empty, arguments, "--max_prompt_length 12", "--max_new_tokens 40", "48 tokens")


# ----------------------------------------------------------------------------------------------------------------
# Folders
# ----------------------------------------------------------------------------------------------------------------


def test_a_folder_that_holds_a_run_is_not_written_over(workplace, capsys):
    folder = "saved_models/tiny/ppo"
    assert_refused(capsys, workplace, ["--task", "train", "--output_dir", folder, *flags()], folder, "not empty")
    for stage in ("sft", "reward"):
        assert_refused(capsys, workplace, ["--task", stage, *flags()], f"saved_models/tiny/{stage} exists already")


@pytest.mark.parametrize("task", ["train", "sft", "reward"])
def test_a_folder_that_cannot_be_written_is_refused_before_training(task, workplace, capsys):
    (workplace / "file").write_text("no folder")
    arguments = ["--task", task, "--output_dir", "file/below", *flags()]
    assert_refused(capsys, workplace, arguments, "file/below cannot be written: ", "file is not a folder")


def test_no_sentence_can_steer_the_terminal(empty, capsys):
    """What was typed, what a file is called, what a user's function raises: one line, with escapes."""
    (empty / "rewards.py").write_text("raise ValueError('bad \\x1b[1A\\x9b2J\\u202e')")
    for given, shown in {
        "--\x1b[2J\r": r"unknown argument --\x1b[2J\r",
        "--config=\x1b]0;title\x07\nall is well": r"--config \x1b]0;title\x07\nall is well cannot be read",
        "--reward_fn=rewards.py:f": r"ValueError: bad \x1b[1A\x9b2J\u202e (rewards.py, line 1)",
    }.items():
        assert run_main("--task", "train", *flags(), given) == 2
        (message,) = capsys.readouterr().err.split("\n")[:-1]
        assert shown in message and message.isprintable(), message
    assert first_line(ValueError("bad \x1b[2J\nmore")) == r"bad \x1b[2J"  # of a library, where it is printed
