"""The model card, README.md in an output folder: what the model is, how it was made, what came of it, how to load it.

It says nothing of the machine or the hour, so that equal runs have equal cards; of a file or folder on this disk its
last name alone. What models, data and users wrote stands in fences and between marks that it cannot end.
"""

import dataclasses
import json
import re
import shlex
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import AutoConfig

from adapters import base_of
from arguments import OF_A_START, is_read, notes, versions
from config import PATHS, PRESETS, Config, UsageError
from files import MANIFEST, read_object, read_rows, write_whole
from folders import KEPT_BACK, STATS, last_name, notice, run_above, stage_folder
from hub import load
from intervals import wilson_interval
from plot import telling_samples
from progress import visible
from provenance import read_record
from reward import term_weights
from reward_model import label_index

CARD = "README.md"
TRAINING_FIGURE = "plots/training.png"
RELIABILITY_FIGURE = "plots/reliability.png"
HERE_ALONE = ("device", "save_every", "keep_checkpoints")  # settings of a place, as those of a start are
MOST_LETTERS = 1000  # of a prompt or a response among the samples


class Kind(NamedTuple):
    """What the card says of a stage's model."""

    what: str
    task: str  # of the Hub
    tags: list[str]


KINDS = {
    "train": Kind("a language model trained by PPO", "text-generation", ["ppo", "rlhf", "reinforcement-learning"]),
    "sft": Kind("a language model trained on texts", "text-generation", ["sft"]),
    "judge": Kind("a language model, the judge of how fluent others write", "text-generation", ["sft"]),
    "reward": Kind("a reward model", "text-classification", ["reward-model", "rlhf"]),
}
FIGURES = {  # of a comparison, and what they are called
    "reward": "reward",
    "kl": "KL to the start, nats a response",
    "length": "length, tokens",
    "ended": "share of responses that end",
    "distinct_bigrams": "share of word pairs that differ",
    "reference_perplexity": "perplexity to the start, a token",
}
TO_LOAD = """\
import transformers{more}

FOLDER = "."  # this folder, or the name of its repository on the Hub
model = {line}
tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)"""
LICENCE = (
    "This card states no licence. Those of the base model, of the data and of the reward model apply to what was made "
    "of them: look at them before you use or share it."
)

# --------------------------------------------------------------------------------------------------------------------
# Texts that cannot break the card, names that say nothing of the disk
# --------------------------------------------------------------------------------------------------------------------


def longest_run(text: str) -> int:
    """How many backticks stand in a row at most."""
    return max(map(len, re.findall("`+", text)), default=0)


def printable(text: str) -> str:
    """The text as UTF-8 can hold it, with what would steer a terminal as escapes."""
    return visible(text.encode("utf-8", "backslashreplace").decode())


