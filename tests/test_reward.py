"""Reward terms, their weights and signs, and the checks on a user's own function."""

import math
import os
import re
import sys
from functools import partial

import numpy as np
import pytest
import torch
from helpers import assert_close
from micro import micro_config
from tiny_models import GPT2_SIZE, NO_DROPOUT, letter_tokenizer, randomise, tiny_policy
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput

import reward
import reward_model
from config import Config, RunError, UsageError
from dataset import Row
from encoding import text_ids
from loading import save_policy
from reward import (
    check_weights,
    checked_scores,
    length_term,
    load_reward_function,
    load_reward_terms,
    needs_reward_model,
    repetition,
    term_weights,
    total_reward,
)
from reward_model import classifier_term, label_index, load_reward_model, reading_of, reward_from_logits, text_logits
from sft import new_tokenizer

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


def test_a_term_that_is_given_two_weights_is_refused():
    with pytest.raises(UsageError, match=r"--reward_weights 'length=1,reward_fn=1, length=2' gives length two weights"):
        term_weights(micro_config(reward_weights="length=1,reward_fn=1, length=2"))


def test_weights_are_read_from_text():
    def weights(text: str, **settings) -> dict[str, float]:
        return term_weights(micro_config(reward_weights=text, **settings))

    assert weights("reward_model=1.5, reward_fn=-2e-1,") == {"reward_model": 1.5, "reward_fn": -0.2}
    assert weights("") == {"reward_model": 1.0} and weights("", reward_fn="mine.py:f") == {"reward_fn": 1.0}
    for wrong in ("reward_model", "reward_model=", "reward_model=1=2", "=much", "reward_model=nan", "reward_model=inf"):
        with pytest.raises(UsageError, match=f"--reward_weights is 'length=1,{wrong}', expected name=number"):
            weights(f"length=1,{wrong}")


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
        ({"reward_weights": "reward_model=-1"}, ["reward_model"]),
        ({"reward_weights": "repetition=-1"}, ["repetition"]),
        ({"reward_weights": "length=1,reward_model=0", "length_range": "1,2"}, ["length", "reward_model"]),
        ({"length_range": "1,2"}, ["reward_model"]),
    ],
)
def test_the_weights_choose_the_terms_and_without_them_a_function_replaces_the_classifier(
    settings, expected, function, monkeypatch
):
    monkeypatch.setattr(reward, "classifier_term", lambda *_: constant(1.0))
    config = micro_config(**settings | ({"reward_fn": function} if "reward_fn" in settings else {}))
    assert list(load_reward_terms(config, "classifier", CPU)) == expected
    assert needs_reward_model(config) == ("reward_model" in expected)


def test_a_weight_for_a_term_that_is_not_there_is_refused(function):
    config = micro_config(reward_fn=function, reward_weights="reward_fm=1")
    known = "reward_model, reward_fn, repetition, length"
    with pytest.raises(UsageError, match=rf"'reward_fm'; the terms are {known}; did you mean reward_fn\?"):
        load_reward_terms(config, "classifier", CPU)


def test_a_function_and_its_weight_need_each_other(function):
    """Neither may be left out silently where the weights choose the terms."""
    with pytest.raises(UsageError, match=r"--reward_weights 'reward_fn=1' needs --reward_fn FILE\.py:NAME"):
        load_reward_terms(micro_config(reward_weights="reward_fn=1"), "classifier", CPU)
    with pytest.raises(UsageError, match="--reward_weights 'repetition=-1' needs a weight for reward_fn"):
        load_reward_terms(micro_config(reward_fn=function, reward_weights="repetition=-1"), "classifier", CPU)


@pytest.mark.parametrize("text", ["", "5", "5,4", "-1,4", "1,2,3", "low,high", "1.5,4", "4,"])
def test_a_length_range_that_is_none_is_refused(text):
    with pytest.raises(UsageError, match=f"--length_range is '{text}', expected LOW,HIGH in words, 0 <= LOW <= HIGH"):
        load_reward_terms(micro_config(reward_weights="length=1", length_range=text), "classifier", CPU)


