"""Prompts: conversations, templates, special tokens, what is cut, and asking a policy as it was trained."""

import io
import json
import re
import shlex
import string
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from helpers import read_log
from micro import assert_refused, run_main
from micro import micro_config as micro
from test_any_model import command, place  # noqa: F401  a fixture
from tiny_models import randomise, tiny_llama, tiny_t5
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import ask
import main
import run
from config import Config, UsageError
from conversations import chat_text, conversation
from dataset import Row
from encoding import bare_ids, last_tokens, text_ids
from loading import load_tokenizer
from probe import special_ends
from prompts import (
    asked,
    check_prompts,
    limit_length,
    make_prompts,
    n_characters,
    n_rollouts,
    prompt_texts,
    with_prompt_column,
)
from sft import completions, token_pieces

pytest_plugins = ["micro"]
pytestmark = pytest.mark.usefixtures("no_figures", "no_bars")
PAD, EOS, BOS = 0, 1, 2
micro_config = partial(micro, prompt_tokens=0)
LETTERS = string.ascii_lowercase + string.ascii_uppercase + ":. \n"
TEMPLATE = (
    "{{ bos_token }}"
    "{% for m in messages %}"
    "{% if m['role'] == 'system' and m['content'] == 'no' %}{{ raise_exception('no system role here') }}{% endif %}"
    "{{ m['role'][0] | upper }}:{{ m['content'] }}."
    "{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)


def bos_tokenizer(ends: str = "<bos> $A", template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token a character, and BOS in front of a text, or what `ends` puts at its ends."""
    tokens = ["<pad>", "<eos>", "<bos>", *LETTERS]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    specials = [("<bos>", BOS), ("<eos>", EOS)]
    tokenizer.post_processor = processors.TemplateProcessing(single=ends, special_tokens=specials)
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>")
    whole.chat_template = template
    return whole


def ids_of(text: str) -> list[int]:
    return [3 + LETTERS.index(letter) for letter in text]


def decoded(ids: list[int]) -> str:
    return bos_tokenizer().decode(ids)


@pytest.fixture
def chat_place(place):  # noqa: F811
    """A model of chat, with prompts that are conversations."""
    ends = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": BOS}
    tiny_llama(vocab_size=3 + len(LETTERS), **ends).save_pretrained("CHAT")
    bos_tokenizer().save_pretrained("CHAT")
    rows = [{"messages": [{"role": "user", "content": "abc"[: 1 + n % 3]}]} for n in range(40)]
    Path("chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


# ----------------------------------------------------------------------------------------------------------------
# Asked as it was trained
# ----------------------------------------------------------------------------------------------------------------


def watched(monkeypatch, module) -> list[list[int]]:
    """The ids of every prompt that is responded to there."""
    seen, real = [], module.respond

    def respond(policy, tokenizer, prompts, *others, **named):
        seen.extend(prompts)
        return real(policy, tokenizer, prompts, *others, **named)

    monkeypatch.setattr(module, "respond", respond)
    return seen


def test_a_policy_of_chat_is_asked_as_it_was_trained(chat_place, monkeypatch, capsys):
    """By the printed command, by text, by a file of messages and by a pipe: the same ids as in training, one BOS."""
    import train

    trained_on = watched(monkeypatch, train)
    assert run_main(*command("CHAT", dataset_path="chat.jsonl")) == 0
    settings = json.loads(Path("OUT/run_config.json").read_text())
    assert settings["chat"] is True and settings["prompt_column"] == "messages"
    expected = [BOS, *ids_of("U:abc.A:")]
    assert expected in trained_on
    printed = re.search("now try: python main.py (.*)", capsys.readouterr().out)[1]
    *_, text = shlex.split(printed)
    seen = watched(monkeypatch, ask)
    assert run_main(*shlex.split(printed)) == 0
    assert seen == [[BOS, *ids_of(f"U:{text}.A:")]]
    assert capsys.readouterr().out.split("\n")[0] == text
    Path("asked.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "abc"}]})
        + "\n"
        + json.dumps([{"role": "system", "content": "b"}, {"role": "user", "content": "a"}])
        + "\n"
        + json.dumps("abc")
    )
    seen.clear()
    generate = ["--task", "generate", "--output_dir", "OUT"]
    assert run_main(*generate, "--prompts", "asked.jsonl", "--output", "out.jsonl") == 0
    assert seen == [expected, [BOS, *ids_of("S:b.U:a.A:")], expected]
    written = [json.loads(line)["prompt"] for line in Path("out.jsonl").read_text().splitlines()]
    assert written == ["abc", "system: b\nuser: a", "abc"]


def test_a_reward_is_given_the_whole_conversation_as_a_person_reads_it(chat_place, monkeypatch):
    """In training, evaluation and generation: without the template's marks, also where the policy itself is asked with
    a prompt that was cut."""
    import train

    talks = [[{"role": "system", "content": "s"}, {"role": "user", "content": text}] for text in ("a", "ab", "abc")]
    rows = "".join(json.dumps({"messages": talks[n % 3]}) + "\n" for n in range(40))
    Path("talks.jsonl").write_text(rows)
    Path("r.py").write_text(
        "import json\n"
        "def reward(prompts, responses, rows):\n"
        "    with open('seen.jsonl', 'a') as file:\n"
        "        file.write(''.join(json.dumps(prompt) + '\\n' for prompt in prompts))\n"
        "    return [float(len(response)) for response in responses]\n"
    )

    def given() -> list[str]:
        lines = Path("seen.jsonl").read_text().splitlines()
        Path("seen.jsonl").unlink()
        return [json.loads(line) for line in lines]

    trained_on = watched(monkeypatch, train)
    assert run_main(*command("CHAT", dataset_path="talks.jsonl", max_prompt_length=12)) == 0
    whole = [f"system: s\nuser: {text}" for text in ("a", "ab", "abc")]
    assert set(given()) == set(whole)
    assert {row["query"] for row in read_log(chat_place / "OUT")} == set(whole)
    assert {decoded(ids) for ids in trained_on} == {f"<bos>S:s.U:{text}.A:" for text in ("a", "ab", "bc")}
    assert run_main("--task", "evaluate", "--output_dir", "OUT", "--eval_samples", "6") == 0
    assert set(given()) <= set(whole)
    Path("asked.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    asked = ["--prompts", "asked.jsonl", "--output", "out.jsonl"]
    assert run_main("--task", "generate", "--output_dir", "OUT", *asked) == 0
    assert given() == whole
    assert [json.loads(line)["prompt"] for line in Path("out.jsonl").read_text().splitlines()] == whole


def test_texts_are_a_users_turn_on_request(chat_place, monkeypatch, capsys):
    import train

    trained_on = watched(monkeypatch, train)
    assert run_main(*command("CHAT", dataset_path="p.jsonl"), "--chat") == 0
    assert [BOS, *ids_of("U:abc.A:")] in trained_on
    seen = watched(monkeypatch, ask)
    assert run_main("--task", "generate", "--output_dir", "OUT", "--prompt", "abc") == 0
    assert seen == [[BOS, *ids_of("U:abc.A:")]]
    capsys.readouterr()
    words = "--chat puts a text into the model's own template: leave --prompt_template out"
    assert_refused(capsys, chat_place, [*command("CHAT", output_dir="O", prompt_template="{text}"), "--chat"], words)


def test_a_policy_with_a_template_is_asked_through_it(chat_place, monkeypatch, capsys):
    import train

    trained_on = watched(monkeypatch, train)
    assert run_main(*command("CHAT", dataset_path="p.jsonl", prompt_template="Say {text}:", max_prompt_length=20)) == 0
    assert [BOS, *ids_of("Say abc:")] in trained_on
    printed = re.search("now try: python main.py (.*)", capsys.readouterr().out)[1]
    *_, text = shlex.split(printed)
    seen = watched(monkeypatch, ask)
    assert run_main(*shlex.split(printed)) == 0
    assert seen == [[BOS, *ids_of(f"Say {text}:")]]
    capsys.readouterr()


def test_a_template_of_several_columns_takes_objects(chat_place, monkeypatch, capsys):
    rows = [{"one": "ab", "two": n % 3} for n in range(40)]
    Path("two.jsonl").write_text("".join(json.dumps(row | {"two": "xyz"[row["two"]]}) + "\n" for row in rows))
    flags = command("CHAT", dataset_path="two.jsonl", prompt_template="{one} or {two}.", max_prompt_length=20)
    assert run_main(*flags) == 0
    assert "now try: python main.py --task generate --output_dir OUT\n" in capsys.readouterr().out
    generate = ["--task", "generate", "--output_dir", "OUT"]
    assert_refused(capsys, chat_place, [*generate, "--prompt", "ab"], "has several columns: give them as objects")
    seen = watched(monkeypatch, ask)
    Path("asked.jsonl").write_text(json.dumps({"one": "x", "two": "y"}))
    assert run_main(*generate, "--prompts", "asked.jsonl") == 0
    assert seen == [[BOS, *ids_of("x or y.")]]


def test_the_printed_command_has_a_prompt_of_one_line_or_none():
    """A prompt of twenty lines is no example, and none is what a terminal would obey when it is copied."""
    config = micro_config()
    rows = [{"text": "a\n" * 20}, {"text": "b" * 300}, {"text": "a\x1b[201~\x15"}, {"text": "It's c"}]
    prompts = make_prompts(rows, config, bos_tokenizer("$A").__class__(tokenizer_object=free_tokenizer()))
    assert run.example(prompts, config) == """ --prompt 'It'"'"'s c'"""
    assert run.example(prompts[:3], config) == ""


def free_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_tokens(list(pre_tokenizers.ByteLevel.alphabet()))
    return tokenizer


# ----------------------------------------------------------------------------------------------------------------
# Special tokens at the ends
# ----------------------------------------------------------------------------------------------------------------


def test_an_end_that_a_causal_models_tokenizer_puts_behind_a_text_is_left_out(tmp_path):
    """Else the policy would go on behind an end. An encoder-decoder's text keeps it, as T5 has learned it."""
    tiny_llama(vocab_size=3 + len(LETTERS)).save_pretrained(tmp_path)
    bos_tokenizer("<bos> $A <eos>").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer("ab").input_ids == [BOS, *ids_of("ab")]
    assert tokenizer("ab", add_special_tokens=False).input_ids == ids_of("ab")
    assert tokenizer("ab", return_offsets_mapping=True).offset_mapping[1:] == [(0, 1), (1, 2)]
    assert load_tokenizer(str(tmp_path), "reward_model_path", writes=False)("ab").input_ids == [BOS, *ids_of("ab"), EOS]
    tiny_t5(vocab_size=3 + len(LETTERS)).save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path))("ab").input_ids == [BOS, *ids_of("ab"), EOS]


