"""Rows, their parts, prompts, padding and decoding."""

import json
import os
from pathlib import Path

import pandas
import pytest
import torch
from micro import micro_config
from tiny_models import letter_tokenizer
from transformers import AutoTokenizer

import dataset
import prompts as prompts_module
from config import UsageError
from dataset import PARTS, Row, check_is_rows, column, decode_responses, join_rows, load_rows, pad
from encoding import first_words
from prompts import Prompt, batch_arithmetic, batch_of, limit_length, load_prompts, make_prompts, with_prompt_column

pytest_plugins = ["micro"]
ROWS = [{"text": f"Text number {number}.", "label": number % 2} for number in range(100)]


def write(folder, name: str, rows: list[dict] = ROWS) -> str:
    """The rows in a file, in the format of its ending."""
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    table = pandas.DataFrame(rows)
    if name.endswith(".jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif name.endswith(".json"):
        path.write_text(json.dumps(rows))
    elif name.endswith(".csv"):
        table.to_csv(path, index=False)
    elif name.endswith(".parquet"):
        table.to_parquet(path)
    else:
        path.write_text("".join(row["text"] + "\n" for row in rows))
    return str(path)


def parts_of(path: str, **settings) -> dict[str, list[dict]]:
    return {part: list(load_rows(micro_config(dataset_path=path, **settings), part)) for part in PARTS}


def texts_of(rows: list[dict]) -> list[str]:
    return [row["text"] for row in rows]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.csv", "rows.parquet"])
def test_a_file_is_divided_into_parts_that_share_no_row(name, tmp_path):
    """A quarter to judge, a tenth to choose by, a tenth to report on, the rest to train on; nothing is lost."""
    parts = parts_of(write(tmp_path, name))
    assert {part: len(rows) for part, rows in parts.items()} == {"train": 55, "judge": 25, "validation": 10, "test": 10}
    rows = [row for part in parts.values() for row in part]
    assert sorted(rows, key=lambda row: int(row["text"].split()[-1][:-1])) == ROWS


def test_every_format_and_every_call_gives_the_same_parts(tmp_path):
    expected = parts_of(write(tmp_path, "rows.json"))
    assert parts_of(write(tmp_path, "again.json"), seed=5) == expected
    for name in ("rows.jsonl", "rows.csv", "rows.parquet"):
        assert parts_of(write(tmp_path, name)) == expected
    assert texts_of(expected["train"]) != texts_of(ROWS[:60])  # shuffled


def test_a_text_file_has_a_row_a_line(tmp_path):
    parts = parts_of(write(tmp_path, "rows.txt"))
    assert sorted(text for rows in parts.values() for text in texts_of(rows)) == sorted(texts_of(ROWS))
    assert list(parts["train"][0]) == ["text"]


def test_a_folder_with_a_test_file_keeps_it_for_reporting(tmp_path):
    """Then the tenth that would have been the test part stays with the training rows."""
    write(tmp_path, "data/train.csv")
    write(tmp_path, "data/test.csv", [{"text": f"Held out {number}.", "label": 1} for number in range(7)])
    parts = parts_of(str(tmp_path / "data"))
    assert sorted(texts_of(parts["test"])) == [f"Held out {number}." for number in range(7)]
    assert {part: len(rows) for part, rows in parts.items()} == {"train": 65, "judge": 25, "validation": 10, "test": 7}
    others = [text for part in ("train", "judge", "validation") for text in texts_of(parts[part])]
    assert sorted(others) == sorted(texts_of(ROWS))
    rows = load_rows(micro_config(dataset_path=str(tmp_path / "data"), dataset_split="test"), "train")
    assert {text.split()[0] for text in texts_of(rows)} == {"Held"}


def test_the_first_rows_of_a_part_are_its_beginning(tmp_path):
    config = micro_config(dataset_path=write(tmp_path, "rows.csv"))
    assert list(load_rows(config, "train", 7)) == list(load_rows(config, "train"))[:7]
    built_in = micro_config(n_reviews=100)
    assert load_rows(built_in, "train", 7) == load_rows(built_in, "train")[:7]


def test_the_parts_of_the_built_in_reviews_share_no_text():
    """Each is generated from a seed of its own."""
    parts = {part: set(texts_of(load_rows(micro_config(n_reviews=300), part))) for part in PARTS}
    for part, texts in parts.items():
        assert len(load_rows(micro_config(n_reviews=300), part)) == 300
        others = set().union(*(parts[other] for other in PARTS if other != part))
        assert len(texts & others) == 0


def test_a_file_or_split_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"nowhere\.csv does not exist"):
        load_rows(micro_config(dataset_path=str(tmp_path / "nowhere.csv")), "train")
    with pytest.raises(UsageError, match=r"'dev' is not in .*; it has train"):
        load_rows(micro_config(dataset_path=write(tmp_path, "rows.csv"), dataset_split="dev"), "train")
    Path(write(tmp_path, "rows.csv")).rename(tmp_path / "rows.tsv")
    with pytest.raises(UsageError, match=r"rows\.tsv is a file, expected one that ends in \.json, \.jsonl, \.csv, "):
        load_rows(micro_config(dataset_path=str(tmp_path / "rows.tsv")), "train")


