"""The `generate` task: what is asked, by flags, files or the keyboard, and what is shown or written."""

import io
import itertools
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from micro import micro_config
from tiny_models import tiny_policy
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import ask
import main
from ask import batches, before_stop, given_rows, read_prompts, stream, typed_rows
from config import Config, UsageError
from generate import respond
from progress import visible
from prompts import Prompt
from randomness import uniforms

pytest_plugins = ["micro"]


# ----------------------------------------------------------------------------------------------------------------
# Prompts
# ----------------------------------------------------------------------------------------------------------------


def test_prompts_are_read_from_files(tmp_path):
    def read(name: str, text: str) -> list[str]:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return [row["text"] for row in read_prompts(str(tmp_path / name), micro_config())]

    assert read("a.txt", "Ein Café\n\n  \nB\n") == ["Ein Café", "B"]
    assert read("a.jsonl", '{"prompt": "A"}\n"B"\n\n{"query": "C"}\n') == ["A", "B", "C"]
    assert read("a.json", '["A", {"query": "B"}]') == ["A", "B"]
    assert read("b.txt", "\ufeffA\r\nB") == ["A", "B"]  # as Windows writes it
    assert read("b.json", '["A", "B"]') == read("c.json", '[{"text": "A"}, {"text": "B"}]') == ["A", "B"]


