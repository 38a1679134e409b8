"""The generate task from outside: where prompts come from, where responses go, and what is refused."""

import io
import json
import math
import os
import shutil
import sys

import pytest
from micro import PPO, assert_refused, run_main

pytest_plugins = ["micro"]


class Terminal(io.StringIO):
    """Standard input with somebody at it."""

    def isatty(self) -> bool:
        return True


def generated(capsys, *arguments: str) -> str:
    """What `generate` prints: responses alone, as the run is named on standard error."""
    assert run_main("--task", "generate", *arguments) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith(f"using {PPO}\n")
    return captured.out


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
    assert generated(capsys, "--prompt", "The film", "--seed", "9") != greedy


def test_generate_draws_several_samples(workplace, capsys):
    generated(capsys, "--prompt", "The film", "--num_samples", "3", "--output", "out.jsonl")
    rows = [json.loads(line) for line in (workplace / "out.jsonl").read_text().splitlines()]
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


REWARDS = """
def letters(prompts, responses, rows):
    return [len(row["answer"]) for row in rows]

def growing(prompts, responses, rows, seen=[]):
    seen += rows
    return [1 / (len(seen) < 4) for _ in rows]
"""


def written(capsys, function: str, *arguments: str) -> tuple[list[dict], str]:
    """The rows that `generate` writes with a reward function, and what it says on standard error but for the run."""
    command = ("--task", "generate", *arguments, "--output", "out.jsonl", "--reward_fn", f"rewards.py:{function}")
    assert run_main(*command) == 0
    with open("out.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file], capsys.readouterr().err.removeprefix(f"using {PPO}\n")


def test_responses_are_written_where_their_reward_fails(workplace, capsys):
    """As null, and it is said how many and why; those of other batches have theirs."""
    (workplace / "rewards.py").write_text(REWARDS)
    rows, errors = written(capsys, "letters", "--prompt", "The film", "--prompt", "A comedy")
    assert [(row["prompt"], row["reward"]) for row in rows] == [("The film", None), ("A comedy", None)]
    assert all(row["response"] for row in rows)
    assert errors.startswith(
        "note: 2 of 2 have null for a reward: --reward_fn rewards.py:letters raised KeyError: 'answer' "
        "(rewards.py, line 3), for the prompt 'The film' and the response "
    )
    assert errors.endswith("; --without_reward leaves it out\n") and errors.count("\n") == 1
    (workplace / "out.jsonl").unlink()
    rows, errors = written(capsys, "growing", "--prompt", "The film", "--num_samples", "5", "--batch_size", "3")
    assert [row["reward"] for row in rows] == [1.0, 1.0, 1.0, None, None]
    assert errors.startswith("note: 2 of 5 have null") and errors.count("\n") == 1


def test_a_reward_is_given_the_columns_of_the_file(workplace, capsys):
    (workplace / "rewards.py").write_text(REWARDS)
    (workplace / "p.jsonl").write_text('{"query": "The film", "answer": "abc"}\n{"text": "A comedy", "answer": "d"}\n')
    rows, errors = written(capsys, "letters", "--prompts", "p.jsonl")
    assert [(row["prompt"], row["reward"]) for row in rows] == [("The film", 3.0), ("A comedy", 1.0)]
    assert errors == ""


def test_responses_are_written_without_their_reward_on_request(workplace, capsys):
    """Then the reward need not even be there; else it is missed before any response is drawn."""
    generate = ["--task", "generate", "--prompt", "The film", "--output", "out.jsonl"]
    shutil.rmtree(workplace / "saved_models/tiny/reward")
    assert_refused(capsys, workplace, generate, "or write responses alone with --without_reward")
    assert run_main(*generate, "--without_reward") == 0
    (row,) = map(json.loads, (workplace / "out.jsonl").read_text(encoding="utf-8").splitlines())
    assert list(row) == ["prompt", "response"] and row["response"]


def test_a_prompt_that_cannot_be_asked_is_refused_before_any_is_answered(workplace, monkeypatch, capsys):
    (workplace / "p.jsonl").write_text('"The film"\n"A comedy"\n[{"role": "user", "content": "Hello"}]\n')
    monkeypatch.setattr("ask.respond", None)
    arguments = ["--task", "generate", "--prompts", "p.jsonl", "--batch_size", "1"]
    assert_refused(capsys, workplace, arguments, "(--prompt_column 'text', row 3), and the tokenizer of")


def test_generate_answers_lines_from_standard_input(workplace, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("The film\n\nA comedy\n"))
    output = generated(capsys)
    assert output.startswith("The film") and "\nA comedy" in output
    monkeypatch.setattr(sys, "stdin", io.StringIO("The film\n"))
    assert "2 responses: new/out.jsonl" in generated(capsys, "--num_samples", "2", "--output", "new/out.jsonl")
    assert len((workplace / "new/out.jsonl").read_text().splitlines()) == 2


def test_generate_asks_on_a_terminal_until_the_input_ends(workplace, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", Terminal("The film\n\nA comedy\n"))
    asked, *answers = generated(capsys).split("> ")
    assert "end with Ctrl-D" in asked
    first, blank, second, end = answers
    assert (first.startswith("The film"), second.startswith("A comedy")) == (True, True)
    assert (blank.strip(), end.strip()) == ("", "")


def test_generate_takes_the_newest_run(workplace, capsys):
    """By when it was saved, not by its name."""
    second = PPO.with_name("ppo-2")
    shutil.copytree(PPO, second)
    for newest, older in ((second, PPO), (PPO, second)):
        os.utime(older / "value_head.safetensors", (1e9, 1e9))
        os.utime(newest / "value_head.safetensors", (2e9, 2e9))
        assert run_main("--task", "generate", "--prompt", "The film") == 0
        assert capsys.readouterr().err.startswith(f"using {newest}\n")


BAD_PROMPTS = {
    "nowhere.txt": (None, "[Errno 2] No such file"),
    "empty.txt": ("\n \n", "it holds no prompts"),
    "broken.json": ('["The film"', "Expecting ',' delimiter: line 1 column 12"),
    "broken.jsonl": ('{"prompt": "The film"}\n{"prompt":\n', 'line 2: found {"prompt":, expected a JSON text'),
    "keys.jsonl": (
        '{"title": "The film"}\n',
        'line 1: found {"title": "The film"}, expected a JSON text or a list of messages, or an object',
    ),
    "numbers.json": ("[1, 2]", "entry 1: found 1, expected a JSON text"),
    "mapping.json": ('{"prompt": "The film"}', "it holds a dict, expected a list of prompts"),
    "blank.json": ('["The film", " "]', 'entry 2: found " ", expected a JSON text'),
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_generate_refuses_prompts_that_it_cannot_read(name, workplace, capsys):
    text, words = BAD_PROMPTS[name]
    if text is not None:
        (workplace / name).write_text(text)
    assert_refused(capsys, workplace, ["--task", "generate", "--prompts", name], f"error: --prompts {name}: {words}")


def test_generate_refuses_an_empty_prompt_and_what_cannot_be_done(workplace, monkeypatch, capsys):
    generate, too_long = ["--task", "generate"], "--max_new_tokens 48 is more than the 47 tokens"
    assert_refused(capsys, workplace, [*generate, "--prompt", ""], "a prompt is empty")
    assert_refused(capsys, workplace, [*generate, "--prompt", "The film", "--prompt", " "], "a prompt is empty")
    for stdin in (io.StringIO(), io.StringIO("\n \n")):
        monkeypatch.setattr(sys, "stdin", stdin)
        assert_refused(capsys, workplace, generate, "there is no prompt; give --prompt")
    monkeypatch.setattr(sys, "stdin", Terminal())
    assert_refused(capsys, workplace, [*generate, "--output", "out.jsonl"], "there is no prompt; give --prompt")
    assert_refused(capsys, workplace, [*generate, "--prompt", "A", "--max_new_tokens", "48"], too_long)
    (workplace / "file").write_text("no folder")
    output = [*generate, "--prompt", "The film", "--output", "file/out.jsonl"]
    assert_refused(capsys, workplace, output, "file is not a folder")
    output[-1] = "file"
    assert_refused(capsys, workplace, output, "--output file exists already; name another file")
    assert (workplace / "file").read_text() == "no folder"