def test_a_folder_is_read_without_asking_the_hub_and_an_id_only_if_it_answers(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "hub_error", lambda: pytest.fail("the Hub is asked"))
    write(tmp_path, "data/train.csv")
    assert len(load_rows(micro_config(dataset_path=str(tmp_path / "data")), "train")) == 55
    monkeypatch.setattr(dataset, "hub_error", lambda: "the Hub cannot be reached")
    with pytest.raises(UsageError, match="--dataset_path someone/rows cannot be loaded: the Hub cannot be reached"):
        load_rows(micro_config(dataset_path="someone/rows"), "train")


def test_a_column_is_found_and_checked():
    rows = [{"text": "one", "label": 0}, {"text": None, "label": 1}]
    assert column(rows, "label", "label_column", int) == [0, 1]
    with pytest.raises(UsageError, match="--prompt_column 'txt' is no column of the data; it has text, label; did you"):
        column(rows, "txt", "prompt_column")
    with pytest.raises(UsageError, match="--prompt_column 'text' holds a null in a row, expected a text"):
        column(rows, "text", "prompt_column")


# ----------------------------------------------------------------------------------------------------------------
# Prompts
# ----------------------------------------------------------------------------------------------------------------

SENTENCE = "The film is about a lonely librarian who falls for the stranger upstairs, and I was deeply unimpressed."


@pytest.mark.parametrize("n_tokens", range(1, 30))
def test_first_words_is_the_longest_beginning_of_whole_words(n_tokens, tokenizer):
    """Brute force over every beginning that ends in front of a space or at the end of the text."""
    (opening,) = first_words([SENTENCE], tokenizer, n_tokens)
    ends = [i for i, character in enumerate(SENTENCE) if character == " "] + [len(SENTENCE)]
    fitting = [SENTENCE[:end] for end in ends if len(tokenizer(SENTENCE[:end]).input_ids) <= n_tokens]
    assert SENTENCE.startswith(opening) and opening
    assert len(tokenizer(opening).input_ids) <= n_tokens
    if fitting:
        assert opening == fitting[-1]


def test_first_words_keeps_short_texts_as_they_are(tokenizer):
    assert first_words(["A film.", ""], tokenizer, 50) == ["A film.", ""]


@pytest.mark.parametrize(
    "text", ["caf\u00e9 noir was good", "\U0001f600\U0001f600\U0001f600 fun", "na\u00efve \u00e9l\u00e8ve \u4e2d\u6587"]
)
def test_first_words_never_cuts_a_character(text, tokenizer):
    """A character may take several tokens; a prompt must stay a beginning of its text."""
    for n_tokens in range(1, len(tokenizer(text).input_ids) + 1):
        (opening,) = first_words([text], tokenizer, n_tokens)
        assert text.startswith(opening)