def test_the_prompt_column_comes_before_the_usual_names(tmp_path):
    rows = [{"query": "A", "dialogue": "B", "prompt": "C"}, {"query": "A", "prompt": "C"}, {"query": "A", "prompt": ""}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    found = read_prompts(str(tmp_path / "rows.jsonl"), micro_config(prompt_column="dialogue"))
    assert [row["dialogue"] for row in found] == ["B", "C", "A"]
    assert [row["text"] for row in read_prompts(str(tmp_path / "rows.json"), micro_config())] == ["C", "C", "A"]


def test_a_row_keeps_its_other_columns(tmp_path):
    """A reward may ask for them."""
    talk = [{"role": "user", "content": "C"}]
    rows = [{"query": "A", "answer": 1}, {"text": "B", "answer": 2}, {"messages": talk, "answer": 3}, "D"]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    found = read_prompts(str(tmp_path / "rows.json"), micro_config())
    assert found == [
        {"query": "A", "text": "A", "answer": 1},
        {"text": "B", "answer": 2},
        {"messages": talk, "text": talk, "answer": 3},
        {"text": "D"},
    ]
    templated = read_prompts(str(tmp_path / "rows.json"), micro_config(prompt_template="Say {dialogue}"))
    assert templated[0] == {"query": "A", "dialogue": "A", "answer": 1}


WANTED = "expected a JSON text or a list of messages, or an object with one as text or prompt or query or messages"
BROKEN = {  # what a file of prompts holds: what is said of it
    "a.jsonl": ('{"text": "A"}\n\n{"text": B}\n', f'a.jsonl: line 3: found {{"text": B}}, {WANTED}'),
    "b.jsonl": ('"A"\n{"text": \n', f'b.jsonl: line 2: found {{"text": , {WANTED}'),
    "c.jsonl": ('{"a": 1}', f'c.jsonl: line 1: found {{"a": 1}}, {WANTED}'),
    "d.jsonl": ('"A"\n\n["B"]', f'd.jsonl: line 3: found ["B"], {WANTED}'),
    "e.jsonl": ('{"prompt": null}', f'e.jsonl: line 1: found {{"prompt": null}}, {WANTED}'),
    "f.jsonl": ("[" * 100_000, f"f.jsonl: line 1: found {'[' * 80}, {WANTED}"),
    "g.jsonl": ('"A"\nThe film', f"g.jsonl: line 2: found The film, {WANTED}"),
    "a.json": ('[\n  "A"\n  "B"\n]', "a.json: Expecting ',' delimiter: line 3 column 3"),
    "b.json": ('["A"', "b.json: Expecting ',' delimiter: line 1 column 5"),
    "c.json": ('["A", {"text": " "}]', f'c.json: entry 2: found {{"text": " "}}, {WANTED}'),
    "d.json": ('["Ä", 2]', f"d.json: entry 2: found 2, {WANTED}"),
    "e.json": ('{"prompt": "A"}', "e.json: it holds a dict, expected a list of prompts"),
    "f.json": ("[]", "f.json: it holds no prompts"),
    "g.json": ('["A", " "]', f'g.json: entry 2: found " ", {WANTED}'),
    "a.txt": ("\n \n", "a.txt: it holds no prompts"),
    "a.csv": ("text\nA\n", "a.csv: it ends in .csv, expected .txt, .jsonl or .json"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_of_prompts_is_refused_with_place_and_finding(name, tmp_path):
    text, message = BROKEN[name]
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=f"--prompts .*{re.escape(message)}"):
        read_prompts(str(tmp_path / name), micro_config())


def test_a_file_of_prompts_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "bytes.txt").write_bytes(b"caf\xe9")
    reasons = {"x.jsonl": "No such file", "no/x.txt": "No such file", "": "it ends in|Is a dir", "bytes.txt": "end of"}
    for path, reason in reasons.items():
        with pytest.raises(UsageError, match=rf"--prompts {tmp_path / path}: .*({reason})"):
            read_prompts(str(tmp_path / path), micro_config())


def test_prompts_that_are_no_text_are_refused(tmp_path, monkeypatch):
    """Half of a surrogate pair: what a byte that is not UTF-8 becomes on the command line, and what JSON may hold."""
    (tmp_path / "half.jsonl").write_text('"\\ud800"')
    piped = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", piped)
    for given in ({"prompt": ("caf\udce9",)}, {"prompts": str(tmp_path / "half.jsonl")}, {}):
        with pytest.raises(UsageError, match="a prompt is not text in UTF-8: 'utf-8' codec can't"):
            given_rows(micro_config(task="generate", **given))


def test_what_is_piped_is_read_as_a_file_is(monkeypatch):
    """As UTF-8, whatever the terminal's encoding is, and without a mark of it at the beginning."""
    piped = io.TextIOWrapper(io.BytesIO("\ufeffCafé\r\n\r\nB".encode()), encoding="ascii")
    monkeypatch.setattr(sys, "stdin", piped)
    assert given_rows(micro_config(task="generate")) == [{"text": "Café"}, {"text": "B"}]


def test_a_line_that_is_no_text_is_asked_for_again(monkeypatch, capsys):
    typed = io.TextIOWrapper(io.BytesIO(b"caf\xe9\nCaf\xc3\xa9\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", typed)
    assert list(typed_rows(micro_config(task="generate"))) == [{"text": "Café"}]
    assert "that is not text in UTF-8\n> " in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------
# Responses on the screen
# ----------------------------------------------------------------------------------------------------------------


class Screen(io.StringIO):
    """A terminal that remembers what stands on it at every flush."""

    def __init__(self):
        super().__init__()
        self.states = []

    def isatty(self) -> bool:
        return True

    def flush(self):
        self.states.append(self.getvalue())


KINDS = {"byte-level": "gpt2", "no leading space": "gpt2", "encoder-decoder": "t5"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_shows_word_by_word_what_a_batch_shows_at_once(kind, monkeypatch, tokenizer, t5_folder):
    """The oracle is `respond`; each state of the screen begins the next."""
    tokenizer = tokenizer if kind == "byte-level" else AutoTokenizer.from_pretrained(t5_folder)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    policy, prompt = tiny_policy(KINDS[kind], vocab_size=len(tokenizer), **ends), "The film was"
    shown = 0
    for seed in range(5):
        config = Config(task="generate", max_new_tokens=30)
        ids, numbers = [tokenizer(prompt).input_ids], uniforms(seed, "generate", 0, (1, 30))
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", screen := Screen())
            stream(policy, tokenizer, Prompt(prompt, ids[0], {}), numbers, config)
        response = respond(policy, tokenizer, ids, numbers, config).texts[0]
        whole = prompt + policy.separator + response + "\n"
        assert screen.getvalue() == visible(whole)
        assert all(after.startswith(before) for before, after in itertools.pairwise(screen.states))
        shown += len(set(screen.states))
    assert shown > 30


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """Like Llama's: a word's space is the beginning of its token, and is dropped in front of a text."""
    vocabulary = {token: i for i, token in enumerate(["</s>", "<pad>", "▁a", "▁", "b", "\n", "▁c", "d"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")


@pytest.mark.parametrize("ids", [[2, 4], [2, 5]], ids=["", "a prompt that ends its line"])
def test_a_stream_keeps_the_spaces_that_begin_a_line(ids, monkeypatch):
    tokenizer, drawn = metaspace_tokenizer(), [6, 5, 3, 4, 6, 5, 6]
    assert tokenizer.decode(drawn) == "c\n b c\n c"

    def drawing(*_, on_tokens):
        for token in drawn:
            on_tokens(torch.tensor([token]))
        return SimpleNamespace(texts=[" c\n b c\n c"])

    monkeypatch.setattr(ask, "respond", drawing)
    monkeypatch.setattr(sys, "stdout", screen := Screen())
    policy = SimpleNamespace(is_encoder_decoder=False, separator="")
    stream(policy, tokenizer, Prompt("A long prompt", ids, {}), None, micro_config())
    assert screen.getvalue() == "A long prompt c\n b c\n c\n"
    assert len(set(screen.states)) == 1 + len(drawn)


def test_half_a_letter_waits_for_the_rest_of_it(monkeypatch, tokenizer):
    ids = tokenizer("é ü").input_ids
    responses = [tokenizer.decode(ids), tokenizer.decode(ids[:-1])]
    for end, response in zip((len(ids), len(ids) - 1), responses, strict=True):

        def drawing(*_, on_tokens, end=end, response=response):
            for token in ids[:end]:
                on_tokens(torch.tensor([token]))
            return SimpleNamespace(texts=[response])

        monkeypatch.setattr(ask, "respond", drawing)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", screen := Screen())
            policy = SimpleNamespace(is_encoder_decoder=False, separator="")
            stream(policy, tokenizer, Prompt("x", [5], {}), None, micro_config())
        assert not any("\ufffd" in state for state in screen.states)
        assert screen.getvalue() == f"x{response}\n"


def test_a_prompt_is_answered_where_there_is_no_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert given_rows(micro_config(task="generate", prompt=("A",))) == [{"text": "A"}]
    with pytest.raises(UsageError, match="there is no prompt"):
        given_rows(micro_config(task="generate"))


@pytest.mark.parametrize(("are_given", "sizes"), [(True, [4, 2]), (False, [2, 2, 2])])
def test_every_response_has_random_numbers_of_its_own(are_given, sizes):
    """Those of its place in the whole command, whatever the batches are: no two responses share any."""
    config = micro_config(task="generate", num_samples=2, batch_size=4, seed=5)
    asked = list(batches([{"text": text} for text in "abc"], are_given, config))
    assert [len(rows) for rows, _ in asked] == sizes
    assert [row["text"] for rows, _ in asked for row in rows] == list("aabbcc")
    numbers = torch.cat([numbers for _, numbers in asked])
    expected = torch.cat([uniforms(5, "generate", i, (1, config.max_new_tokens)) for i in range(6)])
    assert torch.equal(numbers, expected) and len(numbers.unique()) == numbers.numel()


def test_a_terminal_shows_all_of_a_long_prompt(workplace, monkeypatch, capsys):
    prompt = "My brother and I saw this film last night at the cinema, and we laughed"
    command = ["--task", "generate", "--prompt", prompt]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", screen := Screen())
        assert main.main(command) == 0
    assert main.main(command) == 0
    assert screen.getvalue() == visible(capsys.readouterr().out) and prompt in screen.getvalue()


def test_no_link_and_no_name_is_written_over(workplace, capsys):
    os.symlink("nowhere", "link.jsonl")
    assert main.main(["--task", "generate", "--prompt", "A", "--output", "link.jsonl"]) == 2
    assert "link.jsonl exists already" in capsys.readouterr().err
    assert os.path.islink("link.jsonl") and not Path("nowhere").exists()


def test_no_prompt_and_no_response_can_steer_a_terminal(workplace, monkeypatch, capsys):
    """One that is drawn token by token, and several at once; a pipe is given every letter as it is."""
    steering = "\x1b[2J\u202e\r"
    monkeypatch.setattr(ask, "draw_responses", lambda _, __, prompts, *___: [f"well{steering}"] * len(prompts))
    for given in (["--prompt", f"The{steering}"], ["--prompt", "The film", "--prompt", f"A{steering}"]):
        command = ["--task", "generate", *given]
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", screen := Screen())
            assert main.main(command) == 0
        assert r"\x1b[2J\u202e\r" in screen.getvalue()
        assert not set(screen.getvalue()) & set("\x1b\u202e\r")
    assert main.main(command) == 0
    assert capsys.readouterr().out == f"The filmwell{steering}\nA{steering}well{steering}\n"


def test_a_response_that_is_streamed_cannot_steer_a_terminal(monkeypatch):
    tokenizer = metaspace_tokenizer()
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **_: "".join("ab\x1b[c"[i] for i in ids))

    def drawing(*_, on_tokens):
        for token in (2, 3, 4):
            on_tokens(torch.tensor([token]))
        return SimpleNamespace(texts=["\x1b[c\x07"])

    monkeypatch.setattr(ask, "respond", drawing)
    monkeypatch.setattr(sys, "stdout", screen := Screen())
    policy = SimpleNamespace(is_encoder_decoder=False, separator="")
    stream(policy, tokenizer, Prompt("ab", [0, 1], {}), None, micro_config())
    assert screen.getvalue() == "ab\\x1b[c\\x07\n"


@pytest.mark.parametrize("stop", [[], ["--stop", "e", "--stop", "an"]], ids=["", "stop"])
def test_a_terminal_shows_what_a_pipe_is_given(stop, workplace, monkeypatch, capsys):
    """Word by word, but with a stop string at once: what follows one is never seen. Control characters as escapes."""
    for given in (["--prompt", "The film"], ["--prompt", "The film", "--prompt", "A comedy"]):
        command = ["--task", "generate", *given, *stop]
        assert main.main(command) == 0
        piped = capsys.readouterr().out
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", screen := Screen())
            assert main.main(command) == 0
        assert screen.getvalue() == visible(piped)
        assert (len(set(screen.states)) > 2) == (len(given) == 2 and not stop)


def test_a_response_ends_before_the_first_stop_string_by_hand():
    text = "good.\n\nThe end. The"
    assert before_stop(text, ()) == before_stop(text, ("the", "END")) == text
    assert before_stop(text, ("The",)) == "good.\n\n"
    assert before_stop(text, ("The", "\n")) == before_stop(text, ("\n", "The")) == "good."
    assert before_stop(text, ("good",)) == ""


def test_a_stop_string_ends_what_is_printed_written_and_rewarded(workplace, capsys):
    """Beside the same responses without one; the reward is the length of what it is given."""
    Path("reward.py").write_text(
        "def reward(prompts, responses, rows):\n    return [len(text) for text in responses]\n"
    )
    command = ["--task", "generate", "--prompt", "The film", "--num_samples", "6", "--reward_fn", "reward.py:reward"]
    stop = ["--stop", "e", "--stop", "an"]

    def written(*flags: str) -> list[dict]:
        Path("out.jsonl").unlink(missing_ok=True)
        assert main.main([*command, *flags, "--output", "out.jsonl"]) == 0
        return [json.loads(line) for line in Path("out.jsonl").read_text(encoding="utf-8").splitlines()]

    whole, cut = written(), written(*stop)
    expected = [re.split("e|an", row["response"])[0] for row in whole]
    assert [row["response"] for row in cut] == expected != [row["response"] for row in whole]
    assert [row["reward"] for row in cut] == [len(text) for text in expected]
    capsys.readouterr()
    assert main.main([*command, *stop]) == 0
    printed = capsys.readouterr().out
    assert printed == "".join(f"The film{text}\n" for text in expected)
