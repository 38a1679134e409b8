"""Reward terms, their weights and signs, and the checks on a user's own function."""

import math

import numpy as np
import pytest
import torch
from micro import micro_config

import reward
from config import RunError, UsageError
from reward import (
    check_scores,
    classifier_term,
    load_reward_function,
    load_reward_terms,
    needs_reward_model,
    parse_weights,
    total_reward,
)

pytest_plugins = ["micro"]
CPU = torch.device("cpu")


@pytest.fixture
def function(tmp_path):
    """A function that writes down what it is called with and gives each response's length."""
    path = tmp_path / "mine.py"
    path.write_text(
        "calls = []\n"
        "def lengths(prompts, responses, rows):\n"
        "    calls.append((prompts, responses, rows))\n"
        "    return [len(response) for response in responses]\n"
        "number = 3\n"
    )
    return f"{path}:lengths"


def constant(value: float):
    return lambda prompts, responses, rows: torch.full((len(responses),), value)


def test_weights_are_read_from_text():
    assert parse_weights("reward_model=1.5, reward_fn=-2e-1") == {"reward_model": 1.5, "reward_fn": -0.2}
    assert parse_weights("") == {}
    for text in ("reward_model", "reward_model=", "reward_model=much", "reward_model=nan", "reward_model=inf"):
        with pytest.raises(UsageError, match="--reward_weights"):
            parse_weights(text)


def test_the_reward_is_the_weighted_sum_of_its_terms():
    """By hand: 0.5 (1, 2) - 2 (3, 4) and, with weight 1 where none is given, + (5, 5); each term as it is."""
    terms = {
        "a": lambda *_: torch.tensor([1.0, 2.0]),
        "b": lambda *_: torch.tensor([3.0, 4.0]),
        "c": constant(5.0),
    }
    total, values = total_reward(terms, ["x", "y"], ["s", "t"], [{}, {}], micro_config(reward_weights="a=0.5,b=-2"))
    assert total.tolist() == [-0.5, -2.0]
    assert {name: value.tolist() for name, value in values.items()} == {"a": [1, 2], "b": [3, 4], "c": [5, 5]}


def test_a_weight_of_zero_reports_a_term_without_counting_it():
    config = micro_config(reward_weights="a=0")
    total, values = total_reward({"a": constant(7.0), "b": constant(1.0)}, ["x"], ["y"], [{}], config)
    assert total.tolist() == [1.0] and values["a"].tolist() == [7.0]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ["reward_model"]),
        ({"reward_fn": True}, ["reward_fn"]),
        ({"reward_fn": True, "reward_weights": "reward_fn=2"}, ["reward_fn"]),
        ({"reward_fn": True, "reward_weights": "reward_fn=2,reward_model=1"}, ["reward_fn", "reward_model"]),
    ],
)
def test_a_function_replaces_the_classifier_unless_both_are_weighted(settings, expected, function, monkeypatch):
    monkeypatch.setattr(reward, "classifier_term", lambda *_: constant(1.0))
    config = micro_config(**settings | ({"reward_fn": function} if "reward_fn" in settings else {}))
    assert list(load_reward_terms(config, "classifier", CPU)) == expected
    assert needs_reward_model(config) == ("reward_model" in expected)


def test_a_weight_for_a_term_that_is_not_there_is_refused(function):
    config = micro_config(reward_fn=function, reward_weights="reward_fm=1")
    with pytest.raises(UsageError, match=r"'reward_fm'; the terms here are reward_fn; did you mean reward_fn\?"):
        load_reward_terms(config, "classifier", CPU)


@pytest.mark.parametrize(
    ("reward_input", "separator", "expected"),
    [
        ("prompt_response", "", ["The film is good", "A"]),
        ("prompt_response", "\n", ["The film\n is good", "A\n"]),
        ("response", "\n", [" is good", ""]),
    ],
)
def test_the_classifier_reads_the_text_that_it_should(reward_input, separator, expected, monkeypatch):
    read = []
    monkeypatch.setattr(reward, "load_reward_model", lambda *_: lambda texts: read.extend(texts) or torch.zeros(2))
    term = classifier_term(micro_config(reward_input=reward_input), "classifier", CPU, separator)
    term(["The film", "A"], [" is good", ""], [{}, {}])
    assert read == expected