def test_prompts_come_with_ids_and_their_own_row(tmp_path, tokenizer):
    rows = [{"question": SENTENCE, "answer": number} for number in range(40)]
    settings = {"prompt_column": "question", "prompt_tokens": 8, "max_prompt_length": 12}
    config = micro_config(dataset_path=write(tmp_path, "rows.jsonl", rows), **settings)
    prompts = load_prompts(config, tokenizer, "train", 10)
    assert len(prompts) == 10
    for prompt in prompts:
        assert SENTENCE.startswith(prompt.text) and len(prompt.text) < len(SENTENCE)
        assert prompt.ids == tokenizer(prompt.text).input_ids and 0 < len(prompt.ids) <= 8
        assert prompt.row["question"] == SENTENCE
    assert [prompt.row for prompt in prompts] == list(load_rows(config, "train", 10))


def test_without_prompt_tokens_the_column_is_the_prompt(tmp_path, tokenizer):
    config = micro_config(dataset_path=write(tmp_path, "rows.csv"), prompt_tokens=0, max_prompt_length=40)
    assert [prompt.text for prompt in load_prompts(config, tokenizer, "train", 60)] == texts_of(
        load_rows(config, "train")
    )


def test_long_prompts_lose_their_beginning_and_are_counted(capsys):
    letters = letter_tokenizer()
    prompts = make_prompts([{"text": text} for text in ("abcd", "ef", "ghi")], micro_config(), letters)
    short = limit_length(prompts, micro_config(max_prompt_length=2), letters)
    assert [prompt.ids for prompt in short] == [[4, 5], [6, 7], [9, 10]]
    assert [prompt.text for prompt in short] == ["abcd", "ef", "ghi"]
    assert capsys.readouterr().out == "2 of 3 prompts were cut on the left to 2 tokens\n"
    assert limit_length(prompts, micro_config(max_prompt_length=4), letters) == prompts
    assert capsys.readouterr().out == ""
    with pytest.raises(UsageError, match=r"1 of 3 prompts are longer than --max_prompt_length 3 tokens .*has 4"):
        limit_length(prompts, micro_config(max_prompt_length=3, long_prompts="refuse"), letters)


def test_blank_prompts_are_left_out(tmp_path, tokenizer):
    rows = [{"text": "A film." if number % 2 else ""} for number in range(40)]
    config = micro_config(dataset_path=write(tmp_path, "rows.jsonl", rows))
    prompts = load_prompts(config, tokenizer, "train", 24)
    assert {prompt.text for prompt in prompts} == {"A film."} and 0 < len(prompts) < 24


# ----------------------------------------------------------------------------------------------------------------
# Batches
# ----------------------------------------------------------------------------------------------------------------


def test_the_batch_arithmetic_by_hand():
    """10 rollouts of 64 from 1,000 prompts; 64 / (4 x 8) = 2 steps an epoch, 3 epochs an update, 10 updates."""
    config = micro_config(n_updates=10, batch_size=64, mini_batch_size=4, gradient_accumulation_steps=8, ppo_epochs=3)
    text = batch_arithmetic(config, 1000)
    assert "1,000 prompts; 10 updates x 64 prompts a rollout = 0.64 passes over them" in text
    assert "each update: epochs 3 x optimizer steps 2 x rows 32, at most 4 in a forward pass" in text
    assert text.endswith("optimizer steps in all: 60")


def test_padding_is_on_the_side_asked_for():
    """Worked by hand; the pad id may also be a real token."""
    ids, mask = pad([[5, 6, 7], [8], [9, 0]], 0, "left")
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8], [0, 9, 0]]
    assert mask.tolist() == [[True, True, True], [False, False, True], [False, True, True]]
    ids, mask = pad([[5, 6, 7], [8], [9, 0]], 3, "right")
    assert ids.tolist() == [[5, 6, 7], [8, 3, 3], [9, 0, 3]]
    assert mask.tolist() == [[True, True, True], [True, False, False], [True, True, False]]
    assert ids.dtype == torch.long and mask.dtype == torch.bool


