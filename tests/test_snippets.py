"""What README.md and docs/ print to be typed: every block of shell and Python on them, and the commands within a line.

A block of shell is run by a real shell in which every program is a stand-in that notes how it was called. Each call of
main.py is then parsed, without a note that a flag is idle, and dry-run on small models under the names that it gives,
or is listed here with the reason why not. A block of Python is executed, or is another test's.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from micro import SETTINGS, flags, run_main
from transformers import AutoTokenizer

import main
from arguments import build_parser, parse_args
from config import PRESETS, USES_A_RUN
from reviews import movie_reviews

pytest_plugins = ["micro"]

ROOT = Path(main.__file__).resolve().parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = {
    f"{page.name}-{number}": found
    for page in PAGES
    for number, found in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")))
}
SHELL = {name: text for name, (language, text) in BLOCKS.items() if language == "bash"}
PYTHON = {name: text for name, (language, text) in BLOCKS.items() if language == "python"}

NOT_DRY_RUN = {  # words of a command: why it is parsed alone
    "--preset gpt2-imdb": "its models and data are the Hub's; test_stand_ins.py runs presets on stand-ins",
    "--push_to_hub": "it asks the Hub; test_push.py runs it against one of its own",
    "--resume": "it needs a run that was interrupted; test_checkpoint.py interrupts some",
    "--help": "it prints, and there is nothing else to be done",
}
NOT_OURS = ("--nproc_per_node", "--logdir", "--target")  # flags of torchrun, tensorboard and pip
NOT_RUN_HERE = {  # how a block of Python begins, or its page: why it is not executed here
    "for number in range(config.n_updates):": "it is the notebook's loop; test_notebook.py runs that",
    "from_paper_to_code.md": "its blocks are lines of the source; test_papers.py looks them up",
}


# --------------------------------------------------------------------------------------------------------------------
# Shell
# --------------------------------------------------------------------------------------------------------------------

PROGRAMS = ("python", "python3", "pip", "torchrun", "hf")
IN_AN_ENVIRONMENT = re.compile(r"[\w./-]+/bin/\w+")  # such as .venv/bin/python
STAND_IN = '#!{shell}\nprintf "%s\\0" "${{0##*/}}" "$@" "$END" >> "$CALLS"\n'
END = "\x1e"  # of a call


def calls_of(text: str, folder: Path) -> list[list[str]]:
    """The programs that a shell calls for a block, with their arguments; none of them is run, nor can another be."""
    shell = shutil.which("bash")
    programs = [Path("programs") / name for name in PROGRAMS] + IN_AN_ENVIRONMENT.findall(text)
    for program in (folder / name for name in programs):
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(STAND_IN.format(shell=shell))
        program.chmod(0o755)
    environment = {"PATH": str(folder / "programs"), "CALLS": str(folder / "calls"), "END": END}
    done = subprocess.run([shell, "-euc", text], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    calls, call = [], []
    for word in (folder / "calls").read_text(encoding="utf-8").split("\0")[:-1]:
        if word == END:
            calls.append(call)
            call = []
        else:
            call.append(word)
    assert calls
    return calls


def arguments_of(call: list[str]) -> list[str] | None:
    """Of main.py, be it under torchrun; None of another program."""
    return call[call.index("main.py") + 1 :] if "main.py" in call else None


def of_a_run(settings: dict) -> dict:
    """What `run_settings` lends the tasks that use a run: tiny's settings, and a folder."""
    for name in ("output_dir", "run_name", "preset"):
        settings.pop(name, None)
    return PRESETS["tiny"] | {"preset": "tiny", "output_dir": "a-run"}


