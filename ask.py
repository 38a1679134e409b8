"""The `generate` task: prompts from flags, a file or the keyboard; responses on the screen or in a file."""

import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch

from checkpoint import check_writable, write_whole
from config import Config, UsageError, template_fields
from dataset import Row
from device import prepare_device
from generate import respond
from loading import load_policy, load_tokenizer, one_sentence
from model import PolicyModel
from preflight import prompt_room
from prompts import Prompt, asked, limit_length, make_prompts
from randomness import uniforms
from reward import load_reward_terms, total_reward


def generate(config: Config, reward_model_path: str) -> None:
    """The `generate` task: respond to --prompt, --prompts FILE, or what is typed, and print or write the responses."""
    output = Path(config.output)
    if config.output:
        check_new_file(output)
    given = given_rows(config)
    if config.output and config.dry_run:
        print(f"dry run: {len(given) * config.num_samples} responses would be written to {output}, such as these:")
        given = given[:3]
        config = replace(config, num_samples=1)
    config = replace(config, prompt_tokens=0)  # they are for cutting training texts down to openings
    device = prepare_device(config)
    tokenizer = load_tokenizer(config.output_dir, "output_dir")
    policy = load_policy(config, config.output_dir, device).eval()
    room = prompt_room(config, policy)
    terms = load_reward_terms(config, reward_model_path, device, policy.separator) if config.output else {}
    lines = []
    for rows, random_numbers in batches(given or typed_rows(config), bool(given), config):
        with redirect_stdout(sys.stderr):  # what is said of long prompts is no response
            prompts = make_all_prompts(rows, config, tokenizer)
            prompts = limit_length(prompts, config, tokenizer, room)
        if len(rows) == 1 and sys.stdout.isatty() and not (config.output or config.stop):
            stream(policy, tokenizer, prompts[0], random_numbers, config)
            continue
        drawn = respond(policy, tokenizer, [prompt.ids for prompt in prompts], random_numbers, config)
        responses = [before_stop(text, config.stop) for text in drawn.texts]
        if config.output:
            lines += json_lines(prompts, responses, terms, config)
        else:
            for prompt, response in zip(prompts, responses, strict=True):
                print(asked(prompt, config) + shown_separator(policy, config) + response)
    if config.output and config.dry_run:
        print("".join(lines), end="")
    elif config.output:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output, "".join(lines))
        print(f"{len(lines)} responses: {output}")


def make_all_prompts(rows: list[dict], config: Config, tokenizer) -> list[Prompt]:
    """One prompt a row, each as what it is, a text or a conversation. Raises UsageError for a row without a token."""
    prompts = []
    for row in rows:
        made = make_prompts([row], row_config(row, config), tokenizer)
        if not made:
            raise UsageError(f"the prompt {str(list(row.values()))[:80]} has no token of this model's")
        prompts += made
    return prompts


def row_config(row: dict, config: Config) -> Config:
    """The config without the run's template where the row is a conversation."""
    is_talk = isinstance(row.get(config.prompt_column), list)
    return replace(config, prompt_template="") if is_talk else config


def shown_separator(policy: PolicyModel, config: Config) -> str:
    return "\n" if config.chat else policy.separator


def check_new_file(path: Path) -> None:
    """Raise UsageError unless the file is new and its folder can be written."""
    if os.path.lexists(path):
        raise UsageError(f"--output {path} exists already; name another file, so that nothing is overwritten")
    check_writable(path.parent)


def batches(rows: Iterable[dict], are_given: bool, config: Config) -> Iterator[tuple[list[dict], torch.Tensor]]:
    """Prompts' rows to respond to at once, each as often as --num_samples says, with the random numbers of each
    response. A prompt that is typed is responded to before the next one is asked for.
    """
    wanted = (row for row in rows for _ in range(config.num_samples))
    size = config.batch_size if are_given else config.num_samples
    count = 0
    while batch := list(islice(wanted, size)):
        shape = (1, config.max_new_tokens)
        random_rows = [uniforms(config.seed, "generate", count + i, shape) for i in range(len(batch))]
        yield batch, torch.cat(random_rows)
        count += len(batch)


def json_lines(prompts: list[Prompt], responses: list[str], terms: dict, config: Config) -> list[str]:
    """A line of JSON a response: prompt, response and reward."""
    texts = [prompt.text for prompt in prompts]
    rows = [prompt.row for prompt in prompts]
    rewards, _ = total_reward(terms, prompts=texts, responses=responses, rows=rows, config=config)
    lines = []
    for prompt, response, reward in zip(prompts, responses, rewards.tolist(), strict=True):
        row = {"prompt": asked(prompt, config), "response": response, "reward": reward}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    return lines


def before_stop(text: str, stop: tuple[str, ...]) -> str:
    """The text up to where the first of the stop strings begins; all of it where there is none."""
    return text[: min((text.index(word) for word in stop if word in text), default=len(text))]


