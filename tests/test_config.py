"""Settings: where a value comes from, what is refused, and that every field does something."""

import ast
import dataclasses
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import get_args

import pytest
import torch
from micro import SETTINGS, flags, micro_config, review_texts, run_main

import arguments as command_line
import classifier
import config
import evaluation
import folders
import main
import report
import run
import sft
import train
from arguments import coerce, parse_args
from config import PRESETS, Config, UsageError, divisors, to_json
from dataset import load_rows
from device import pick_device
from folders import new_ppo_folder, run_settings, stage_folder
from generate import respond
from loading import load_tokenizer
from prompts import Prompt, batch_arithmetic, load_prompts, n_rollouts
from randomness import uniforms
from reward import load_reward_terms, total_reward
from sft import new_language_model, new_tokenizer
from train import shuffled_steps

pytest_plugins = ["micro"]
FIELDS = {spec.name: spec for spec in dataclasses.fields(Config)}
CPU = torch.device("cpu")


def parse(*arguments) -> Config:
    return parse_args([str(argument) for argument in arguments], run_settings)


# ----------------------------------------------------------------------------------------------------------------
# Where a value comes from
# ----------------------------------------------------------------------------------------------------------------


def test_a_flag_beats_the_file_which_beats_the_preset_which_beats_the_default(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("preset: gpt2-imdb\nn_updates: 7\nlearning_rate: 1e-5\n")
    default = Config().n_updates
    assert parse("--base_model_name", "gpt2").n_updates == default
    assert parse("--preset", "gpt2-imdb").n_updates == PRESETS["gpt2-imdb"]["n_updates"] != default
    assert parse("--config", file).n_updates == 7
    assert parse("--config", file, "--n_updates", 8).n_updates == 8
    assert parse("--n_updates", 8, "--config", file).n_updates == 8
    from_file = parse("--config", file)
    assert (from_file.preset, from_file.max_prompt_length) == ("gpt2-imdb", PRESETS["gpt2-imdb"]["max_prompt_length"])
    assert from_file.learning_rate == 1e-5
    assert parse("--config", file, "--preset", "tiny").max_new_tokens == PRESETS["tiny"]["max_new_tokens"]


def test_the_tiny_preset_applies_only_where_no_preset_and_no_model_is_named():
    assert parse().preset == "tiny"
    assert {name: getattr(parse(), name) for name in PRESETS["tiny"]} == PRESETS["tiny"]
    named = parse("--base_model_name", "gpt2")
    assert named.preset == "" and named == Config(base_model_name="gpt2")
    both = parse("--preset", "tiny", "--base_model_name", "gpt2")
    assert (both.preset, both.n_updates) == ("tiny", PRESETS["tiny"]["n_updates"])


def test_a_preset_sets_fields_that_exist_to_values_that_are_allowed():
    for name, settings in PRESETS.items():
        assert set(settings) <= set(FIELDS)
        assert Config(preset=name, **settings) == parse("--preset", name)


def test_a_file_may_be_yaml_or_json(tmp_path):
    """PyYAML reads 1e-5 as text; numbers, truth values and lists come in either form."""
    (tmp_path / "a.yaml").write_text(
        "learning_rate: 1e-5\nn_updates: 1e2\nwhiten_scores: true\ndry_run: 'False'\nprompt: [A, B]\nseed: '3'\n"
    )
    (tmp_path / "b.json").write_text(
        json.dumps({"learning_rate": 1e-5, "n_updates": 100.0, "whiten_scores": True, "prompt": ["A", "B"], "seed": 3})
    )
    first = parse("--config", tmp_path / "a.yaml")
    second = parse("--config", tmp_path / "b.json")
    assert first == second
    assert (first.learning_rate, first.n_updates, first.seed) == (1e-5, 100, 3)
    assert (first.whiten_scores, first.dry_run, first.prompt) == (True, False, ("A", "B"))
    assert isinstance(first.n_updates, int)


def test_an_empty_value_in_a_file_is_no_text(tmp_path):
    """`base_model_name:` means that none is named, not a model of the name None."""
    (tmp_path / "a.yaml").write_text("base_model_name:\nreward_fn: null\n")
    parsed = parse("--config", tmp_path / "a.yaml")
    assert (parsed.base_model_name, parsed.reward_fn, parsed.preset) == ("", "", "tiny")


def test_whole_numbers_are_read_exactly_however_they_are_written():
    """A float would round the last of them."""
    written = {"1e3": 1000, "1_000": 1000, "7.0": 7, " 5 ": 5, "9007199254740993": 2**53 + 1}
    assert {text: parse(f"--min_prompt_chars={text}").min_prompt_chars for text in written} == written
    for text in ("nan", "inf", "1.5", "", "0x10", str(2**63)):
        with pytest.raises(UsageError, match=f"--min_prompt_chars is '{re.escape(text)}', expected int"):
            parse(f"--min_prompt_chars={text}")


def test_divisors_are_those_that_trying_all_finds():
    for n in (1, 2, 12, 36, 97, 360):
        assert divisors(n) == [d for d in range(1, n + 1) if n % d == 0]
    assert len(divisors(10**12)) == 169  # (12 + 1)^2, as 10^12 = 2^12 5^12


def test_the_longest_name_of_a_file_is_taken():
    longest = "é" * 127 + "a"
    assert parse("--output_dir", f"runs/{longest}/{longest}").output_dir.endswith(longest)


@pytest.mark.parametrize("word", ["no", "'no'", "No", "off"])
def test_a_file_says_no_as_a_flag_does(word, tmp_path):
    """YAML alone would make it false."""
    (tmp_path / "a.yaml").write_text(f"mixed_precision: no\nreward_label: {word}\nmerge: yes\nchat: off\nlora_r: 2")
    parsed = parse("--config", tmp_path / "a.yaml")
    assert (parsed.mixed_precision, parsed.reward_label) == ("no", word.strip("'"))
    assert (parsed.merge, parsed.chat) == (True, False)


def test_a_tilde_is_the_home_folder_wherever_a_file_may_be_named(monkeypatch, tmp_path):
    """A shell spells it out where it stands first in a word, not in a file of settings or behind NAME=."""
    monkeypatch.setenv("HOME", "/home/me")
    names = {
        "dataset_path": "~/data.jsonl",
        "base_model_name": "~/m",
        "reward_fn": "~/reward.py:good",
        "prompt": ["~/a"],
    }
    (tmp_path / "a.json").write_text(json.dumps(names))
    parsed = parse("--config", tmp_path / "a.json", "--output_dir=~/run", "--prompt_template", "~/{text}")
    assert (parsed.output_dir, parsed.base_model_name) == ("/home/me/run", "/home/me/m")
    assert (parsed.dataset_path, parsed.reward_fn) == ("/home/me/data.jsonl", "/home/me/reward.py:good")
    assert (parsed.prompt, parsed.prompt_template) == (("~/a",), "~/{text}")
    policies = parse("--policies", "~/a", "--policies", "b=~/c=d").policies
    assert policies == ("/home/me/a", "b=/home/me/c=d")


@pytest.mark.parametrize("text", ["base_model_name: [a, b]", "seed: true", "gamma: null", "whiten_scores: 2"])
def test_a_value_of_another_type_in_a_file_is_refused(text, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UsageError, match=f"--{text.split(':')[0]} is .*, expected "):
        parse("--config", tmp_path / "a.yaml")


def test_a_file_with_an_unknown_field_is_refused_with_the_nearest(tmp_path):
    (tmp_path / "a.json").write_text('{"clip_rang": 0.1}')
    with pytest.raises(UsageError, match=r"unknown field 'clip_rang'; did you mean clip_range\?"):
        parse("--config", tmp_path / "a.json")


def test_truth_values_have_two_flags():
    assert parse("--whiten_scores").whiten_scores and not parse("--no-whiten_scores").whiten_scores
    assert Config().whiten_advantages and not parse("--no-whiten_advantages").whiten_advantages


def test_a_prompt_may_be_given_several_times():
    assert parse("--prompt", "A film", "--prompt", "B").prompt == ("A film", "B")


def test_a_finished_run_lends_its_settings_to_what_uses_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "saved_models/tiny/ppo"
    folder.mkdir(parents=True)
    (folder / "value_head.safetensors").write_text("")
    (folder / "training_stats.jsonl").write_text("")
    (folder / "run_config.json").write_text(to_json(micro_config(kl_coef=0.3, temperature=0.7)))
    for task in ("generate", "evaluate", "plot", "explain"):
        used = parse("--task", task, "--max_new_tokens", 5)
        assert (used.task, used.kl_coef, used.temperature, used.max_new_tokens) == (task, 0.3, 0.7, 5)
        assert used.output_dir == "saved_models/tiny/ppo"
        assert used.n_layer == SETTINGS["n_layer"]
    assert parse("--task", "train").kl_coef == PRESETS["tiny"]["kl_coef"]


def test_a_file_may_hold_any_character_as_json_writes_it(tmp_path):
    """In two halves, where YAML alone would leave two; half a one names no file."""
    (tmp_path / "a.json").write_text(json.dumps({"prompt_template": "{text} \U0001f600", "prompt": ["\U0001f600"]}))
    assert "\\ud83d\\ude00" in (tmp_path / "a.json").read_text()
    read = parse("--config", tmp_path / "a.json")
    assert (read.prompt_template, read.prompt) == ("{text} \U0001f600", ("\U0001f600",))
    (tmp_path / "a.json").write_text('{"run_name": "\\ud83d"}')
    with pytest.raises(UsageError, match="holds half a character, and can name no file"):
        parse("--config", tmp_path / "a.json")


def test_saved_settings_read_back_as_they_were(tmp_path):
    (tmp_path / "a.json").write_text(to_json(micro_config(prompt=("A",), whiten_scores=True, learning_rate=3e-7)))
    assert parse("--config", tmp_path / "a.json") == micro_config(prompt=("A",), whiten_scores=True, learning_rate=3e-7)


# ----------------------------------------------------------------------------------------------------------------
# What is refused
# ----------------------------------------------------------------------------------------------------------------

BOUNDED = [name for name, spec in FIELDS.items() if spec.metadata["interval"]]


@pytest.mark.parametrize("name", BOUNDED)
def test_values_outside_a_fields_interval_are_refused_and_its_ends_are_not(name):
    """An end that belongs to the interval is allowed; one that does not, and what lies beyond, is named."""
    spec = FIELDS[name]
    interval = spec.metadata["interval"]
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    several = bool(get_args(spec.type))  # of which any may be outside
    step = 1 if int in (spec.type, *get_args(spec.type)) else 0.125
    outside = [low - step]
    inside = []
    if interval[0] == "(":
        outside.append(low)
        inside.append(low + step)
    else:
        inside.append(low)
    if interval[-1] == "]":
        inside.append(high)
        outside.append(high + step)
    elif high < float("inf"):
        outside += [high, high + step]
    for number in outside:
        value = coerce(spec, [high if math.isfinite(high) else low + step, number] if several else number)
        found = value[-1] if several else value
        with pytest.raises(UsageError, match=f"--{name} is {found}, expected a value in "):
            Config(task="generate", **{name: value})
    fitting = {"batch_size": 64, "mini_batch_size": 64, "n_embd": 64, "n_head": 1}  # whatever the field's value is
    if name in ("batch_size", "gradient_accumulation_steps"):
        fitting["mini_batch_size"] = 1
    for number in inside:
        settings = fitting | {name: coerce(spec, [number] if several else number)}
        assert getattr(Config(task="generate", **settings), name) == ((number,) if several else number)


@pytest.mark.parametrize("name", [name for name, spec in FIELDS.items() if spec.metadata["choices"]])
def test_choices_are_kept_to(name):
    choices = FIELDS[name].metadata["choices"]
    for choice in choices:
        assert getattr(Config(**{"task": "generate", "lam": 1.0, name: choice}), name) == choice
    with pytest.raises(UsageError, match=f"--{name} '{choices[-1]}x' is not one of .*; did you mean "):
        Config(**{name: choices[-1] + "x"})


def test_numbers_that_are_none_are_refused():
    for name, spec in FIELDS.items():
        if spec.type is float and spec.metadata["interval"]:
            with pytest.raises(UsageError, match=f"--{name} is nan"):
                Config(**{name: float("nan")})


def test_batches_that_do_not_divide_are_refused_with_the_nearest_that_does():
    with pytest.raises(UsageError, match="the nearest that does is 12 rows in all"):
        Config(batch_size=12, mini_batch_size=3, gradient_accumulation_steps=5)
    with pytest.raises(UsageError, match="the nearest that does is 4 rows in all"):
        Config(batch_size=8, mini_batch_size=5)
    assert Config(batch_size=12, mini_batch_size=3, gradient_accumulation_steps=4).batch_size == 12
    with pytest.raises(UsageError, match="the nearest that does is 8 rows in all"):
        Config(batch_size=8, mini_batch_size=16, gradient_accumulation_steps=2)


def test_a_rollout_with_fewer_rows_than_a_forward_pass_may_have_is_one_step():
    small = Config(batch_size=8, mini_batch_size=16, ppo_epochs=3, n_updates=5)
    assert [len(rows) for rows in shuffled_steps(8, small, update_number=0)] == [8, 8, 8]
    assert batch_arithmetic(small, 40).endswith(
        "epochs 3 x optimizer steps 1 x rows 8, at most 8 in a forward pass; optimizer steps in all: 15"
    )


def test_scores_are_whitened_or_normalised_and_not_both():
    """Whitening gives the same whatever shift and scale came before it."""
    with pytest.raises(UsageError, match="--whiten_scores undoes --normalize_scores"):
        Config(whiten_scores=True, normalize_scores=True)
    assert Config(whiten_scores=True).whiten_scores and Config(normalize_scores=True).normalize_scores


def test_training_samples_from_the_distribution_that_it_scores():
    for change in ({"top_k": 5}, {"top_p": 0.5}, {"min_new_tokens": 1}, {"temperature": 0.0}):
        with pytest.raises(UsageError, match="--task generate"):
            Config(task="train", **change)
        assert Config(task="generate", **change)
    assert Config(task="train", temperature=0.7)


def test_what_trains_is_in_float32_as_bfloat16_would_lose_most_steps():
    """Of weights as GPT-2's are drawn, with a deviation of .02, the share that a step of 1e-5 moves at all."""
    weights = 0.02 * torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    shares = [(rounded + 1e-5 != rounded).float().mean() for rounded in (weights.bfloat16(), weights)]
    assert shares == [pytest.approx(0.156, abs=0.002), 1.0]
    with pytest.raises(UsageError, match="--dtype bfloat16 would round most of Adam's small steps away"):
        Config(dtype="bfloat16")
    assert Config(dtype="bfloat16", lora_r=4).dtype == "bfloat16"  # the adapter is in float32
    assert Config(task="generate", dtype="bfloat16").dtype == "bfloat16"


def test_an_empty_stop_string_is_refused():
    """It would end every response before its first letter."""
    assert Config(task="generate", stop=("\n", "END")).stop == ("\n", "END")
    with pytest.raises(UsageError, match="--stop is empty, expected the text before which"):
        parse("--stop", "\n", "--stop", "")


def test_settings_cannot_be_changed_afterwards():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1


# ----------------------------------------------------------------------------------------------------------------
# Help
# ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_has_help(name):
    assert len(FIELDS[name].metadata["help"]) >= 8
    assert FIELDS[name].metadata["group"]


@pytest.fixture(scope="module")
def help_text(tmp_path_factory) -> str:
    """`--help` in a process of its own, which also tells whether it has imported torch."""
    code = (
        "import sys, main\n"
        "try: main.main(['--help'])\n"
        "except SystemExit as end: print('code', end.code)\n"
        "print('heavy', [name for name in ('torch', 'transformers', 'datasets', 'matplotlib') if name in sys.modules])"
    )
    environment = {"PYTHONPATH": str(Path(main.__file__).parent), "COLUMNS": "200", "PATH": ""}
    folder = tmp_path_factory.mktemp("help")
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.stderr == ""
    return done.stdout


def entry_of(name: str, help_text: str) -> str:
    """What the help says about a field, in one line."""
    return re.search(rf" --{name}[ ,].*?\(default .*?\)", " ".join(help_text.split()))[0]


def without_spaces(text: str) -> str:
    """The help breaks its lines at hyphens, too."""
    return "".join(text.split())


def test_help_does_not_wait_for_torch(help_text):
    assert help_text.endswith("code 0\nheavy []\n")


@pytest.mark.parametrize("name", FIELDS)
def test_help_lists_every_field_with_its_limits_and_default(name, help_text):
    spec = FIELDS[name]
    entry = entry_of(name, help_text)
    assert without_spaces(spec.metadata["help"]) in without_spaces(entry)
    assert spec.metadata["interval"] in entry
    for choice in spec.metadata["choices"]:
        assert choice in entry
    if spec.default or spec.default in ("", ()):
        assert f"(default {spec.default or 'none'})" in entry


def test_a_default_of_zero_or_false_is_shown_as_what_it_is(help_text):
    """`none` would leave open what a seed or a penalty is when it is not given."""
    for name, spec in FIELDS.items():
        if spec.type in (int, float, bool):
            assert f"(default {spec.default})" in entry_of(name, help_text)


# ----------------------------------------------------------------------------------------------------------------
# Every field does something
# ----------------------------------------------------------------------------------------------------------------


class Bench:
    """What a setting may change, each as something that can be compared; all of it in a folder of its own."""

    def __init__(self, folder: Path, stages: Path) -> None:
        self.folder = folder
        self.sft = str(stages / "sft")
        self.reward = str(stages / "reward")
        (folder / "reward.py").write_text(
            "def reward(prompts, responses, rows):\n    return [float(len(response)) for response in responses]\n"
        )
        rows = []
        for number, text in enumerate(review_texts()):
            rows.append({"text": text, "other": text[::-1], "worse": text[::2], "label": number % 2, "stars": 1})
        (folder / "data").mkdir()
        for name, part in (("train", rows[:150]), ("test", rows[150:])):
            lines = "".join(json.dumps(row) + "\n" for row in part)
            (folder / "data" / f"{name}.jsonl").write_text(lines)

    def base(self, config: Config) -> str:
        return config.base_model_name or self.sft

    def weights(self, config: Config) -> list:
        """The policy and its values after two updates."""
        torch.manual_seed(config.seed)
        policy, fixed, prompts = run.load_models(config, self.base(config), self.reward)
        config = dataclasses.replace(config, keep_checkpoints=0)
        folder = self.folder / f"run-{len(list(self.folder.glob('run-*')))}"
        began = run.what_it_began_with(fixed, config)
        run.run_updates(train.new_state(policy, config), fixed, prompts, config, folder, began)
        return [parameter.tolist() for parameter in policy.parameters()]

    def policy(self, config: Config) -> list:
        policy, _, _ = run.load_models(config, self.base(config), self.reward)
        first = next(policy.parameters())
        kinds = [parameter.dtype for parameter in policy.parameters()]
        return [first.dtype, policy.language_model.is_gradient_checkpointing, kinds]

    def reference(self, config: Config) -> list:
        _, fixed, _ = run.load_models(config, self.base(config), self.reward)
        return [parameter.dtype for parameter in fixed.reference.parameters()]

    def prompts(self, config: Config) -> list:
        """The held-out prompts, and those of training."""
        tokenizer = load_tokenizer(self.sft)
        held_out = load_prompts(config, tokenizer, config.eval_split, config.eval_samples)
        return [held_out, load_prompts(config, tokenizer, "train", 4)]

    def refusal(self, observe: Callable, config: Config):
        try:
            return observe(config)
        except UsageError as error:
            return str(error)

    def responses(self, config: Config) -> list[str]:
        policy, fixed, _ = run.load_models(dataclasses.replace(config, task="generate"), self.sft, self.reward)
        ids = [fixed.tokenizer("The film").input_ids] * 4
        random_numbers = uniforms(0, "generate", 0, (4, config.max_new_tokens))
        return respond(policy, fixed.tokenizer, ids, random_numbers, config).texts

    def rewards(self, config: Config) -> list:
        terms = load_reward_terms(config, config.reward_model_path or self.reward, CPU)
        _, values = total_reward(terms, ["The film"] * 2, [" is good.", " is bad."], [{}, {}], config)
        return [term.tolist() for term in values.values()]

    def language_model(self, config: Config) -> list:
        """Tokenizer, shape and first weights of a model that is trained from scratch."""
        torch.manual_seed(config.seed)
        texts = [row[config.prompt_column] for row in load_rows(config, "train")]
        tokenizer = new_tokenizer(texts, config.vocab_size, config.context_length)
        model = new_language_model(config, tokenizer)
        shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
        return [tokenizer.get_vocab(), shapes, model.config.n_head]

    def stage(self, run: Callable, name: str, config: Config) -> bytes:
        """The weights of a stage after its training."""
        torch.manual_seed(config.seed)
        number = len(list(self.folder.glob("stage-*")))
        config = dataclasses.replace(config, task=name, output_dir=str(self.folder / f"stage-{number}"))
        return (run(config) / "model.safetensors").read_bytes()

    def trained_reward(self, config: Config) -> bytes:
        return self.stage(partial(classifier.run_reward, base_model=self.sft), "reward", config)

    def trained_language_model(self, config: Config) -> bytes:
        return self.stage(sft.run_sft, "sft", config)


@pytest.fixture(scope="module")
def bench(chain, tmp_path_factory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"), chain.root / "saved_models/tiny")


@pytest.fixture(autouse=True)
def quick_measures(request, monkeypatch):
    """The stages' measures on held-out reviews are tested elsewhere."""
    if "bench" in request.fixturenames:
        monkeypatch.setattr(sft, "perplexity", lambda *_: 1.0)
        nothing = classifier.Predictions(certainty=torch.ones(2), is_right=torch.ones(2, dtype=torch.bool))
        monkeypatch.setattr(classifier, "held_out_predictions", lambda *_: (nothing, {"accuracy": 1.0}))
        monkeypatch.setattr(report, "write_logs", lambda *_: None)


def observed(name: str) -> Callable:
    return lambda bench, config: getattr(bench, name)(config)


WEIGHTS = observed("weights")
PROMPTS = observed("prompts")
RESPONSES = observed("responses")
REWARDS = observed("rewards")
POLICY = observed("policy")
MODEL = observed("language_model")
SFT = observed("trained_language_model")
REWARD = observed("trained_reward")
DATA = {"dataset_path": "DATA"}  # stands for the folder of the bench
MOVING = {"learning_rate": 0.03}  # far enough for the clips to bind
TWO_TERMS = {"reward_fn": "FUNCTION", "reward_weights": "reward_fn=1,reward_model=1"}

# field: the value that it is changed to, what shows it, and the settings without which it has nothing to do
EFFECTS = {
    "dtype": ("bfloat16", POLICY, {"task": "generate"}),
    "gradient_checkpointing": (True, POLICY, {}),
    "lora_r": (4, POLICY, {}),
    "lora_alpha": (99.0, WEIGHTS, {"lora_r": 4, "learning_rate": 0.01}),
    "load_in_8bit": (True, POLICY, {"lora_r": 4}),
    "reference_in_8bit": (True, lambda bench, config: bench.reference(config), {}),
    "reward_in_8bit": (True, REWARDS, {}),
    "critic": ("separate", WEIGHTS, {}),
    "prompt_template": ("See {text}", PROMPTS, {}),
    "min_prompt_chars": (120, PROMPTS, {}),
    "max_prompt_chars": (200, PROMPTS, {}),
    "epochs": (0.5, lambda bench, config: n_rollouts(config, 100), {}),
    "sft_epochs": (0.5, SFT, {}),
    "completion_column": ("other", SFT, DATA),
    "chosen_column": ("other", REWARD, DATA | {"rejected_column": "text"}),
    "rejected_column": ("other", REWARD, DATA | {"rejected_column": "worse", "chosen_column": "text"}),
    "seed": (1, WEIGHTS, {}),
    "base_model_name": ("REWARD", lambda bench, config: bench.base(config), {}),
    "dataset_path": ("DATA", PROMPTS, {}),
    "dataset_split": ("test", PROMPTS, DATA),
    "prompt_column": ("other", PROMPTS, DATA),
    "label_column": ("stars", lambda bench, config: bench.refusal(bench.trained_reward, config), DATA),
    "prompt_tokens": (2, PROMPTS, {}),
    "max_prompt_length": (2, PROMPTS, {}),
    "long_prompts": ("refuse", lambda b, c: b.refusal(b.prompts, c), {"prompt_tokens": 0}),
    "eval_samples": (3, PROMPTS, {}),
    "eval_split": ("test", PROMPTS, {"eval_split": "validation"}),
    "reward_model_path": ("nowhere", lambda bench, config: bench.refusal(bench.rewards, config), {}),
    "reward_label": ("NEGATIVE", REWARDS, {}),
    "reward_output": ("margin", REWARDS, {"reward_output": "logit"}),
    "reward_input": ("response", REWARDS, {}),
    "reward_fn": ("FUNCTION", REWARDS, {}),
    "reward_weights": ("reward_fn=1,reward_model=-3", WEIGHTS, TWO_TERMS),
    "length_range": ("3,9", REWARDS, {"reward_weights": "length=1", "length_range": "2,9"}),  # texts of two words
    "missing_eos_penalty": (7.0, WEIGHTS, {}),
    "whiten_scores": (True, WEIGHTS, {}),
    "normalize_scores": (True, WEIGHTS, {}),
    "score_clip": (0.01, WEIGHTS, {}),
    "max_new_tokens": (5, WEIGHTS, {}),
    "temperature": (0.5, WEIGHTS, {}),
    "top_k": (1, RESPONSES, {"task": "generate"}),
    "top_p": (0.01, RESPONSES, {"task": "generate"}),
    "min_new_tokens": (6, RESPONSES, {"task": "generate", "temperature": 40.0, "max_new_tokens": 30}),
    "n_updates": (3, WEIGHTS, {}),
    "batch_size": (6, WEIGHTS, {}),
    "mini_batch_size": (4, WEIGHTS, {}),
    "gradient_accumulation_steps": (2, WEIGHTS, {}),
    "ppo_epochs": (1, WEIGHTS, {}),
    "learning_rate": (1e-3, WEIGHTS, {}),
    "max_grad_norm": (1e-4, WEIGHTS, {}),
    "clip_range": (0.01, WEIGHTS, MOVING),
    "clip_range_value": (0.001, WEIGHTS, MOVING),
    "value_coef": (1.0, WEIGHTS, {}),
    "entropy_coef": (0.5, WEIGHTS, {}),
    "gamma": (0.5, WEIGHTS, {}),
    "lam": (0.1, WEIGHTS, {}),
    "whiten_advantages": (False, WEIGHTS, {}),
    "kl_coef": (2.0, WEIGHTS, {}),
    "kl_estimator": ("k3", WEIGHTS, MOVING),
    "kl_target": (1e-3, WEIGHTS, MOVING | {"n_updates": 3}),
    "kl_horizon": (10.0, WEIGHTS, MOVING | {"n_updates": 3, "kl_target": 1e-3}),
    "target_kl": (1e-7, WEIGHTS, MOVING),
    "vocab_size": (320, MODEL, {}),
    "context_length": (20, MODEL, {}),
    "n_layer": (2, MODEL, {}),
    "n_embd": (32, MODEL, {}),
    "n_head": (4, MODEL, {}),
    "n_reviews": (400, MODEL, {}),
    "sft_steps": (4, SFT, {}),
    "sft_batch_size": (5, SFT, {}),
    "sft_learning_rate": (1e-4, SFT, {}),
    "reward_steps": (4, REWARD, {}),
    "reward_batch_size": (5, REWARD, {}),
    "reward_learning_rate": (1e-4, REWARD, {}),
    "device": ("meta", lambda bench, config: bench.refusal(lambda c: pick_device(c.device), config), {}),
    "run_name": ("x", lambda bench, config: stage_folder(config, "sft"), {}),
    "output_dir": ("mine", lambda bench, config: new_ppo_folder(config), {}),
    "preset": ("peft-causal", lambda bench, config: stage_folder(config, "sft"), {}),
}
# Tested where they do their work: each of these decides what a whole command does.
ELSEWHERE = {
    "allow_pickle": "test_the_command_reads_a_pickle_where_that_is_asked_for_alone",
    "matmul_precision": "test_a_precision_that_is_asked_for_is_set",
    "static_cache": "test_with_a_static_cache_all_steps_have_the_same_shapes_and_draw_the_same",
    "mixed_precision": "test_mixed_precision_is_that_of_every_product_in_every_task",
    "peft_model_path": "test_the_reference_is_a_frozen_adapter_on_the_same_weights",
    "merge": "test_a_merged_policy_needs_no_peft",
    "load_in_4bit": "test_8_bits_without_an_adapter_are_refused",
    "eval_every": "test_the_best_policy_by_held_out_reward_is_kept_and_judged_on_other_prompts",
    "final_dir": "test_the_newest_policy_is_also_put_where_final_dir_says",
    "sft_first": "test_the_sft_stage_comes_first_where_that_is_asked_for",
    "task": "test_stages_run_alone_into_a_folder_of_their_own",
    "push_to_hub": "test_the_result_is_uploaded_as_it_is_into_a_private_repository",
    "log_with": "test_the_event_file_of_a_run_has_its_statistics_settings_and_samples",
    "dry_run": "test_a_dry_run_samples_and_leaves_nothing",
    "resume": "test_the_newest_interrupted_run_is_found_and_its_settings_are_kept",
    "save_every": "test_a_checkpoint_is_made_every_few_updates_and_after_the_last_and_the_newest_are_kept",
    "keep_checkpoints": "test_a_checkpoint_is_made_every_few_updates_and_after_the_last_and_the_newest_are_kept",
    "prompt": "test_generate_answers_each_prompt_and_repeats_itself",
    "prompts": "test_generate_reads_prompts_from_a_file_and_writes_json_lines",
    "update": "test_an_update_of_a_run_is_as_it_was",
    "row": "test_without_a_run_the_first_update_of_the_built_in_world_is_shown",
    "num_samples": "test_generate_draws_several_samples",
    "output": "test_generate_reads_prompts_from_a_file_and_writes_json_lines",
    "stop": "test_a_stop_string_ends_what_is_printed_written_and_rewarded",
    "without_reward": "test_responses_are_written_without_their_reward_on_request",
    "policies": "test_evaluate_compares_any_number_of_policies",
    "chat": "test_a_policy_of_chat_is_asked_as_it_was_trained",
    "system": "test_a_systems_text_is_asked_as_it_was_trained",
    "dataset_config": "test_one_of_several_configurations_is_named",
    "reference_column": "test_evaluate_reports_rouge_and_values_on_both_splits",
}


def functions_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_field_is_in_one_of_the_tables_and_every_test_named_there_exists():
    assert set(EFFECTS) | set(ELSEWHERE) == set(FIELDS)
    assert set(EFFECTS).isdisjoint(ELSEWHERE)
    tests = set().union(*(functions_of(path) for path in Path(__file__).parent.glob("test_*.py")))
    assert set(ELSEWHERE.values()) <= tests


BASELINES: dict = {}


def show(bench: Bench, observe: Callable, settings: dict):
    torch.set_float32_matmul_precision("highest")  # not as a run before this one has left it, nor the next line
    torch.backends.cuda.enable_flash_sdp(True)
    paths = {"DATA": bench.folder / "data", "FUNCTION": f"{bench.folder / 'reward.py'}:reward", "REWARD": bench.reward}
    filled = {name: str(paths[value]) if value in paths else value for name, value in settings.items()}
    return observe(bench, micro_config(**filled))


@pytest.mark.parametrize("name", EFFECTS)
def test_every_field_changes_something(name, bench):
    value, observe, needed = EFFECTS[name]
    key = (observe, tuple(needed.items()))
    if key not in BASELINES:
        BASELINES[key] = show(bench, observe, needed)
    assert show(bench, observe, needed | {name: value}) != BASELINES[key]


def test_without_a_change_nothing_changes(bench):
    """So that the table above shows the settings, and not noise."""
    for observe in (WEIGHTS, PROMPTS, REWARDS, POLICY, MODEL, SFT, REWARD):
        first = BASELINES.get((observe, ())) or show(bench, observe, {})
        assert show(bench, observe, {}) == first


# ----------------------------------------------------------------------------------------------------------------
# Every field is read
# ----------------------------------------------------------------------------------------------------------------

# Where fields are read by getattr(config, name) and the names are texts in the same function. folders.TRAINED_ON and
# its like are not among these: what is only compared with an earlier run's changes nothing.
BY_NAME = {"sampling_options"}


def parameters_of(function: ast.FunctionDef | ast.Lambda) -> list[ast.arg]:
    return [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]


class Reads(ast.NodeVisitor):
    """Collects the attributes that a module reads of a Config: of a parameter that is annotated so.

    The like attribute of anything else, as of a model's configuration, is none, nor is the name in a text.
    """

    def __init__(self) -> None:
        self.found: set[str] = set()
        self.configs: set[str] = set()  # the parameters in sight that are a Config

    def visit_FunctionDef(self, function: ast.FunctionDef | ast.Lambda) -> None:
        outside = self.configs
        for parameter in parameters_of(function):
            is_config = isinstance(parameter.annotation, ast.Name) and parameter.annotation.id == "Config"
            self.configs = self.configs | {parameter.arg} if is_config else self.configs - {parameter.arg}
        if getattr(function, "name", "") in BY_NAME:
            texts = [node.value for node in ast.walk(function) if isinstance(node, ast.Constant)]
            self.found.update(text for text in texts if text in FIELDS)
        self.generic_visit(function)
        self.configs = outside

    visit_Lambda = visit_FunctionDef

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Load) and isinstance(node.value, ast.Name) and node.value.id in self.configs:
            self.found.add(node.attr)
        self.generic_visit(node)

    def visit_Call(self, call: ast.Call) -> None:
        if isinstance(call.func, ast.Name) and call.func.id == "getattr":
            owner, name = call.args[:2]
            if isinstance(owner, ast.Name) and owner.id in self.configs and isinstance(name, ast.Constant):
                self.found.add(name.value)
        self.generic_visit(call)


def properties_of_config(source: str) -> dict[str, set[str]]:
    """The fields that each property of class Config reads. Checks do not count: to refuse a value is no use of it."""
    fields = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and any(ast.unparse(each) == "property" for each in node.decorator_list):
            reads = [part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)]
            fields[node.name] = set(reads) & set(FIELDS)
    return fields