def check_call(call: list[str], capsys) -> None:
    """Every flag is one that the program has, with a value that it takes, and no flag of main.py is idle."""
    arguments = arguments_of(call)
    if arguments == ["--help"]:
        with pytest.raises(SystemExit):
            parse_args(arguments)
    elif arguments is not None:
        parse_args(arguments, of_a_run)
        assert capsys.readouterr().err == ""
    elif call[0] == "pip":
        assert call[1] == "install"
        assert all((ROOT / file).is_file() for flag, file in pairwise(call) if flag == "-r")
    elif call[0] == "hf":
        assert call[1:] == ["auth", "login"]
    elif call[1] == "-m":
        assert call[2] in ("venv", "pytest")
        assert all((ROOT / word).exists() for word in call[3:] if word.startswith("tests"))
    else:
        source = (ROOT / call[1]).read_text(encoding="utf-8")
        for flag in (word for word in call[2:] if word.startswith("--")):
            assert f'"{flag}"' in source, f"{call[1]} has no {flag}"


@pytest.mark.parametrize("name", SHELL)
def test_a_block_of_shell_calls_what_there_is(name, tmp_path, capsys):
    for call in calls_of(SHELL[name], tmp_path):
        check_call(call, capsys)


INLINE = re.compile(r"`((?:python|torchrun) [^`]+)`")
BLANK = re.compile(r"\.\.\.|\b[A-Z]{4,}\b")  # something to be filled in


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_command_within_a_line_calls_what_there_is(page, capsys):
    prose = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for text in INLINE.findall(prose):
        if not BLANK.search(text):
            check_call(shlex.split(text), capsys)


def test_every_flag_that_is_named_is_there():
    """Main.py's, or one that a script of benchmarks/ or tests/ has."""
    ours = {flag for action in build_parser()._actions for flag in action.option_strings}
    scripts = [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "tests").glob("*.py")]
    theirs = "".join(script.read_text(encoding="utf-8") for script in scripts if script.name != Path(__file__).name)
    for page in PAGES:
        for flag in re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", page.read_text(encoding="utf-8")):
            assert flag in ours or flag in NOT_OURS or f'"{flag}"' in theirs, f"{page.name}: {flag}"


# --------------------------------------------------------------------------------------------------------------------
# Dry runs
# --------------------------------------------------------------------------------------------------------------------

MODELS = ("gpt2", "MODEL", "stories260K", "SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct")
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
SMALLER = {
    "batch_size": 4,
    "mini_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "max_new_tokens": 4,
    "max_prompt_length": 24,
    "eval_samples": 4,
    "sft_batch_size": 2,
    "reward_batch_size": 2,
}


THERE = {"--update": "1", "--row": "1"}  # what the chain's run has: two updates of four rows


def smaller(arguments: list[str]) -> list[str]:
    """Flags that make a command quick: the chain's sizes where it is used, smaller steps in any case."""
    if "--base_model_name" in arguments or "--run_name" in arguments:
        return [part for name, value in SMALLER.items() for part in (f"--{name}", str(value))]
    given = {word.removeprefix("--") for word in arguments}
    return flags(**{name: value for name, value in SETTINGS.items() if name not in given})


def value_of(flag: str, arguments: list[str]) -> str:
    return arguments[arguments.index(flag) + 1] if flag in arguments else ""


@pytest.fixture
def world(workplace, monkeypatch) -> Path:
    """The chain's folder with everything that the pages' commands name: models, rows, rewards."""
    for name in MODELS:
        shutil.copytree("saved_models/tiny/sft", name)
        tokenizer = AutoTokenizer.from_pretrained(name)
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(name)
    rows = []
    for review in movie_reviews(60, seed=1):
        start = review["text"][:20]
        rows.append(review | {"query": start, "prompt": start, "chosen": "a good film", "rejected": "a bad film"})
    for folder in ("imdb", "toxicity", "pairs_a", "pairs_b"):
        Path(folder).mkdir()
    files = ("prompts.jsonl", "texts.jsonl", "openings.jsonl", "instructions.jsonl", "pairs_a/train.jsonl")
    for file in (*files, "pairs_b/train.jsonl", "imdb/train.jsonl", "imdb/test.jsonl"):
        Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copy("imdb/train.jsonl", "toxicity/train.jsonl")
    reward = next(text for name, text in PYTHON.items() if name.startswith("README") and "def reward(" in text)
    for file in ("my_reward.py", "r.py"):
        Path(file).write_text(reward)
    shutil.copytree(ROOT / "benchmarks", "benchmarks")
    analyzer = SimpleNamespace(polarity_scores=lambda text: {"compound": text.count("good") / 10})
    words = SimpleNamespace(SentimentIntensityAnalyzer=lambda: analyzer)
    monkeypatch.setitem(sys.modules, "vaderSentiment", SimpleNamespace(vaderSentiment=words))
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", words)
    monkeypatch.setitem(sys.modules, "profanity_check", SimpleNamespace(predict_prob=lambda texts: [0.1] * len(texts)))
    return workplace


