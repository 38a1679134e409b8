"""A stage knows its data: which rows trained it, and that they are never judged by without a word."""

import json
import shutil
from pathlib import Path

import pytest
from micro import PPO, assert_refused, flags, listing, micro_config, run_main
from safetensors.torch import load_file, save_file

import dataset
from config import UsageError
from provenance import (
    Source,
    columns_read,
    fingerprint,
    overlaps,
    read_hashes,
    read_record,
    row_hashes,
    usable_stage,
    weights_hash,
    write_record,
)
from reviews import movie_reviews

pytest_plugins = ["micro"]
pytestmark = pytest.mark.usefixtures("no_figures")

ROWS = [{"text": "good", "label": 1, "id": 7}, {"text": "bad", "label": 0, "id": 8}]


def test_rows_are_known_by_what_was_read_of_them_in_any_order():
    """As by `printf '["good", 1]' | b2sum -l 64`, and of the other row."""
    hashes = row_hashes(ROWS, ["text", "label"]).tolist()
    assert hashes == [0x34B3D5AF83081F2F, 0xCFBF89302AE546E8]
    assert row_hashes(ROWS[::-1], ["text", "label"]).tolist() == hashes == sorted(hashes)
    assert row_hashes([row | {"id": 9} for row in ROWS], ["text", "label"]).tolist() == hashes
    for change in ({"label": 2}, {"text": "good "}):
        assert row_hashes([ROWS[0] | change, ROWS[1]], ["text", "label"]).tolist() != hashes
    assert fingerprint(row_hashes(ROWS, ["text"])) != fingerprint(row_hashes(ROWS * 2, ["text"]))


def test_the_columns_of_a_stage_are_its_prompts_and_its_own():
    row = {"text": "", "title": "", "label": 0, "good": "", "bad": ""}
    assert columns_read(micro_config(), row, "label") == ["text", "label"]
    pairs = columns_read(micro_config(prompt_template="{title}?"), row, "good", "bad")
    assert pairs == ["text", "title", "good", "bad"]
    assert columns_read(micro_config(prompt_template="{title}?", prompt_column="title"), row, "") == ["title"]


def test_a_record_counts_and_names_its_rows(tmp_path):
    write_record(tmp_path, Source(["text"], ROWS, ROWS[:1], start="gpt2"), accuracy=0.75)
    record = read_record(tmp_path)
    hashes = row_hashes(ROWS, ["text"])
    assert record["trained_on"] == {"columns": ["text"]} | fingerprint(hashes)
    assert record["starts_from"] == {"path": "gpt2", "sha256": ""}
    assert record["held_out"] == fingerprint(row_hashes(ROWS[:1], ["text"])) | {"accuracy": 0.75}
    lines = (tmp_path / "rows.txt").read_text().split("\n")
    assert lines == [f"{each:016x}" for each in hashes.tolist()] + [""]
    assert read_hashes(tmp_path).tolist() == hashes.tolist()
    for damage in ("\n".join(lines)[:-3], "no hash\n"):
        (tmp_path / "rows.txt").write_text(damage)
        with pytest.raises(UsageError, match=r"rows.txt is damaged: it does not hold 16 hexadecimal digits a line"):
            read_hashes(tmp_path)
    (tmp_path / "rows.txt").unlink()
    with pytest.raises(UsageError, match=r"stage.json is no record of a stage's rows: it lacks .*rows.txt"):
        read_record(tmp_path)


# ----------------------------------------------------------------------------------------------------------------
# Stages that are there already
# ----------------------------------------------------------------------------------------------------------------


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def own_data(tmp_path_factory) -> Path:
    """A folder with data in a file, both stages trained on it, and a run."""
    root = tmp_path_factory.mktemp("own")
    write_rows(root / "mine.jsonl", movie_reviews(60, seed=5))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr("run.plot_training", lambda folder, notice="": folder / "plots/training.png")
        assert run_main("--task", "train", *flags(), "--dataset_path", "mine.jsonl") == 0
    return root


