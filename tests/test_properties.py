"""Whatever is asked, of whatever data and with whatever tokenizer: it works, or is refused in one sentence.

Examples are drawn by hypothesis, the same ones at every run: few by default, many with `-m slow`, which prints how many
were tried, refused and run.
"""

import contextlib
import dataclasses
import io
import json
import math
import os
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers import read_log, read_stats
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from micro import SCRATCH, flags, micro_config, review_texts, run_main
from safetensors.torch import load_file
from tiny_models import tiny_gpt2
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from arguments import is_read, parse_args
from classifier import check_labels, class_batches, pair_batches
from config import LARGEST_FLOAT, Config, UsageError
from dataset import load_rows
from prompts import check_prompts, load_prompts, with_prompt_column
from sft import language_examples

pytest_plugins = ["micro"]
os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = f"{SCRATCH}/hypothesis"
FEW, MANY = 30, 500


def examples(count: int):
    """So many, always the same, each as long as it takes; one that fails is made smaller only where few are tried."""
    phases = [Phase.generate, Phase.shrink] if count == FEW else [Phase.generate]
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        phases=phases,
        suppress_health_check=checks,
        report_multiple_bugs=False,
    )


AS_OFTEN = pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])


def told(capsys, name: str, counts: Counter) -> None:
    """Print what came of the examples, past pytest's capture."""
    with capsys.disabled():
        print(f"\n{name}: {counts['tried']} tried, {counts['refused']} refused, {counts['ran']} run", end=" ")


# ----------------------------------------------------------------------------------------------------------------
# Settings
# ----------------------------------------------------------------------------------------------------------------

PROMPTS = ["--dataset_path", "prompts.jsonl", "--max_prompt_length", "12", "--reward_fn", "r.py:reward"]
BASES = {  # flags that the settings drawn are added to
    "made before": [],
    "made here": ["--run_name", "new"],
    "causal": ["--base_model_name", "saved_models/tiny/sft", *PROMPTS],
    "encoder-decoder": ["--base_model_name", "t5", *PROMPTS],
    "adapter": ["--base_model_name", "saved_models/tiny/sft", "--lora_r", "2", *PROMPTS],
}
AT_MOST = {  # of settings whose end would take hours, or more memory than there is, what a test can take
    "n_updates": 3,
    "epochs": 0.2,
    "batch_size": 8,
    "mini_batch_size": 8,
    "gradient_accumulation_steps": 8,
    "ppo_epochs": 20,
    "n_layer": 20,
    "n_embd": 512,
    "n_head": 16,
    "n_reviews": 400,
    "sft_epochs": 1.0,
    "sft_steps": 4,
    "reward_steps": 4,
    "eval_samples": 40,
    "context_length": 20_000,
    "min_prompt_chars": 7,
    "learning_rate": 0.1,  # from here on numbers that overflow end a run
    "sft_learning_rate": 0.1,
    "reward_learning_rate": 0.1,
    "lora_alpha": 1e3,
    "missing_eos_penalty": 1e6,
    "value_coef": 1e6,
    "entropy_coef": 1e6,
    "kl_coef": 1e6,
}
SLOW = ("max_new_tokens", "n_layer", "n_embd", "ppo_epochs", "context_length")  # ends that take seconds, tried once
AT_LEAST = {"temperature": 1e-3}  # 0 is for `--task generate` alone
TEXTS = {  # of settings that are neither numbers nor choices: what may be asked, and what may not
    "run_name": ["a name", "{dataset}", "x" * 300, "a\nb"],
    "output_dir": ["out", "file/below", "\0"],
    "final_dir": ["final", "file", "saved_models"],
    "device": ["auto", "cpu", "cpu:0", "abacus", "a\nb"],
    "dataset_split": ["train", "dev", "a\nb"],
    "prompt_column": ["text", "question", "answer", "label", "messages", "a\nb"],
    "prompt_template": ["{text}", "Q {question}\n", "{", "{a\nb}", "{text:9}", "none"],
    "label_column": ["label", "text"],
    "completion_column": ["answer", "nothing"],
    "reward_label": ["", "0", "POSITIVE", "1\n2"],
    "reward_weights": [
        "reward_model=1",
        "repetition=-1",
        "reward_fn=2,repetition=-1",
        "length=1",
        "a\nb=1",
        "=",
        "x=nan",
    ],
    "length_range": ["0,9", "9,0", "1", "a\nb"],
    "base_model_name": ["saved_models/tiny/sft", "nowhere/at all", "file", "a\nb"],
    "reward_model_path": ["saved_models/tiny/reward", "saved_models/tiny/sft", "nowhere", "a\nb"],
    "reward_fn": ["r.py:reward", "r.py:nothing", "r.py", "a\nb.py:c"],
    "peft_model_path": ["nowhere", "saved_models/tiny/sft"],
    "dataset_path": ["prompts.jsonl", "nowhere.csv", "a\nb.csv", "file"],
    "dataset_config": ["", "other"],
    "preset": ["tiny", "distilgpt2-imdb", "peft-causal"],
}
READ = [spec for spec in dataclasses.fields(Config) if is_read(spec, "train") and spec.name != "task"]
BITS = ("load_in_8bit", "load_in_4bit", "reference_in_8bit", "reward_in_8bit")
FOR_GENERATE = ("top_k", "top_p", "min_new_tokens", "stop")  # refused in training, but for what leaves all as it is