LEFT_BY = {"sft": "sft", "reward": "reward", "train": "ppo"}  # task: what of the chain is like its result


def put(result: str, place: str, **settings: str) -> None:
    """A folder such as the chain has, in a place, with other settings."""
    shutil.copytree(Path("saved_models/tiny") / result, place)
    config = Path(place) / "run_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))


def prepare(task: str, arguments: list[str]) -> None:
    """Runs where a task that uses some looks for them, and a reward model that another block trains."""
    model = value_of("--reward_model_path", arguments)
    if model and not Path(model).exists():
        put("reward", model)
    if task in USES_A_RUN:
        places = [word.split("=")[-1] for flag, word in pairwise(arguments) if flag == "--policies"]
        for place in filter(None, [value_of("--output_dir", arguments), *places]):
            if not Path(place).exists():
                put("ppo", place)


def leave(task: str, arguments: list[str]) -> None:
    """What the command would have left, for those after it."""
    place = value_of("--output_dir", arguments)
    if place and task in LEFT_BY:
        put(LEFT_BY[task], place, length_range=value_of("--length_range", arguments))


@pytest.mark.parametrize("name", SHELL)
def test_the_commands_of_a_block_can_be_dry_run(name, world, tmp_path_factory, capsys):
    calls = calls_of(SHELL[name], tmp_path_factory.mktemp("shell"))
    for arguments in filter(None, map(arguments_of, calls)):
        if any(words in " ".join(arguments) for words in NOT_DRY_RUN):
            continue
        task = value_of("--task", arguments)
        prepare(task, arguments)
        at_hand = [THERE.get(flag, word) for flag, word in pairwise(["", *arguments])]
        code = run_main(*at_hand, *smaller(arguments), "--dry_run")
        said = capsys.readouterr()
        assert code == 0, (arguments, said.err)
        assert "dry run: " in said.out or task == "generate"
        leave(task, arguments)


def test_every_reason_not_to_run_is_one_of_a_command_that_is_printed():
    everything = "\n".join(SHELL.values())
    assert all(words in everything for words in NOT_DRY_RUN)


# --------------------------------------------------------------------------------------------------------------------
# Python
# --------------------------------------------------------------------------------------------------------------------


def is_run_here(name: str) -> bool:
    return not any(name.startswith(words) or PYTHON[name].startswith(words) for words in NOT_RUN_HERE)


@pytest.mark.parametrize("name", [name for name in PYTHON if is_run_here(name)])
def test_a_block_of_python_runs(name, workplace, monkeypatch, capsys):
    """In the chain's folder, with its settings in place of tiny's own."""
    monkeypatch.setitem(PRESETS, "tiny", PRESETS["tiny"] | SETTINGS)
    defined = {"__name__": "snippet"}
    exec(compile(PYTHON[name], name, "exec"), defined)
    if "reward" in defined:
        assert defined["reward"](["a"], ["so good!!"], [{}]) == [2 - 9 / 100]
    if "print(rollout." in PYTHON[name]:
        assert capsys.readouterr().out.count("| reward ") == 4
