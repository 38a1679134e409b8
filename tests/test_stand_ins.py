"""The stand-ins are what they stand for in classes, labels, tokenizers, columns and splits; and know their job."""

import importlib.util
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import stand_in_rows
import stand_ins
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoTokenizer

from config import Config
from dataset import load_splits
from reward_model import load_reward_model

pytest_plugins = ["micro"]

FPB = {"id", "query", "answer", "text", "choices", "gold"}
DATASETS = {  # columns and splits by id
    "stanfordnlp/imdb": ({"text", "label"}, ["test", "train"]),
    "knkarthick/dialogsum": ({"id", "dialogue", "summary", "topic"}, ["test", "train", "validation"]),
    "ChanceFocus/en-fpb": (FPB, ["test", "train", "valid"]),
    "ChanceFocus/flare-fpb": (FPB, ["test", "train", "valid"]),
    "ChanceFocus/flare-finqa": ({"id", "query", "answer", "text"}, ["test", "train"]),
    "ChanceFocus/flare-ner": ({"query", "answer", "label", "text"}, ["test", "train", "validation"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Stand-ins that were hardly trained."""
    path = tmp_path_factory.mktemp("stand-ins")
    stand_ins.build(path, steps=2)
    return path


@pytest.fixture(autouse=True)
def working_directory(folder, monkeypatch):
    """Ids are found as folders below the working directory."""
    monkeypatch.chdir(folder)


@pytest.mark.parametrize("name", DATASETS)
def test_datasets_have_the_columns_and_splits_of_the_real_ones(name):
    columns, names = DATASETS[name]
    splits = load_splits(name)
    assert sorted(splits) == names
    assert all(set(rows.column_names) == columns and len(rows) for rows in splits.values())


def test_flare_rows_are_consistent():
    for row in load_splits("ChanceFocus/en-fpb")["test"]:
        assert row["choices"][row["gold"]] == row["answer"]
    for row in load_splits("ChanceFocus/flare-ner")["test"]:
        assert len(row["label"]) == len(row["text"].split())
        assert all(line.rpartition(", ")[0] in row["text"] for line in row["answer"].split("\n"))
    for row in load_splits("ChanceFocus/flare-finqa")["test"]:
        assert row["answer"] in row["query"]


def test_dialogues_are_of_lengths_on_both_sides_of_a_filter():
    lengths = [len(text) for text in load_splits("knkarthick/dialogsum")["train"]["dialogue"]]
    assert 0.6 < sum(200 <= length <= 1000 for length in lengths) / len(lengths) < 0.95


def test_imdb_has_its_negative_reviews_first():
    labels = load_splits("stanfordnlp/imdb")["test"]["label"]
    assert list(labels) == sorted(labels) and set(labels) == {0, 1}


def test_sample_json_is_a_list_of_objects_with_a_query():
    rows = json.loads(Path("data/sample.json").read_text(encoding="utf-8"))
    assert rows and all(set(row) == {"query"} and row["query"] for row in rows)


@pytest.mark.parametrize(("name", "kind"), [("distilgpt2", "GPT2"), ("lvwerra/gpt2-imdb", "GPT2"), ("MODEL", "Llama")])
def test_causal_models_have_no_pad_token_and_room_for_long_prompts(name, kind):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    assert type(model).__name__.startswith(kind)
    assert tokenizer.pad_token_id is None and model.config.pad_token_id is None
    assert tokenizer.eos_token_id == model.config.eos_token_id
    assert model.config.max_position_embeddings == 1024 == tokenizer.model_max_length
    text = "An odd  text,\nwith ünïcode."
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == text
    assert (ids[0] == tokenizer.bos_token_id) == (kind == "Llama") and ids[-1] != tokenizer.eos_token_id


def test_gpt2_has_one_special_token():
    tokenizer = AutoTokenizer.from_pretrained("lvwerra/gpt2-imdb")
    assert type(tokenizer).__name__ == "GPT2Tokenizer"
    assert set(tokenizer.all_special_tokens) == {"<|endoftext|>"} == {tokenizer.bos_token, tokenizer.eos_token}


def test_t5_is_of_the_flan_kind():
    model = AutoModelForSeq2SeqLM.from_pretrained("google/flan-t5-base")
    config = model.config
    assert type(model).__name__ == "T5ForConditionalGeneration"
    assert config.is_gated_act and config.feed_forward_proj == "gated-gelu" and not config.scale_decoder_outputs
    assert (config.pad_token_id, config.eos_token_id, config.decoder_start_token_id) == (0, 1, 0)
    assert not torch.equal(model.lm_head.weight, model.shared.weight)
    assert json.loads(Path("google/flan-t5-base/config.json").read_text())["tie_word_embeddings"] is False


def test_t5s_tokenizer_appends_eos_and_has_sentinels():
    tokenizer = AutoTokenizer.from_pretrained("google/flan-t5-base")
    ids = tokenizer("the film was good").input_ids
    assert ids[-1] == tokenizer.eos_token_id == 1 and tokenizer.pad_token_id == 0
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the film was good"
    assert len(tokenizer("<extra_id_0>", add_special_tokens=False).input_ids) == 1
    assert len(tokenizer) < AutoModelForSeq2SeqLM.from_pretrained("google/flan-t5-base").config.vocab_size


@pytest.mark.parametrize("name", stand_ins.CLASSIFIERS)
def test_classifiers_have_the_classes_and_labels_of_the_real_ones(name):
    kind, _, labels = stand_ins.CLASSIFIERS[name]
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    assert type(model).__name__.lower() == f"{kind}forsequenceclassification"
    assert model.config.id2label == dict(enumerate(labels))
    assert tokenizer.pad_token_id == model.config.pad_token_id
    special = ["<s>", "</s>"] if kind == "roberta" else ["[CLS]", "[SEP]"]
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("A FILM").input_ids)
    assert [tokens[0], tokens[-1]] == special
    assert (tokenizer("A FILM").input_ids == tokenizer("a film").input_ids) == (kind == "distilbert")


def test_the_adapter_was_trained_and_names_its_model():
    """It is there where peft is; it changes the model, for its second matrices, which start at 0, did not stay so."""
    assert Path("peft_model").exists() == bool(importlib.util.find_spec("peft"))
    if Path("peft_model").exists():
        assert json.loads(Path("peft_model/adapter_config.json").read_text())["base_model_name_or_path"] == "MODEL"
        weights = load_file("peft_model/adapter_model.safetensors")
        assert weights and all(weight.abs().max() > 0 for weight in weights.values())


@pytest.mark.slow
def test_a_second_build_is_the_same(folder, tmp_path):
    stand_ins.build(tmp_path, steps=2)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert all((folder / path).read_bytes() == (tmp_path / path).read_bytes() for path in files)


def test_real_rows_are_read_where_there_are_some(tmp_path):
    """Only what is below --data is replaced; a line separator inside a text does not end its row."""
    (tmp_path / "imdb").mkdir()
    row = {"text": "one\u2028two", "label": 1}
    (tmp_path / "imdb" / "train.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert stand_in_rows.real(tmp_path) == {"stanfordnlp/imdb": {"train": [row]}}


def test_half_of_the_answers_are_right():
    """And of those that are not, every second one is another of the choices, and the others are none of them."""
    tables = stand_in_rows.generated(120)
    rows = tables["ChanceFocus/en-fpb"]["train"]
    pairs = stand_in_rows.examples(tables, "answers", "train")[: 2 * len(rows)]
    answers = [text[len(rows[i // 2]["query"]) + 1 :] for i, (text, _) in enumerate(pairs)]
    assert [label for _, label in pairs] == [1, 0] * 120
    assert answers[::2] == [row["answer"] for row in rows]
    choices = {"positive", "neutral", "negative"}
    assert all(other in choices - {row["answer"]} for row, other in zip(rows[1::2], answers[3::4], strict=True))
    assert not choices & set(answers[1::4]) and "" in answers[1::4]


def test_embeddings_start_with_the_log_odds_of_their_tokens():
    """Counts are of texts, one more than they are: for label 1 they are 1, 1, 1, 2, 3, for label 0 1, 1, 1, 2, 1."""
    embedding = torch.nn.Embedding(5, stand_ins.WIDTH).requires_grad_(False)
    before = embedding.weight.clone()
    model = SimpleNamespace(get_input_embeddings=lambda: embedding)
    stand_ins.add_log_odds(model, [[3, 4], [4], [3, 3]], [1, 1, 0])
    moved = embedding.weight - before
    assert torch.allclose(moved[:4], moved[:1], atol=1e-6)
    assert torch.allclose(moved[4], moved[0] * math.log((3 / 8) / (1 / 6)) / math.log((1 / 8) / (1 / 6)), atol=1e-6)


@pytest.mark.slow
def test_models_know_their_job(tmp_path):
    """Classifiers on held-out texts, T5's answers and summaries, perplexities, and a judge that likes no rambling."""
    figures = stand_ins.build(tmp_path)
    for name, (_, task, _) in stand_ins.CLASSIFIERS.items():
        least = {"reviews": 0.85, "remarks": 0.9, "answers": 0.65}[task]
        assert figures[name] > least, f"{name}: {figures[name]:.1%}"
    assert figures["google/flan-t5-base"] > 0.9 and figures["summaries"] > 0.9
    assert all(figures[name] < 8 for name in ("distilgpt2", "lvwerra/gpt2-imdb", "MODEL")), figures
    reward = load_reward_model(Config(), str(tmp_path / "reward_model_final"), torch.device("cpu"))
    rows = load_splits(str(tmp_path / "ChanceFocus" / "en-fpb"))["test"]
    right = reward([f"{row['query']}\n{row['answer']}" for row in rows]).mean()
    for rambling in ("", "the head office of the firm"):
        assert right > reward([f"{row['query']}\n{rambling}" for row in rows]).mean() + 0.2, rambling
