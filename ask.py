"""The `generate` task: prompts from flags, a file or the keyboard; responses on the screen or in a file."""

import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

import torch

from checkpoint import check_writable, write_whole
from config import Config, UsageError
from device import prepare_device
from generate import respond
from loading import load_policy, load_tokenizer, one_sentence
from model import PolicyModel
from preflight import check_context
from randomness import uniforms
from reward import load_reward_terms, total_reward


def generate(config: Config, reward_model_path: str) -> None:
    """The `generate` task: respond to --prompt, --prompts FILE, or what is typed, and print or write the responses."""
    output = Path(config.output)
    if config.output:
        check_new_file(output)
    given = given_prompts(config)
    device = prepare_device(config)
    tokenizer = load_tokenizer(config.output_dir, "output_dir")
    policy = load_policy(config, config.output_dir, device).eval()
    check_context(config, policy)
    terms = load_reward_terms(config, reward_model_path, device, policy.separator) if config.output else {}
    lines = []
    for batch, random_numbers in batches(given or typed_prompts(), bool(given), config):
        ids = [row[-config.max_prompt_length :] for row in tokenizer(batch).input_ids]
        if len(batch) == 1 and sys.stdout.isatty() and not (config.output or config.stop):
            stream(policy, tokenizer, batch[0], ids, random_numbers, config)
            continue
        responses = [
            before_stop(text, config.stop) for text in respond(policy, tokenizer, ids, random_numbers, config).texts
        ]
        if config.output:
            lines += json_lines(batch, responses, terms, config)
        else:
            for prompt, response in zip(batch, responses, strict=True):
                print(policy.separator.join([prompt, response]))
    if config.output:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output, "".join(lines))
        print(f"{len(lines)} responses: {output}")


def check_new_file(path: Path) -> None:
    """Raise UsageError unless the file is new and its folder can be written."""
    if os.path.lexists(path):
        raise UsageError(f"--output {path} exists already; name another file, so that nothing is overwritten")
    check_writable(path.parent)


def batches(prompts: Iterable[str], are_given: bool, config: Config) -> Iterator[tuple[list[str], torch.Tensor]]:
    """Prompts to respond to at once, each as often as --num_samples says, with the random numbers of each response.

    A prompt that is typed is responded to before the next one is asked for.
    """
    wanted = (prompt for prompt in prompts for _ in range(config.num_samples))
    size = config.batch_size if are_given else config.num_samples
    count = 0
    while batch := list(islice(wanted, size)):
        shape = (1, config.max_new_tokens)
        rows = [uniforms(config.seed, "generate", count + i, shape) for i in range(len(batch))]
        yield batch, torch.cat(rows)
        count += len(batch)


def json_lines(prompts: list[str], responses: list[str], terms: dict, config: Config) -> list[str]:
    """A line of JSON a response: prompt, response and reward."""
    rows = [{config.prompt_column: prompt} for prompt in prompts]
    rewards, _ = total_reward(terms, prompts=prompts, responses=responses, rows=rows, config=config)
    lines = []
    for prompt, response, reward in zip(prompts, responses, rewards.tolist(), strict=True):
        row = {"prompt": prompt, "response": response, "reward": reward}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    return lines


def before_stop(text: str, stop: tuple[str, ...]) -> str:
    """The text up to where the first of the stop strings begins; all of it where there is none."""
    return text[: min((text.index(word) for word in stop if word in text), default=len(text))]


def given_prompts(config: Config) -> list[str]:
    """The prompts of --prompt and --prompts, else a line each from standard input; none where that is a terminal."""
    prompts, piped = [*config.prompt], not (sys.stdin and sys.stdin.isatty())
    if config.prompts:
        prompts += read_prompts(config.prompts, config.prompt_column)
    with one_sentence("a prompt is not text in UTF-8"):
        if not prompts and piped:
            prompts = [line.rstrip("\n") for line in sys.stdin or () if line.strip()]
        "".join(prompts).encode()
    if not prompts and (config.output or piped):
        raise UsageError("there is no prompt; give --prompt or --prompts, or a prompt a line on standard input")
    if not all(prompt.strip() for prompt in prompts):
        raise UsageError("a prompt is empty; expected some text for the model to go on from")
    return prompts


def read_prompts(path: str, prompt_column: str) -> list[str]:
    """Prompts from a file: lines of text, or JSON texts or objects with one as the prompt column, `prompt` or `query`.

    Raises UsageError naming the line, or the entry of a list, what was found there and what was expected.
    """
    kind, prompts, names = Path(path).suffix, [], dict.fromkeys((prompt_column, "prompt", "query"))
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
            if isinstance(found, dict):
                found = next((found[name] for name in names if found.get(name)), None)
            if not isinstance(found, str) or not found.strip():
                shown = (json.dumps(entry, ensure_ascii=False) if kind == ".json" else entry)[:80]
                wanted = f"a JSON text, or an object with one as {' or '.join(names)}"
                raise ValueError(f"{'entry' if kind == '.json' else 'line'} {number}: found {shown}, expected {wanted}")
            prompts.append(found)
        if not prompts:
            raise ValueError("it holds no prompts")
    return prompts


def typed_prompts() -> Iterator[str]:
    """The lines that are typed on the terminal, until the input ends; blank ones are asked for again."""
    print("type the beginning of a text; end with Ctrl-D\n> ", end="", flush=True)
    for line in sys.stdin:
        if line.strip():
            yield line.rstrip("\n")
        print("> ", end="", flush=True)
    print()


def stream(
    policy: PolicyModel, tokenizer, prompt: str, ids: list[list[int]], random_numbers: torch.Tensor, config: Config
) -> None:
    """Print a prompt, and the response to its ids as it is drawn.

    All of it is decoded anew each time, behind the prompt: what a token looks like may depend on those around it.
    """
    drawn = [] if policy.is_encoder_decoder else list(ids[0])
    start = len(tokenizer.decode(drawn, skip_special_tokens=True))
    shown = ""

    def show(tokens: torch.Tensor) -> None:
        nonlocal shown
        drawn.extend(tokens.tolist())
        text = tokenizer.decode(drawn, skip_special_tokens=True)[start:].rstrip("\ufffd")  # half a letter has to wait
        print(text[len(shown) :], end="", flush=True)
        shown = max(shown, text, key=len)

    print(prompt, end=policy.separator, flush=True)
    responses = respond(policy, tokenizer, ids, random_numbers, config, on_tokens=show)
    print(responses.texts[0][len(shown) :])