def bounds(spec: dataclasses.Field) -> tuple:
    """The least and the greatest legal value, or what stands for one that cannot be tried."""
    interval = spec.metadata["interval"]
    low, high = (float(end) for end in interval[1:-1].split(","))
    if spec.type is int:
        low, high = int(low) + (interval[0] == "("), 2**40 if math.isinf(high) else int(high) - (interval[-1] == ")")
    else:
        low = math.nextafter(low, math.inf) if interval[0] == "(" else low
        high = LARGEST_FLOAT if math.isinf(high) else math.nextafter(high, -math.inf) if interval[-1] == ")" else high
    return AT_LEAST.get(spec.name, low), min(high, AT_MOST.get(spec.name, high))


def ends(spec: dataclasses.Field) -> list:
    """The extremes of a field: both ends of its interval, or all of its choices."""
    if spec.type is bool:
        return [False, True]
    if spec.metadata["interval"]:
        return list(dict.fromkeys(bounds(spec)))
    return [] if spec.name in TEXTS else list(spec.metadata["choices"])


def values(spec: dataclasses.Field) -> st.SearchStrategy:
    """Values of a field: mostly its extremes, some between them, few that are not legal."""
    extremes = st.sampled_from(TEXTS.get(spec.name) or ends(spec) or [""])
    if not spec.metadata["interval"] or spec.type is bool:
        return extremes
    low, high = bounds(spec)
    between = (
        st.integers(low, min(high, low + (2 if spec.name in SLOW else 20)))
        if spec.type is int
        else st.floats(low, min(high, low + 2))
    )
    beyond = st.sampled_from([-1, math.inf, math.nan, 1e39, 2**63, "x", 0.5])
    if spec.name in SLOW:
        extremes = between
    return st.integers(0, 9).flatmap(lambda tenth: beyond if tenth == 5 else between if tenth > 5 else extremes)


@st.composite
def asked(draw) -> tuple[str, dict]:
    """Which flags to begin with, and up to three settings beside them."""
    base = draw(st.sampled_from(list(BASES)))
    specs = draw(st.lists(st.sampled_from(READ), min_size=1, max_size=3, unique_by=lambda spec: spec.name))
    return base, {spec.name: draw(values(spec)) for spec in specs if spec.name not in BITS}


def as_flag(name: str, value) -> str:
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name}={value}"