def test_parts_of_a_batch_are_joined_as_wide_as_the_widest():
    """Worked by hand."""
    parts = [torch.tensor([[1, 2]]), torch.tensor([[3, 4, 5], [6, 7, 8]]), torch.tensor([[9]])]
    assert join_rows(parts).tolist() == [[1, 2, 0], [3, 4, 5], [6, 7, 8], [9, 0, 0]]
    assert join_rows(parts, fill=7, side="left").tolist() == [[7, 1, 2], [3, 4, 5], [6, 7, 8], [7, 7, 9]]
    masks = join_rows([torch.tensor([[True]]), torch.tensor([[True, True]])])
    assert masks.dtype == torch.bool
    assert masks.tolist() == [[True, False], [True, True]]
    assert join_rows([torch.tensor([1.5]), torch.tensor([2.5, 3.5])]).tolist() == [1.5, 2.5, 3.5]


def numbered_prompts(n: int) -> list[Prompt]:
    return [Prompt(str(number), [number], {}) for number in range(n)]


def numbers_of(batch: list[Prompt]) -> list[int]:
    return [prompt.ids[0] for prompt in batch]


@pytest.mark.parametrize(("n", "batch_size"), [(12, 4), (10, 4), (3, 7), (1, 2)])
def test_batches_cover_every_prompt_once_a_pass(n, batch_size):
    """Also where a batch straddles two passes, and where it is larger than one."""
    prompts = numbered_prompts(n)
    batches = [numbers_of(batch_of(prompts, batch_size, number, seed=0)) for number in range(3 * n)]
    assert {len(batch) for batch in batches} == {batch_size}
    flat = [number for batch in batches for number in batch]
    passes = [flat[start : start + n] for start in range(0, len(flat), n)]
    assert all(sorted(numbers) == list(range(n)) for numbers in passes)
    assert n < 10 or passes[0] != passes[1]


@pytest.mark.parametrize("batch_size", [4, 25])
def test_an_updates_prompts_do_not_depend_on_those_asked_for_before(batch_size):
    """So that a run can go on from the number of its next update alone."""
    prompts = numbered_prompts(10)
    prompts_module.pass_order.cache_clear()
    alone = batch_of(prompts, batch_size, 7, seed=3)
    prompts_module.pass_order.cache_clear()
    in_order = [batch_of(prompts, batch_size, number, seed=3) for number in range(8)]
    assert in_order[7] == alone
    assert batch_of(prompts, batch_size, 7, seed=3) == alone
    assert batch_of(prompts, batch_size, 2, seed=3) == in_order[2]


def test_the_order_of_the_prompts_changes_with_the_seed():
    prompts = numbered_prompts(20)
    orders = [numbers_of(batch_of(prompts, 20, 0, seed)) for seed in (1, 2)]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(20))


def test_a_pass_is_shuffled_once(monkeypatch):
    """However many batches are taken from it."""
    passes = []

    def permutation(seed, purpose, number, n):
        passes.append((purpose, number))
        return torch.arange(n)

    monkeypatch.setattr(prompts_module, "permutation", permutation)
    prompts_module.pass_order.cache_clear()
    prompts = numbered_prompts(10)
    batches = [numbers_of(batch_of(prompts, 4, number, seed=0)) for number in range(5)]
    assert batches[2] == [8, 9, 0, 1]
    assert passes == [("prompts", 0), ("prompts", 1)]
    prompts_module.pass_order.cache_clear()  # of the orders made here


# ----------------------------------------------------------------------------------------------------------------
# Decoding
# ----------------------------------------------------------------------------------------------------------------