def test_the_rewarded_label_decides_the_sign(chain):
    """The margin of one of two labels is minus that of the other; by default the last one, POSITIVE, is rewarded."""
    path = str(chain.root / "saved_models/tiny/reward")

    def score(**settings) -> torch.Tensor:
        (term,) = load_reward_terms(micro_config(**{"reward_output": "margin"} | settings), path, CPU).values()
        return term(["The film"] * 2, [" is a joy.", " is dull."], [{}, {}])

    positive = score(reward_label="positive")
    assert positive.tolist() == score().tolist() == score(reward_label="1").tolist()
    assert positive.abs().min() > 1e-3
    torch.testing.assert_close(score(reward_label="NEGATIVE"), -positive, rtol=0, atol=1e-5)
    probability = score(reward_output="probability")
    torch.testing.assert_close(probability, positive.sigmoid(), rtol=0, atol=1e-5)
    torch.testing.assert_close(score(reward_output="logprob"), positive.sigmoid().log(), rtol=0, atol=1e-5)


def test_a_function_is_called_with_texts_and_rows(function):
    term = load_reward_function(function)
    rows = [{"answer": 1}, {"answer": 2}]
    assert term(["a", "b"], ["xyz", ""], rows).tolist() == [3.0, 0.0]
    assert term.__closure__ is not None
    calls = next(cell.cell_contents for cell in term.__closure__ if callable(cell.cell_contents)).__globals__["calls"]
    assert calls == [(["a", "b"], ["xyz", ""], rows)]


def test_a_function_that_cannot_be_found_is_refused(function, tmp_path):
    path = function.rpartition(":")[0]
    for spec in (path, "lengths", f"{tmp_path}/nowhere.py:lengths", f"{tmp_path}:lengths"):
        with pytest.raises(UsageError, match="--reward_fn"):
            load_reward_function(spec)
    with pytest.raises(UsageError, match=r"has no function 'length'; did you mean lengths\?"):
        load_reward_function(f"{path}:length")
    with pytest.raises(UsageError, match="has no function 'number'"):
        load_reward_function(f"{path}:number")


@pytest.mark.parametrize("body", ["1 / 0", "raise SystemExit('bye')", "def broken(:"])
def test_a_file_that_cannot_be_imported_is_refused(body, tmp_path):
    (tmp_path / "mine.py").write_text(body)
    with pytest.raises(UsageError, match=r"mine\.py cannot be imported"):
        load_reward_function(f"{tmp_path / 'mine.py'}:reward")


@pytest.mark.parametrize(
    "values",
    [[1, 2.5], (1, 2.5), np.array([1, 2.5]), torch.tensor([1, 2.5], requires_grad=True), [np.float64(1), 2.5]],
    ids=["list", "tuple", "array", "tensor", "scalars"],
)
def test_scores_may_be_any_row_of_numbers(values):
    scores = check_scores(values, 2, "mine.py:f")
    assert scores.tolist() == [1.0, 2.5]
    assert scores.dtype == torch.float32 and not scores.requires_grad


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([1.0], r"returned \[1\] scores, expected 2, one a response"),
        ([[1.0], [2.0]], r"returned \[2, 1\] scores"),
        (1.0, r"returned \[\] scores"),
        (["good", "bad"], "returned list, expected a list of numbers"),
        (None, "returned NoneType"),
        ([1.0, None], "returned list"),
        ([1.0, math.nan], "returned nan for response 1, expected a finite number"),
        ([-math.inf, 1.0], "returned -inf for response 0"),
    ],
)
def test_scores_that_cannot_be_trained_on_end_the_run(values, words):
    with pytest.raises(RunError, match=words):
        check_scores(values, 2, "mine.py:f")


def test_an_error_in_the_function_ends_the_run_and_is_named(tmp_path):
    (tmp_path / "mine.py").write_text("def f(prompts, responses, rows):\n    return rows[0]['answer']\n")
    with pytest.raises(RunError, match="raised KeyError: 'answer'"):
        load_reward_function(f"{tmp_path / 'mine.py'}:f")(["a"], ["b"], [{}])