def unread(fields, sources: dict[str, str]) -> list[str]:
    """The fields that no module reads, by itself or through a property that it reads."""
    reads = Reads()
    for name, source in sources.items():
        if name != "config.py":
            reads.visit(ast.parse(source))
    found = set(reads.found)
    for name, read in properties_of_config(sources["config.py"]).items():
        if name in reads.found:
            found |= read
    return [name for name in fields if name not in found]


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    """The text of every module."""
    return {path.name: path.read_text(encoding="utf-8") for path in Path(main.__file__).parent.glob("*.py")}


def test_no_field_is_without_a_reader(sources):
    assert unread(FIELDS, sources) == []


READS = """
def train(config: Config, other, spec):
    def step():
        return config.gamma
    return [step(), getattr(config, "lam"), other.kl_coef, spec.metadata["seed"], config.has_adapter]

def load(config: PretrainedConfig, critic):
    "This names config.top_k."
    return config.vocab_size, critic.config.n_head, lambda config: config.epochs

def sampling_options(config: Config):
    return {name: getattr(config, name) for name in ("top_p",)}

def write(config: Config):
    config.device = "cpu"
"""
CONFIG = """
class Config:
    def __post_init__(self):
        self.merge

    @property
    def has_adapter(self):
        return self.lora_r

    @property
    def that_nothing_reads(self):
        return self.stop
"""