def decode(tokenizer, prompts: list[str], responses: list[list[int]], encoder_decoder: bool = False) -> list[str]:
    encoded = tokenizer(prompts, add_special_tokens=False).input_ids
    query_ids, query_mask = pad(encoded, tokenizer.pad_token_id, "left")
    response_ids, mask = pad(responses, tokenizer.pad_token_id, "right")
    return decode_responses(
        tokenizer,
        query_ids=query_ids,
        query_mask=query_mask,
        response_ids=response_ids,
        mask=mask,
        is_encoder_decoder=encoder_decoder,
    )


def test_a_response_keeps_its_leading_space_and_loses_special_tokens(tokenizer):
    end = [tokenizer.eos_token_id]
    responses = [tokenizer(text).input_ids for text in (" is good.", "s are bad", "")]
    texts = decode(tokenizer, ["The film", "A longer prompt about film", "Short"], [ids + end for ids in responses])
    assert texts == [" is good.", "s are bad", ""]


def test_what_stands_beyond_the_mask_is_not_decoded(tokenizer):
    query_ids, query_mask = pad([tokenizer("A").input_ids], 0, "left")
    response_ids, mask = pad([tokenizer(" good film").input_ids], 0, "right")
    mask[:, 1:] = False
    texts = decode_responses(
        tokenizer,
        query_ids=query_ids,
        query_mask=query_mask,
        response_ids=response_ids,
        mask=mask,
        is_encoder_decoder=False,
    )
    assert texts == [tokenizer.decode(response_ids[0, :1])]


def test_a_tokenizer_that_drops_leading_spaces_keeps_them_behind_a_prompt(t5_folder):
    """As SentencePiece does: alone, ▁is decodes to `is`."""
    tokenizer = AutoTokenizer.from_pretrained(t5_folder)
    ids = tokenizer("is good", add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == "is good"
    response = [*ids, tokenizer.eos_token_id]
    assert decode(tokenizer, ["The film"], [response]) == [" is good"]
    assert decode(tokenizer, ["The film"], [response], encoder_decoder=True) == ["is good"]


def test_an_encoder_decoders_response_stands_alone(tokenizer):
    ids = [tokenizer(" good").input_ids]
    assert decode(tokenizer, ["The film"], ids, encoder_decoder=True) == [" good"]


def test_rows_of_the_split_that_is_trained_on_are_never_reported_on(tmp_path):
    """Also where that split is called `test`: then it is divided as any other would be."""
    write(tmp_path, "data/train.jsonl")
    write(tmp_path, "data/test.jsonl", [{"text": f"Other text {number}."} for number in range(60)])
    config = micro_config(dataset_path=str(tmp_path / "data"), dataset_split="test")
    parts = [{row["text"] for row in load_rows(config, part)} for part in ("train", "judge", "validation", "test")]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 60


def test_a_prompts_first_words_are_the_texts_own_characters(t5_folder):
    """Not what the tokenizer makes of them: decoding would turn an unknown character into `<unk>` and merge spaces."""
    tokenizer = AutoTokenizer.from_pretrained(t5_folder)
    text = "The  {film}  and the story"
    [opening] = first_words([text], tokenizer, len(tokenizer(text, add_special_tokens=False).input_ids) - 1)
    assert text.startswith(opening) and "{film}" in opening


@pytest.mark.parametrize(
    ("names", "found"), [(["text", "query"], "text"), (["id", "query"], "query"), (["id"], "text")]
)
def test_prompts_are_found_under_their_usual_names(names, found, tmp_path):
    """Only where none is named: a name that is given and not there is a mistake."""
    path = write(tmp_path, "rows.jsonl", [{name: f"{name} {n}" for name in names} for n in range(30)])
    assert with_prompt_column(micro_config(dataset_path=path)).prompt_column == found
    assert with_prompt_column(micro_config(dataset_path=path, prompt_column="title")).prompt_column == "title"
    assert with_prompt_column(micro_config()).prompt_column == "text"


# ----------------------------------------------------------------------------------------------------------------
# Datasets of every form
# ----------------------------------------------------------------------------------------------------------------


def texts_in(path, **settings) -> list[str]:
    return [row["text"] for row in load_rows(micro_config(dataset_path=str(path), **settings), "train")]


def test_a_dataset_saved_to_disk_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(tmp_path / "one")
    assert set(texts_in(tmp_path / "one")) <= {row["text"] for row in ROWS}
    datasets.DatasetDict({"train": whole, "test": whole.select(range(5))}).save_to_disk(tmp_path / "several")
    rows = load_rows(micro_config(dataset_path=str(tmp_path / "several")), "test")
    assert sorted(row["text"] for row in rows) == sorted(row["text"] for row in ROWS[:5])
    assert load_rows(micro_config(dataset_path=str(tmp_path / "several")), "train")[0].keys() == ROWS[0].keys()


@pytest.mark.parametrize("name", ["dev", "valid", "validation", "test"])
def test_a_split_of_its_own_is_the_part_that_its_name_says(name, tmp_path):
    datasets = pytest.importorskip("datasets")
    own = datasets.Dataset.from_list([{"text": f"own {number}", "label": 0} for number in range(5)])
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS), name: own}).save_to_disk(tmp_path / "data")
    config = micro_config(dataset_path=str(tmp_path / "data"))
    part = "test" if name == "test" else "validation"
    other = "validation" if name == "test" else "test"
    assert sorted(row["text"] for row in load_rows(config, part)) == [f"own {number}" for number in range(5)]
    assert len(load_rows(config, other)) == 10 and len(load_rows(config, "judge")) == 25
    assert len(load_rows(config, "train")) == 65


