"""Rewards of a user's own: functions, weighted sums of terms, and scores normalised over the run."""

import re
import shutil
import statistics

import pytest
from helpers import read_log, read_stats
from micro import assert_refused, flags, last_line_of_errors, listing, run_main

pytest_plugins = ["micro"]
pytestmark = pytest.mark.usefixtures("no_figures")

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
        ("too_few", "returned 1 scores, expected 4, one a response"),
        ("nested", "returned [1.0] for response 0, expected a finite number"),
        ("text", "returned 'good' for response 0, expected a finite number"),
        ("nothing", "returned NoneType"),
        ("nan", "returned nan for response 0"),
        ("raising", "raised ZeroDivisionError: division by zero (rewards.py, line 21)"),
    ],
)
def test_a_reward_function_that_misbehaves_ends_the_run(function, words, workplace, capsys):
    """At run time, hence code 1; a progress bar may stand above the sentence, but not on its line."""
    (workplace / "rewards.py").write_text(REWARDS)
    before = listing(workplace)
    assert run_main("--task", "train", "--reward_fn", f"rewards.py:{function}", *flags()) == 1
    assert last_line_of_errors(capsys).startswith(f"error: --reward_fn rewards.py:{function} {words}")
    assert listing(workplace) == before


COMPOSITE = ["--reward_weights", "reward_model=1.0,repetition=-0.5,length=0.1", "--length_range", "2,6"]


def test_a_composite_reward_is_logged_term_by_term(workplace):
    """The terms of every logged response, worked out anew from its text, and their weighted sum.

    Long responses at a low temperature, so that some of them repeat a word.
    """
    assert run_main("--task", "train", *COMPOSITE, *flags(batch_size=8, temperature=0.2, max_new_tokens=30)) == 0
    folder = workplace / "saved_models/tiny/ppo-2"
    rows = read_log(folder)
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
    assert len({row["reward_repetition"] for row in rows}) > 2
    for row in read_stats(folder):
        own = [r for r in rows if int(r["step"]) == row["step"]]
        for name in names:
            assert row[name] == pytest.approx(sum(float(r[name]) for r in own) / 8, abs=1e-6)


def test_scores_normalised_on_request_have_the_moments_of_the_run(workplace):
    """The mean score of each step, worked out from the rewards of every response logged up to it."""
    assert run_main("--task", "train", "--normalize_scores", "--missing_eos_penalty", "0", *flags()) == 0
    folder = workplace / "saved_models/tiny/ppo-2"
    rewards = [float(row["reward"]) for row in read_log(folder)]
    for row in read_stats(folder):
        so_far = rewards[: 4 * row["step"] + 4]
        wanted = (statistics.mean(so_far[-4:]) - statistics.mean(so_far)) / statistics.stdev(so_far)
        assert row["score"] == pytest.approx(wanted, abs=1e-3)
        assert row["reward"] == pytest.approx(statistics.mean(so_far[-4:]), abs=1e-6)
    assert rewards[:4] != [0.0] * 4


def test_a_composite_without_the_classifier_trains_none(workplace, capsys):
    shutil.rmtree(workplace / "saved_models/tiny/reward")
    weights = ["--reward_weights", "length=1,repetition=-1", "--length_range", "2,6"]
    assert run_main("--task", "train", "--dry_run", *weights, *flags()) == 0
    assert not (workplace / "saved_models/tiny/reward").exists()
    output = capsys.readouterr().out
    assert len(re.findall(r"^  length -?[01]\.000, repetition 0\.\d{3}$", output, re.MULTILINE)) == 3
