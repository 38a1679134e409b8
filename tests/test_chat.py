"""Conversations: how a reward model reads them, in its training as in PPO; a system's text; answers to learn."""

import contextlib
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from helpers import read_log
from micro import assert_refused, run_main
from micro import micro_config as micro
from test_any_model import command, place  # noqa: F401  a fixture
from test_prompts import (
    BOS,
    EOS,
    LETTERS,
    PAD,
    TALK,
    TEMPLATE,
    bos_tokenizer,
    chat_place,  # noqa: F401  a fixture
    ids_of,
    watched,
)
from tiny_models import randomise

import ask
import classifier
import evaluation
import reward_model
import sft
from arguments import parse_args
from classifier import pair_batches
from config import UsageError
from conversations import check_answers, end_of_answer
from encoding import template_ids
from prompts import limit_length, make_prompts, with_prompt_column
from reward import load_reward_terms

pytest_plugins = ["micro"]
pytestmark = pytest.mark.usefixtures("no_figures", "no_bars")
CPU = torch.device("cpu")
micro_config = partial(micro, prompt_tokens=0)
USER = {"role": "user", "content": "abc"}
ANSWER = {"role": "assistant", "content": "de"}
WORSE = {"role": "assistant", "content": "fg"}


def watched_ids(monkeypatch) -> list[list[int]]:
    """The ids of all that a reward model is asked from now on."""
    seen, real = [], reward_model.ids_logits
    monkeypatch.setattr(
        "reward_model.ids_logits", lambda c, rows, pad_id: (seen.extend(rows), real(c, rows, pad_id))[1]
    )
    return seen


def write_rows(name: str, row: dict, count: int = 40) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for _ in range(count)))