def test_a_length_range_is_checked_where_nothing_reads_it(function):
    with pytest.raises(UsageError, match="--length_range is '9,1'"):
        load_reward_terms(micro_config(reward_fn=function, length_range="9,1"), "classifier", CPU)


def test_repetition_by_hand():
    """4 words of which 2 differ; 3 of which 2, whatever their case; none twice, as a full stop belongs to its word."""
    texts = ["the film the\nfilm", "A  a b ", "A good film, good.", "film", "", " \n"]
    expected = [0.5, 1 / 3, 0.0, 0.0, 0.0, 0.0]
    assert_close(repetition(texts, texts, [{}] * 6), expected, atol=1e-7)
    assert_close(repetition([""], ["a " * 100], [{}]), [0.99], atol=1e-7)


def test_repetition_reads_the_response_alone():
    assert repetition(["a a a a"], ["a b"], [{}]).tolist() == [0.0]


def test_length_by_hand():
    """In words, from 2 to 4, both included; the prompt's do not count."""
    responses = ["", "one", "one two", "one,  two\nthree ", "1 2 3 4", "1 2 3 4 5", "a" * 50]
    term = length_term("2, 4")
    assert term(["a b c"] * 7, responses, [{}] * 7).tolist() == [-1.0, -1.0, 0.0, 0.0, 0.0, -1.0, -1.0]
    assert length_term("0,0")(["a"] * 2, ["", "a"], [{}] * 2).tolist() == [0.0, -1.0]


def test_weights_are_signed_so_that_a_higher_total_is_better(monkeypatch):
    """By hand, as positive as each other by the classifier: .8, less .5 x 3/4 for a loop of four, less .1 for too few
    words, and less .5 x 5/6 and .1 for a loop that is too long; so the best text has the highest total."""
    monkeypatch.setattr(reward, "classifier_term", lambda *_: constant(0.8))
    config = micro_config(reward_weights="reward_model=1.0,repetition=-0.5,length=0.1", length_range="3,5")
    terms = load_reward_terms(config, "classifier", CPU)
    responses = [" a fine film indeed", " fine", " fine fine fine fine", " fine" * 6]
    total, values = total_reward(terms, ["I saw it:"] * 4, responses, [{}] * 4, config)
    assert_close(total, [0.8, 0.7, 0.425, 0.8 - 2.5 / 6 - 0.1], atol=1e-6)
    assert total.tolist() == sorted(total.tolist(), reverse=True)
    assert list(values) == ["reward_model", "repetition", "length"]
    assert_close(values["repetition"], [0.0, 0.0, 0.75, 5 / 6], atol=1e-6)
    assert values["length"].tolist() == [0.0, -1.0, 0.0, -1.0]


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

    def score(texts, encode=text_ids):
        assert encode is text_ids
        read.extend(texts)
        return torch.zeros(2)

    monkeypatch.setattr("reward_model.load_reward_model", lambda *_: score)
    monkeypatch.setattr(
        reward_model, "own_reading", lambda config, path, default: reading_of(False, default, config, None)
    )
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
    assert_close(score(reward_label="NEGATIVE"), -positive)
    assert_close(score(reward_output="probability"), positive.sigmoid())
    assert_close(score(reward_output="logprob"), positive.sigmoid().log())


def test_a_function_is_called_with_texts_and_rows(function):
    term = load_reward_function(function)
    rows = [{"answer": 1}, {"answer": 2}]
    assert term(["a", "b"], ["xyz", ""], rows).tolist() == [3.0, 0.0]
    assert sys.modules["user_reward"].calls == [(["a", "b"], ["xyz", ""], rows)]


def test_a_function_that_cannot_be_found_is_refused(function, tmp_path):
    path = function.rpartition(":")[0]
    (tmp_path / "mine.txt").write_text("def lengths(*_): return []")
    for spec in (
        path,
        "lengths",
        f"{tmp_path}/nowhere.py:lengths",
        f"{tmp_path}:lengths",
        f"{tmp_path}/mine.txt:lengths",
    ):
        with pytest.raises(UsageError, match=r"--reward_fn .* expected FILE\.py:NAME with an existing file"):
            load_reward_function(spec)
    with pytest.raises(UsageError, match=r"has no function 'length'; did you mean lengths\?"):
        load_reward_function(f"{path}:length")
    with pytest.raises(UsageError, match="has no function 'number'"):
        load_reward_function(f"{path}:number")