def tree(folder: Path) -> dict[str, tuple]:
    """What is below a folder, with sizes and times: what was not touched is the same."""
    stats = {path: path.lstat() for path in folder.rglob("*") if "__pycache__" not in path.parts}
    return {str(path): (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items() if path.is_file()}


@pytest.fixture(scope="module")
def shop(chain, t5_folder, tmp_path_factory):
    """Models, prompts and a reward function, in a folder that is the current one for this module's first part."""
    folder = tmp_path_factory.mktemp("shop")
    shutil.copytree(chain.root / "saved_models", folder / "saved_models")
    shutil.copytree(t5_folder, folder / "t5")
    rows = [{"text": f"A film {n}", "question": f"Q{n}?", "answer": f"Yes {n}", "label": n % 2} for n in range(40)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "r.py").write_text("def reward(prompts, responses, rows):\n    return [len(r) for r in responses]\n")
    (folder / "file").write_text("no folder")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("run.plot_training", lambda folder, notice="": folder / "plots/training.png")
        patch.setattr("classifier.plot_reliability", lambda folder, *_, **__: folder / "plots/reliability.png")
        yield folder


@contextlib.contextmanager
def put_back(folder: Path):
    """Remove what the block leaves in the folder, and what it leaves set in the process."""
    precision, before = torch.get_float32_matmul_precision(), tree(folder)
    wrote = sys.dont_write_bytecode  # which a dry run sets
    try:
        yield before
    finally:
        sys.dont_write_bytecode = wrote
        torch.set_float32_matmul_precision(precision)
        torch.backends.cuda.enable_flash_sdp(True)
        for path in set(tree(folder)) - set(before):
            Path(path).unlink()
        for path in sorted(folder.rglob("*"), reverse=True):
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def run_quietly(arguments: list[str]) -> tuple[int, list[str]]:
    """Exit code and lines of errors of a command; a traceback is the test's own."""
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        code = run_main(*arguments)
    return code, errors.getvalue().split("\n")


def assert_is_a_refusal(code: int, errors: list[str]) -> None:
    """One line that begins with `error:` is the last, below notes and lines of progress."""
    *before, last, nothing = errors
    assert (code, nothing) in ((1, ""), (2, "")) and last.startswith("error: ") and len(last) < 800, errors
    assert not any(line.startswith("error: ") for line in before), errors
    if code == 2:
        assert all(line.startswith(("note: ", "language model: ", "reward model: ")) for line in before), errors


def assert_is_a_run(folder: Path) -> None:
    """A row for every update and for every response, numbers everywhere, and a policy of finite weights."""
    config = json.loads((folder / "run_config.json").read_text())
    stats = read_stats(folder)
    assert [row["step"] for row in stats] == list(range(config["n_updates"]))
    assert all(math.isfinite(row[name]) for row in stats for name in ("reward", "kl", "loss", "entropy"))
    assert len(read_log(folder)) == config["n_updates"] * config["batch_size"]
    for file in folder.glob("*.safetensors"):
        assert all(tensor.float().isfinite().all() for tensor in load_file(file).values()), file


def came_of(folder: Path, base: str, chosen: dict) -> str:
    """`ran` or `refused`: three updates of a minute model, unless other settings say how many, or a sentence."""
    place = chosen.get("output_dir") or "out"
    arguments = ["--task", "train", *flags(n_updates=3), *BASES[base], "--output_dir", place]
    with put_back(folder) as before:
        code, errors = run_quietly(arguments + [as_flag(name, value) for name, value in chosen.items()])
        after = tree(folder)
        if code == 0 and not chosen.get("dry_run"):
            assert_is_a_run(Path(place))
        elif code == 0:
            assert {name for name in set(after) - set(before) if "saved_models/new" not in name} == set()
        else:
            assert_is_a_refusal(code, errors)
        is_late = "prompts are longer than" in "".join(errors)  # by a tokenizer that had to be made to know it
        if code == 2 and not is_late:
            assert after == before, sorted(set(after) - set(before))
    return "ran" if code == 0 else "refused"


COMPANIONS = {  # what a setting needs beside it to have its say, and which flags to begin with
    "lora_r": ("causal", {}),
    "lora_alpha": ("adapter", {}),
    "dtype": ("adapter", {}),
    "merge": ("adapter", {}),
    "load_in_8bit": ("adapter", {}),
    "load_in_4bit": ("adapter", {}),
    "critic": ("encoder-decoder", {"lam": 1.0}),
    "chat": ("causal", {}),
    "max_new_tokens": ("encoder-decoder", {"n_updates": 1}),
    "max_prompt_length": ("causal", {}),
    "kl_horizon": ("causal", {"kl_target": 1.0, "batch_size": 4}),
    "batch_size": ("causal", {"mini_batch_size": 1}),
    "mini_batch_size": ("causal", {"batch_size": 8}),
    "gradient_accumulation_steps": ("causal", {"batch_size": 8, "mini_batch_size": 1}),
    "n_head": ("made here", {}),
    "n_embd": ("made here", {"n_head": 1}),
    "context_length": ("made here", {"max_prompt_length": 4, "max_new_tokens": 4}),
    "sft_first": ("causal", {"completion_column": "answer", "run_name": "new"}),
}
CANNOT_RUN = {  # extremes that no run of this kind can have, and why
    ("chat", True): "no tokenizer here has a template",
    ("resume", True): "there is nothing to go on with",
    ("log_with", "wandb"): "its package is not among the requirements",
    ("log_with", "trackio"): "likewise",
    ("log_with", "swanlab"): "likewise",
    ("top_p", math.nextafter(0, 1)): "for --task generate",
    ("top_k", 2**40): "for --task generate",
    ("min_new_tokens", 2**40): "for --task generate",
    ("kl_horizon", math.nextafter(0, 1)): "an update could take all of kl_coef away",
}


def directed(name: str, value) -> tuple[str, dict]:
    """A run that should have this extreme."""
    spec = next(spec for spec in READ if spec.name == name)
    base, beside = COMPANIONS.get(name, ("made here" if spec.metadata["group"] == "stages" else "causal", {}))
    return base, beside | {name: value}


@AS_OFTEN
def test_any_settings_run_or_are_refused_in_a_sentence(count, shop, capsys):
    """Half of them run at least; and among many, with those that are asked for it, every extreme of every setting."""
    counts, seen = Counter(), set()

    def tally(base: str, chosen: dict) -> str:
        result = came_of(shop, base, chosen)
        counts.update(["tried", result])
        if result == "ran":
            seen.update((name, value) for name, value in chosen.items())
        return result

    @examples(count)
    @given(asked())
    def each(example):
        tally(*example)

    each()
    assert counts["ran"] >= counts["tried"] / (2 if count == MANY else 3)
    if count == MANY:
        told(capsys, "settings", counts)
        extremes = {(spec.name, value) for spec in READ for value in ends(spec)} - CANNOT_RUN.keys()
        for name, value in sorted(extremes - seen, key=str):
            assert tally(*directed(name, value)) == "ran", (name, value)
        assert extremes <= seen
        told(capsys, f"with all {len(extremes)} extremes", counts)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def written(draw) -> dict:
    """What a file of settings may hold: values of a field's kind, or of any other."""
    specs = draw(st.lists(st.sampled_from(dataclasses.fields(Config)), min_size=1, max_size=2, unique_by=id))
    return {spec.name: draw(st.one_of(values(spec), values(spec), JSON_VALUES)) for spec in specs}


@AS_OFTEN
def test_any_value_of_any_field_in_a_file_is_a_setting_or_refused_in_a_sentence(count, tmp_path):
    """Of text, numbers, null, lists and objects, through the file of settings; what is taken is taken again as such."""
    path = tmp_path / "settings.json"
    counts = Counter()

    @examples(5 * count)
    @given(written())
    def each(chosen):
        path.write_text(json.dumps(chosen))
        with contextlib.redirect_stderr(io.StringIO()):
            try:
                config = parse_args(["--config", str(path)], run_settings=lambda settings: {})
            except UsageError as error:
                counts["refused"] += 1
                assert "\n" not in str(error) and 0 < len(str(error)) < 800
            else:
                counts["taken"] += 1
                assert Config(**dataclasses.asdict(config)) == config

    each()
    assert min(counts["refused"], counts["taken"]) > count, counts


# ----------------------------------------------------------------------------------------------------------------
# Rows
# ----------------------------------------------------------------------------------------------------------------

NASTY = {  # values that may stand where a text is due
    "empty": "",
    "blank": " \n\t ",
    "long": "word " * 3000,
    "emoji": "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "right to left": "\u05e9\u05dc\u05d5\u05dd \u202eabc",
    "NUL": "a\0b",
    "half a character": "a\ud800",
    "separators": "a\u2028b\x0bc\x85d",
    "a date": "2020-01-01T00:00:00",
    "a number in quotes": "007",
    "null in quotes": "null",
    "an end": "<|endoftext|>",
    "null": None,
    "number": 7,
    "fraction": 1.5,
    "no number": math.nan,
    "64 bits": 2**63 - 1,
    "truth": True,
    "list": ["a"],
    "no list": [],
    "nested": [[1, [2]]],
    "object": {"a": {"b": 1}},
    "messages": [{"role": "user", "content": "hi"}],
    "answered": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}],
    "answer alone": [{"role": "assistant", "content": "ho"}],
    "message of null": [{"role": "user", "content": None}],
}
READERS = {  # what reads a column, and by what flag it is named
    "prompt": ("text", "prompt_column"),
    "template": ("text", "prompt_template"),
    "chat": ("text", "prompt_column"),
    "sft": ("text", "prompt_column"),
    "completion": ("answer", "completion_column"),
    "class": ("label", "label_column"),
    "chosen": ("answer", "chosen_column"),
    "rejected": ("other", "rejected_column"),
}
READER_SETTINGS = {
    "template": {"prompt_template": "Q: {text}"},
    "completion": {"completion_column": "answer"},
    "chosen": {"chosen_column": "answer", "rejected_column": "other"},
    "rejected": {"chosen_column": "answer", "rejected_column": "other"},
}
TEXT = st.one_of(st.sampled_from(list(NASTY.values())), st.text(max_size=20))