def save_classifier(name: str = "REWARD", template: bool = True, **settings) -> None:
    """A classifier that letters move, whose tokenizer has a template, as one that was trained elsewhere."""
    sizes = {"vocab_size": 3 + len(LETTERS), "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
    config = transformers.GPT2Config(**sizes, pad_token_id=PAD, **settings)
    randomise(transformers.GPT2ForSequenceClassification(config), 2).save_pretrained(name)
    (bos_tokenizer() if template else bos_tokenizer(template=None)).save_pretrained(name)


def asked_ids(monkeypatch, prompt: str, row: dict, **settings) -> list[int]:
    """The ids that the classifier in REWARD reads of a prompt and the response `de`."""
    (term,) = load_reward_terms(micro_config(**settings), "REWARD", CPU, "").values()
    seen = watched_ids(monkeypatch)
    term([prompt], ["de"], [row])
    (ids,) = seen
    return ids


# ----------------------------------------------------------------------------------------------------------------
# A reward model that is trained here
# ----------------------------------------------------------------------------------------------------------------

PAIRS = {  # a row of pairs: all are the same conversation, asked by the same person
    "texts": {"query": "abc", "chosen": "de", "rejected": "fg"},
    "messages as prompt": {"messages": [USER], "chosen": "de", "rejected": "fg"},
    "answers alone": {"messages": [USER], "chosen": [ANSWER], "rejected": [WORSE]},
    "whole conversations": {"chosen": [USER, ANSWER], "rejected": [USER, WORSE]},
    "both": {"prompt": "abc", "chosen": [USER, ANSWER], "rejected": [USER, WORSE], "messages": [USER, ANSWER]},
    "a text, and messages": {"prompt": "abc", "chosen": [USER, ANSWER], "rejected": "fg"},
}


@pytest.mark.parametrize("kind", PAIRS)
def test_pairs_are_read_as_conversations_however_they_are_written(kind, chat_place):  # noqa: F811
    """By the template, with its BOS once and its end of a turn, by hand: `U:abc.A:de.`"""
    write_rows("pairs.jsonl", PAIRS[kind])
    chat = kind == "texts"
    config = with_prompt_column(micro_config(dataset_path="pairs.jsonl", chosen_column="chosen", chat=chat))
    assert config.chat
    rows = [PAIRS[kind]] * 2
    batch = next(pair_batches(rows=rows, config=config, tokenizer=bos_tokenizer(), length=60, device=CPU))
    better, worse = [BOS, *ids_of("U:abc.A:de.")], [BOS, *ids_of("U:abc.A:fg.")]
    assert batch["input_ids"].tolist() == [better, better, worse, worse]
    assert batch["attention_mask"].all()


def test_the_ids_of_training_are_those_of_scoring(chat_place, monkeypatch, capsys):  # noqa: F811
    """In the stage, on held-out rows, in PPO, in evaluation and in generation: what the policy is asked, the answer,
    and the end of a turn; config.json says so, and nothing is to be noted."""
    learned, real = [], classifier.classifier_batch
    monkeypatch.setattr(classifier, "classifier_batch", lambda ids, *a: (learned.extend(ids), real(ids, *a))[1])
    write_rows("pairs.jsonl", PAIRS["texts"])
    chat = ["--base_model_name", "CHAT", "--chat", "--dataset_path", "pairs.jsonl"]
    stage = ["--chosen_column", "chosen", "--reward_steps", "2", "--output_dir", "REWARD"]
    seen = watched_ids(monkeypatch)
    assert run_main("--task", "reward", *chat, *stage) == 0
    better, worse = [BOS, *ids_of("U:abc.A:de.")], [BOS, *ids_of("U:abc.A:fg.")]
    assert {*map(tuple, learned)} == {tuple(better), tuple(worse)}
    assert learned[0] in seen  # of the held-out rows
    settings = json.loads(Path("REWARD/config.json").read_text())
    assert settings["reads_conversations"] is True
    assert "reads a prompt and an answer as a conversation, by the template" in Path("REWARD/README.md").read_text()

    seen.clear()
    flags = command("CHAT", dataset_path="pairs.jsonl", reward_fn="", reward_model_path="REWARD")
    assert run_main(*flags, "--chat") == 0
    assert run_main("--task", "evaluate", "--output_dir", "OUT", "--eval_samples", "2") == 0
    asked = ["--prompt", "abc", "--output", "out.jsonl"]
    assert run_main("--task", "generate", "--output_dir", "OUT", *asked) == 0
    scored = [ids for ids in seen if ids[:2] == [BOS, *ids_of("U")]]  # but for what is tried of padding
    assert len(scored) >= 16 + 4 + 1
    start, dot = [BOS, *ids_of("U:abc.A:")], ids_of(".")
    assert all(ids[: len(start)] == start and ids[-1:] == dot and ids.count(BOS) == 1 for ids in scored)
    assert "reads_conversations" not in capsys.readouterr().err
    (term,) = load_reward_terms(micro_config(chat=True, prompt_column="query"), "REWARD", CPU).values()
    seen.clear()
    term(["abc", "abc"], ["de", "fg"], [PAIRS["texts"]] * 2)
    assert seen == [better, worse]


def test_it_is_told_how_many_answers_may_have_been_cut(capsys):
    config = micro_config(chat=True, chosen_column="chosen", prompt_column="query")
    rows = [PAIRS["texts"], PAIRS["texts"] | {"chosen": "d"}]
    for length, told in ((13, ""), (12, "3 of 4 answers with their prompts fill the 12 tokens that are learned from")):
        next(pair_batches(rows, config=config, tokenizer=bos_tokenizer(), length=length, device=CPU))
        printed = capsys.readouterr().out
        assert told in printed and bool(told) == bool(printed)


def test_a_classifier_of_labels_is_asked_texts_though_it_has_a_template(chat_place, monkeypatch):  # noqa: F811
    """Its tokenizer is that of the model it started from; it has learned texts."""
    rows = [{"text": "abc", "label": 0}, {"text": "de", "label": 1}] * 20
    Path("lab.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = ["--base_model_name", "CHAT", "--dataset_path", "lab.jsonl", "--reward_steps", "1"]
    assert run_main("--task", "reward", *stage, "--output_dir", "REWARD") == 0
    assert json.loads(Path("REWARD/config.json").read_text())["reads_conversations"] is False
    ids = asked_ids(monkeypatch, "abc", {"text": "abc"}, chat=True)
    assert ids == [BOS, *ids_of("abcde")]


def test_pairs_of_texts_are_asked_as_texts(chat_place, monkeypatch):  # noqa: F811
    write_rows("pairs.jsonl", PAIRS["texts"])
    stage = ["--base_model_name", "CHAT", "--dataset_path", "pairs.jsonl", "--chosen_column", "chosen"]
    assert run_main("--task", "reward", *stage, "--reward_steps", "1", "--output_dir", "REWARD") == 0
    assert json.loads(Path("REWARD/config.json").read_text())["reads_conversations"] is False
    ids = asked_ids(monkeypatch, "abc", {"text": "abc"})
    assert ids == [BOS, *ids_of("abc\nde")]


BAD_PAIRS = {  # the chosen column of row 7, and what is said of it
    "no answer": ([USER], "--chosen_column 'chosen' in row 7 holds no answer of the assistant's at its end: [{'role'"),
    "empty": ([], "--chosen_column 'chosen' in row 7 holds no answer of the assistant's at its end: []"),
    "null": ([USER, {"role": "assistant", "content": None}], "in row 7 holds {'role': 'assistant', 'content': None}, "),
    "no prompt": ([ANSWER], "--prompt_column 'text' is no column of the data; it has chosen, rejected"),
}


@pytest.mark.parametrize("kind", BAD_PAIRS)
def test_answers_that_are_none_are_refused_with_their_row(kind, chat_place, capsys):  # noqa: F811
    value, words = BAD_PAIRS[kind]
    rows = [PAIRS["whole conversations"] | ({"chosen": value} if n == 6 else {}) for n in range(40)]
    name = f"{kind.replace(' ', '-')}.jsonl"
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = ["--base_model_name", "CHAT", "--dataset_path", name, "--chosen_column", "chosen", "--output_dir", "R"]
    assert_refused(capsys, chat_place, ["--task", "reward", *stage], words)


def test_messages_where_texts_were_begun_with_are_refused():
    rows = [{"good": "a"}, {"good": [USER, ANSWER]}]
    with pytest.raises(UsageError, match="--chosen_column 'good' holds a list in a row, expected a text"):
        check_answers(rows, "good", "chosen_column", micro_config())


def test_conversations_for_a_reward_model_without_a_template_are_refused(chat_place, capsys):  # noqa: F811
    write_rows("pairs.jsonl", PAIRS["whole conversations"])
    stage = ["--base_model_name", "MODEL", "--dataset_path", "pairs.jsonl", "--chosen_column", "chosen"]
    words = "(--chosen_column 'chosen', row", "and the tokenizer of MODEL has no template for them"
    assert_refused(capsys, chat_place, ["--task", "reward", *stage, "--output_dir", "R"], *words)


# ----------------------------------------------------------------------------------------------------------------
# A reward model from elsewhere
# ----------------------------------------------------------------------------------------------------------------

CONVERSATION = ("abc", {"text": TALK}, {"chat": True})
TEXT = ("abc", {"text": "abc"}, {})
AS_TALK = "S:s.U:abcd.A:ef.U:ghijkl.A:de."


@pytest.mark.parametrize(
    ("asked", "own", "expected", "note"),
    [
        (CONVERSATION, {}, AS_TALK, "note: REWARD reads conversations by its own template of chat"),
        (CONVERSATION, {"reads_conversations": True}, AS_TALK, ""),
        (CONVERSATION, {"reads_conversations": False}, "abcde", ""),
        (CONVERSATION, {"prompt_response_separator": ":"}, "abc:de", ""),
        (TEXT, {}, "abcde", "note: REWARD reads prompts as text, which are no messages"),
        (TEXT, {"reads_conversations": True}, "U:abc.A:de.", ""),
    ],
)
def test_a_classifier_with_a_template_reads_by_it_what_its_settings_let_it(
    asked,
    own,
    expected,
    note,
    chat_place,  # noqa: F811
    monkeypatch,
    capsys,
):
    save_classifier(**own)
    prompt, row, settings = asked
    assert asked_ids(monkeypatch, prompt, row, **settings) == [BOS, *ids_of(expected)]
    assert note in capsys.readouterr().err if note else "note" not in capsys.readouterr().err


def test_a_conversation_has_the_special_tokens_of_its_template_and_no_others(chat_place, monkeypatch):  # noqa: F811
    """Though the tokenizer puts one before every text, and one behind it."""
    save_classifier(reads_conversations=True)
    bos_tokenizer("<bos> $A <eos>", TEMPLATE.removeprefix("{{ bos_token }}")).save_pretrained("REWARD")
    assert asked_ids(monkeypatch, "abc", {"text": [USER]}, chat=True) == ids_of("U:abc.A:de.")
    assert asked_ids(monkeypatch, "abc", {"text": [USER]}, reward_input="response") == [BOS, *ids_of("de"), EOS]


def test_a_classifier_of_texts_reads_the_response_to_a_conversation_in_a_new_line(chat_place, monkeypatch):  # noqa: F811
    """In training, evaluation and generation."""
    save_classifier(reads_conversations=False)
    write_rows("rows.jsonl", {"query": "abc"})
    seen = watched_ids(monkeypatch)
    flags = command("CHAT", dataset_path="rows.jsonl", reward_fn="", reward_model_path="REWARD")
    for task in (
        [*flags, "--chat"],
        ["--task", "evaluate"],
        ["--task", "generate", "--prompt", "abc", "--output", "o"],
    ):
        seen.clear()
        assert run_main(*task, "--output_dir", "OUT") == 0
        read = [ids for ids in seen if ids[:4] == [BOS, *ids_of("abc")]]  # but for what is tried of padding
        assert read and all(ids[4:5] == ids_of("\n") for ids in read)


def test_the_response_alone_is_a_text(chat_place, monkeypatch):  # noqa: F811
    save_classifier()
    assert asked_ids(monkeypatch, "abc", {"text": TALK}, chat=True, reward_input="response") == [BOS, *ids_of("de")]


def test_a_classifier_that_lost_its_template_is_refused(chat_place):  # noqa: F811
    save_classifier(template=False, reads_conversations=True)
    with pytest.raises(UsageError, match="--reward_model_path REWARD reads conversations, and its tokenizer has no"):
        load_reward_terms(micro_config(), "REWARD", CPU)


def test_a_conversation_that_is_too_long_keeps_its_end_and_its_first_token(chat_place, monkeypatch):  # noqa: F811
    """64 positions here; the response is at the end."""
    save_classifier()
    long = [{"role": "user", "content": "abcdefgh" * 20}]
    ids = asked_ids(monkeypatch, "", {"text": long}, chat=True)
    assert ids == [BOS, *ids_of(f"U:{'abcdefgh' * 20}.A:de.")[-63:]]
    bare = bos_tokenizer(template="{{ messages[0]['content'] }}")
    assert template_ids(["abcdef", "ab"], bare, 4) == [ids_of("cdef"), ids_of("ab")]
    assert template_ids(["<bos>abcdef"], bare, 4) == [[BOS, *ids_of("def")]]
    assert template_ids(["<bos>abcdef"], bare, 1) == [[BOS, *ids_of("f")]]
    assert template_ids(["<bos>abcdef", ""], bare) == [[BOS, *ids_of("abcdef")], []]


# ----------------------------------------------------------------------------------------------------------------
# A system's text
# ----------------------------------------------------------------------------------------------------------------

NO_SYSTEM = TEMPLATE.replace(
    "{{ m['role'][0]", "{% if m['role'] == 'system' %}{% continue %}{% endif %}{{ m['role'][0]"
)


def test_a_systems_text_is_asked_as_it_was_trained(chat_place, monkeypatch):  # noqa: F811
    """In front of prompts of text, in training, in evaluation, and in generation; another one where that is given. What
    a person reads of the prompt, and the reward, is without it."""
    import train

    write_rows("rows.jsonl", {"query": "abc"})
    trained_on = watched(monkeypatch, train)
    flags = command("CHAT", dataset_path="rows.jsonl", max_prompt_length=20)
    assert run_main(*flags, "--chat", "--system", "hi") == 0
    expected = [BOS, *ids_of("S:hi.U:abc.A:")]
    assert trained_on and all(ids == expected for ids in trained_on)
    assert json.loads(Path("OUT/run_config.json").read_text())["system"] == "hi"
    assert {row["query"] for row in read_log(chat_place / "OUT")} == {"abc"}
    seen = watched(monkeypatch, evaluation)
    assert run_main("--task", "evaluate", "--output_dir", "OUT", "--eval_samples", "2") == 0
    assert all(ids == expected for ids in seen)
    generate = ["--task", "generate", "--output_dir", "OUT", "--prompt", "abc"]
    seen = watched(monkeypatch, ask)
    assert run_main(*generate) == 0 and run_main(*generate, "--system", "fg") == 0
    assert seen == [expected, [BOS, *ids_of("S:fg.U:abc.A:")]]


def test_a_conversation_keeps_the_system_that_it_has():
    config = micro_config(system="hi", max_prompt_length=12)
    rows = [{"text": TALK}, {"text": [USER]}]
    talk, other = make_prompts(rows, config, bos_tokenizer())
    assert talk.ids == [BOS, *ids_of("S:s.U:abcd.A:ef.U:ghijkl.A:")]
    assert other.ids == [BOS, *ids_of("S:hi.U:abc.A:")] and other.text == "abc"
    _, cut = limit_length([talk, other], config, bos_tokenizer())
    assert cut.ids == [BOS, *ids_of("S:hi.U:c.A:")]


def test_a_reward_model_reads_the_systems_text(chat_place, monkeypatch):  # noqa: F811
    save_classifier(reads_conversations=True)
    settings = {"chat": True, "system": "hi"}
    assert asked_ids(monkeypatch, "abc", {"text": "abc"}, **settings) == [BOS, *ids_of("S:hi.U:abc.A:de.")]
    config = micro_config(chosen_column="chosen", prompt_column="query", **settings)
    for kind in ("texts", "whole conversations"):
        batch = next(pair_batches([PAIRS[kind]], config=config, tokenizer=bos_tokenizer(), length=60, device=CPU))
        assert batch["input_ids"][0].tolist() == [BOS, *ids_of("S:hi.U:abc.A:de.")]


@pytest.mark.parametrize(
    ("template", "text", "words"),
    [
        (NO_SYSTEM, "hi", "--system: the chat template of CHAT leaves a system's turn out without a word"),
        (TEMPLATE, "no", "--system: the chat template of CHAT refuses a system's turn: no system role here"),
    ],
)
def test_a_template_without_a_place_for_a_system_is_refused(template, text, words, chat_place, capsys):  # noqa: F811
    bos_tokenizer(template=template).save_pretrained("CHAT")
    flags = [*command("CHAT", dataset_path="p.jsonl"), "--chat", "--system", text]
    assert_refused(capsys, chat_place, flags, words)


def test_a_reward_models_template_without_a_place_for_a_system_is_refused(chat_place):  # noqa: F811
    save_classifier()
    bos_tokenizer(template=NO_SYSTEM).save_pretrained("REWARD")
    with pytest.raises(UsageError, match="--system: the chat template of REWARD leaves a system's turn out"):
        load_reward_terms(micro_config(chat=True, system="hi"), "REWARD", CPU)


def test_a_system_that_the_template_leaves_out_of_the_data_is_told(chat_place, capsys):  # noqa: F811
    bos_tokenizer(template=NO_SYSTEM).save_pretrained("CHAT")
    write_rows("rows.jsonl", {"messages": TALK})
    assert run_main(*command("CHAT", dataset_path="rows.jsonl", max_prompt_length=30)) == 0
    assert "note: the chat template of CHAT leaves the system's turn out, of 16 prompts" in capsys.readouterr().out


def test_a_systems_text_without_a_conversation_is_refused(chat_place, capsys):  # noqa: F811
    words = "--system 'hi' is a turn of conversations, and the prompts are texts: add --chat"
    assert_refused(capsys, chat_place, [*command("CHAT", dataset_path="p.jsonl"), "--system", "hi"], words)
    assert_refused(capsys, chat_place, [*command("CHAT", dataset_path=""), "--system", "hi"], words)
    assert run_main(*command("CHAT", dataset_path="p.jsonl")) == 0
    capsys.readouterr()
    generate = ["--task", "generate", "--output_dir", "OUT", "--prompt", "abc", "--system", "hi"]
    assert_refused(capsys, chat_place, generate, words)


def test_chat_for_a_classifier_of_labels_is_noted(capsys):
    with contextlib.suppress(UsageError):
        parse_args(["--task", "reward", "--base_model_name", "CHAT", "--chat", "--system", "hi"])
    assert "note: --chat, --system have no effect: a classifier of labels learns texts" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------
# Answers to learn
# ----------------------------------------------------------------------------------------------------------------

SFT = ["--task", "sft", "--base_model_name", "CHAT", "--sft_steps", "1", "--output_dir", "SFT"]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ANSWER]},
        {"messages": [USER, ANSWER, WORSE]},  # the one behind what PPO asks
        {"messages": [USER], "answer": "de"},
        {"query": "abc", "answer": "de"},
    ],
)
def test_an_answer_is_learned_behind_the_very_prompt_of_ppo(row, chat_place, monkeypatch):  # noqa: F811
    """With the EOS that ends a response, and nothing of the prompt."""
    learned, real = [], sft.language_batch
    monkeypatch.setattr(sft, "language_batch", lambda batch, *a: (learned.extend(batch), real(batch, *a))[1])
    write_rows("rows.jsonl", row)
    flags = [*SFT, "--dataset_path", "rows.jsonl", "--system", "hi", "--chat"]
    assert run_main(*flags, *(["--completion_column", "answer"] if "answer" in row else [])) == 0
    expected = sft.Example(prompt=[BOS, *ids_of("S:hi.U:abc.A:")], completion=[*ids_of("de"), EOS])
    assert learned and all(example == expected for example in learned)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": TALK}, "--prompt_column 'messages' in row 1 ends with no answer of the assistant's"),
        ({"query": "abc"}, "--prompt_column 'query' in row 1 ends with no answer of the assistant's"),
    ],
)
def test_conversations_without_an_answer_to_learn_are_refused(row, words, chat_place, capsys):  # noqa: F811
    write_rows("rows.jsonl", row)
    assert_refused(capsys, chat_place, [*SFT, "--dataset_path", "rows.jsonl", "--chat"], words)


def test_an_answer_ends_as_the_template_ends_it():
    """With the last of its tokens at which a response ends, though the tokenizer's EOS is another one."""
    tokenizer = bos_tokenizer(template=TEMPLATE.replace("}}.", "}}Z. "))
    (end,) = ids_of("Z")
    assert end_of_answer(tokenizer, [EOS, end]) == end
    assert end_of_answer(tokenizer, [EOS]) == end_of_answer(tokenizer, []) == EOS
    config = micro_config(max_prompt_length=40, max_new_tokens=9)
    row = {"text": [USER, ANSWER]}
    for chat, expected in ((True, end), (False, EOS)):
        (example,) = sft.completions([row], replace(config, chat=chat), tokenizer, [EOS, end])
        assert example.completion == [*ids_of("de"), expected]