@pytest.mark.parametrize(
    "body",
    ["1 / 0", "raise SystemExit('bye')", "def broken(:", "raise ValueError('one\\ntwo')", "import nowhere_at_all"],
)
def test_a_file_that_cannot_be_run_is_refused(body, tmp_path):
    (tmp_path / "mine.py").write_text(body)
    with pytest.raises(UsageError, match=r"mine\.py cannot be run: \w+: .*mine\.py, line 1\)$") as refusal:
        load_reward_function(f"{tmp_path / 'mine.py'}:reward")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "values",
    [
        [1, 2.5],
        (True, 2.5),
        np.array([1, 2.5]),
        torch.tensor([1, 2.5], requires_grad=True),
        torch.tensor([1, 2.5], dtype=torch.bfloat16),
        [np.float64(1), torch.tensor(2.5)],
    ],
    ids=["list", "tuple", "array", "tensor", "bfloat16", "scalars"],
)
def test_scores_may_be_any_row_of_numbers(values):
    scores = checked_scores(lambda *_: values, "mine.py:f", ["p", "q"], ["a", "b"], [{}, {}])
    assert scores.tolist() == [1.0, 2.5]
    assert scores.dtype == torch.float32 and not scores.requires_grad


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([1.0], "returned 1 scores, expected 2, one a response"),
        ([1.0] * 3, "returned 3 scores, expected 2, one a response"),
        (1.0, "returned float, expected a list of numbers, one a response"),
        (torch.tensor(1.0), "returned Tensor, expected a list of numbers"),
        ({"a": 1.0, "b": 2.0}, "returned dict, expected a list of numbers"),
        ("12", "returned str, expected a list of numbers"),
        ((score for score in [1.0, 2.0]), "returned generator"),
        (None, "returned NoneType"),
        ([[1.0], [2.0]], r"returned \[1.0\] for response 0, expected a finite number"),
        (torch.ones(2, 1), r"returned \[1.0\] for response 0"),
        ([torch.ones(1), torch.ones(1)], r"returned tensor\(\[1.\]\) for response 0"),
        (["1.5", "bad"], "returned '1.5' for response 0, expected a finite number"),
        ([1.0, [2.0, 3.0]], r"returned \[2.0, 3.0\] for response 1"),
        (np.array([1.0, "b"], dtype=object), "returned 'b' for response 1"),
        ([1.0, np.array(["a\nb"])], r"returned array\(\['a\\nb'\].* for response 1"),
        ([1.0, None], "returned None for response 1"),
        ([1.0, 1j], "returned 1j for response 1"),
        ([1.0, 10**60], r"returned 1000+\.\.\.0+ for response 1"),
        ([1e39, 1.0], r"returned 1e\+39 for response 0"),  # more than float32 holds
        ([1.0, math.nan], "returned nan for response 1, expected a finite number"),
        ([-math.inf, 1.0], "returned -inf for response 0"),
    ],
)
def test_scores_that_cannot_be_trained_on_end_the_run(values, words):
    with pytest.raises(RunError, match=words):
        checked_scores(lambda *_: values, "mine.py:f", ["p", "q"], ["a", "b"], [{}, {}])


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return rows[0]['answer']", "raised KeyError: 'answer'"),
        ("raise ValueError('one\\ntwo')", "raised ValueError: one"),
        ("raise SystemExit('bye')", "raised SystemExit: bye"),
        ("assert rows == []", "raised AssertionError: AssertionError"),
    ],
)
def test_an_error_in_the_function_ends_the_run_and_is_named(body, words, tmp_path):
    (tmp_path / "mine.py").write_text(f"def f(prompts, responses, rows):\n    {body}\n")
    with pytest.raises(RunError, match=rf"{words} \(.*/mine\.py, line 2\), for the prompt 'a' and the response 'b'$"):
        load_reward_function(f"{tmp_path / 'mine.py'}:f")(["a"], ["b"], [{}])


