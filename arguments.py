"""The command line: from flags, a file and a preset to a run's settings, and what is told of them.

A value comes from the first of these that names it: a flag, the `--config` file, the preset, the default in config.py.
"""

import argparse
import dataclasses
import os
import platform
import reprlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import get_args

import yaml

from config import (
    NO_UPDATE,
    PATHS,
    PRESETS,
    TASKS,
    USES_A_RUN,
    VERSION,
    Config,
    UsageError,
    check_value,
    first_line,
    nearest,
)
from progress import tell

READERS = {  # the tasks that read a group's settings, but for those of SOME_READ
    "task": TASKS,
    "model": ("train", "generate", "evaluate", "explain"),
    "data": ("train", "sft", "reward", "evaluate", "explain"),
    "reward": ("train", "generate", "evaluate", "explain"),
    "sampling": ("train", "generate", "evaluate", "explain"),
    "ppo": ("train", "explain"),
    "stages": ("train", "sft", "reward", "evaluate", "explain"),
    "evaluation": ("train", "evaluate"),
    "generate": ("generate",),
    "explain": ("explain",),
}
SOME_READ = {  # tasks: the settings that these alone read
    ("train",): "resume save_every keep_checkpoints final_dir log_with eval_every",
    ("train", "explain"): "reference_in_8bit sft_first missing_eos_penalty whiten_scores normalize_scores score_clip",
    ("train", "sft"): "merge",
    ("train", "sft", "reward"): "push_to_hub",
    ("train", "sft", "reward", "explain"): "lora_r lora_alpha",
    ("train", "sft", "reward", "generate", "evaluate", "explain"): "seed device matmul_precision base_model_name "
    "allow_pickle dtype mixed_precision load_in_8bit load_in_4bit prompt_column prompt_template chat system",
    ("train", "sft", "reward", "evaluate", "explain"): "peft_model_path mini_batch_size gradient_checkpointing",
    ("train", "sft", "evaluate", "explain"): "completion_column prompt_tokens max_prompt_length sft_epochs sft_steps "
    "sft_batch_size sft_learning_rate",
    ("train", "evaluate", "explain"): "min_prompt_chars max_prompt_chars",
    ("train", "reward", "evaluate", "explain"): "label_column",
    ("train", "reward", "explain"): "chosen_column rejected_column reward_steps reward_batch_size reward_learning_rate",
    ("train", "sft", "generate", "evaluate", "explain"): "max_new_tokens long_prompts",
    ("train", "generate", "evaluate", "explain"): "batch_size",
    ("generate", "explain"): "prompt prompts output",
    ("evaluate",): "reference_column eval_split",
    ("evaluate", "plot"): "policies",
}


MAY_CHANGE = (  # when a run is resumed
    "n_updates",
    "epochs",
    "save_every",
    "keep_checkpoints",
    "final_dir",
    "log_with",
    "push_to_hub",
    "allow_pickle",
    "device",
    "static_cache",
)
MAY_DIFFER = ("allow_pickle", "device", "static_cache")  # when an update of a run is looked at
OF_A_START = ("task", "resume", "output_dir", "dry_run")  # settings of one start of a run, rather than of the run


def as_texts(value) -> tuple[str, ...]:
    """One text, or a list of what can be text."""
    if isinstance(value, (dict, bool)):
        raise TypeError(value)
    if isinstance(value, str):
        return (whole_characters(value),)
    return tuple(whole_characters(str(item)) for item in value)


def whole_characters(text: str) -> str:
    """The text with two halves of a character, as JSON may write it, as one; the other half of a pair alone stays."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


def as_whole(value) -> int:
    """A whole number, also where it is written as 1e3 or 1000.0. Raises one of several errors where it is no such, or
    has more than 64 bits.
    """
    number = float(value)
    if number != int(number) or abs(number) >= 2**63:
        raise ValueError(value)
    with suppress(ValueError):
        return value if isinstance(value, int) else int(value)  # a float would round what is above 2^53
    return int(number)


def at_home(spec: dataclasses.Field, value):
    """A file's or folder's name with `~` spelled out, as a shell does where it stands before the name alone."""
    if spec.name in PATHS.split():
        return os.path.expanduser(value)
    if spec.name == "policies":  # NAME=~/FOLDER
        return tuple("=".join(map(os.path.expanduser, entry.split("=", 1))) for entry in value)
    return value


def converted(value, kind: type):
    """The value as text, number, truth value or tuple of texts. Raises one of several errors where it is no such."""
    if value is None:
        return {str: "", tuple: ()}[kind]
    if kind is tuple:
        return as_texts(value)
    if isinstance(value, (list, dict)) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(value)
    if kind is bool and not isinstance(value, bool):
        return {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}[str(value).lower()]
    if kind is str:
        return whole_characters(str(value))
    return as_whole(value) if kind is int else kind(value)


def coerce(spec: dataclasses.Field, value):
    """A file's or flag's value in the field's type: YAML reads 1e-5 as text. Raises UsageError where it cannot be."""
    item = next(iter(get_args(spec.type)), None)  # of a tuple
    kind = tuple if item else spec.type
    try:
        found = at_home(spec, converted(value, kind))
        return tuple(map(as_whole, found)) if item is int else found
    except (TypeError, ValueError, KeyError, OverflowError):
        expected = "whole numbers" if item is int else kind.__name__
        raise UsageError(f"--{spec.name} is {reprlib.repr(value)}, expected {expected}") from None