def row_of(text: str, config: Config) -> dict:
    """The row that a prompt of text is in: in the prompt column, or the one that the run's template names."""
    if not config.prompt_template:
        return {config.prompt_column: text}
    names = template_fields(config.prompt_template)
    if len(names) > 1:
        raise UsageError(
            f"the run's --prompt_template {config.prompt_template!r} has several columns: give them as objects, "
            "--prompts FILE.jsonl"
        )
    return {names[0]: text}


def given_rows(config: Config) -> list[dict]:
    """The prompts of --prompt and --prompts, else a line each from standard input; none where that is a terminal."""
    piped = not (sys.stdin and sys.stdin.isatty())
    rows = [row_of(text, config) for text in config.prompt]
    if config.prompts:
        rows += read_prompts(config.prompts, config)
    with one_sentence("a prompt is not text in UTF-8"):
        if not rows and piped:
            rows = [row_of(line.rstrip("\n"), config) for line in sys.stdin or () if line.strip()]
        json.dumps(rows, ensure_ascii=False).encode()
    if not rows and (config.output or piped):
        raise UsageError("there is no prompt; give --prompt or --prompts, or a prompt a line on standard input")
    if not all(text.strip() for text in config.prompt):
        raise UsageError("a prompt is empty; expected some text for the model to go on from")
    return rows


def read_prompts(path: str, config: Config) -> list[dict]:
    """Rows from a file: of lines of text, or of JSON texts, conversations, or objects that hold either as the prompt
    column, `prompt`, `query` or `messages`, or all columns of the run's template.

    Raises UsageError naming the line, or the entry of a list, what was found there and what was expected.
    """
    kind = Path(path).suffix.lower()
    wanted = f"a JSON text or a list of messages, or an object with one as {' or '.join(prompt_names(config))}"
    rows = []
    with one_sentence(f"--prompts {path}"):
        if kind not in ("", ".txt", ".jsonl", ".json"):
            raise ValueError(f"it ends in {kind}, expected .txt, .jsonl or .json")
        text = Path(path).read_text(encoding="utf-8-sig")
        entries = json.loads(text) if kind == ".json" else text.split("\n")  # U+2028 ends no line
        if not isinstance(entries, list):
            raise ValueError(f"it holds a {type(entries).__name__}, expected a list of prompts")
        for number, entry in enumerate(entries, 1):
            if kind != ".json" and not entry.strip():
                continue
            found = None
            with suppress(ValueError, RecursionError):
                found = json.loads(entry) if kind == ".jsonl" else entry
            row = prompt_row(found, number, config)
            if row is None:
                shown = (json.dumps(entry, ensure_ascii=False) if kind == ".json" else entry)[:80]
                place = f"{'entry' if kind == '.json' else 'line'} {number}"
                raise ValueError(f"{place}: found {shown}, expected {wanted}")
            rows.append(row)
        if not rows:
            raise ValueError("it holds no prompts")
    return rows


def prompt_names(config: Config) -> list[str]:
    """Under which names an object may hold a prompt, the run's own first."""
    return list(dict.fromkeys((config.prompt_column, "prompt", "query", "messages")))


def prompt_row(found, number: int, config: Config) -> Row | None:
    """The row of one entry of a file; None where it holds no prompt."""
    if isinstance(found, dict):
        fields = template_fields(config.prompt_template) if config.prompt_template else ()
        if fields and all(found.get(name) is not None for name in fields):
            return Row(found, number)
        found = next((found[name] for name in prompt_names(config) if found.get(name)), None)
    if isinstance(found, list) and found and isinstance(found[0], dict):
        return Row({config.prompt_column: found}, number)
    if isinstance(found, str) and found.strip():
        return Row(row_of(found, config), number)
    return None


def typed_rows(config: Config) -> Iterator[dict]:
    """The lines that are typed on the terminal, until the input ends; blank ones are asked for again."""
    print("type the beginning of a text; end with Ctrl-D\n> ", end="", flush=True)
    for line in sys.stdin:
        if line.strip():
            yield row_of(line.rstrip("\n"), config)
        print("> ", end="", flush=True)
    print()


def stream(policy: PolicyModel, tokenizer, prompt: Prompt, random_numbers: torch.Tensor, config: Config) -> None:
    """Print a prompt, and the response to it as it is drawn.

    All of it is decoded anew each time, behind the prompt: what a token looks like may depend on those around it.
    """
    drawn = [] if policy.is_encoder_decoder else list(prompt.ids)
    start = len(tokenizer.decode(drawn, skip_special_tokens=True))
    shown = ""

    def show(tokens: torch.Tensor) -> None:
        nonlocal shown
        drawn.extend(tokens.tolist())
        text = tokenizer.decode(drawn, skip_special_tokens=True)[start:].rstrip("\ufffd")  # half a letter has to wait
        print(text[len(shown) :], end="", flush=True)
        shown = max(shown, text, key=len)

    print(asked(prompt, config), end=shown_separator(policy, config), flush=True)
    responses = respond(policy, tokenizer, [prompt.ids], random_numbers, config, on_tokens=show)
    print(responses.texts[0][len(shown) :])