def test_the_innermost_line_of_the_users_own_file_is_named(tmp_path):
    """Not that of a library which it calls, nor that of the file in which the function is called."""
    path = tmp_path / "mine.py"
    path.write_text(
        "import json\ndef inner(text):\n    return json.loads(text)\n\ndef f(p, r, rows):\n    return inner('{')\n"
    )
    with pytest.raises(RunError, match=rf"raised JSONDecodeError: .*\({path}, line 3\), for the prompt"):
        load_reward_function(f"{path}:f")(["a"], ["b"], [{}])


def test_only_an_interruption_passes_through_a_function(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def bare(p, r, rows):\n    raise BaseException\ndef interrupted(p, r, rows):\n    raise KeyboardInterrupt\n"
    )
    with pytest.raises(RunError, match="bare raised BaseException: BaseException"):
        load_reward_function(f"{tmp_path}/mine.py:bare")(["a"], ["b"], [{}])
    with pytest.raises(KeyboardInterrupt):
        load_reward_function(f"{tmp_path}/mine.py:interrupted")(["a"], ["b"], [{}])


@pytest.mark.parametrize("parameters", ["responses", "prompts, responses", "p, r, rows, more", "*, prompts, r, rows"])
def test_a_function_that_does_not_take_what_it_is_given_is_refused(parameters, tmp_path):
    (tmp_path / "mine.py").write_text(f"def f({parameters}):\n    return []\n")
    words = rf"--reward_fn .*mine\.py:f takes \({re.escape(parameters)}\), expected \(prompts, responses, rows\)"
    with pytest.raises(UsageError, match=words):
        load_reward_function(f"{tmp_path}/mine.py:f")


def test_a_function_may_do_what_it_likes_with_what_it_is_given(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def f(prompts, responses, rows):\n"
        "    scores = [len(text) for text in responses]\n"
        "    rows[0]['turns'].clear()\n"
        "    for given in (prompts, responses, rows[0], rows):\n"
        "        given.clear()\n"
        "    return scores\n"
    )
    prompts, responses, rows = ["a", "b"], ["xyz", "w"], [Row({"turns": [1, 2]}, 7), {}]
    term = load_reward_function(f"{tmp_path}/mine.py:f")
    for _ in range(2):
        assert term(prompts, responses, rows).tolist() == [3.0, 1.0]
    assert (prompts, responses, rows, rows[0].number) == (["a", "b"], ["xyz", "w"], [{"turns": [1, 2]}, {}], 7)


MEDDLING = """
import os, sys, torch
def meddle():
    os.chdir("/")
    sys.stdout = sys.stderr = open(os.devnull, "w")
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_num_threads(3)
    torch.set_float32_matmul_precision("medium")
    torch.use_deterministic_algorithms(True)
    torch.set_grad_enabled(False)
def meddling(prompts, responses, rows):
    meddle()
    return [1.0 for _ in responses]
def raising(prompts, responses, rows):
    meddle()
    raise ValueError
"""


def shared_state() -> list:
    return [
        (os.getcwd(), sys.stdout, sys.stderr),
        (torch.empty(0).dtype, torch.empty(0).device),
        (torch.get_num_threads(), torch.get_float32_matmul_precision()),
        (torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled()),
    ]


def test_a_function_may_leave_the_process_in_a_folder_that_is_gone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    body = (
        "import os, tempfile\ndef gone(prompts, responses, rows):\n    with tempfile.TemporaryDirectory() as folder:\n"
    )
    (tmp_path / "gone.py").write_text(body + "        os.chdir(folder)\n    return [2.0] * len(responses)\n")
    assert load_reward_function("gone.py:gone")(["a"], ["b"], [{}]).tolist() == [2.0]
    assert os.getcwd() == str(tmp_path)


