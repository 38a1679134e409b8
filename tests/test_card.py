"""The card of an output folder: what it says is so, can be pasted, and says nothing of this disk; no text breaks it."""

import dataclasses
import json
import re
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from micro import PPO, flags, micro_config, question_flags, run_main
from tiny_models import letter_tokenizer

import card
from arguments import is_read, parse_args
from card import (
    alarms_raised,
    bits_of_base,
    chat_lines,
    code,
    command,
    fenced,
    hub_base,
    prompt_lines,
    public_name,
    start_line,
    verdict_on,
)
from config import Config
from files import read_rows
from intervals import wilson_interval

pytest_plugins = ["micro"]
pytestmark = pytest.mark.usefixtures("no_figures")


def load(folder: Path) -> ModelCard:
    """As the Hub reads it. Nothing else may be in the folder under way."""
    return ModelCard.load(folder / "README.md")


def blocks(text: str, language: str) -> list[str]:
    """What stands in the fences of a language, as a reader of Markdown finds them."""
    found = MarkdownIt("commonmark").parse(text)
    return [token.content.rstrip("\n") for token in found if token.type == "fence" and token.info == language]


def headings(text: str) -> list[str]:
    tokens = MarkdownIt("commonmark").parse(text)
    return [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]


def as_a_shell_reads(line: str) -> list[str]:
    command = ["bash", "-c", f"printf '%s\\0' {line}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")[:-1]


def run_python(line: str, folder: Path) -> dict:
    names = {}
    exec(line.replace('FOLDER = "."', f"FOLDER = {str(folder)!r}"), names)
    return names


# --------------------------------------------------------------------------------------------------------------------
# What it says
# --------------------------------------------------------------------------------------------------------------------


def test_the_card_of_a_run_says_what_the_run_says(chain):
    """Rewards, intervals, samples and alarms are those that were printed, or are in its files."""
    text = load(chain.root / PPO).text
    printed = re.search(
        r"reward on 4 held-out prompts: (\S+) before, (\S+) after; difference (\S+), .*\[(\S+), (\S+)\]", chain.output
    )
    row = re.search(r"\| reward \| (\S+) \[.*?\] \| (\S+) \[.*?\] \| (\S+) \[(\S+), (\S+)\] \|", text)
    assert row.groups() == printed.groups()
    assert headings(text)[:3] == [
        "A language model trained by PPO, made from nothing",
        "How it was made",
        "Before and after, on 4 validation prompts",
    ]
    assert (
        "too short for most of them" in text
        and "from 64 updates on; it had 2." in text
        and "](plots/training.png)" in text
    )
    for prompt in re.findall(r"^prompt  '(.*)'$", chain.output, re.MULTILINE):
        assert f"prompt: {prompt}\n" in text
    assert "1 x the probability of label `POSITIVE` by `reward` on prompt and response" in text
    record = json.loads((chain.root / PPO / "stage.json").read_text())
    assert (
        "Start: the model `sft`" in text
        and f"drawn from 8 rows (their hash is `{record['trained_on']['sha256']}`)" in text
    )
    assert "A teaching demonstration" in text and "This card states no licence" in text


def test_the_metadata_are_those_of_what_it_is(chain):
    """Made from nothing, on rows made here: there is no base model and no dataset to name, and no licence."""
    folder = (chain.root / PPO).parent
    ppo, sft, reward = (load(folder / name).data.to_dict() for name in ("ppo", "sft", "reward"))
    common = {"library_name": "transformers"}
    tags = ["ppo", "rlhf", "reinforcement-learning"]
    assert ppo == common | {"pipeline_tag": "text-generation", "tags": tags}
    assert sft == common | {"pipeline_tag": "text-generation", "tags": ["sft"]}
    assert reward == common | {"pipeline_tag": "text-classification", "tags": ["reward-model", "rlhf"]}


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_what_loads_it_can_be_pasted(stage, chain):
    folder = (chain.root / PPO).with_name(stage)
    text = load(folder).text
    (line,) = blocks(text, "python")
    names = run_python(line, folder)
    expected = {"reward": "GPT2ForSequenceClassification"}.get(stage, "GPT2LMHeadModel")
    assert type(names["model"]).__name__ == expected and names["tokenizer"]("a").input_ids


