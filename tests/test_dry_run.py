"""`--dry_run` writes nothing, whatever the task, and says what it would have done."""

import json
import re
from pathlib import Path

import pytest
from micro import PPO, assert_refused, flags, question_flags, run_main

import dataset

pytest_plugins = ["micro"]


def all_files(folder: Path) -> dict[str, tuple]:
    """Everything below a folder, with size and time of its last change: a file written again would show."""
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in [folder, *folder.rglob("*")]}


def dry_run(folder: Path, capsys, *arguments: str) -> str:
    """What a dry run prints that ends well, and leaves all as it was."""
    before = all_files(folder)
    assert run_main(*arguments, "--dry_run") == 0
    assert all_files(folder) == before
    return capsys.readouterr().out


def test_a_dry_run_samples_and_leaves_nothing(workplace, capsys):
    output = dry_run(workplace, capsys, "--task", "train", *flags())
    assert "invariants hold" in output
    assert len(re.findall(r"^prompt '", output, re.MULTILINE)) == 3
    assert len(re.findall(r"reward_model -?\d+\.\d{3}$", output, re.MULTILINE)) == 3
    assert "dry run: saved_models/tiny/ppo-2 would be the run; nothing was trained or written" in output


def test_a_dry_run_from_nothing_says_which_stages_would_be_trained_and_what_is_not_checked(empty, capsys):
    output = dry_run(empty, capsys, "--task", "train", *flags())
    loss = r"the first loss is 5\.\d{3}"  # ln 300 is 5.7, with a model that knows nothing
    language_model = r"dry run: saved_models/tiny/sft would be a language model of 8,880 parameters, on \d+ examples"
    assert re.search(rf"^{language_model} in 3 steps; {loss}$", output, re.MULTILINE)
    assert (
        "dry run: saved_models/tiny/reward would be a reward model of saved_models/tiny/sft; its data alone" in output
    )
    assert "without saved_models/tiny/sft and saved_models/tiny/reward the start-up invariants" in output
    assert "invariants hold" not in output


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_a_dry_run_of_a_stage_goes_as_far_as_the_first_loss(stage, workplace, capsys):
    folder = f"my-{stage}"
    output = dry_run(workplace, capsys, "--task", stage, "--output_dir", folder, *flags())
    assert re.search(rf"^dry run: {folder} would be a .* in 3 steps; the first loss is \d\.\d{{3}}$", output, re.M)
    assert_refused(
        capsys, workplace, ["--task", stage, "--dry_run", *flags()], f"saved_models/tiny/{stage} exists already"
    )


@pytest.mark.parametrize(
    ("task", "change", "words"),
    [
        (["reward"], {"label": 2}, "--label_column 'label' holds 2 in held-out rows, which no row to train on has"),
        (
            ["sft", "--completion_column", "answer"],
            {"answer": None},
            "--completion_column 'answer' holds a null in row",
        ),
    ],
)
def test_held_out_rows_that_cannot_be_judged_by_are_refused_before_the_training(task, change, words, workplace, capsys):
    """And by a dry run."""
    rows = [{"text": f"film {n}", "label": n % 2, "answer": "good"} for n in range(20)]
    dataset.split_parts.cache_clear()
    (workplace / "data").mkdir()
    for part, some_rows in (("train", rows), ("validation", [row | change for row in rows])):
        (workplace / f"data/{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some_rows))
    base = ["--base_model_name", "saved_models/tiny/sft", "--dataset_path", "data", "--run_name", "other"]
    for flag in ([], ["--dry_run"]):
        assert_refused(capsys, workplace, ["--task", *task, *base, *flag], words)


def test_a_dry_run_of_generate_shows_what_would_be_in_the_file(workplace, capsys):
    arguments = [part for text in "ABCDE" for part in ("--prompt", f"The film {text}")]
    output = dry_run(workplace, capsys, "--task", "generate", "--output", "new/out.jsonl", *arguments)
    said, *lines = output.splitlines()
    assert said == "dry run: 5 responses would be written to new/out.jsonl, such as these:"
    assert [json.loads(line)["prompt"] for line in lines] == ["The film A", "The film B", "The film C"]
    assert run_main("--task", "generate", "--output", "new/out.jsonl", *arguments) == 0
    assert (workplace / "new/out.jsonl").read_text().splitlines()[:3] == lines


def test_a_dry_run_of_evaluate_compares_a_few_responses(workplace, capsys):
    output = dry_run(workplace, capsys, "--task", "evaluate")
    for heading in (r"^prompt  '", r"^  before \(", r"^  after  \("):
        assert len(re.findall(heading, output, re.MULTILINE)) == 3
    assert f"dry run: before, after would be compared on 4 test prompts, in {PPO}/results" in output
    assert "dry run: saved_models/tiny/judge would be a language model, the judge of fluency" in output


def test_a_dry_run_of_explain_says_what_is_missing_or_what_would_be_shown(workplace, capsys):
    """Of the update after those of the run that is there; or, from nothing, which stages would come before it."""
    said = dry_run(workplace, capsys, "--task", "explain", "--row", "2")
    assert said == f"dry run: an update of {PPO} would be shown, with row 2 of its batch\n"
    said = dry_run(workplace, capsys, "--task", "explain", *flags(run_name="new"))
    assert said.startswith("dry run: without saved_models/new/sft and saved_models/new/reward there is no update")


def test_a_dry_run_of_plot_reads_the_curves(workplace, capsys):
    output = dry_run(workplace, capsys, "--task", "plot")
    assert f"dry run: the curves of {PPO}, 2 points each, would be drawn into {PPO}/plots" in output
    (workplace / PPO / "training_stats.jsonl").write_text("[]")
    assert_refused(capsys, workplace, ["--task", "plot", "--dry_run"], "training_stats.jsonl")


def test_a_dry_run_compiles_no_reward_function_beside_itself(questions, t5_folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.dont_write_bytecode", False)
    dry_run(questions, capsys, "--task", "train", *question_flags(t5_folder))