def test_what_stands_at_both_ends_stands_there_once():
    tokenizer = bos_tokenizer("<bos> $A <eos>")
    assert special_ends(tokenizer) == ([BOS], [EOS])
    assert text_ids(["ab", "<bos>ab", ""], tokenizer) == [[BOS, *ids_of("ab"), EOS]] * 2 + [[BOS, EOS]]
    assert text_ids(["abcdef", "<bos>abcdef"], tokenizer, 5) == [[BOS, *ids_of("def"), EOS]] * 2
    assert text_ids(["abcdef"], tokenizer, 2) == [[BOS, *ids_of("f"), EOS]]
    assert text_ids(["abcdef"], bos_tokenizer("$A"), 2) == [ids_of("ef")]


def test_sft_learns_texts_that_begin_as_prompts_do():
    tokenizer = bos_tokenizer()
    (example,) = token_pieces(["abc"], tokenizer, 20)
    assert example.completion == [BOS, *ids_of("abc"), EOS]
    first, last = token_pieces(["abcdef"], tokenizer, 5)
    assert first.completion == [BOS, *ids_of("abcd")] and last.completion == [*ids_of("cdef"), EOS]
    (plain,) = token_pieces(["abc"], bos_tokenizer("$A"), 20)
    assert plain.completion == [*ids_of("abc"), EOS]


