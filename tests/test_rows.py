"""Rows that stay in Arrow: the same rows as a list would have, and none is made that nobody asks for."""

import json
import mmap
import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from micro import flags, micro_config, run_main

import conversations
import dataset
import prompts
import provenance
import rows as rows_module
from config import UsageError
from dataset import check_column, load_rows, most_texts, split_parts
from prompts import DrawnPrompts, Prompt, batch_of, load_prompts, longest_prompt, make_room, rows_of
from provenance import row_hashes
from rows import Row, Rows, open_table

pytest_plugins = ["micro"]

MANY = 200_000
FEW = [{"text": "a" * (n % 7), "label": n % 3, "talk": [{"role": "user", "content": "b"}]} for n in range(50)]


def rows_of_table(table: dict | list, order: list[int] | None = None) -> Rows:
    """The rows of a table in memory."""
    make = datasets.Dataset.from_list if isinstance(table, list) else datasets.Dataset.from_dict
    found = open_table(make(table), "here")
    return Rows(found, np.array(range(len(table)) if order is None else order, dtype=np.uint32))


@pytest.fixture
def made(monkeypatch) -> list[int]:
    """The numbers of the rows that are made into objects of Python, as they are made."""
    numbers = []
    gather = rows_module.Table.gather

    def counted(table, indices, names):
        numbers.extend(indices.tolist())
        return gather(table, indices, names)

    monkeypatch.setattr(rows_module.Table, "gather", counted)
    return numbers


@pytest.fixture(scope="module")
def big(tmp_path_factory) -> Path:
    """A file of many rows."""
    path = tmp_path_factory.mktemp("big") / "big.parquet"
    texts = [f"the film {n} was a film" for n in range(MANY)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "label": np.arange(MANY) % 2}), path)
    return path


# ----------------------------------------------------------------------------------------------------------------
# As a list
# ----------------------------------------------------------------------------------------------------------------


def test_rows_are_a_list_of_rows():
    order = [7, 3, 49, 0, 20] * 5
    rows, expected = rows_of_table(FEW, order), [Row(FEW[n], n + 1) for n in order]
    assert len(rows) == 25
    for found, wanted in ((rows, expected), (rows[3:9], expected[3:9]), (rows[::-2], expected[::-2])):
        assert list(found) == wanted and [row.number for row in found] == [row.number for row in wanted]
    assert rows[2] == expected[2] and rows[-1] == expected[-1] and rows[torch.tensor(4)] == expected[4]
    assert not rows[:0] and list(rows[:0]) == []
    assert list(rows.only(["label", "no column"])) == [{"label": row["label"]} for row in expected]
    assert list(rows.only([])) == [{}] * 25  # as where a model was trained on a column that this data has not
    assert [row.number for row in rows.in_file_order()] == sorted(row.number for row in expected)
    assert list(rows.at([2, 0])) == [expected[2], expected[0]]
    with pytest.raises(IndexError):
        rows[25]


@pytest.mark.parametrize(("step", "at_once"), [(1, 1000), (19, 1000), (21, 16)])
def test_what_lies_far_apart_is_read_by_few_and_its_pages_are_let_go(step, at_once, monkeypatch):
    """They would count as this process's memory, two million bytes a row."""

    class Pages:
        def madvise(self, advice):
            let_go.append((advice, len(read)))

    let_go, read = [], []
    rows = rows_of_table({"a": range(50_000)}, range(0, 2000 * step, step))
    rows = Rows(rows.table._replace(pages=[Pages()]), rows.order)
    for row in rows:
        read.append(row["a"])
    assert read == list(range(0, 2000 * step, step))
    assert {advice for advice, _ in let_go} == {mmap.MADV_DONTNEED}
    assert max(b - a for (_, a), (_, b) in pairwise(let_go)) == at_once