def test_a_field_that_nothing_reads_is_found_whatever_has_the_same_name():
    read = ["gamma", "lam", "lora_r", "top_p"]
    not_read = ["kl_coef", "seed", "top_k", "vocab_size", "n_head", "epochs", "device", "merge", "stop", "no_field"]
    assert unread(read + not_read, {"train.py": READS, "config.py": CONFIG}) == not_read


@pytest.mark.parametrize("name", ["kl_target", "critic", "vocab_size", "reward_fn"])
def test_a_reader_that_is_taken_away_is_missed(name, sources):
    without = {file: re.sub(rf"\bconfig\.{name}\b", "config.seed", text) for file, text in sources.items()}
    assert unread(FIELDS, without) == [name]


def test_evaluation_reads_the_split_that_is_asked_for(monkeypatch, tokenizer):
    parts = []
    monkeypatch.setattr(evaluation, "load_tokenizer", lambda *_: tokenizer)
    policy = torch.nn.Identity()
    policy.is_encoder_decoder = False
    monkeypatch.setattr(evaluation, "load_policy", lambda *_: policy)
    monkeypatch.setattr(evaluation, "check_context", lambda *_: None)

    def load_prompts(config, tokenizer, part, limit):
        parts.append((part, limit))
        enough = config.eval_split == "both" and part == "validation"
        return [Prompt("A film", [2, 3], {})] * 2 if enough else []

    monkeypatch.setattr(evaluation, "load_prompts", load_prompts)
    for split, last in (("validation", "validation"), ("test", "test"), ("both", "test")):
        config = micro_config(task="evaluate", output_dir="x", eval_split=split)
        with pytest.raises(UsageError, match=f"{last} has 0 prompts"):
            evaluation.evaluate(config, "base", "reward")
    assert parts == [("validation", 4), ("test", 4), ("validation", 4), ("test", 4)]