def read_config_file(path: str) -> dict:
    """The settings in a .yaml or .json file, all of them text as flags are: YAML alone would take `no` for false.

    Raises UsageError if it is missing, unreadable or no mapping.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
        settings = yaml.load(text, yaml.BaseLoader) or {}  # JSON is YAML
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UsageError(f"--config {path} cannot be read: {first_line(error)}") from None
    if not isinstance(settings, dict):
        raise UsageError(f"--config {path} holds a {type(settings).__name__}, expected field names and values")
    return {name: None if value in ("", "null", "Null", "NULL", "~") else value for name, value in settings.items()}


class Parser(argparse.ArgumentParser):
    """argparse whose errors are ours: one sentence."""

    def error(self, message: str):
        raise UsageError(message)


def help_of(spec: dataclasses.Field) -> str:
    """A field's line in --help: what it is, its choices or interval, its default."""
    parts = [spec.metadata["help"]]
    choices = " | ".join(choice for choice in spec.metadata["choices"] if choice)
    if choices:
        parts.append(f"[{choices}]")
    if spec.metadata["interval"]:
        parts.append(spec.metadata["interval"])
    default = "none" if spec.default in ("", ()) else spec.default
    parts.append(f"(default {default})")
    return " ".join(parts).replace("%", "%%")  # argparse fills in what stands behind a single one


def build_parser() -> argparse.ArgumentParser:
    """The command line: one flag a field, grouped, with help, default and interval."""
    parser = Parser(
        prog="main.py",
        usage=f"main.py [--task {{{','.join(TASKS)}}}] [--preset NAME] [--config FILE] [--field VALUE ...]",
        description="PPO for language models. Without a preset or model it trains tiny, a teaching demonstration with "
        "a small model made here, offline. Defaults below are those without a preset.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this and exit")
    parser.add_argument("--version", action="store_true", help="show this version, torch's and transformers'")
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON file of settings; flags override it")
    names = dict.fromkeys(spec.metadata["group"] for spec in dataclasses.fields(Config))
    groups = {name: parser.add_argument_group(name) for name in names}
    for spec in dataclasses.fields(Config):
        settings = {"help": help_of(spec)}
        if spec.type is bool:
            settings["action"] = argparse.BooleanOptionalAction
        elif get_args(spec.type):  # a tuple, to which every use of the flag adds
            settings["action"] = "append"
            settings["metavar"] = "TEXT" if get_args(spec.type)[0] is str else "INT"
        else:
            settings["metavar"] = spec.type.__name__.upper()
        groups[spec.metadata["group"]].add_argument(f"--{spec.name}", **settings)
    return parser


def versions() -> str:
    """This project's version, and those of what its numbers hang on; none of it is imported."""
    from importlib.metadata import version  # a twentieth of a second, for --version alone

    parts = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return f"ppo {VERSION} (Python {platform.python_version()}, {parts})"


def preset_settings(settings: dict) -> dict:
    """The preset's row of values; tiny's where neither a preset nor a model is named."""
    preset = settings.get("preset", "")
    if not preset and not settings.get("base_model_name"):
        preset = "tiny"
    return {"preset": preset} | PRESETS.get(preset, {})


def unknown_flag(flag: str, names) -> str:
    """What is told of a flag that there is not, with what may have been meant."""
    if flag in TASKS:
        return f"unknown argument {flag}; did you mean --task {flag}?"
    flags = [f"--{name}" for name in (*names, "config", "help", "version")]
    return f"unknown argument {flag}{nearest(flag, flags)}"


def is_read(spec: dataclasses.Field, task: str) -> bool:
    """Whether the task reads the setting, so that a flag for it does something."""
    for tasks, names in SOME_READ.items():
        if spec.name in names.split():
            return task in tasks
    return task in READERS[spec.metadata["group"]]


def asks_classifier(config: Config) -> bool:
    """Whether the reward has the term `reward_model`."""
    return "reward_model" in config.reward_weights if config.reward_weights else not config.reward_fn


def adapts_nothing(config: Config) -> bool:
    """Whether an adapter is asked for on a model of random weights, all of which have to be trained."""
    return config.task in ("sft", "reward") and config.trains_from_scratch and config.has_adapter