def test_completions_are_learned_behind_the_very_prompts_of_ppo():
    tokenizer = bos_tokenizer()
    rows = [{"text": "abcdef", "answer": "gh"}]
    config = micro_config(completion_column="answer", max_prompt_length=4, max_new_tokens=5)
    (example,) = completions(rows, config, tokenizer, ends=[EOS])
    (prompt,) = limit_length(make_prompts(rows, config, tokenizer), config, tokenizer)
    assert example.prompt == prompt.ids == [BOS, *ids_of("def")]
    assert example.completion == [*ids_of("gh"), EOS]


# ----------------------------------------------------------------------------------------------------------------
# Cutting
# ----------------------------------------------------------------------------------------------------------------


def cut(rows: list[dict], limit: int, tokenizer=None, **settings) -> list[str]:
    tokenizer = tokenizer or bos_tokenizer()
    config = micro_config(max_prompt_length=limit, **settings)
    prompts = limit_length(make_prompts(rows, config, tokenizer), config, tokenizer)
    assert all(len(prompt.ids) <= limit for prompt in prompts)
    return [tokenizer.decode(prompt.ids) for prompt in prompts]


def test_a_cut_prompt_keeps_its_first_special_token_and_its_end():
    rows = [{"text": "abcdefgh"}, {"text": "ab"}]
    assert cut(rows, 4) == ["<bos>fgh", "<bos>ab"]
    assert cut(rows, 4, bos_tokenizer("<bos> $A <eos>")) == ["<bos>gh<eos>", "<bos>ab<eos>"]
    assert cut(rows, 4, bos_tokenizer("$A")) == ["efgh", "ab"]