def test_what_a_function_changes_for_all_is_put_back(tmp_path):
    """When its file is run as when it is called, and where it raises something."""
    before = shared_state()
    for name, text in (("calls.py", MEDDLING), ("runs.py", MEDDLING + "meddle()\n")):
        (tmp_path / name).write_text(text)
        term = load_reward_function(f"{tmp_path / name}:meddling")
        assert shared_state() == before
        assert term(["a"], ["b"], [{}]).tolist() == [1.0]
        assert shared_state() == before
        with pytest.raises(RunError, match="raised ValueError"):
            load_reward_function(f"{tmp_path / name}:raising")(["a"], ["b"], [{}])
        assert shared_state() == before


# ----------------------------------------------------------------------------------------------------------------
# Reward model
# ----------------------------------------------------------------------------------------------------------------

LABELS = {0: "NEGATIVE", 1: "neutral", 2: "POSITIVE"}


@pytest.mark.parametrize(
    ("label", "index"), [("positive", 2), ("NEGATIVE", 0), ("Neutral", 1), ("0", 0), ("1", 1), ("2", 2)]
)
def test_label_by_name_or_index(label, index):
    assert label_index(LABELS, label) == index


@pytest.mark.parametrize("labels", [{0: "LABEL_0"}, {0: "NEGATIVE", 1: "POSITIVE"}])
def test_of_one_or_two_labels_the_last_is_taken_where_none_is_named(labels):
    assert label_index(labels, "") == max(labels)


def test_of_three_labels_one_must_be_named():
    """The last one could be anything."""
    known = r"labels, not '': 0 \(NEGATIVE\), 1 \(neutral\), 2 "
    with pytest.raises(UsageError, match=f"--reward_label must name one of .* {known}"):
        label_index(LABELS, "")


def test_a_label_that_is_named_by_a_number_is_found_by_its_name():
    """As the stars of a review are: the label `2` is not the one at index 2."""
    stars = {0: "1", 1: "2", 2: "3"}
    assert [label_index(stars, label) for label in ("0", "1", "2", "3")] == [0, 0, 1, 2]


def test_an_unknown_label_names_those_there_are_and_the_nearest():
    known = r"0 \(NEGATIVE\), 1 \(neutral\), 2 \(POSITIVE\)"
    with pytest.raises(UsageError, match=rf"--reward_label must name .* labels, not 'good': {known}$"):
        label_index(LABELS, "good")
    with pytest.raises(UsageError, match=rf"--reward_label .* not 'POSITVE': {known}; did you mean positive\?"):
        label_index(LABELS, "POSITVE")


LOGITS = torch.tensor([[0.0, 1.0], [2.0, -1.0]])  # margins 1 and -3
OUTPUTS = {
    "logit": [1.0, -1.0],
    "logprob": [-0.3132617, -3.0485874],  # -log(1 + exp(-1)), -log(1 + exp(3))
    "probability": [0.7310586, 0.0474259],
    "margin": [1.0, -3.0],
}


@pytest.mark.parametrize("output", OUTPUTS)
def test_reward_outputs_of_two_labels_by_hand(output):
    assert_close(reward_from_logits(LOGITS, 1, output), OUTPUTS[output], atol=1e-6)


@pytest.mark.parametrize(
    ("output", "expected"),
    [("logit", 0.693147), ("logprob", -0.693147), ("probability", 0.5), ("margin", 0.0)],
)
def test_reward_outputs_of_three_labels_by_hand(output, expected):
    """exp of the logits: 1, 2, 1, so the middle one has probability 1/2 and odds 1."""
    logits = torch.tensor([[0.0, 0.6931472, 0.0]])
    assert_close(reward_from_logits(logits, 1, output), [expected], atol=1e-6)


@pytest.mark.parametrize("output", OUTPUTS)
def test_a_head_with_one_label_gives_its_logit(output):
    assert_close(reward_from_logits(torch.tensor([[1.5], [-2.0]]), 0, output), [1.5, -2.0], atol=0)


class HandClassifier(PreTrainedModel):
    """Logits that can be worked out by hand: of label l, (l + 1) x the number of real tokens."""

    def __init__(self):
        super().__init__(PreTrainedConfig(id2label=LABELS))
        self.anchor = torch.nn.Parameter(torch.zeros(1))  # a model without parameters has no device
        self.widths = []

    def forward(self, input_ids, attention_mask):
        self.widths.append(tuple(input_ids.shape))
        return SequenceClassifierOutput(logits=attention_mask.sum(1, keepdim=True) * torch.tensor([[1.0, 2.0, 3.0]]))