def test_a_files_rows_are_in_the_order_that_they_have_always_been_in(tmp_path):
    """numpy's own permutation of seed 0, divided; so a run's prompts stay what they are."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": str(n)}) + "\n" for n in range(100)))
    order = [str(n) for n in np.random.default_rng(0).permutation(100)]
    config = micro_config(dataset_path=str(tmp_path / "rows.jsonl"))
    parts = {"judge": order[:25], "validation": order[25:35], "test": order[35:45], "train": order[45:]}
    for part, texts in parts.items():
        assert [row["text"] for row in load_rows(config, part)] == texts


def test_a_selection_and_a_split_in_memory_are_read_as_they_are(tmp_path):
    """Their files hold other rows, or there are none."""
    datasets.Dataset.from_list(FEW).save_to_disk(tmp_path / "saved")
    saved = datasets.load_from_disk(tmp_path / "saved")
    for split, expected in ((saved, FEW), (saved.select([5, 1, 40]), [FEW[5], FEW[1], FEW[40]])):
        table = open_table(split, "here")
        assert bool(table.pages) == (split is saved)
        assert list(Rows(table, np.arange(len(expected)))) == expected


# ----------------------------------------------------------------------------------------------------------------
# Columns
# ----------------------------------------------------------------------------------------------------------------

MIXED = [{"a": 1, "b": "x"}, {"a": None, "b": ["y"]}, {"a": 3, "b": None}, {"a": 4, "b": "z"}]


def as_file(folder: Path, rows: list[dict]) -> Rows:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = dataset.load_splits(str(folder / "rows.jsonl"))
    return Rows(open_table(splits["train"], "rows"), np.arange(len(rows)))


def test_only_rows_that_may_be_wrong_are_looked_at(made, tmp_path):
    """By Arrow those with a null; all of a column that has a wrong type, or none in common."""
    rows = as_file(tmp_path, MIXED)
    assert [row.number for row in rows.suspects("a", int)] == [2]
    assert [row.number for row in rows[2:].suspects("a", int)] == []
    assert len(rows.suspects("a", str)) == len(rows.suspects("b", str)) == 4
    for name, kind, words in (
        ("a", int, "'a' holds a null in row 2, expected a whole number"),
        ("a", str, "'a' holds a whole number in row 1, expected a text"),
        ("b", str, "'b' holds a list in row 2, expected a text"),
        ("b", (str, list), "'b' holds a null in row 3, expected a text or list"),
    ):
        with pytest.raises(UsageError, match=f"--flag {words}$"):
            check_column(rows, name, "flag", kind)
    check_column(rows[:1], "a", "flag", int)
    made.clear()
    check_column(rows_of_table({"a": [7] * 10_000}, range(10_000)), "a", "flag", int)
    assert len(made) < 5


def test_what_is_asked_of_a_column_is_what_a_list_would_say(tmp_path):
    rows = rows_of_table(FEW, range(10, 40))
    assert rows.lengths("text").tolist() == [len(FEW[n]["text"]) for n in range(10, 40)]
    assert rows.lengths("label") is None and rows.lengths("talk") is None
    assert rows.distinct("label") == {0, 1, 2} and rows[:2].distinct("label") == {FEW[10]["label"], FEW[11]["label"]}
    assert rows_of_table({"text": ["é", "日本"]}, [1, 0]).lengths("text").tolist() == [2, 1]  # letters, not bytes
    assert rows_of_table({"text": ["a", None]}, [0, 1]).lengths("text") is None
    assert as_file(tmp_path, [{"a": 1}, {"a": "x"}, {"a": 1}]).distinct("a") == {1, "x"}


def test_of_pairs_that_are_messages_the_first_are_looked_at(monkeypatch):
    """Two of three are whole conversations; the rows beyond the limit are not made."""
    monkeypatch.setattr(conversations, "LOOKED_AT", 6)
    whole = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    pairs = {"chosen": [whole, whole, whole[1:]] * 10, "rejected": [whole] * 30}
    rows, made = rows_of_table(pairs, range(30)), []
    real = Rows.made
    monkeypatch.setattr(Rows, "made", lambda self, indices: (made.extend(indices.tolist()), real(self, indices))[1])
    config = micro_config(task="reward", chosen_column="chosen", rejected_column="rejected", chat=True)
    assert [row.number for row in conversations.without_whole_pairs(rows, config)] == [3, 6]
    assert max(made) < 6


def test_rows_are_known_by_the_same_hashes_wherever_they_are():
    rows = rows_of_table(FEW, [3, 1, 2])
    of_arrow = row_hashes(rows, ["text", "talk", "none"])
    assert of_arrow.tolist() == row_hashes([FEW[1], FEW[2], FEW[3]], ["text", "talk", "none"]).tolist()


# ----------------------------------------------------------------------------------------------------------------
# Many of them
# ----------------------------------------------------------------------------------------------------------------


def test_of_many_rows_those_in_use_are_made(big, made, tokenizer):
    """Also where only some of them have a length that fits."""
    config = micro_config(dataset_path=str(big), base_model_name="x", max_prompt_length=40)
    assert len(load_prompts(config, tokenizer, "train", 8)) == 8
    assert len(made) < 30
    made.clear()
    fitting = load_prompts(replace(config, max_prompt_chars=23), tokenizer, "train", 8)
    assert {len(prompt.row["text"]) for prompt in fitting} <= {21, 22, 23} and len(fitting) == 8
    assert len(made) < 30


def test_a_run_makes_the_rows_that_it_uses(big, made, chain, monkeypatch, tmp_path):
    """A dry run of PPO on many rows: a handful, whatever is checked of all of them."""
    monkeypatch.chdir(tmp_path)
    Path("r.py").write_text("def reward(prompts, responses, rows):\n    return [float(len(r)) for r in responses]\n")
    base = ["--base_model_name", chain.root / "saved_models/tiny/sft", "--dataset_path", big, "--dry_run"]
    assert run_main("--task", "train", *flags(), *base, "--reward_fn", "r.py:reward", "--max_prompt_length", "30") == 0
    assert 0 < len(made) < 200


@pytest.mark.parametrize("task", ["sft", "reward"])
def test_a_stage_makes_the_rows_that_its_steps_can_use(task, big, made, chain, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dataset, "LOOKED_AT", 50)
    base = ["--base_model_name", chain.root / "saved_models/tiny/sft", "--dataset_path", big]
    assert run_main("--task", task, *flags(reward_batch_size=20, sft_batch_size=20), *base, "--dry_run") == 0
    assert 60 <= len(set(made)) < 10_000  # and the held-out rows, of which there are 2,000


def test_a_stage_takes_as_many_rows_as_its_steps_have_room_for():
    config = micro_config(sft_steps=3000, sft_batch_size=10, reward_steps=1000, reward_batch_size=40)
    assert (most_texts(config, "sft"), most_texts(config, "reward")) == (30_000, 40_000)
    assert most_texts(micro_config(sft_steps=1, reward_steps=1), "sft") == dataset.LOOKED_AT
    assert most_texts(micro_config(sft_epochs=1), "sft") is None
    assert most_texts(micro_config(sft_epochs=1, reward_steps=1), "reward") == dataset.LOOKED_AT


def test_a_stage_of_many_rows_is_used_whatever_steps_another_command_names(big, chain, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for module in (dataset, provenance):
        monkeypatch.setattr(module, "LOOKED_AT", 50)
    base = {"base_model_name": chain.root / "saved_models/tiny/sft", "dataset_path": big, "run_name": "x"}
    steps = {"sft_batch_size": 20, "sft_steps": 4}
    assert run_main("--task", "sft", *flags(**base, **steps)) == 0
    record = json.loads(Path("saved_models/x/sft/stage.json").read_text())
    assert record["trained_on"]["rows"] == 80
    settings = {name: str(value) for name, value in base.items()}
    assert provenance.usable_stage(micro_config(**settings, sft_steps=1), "saved_models/x/sft", "sft")


def test_a_files_text_is_checked_until_it_has_been_read_once(tmp_path, monkeypatch):
    """And again when it has changed."""
    checked = []
    check = dataset.check_is_text
    monkeypatch.setattr(dataset, "check_is_text", lambda *a: (checked.append(a), check(*a)))
    path = tmp_path / "rows.jsonl"
    config = micro_config(dataset_path=str(path))
    for content, n_checks in (("good", 1), ("good", 1), ("\\ud800", 2), ("\\ud800", 3), ("better", 4), ("better", 4)):
        if len(checked) < n_checks:
            path.write_text(f'{{"text": "{content}"}}\n' * 40)
            os.utime(path, ns=(n_checks * 10**9, n_checks * 10**9))
        split_parts.cache_clear()
        if content == "\\ud800":
            with pytest.raises(UsageError, match="half a character"):
                load_rows(config, "train")
        else:
            assert load_rows(config, "train")[0]["text"] == content
        assert len(checked) == n_checks


def test_a_file_is_written_in_large_parts(big):
    """To open one of small parts reads a page of each: all of it."""
    rows = load_rows(micro_config(dataset_path=str(big)), "train")
    assert len(rows.table.batches) < 10 and rows.table.pages
    assert rows.order.itemsize == 4  # what a row costs


# ----------------------------------------------------------------------------------------------------------------
# Prompts that are made when they are drawn
# ----------------------------------------------------------------------------------------------------------------


def both(folder: Path, rows: list[dict], tokenizer, monkeypatch, **settings) -> tuple[list[Prompt], DrawnPrompts]:
    """The prompts of a file, made beforehand and when they are drawn."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = micro_config(dataset_path=str(folder / "rows.jsonl"), base_model_name="x", prompt_tokens=0, **settings)
    before = load_prompts(config, tokenizer, "train", None)
    monkeypatch.setattr(prompts, "LOOKED_AT", 10)
    return before, load_prompts(config, tokenizer, "train", None)