@pytest.mark.parametrize("stage", ["sft", "reward", "train"])
def test_the_command_can_be_pasted(stage, chain):
    """It asks for the settings that there were, all that the task reads but for places."""
    folder = (chain.root / PPO).with_name("ppo" if stage == "train" else stage)
    (line,) = blocks(load(folder).text, "bash")
    program, script, *arguments = as_a_shell_reads(line)
    assert (program, script) == ("python", "main.py")
    asked = parse_args(arguments)
    had = Config(**json.loads((folder / "run_config.json").read_text()))
    read = [spec.name for spec in dataclasses.fields(Config) if is_read(spec, stage) and spec.name != "task"]
    assert asked.task == stage and {n: getattr(asked, n) for n in read} == {n: getattr(had, n) for n in read}


def test_a_shell_takes_a_command_as_it_is_meant():
    config = Config(
        base_model_name="gpt2",
        prompt_template="It's {text}\n`x` $HOME:",
        reward_weights="repetition=-0.5",
        whiten_advantages=False,
        merge=True,
        lora_r=2,
        epochs=2.0,
        n_updates=7,
        reward_label="-1",
        reward_fn="r.py:f",
        output_dir="here",
        log_with="wandb",
    )
    asked = parse_args(as_a_shell_reads(command(config, "train"))[2:])
    assert asked == dataclasses.replace(config, output_dir="", log_with="", n_updates=100, reward_label="")


def test_a_stages_figures_are_those_of_its_record(chain):
    folder = (chain.root / PPO).parent
    record = json.loads((folder / "reward/stage.json").read_text())["held_out"]
    low, high = wilson_interval(round(record["accuracy"] * 200), 200)
    text = load(folder / "reward").text
    assert "## On 200 held-out rows" in text
    assert f"Accuracy: {record['accuracy']:.1%}, 95 % interval [{low:.1%}, {high:.1%}]" in text
    assert "a logit for each label: 0 is `NEGATIVE`, 1 is `POSITIVE`" in text and "(plots/reliability.png)" in text
    perplexity = json.loads((folder / "sft/stage.json").read_text())["held_out"]["perplexity"]
    assert f"Perplexity: {perplexity:.2f} a token" in load(folder / "sft").text