WITHOUT_EFFECT = {  # settings: when they change nothing, and why
    "base_model_name": (lambda config: config.task == "generate", "the model is that of the run (--output_dir)"),
    "reward_model_path reward_label reward_output reward_input reward_in_8bit": (
        lambda config: config.task in ("train", "explain") and not asks_classifier(config),
        "no reward model is asked: name reward_model in --reward_weights to have it count",
    ),
    "length_range": (
        lambda config: "length" not in config.reward_weights,
        "the length has no weight: name length in --reward_weights",
    ),
    "merge": (
        lambda config: not config.has_adapter and not config.starts_from_adapter,
        "there is no adapter to fold in (--lora_r, --peft_model_path)",
    ),
    "lora_alpha": (lambda config: not config.lora_r, "there is no new adapter (--lora_r)"),
    "lora_r": (lambda config: config.peft_model_path, "the adapter of --peft_model_path has a rank of its own"),
    "lora_r lora_alpha": (
        lambda config: config.lora_r and not config.peft_model_path and config.starts_from_adapter,
        "what it starts from is an adapter, which goes on with a rank of its own",
    ),
    "lora_r lora_alpha load_in_8bit load_in_4bit merge": (
        adapts_nothing,
        "the model made here is trained whole (an adapter is put on a --base_model_name)",
    ),
    "kl_horizon": (lambda config: not config.kl_target, "--kl_coef is fixed (--kl_target)"),
    "n_updates": (lambda config: config.epochs, "--epochs says how long to train"),
    "sft_steps": (lambda config: config.sft_epochs, "--sft_epochs says how long to train"),
    "vocab_size n_layer n_embd n_head": (
        lambda config: not config.trains_from_scratch,
        "no model is made here, --base_model_name is",
    ),
    "n_reviews": (lambda config: config.dataset_path, "the data are those of --dataset_path"),
    "without_reward": (lambda config: not config.output, "no response is written (--output)"),
    "batch_size": (
        lambda config: config.task == "explain" and (config.prompt or config.prompts),
        "the prompts that are given are the whole batch",
    ),
    "rejected_column": (lambda config: not config.chosen_column, "there are no pairs without --chosen_column"),
    "chat system": (
        lambda config: config.task == "reward" and not config.chosen_column,
        "a classifier of labels learns texts as they are (--chosen_column has pairs of answers)",
    ),
    "label_column": (lambda config: config.chosen_column, "the reward model is trained on pairs (--chosen_column)"),
}


def notes(config: Config, given: Iterable[str]) -> list[str]:
    """A sentence for every reason for which settings that were given change nothing."""
    sentences = []
    for names, (is_idle, because) in WITHOUT_EFFECT.items():
        idle = [f"--{name}" for name in names.split() if name in given]
        if idle and is_idle(config):
            sentences.append(f"note: {', '.join(idle)} {'has' if len(idle) == 1 else 'have'} no effect: {because}")
    return sentences


def parse_args(arguments: list[str] | None = None, run_settings: Callable[[dict], dict] | None = None) -> Config:
    """Resolve flags, file, and preset into a Config; a task that uses a run needs `run_settings` of folders.py.

    Raises UsageError, which names the nearest valid choice, and SystemExit where --help or --version is all.
    """
    parser = build_parser()
    flags, unknown = parser.parse_known_args(arguments)
    if "help" in flags or "version" in flags:
        print(parser.format_help() if "help" in flags else versions(), flush=True)
        raise SystemExit(0)
    specs = {spec.name: spec for spec in dataclasses.fields(Config)}
    if unknown:
        raise UsageError(unknown_flag(unknown[0].split("=")[0], specs))
    given = vars(flags)
    path = given.pop("config", "")
    task = given.get("task", Config.task)
    unread = [f"--{name}" for name in given if task in TASKS and not is_read(specs[name], task)]
    if unread:
        tell(f"note: --task {task} does not read {', '.join(unread)}")
    from_file = read_config_file(path) if path else {}
    for name in from_file:
        if name not in specs:
            raise UsageError(f"--config {path} has an unknown field {name!r}{nearest(str(name), specs)}")
    settings = {name: coerce(specs[name], value) for name, value in (from_file | given).items()}
    check_value(specs["preset"], settings.get("preset", ""))
    resumes = settings.get("task", Config.task) == "train" and settings.get("resume", False)
    uses_a_run = settings.get("task") in USES_A_RUN or resumes
    base = run_settings(settings) if uses_a_run else {}
    base = base or preset_settings(settings)
    known = {name: value for name, value in base.items() if name in specs}  # an older run may have had others
    lent = {name: coerce(specs[name], value) for name, value in known.items()}
    if resumes:
        check_unchanged(settings, lent, "resume", MAY_CHANGE)
        if "n_updates" in settings:
            lent["epochs"] = 0.0  # which would take precedence
    elif settings.get("task") == "explain" and settings.get("update", NO_UPDATE) != NO_UPDATE:
        check_unchanged(settings, lent, "update", MAY_DIFFER)
    config = Config(**(lent | settings))
    for note in notes(config, [name for name in settings if is_read(specs[name], config.task)]):
        tell(note)
    return config


def check_unchanged(given: dict, before: dict, flag: str, may_change: tuple[str, ...]) -> None:
    """Raise UsageError for a setting that a run may not have another value of than it began with, with that flag."""
    for name, value in given.items():
        if name in before and value != before[name] and name not in (*may_change, *OF_A_START):
            may = ", ".join(f"--{each}" for each in may_change)
            raise UsageError(
                f"--{flag}: --{name} is {value!r}, and the run began with {before[name]!r}; what may change is {may}"
            )