@st.composite
def files(draw) -> tuple[str, str, list[dict], set[int], bytes]:
    """A reader, the file's ending, its rows, the numbers of those whose value was drawn, and the file's bytes."""
    reader = draw(st.sampled_from(list(READERS)))
    column, _ = READERS[reader]
    rows = [{"text": f"A film {n}", "answer": f"Yes {n}", "other": "No", "label": n % 2} for n in range(40)]
    value, is_missing = draw(TEXT), draw(st.integers(0, 9)) == 5
    places = draw(st.sets(st.integers(1, 40), min_size=1, max_size=20))
    for number in places:
        rows[number - 1][column] = value
        if is_missing:
            del rows[number - 1][column]
    ending = draw(st.sampled_from([".jsonl", ".json"]))
    lines = [json.dumps(row, ensure_ascii=draw(st.booleans()) or value == NASTY["half a character"]) for row in rows]
    newline = draw(st.sampled_from(["\n", "\r\n"]))
    text = newline.join(lines) if ending == ".jsonl" else f"[{f',{newline}'.join(lines)}]"
    return reader, ending, rows, places, draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + text.encode()


class Tools(NamedTuple):
    """What reads rows: tokenizers without a template of chat and with one, and a model."""

    plain: PreTrainedTokenizerFast
    chat: PreTrainedTokenizerFast
    model: GPT2LMHeadModel