def test_a_reward_model_of_pairs_says_how_it_reads_them(questions, t5_folder, chain):
    rows = [{"question": f"Q{n}?", "good": "yes " * (n % 5 + 1), "bad": "no"} for n in range(40)]
    (questions / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = chain.root / PPO.with_name("sft")
    asked = ["--task", "reward", "--base_model_name", base, "--dataset_path", "pairs.jsonl", "--output_dir", "out"]
    asked += ["--prompt_column", "question", "--chosen_column", "good", "--rejected_column", "bad"]
    assert run_main(*asked, "--reward_steps", "2", "--reward_batch_size", "4") == 0
    text = load(questions / "out").text
    assert "It reads a prompt and an answer as one text, with `\\n` between them, and gives one number" in text
    assert "columns `question`, `good`, `bad`: " in text and "Start: the model `sft`" in text


def test_equal_runs_have_equal_cards_wherever_they_are(chain, workplace):
    assert run_main("--task", "train", *flags(output_dir="elsewhere", final_dir="final")) == 0
    own = (workplace / "elsewhere/README.md").read_bytes()
    assert own == (workplace / PPO / "README.md").read_bytes()
    assert "plots/training.png" in own.decode()
    final = load(workplace / "final").text
    assert "plots/" not in final and headings(final) == [
        h for h in headings(own.decode()[4:].split("---\n", 1)[1]) if h != "Training curves"
    ]


def test_an_encoder_decoder_and_a_function_are_called_what_they_are(t5_folder, questions):
    assert run_main("--task", "train", "--output_dir", "run", *question_flags(t5_folder)) == 0
    text = load(questions / "run").text
    assert load(questions / "run").data.pipeline_tag == "text2text-generation"
    assert "Reward: 1 x the function `rewards.py:reward`" in text and "Data: `prompts.jsonl`" in text
    (line,) = blocks(text, "python")
    assert type(run_python(line, questions / "run")["model"]).__name__ == "T5ForConditionalGeneration"
    assert "teaching demonstration" not in text


def test_the_alarms_are_the_first_and_the_last():
    def history(*alarms: list[str]) -> list[dict]:
        return [{"step": step, "alarms": raised} for step, raised in enumerate(alarms)]

    assert alarms_raised(history([], [], [], []), 4).endswith("None was raised (updates: 4).")
    told = alarms_raised(history([], [], []), 4)
    assert told.endswith("the latest responses are compared with the first from 4 updates on; it had 3.")
    told = alarms_raised(history([], ["a rose"], ["b rose"], ["c fell", "d fell"], []), 4)
    assert (
        "Raised at 3 of all updates (5)" in told
        and "- Update 1: `a rose`\n- Update 3: `c fell`\n- Update 3: `d fell`\n" in told
    )
    assert "b rose" not in told and told.endswith("The run ended without one.")
    assert alarms_raised(history(["a"]), 4).endswith("- Update 0: `a`\n\nThe run ended with an alarm.")


def test_a_reward_has_risen_only_beyond_its_interval():
    verdicts = [verdict_on({"low": low, "high": high}) for low, high in ((0.1, 2), (-2, -0.1), (-1, 1), (0, 1))]
    unknown = "The reward has not been shown to change."
    assert verdicts == ["The reward has risen.", "The reward has fallen.", unknown, unknown]


# --------------------------------------------------------------------------------------------------------------------
# What it is made of
# --------------------------------------------------------------------------------------------------------------------


def record(folder: Path, start: str, sha256: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    part = {"rows": 1, "sha256": "", "columns": ["text"]}
    content = {"trained_on": part, "starts_from": {"path": start, "sha256": sha256}, "held_out": part}
    (folder / "stage.json").write_text(json.dumps(content))
    (folder / "rows.txt").write_text("")


def test_the_base_is_a_model_of_the_hub_also_by_way_of_a_stage(empty):
    """A folder is none, whatever it is called and be it gone; nor is a folder's record a circle."""
    record(empty / "sft", "distilgpt2")
    record(empty / "ppo", "sft", sha256="1")
    record(empty / "from_folder", "owner/name", sha256="1")
    record(empty / "circle", "circle", sha256="1")
    assert hub_base(Path("sft")) == hub_base(Path("ppo")) == "distilgpt2"
    assert hub_base(Path("from_folder")) is None and hub_base(Path("circle")) is None and hub_base(Path("none")) is None
    (empty / "distilgpt2").mkdir()
    assert hub_base(Path("sft")) is None  # it was read from there


def test_an_adapters_base_is_the_very_model_that_it_is_for(empty):
    """Not the one that this was made of: its weights are others."""
    record(empty / "sft", "distilgpt2")
    record(empty / "run", "sft", sha256="1")
    settings = empty / "run/adapter_config.json"
    settings.write_text(json.dumps({"base_model_name_or_path": str(empty / "sft")}))
    assert hub_base(empty / "run") is None
    settings.write_text(json.dumps({"base_model_name_or_path": "openai-community/gpt2"}))
    data = card.metadata(
        empty / "run", Config(), "train", "a", {}, "transformers.AutoModelForCausalLM.from_pretrained(FOLDER)"
    ).to_dict()
    assert data["base_model"] == "openai-community/gpt2" and data["base_model_relation"] == "adapter"
    assert data["library_name"] == "peft"


def test_an_adapters_card_loads_it_where_its_base_is_at_hand(workplace):
    """By the name of the base alone."""
    adapter = ["--base_model_name", "saved_models/tiny/sft", "--max_prompt_length", "12", "--lora_r", "2"]
    adapter += ["--reward_model_path", "saved_models/tiny/reward", "--output_dir", "mine"]
    assert run_main("--task", "train", *flags(), *adapter) == 0
    (line,) = blocks(load(workplace / "mine").text, "python")
    assert "from_pretrained('sft'), FOLDER)" in line
    assert "`sft` is on its maker's disk: put in where you have that model." in load(workplace / "mine").text
    shutil.copytree("saved_models/tiny/sft", "sft")
    assert type(run_python(line, workplace / "mine")["model"]).__name__ == "PeftModelForCausalLM"
    assert str(workplace) not in (workplace / "mine/README.md").read_text()


def test_a_dataset_of_the_hub_has_its_results(empty):
    record(empty / "a", "gpt2")
    config = Config(dataset_path="stanfordnlp/imdb")
    line = "transformers.AutoModelForCausalLM.from_pretrained(FOLDER)"
    described = partial(card.metadata, empty / "a", config, "sft", "A model", {"perplexity": 12.5}, line)
    data = described()
    assert data.datasets == ["stanfordnlp/imdb"] and data.base_model == "gpt2"
    (result,) = ModelCard(f"---\n{data.to_yaml()}\n---\n").data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_type) == ("perplexity", 12.5, "stanfordnlp/imdb")
    (empty / "stanfordnlp/imdb").mkdir(parents=True)
    local = described()
    assert local.datasets is None and local.eval_results is None


# --------------------------------------------------------------------------------------------------------------------
# What it keeps to itself, and what cannot break it
# --------------------------------------------------------------------------------------------------------------------


def test_of_a_place_on_this_disk_the_last_name_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("owner/name").mkdir(parents=True)
    places = {
        "gpt2": "gpt2",
        "other/name": "other/name",
        "owner/name": "name",
        "owner/name/": "name",
        "/home/someone/model": "model",
        "../../someone/rows.jsonl": "rows.jsonl",
        "/home/someone/r.py:reward": "r.py:reward",
        ".": tmp_path.name,
        "": "",
    }
    assert {place: public_name(place) for place in places} == places


def test_no_card_names_a_place_of_this_disk(t5_folder, questions, tmp_path):
    """Where all that the command names is absolute."""
    places = {"dataset_path": questions / "prompts.jsonl", "reward_fn": f"{questions}/rewards.py:reward"}
    absolute = [part for name, value in places.items() for part in (f"--{name}", value)]
    assert run_main("--task", "train", *question_flags(t5_folder), *absolute, "--output_dir", tmp_path / "run") == 0
    text = (tmp_path / "run/README.md").read_text()
    assert "/" not in "".join(re.findall(r"--(?:dataset_path|reward_fn|base_model_name) (\S+)", text))
    assert str(questions) not in text and str(tmp_path) not in text and str(t5_folder.parent) not in text


HOSTILE = [
    "```\n# Not a heading\n<script>alert(1)</script>",
    "````\n~~~\n---\n[x]: y\n",
    "\\`` ` ![a](b) | \r# c\x1b[2J \u202e",
    "`",
    "half \ud83d a character",
    "",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_leaves_its_fence(text):
    document = f"# Before\n\n{fenced(text)}\n\n# After\n\n- {code(text)} |\n\n# End\n"
    tokens = MarkdownIt("commonmark").parse(document)
    assert headings(document) == ["Before", "After", "End"]
    assert not [token for token in tokens if token.type in ("html_block", "hr")]
    (inline,) = [token for token in tokens if token.type == "inline" and "|" in token.content]
    assert {child.type for child in inline.children} <= {"code_inline", "text"}
    document.encode()
    (content,) = blocks(document, "text")
    assert content == card.printable(text).rstrip("\n")


def test_a_card_with_any_samples_is_read_by_the_hubs_library(chain, workplace):
    """Prompts and responses of a policy that has learned to write Markdown."""
    responses = {"query": HOSTILE[0], "response_before": HOSTILE[1], "response_after": HOSTILE[2]}
    sample = responses | {"reward_before": 0.0, "reward_after": 1.0}
    both = ("before", "after")
    figures = dict.fromkeys(card.FIGURES, 1.0)
    paired = {"reward": {"difference": 0.0, "low": -1.0, "high": 1.0}}
    comparison = {"n_prompts": 4, "figures": dict.fromkeys(both, figures), "intervals": {"before": {}, "after": {}}}
    comparison |= {"differences": {"after": paired}, "samples": [sample]}
    config = Config(**json.loads((workplace / PPO / "run_config.json").read_text()))
    card.write_run_card(workplace / PPO, config, comparison, "test", 2)
    read = load(workplace / PPO)
    expected = headings(load(chain.root / PPO).text)
    assert headings(read.text) == [heading.replace("validation", "test") for heading in expected]
    assert read.data.to_dict() == load(chain.root / PPO).data.to_dict()


def test_the_statistics_have_what_the_card_reads(chain):
    assert all(row["alarms"] == [] for row in read_rows(chain.root / PPO / "training_stats.jsonl"))


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"chat": True}, ["- Prompts: conversations, by the tokenizer's template of chat"]),
        (
            {"chat": True, "system": "Be brief."},
            ["- Prompts: conversations, by the tokenizer's template of chat, after `Be brief.` as a system's turn"],
        ),
        ({"prompt_template": "Say: {text}"}, ["- Prompts: `Say: {text}`, filled in from the columns"]),
        ({}, []),
    ],
)
def test_how_prompts_are_made_is_said_of_those_who_read_prompts(settings, told):
    config = micro_config(**settings)
    assert (
        prompt_lines(config, "train") == told == prompt_lines(dataclasses.replace(config, chosen_column="a"), "reward")
    )
    assert prompt_lines(config, "reward") == []  # of labels: it reads texts
    learned = ["- Learned: the answers alone, and where they end"] if config.chat else []
    assert prompt_lines(config, "sft") == learned + told


