"""The `generate` task: prompts from flags, a file or the keyboard; responses on the screen or in a file."""

import io
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from config import Config, RunError, UsageError, template_fields
from dataset import Row
from device import prepare_device, products, settle_precision
from files import check_writable, write_whole
from generate import respond
from hub import one_sentence
from loading import load_policy, load_tokenizer
from model import PolicyModel
from preflight import check_static_cache, prompt_room
from progress import tell, visible
from prompts import Prompt, asked, limit_length, make_prompts, separator_of
from randomness import uniforms
from reward import RewardTerm, load_reward_terms, total_reward

Group = tuple[list[Prompt], torch.Tensor]  # prompts to respond to at once, and random numbers, a row for each


def generate(config: Config, reward_model_path: str) -> None:
    """The `generate` task: respond to --prompt, --prompts FILE, or what is typed, and print or write the responses."""
    if config.output:
        check_new_file(Path(config.output))
    given = given_rows(config)
    if config.output and config.dry_run:
        print(
            f"dry run: {len(given) * config.num_samples} responses would be written to {config.output}, such as these:"
        )
        given = given[:3]
        config = replace(config, num_samples=1)
    config = replace(config, prompt_tokens=0)  # they are for cutting training texts down to openings
    device = prepare_device(config)
    tokenizer = load_tokenizer(config.output_dir, "output_dir")
    policy = load_policy(config, config.output_dir, device, flag="output_dir").eval()
    settle_precision(policy.language_model, products(config.batch_size), config)
    check_static_cache(config, policy)
    terms = terms_to_write(config, reward_model_path, device, separator_of(policy, config))
    to_answer = partial(make_all_prompts, config=config, tokenizer=tokenizer, room=prompt_room(config, policy))
    prompts = to_answer(given) if given else (prompt for row in typed_rows(config) for prompt in to_answer([row]))
    groups = batches(prompts, bool(given), config)
    if config.output:
        write_responses(groups, policy, tokenizer, terms, config)
    else:
        show_responses(groups, policy, tokenizer, config)


def show_responses(groups: Iterable[Group], policy: PolicyModel, tokenizer, config: Config) -> None:
    """Print each prompt with the response to it; on a terminal a single one as it is drawn."""
    for prompts, random_numbers in groups:
        if len(prompts) == 1 and sys.stdout.isatty() and not config.stop:
            stream(policy, tokenizer, prompts[0], random_numbers, config)
            continue
        responses = draw_responses(policy, tokenizer, prompts, random_numbers, config)
        for prompt, response in zip(prompts, responses, strict=True):
            print(as_shown(asked(prompt, config) + separator_of(policy, config) + response))


def write_responses(
    groups: Iterable[Group], policy: PolicyModel, tokenizer, terms: dict[str, RewardTerm], config: Config
) -> None:
    """Write a line of JSON a response into --output, and say how many have no reward, and why, where it failed."""
    rows, problems = [], []
    for prompts, random_numbers in groups:
        responses = draw_responses(policy, tokenizer, prompts, random_numbers, config)
        new_rows, problem = output_rows(prompts, responses, terms, config)
        rows += new_rows
        problems += [problem] * len(new_rows) if problem else []
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if config.dry_run:
        print(as_shown(lines), end="")
    else:
        output = Path(config.output)
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output, lines)
        print(f"{len(rows)} responses: {output}")
    if problems:
        told = f"note: {len(problems)} of {len(rows)} have null for a reward"
        tell(f"{told}: {problems[0]}; --without_reward leaves it out")


def draw_responses(
    policy: PolicyModel, tokenizer, prompts: list[Prompt], random_numbers: torch.Tensor, config: Config
) -> list[str]:
    drawn = respond(policy, tokenizer, [prompt.ids for prompt in prompts], random_numbers, config)
    return [before_stop(text, config.stop) for text in drawn.texts]


def terms_to_write(
    config: Config, reward_model_path: str, device: torch.device, separator: str
) -> dict[str, RewardTerm]:
    """The run's reward, where it is to be written. Raises UsageError if it cannot be loaded, with the way round it."""
    if not config.output or config.without_reward:
        return {}
    try:
        return load_reward_terms(config, reward_model_path, device, separator)
    except UsageError as error:
        raise UsageError(f"{error}; or write responses alone with --without_reward") from None


def make_all_prompts(rows: list[dict], config: Config, tokenizer, room: int) -> list[Prompt]:
    """One prompt a row, each as what it is, a text or a conversation, in the room that the model has for it.

    Raises UsageError for a row without a token.
    """
    prompts = []
    for row in rows:
        made = make_prompts([row], row_config(row, config), tokenizer)
        if not made:
            raise UsageError(f"the prompt {str(list(row.values()))[:80]} has no token of this model's")
        prompts += made
    with redirect_stdout(sys.stderr):  # what is said of long prompts is no response
        return limit_length(prompts, config, tokenizer, room)