def test_prompts_are_the_same_when_they_are_made_as_they_are_drawn(tmp_path, tokenizer, monkeypatch, made, capsys):
    rows = [{"text": f"the film {n} was " + "good " * (n % 9)} for n in range(60)]
    before, drawn = both(tmp_path, rows, tokenizer, monkeypatch, max_prompt_length=12)
    assert "10 of 48 prompts in train were looked at; the others are when they are drawn" in capsys.readouterr().out
    assert isinstance(before, list) and isinstance(drawn, DrawnPrompts)
    assert list(drawn) == before and len(drawn) == len(before) and drawn[5:9] == before[5:9] and drawn[-1] == before[-1]
    assert list(rows_of(drawn)) == rows_of(before)
    assert longest_prompt(drawn) <= longest_prompt(before) == 12
    made.clear()
    assert batch_of(drawn, 4, 3, seed=0) == batch_of(before, 4, 3, seed=0)
    assert len(made) == 4


def test_for_a_row_without_a_token_the_next_one_stands_in(tmp_path, tokenizer, monkeypatch):
    rows = [{"text": f"film {n}" if n % 3 else ""} for n in range(60)]
    before, drawn = both(tmp_path, rows, tokenizer, monkeypatch, max_prompt_length=12)
    texts = [row["text"] for row in drawn.rows]
    assert len(drawn) == 48 > len(before)
    for place, prompt in enumerate(drawn):
        assert prompt.text == next(text for text in texts[place:] + texts if text)