def test_a_model_of_chat_says_how_it_is_asked():
    """The lines of Python run, with the tokenizer's template."""
    assert chat_lines(micro_config()) == []
    _, asked = chat_lines(micro_config(chat=True, system='Be "brief".'))
    tokenizer = letter_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
    names = {"tokenizer": tokenizer}
    exec(asked.removeprefix("```python\n").removesuffix("\n```"), names)
    assert names["prompt"] == 's:Be "brief".;u:What is PPO?;'


def test_an_adapter_on_few_bits_says_how_its_base_is_loaded_so(tmp_path):
    assert bits_of_base(tmp_path, micro_config()) == []
    (tmp_path / "adapter_config.json").write_text("{}")
    assert bits_of_base(tmp_path, micro_config()) == []
    [told] = bits_of_base(tmp_path, micro_config(lora_r=2, load_in_4bit=True))
    assert "`quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True)`" in told


def test_a_start_that_an_earlier_stage_left_says_what_that_was_made_of(tmp_path):
    own = {"path": "gpt2", "sha256": ""}
    record = {"trained_on": {"columns": [], "rows": 0, "sha256": ""}, "starts_from": own, "held_out": {"rows": 0}}
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "stage.json").write_text(json.dumps(record))
    (tmp_path / "sft" / "rows.txt").write_text("")
    assert start_line({"starts_from": {"path": str(tmp_path / "sft")}}) == "- Start: the model `sft`, made of `gpt2`"
    assert start_line({"starts_from": {"path": "gpt2"}}) == "- Start: the model `gpt2`"
    assert start_line({"starts_from": {"path": ""}}) == "- Start: random weights"