@pytest.fixture(scope="module")
def tools(tokenizer) -> Tools:
    chat = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **tokenizer.special_tokens_map)
    chat.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}A:"
    return Tools(plain=tokenizer, chat=chat, model=tiny_gpt2(vocab_size=len(tokenizer)))


def read(reader: str, path: Path, tools: Tools) -> list:
    """What the reader makes of the rows to train on, as a task would."""
    settings = {"dataset_path": str(path), "prompt_tokens": 0, "max_prompt_length": 30, "base_model_name": "x"}
    config = with_prompt_column(micro_config(**settings | READER_SETTINGS.get(reader, {})))
    rows = [row for part in ("train", "validation", "test") for row in load_rows(config, part)]
    device = torch.device("cpu")
    check_prompts(rows, config)
    if reader in ("prompt", "template", "chat"):
        tokenizer = tools.chat if reader == "chat" else tools.plain
        return [
            prompt for part in ("train", "validation", "test") for prompt in load_prompts(config, tokenizer, part, 40)
        ]
    if reader in ("sft", "completion"):
        return language_examples(rows, config, tools.plain, tools.model)
    check_labels(rows, rows, config)
    batches = class_batches if reader == "class" else pair_batches
    return [next(batches(rows, config, tools.plain, 30, device))]


def is_readable(reader: str, value, rows: list[dict]) -> bool:
    """Whether a value, by what is promised, can stand in the reader's column."""
    if value == NASTY["half a character"]:
        return False
    if reader == "class":
        return value in (0, 1) and isinstance(value, int)
    if reader == "template":
        return value is not None and value == value and not isinstance(value, list)
    is_talk = isinstance(value, list) and len(value) > 0 and all(isinstance(each, dict) for each in value)
    is_talk = is_talk and all(isinstance(each["content"], str) for each in value) and value[0]["role"] == "user"
    return isinstance(value, str) or (reader == "chat" and is_talk)