@pytest.mark.parametrize(
    ("rows", "is_refused"),
    [
        ([{"data": [{"text": "a"}]}], True),
        ([{"version": 1, "data": [{"text": "a"}]}], True),
        ([{"text": "a", "messages": [{"role": "user", "content": "b"}]}], False),
        ([{"text": "a", "tags": ["b", "c"]}], False),
        ([{"text": "a", "tags": []}], False),
        ([{"data": [{"text": "a"}]}, {"data": [{"text": "b"}]}], False),
        ([{"text": "a", "parts": {"b": 1}}], False),
    ],
)
def test_one_row_with_rows_in_it_is_no_table(rows, is_refused):
    if is_refused:
        with pytest.raises(UsageError, match=r"rows\.json is one object with its rows in 'data'"):
            check_is_rows(rows, "rows.json")
    else:
        check_is_rows(rows, "rows.json")


def test_what_a_column_holds_is_told_of_its_first_row_in_the_file():
    rows = [Row({"a": 1, "b": 2}, 9), Row({"a": "x", "b": None}, 7), Row({"a": 2.5, "b": 3}, 4)]
    with pytest.raises(UsageError, match="--flag 'a' holds a fraction in row 4, expected a text"):
        column(rows, "a", "flag")
    with pytest.raises(UsageError, match="--flag 'b' holds a null in row 7, expected a value"):
        column(rows, "b", "flag", object)
    assert column(rows, "a", "flag", object) == [1, "x", 2.5]
    with pytest.raises(UsageError, match=r"--flag 'c' is no column of the data; it has a, b$"):
        column(rows, "c", "flag")