def row_config(row: dict, config: Config) -> Config:
    """The config without the run's template where the row is a conversation."""
    is_talk = isinstance(row.get(config.prompt_column), list)
    return replace(config, prompt_template="") if is_talk else config


def as_shown(text: str) -> str:
    """What is printed of a text: on a terminal nothing that it would obey, elsewhere all, to the letter."""
    return visible(text) if sys.stdout.isatty() else text


def check_new_file(path: Path) -> None:
    """Raise UsageError unless the file is new and its folder can be written."""
    if os.path.lexists(path):
        raise UsageError(f"--output {path} exists already; name another file, so that nothing is overwritten")
    check_writable(path.parent)


def batches(prompts: Iterable[Prompt], are_given: bool, config: Config) -> Iterator[Group]:
    """Prompts to respond to at once, each as often as --num_samples says, with the random numbers of each response. A
    prompt that is typed is responded to before the next one is asked for.
    """
    wanted = (prompt for prompt in prompts for _ in range(config.num_samples))
    size = config.batch_size if are_given else config.num_samples
    count = 0
    while batch := list(islice(wanted, size)):
        shape = (1, config.max_new_tokens)
        random_rows = [uniforms(config.seed, "generate", count + i, shape) for i in range(len(batch))]
        yield batch, torch.cat(random_rows)
        count += len(batch)


def output_rows(prompts: list[Prompt], responses: list[str], terms: dict, config: Config) -> tuple[list[dict], str]:
    """What is written of each response: the prompt, itself, and its reward where there are terms; and what was wrong if
    these failed: the responses are kept, with None for a reward.
    """
    pairs = zip(prompts, responses, strict=True)
    rows = [{"prompt": asked(prompt, config), "response": response} for prompt, response in pairs]
    if not terms:
        return rows, ""
    problem = ""
    try:
        texts = [prompt.text for prompt in prompts]
        total, _ = total_reward(terms, texts, responses, [prompt.row for prompt in prompts], config)
        rewards = total.tolist()
    except (RunError, UsageError, RuntimeError, MemoryError) as error:
        rewards = [None] * len(rows)
        problem = str(error) or type(error).__name__
    return [row | {"reward": reward} for row, reward in zip(rows, rewards, strict=True)], problem


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
    rows = named_rows(config)
    with one_sentence("a prompt is not text in UTF-8"):
        if not rows and piped:
            if isinstance(sys.stdin, io.TextIOWrapper):
                sys.stdin.reconfigure(encoding="utf-8-sig")  # as a file of prompts is read
            rows = [row_of(line.rstrip("\n"), config) for line in sys.stdin or () if line.strip()]
    check_is_text(rows)
    if not rows and (config.output or piped):
        raise UsageError("there is no prompt; give --prompt or --prompts, or a prompt a line on standard input")
    return rows


def check_is_text(rows: list[dict]) -> None:
    """Raise UsageError for a prompt that cannot be written in UTF-8."""
    with one_sentence("a prompt is not text in UTF-8"):
        json.dumps(rows, ensure_ascii=False).encode()


def named_rows(config: Config) -> list[dict]:
    """The prompts of --prompt and --prompts. Raises UsageError for one that is empty."""
    if not all(text.strip() for text in config.prompt):
        raise UsageError("a prompt is empty; expected some text for the model to go on from")
    rows = [row_of(text, config) for text in config.prompt]
    if config.prompts:
        rows += read_prompts(config.prompts, config)
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
    others = {}  # what a reward may ask of the row
    if isinstance(found, dict):
        fields = template_fields(config.prompt_template) if config.prompt_template else ()
        if fields and all(found.get(name) is not None for name in fields):
            return Row(found, number)
        others = found
        found = next((found[name] for name in prompt_names(config) if found.get(name)), None)
    if isinstance(found, list) and found and isinstance(found[0], dict):
        return Row(others | {config.prompt_column: found}, number)
    if isinstance(found, str) and found.strip():
        return Row(others | row_of(found, config), number)
    return None


def typed_rows(config: Config) -> Iterator[dict]:
    """The lines that are typed on the terminal, until the input ends; what is blank or no text is asked for again."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    print("type the beginning of a text; end with Ctrl-D\n> ", end="", flush=True)
    for line in sys.stdin:
        if any("\ud800" <= letter <= "\udfff" for letter in line):
            print("that is not text in UTF-8")
        elif line.strip():
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
        print(as_shown(text[len(shown) :]), end="", flush=True)
        shown = max(shown, text, key=len)

    print(as_shown(asked(prompt, config)), end=separator_of(policy, config), flush=True)
    responses = respond(policy, tokenizer, [prompt.ids], random_numbers, config, on_tokens=show)
    print(as_shown(responses.texts[0][len(shown) :]))