@AS_OFTEN
def test_any_rows_are_read_as_they_are_or_refused_by_row_and_column(count, tools, tmp_path, capsys):
    """In JSON, with and without a mark at the beginning, Windows' line ends and escapes."""
    counts = Counter()

    @examples(count)
    @given(files())
    def each(example):
        reader, ending, rows, places, content = example
        path = tmp_path / f"rows{counts['tried']}{ending}"
        path.write_bytes(content)
        column, _ = READERS[reader]
        counts["tried"] += 1
        value = rows[min(places) - 1].get(column)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                found = read(reader, path, tools)
        except UsageError as error:
            counts["refused"] += 1
            assert not is_readable(reader, value, rows), (value, str(error))
            assert "\n" not in str(error) and repr(column) in str(error), str(error)
            assert reader == "class" or f"row {min(places)}" in str(error), (min(places), str(error))
        else:
            counts["ran"] += 1
            assert is_readable(reader, value, rows), value
            assert found
            if reader == "prompt":
                texts = {row["text"] for row in rows}
                assert {prompt.text for prompt in found} <= texts and all(prompt.ids for prompt in found)

    each()
    told(capsys, "rows", counts)
    assert min(counts["ran"], counts["refused"]) > count / 5, counts


# ----------------------------------------------------------------------------------------------------------------
# Tokenizers
# ----------------------------------------------------------------------------------------------------------------

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<turn>"]  # ids 0 to 4
FAMILIES = ("bytes", "pieces", "words")  # as of GPT-2, of SentencePiece, and of BERT before it had pieces
ENDS = {"none": None, "one": 2, "two": [2, 4], "of another": [2, 99_999]}  # generation_config.json's


class Kind(NamedTuple):
    """A tokenizer and its model."""

    family: str
    around: str  # what stands around a text
    pad: str
    eos: str
    ends: str
    added: str  # to the vocabulary: "", "embedded", "beyond" the model's embedding, or "idle": there, and special
    side: str
    is_encoder_decoder: bool


KINDS = st.builds(
    Kind,
    family=st.sampled_from(FAMILIES),
    around=st.sampled_from(["$A", "<s> $A", "$A </s>", "<s> $A </s>"]),
    pad=st.sampled_from(["", "<pad>", "</s>", "<unk>", "<s>"]),
    eos=st.sampled_from(["</s>", "</s>", "</s>", "<s>", "<pad>", ""]),
    ends=st.sampled_from(list(ENDS)),
    added=st.sampled_from(["", "", "embedded", "idle", "beyond"]),
    side=st.sampled_from(["left", "right"]),
    is_encoder_decoder=st.booleans(),
)