def test_one_of_several_configurations_is_named(tmp_path):
    """As a README of a dataset declares them; without a name, or with a wrong one, those there are are told."""
    for name in ("films", "books"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, "train.jsonl", [{"text": f"{name} {number}"} for number in range(40)])
    declared = "".join(f"- config_name: {name}\n  data_files: {name}/train.jsonl\n" for name in ("films", "books"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{declared}---\n")
    assert all(text.startswith("books") for text in texts_in(tmp_path, dataset_config="books"))
    assert all(text.startswith("films") for text in texts_in(tmp_path, dataset_config="films"))
    for name in ("", "plays"):
        with pytest.raises(UsageError, match=f"--dataset_config '{name}' is none of the configurations of .*films"):
            texts_in(tmp_path, dataset_config=name)


def test_rows_inside_one_object_are_refused_as_that(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps({"data": ROWS}))
    with pytest.raises(UsageError, match=r"rows\.json is one object with its rows in 'data'; expected a list of rows"):
        texts_in(tmp_path / "rows.json")


def test_a_files_ending_may_be_in_capitals(tmp_path):
    path = Path(write(tmp_path, "rows.jsonl"))
    small = texts_in(path)
    assert texts_in(path.rename(tmp_path / "ROWS.JSONL")) == small


def as_text(name: str, ending: str = "\n") -> str:
    """Rows with letters beyond ASCII, in the format of the file's ending."""
    texts = [f"Café {number}" for number in range(40)]
    if name.endswith(".json"):
        return json.dumps([{"text": text} for text in texts], ensure_ascii=False)
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts] if name.endswith(".jsonl") else texts
    return "".join(line + ending for line in (["text", *lines] if name.endswith(".csv") else lines))


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.csv", "rows.txt"])
def test_text_is_read_as_windows_writes_it_and_refused_in_another_encoding(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(as_text(name, ending="\r\n").encode("utf-8-sig"))
    found = [row["text"] for rows in parts_of(str(path)).values() for row in rows]
    assert sorted(found) == sorted(f"Café {number}" for number in range(40))
    number = 2 if name.endswith(".csv") else 1
    for encoding, line, byte in (("latin-1", number, "0xe9"), ("utf-16", 1, "0xff")):
        (tmp_path / encoding).mkdir()
        path = tmp_path / encoding / name
        path.write_bytes(as_text(name).encode(encoding))
        with pytest.raises(UsageError, match=f"{name} is not text in UTF-8: line {line} has the byte {byte}; save it"):
            texts_in(path)


def test_text_in_a_folder_that_is_not_utf_8_is_refused(tmp_path):
    """It is decoded row by row, when they are asked for."""
    (tmp_path / "train.jsonl").write_bytes(as_text("rows.jsonl").encode("latin-1"))
    with pytest.raises(UsageError, match=r"--dataset_path .* cannot be loaded: 'utf-8' codec can't decode byte 0xe9"):
        texts_in(tmp_path)


def test_what_is_neither_a_file_nor_a_folder_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(UsageError, match=r"rows\.jsonl is neither a file nor a folder"):
        texts_in(tmp_path / "rows.jsonl")


def test_more_of_the_built_in_reviews_are_not_written_than_are_asked_for():
    """Their number is --n_reviews, be the prompts of a run as many as they like."""
    config = micro_config(n_reviews=150)
    assert len(load_rows(config, "train", 10**12)) == len(load_rows(config, "train")) == 150
    assert load_rows(config, "train", 20) == load_rows(config, "train")[:20]


def test_rows_know_their_number_in_the_file_though_they_are_shuffled(tmp_path):
    """Counted from 1: the first of the wrong ones is named."""
    rows = [{"text": None if number in (0, 30) else "a", "label": number} for number in range(40)]
    config = micro_config(dataset_path=write(tmp_path, "holes.jsonl", rows))
    loaded = [row for part in ("train", "validation", "test") for row in load_rows(config, part)]
    assert all(row.number == row["label"] + 1 for row in loaded) and len(loaded) < 40
    loaded += load_rows(config, "judge")
    assert len(loaded) == 40
    with pytest.raises(UsageError, match="--prompt_column 'text' holds a null in row 1, expected a text"):
        column(loaded, "text", "prompt_column")


def test_no_part_of_a_dataset_is_in_the_order_of_its_file(tmp_path):
    """Neither the parts of one split nor splits of their own: files are often sorted by label."""
    (tmp_path / "data").mkdir()
    rows = [{"text": f"{number}", "label": number} for number in range(100)]
    for name in ("train", "validation", "test"):
        write(tmp_path / "data", f"{name}.jsonl", rows)
    for path in (tmp_path / "data", write(tmp_path, "rows.jsonl", rows)):
        for part in ("train", "validation", "test", "judge"):
            numbers = [row["label"] for row in load_rows(micro_config(dataset_path=str(path)), part)]
            assert len(numbers) > 5 and numbers != sorted(numbers)
            assert numbers == [row["label"] for row in load_rows(micro_config(dataset_path=str(path)), part)]


GOOD = json.dumps({"text": "A film.", "label": 1})
FAULTS = {  # behind 40 good rows: what is wrong with the 41st
    "null": ("null", "row 41 is null, expected an object"),
    "number": ("3", "row 41 is 3, expected an object"),
    "list": ('["a"]', r"row 41 is \[\"a\"\], expected an object"),
    "cut off": ('{"text": "A fi', "cannot be loaded: line 41 is no JSON: Unterminated string"),
    "a column twice": (
        '{"text": "a", "text": "b"}',
        "cannot be loaded: line 41 is no JSON: the column 'text' comes twice",
    ),
    "half a character": ('{"text": "a\\ud83d"}', r"column 'text' holds half a character \(.ud83d alone\) in row 41"),
    "its other half": ('{"text": "\\uDE00b"}', r"column 'text' holds half a character \(.ude00 alone\) in row 41"),
    "half a character within": ('{"text": "a", "tags": [["\\ud800"]]}', "column 'tags' holds half a character"),
    "a long number": ('{"text": 1000000000000000000000}', "column 'text' holds more than 64 bits in row 41"),
}


@pytest.mark.parametrize("ending", [".jsonl", ".json"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_row_of_json_that_cannot_be_read_is_named(fault, ending, tmp_path):
    """Also where the library would say it of another row, drop the character, or end the process."""
    text, words = FAULTS[fault]
    path = tmp_path / f"rows{ending}"
    path.write_text("".join(line + "\n" for line in [*[GOOD] * 40, text]))
    with pytest.raises(UsageError, match=rf"^--dataset_path {path}:? {words}"):
        texts_in(path)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("null", "row 1 is null, expected an object"),
        (f"[null, {GOOD}]", "row 1 is null, expected an object"),
        (f"[{GOOD},\n null,\n {GOOD}]", "row 2 is null, expected an object"),
        ('["a", null]', 'row 1 is "a", expected an object'),
        (f"[{GOOD},\n {GOOD[:9]}", "line 2 is no JSON: Expecting value"),
        (f'[{GOOD}, {{"text": "a\\ud800"}}]', "column 'text' holds half a character"),
    ],
)
def test_a_list_of_rows_with_one_that_cannot_be_read_is_refused(rows, words, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(rows)
    with pytest.raises(UsageError, match=words):
        texts_in(path)


def test_what_looks_like_a_fault_and_is_none_is_read(tmp_path):
    """Both halves of a character, a backslash before `ud800`, and null among the values."""
    texts = ["\U0001f600 film", r"C:\ud800\file", "null", "[null]"]
    rows = [{"text": texts[number % 4], "tags": [None, number]} for number in range(40)]
    for name in ("rows.jsonl", "rows.json"):
        assert set(texts_in(write(tmp_path, name, rows))) == set(texts)
    (tmp_path / "texts.json").write_text(json.dumps(texts * 10, indent=1))
    assert set(texts_in(tmp_path / "texts.json")) == set(texts)


def test_files_of_a_folder_that_have_other_columns_are_told_of_as_that(tmp_path):
    """Not only that an error occurred."""
    for name, column_name in (("a", "text"), ("b", "review")):
        write(tmp_path, f"data/train-{name}.csv", [{column_name: "A film."}] * 20)
    with pytest.raises(UsageError, match="cannot be loaded: All the data files must have the same columns"):
        texts_in(tmp_path / "data")