def test_flags_of_the_tests_are_the_settings_of_the_tests():
    assert parse("--task", "train", *flags()) == micro_config()


# ----------------------------------------------------------------------------------------------------------------
# Which task reads what
# ----------------------------------------------------------------------------------------------------------------


def test_a_flag_that_the_task_does_not_read_is_named(capsys):
    command_line.parse_args(["--task", "train", "--learning_rate", "1e-3", "--policies", "a=b", "--num_samples", "2"])
    assert capsys.readouterr().err == "note: --task train does not read --policies, --num_samples\n"
    command_line.parse_args(["--task", "sft", "--learning_rate", "1e-3"])
    assert capsys.readouterr().err == "note: --task sft does not read --learning_rate\n"
    command_line.parse_args(["--task", "sft", "--kl_horizon", "3"])  # one note of it is enough
    assert capsys.readouterr().err == "note: --task sft does not read --kl_horizon\n"
    levers = "--lora_r 2 --load_in_8bit --dtype bfloat16 --mixed_precision bf16 --gradient_checkpointing"
    for task in ("train", "sft", "reward"):
        command_line.parse_args(["--task", task, "--base_model_name", "m", "--mini_batch_size", "1", *levers.split()])
        assert capsys.readouterr().err == ""
    command_line.parse_args(["--task", "reward", "--merge", "--gradient_accumulation_steps", "2"])
    assert capsys.readouterr().err == "note: --task reward does not read --merge, --gradient_accumulation_steps\n"
    command_line.parse_args(["--task", "train", "--learning_rate", "1e-3"])
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--reward_model_path r --reward_fn f.py:f", "--reward_model_path has no effect: no reward model is asked"),
        ("--reward_label 1 --reward_output logit --reward_weights length=1", "--reward_label, --reward_output have no"),
        ("--length_range 1,2", "--length_range has no effect: the length has no weight"),
        ("--merge", "--merge has no effect: there is no adapter"),
        ("--lora_alpha 3", "--lora_alpha has no effect: there is no new adapter"),
        ("--base_model_name b --peft_model_path p --lora_r 3", "--lora_r has no effect: the adapter of"),
        ("--kl_horizon 9", "--kl_horizon has no effect: --kl_coef is fixed"),
        ("--epochs 1 --n_updates 3", "--n_updates has no effect: --epochs says"),
        (
            "--base_model_name b --n_layer 3 --vocab_size 999",
            "--vocab_size, --n_layer have no effect: no model is made",
        ),
        ("--dataset_path d --n_reviews 100", "--n_reviews has no effect: the data are those of"),
        ("--rejected_column worse", "--rejected_column has no effect: there are no pairs"),
        ("--chosen_column better --label_column stars", "--label_column has no effect: the reward model is trained on"),
    ],
)
def test_a_flag_without_effect_is_said_and_no_other(given, said, capsys):
    command_line.parse_args(["--task", "train", *given.split()])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"note: {said}")