def test_a_prompt_that_is_drawn_is_cut_to_the_models_room(tmp_path, tokenizer, monkeypatch):
    rows = [{"text": "the film was " + "good " * 30} for n in range(60)]
    before, drawn = both(tmp_path, rows, tokenizer, monkeypatch, max_prompt_length=16)
    make_room(drawn, 20)
    assert drawn[30].ids == before[30].ids
    make_room(drawn, 9)
    assert drawn[30].ids == before[30].ids[-9:] and make_room(before, 9) is None


def test_a_fault_beyond_the_rows_that_are_looked_at_is_told_when_it_is_drawn(tmp_path, tokenizer, monkeypatch):
    """A null is none of these: Arrow knows of it."""
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    good, bad = [{"role": "user", "content": "a film"}], [{"role": "assistant", "content": "a film"}]
    order = np.random.default_rng(0).permutation(60)
    rows = [{"text": bad if n == order[-1] else good} for n in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = micro_config(dataset_path=str(tmp_path / "rows.jsonl"), base_model_name="x", chat=True, prompt_tokens=0)
    monkeypatch.setattr(prompts, "LOOKED_AT", 10)
    drawn = load_prompts(config, tokenizer, "train", None)
    assert drawn[0].text == "a film"
    with pytest.raises(UsageError, match=f"in row {order[-1] + 1} holds no message to answer"):
        drawn[-1]
    tokenizer.chat_template = None
