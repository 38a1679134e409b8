"""The evaluate task from outside: its figures, its files, and what is refused."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from helpers import read_table
from micro import PPO, QUESTIONS, assert_refused, flags, listing, micro_config, question_flags, run_main

from dataset import PARTS, load_rows
from reviews import movie_reviews

pytest_plugins = ["micro"]
pytestmark = pytest.mark.usefixtures("no_figures")


def test_evaluate_prints_its_figures_and_writes_them(workplace, capsys):
    before = listing(workplace)
    assert run_main("--task", "evaluate") == 0
    output, after = capsys.readouterr().out, listing(workplace)
    figures = ["positive", "length", "distinct_bigrams", "ended", "kl", "perplexity"]
    assert re.search(r"^ +before +after   should be$", output, re.MULTILINE)
    for name in figures:
        assert re.search(rf"^{name} +-?\d+\.\d{{3}} +-?\d+\.\d{{3}}   .*: (yes|NO)$", output, re.MULTILINE)
    assert "reward on 4 held-out prompts" in output and "independent judge" in output
    results = {"comparison.json", "samples.csv", "test_results_reviews.csv"}
    results = {f"{PPO}/results", f"{PPO}/plots/comparison.png", *(f"{PPO}/results/{name}" for name in results)}
    made = {name for name in after.keys() - before.keys() if not name.startswith("saved_models/tiny/judge")}
    assert made == results and {name: after[name] for name in before} == before
    comparison = json.loads(after[f"{PPO}/results/comparison.json"])
    assert comparison["policies"] == {"before": "saved_models/tiny/sft", "after": str(PPO)}
    assert list(comparison["splits"]) == ["test"]
    own = comparison["splits"]["test"]["figures"]
    assert set(own) == {"before", "after"} and own["before"]["kl"] == 0 < own["after"]["kl"]
    assert all({*figures, "reward", "reward_reward_model_std", "repetition"} <= set(own[name]) for name in own)
    assert_samples(workplace / PPO / "results/samples.csv")


def assert_samples(path: Path) -> None:
    """Best difference first."""
    rows = read_table(path)
    assert len(rows) == 4
    names = ["query", "response_before", "response_after", "reward_before", "reward_after", "reward_diff"]
    assert list(rows[0]) == names
    differences = [float(row["reward_diff"]) for row in rows]
    assert differences == sorted(differences, reverse=True) and differences[0] > differences[-1]
    for row in rows:
        difference = float(row["reward_after"]) - float(row["reward_before"])
        assert difference == pytest.approx(float(row["reward_diff"]), abs=1e-9)


def test_evaluate_compares_any_number_of_policies(workplace, no_bars, capsys):
    """The first is the reference; a policy that is it twice differs from it in nothing."""
    sft = "saved_models/tiny/sft"
    policies = {"base": sft, "ppo": str(PPO), "again": sft}
    flag = [part for name, path in policies.items() for part in ("--policies", f"{name}={path}")]
    assert run_main("--task", "evaluate", *flag) == 0
    output = capsys.readouterr().out
    assert "should be" not in output
    number, interval = r"-?\d+\.\d{3}", r"[+-]\d+\.\d{3} \[[+-]\d+\.\d{3}, [+-]\d+\.\d{3}\]"
    line = rf"^reward +({number}) +{number} +({number})   ppo - base {interval}   again - base (.*)$"
    base, again, difference = re.search(line, output, re.MULTILINE).groups()
    assert base == again and difference == "+0.000 [+0.000, +0.000]"
    assert re.search(r"^  base .*\n  ppo .*\n  again .*$", output, re.MULTILINE)
    comparison = json.loads((workplace / PPO / "results/comparison.json").read_text())
    assert comparison["policies"] == policies
    split = comparison["splits"]["test"]
    figures = split["figures"]
    assert list(figures) == [*policies] and figures["base"] == figures["again"] != figures["ppo"]
    assert set(split["differences"]) == {"ppo", "again"}
    shift = figures["ppo"]["reward"] - figures["base"]["reward"]
    assert split["differences"]["ppo"]["reward"]["difference"] == pytest.approx(shift) != 0
    rows = read_table(workplace / PPO / "results/samples.csv")
    columns = [f"{kind}_{name}" for kind in ("response", "reward") for name in policies]
    assert list(rows[0]) == ["query", *columns, "reward_diff"]
    assert [float(row["reward_diff"]) for row in rows] == [0.0] * 4  # from first to last


def test_evaluate_reports_rouge_and_values_on_both_splits(t5_folder, questions, no_bars, monkeypatch, capsys):
    """No judge is trained where the model was not: their rows are not set apart there."""
    assert run_main("--task", "train", *question_flags(t5_folder)) == 0
    capsys.readouterr()
    monkeypatch.setattr("evaluation.load_text_judge", lambda *_: pytest.fail("a judge was trained"))
    assert run_main("--task", "evaluate", "--eval_split", "both", "--reference_column", "answer") == 0
    output = capsys.readouterr().out
    assert re.search(r"^rougeL +\d\.\d{3} +\d\.\d{3}$", output, re.MULTILINE)
    (results,) = questions.glob("saved_models/*/ppo/results")
    splits = json.loads((results / "comparison.json").read_text())["splits"]
    files = {"validation": ("val_results_prompts.csv", 4), "test": ("test_results_prompts.csv", 4)}
    assert list(splits) == list(files)
    answers = {row["question"]: row["answer"] for row in QUESTIONS}
    for split, (name, count) in files.items():
        rows = read_table(results / name)
        assert f"on {count} {split} prompts" in output and len(rows) == splits[split]["n_prompts"] == count
        assert all(row["reference"] == answers[row["query"]] for row in rows)
        for policy, figures in splits[split]["figures"].items():
            for column in ("reward", "reward_reward_fn", "rouge1", "rouge2", "rougeL", "value", "length"):
                values = [float(row[f"{column}_{policy}"]) for row in rows]
                assert figures[column] == pytest.approx(sum(values) / count, abs=1e-9)
        assert all({"response_before", "response_after", "reward_diff"} <= set(row) for row in rows)
    samples = read_table(results / "samples.csv")
    assert len(samples) == 8 and "reference" not in samples[0]


def test_evaluate_refuses_policies_that_it_cannot_compare(workplace, t5_folder, capsys):
    sft = "saved_models/tiny/sft"
    for flag, words in {
        sft: f"--policies '{sft}': expected NAME=FOLDER_OR_ID",
        "base=nowhere/at/all": "--policies nowhere/at/all is no folder",
        f"t5={t5_folder}": f"--policies {t5_folder} has another vocabulary than the first policy",
    }.items():
        assert_refused(capsys, workplace, ["--task", "evaluate", "--policies", f"a={sft}", "--policies", flag], words)
    arguments = ["--task", "evaluate", "--reference_column", "summary"]
    assert_refused(capsys, workplace, arguments, "--reference_column 'summary' is no column of the data")


def test_evaluation_refuses_what_training_refuses(workplace, capsys):
    """A KL is only a KL under the distribution that was sampled; and responses must fit the model."""
    for flag in (["--top_k", "5"], ["--temperature", "0"], ["--top_p", "0.9"]):
        assert_refused(capsys, workplace, ["--task", "evaluate", *flag], "are for --task generate")
    for length, words in (
        ("47", "--max_new_tokens 47 the model can read 1 at most: let prompts be cut with --max_prompt_length 1"),
        ("48", "--max_new_tokens 48 is more than the 47 tokens"),
    ):
        assert_refused(capsys, workplace, ["--task", "evaluate", "--max_new_tokens", length], words)


def test_evaluate_takes_a_single_policy(workplace, no_bars):
    """Its figures and samples, and nothing to compare them with."""
    assert run_main("--task", "evaluate", "--policies", "only=saved_models/tiny/sft") == 0
    comparison = json.loads((workplace / PPO / "results/comparison.json").read_text())["splits"]["test"]
    assert list(comparison["figures"]) == ["only"] and comparison["differences"] == {}
    rows = read_table(workplace / PPO / "results/samples.csv")
    assert list(rows[0]) == ["query", "response_only", "reward_only", "reward_diff"]
    assert {float(row["reward_diff"]) for row in rows} == {0.0}


def noting(monkeypatch, place: str, texts_of) -> list[set[str]]:
    """The texts that each call of a function is given, by `texts_of` its arguments."""
    module, name = place.split(".")
    noted, real = [], getattr(sys.modules[module], name)

    def call(*args, **named):
        noted.append(set(texts_of(*args, **named)))
        return real(*args, **named)

    monkeypatch.setattr(place, call)
    return noted


def texts_of(rows: list[dict]) -> list[str]:
    return [row["text"] for row in rows]


def test_judges_and_reports_have_rows_on_which_nothing_was_trained(empty, no_bars, monkeypatch):
    """Every part of the data where it is used, by a run from scratch on a file and its evaluation: what is trained and
    rewarded has `train`, what chooses and measures the stages `validation`, the judges `judge`, the report `test`."""
    rows = [
        {"text": f"{review['text']} {n}", "label": review["label"]} for n, review in enumerate(movie_reviews(60, 0))
    ]
    (empty / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    language = noting(monkeypatch, "sft.language_examples", lambda rows, *_: texts_of(rows))
    seeds = noting(monkeypatch, "sft.new_language_model", lambda *_: [torch.initial_seed()])
    tokenizers = noting(monkeypatch, "sft.new_tokenizer", lambda texts, *_: texts)
    classes = noting(monkeypatch, "classifier.class_batches", lambda rows, **_: texts_of(rows))
    measured = noting(monkeypatch, "classifier.held_out_predictions", lambda c, m, t, rows, *_: texts_of(rows))
    asked = noting(monkeypatch, "run.train", lambda s, f, prompts, c: texts_of(prompt.row for prompt in prompts))
    looked_at = noting(
        monkeypatch, "run.evaluate_policy", lambda p, f, prompts, c, **_: texts_of(x.row for x in prompts)
    )
    saved = noting(monkeypatch, "run.check_saved", lambda p, f, prompts, *_: texts_of(prompt.row for prompt in prompts))
    words = noting(monkeypatch, "evaluation.bag_of_words_judge", lambda texts, labels: texts)
    reported = noting(
        monkeypatch, "evaluation.evaluate_policy", lambda p, f, prompts, c, **_: texts_of(x.row for x in prompts)
    )
    monkeypatch.setattr("classifier.plot_reliability", lambda *_, **named: "")
    parts = noting(monkeypatch, "evaluation.load_rows", lambda config, part, *_: [part])
    few = flags(dataset_path="labelled.jsonl", eval_every=9, n_updates=9, eval_samples=64, max_new_tokens=2)
    assert run_main("--task", "train", *few) == 0
    assert run_main("--task", "evaluate") == 0
    config = micro_config(dataset_path="labelled.jsonl")
    train, judge, validation, test = (set(texts_of(load_rows(config, part))) for part in PARTS)
    assert [len(part) for part in (train, judge, validation, test)] == [33, 15, 6, 6]
    assert len(train | judge | validation | test) == 60
    assert language == [train, validation, judge] and tokenizers == [train]
    assert seeds == [{0}, {1}]  # nor has the judge of fluency the policy's first weights
    assert classes == [train] and measured == [validation]
    assert asked == [train] and looked_at == [validation, test, test] and saved == [test]
    assert words == [judge] and reported == [test] * 2
    # to be looked for among what the models were trained on; then for the judge of words, its accuracy, that of fluency
    assert parts == [{"judge"}, {"judge"}, {"test"}, {"judge"}]