def test_logits_come_in_the_order_of_the_texts():
    """Texts of like length share a batch, so that little is padding, and the logits come back in the texts' order."""
    classifier = HandClassifier()
    tokenizer = new_tokenizer(["z"], 300, 64)
    texts = ["abcde", "a", "abc", "abcd", "ab"]
    logits = text_logits(classifier, tokenizer, texts, batch_size=2)
    assert logits.tolist() == [[5, 10, 15], [1, 2, 3], [3, 6, 9], [4, 8, 12], [2, 4, 6]]
    assert classifier.widths == [(2, 2), (2, 4), (1, 5)]
    assert text_logits(classifier, tokenizer, []).shape == (0, 3)


@pytest.fixture(scope="module")
def classifier_folder(tmp_path_factory):
    """A random GPT-2 classifier of three labels that reads 16 tokens, with its byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("classifier")
    tokenizer = new_tokenizer(["zz"], 300, 1000)
    size = GPT2_SIZE | {"vocab_size": len(tokenizer), "n_positions": 16, "pad_token_id": tokenizer.pad_token_id}
    config = GPT2Config(**size, **NO_DROPOUT, id2label=LABELS, label2id={name: i for i, name in LABELS.items()})
    randomise(GPT2ForSequenceClassification(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def settings(**overrides) -> Config:
    return Config(**{"reward_label": "2"} | overrides)


def test_reward_model_reads_the_label_that_is_asked_for(classifier_folder):
    rewards = {
        label: load_reward_model(settings(reward_label=label), str(classifier_folder), CPU)(["a film", "b"])
        for label in ("0", "neutral", "positive")
    }
    plain = AutoModelForSequenceClassification.from_pretrained(classifier_folder).eval()
    tokenizer = new_tokenizer(["zz"], 300, 1000)
    with torch.no_grad():
        logits = plain(torch.tensor([tokenizer("a film").input_ids])).logits[0]
    for label, index in (("0", 0), ("neutral", 1), ("positive", 2)):
        assert_close(rewards[label][0], logits[index])
    margin = load_reward_model(settings(reward_output="margin"), str(classifier_folder), CPU)(["a film"])
    assert_close(margin, [logits[2] - (logits[0].exp() + logits[1].exp()).log()])
    assert logits.std() > 0.3


@pytest.mark.parametrize("label", ["good", ""])
def test_a_label_that_is_none_is_refused_and_before_anything_is_trained(label, classifier_folder):
    """Only where the classifier is asked: another term, or another task, has no use for it."""
    path = str(classifier_folder)
    with pytest.raises(UsageError, match=rf"--reward_label .* labels, not '{label}': 0 \(NEGATIVE\), 1 \(neutral\)"):
        load_reward_model(settings(reward_label=label), path, CPU)
    with pytest.raises(UsageError, match=rf"--reward_label .* labels, not '{label}': 0 \(NEGATIVE\), 1 \(neutral\)"):
        check_weights(micro_config(reward_label=label, reward_model_path=path))
    for other in ({"reward_weights": "repetition=-1"}, {"task": "sft"}, {"reward_label": "neutral"}):
        check_weights(micro_config(**{"reward_label": label, "reward_model_path": path} | other))


def test_a_language_model_is_no_classifier(tmp_path):
    """Its head would be random numbers."""
    save_policy(tiny_policy("gpt2"), letter_tokenizer(), tmp_path)
    lack = rf"--reward_model_path {tmp_path} lacks score\.weight of a GPT2ForSequenceClassification; expected a"
    with pytest.raises(UsageError, match=lack):
        load_reward_model(settings(reward_label="0"), str(tmp_path), CPU)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_neither_order_nor_batch_nor_padding_changes_a_reward(classifier_folder, batch_size, monkeypatch):
    texts = ["abcdefghij", "b", "a longer text", "ccc", "dd dd"]
    monkeypatch.setattr("reward_model.text_logits", partial(text_logits, batch_size=batch_size))
    reward_model = load_reward_model(settings(), str(classifier_folder), CPU)
    alone = torch.cat([reward_model([text]) for text in texts])
    assert alone.std() > 0.1
    assert_close(reward_model(texts), alone)
    assert_close(reward_model(texts[::-1]), alone.flip(0))


def test_empty_texts_are_read_alone_as_beside_others(classifier_folder):
    """A policy may come to answer nothing at all, to every prompt of a batch."""
    reward_model = load_reward_model(settings(), str(classifier_folder), CPU)
    empty = reward_model(["", ""])
    assert empty.isfinite().all() and empty[0] == empty[1]
    assert_close(reward_model(["", "a longer text"])[0], empty[0])


def test_a_text_beyond_the_classifiers_length_loses_its_beginning(classifier_folder):
    """One token a letter here, and 16 positions: only the last 16 letters count."""
    reward_model = load_reward_model(settings(), str(classifier_folder), CPU)
    end = "the end is read!"
    assert len(end) == 16
    short = reward_model([end])[0]
    assert reward_model(["beginning, then " + end])[0] == short
    assert reward_model(["x" * 90 + end])[0] == short
    assert abs(reward_model(["another end !!!!"])[0] - short) > 0.1


@pytest.mark.parametrize("output", OUTPUTS)
def test_a_classifier_of_a_single_label_is_loaded_as_a_regression(output, tmp_path):
    """Its logit is the reward whatever `output` says; its one label has the library's name, and there is no second."""
    tokenizer = new_tokenizer(["zz"], 300, 1000)
    size = GPT2_SIZE | {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    model = randomise(GPT2ForSequenceClassification(GPT2Config(**size, **NO_DROPOUT, num_labels=1)))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with torch.no_grad():
        logit = model(torch.tensor([tokenizer("a film").input_ids])).logits[0]
    for label in ("", "0", "label_0"):
        reward_model = load_reward_model(settings(reward_label=label, reward_output=output), str(tmp_path), CPU)
        assert_close(reward_model(["a film"]), logit)
    with pytest.raises(UsageError, match=r"--reward_label .* labels, not '1': 0 \(LABEL_0\)$"):
        load_reward_model(settings(reward_label="1", reward_output=output), str(tmp_path), CPU)


def test_a_reward_model_is_frozen(classifier_folder, monkeypatch):
    read = []

    def watched(classifier, tokenizer, texts, **others):
        read.append(classifier)
        return text_logits(classifier, tokenizer, texts, **others)

    monkeypatch.setattr("reward_model.text_logits", watched)
    reward_model = load_reward_model(settings(), str(classifier_folder), CPU)
    assert not reward_model(["a"]).requires_grad
    [classifier] = read
    assert not classifier.training
    parameters = list(classifier.parameters())
    assert parameters and not any(parameter.requires_grad for parameter in parameters)


def test_a_reward_file_may_hold_a_dataclass(tmp_path):
    """Which looks its own module up while it is made."""
    path = tmp_path / "mine.py"
    path.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Weight:\n    value: float = 2.0\n"
        "def reward(prompts, responses, rows):\n    return [Weight().value] * len(responses)\n"
    )
    assert load_reward_function(f"{path}:reward")(["a"], ["b"], [{}]).tolist() == [2.0]


def test_a_language_model_is_refused_as_a_reward_before_anything_is_trained(tmp_path):
    GPT2Config(architectures=["GPT2LMHeadModel"]).save_pretrained(tmp_path / "lm")
    GPT2Config(architectures=["GPT2ForSequenceClassification"]).save_pretrained(tmp_path / "classifier")
    GPT2Config().save_pretrained(tmp_path / "silent")
    with pytest.raises(UsageError, match=r"lm is a language model \(GPT2LMHeadModel\); expected a model saved for seq"):
        check_weights(Config(task="train", reward_model_path=str(tmp_path / "lm")))
    for name in ("classifier", "silent"):
        check_weights(Config(task="train", reward_model_path=str(tmp_path / name)))
