"""The evaluate task from outside: its figures, its files, and what is refused."""

import json
import re
from pathlib import Path

import pytest
from helpers import read_table
from micro import PPO, QUESTIONS, assert_refused, listing, question_flags, run_main

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