@pytest.fixture(scope="module")
def trained() -> dict[str, str]:
    """A tokenizer of each family, trained on reviews, as JSON."""
    found = {}
    for family in FAMILIES:
        if family == "bytes":
            tokenizer, trainer = Tokenizer(models.BPE()), trainers.BpeTrainer
            tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
            options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
        elif family == "pieces":
            tokenizer, trainer = Tokenizer(models.Unigram()), trainers.UnigramTrainer
            tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
            options = {"unk_token": "<unk>"}
        else:
            tokenizer, trainer = Tokenizer(models.WordLevel(unk_token="<unk>")), trainers.WordLevelTrainer
            tokenizer.pre_tokenizer, options = pre_tokenizers.Whitespace(), {}
        settings = {"vocab_size": 320, "special_tokens": SPECIAL, "show_progress": False}
        tokenizer.train_from_iterator(review_texts(), trainer(**settings | options))
        found[family] = tokenizer.to_str()
    return found


def save_kind(kind: Kind, trained: dict[str, str], folder: Path) -> None:
    """The tokenizer and a minute model of random weights."""
    fast = Tokenizer.from_str(trained[kind.family])
    ids = {token: number for number, token in enumerate(SPECIAL)}
    fast.post_processor = processors.TemplateProcessing(single=kind.around, special_tokens=list(ids.items()))
    named = {"pad_token": kind.pad, "eos_token": kind.eos, "bos_token": "<s>", "unk_token": "<unk>"}
    named = {role: token for role, token in named.items() if token}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, padding_side=kind.side, **named)
    n_embedded = len(tokenizer)
    if kind.added:
        tokenizer.add_tokens([AddedToken("qqfilm", special=kind.added == "idle")], special_tokens=kind.added == "idle")
    n_embedded = len(tokenizer) if kind.added == "embedded" else n_embedded
    torch.manual_seed(0)
    if kind.is_encoder_decoder:
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
        model = T5ForConditionalGeneration(T5Config(vocab_size=n_embedded, **sizes))
    else:
        model = GPT2LMHeadModel(GPT2Config(vocab_size=n_embedded, n_positions=48, n_embd=16, n_layer=1, n_head=2))
    model.generation_config.eos_token_id = ENDS[kind.ends]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def assert_responses_end(kind: Kind, folder: Path) -> None:
    """No text of a response holds a special token, and as many of them ended as the statistics say."""
    rows = read_log(folder)
    assert not any(token in row["response"] for row in rows for token in SPECIAL), kind
    assert all(row["query"].startswith("A qqfilm about a ") for row in rows)
    assert all(0 < row["response_length"] <= 12 and 0 <= row["ended"] <= 1 for row in read_stats(folder))


@AS_OFTEN
def test_any_tokenizer_trains_or_is_refused_in_a_sentence(count, shop, trained, tmp_path, capsys):
    """It is, exactly where no response could ever end, or a text may hold what the model does not embed."""
    rows = [{"text": f"A qqfilm about a {word}"} for word in ("film", "boy", "farmer", "ghost") for _ in range(10)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["--dataset_path", tmp_path / "rows.jsonl", "--reward_fn", "r.py:reward", "--max_prompt_length", 20]
    counts = Counter()

    @examples(count)
    @given(KINDS)
    def each(kind):
        counts["tried"] += 1
        model = tmp_path / str(counts["tried"])
        save_kind(kind, trained, model)
        with put_back(shop):
            code, errors = run_quietly(
                ["--task", "train", *flags(), "--base_model_name", model, "--output_dir", "out", *data]
            )
            counts["ran" if code == 0 else "refused"] += 1
            if code == 0:
                assert_is_a_run(Path("out"))
                assert_responses_end(kind, Path("out"))
            else:
                assert_is_a_refusal(code, errors)
            is_refused = not kind.eos or kind.added in ("beyond", "idle")
            assert (code == 2) == is_refused, (kind, errors)
        shutil.rmtree(model)

    each()
    told(capsys, "tokenizers", counts)
    assert counts["ran"] >= counts["tried"] / 4, counts