@pytest.mark.parametrize("limit", range(13, 20))
def test_a_cut_prompt_keeps_the_text_of_its_template(limit):
    """`Sum: ` and ` So:` are ten characters with the BOS; what is cut is the beginning of the column's text."""
    (text,) = cut([{"text": "abcdefghijklmnop", "other": "Z"}], limit, prompt_template="Sum: {text} So:")
    assert text == f"<bos>Sum: {'abcdefghijklmnop'[-(limit - 10) :]} So:"


def test_of_several_columns_the_longest_is_cut():
    (text,) = cut([{"text": "ab", "other": "cdefghijkl"}], 10, prompt_template="{text}:{other}.")
    assert text == "<bos>ab:hijkl."


def test_a_template_that_leaves_no_room_is_refused():
    with pytest.raises(UsageError, match="--max_prompt_length 9 leaves no room for a prompt in its template"):
        cut([{"text": "abcdef"}], 9, prompt_template="Sum: {text} So:")


TALK = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "abcd"},
    {"role": "assistant", "content": "ef"},
    {"role": "user", "content": "ghijkl"},
]


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (100, "<bos>S:s.U:abcd.A:ef.U:ghijkl.A:"),
        (28, "<bos>S:s.U:abcd.A:ef.U:ghijkl.A:"),
        (27, "<bos>S:s.U:ghijkl.A:"),
        (16, "<bos>S:s.U:ghijkl.A:"),
        (14, "<bos>S:s.U:ijkl.A:"),
        (11, "<bos>S:s.U:l.A:"),
    ],
)
def test_a_cut_conversation_loses_its_oldest_turns_then_the_beginning_of_the_last(limit, expected):
    """Never the system's turn, the template's words, or its BOS."""
    assert cut([{"text": TALK}], limit) == [expected]


def test_a_conversation_with_no_room_for_a_letter_is_refused():
    with pytest.raises(UsageError, match="--max_prompt_length 10 leaves no room"):
        cut([{"text": TALK}], 10)


class Slow:
    """A tokenizer that cannot say where its tokens stand."""

    is_fast = False
    name_or_path = "slow"
    chat_template = None

    def __init__(self):
        self.fast = bos_tokenizer()

    def __call__(self, *arguments, **named):
        return self.fast(*arguments, **named)

    def __getattr__(self, name):
        return getattr(self.fast, name)


def test_a_tokenizer_without_offsets_cuts_and_refuses_first_words():
    (text,) = cut([{"text": "abcdefgh"}], 14, Slow(), prompt_template="Sum: {text} So:")
    assert text == "<bos>Sum: efgh So:"
    with pytest.raises(UsageError, match="--prompt_tokens 3 needs a tokenizer that knows where in the text its tokens"):
        make_prompts([{"text": "abc"}], micro(prompt_tokens=3), Slow())


def test_generate_takes_what_the_context_holds_and_says_when_it_cuts(place, capsys):  # noqa: F811
    """Training's --max_prompt_length 12 does not bind; 64 positions less 12 for the response do."""
    assert run_main(*command()) == 0
    capsys.readouterr()
    generate = ["--task", "generate", "--output_dir", "OUT", "--temperature", "0"]
    responses = []
    for prompt in ("a" + "bcdefghi" * 5, "h" + "bcdefghi" * 5):
        assert run_main(*generate, "--prompt", prompt) == 0
        out, err = capsys.readouterr()
        responses.append(out.removeprefix(prompt))
        assert "cut" not in err
    assert responses[0] != responses[1]
    assert run_main(*generate, "--prompt", "abcdefghi" * 6) == 0
    out, err = capsys.readouterr()
    assert err == "using OUT\n1 of 1 prompts were cut on the left to 52 tokens\n" and "cut" not in out


# ----------------------------------------------------------------------------------------------------------------
# One sentence
# ----------------------------------------------------------------------------------------------------------------

USER = {"role": "user", "content": "a"}
BAD_TALK = {  # the prompt column of row 7, and what is said of it
    "null content": (
        [{"role": "user", "content": None}],
        "row 7 holds {'role': 'user', 'content': None}, expected mess",
    ),
    "empty": ([], "row 7 holds no message to answer: []"),
    "strings": (["a"], "row 7 holds a, expected messages with a text as role and as content"),
    "no role": ([{"content": "a"}], "row 7 holds {"),
    "answered only": ([{"role": "assistant", "content": "a"}], "row 7 holds no message to answer"),
    "system role": ([{"role": "system", "content": "no"}, USER], "refuses row 7: no system role here"),
    "null": (None, "--prompt_column 'messages' holds a null in row 7, expected a text or list"),
}