@pytest.mark.parametrize(
    "given",
    [
        "--reward_model_path r --reward_fn f.py:f --reward_weights reward_fn=1,reward_model=1",
        "--length_range 1,2 --reward_weights length=1,reward_model=1",
        "--merge --lora_r 2 --lora_alpha 3",
        "--merge --base_model_name ADAPTER --context_length 64",
        "--kl_horizon 90 --kl_target 3",
        "--n_layer 3 --n_reviews 100 --n_updates 3 --label_column stars",
        "--chosen_column better --rejected_column worse",
    ],
)
def test_a_flag_with_effect_is_not_remarked_on(given, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ADAPTER").mkdir()
    (tmp_path / "ADAPTER/adapter_config.json").write_text("{}")
    command_line.parse_args(["--task", "train", *given.split()])
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--task sft --lora_r 2 --merge", "--lora_r, --merge have no effect: the model made here is trained whole"),
        (
            "--task sft --base_model_name ADAPTER --lora_r 2",
            "--lora_r has no effect: what it starts from is an adapter",
        ),
        ("--task reward --base_model_name m --run_name x --lora_r 2", "--lora_r has no effect: what it starts from"),
        ("--task train --base_model_name m --run_name x --lora_r 2", "--lora_r has no effect: what it starts from"),
        ("--task sft --base_model_name m --run_name x --lora_r 2", ""),
        ("--task train --base_model_name m --run_name x --merge", ""),
    ],
)
def test_what_an_adapter_at_the_start_leaves_without_effect_is_said(given, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("ADAPTER", "saved_models/x/sft"):
        Path(folder).mkdir(parents=True)
        Path(folder, "adapter_config.json").write_text("{}")
    command_line.parse_args(given.split())
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == bool(said) and all(line.startswith(f"note: {said}") for line in lines)


def test_a_model_named_to_generate_is_said_to_be_that_of_the_run(capsys):
    command_line.parse_args(["--task", "generate", "--base_model_name", "gpt2"], lambda settings: {"output_dir": "run"})
    assert (
        capsys.readouterr().err
        == "note: --base_model_name has no effect: the model is that of the run (--output_dir)\n"
    )


def test_the_settings_that_may_be_idle_are_settings():
    named = [name for names in command_line.WITHOUT_EFFECT for name in names.split()]
    assert set(named) | set(config.PATHS.split()) <= set(FIELDS)


@pytest.mark.parametrize("temperature", ["1e-40", "0.0009"])
def test_a_temperature_that_leaves_float32_is_refused(temperature):
    for task in ("train", "generate"):
        with pytest.raises(UsageError, match=r"--temperature is .*, expected 0\.001 or more, or 0 for greedy choice"):
            Config(task=task, temperature=float(temperature))


def test_pairs_of_one_column_are_refused():
    with pytest.raises(UsageError, match="--chosen_column and --rejected_column are both answer: expected two columns"):
        parse("--chosen_column", "answer", "--rejected_column", "answer")


def test_the_table_of_readers_names_every_group_and_fields_there_are():
    assert set(command_line.READERS) == {spec.metadata["group"] for spec in FIELDS.values()}
    named = [name for names in command_line.SOME_READ.values() for name in names.split()]
    assert len(named) == len(set(named)) and set(named) <= set(FIELDS)


def test_what_a_task_reads_is_never_called_unread(workplace, monkeypatch, no_figures, no_bars):
    """The oracle is the run itself: every setting that a module other than config.py looks at, task by task."""
    reads: dict[str, set[str]] = {}
    real = object.__getattribute__

    def noting(self, name):
        frame = sys._getframe(1)
        is_ours = Path(frame.f_code.co_filename).parent == Path(config.__file__).parent
        if name in FIELDS and is_ours and not frame.f_code.co_filename.endswith("config.py"):
            reads.setdefault(real(self, "task"), set()).add(name)
        return real(self, name)

    monkeypatch.setattr(Config, "__getattribute__", noting)
    small = [part for name, value in SETTINGS.items() for part in (f"--{name}", str(value))]
    for task, arguments in (
        ("train", [*small, "--output_dir", "again"]),
        ("sft", [*small, "--output_dir", "other_sft"]),
        ("reward", [*small, "--output_dir", "other_reward"]),
        ("evaluate", []),
        ("generate", ["--prompt", "The film", "--output", "out.jsonl"]),
        ("plot", []),
    ):
        assert run_main("--task", task, *arguments) == 0
    # a stage is looked up with its folder's settings, and first words are switched off for generate by a setting
    looked_up = {*folders.TRAINED_ON, *folders.REWARD_COLUMNS, *folders.TRAINED_BY["sft"]}
    looked_up |= {*folders.TRAINED_BY["reward"], "prompt_tokens"}
    # and these are checked, or set up, before any stage
    checked = {"reward_fn", "reward_weights", "reward_model_path", "length_range", "mixed_precision"}
    checked |= {"max_prompt_length", "max_new_tokens"}
    for task, names in reads.items():
        called_unread = {name for name in names - looked_up - checked if not command_line.is_read(FIELDS[name], task)}
        assert not called_unread, (task, called_unread)