def fenced(text: str, language: str = "text") -> str:
    """The text as it is, in a fence with more backticks than it has in a row anywhere: nothing in it is markup."""
    text = printable(text)
    fence = "`" * max(3, longest_run(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def code(text: str) -> str:
    """The text within a line: as code, with ends of lines as escapes."""
    text = printable(text).replace("\n", "\\n").replace("\t", "\\t")
    marks = "`" * (longest_run(text) + 1)
    return f"{marks} {text} {marks}" if "`" in text else f"`{text}`"


def is_hub_id(path: str) -> bool:
    """Whether a model or a dataset so named is read from the Hub."""
    with suppress(HFValidationError, OSError):
        validate_repo_id(path)
        return bool(path) and not Path(path).exists()
    return False


def public_name(path: str) -> str:
    """A Hub id as it is; of a place on this disk, or FILE.py:NAME, the last name."""
    return path if not path or is_hub_id(path) else last_name(path)


def command(config: Config, task: str) -> str:
    """What has this made again: the task with its settings that are not the preset's, or the defaults; of places the
    last name.
    """
    config = replace(config, task=task)
    defaults = {spec.name: spec.default for spec in dataclasses.fields(config)} | PRESETS.get(config.preset, {})
    left_out = ("task", "preset", *OF_A_START, *KEPT_BACK, *HERE_ALONE)
    parts = [f"python main.py --task {task}"]
    if config.preset:
        parts.append(f"--preset {config.preset}")
    for spec in dataclasses.fields(config):
        if spec.name in left_out or not is_read(spec, task):
            continue
        value = getattr(config, spec.name)
        if value != defaults[spec.name] and not notes(config, [spec.name]):
            parts.append(as_flag(spec.name, public_name(value) if spec.name in PATHS.split() else value))
    line = " ".join(parts)
    return line if len(line) <= 100 else " \\\n    ".join(parts)


def as_flag(name: str, value) -> str:
    """A setting as a shell takes it."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    text = shlex.quote(str(value))
    return f"--{name}={text}" if text.startswith("-") else f"--{name} {text}"


# --------------------------------------------------------------------------------------------------------------------
# Metadata
# --------------------------------------------------------------------------------------------------------------------


def is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").exists()


def hub_base(folder: Path) -> str | None:
    """The Hub id of the model that the one in the folder was made of: of an adapter the very one that it is for, of a
    whole model also by way of the stages before it. None where it is no model of the Hub.
    """
    if is_adapter(folder):
        base = base_of(str(folder))
        return base if is_hub_id(base) else None
    seen = set()
    while folder not in seen:
        seen.add(folder)
        start = read_record(folder).get("starts_from", {"path": "", "sha256": ""})
        if not start["sha256"]:  # it was no folder
            return start["path"] if is_hub_id(start["path"]) else None
        folder = run_above(Path(start["path"]))
    return None


def metadata(
    folder: Path, config: Config, stage: str, title: str, results: dict[str, float], line: str
) -> ModelCardData:
    """What the Hub reads of a card. `results` are figures on held-out rows, by the Hub's names of metrics; `line` loads
    the model.
    """
    kind = KINDS[stage]
    base = hub_base(folder)
    data = config.dataset_path if is_hub_id(config.dataset_path) else None
    task = "text2text-generation" if "AutoModelForSeq2SeqLM" in line else kind.task
    found = []
    for name, value in results.items() if data else ():
        found.append(EvalResult(task, dataset_type=data, dataset_name=data, metric_type=name, metric_value=value))
    more = {}
    if base and is_adapter(folder):
        more["base_model_relation"] = "adapter"
    return ModelCardData(
        base_model=base,
        library_name="peft" if is_adapter(folder) else "transformers",
        pipeline_tag=task,
        tags=kind.tags,
        datasets=[data] if data else None,
        model_name=title if found else None,
        eval_results=found or None,
        **more,
    )


# --------------------------------------------------------------------------------------------------------------------
# What every card says
# --------------------------------------------------------------------------------------------------------------------


def title_of(config: Config, stage: str) -> str:
    """What is made of what, in a line."""
    kind = "a language model trained on answers" if learns_answers(config, stage) else KINDS[stage].what
    if config.trains_from_scratch:
        return f"{kind[0].upper()}{kind[1:]}, made from nothing"
    return f"{kind[0].upper()}{kind[1:]}, made of {public_name(config.base_model_name)}"


def learns_answers(config: Config, stage: str) -> bool:
    """Whether what is learned are answers alone, and nothing of what they answer."""
    return stage == "sft" and bool(config.completion_column or config.chat)


def data_line(config: Config, record: dict) -> str:
    """What it was trained on, and what was held out of it."""
    trained_on, held_out = record["trained_on"], record["held_out"]
    name = code(public_name(config.dataset_path)) if config.dataset_path else "the built-in generated movie reviews"
    parts = [f"configuration {code(config.dataset_config)}"] if config.dataset_config else []
    parts.append(f"split {code(config.dataset_split)}")
    columns = ", ".join(code(column) for column in trained_on["columns"])
    rows = f"drawn from {trained_on['rows']:,} rows (their hash is {code(trained_on['sha256'])})"
    return f"- Data: {name}, {', '.join(parts)}, columns {columns}: {rows}, {held_out['rows']:,} held out"


def start_line(record: dict) -> str:
    """The model that training began with; of one that an earlier stage left, what that began with, too."""
    start = record["starts_from"]["path"]
    told = f"the model {code(public_name(start))}" if start else "random weights"
    if record["starts_from"].get("sha256"):
        told += f" (the hash of its weights is {code(record['starts_from']['sha256'])})"
    earlier = read_record(run_above(Path(start))).get("starts_from", {}).get("path") if start else ""
    return f"- Start: {told}, made of {code(public_name(earlier))}" if earlier else f"- Start: {told}"


def prompt_lines(config: Config, stage: str) -> list[str]:
    """How prompts are made of rows, where that is more than a column's text; and what of it is learned."""
    if stage == "reward" and not config.chosen_column:
        return []
    if learns_answers(config, stage):
        return ["- Learned: the answers alone, and where they end", *prompt_lines(config, "train")]
    if config.chat:
        system = f", after {code(config.system)} as a system's turn" if config.system else ""
        return [f"- Prompts: conversations, by the tokenizer's template of chat{system}"]
    return [f"- Prompts: {code(config.prompt_template)}, filled in from the columns"] if config.prompt_template else []


def how_it_was_made(config: Config, stage: str, record: dict, *lines: str) -> str:
    """Start, data, seed, versions, and the command; `lines` are a stage's own."""
    listed = [start_line(record), data_line(config, record), *prompt_lines(config, stage), *lines]
    listed += [f"- Seed: {config.seed}", f"- Made by: {versions()}"]
    again = fenced(command(config, "sft" if stage == "judge" else stage), "bash")
    told = "All settings that are not the defaults; of what is on its maker's disk the name alone:"
    return "\n".join(["## How it was made", "", *listed, "", told, "", again])


def bits_of_base(folder: Path, config: Config) -> list[str]:
    """Of an adapter, in how many bits its base was, which the line that loads it does not say."""
    found = [name for name in ("load_in_8bit", "load_in_4bit") if getattr(config, name) and is_adapter(folder)]
    option = "quantization_config=transformers.BitsAndBytesConfig({}=True)"
    told = "It was trained and measured on a base of few bits, as {} makes it; on a whole one its numbers are others."
    return [told.format(code(option.format(name))) for name in found]


def chat_lines(config: Config) -> list[str]:
    """How a model of chat is asked: as it was trained."""
    if not config.chat:
        return []
    system = [{"role": "system", "content": config.system}] if config.system else []
    messages = json.dumps([*system, {"role": "user", "content": "What is PPO?"}], ensure_ascii=False)
    call = "tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)"
    told = "It answers conversations, written by the template of its tokenizer:"
    return [told, fenced(f"messages = {messages}\nprompt = {call}", "python")]


def how_to_load(folder: Path, line: str, *lines: str) -> str:
    """The line of the manifest, such that it can be pasted; without the place where an adapter's base is."""
    base = base_of(str(folder))
    if is_adapter(folder):
        line = line.replace(repr(base), repr(public_name(base)))
        if not is_hub_id(base):
            lines = (f"{code(public_name(base))} is on its maker's disk: put in where you have that model.", *lines)
    more = "\nimport peft" if "peft." in line else ""
    return "\n\n".join(["## How to load it", fenced(TO_LOAD.format(line=line, more=more), "python"), *lines])


def card(data: ModelCardData, title: str, *sections: str) -> str:
    """The whole text."""
    body = "\n\n".join([f"# {title}", *filter(None, sections), "## Licence", LICENCE])
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n"))


def demonstration(config: Config) -> str:
    """The notice of the models made here."""
    text = notice(config)
    return f"**A teaching demonstration.**\n\n{fenced(text)}" if text else ""


# --------------------------------------------------------------------------------------------------------------------
# The stages before PPO
# --------------------------------------------------------------------------------------------------------------------


def stage_results(stage: str, record: dict) -> dict[str, float]:
    """A stage's figures on held-out rows, by the Hub's names."""
    names = {"sft": ("perplexity",), "reward": ("accuracy",)}.get(stage, ())
    return {name: record["held_out"][name] for name in names if name in record["held_out"]}


def stage_card(folder: Path, config: Config, stage: str) -> str:
    """The card of a language or reward model that is saved in the folder, with its record."""
    record = read_record(folder)
    title = title_of(config, stage)
    line = read_object(folder / MANIFEST)["loads_with"]
    data = metadata(folder, config, stage, title, stage_results(stage, record), line)
    own = what_it_reads(folder, config) if stage == "reward" else chat_lines(config)
    return card(
        data,
        title,
        demonstration(config),
        how_it_was_made(config, stage, record),
        stage_figures(stage, record),
        how_to_load(folder, line, *bits_of_base(folder, config), *own),
    )


def stage_figures(stage: str, record: dict) -> str:
    """What was measured on held-out rows; nothing of a judge, which has none."""
    held_out = record["held_out"]
    n_rows = held_out["rows"]
    lines = []
    if "perplexity" in held_out:
        lines.append(f"- Perplexity: {held_out['perplexity']:.2f} a token.")
    if "accuracy" in held_out:
        low, high = wilson_interval(round(held_out["accuracy"] * n_rows), n_rows)
        lines.append(f"- Accuracy: {held_out['accuracy']:.1%}, 95 % interval [{low:.1%}, {high:.1%}].")
    if "accuracy_on_first_halves" in held_out:
        lines.append(f"- Accuracy on their first halves: {held_out['accuracy_on_first_halves']:.1%}.")
    if not lines:
        return ""
    figure = ""
    if stage == "reward":
        figure = f"\n\n![How often it is right, against how certain it is]({RELIABILITY_FIGURE})"
    return f"## On {n_rows:,} held-out rows\n\n" + "\n".join(lines) + figure


def what_it_reads(folder: Path, config: Config) -> list[str]:
    """What text a reward model takes, and what it answers."""
    settings = read_object(folder / "config.json") if (folder / "config.json").exists() else {}
    labels = ", ".join(f"{number} is {code(str(name))}" for number, name in settings.get("id2label", {}).items())
    if config.chosen_column:
        separator = code(settings.get("prompt_response_separator", ""))
        form = f"as one text, with {separator} between them"
        if settings.get("reads_conversations"):
            form = "as a conversation, by the template of its tokenizer"
        reads = f"It reads a prompt and an answer {form}, and gives one number: the higher, the better the answer."
        return [f"{reads} Only differences between answers to one prompt mean something."]
    return [f"It reads one text, and gives a logit for each label: {labels}."]


# --------------------------------------------------------------------------------------------------------------------
# A run of PPO
# --------------------------------------------------------------------------------------------------------------------


def run_card(folder: Path, config: Config, comparison: dict, kind: str, least: int, has_figure: bool = True) -> str:
    """The card of a policy that is saved in the folder of a run: with its record, its statistics, of which alarms need
    `least` rows, and the comparison of before and after on prompts of a `kind`.
    """
    record = read_record(folder)
    title = title_of(config, "train")
    line = read_object(folder / MANIFEST)["loads_with"]
    results = {"mean_reward": comparison["figures"]["after"]["reward"]}
    data = metadata(folder, config, "train", title, results, line)
    return card(
        data,
        title,
        demonstration(config),
        how_it_was_made(config, "train", record, *reward_lines(config)),
        what_came_of_it(comparison, kind),
        alarms_raised(read_rows(folder / STATS), least),
        f"## Training curves\n\n![Reward, KL, losses and more over the updates]({TRAINING_FIGURE})"
        if has_figure
        else "",
        samples(comparison),
        how_to_load(
            folder,
            line,
            *bits_of_base(folder, config),
            *chat_lines(config),
            "The value head of the training is in `value_head.safetensors`.",
        ),
    )


def reward_lines(config: Config) -> list[str]:
    """Each term of the reward, with its weight."""
    terms = {
        "reward_fn": f"the function {code(public_name(config.reward_fn))}",
        "repetition": "the share of words that repeat",
        "length": f"0 for {config.length_range} words, else -1",
    }
    weights = term_weights(config)
    if "reward_model" in weights:
        terms["reward_model"] = classifier_line(config)
    return [f"- Reward: {weight:g} x {terms[name]}" for name, weight in weights.items()]


def classifier_line(config: Config) -> str:
    """The classifier that rewards, the label, what is taken of it, and what it reads."""
    path = config.reward_model_path or str(stage_folder(config, "reward"))
    label = config.reward_label or "the last"
    with suppress(UsageError):  # a run that is over does not fail for want of a name
        names = load(AutoConfig.from_pretrained, "reward_model_path", path).id2label
        label = names[label_index(names, config.reward_label)]
    reads = "the response" if config.reward_input == "response" else "prompt and response"
    accuracy = read_record(Path(path)).get("held_out", {}).get("accuracy")
    right = f", which is right about {accuracy:.1%} of held-out rows" if accuracy is not None else ""
    return f"the {config.reward_output} of label {code(label)} by {code(public_name(path))} on {reads}{right}"


def with_interval(value: float, interval: tuple[float, float] | None, sign: str = "") -> str:
    """A figure, and its 95 % interval where it has one."""
    told = f"{value:{sign}.3f}"
    return f"{told} [{interval[0]:{sign}.3f}, {interval[1]:{sign}.3f}]" if interval else told


def what_came_of_it(comparison: dict, kind: str) -> str:
    """A table of the figures before and after, and whether the reward has risen."""
    names = [name for name in comparison["figures"]["after"] if name.startswith("reward_")]
    paired_figures = comparison["differences"]["after"]
    terms = {name: f"reward, {name.removeprefix('reward_')}" for name in names if name in paired_figures}
    lines = ["| | before | after | difference |", "|---|---|---|---|"]
    for name, words in ({"reward": FIGURES["reward"]} | terms | FIGURES).items():
        if len(terms) < 2 and name in terms:
            continue
        cells = [words]
        for policy in ("before", "after"):
            value = comparison["figures"][policy][name]
            cells.append(with_interval(value, comparison["intervals"][policy].get(name)))
        paired = paired_figures.get(name)
        cells.append(with_interval(paired["difference"], (paired["low"], paired["high"]), "+") if paired else "")
        lines.append("| " + " | ".join(cells) + " |")
    heading = f"## Before and after, on {comparison['n_prompts']:,} {kind} prompts"
    explained = (
        "In brackets 95 % intervals over prompts; differences are paired. They are the luck of the prompts and the "
        "sampling; that of a training is seen with several seeds. KL is estimated from the responses, which may put it "
        "below 0 where little has changed."
    )
    return "\n".join([heading, "", *lines, "", verdict_on(paired_figures["reward"]), explained])


def verdict_on(paired: dict) -> str:
    """In a sentence, what the difference of the rewards shows."""
    if paired["low"] > 0:
        return "The reward has risen."
    return "The reward has fallen." if paired["high"] < 0 else "The reward has not been shown to change."


def alarms_raised(history: list[dict], least: int) -> str:
    """What the run warned of, the first time and the last, from its rows of statistics, of which most alarms need so
    many at least.
    """
    raised = [row for row in history if row["alarms"]]
    if not raised and len(history) < least:
        told = f"the latest responses are compared with the first from {least} updates on; it had {len(history)}"
        return f"## Alarms\n\nThe run was too short for most of them: {told}."
    if not raised:
        return f"## Alarms\n\nNone was raised (updates: {len(history):,})."
    lines = [f"## Alarms\n\nRaised at {len(raised):,} of all updates ({len(history):,}), first and last:\n"]
    for row in (raised[0], raised[-1]) if len(raised) > 1 else raised:
        lines += [f"- Update {row['step']}: {code(alarm)}" for alarm in row["alarms"]]
    lines.append("\nThe run ended with an alarm." if history[-1]["alarms"] else "\nThe run ended without one.")
    return "\n".join(lines)


def samples(comparison: dict) -> str:
    """A few prompts with the responses to them and their rewards, each in a fence."""
    blocks = []
    for row in telling_samples(comparison):
        lines = [f"prompt: {shortened(row['query'])}"]
        for policy in ("before", "after"):
            lines.append(f"{policy} ({row[f'reward_{policy}']:+.3f}): {shortened(row[f'response_{policy}'].strip())}")
        blocks.append(fenced("\n".join(lines)))
    return "\n\n".join(["## Samples", *blocks])


def shortened(text: str) -> str:
    return text if len(text) <= MOST_LETTERS else text[:MOST_LETTERS] + " ..."


def write_run_card(folder: Path, config: Config, comparison: dict, kind: str, least: int) -> None:
    """Leave the card in the run's folder, and beside the policy where --final_dir says."""
    write_whole(folder / CARD, run_card(folder, config, comparison, kind, least))
    if config.final_dir:
        write_whole(Path(config.final_dir) / CARD, run_card(folder, config, comparison, kind, least, has_figure=False))