@pytest.fixture
def own(own_data, tmp_path, monkeypatch) -> Path:
    """A copy of it, in which nothing of the data is remembered."""
    shutil.copytree(own_data, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    forget_data()
    return tmp_path


def forget_data() -> None:
    """A process reads its data once."""
    dataset.split_parts.cache_clear()


TRAIN = ["--task", "train", *flags(), "--dataset_path", "mine.jsonl"]
PPO_OWN = "saved_models/tiny-mine/ppo"


def test_a_row_that_is_appended_makes_the_old_stages_unusable(own, capsys):
    """55 % of 60 rows are 33, of 61 they are 34, and the other parts are drawn anew, too."""
    rows = [json.loads(line) for line in (own / "mine.jsonl").read_text().splitlines()]
    write_rows(own / "mine.jsonl", [*rows, {"text": "a fine film, and I liked it", "label": 1}])
    forget_data()
    for stage in ("reward", "sft"):
        assert_refused(
            capsys,
            own,
            TRAIN,
            f"error: saved_models/tiny-mine/{stage} was trained on 33 rows, and mine.jsonl now has 34 for it, ",
            " of them the same; of the old ones ",
            "judge has ",
            f"or a --run_name of its own to this run, or move saved_models/tiny-mine/{stage} away",
        )
        (own / "saved_models/tiny-mine" / stage).rename(own / f"old-{stage}")
    before = listing(own)
    assert run_main(*TRAIN) == 0
    after = listing(own)
    assert {name: after[name] for name in before} == before
    assert "language model: held-out perplexity" in capsys.readouterr().out


def test_a_name_of_its_own_trains_the_stages_anew(own, capsys):
    rows = [json.loads(line) for line in (own / "mine.jsonl").read_text().splitlines()]
    write_rows(own / "mine.jsonl", rows[1:])
    forget_data()
    assert run_main(*TRAIN, "--run_name", "other") == 0
    for stage in ("sft", "reward"):
        record = json.loads((own / "saved_models/other" / stage / "stage.json").read_text())
        assert record["trained_on"]["rows"] == 35 and record["held_out"]["rows"] == 5  # 55 and 10 % of 59


def test_a_column_that_no_stage_reads_changes_nothing(own, capsys):
    """And with the same rows, the stages are used."""
    rows = [json.loads(line) for line in (own / "mine.jsonl").read_text().splitlines()]
    write_rows(own / "mine.jsonl", [row | {"stars": 4} for row in rows])
    forget_data()
    assert run_main(*TRAIN, "--dry_run") == 0
    assert capsys.readouterr().out.count("is there and used as it is: trained with --seed 0 on 33 rows at most") == 2


@pytest.mark.parametrize("change", [{"text": "another text"}, {"label": 0}])
def test_a_row_that_is_changed_is_noticed(change, own, capsys):
    """A label is none of the language model's business."""
    rows = [json.loads(line) for line in (own / "mine.jsonl").read_text().splitlines()]
    write_rows(own / "mine.jsonl", [row | change if row["label"] == 1 else row for row in rows])
    forget_data()
    words = "saved_models/tiny-mine/reward was trained on 33 rows, and mine.jsonl now has 33"
    assert_refused(capsys, own, TRAIN, words)
    if "label" in change:
        assert usable_stage(micro_config(dataset_path="mine.jsonl"), "saved_models/tiny-mine/sft", "sft")


def test_a_reward_model_of_weights_that_gave_way_to_others_is_not_used(own, capsys):
    """The reward model began as the language model; that one is trained anew, with other weights under the old name."""
    weights = own / "saved_models/tiny-mine/sft/model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor + 1e-3 for name, tensor in tensors.items()}, weights, {"format": "pt"})
    words = "saved_models/tiny-mine/reward was trained from saved_models/tiny-mine/sft, whose weights are others now: "
    assert_refused(capsys, own, TRAIN, words + "move saved_models/tiny-mine/reward away")
    assert run_main("--task", "evaluate", "--output_dir", PPO_OWN, "--dry_run") == 0
    assert f"note: {PPO_OWN} was trained from saved_models/tiny-mine/sft, whose weights are" in capsys.readouterr().out


def test_a_stage_of_nobody_s_is_used_with_a_word(own, capsys):
    for stage in ("sft", "reward"):
        (own / "saved_models/tiny-mine" / stage / "stage.json").unlink()
    assert run_main(*TRAIN, "--dry_run") == 0
    output = capsys.readouterr().out
    for stage in ("sft", "reward"):
        assert f"note: saved_models/tiny-mine/{stage} does not say on which rows it was trained" in output


def test_another_seed_uses_the_stages_and_says_whose_they_are(workplace, capsys):
    assert run_main("--task", "train", "--dry_run", *flags(seed=3)) == 0
    assert capsys.readouterr().out.count("trained with --seed 0 on 200 rows at most, ") == 2


# ----------------------------------------------------------------------------------------------------------------
# Rows to judge by
# ----------------------------------------------------------------------------------------------------------------


def test_models_trained_on_rows_to_judge_by_are_named(tmp_path):
    rows = [{"text": text} for text in "abcd"]
    write_record(tmp_path, Source(["text"], rows[:3], []))
    notes = overlaps([str(tmp_path), "gpt2"], {"test": rows[2:], "judge": rows[3:], "validation": [{"other": 1}]})
    assert notes == [f"note: {tmp_path} was trained on 1 of the 2 rows for test"]


def test_a_reward_model_that_is_named_is_told_on_where_it_knows_held_out_rows(own, capsys):
    """Trained on a model from elsewhere, it got the rows that are the judges' where a model is trained here."""
    base = ["--base_model_name", "saved_models/tiny-mine/sft", "--dataset_path", "mine.jsonl", "--reward_steps", "3"]
    assert run_main("--task", "reward", *base, "--output_dir", "judge_of_all") == 0
    known = dataset.load_rows(micro_config(dataset_path="mine.jsonl", base_model_name="x"), "train")
    judges = dataset.load_rows(micro_config(dataset_path="mine.jsonl"), "judge")
    count = sum(row["text"] in {row["text"] for row in known} for row in judges)
    capsys.readouterr()
    assert run_main(*TRAIN, "--reward_model_path", "judge_of_all", "--dry_run") == 0
    assert count > 0
    words = f"note: judge_of_all was trained on {count} of the 15 rows for judge"
    assert words in capsys.readouterr().out


def test_an_evaluation_on_data_that_has_changed_names_the_models_that_know_it(own, no_bars, capsys):
    assert run_main("--task", "evaluate", "--output_dir", PPO_OWN) == 0
    assert "was trained on" not in capsys.readouterr().out
    results = own / PPO_OWN / "results/comparison.json"
    assert json.loads(results.read_text())["notes"] == []
    rows = [json.loads(line) for line in (own / "mine.jsonl").read_text().splitlines()]
    write_rows(own / "mine.jsonl", rows[1:])
    forget_data()
    words = "saved_models/tiny-mine/judge was trained on 15 rows, and mine.jsonl now has 14 for it"
    assert run_main("--task", "evaluate", "--output_dir", PPO_OWN) == 2
    captured = capsys.readouterr()
    assert words in captured.err and "--run_name" not in captured.err
    shutil.rmtree(own / "saved_models/tiny-mine/judge")
    assert run_main("--task", "evaluate", "--output_dir", PPO_OWN) == 0
    notes = json.loads(results.read_text())["notes"]
    told = [note for note in notes if note.startswith("note: saved_models/tiny-mine/sft was trained on")]
    assert any(note.endswith("of the 14 rows for judge") for note in told)
    output = capsys.readouterr().out
    assert all(note in output for note in notes)


def test_a_run_keeps_the_rows_of_its_prompts(workplace):
    record = read_record(PPO)
    assert record["trained_on"]["columns"] == ["text"]
    assert (record["trained_on"]["rows"], record["held_out"]["rows"]) == (8, 4)
    sft = "saved_models/tiny/sft"
    assert record["starts_from"] == {"path": sft, "sha256": weights_hash(sft)} and len(weights_hash(sft)) == 64