@pytest.mark.parametrize("kind", BAD_TALK)
def test_what_is_no_conversation_is_refused_with_its_row(kind, chat_place, capsys):
    value, words = BAD_TALK[kind]
    rows = [{"messages": [USER]} for _ in range(40)]
    rows[6] = {"messages": value}
    if kind == "strings":  # a column of one type
        rows = [{"messages": ["a"]} for _ in range(40)]
        words = "row 1 holds a, expected messages with a text as role and as content"
    name = f"{kind.replace(' ', '-')}.jsonl"
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert_refused(capsys, chat_place, command("CHAT", dataset_path=name, n_updates=5), words)


def test_messages_for_a_model_without_a_template_are_refused(chat_place, capsys):
    words = "(--prompt_column 'messages', row 1), and the tokenizer of MODEL has no template for them"
    assert_refused(capsys, chat_place, command("MODEL", dataset_path="chat.jsonl"), words)


def test_conversations_that_were_answered_are_asked_again_and_that_is_said(chat_place, capsys):
    talk = [USER, {"role": "assistant", "content": "zz"}]
    rows = [{"messages": talk if n % 2 else [USER]} for n in range(40)]
    Path("answered.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run_main(*command("CHAT", dataset_path="answered.jsonl")) == 0
    told = re.search(
        r"(\d+) of 16 conversations end with an answer of the assistant's: it is left out", capsys.readouterr().out
    )
    assert 0 < int(told[1]) < 16
    assert {row["query"] for row in read_log(chat_place / "OUT")} == {"a"}


TEMPLATES = {
    "{text:1000000000}": "expected columns' names in braces, and nothing else there",
    "{text!r}": "expected columns' names in braces, and nothing else there",
    "{text.__class__}": "expected columns' names in braces, and nothing else there",
    "{text[0]}": "expected columns' names in braces, and nothing else there",
    "{}": "expected columns' names in braces, and nothing else there",
    "{text": "a brace itself is written twice",
    "Say this": "names no column in braces: every prompt would be the same",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_is_text_and_names(template):
    with pytest.raises(UsageError, match=re.escape(TEMPLATES[template])):
        Config(prompt_template=template)
    assert Config(prompt_template="{{{text}}} of {b c}").prompt_template


def test_a_templates_columns_are_what_is_needed_and_hold_no_null(place, capsys):  # noqa: F811
    """Not a --prompt_column beside them."""
    rows = [{"one": "ab", "two": None if n == 4 else "cd"} for n in range(40)]
    Path("t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run_main(*command(dataset_path="t.jsonl", prompt_template="{one}")) == 0
    capsys.readouterr()
    for template, words in (
        ("{one}{two}", "--prompt_template 'two' holds a null in row 5"),
        ("{one}{tow}", "--prompt_template 'tow' is no column of the data; it has one, two; did you mean two?"),
    ):
        flags = command(dataset_path="t.jsonl", prompt_template=template, output_dir="O", n_updates=5)
        assert_refused(capsys, place, flags, words)


def test_a_template_for_messages_is_refused():
    with pytest.raises(UsageError, match="--prompt_template is for columns of text; --prompt_column 'text' holds mess"):
        check_prompts([{"text": [USER]}], micro_config(prompt_template="{text}"))


@pytest.mark.parametrize(("least", "kept"), [(0, 3), (3, 2), (4, 1), (6, 0)])
def test_the_characters_of_a_conversation_are_counted_not_its_messages(least, kept, monkeypatch):
    import prompts

    rows = [
        {"text": [{"role": "user", "content": "ab"}]},
        {"text": [{"role": "user", "content": "a"}, {"role": "user", "content": "bc"}]},
        {"text": [{"role": "user", "content": "abcde"}]},
    ]
    monkeypatch.setattr(prompts, "load_rows", lambda *_: rows)
    config = micro_config(min_prompt_chars=least, max_prompt_length=100)
    if not kept:
        with pytest.raises(UsageError, match="holds no text of --min_prompt_chars to --max"):
            prompts.load_prompts(config, bos_tokenizer(), "train", 10)
    else:
        assert len(prompts.load_prompts(config, bos_tokenizer(), "train", 10)) == kept


def test_what_was_asked_is_found_again_in_every_kind_of_prompt():
    tokenizer = bos_tokenizer()
    for settings, row, expected in (
        ({}, {"text": "ab"}, "ab"),
        ({"prompt_template": "Say {text}."}, {"text": "ab"}, "ab"),
        ({"prompt_template": "{text} {b}."}, {"text": "ab", "b": "c"}, "ab c."),
        ({"chat": True}, {"text": "ab"}, "ab"),
        ({}, {"text": TALK}, "system: s\nuser: abcd\nassistant: ef\nuser: ghijkl"),
        ({}, {"text": [USER]}, "a"),
        ({}, {"text": [USER | {"role": "system"}]}, "system: a"),
        ({"chat": True, "system": "s"}, {"text": "ab"}, "ab"),
    ):
        config = micro_config(max_prompt_length=100, **settings)
        (prompt,) = make_prompts([row], config, tokenizer)
        assert asked(prompt, config) == expected


def test_a_conversation_is_rendered_as_transformers_does():
    tokenizer = bos_tokenizer()
    row = {"text": TALK}
    assert prompt_texts([row], micro_config(), tokenizer) == ["system: s\nuser: abcd\nassistant: ef\nuser: ghijkl"]
    assert chat_text(conversation(row, micro_config()), row, tokenizer) == "<bos>S:s.U:abcd.A:ef.U:ghijkl.A:"
    (prompt,) = make_prompts([row], micro_config(), tokenizer)
    assert prompt.ids == tokenizer.apply_chat_template(TALK, add_generation_prompt=True)["input_ids"]


def test_a_template_that_writes_no_first_token_is_given_none():
    """As in the model's own training; a text has the tokenizer's."""
    tokenizer = bos_tokenizer(template=TEMPLATE.removeprefix("{{ bos_token }}"))
    talk, text = make_prompts([{"text": TALK}, {"text": "ab"}], micro_config(), tokenizer)
    assert talk.ids == ids_of("S:s.U:abcd.A:ef.U:ghijkl.A:")
    assert text.ids == [BOS, *ids_of("ab")]


def test_a_templated_prompt_has_one_bos_for_the_reward_model_too(chat_place):
    """Whose own tokenizer puts one in front of a text, and whose template writes one."""
    config = transformers.GPT2Config(vocab_size=3 + len(LETTERS), n_embd=32, n_layer=1, n_head=2, pad_token_id=PAD)
    model = randomise(transformers.GPT2ForSequenceClassification(config), 2)
    model.save_pretrained("REWARD")
    bos_tokenizer().save_pretrained("REWARD")
    assert run_main(*command("CHAT", dataset_path="chat.jsonl", reward_fn="", reward_model_path="REWARD")) == 0
    for row in read_log(chat_place / "OUT")[:8]:
        ids = [BOS, *ids_of(f"U:{row['query']}.A:{row['response']}.")]
        with torch.no_grad():
            alone = model(torch.tensor([ids])).logits[0, 1].item()
        assert float(row["reward"]) == pytest.approx(alone, abs=1e-4)


def test_first_words_of_a_conversation_are_refused():
    with pytest.raises(UsageError, match="--prompt_tokens 3 is for texts; these prompts are conversations"):
        make_prompts([{"text": TALK}], micro(prompt_tokens=3), bos_tokenizer())


# ----------------------------------------------------------------------------------------------------------------
# Small things, each by hand
# ----------------------------------------------------------------------------------------------------------------


def test_a_text_of_special_tokens_alone_is_no_prompt():
    rows = [{"text": ""}, {"text": "<bos>"}, {"text": "a"}]
    for ends in ("<bos> $A", "<bos> $A <eos>"):
        (prompt,) = make_prompts(rows, micro_config(), bos_tokenizer(ends))
        assert prompt.text == "a"


def test_a_special_token_that_the_model_does_not_embed_is_named():
    tokenizer = bos_tokenizer()
    assert bare_ids(["a"], tokenizer) == [ids_of("a")]  # one that was not loaded with a model has no limit
    tokenizer.n_embedded = ids_of("c")[0]
    assert bare_ids(["ab"], tokenizer) == [ids_of("ab")]
    with pytest.raises(UsageError, match="the text 'ac' holds the special token c, which the model does not embed"):
        bare_ids(["ab", "ac"], tokenizer)


def test_a_template_with_first_words_is_asked_by_its_first_words():
    config = micro(prompt_tokens=3, prompt_template="{text}.", max_prompt_length=100)
    (prompt,) = make_prompts([{"text": "ab cdef"}], config, bos_tokenizer())
    assert asked(prompt, config) == prompt.text == "ab "


def test_the_end_of_a_text_in_tokens():
    for tokenizer in (bos_tokenizer(), Slow(), bos_tokenizer("<bos> $A <eos>")):
        assert [last_tokens("abcd", count, tokenizer) for count in (1, 3, 4)] == ["d", "bcd", "abcd"]


def test_a_conversation_without_a_system_keeps_no_turn_for_it():
    talk = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}, {"role": "user", "content": "de"}]
    assert cut([{"text": talk}], 20) == ["<bos>U:ab.A:c.U:de.A:"]
    assert cut([{"text": talk}], 16) == ["<bos>U:de.A:"]
    assert cut([{"text": talk}], 8) == ["<bos>U:de.A:"]
    two = [{"role": "user", "content": "ab"}, {"role": "user", "content": "cd"}, {"role": "user", "content": "ef"}]
    assert cut([{"text": two}], 14) == ["<bos>U:cd.U:ef.A:"]  # the oldest alone where that is enough


@pytest.mark.parametrize(
    ("row", "settings", "count"),
    [
        ({"text": "abc"}, {}, 3),
        ({"text": None}, {}, 0),
        ({"text": [{"role": "user", "content": None}, {"role": "user", "content": "ab"}, 7]}, {}, 2),
        ({"one": "ab", "two": 123, "three": None}, {"prompt_template": "{one}{two}{three}"}, 5),
        ({"text": "abcd", "one": "x"}, {"prompt_template": "{one}{text}"}, 4),
        ({"text": 120}, {"prompt_template": "{text}"}, 3),
        ({"one": 0, "two": False}, {"prompt_template": "{one}{two}"}, 6),
    ],
)
def test_characters_are_counted_by_hand(row, settings, count):
    assert n_characters(row, micro_config(**settings)) == count


@pytest.mark.parametrize("bounds", [{"min_prompt_chars": 2}, {"max_prompt_chars": 1}, {}])
def test_as_many_prompts_of_a_fitting_length_as_are_wanted(bounds, monkeypatch):
    """Those that do not fit are looked past; where any fits, no more rows are asked for than wanted."""
    import prompts

    rows = [{"text": "a" if n % 2 else "ab"} for n in range(20)]
    asked_for = []
    monkeypatch.setattr(prompts, "load_rows", lambda *a: (asked_for.append(a[2]), rows[: a[2]])[1])
    config = micro_config(max_prompt_length=100, **bounds)
    assert len(prompts.load_prompts(config, bos_tokenizer(), "train", 6)) == 6
    assert asked_for == [None if bounds else 6]


@pytest.mark.parametrize(("epochs", "n_prompts", "expected"), [(0.5, 100, 13), (2, 10, 5), (1, 8, 2), (0, 100, 7)])
def test_passes_over_the_prompts_in_rollouts_of_four(epochs, n_prompts, expected):
    assert n_rollouts(micro_config(epochs=epochs, n_updates=7, batch_size=4), n_prompts) == expected


def test_a_template_looks_for_no_other_column(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"query": "a", "b": "c"}) + "\n" for _ in range(40)))
    config = micro_config(dataset_path=str(tmp_path / "rows.jsonl"))
    assert with_prompt_column(config).prompt_column == "query"
    templated = with_prompt_column(micro_config(dataset_path=str(tmp_path / "rows.jsonl"), prompt_template="{b}"))
    assert templated.prompt_column == "text" and not templated.chat


# ----------------------------------------------------------------------------------------------------------------
# Files of mixed prompts
# ----------------------------------------------------------------------------------------------------------------


def test_texts_and_conversations_may_stand_in_one_file(chat_place, monkeypatch, capsys):
    """Each is asked as what it is, whatever stands beside it in the batch."""
    assert run_main(*command("CHAT", dataset_path="p.jsonl", prompt_template="Say {text}:", max_prompt_length=20)) == 0
    talk = json.dumps([USER])
    Path("mixed.jsonl").write_text("\n".join([json.dumps("ab"), talk, json.dumps({"text": "cd"}), talk]))
    expected = [[BOS, *ids_of(text)] for text in ("Say ab:", "U:a.A:", "Say cd:", "U:a.A:")]
    for batch_size in ("1", "4"):
        seen = watched(monkeypatch, ask)
        flags = ["--task", "generate", "--output_dir", "OUT", "--prompts", "mixed.jsonl", "--batch_size", batch_size]
        assert run_main(*flags) == 0
        assert seen == expected
        monkeypatch.undo()
        monkeypatch.chdir(chat_place)
    capsys.readouterr()


def test_an_empty_column_of_a_template_is_no_empty_prompt(chat_place, monkeypatch):
    rows = [{"one": "ab", "two": "c" * (n % 2)} for n in range(40)]
    Path("alpaca.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = command("CHAT", dataset_path="alpaca.jsonl", prompt_template="{one}b{two}", max_prompt_length=20)
    assert run_main(*flags) == 0
    Path("asked.jsonl").write_text(json.dumps({"one": "x", "two": "", "other": ""}))
    seen = watched(monkeypatch, ask)
    assert run_main("--task", "generate", "--output_dir", "OUT", "--prompts", "asked.jsonl") == 0
    assert seen == [[BOS, *ids_of("xb")]]


def test_a_prompt_without_a_token_is_refused(place, capsys):  # noqa: F811
    tokenizer = Tokenizer(
        models.BPE({"<pad>": 0, "<eos>": 1, **{letter: 2 + n for n, letter in enumerate("abcdefghi")}}, [])
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained("MODEL")
    assert run_main(*command()) == 0
    capsys.readouterr()
    for prompts in (["--prompt", "XYZ"], ["--prompt", "ab", "--prompt", "XYZ"]):
        flags = ["--task", "generate", "--output_dir", "OUT", *prompts]
        assert main.main(flags) == 2
        assert "the prompt ['XYZ'] has no token of this model's" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ends", "expected"), [("$A", ([], [])), ("<bos> $A", ([BOS], [])), ("<bos> $A <eos>", ([BOS], [EOS]))]
)
def test_ends_are_found_where_the_letter_a_has_no_token(ends, expected):
    digits = Tokenizer(models.BPE({"<pad>": PAD, "<eos>": EOS, "<bos>": BOS, "7": 3, "8": 4}, []))
    digits.post_processor = processors.TemplateProcessing(single=ends, special_tokens=[("<bos>", BOS), ("<eos>", EOS)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=digits, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>"
    )
    assert special_ends(tokenizer) == expected


def test_a_character_that_the_tokenizer_does_not_take_is_told():
    with pytest.raises(UsageError, match="a text has characters that the tokenizer does not take: WordLevel error"):
        text_ids(["ab?"], bos_tokenizer())


def test_a_template_over_messages_is_told_of_as_that(chat_place, capsys):
    """Not as --chat, which nobody gave."""
    flags = command("CHAT", dataset_path="chat.jsonl", prompt_template="{messages}", prompt_column="messages")
    assert_refused(
        capsys, chat_place, flags, "--prompt_template is for columns of text; --prompt_column 'messages' holds"
    )


def test_a_template_over_texts_and_messages_is_told_of_with_the_row():
    """Not filled in for some rows and left out for others."""
    rows = [Row({"text": "a"}, 9), Row({"text": [USER]}, 5), Row({"text": [USER]}, 3)]
    with pytest.raises(UsageError, match="--prompt_column 'text' holds messages in row 3, which go through"):
        check_prompts(rows, micro_config(prompt_template="{text}"))


def test_a_piped_prompt_for_a_template_of_several_columns_is_refused_as_that(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("abc\n"))
    with pytest.raises(UsageError, match=r"^the run's --prompt_template .* has several columns"):
        ask.given_rows(micro_config(task="generate", prompt_template="{one} {two}"))


def test_a_typed_prompt_has_all_its_responses_before_the_next_is_asked_for():
    """Also where they are more than a batch."""
    taken = []

    def typed():
        for text in ("a", "b"):
            taken.append(text)
            yield {"text": text}

    config = micro_config(task="generate", num_samples=5, batch_size=2, mini_batch_size=2)
    answered = []
    for rows, numbers in ask.batches(typed(), False, config):
        assert len(rows) == len(numbers)
        answered += [row["text"] for row in rows]
        assert set(taken) == set(answered)
    assert answered == ["a"] * 5 + ["b"] * 5


def test_a_single_prompt_that_is_held_out_is_told(monkeypatch, capsys):
    """Its interval has no width, which says nothing."""
    import prompts

    monkeypatch.setattr(prompts, "load_rows", lambda config, part, limit: [{"text": "abc"}])
    config = micro_config(prompt_tokens=0)
    assert len(prompts.load_prompts(config, bos_tokenizer(), "train", 5)) == 1
    assert capsys.readouterr().out == ""
    prompts.load_prompts(config, bos_tokenizer(), "test", 5)
    assert "one prompt alone is held out for test: no change can be told" in capsys.readouterr().out
