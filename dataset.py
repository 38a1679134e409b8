"""Texts and prompts: from the Hub, a folder, a file, or the built-in generated reviews; and padding into batches.

Every source is divided into four parts that share no row: `train` (the models, the reward model and the prompts of
PPO), `judge` (the independent judges of an evaluation), `validation` (to choose by) and `test` (to report on).
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from torchtyping import TensorType
from transformers import PreTrainedTokenizerBase

from config import Config, UsageError, first_line, nearest
from loading import hub_error, one_sentence
from reviews import movie_reviews

PARTS = ("train", "judge", "validation", "test")
OWN_SPLITS = {"dev": "validation", "valid": "validation", "validation": "validation", "test": "test"}
FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


class Prompt(NamedTuple):
    text: str
    ids: list[int]
    row: dict  # the dataset's own


def load_rows(config: Config, part: str, limit: int | None = None) -> list[dict]:
    """The rows of one part, or the first `limit`. Raises UsageError if the data is missing, empty or unreadable."""
    if not config.dataset_path:
        return built_in_rows(limit or config.n_reviews, PARTS.index(part))
    return split_parts(config.dataset_path, config.dataset_split, config.trains_from_scratch)[part][:limit]


built_in_rows = functools.cache(movie_reviews)  # a run's stages read the same corpus


@functools.cache
def split_parts(path: str, split: str, with_judge: bool) -> dict[str, list[dict]]:
    """The rows of every part: a split of its own, else a fixed random share of the training split, as is then said.

    A tenth each for validation and test; a quarter for the judges, which only the models trained here have.
    """
    splits = load_splits(path)
    if split not in splits:
        known = ", ".join(splits) + nearest(split, splits)
        raise UsageError(f"--dataset_split {split!r} is not in {path}; it has {known}")
    own = {part: name for name, part in OWN_SPLITS.items() if name in splits and name != split}
    shares = {"judge": 25 if with_judge else 0, "validation": 10, "test": 10}
    held_out = {part: percent for part, percent in shares.items() if percent and part not in own}
    shuffled, rows, start = splits[split].shuffle(seed=0).to_list(), {"judge": []}, 0
    for part, percent in held_out.items():
        end = start + max(1, len(shuffled) * percent // 100)
        rows[part], start = shuffled[start:end], end
    rows["train"] = shuffled[start:]
    rows |= {part: splits[name].shuffle(seed=0).to_list() for part, name in own.items()}  # some are sorted by label
    empty = [part for part in ("train", "validation", "test") if not rows[part]]
    if empty:
        raise UsageError(f"--dataset_path {path} has no rows for {empty[0]}: {len(shuffled)} in {split!r}")
    if held_out:
        shares = ", ".join(f"{len(rows[part])} rows for {part}" for part in held_out)
        print(f"held out of {path} ({split}): {shares}; {len(rows['train'])} are left to train on")
    return rows


def load_splits(path: str) -> dict:
    """The dataset's splits by name, through `datasets`. Raises UsageError, whatever went wrong there."""
    kind = FORMATS.get(Path(path).suffix)
    if Path(path).is_file() != bool(kind):
        problem = "does not exist" if kind else f"is a file, expected one that ends in {', '.join(FORMATS)}"
        raise UsageError(f"--dataset_path {path} {problem}")
    unreachable = "" if Path(path).exists() else hub_error()
    import datasets  # a second to import, which --help and the built-in data need not wait for

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        return datasets.load_dataset(kind, data_files=path) if kind else datasets.load_dataset(path)
    except Exception as error:  # the library raises a dozen kinds
        reason = unreachable or first_line(error.__cause__ or error)
        raise UsageError(f"--dataset_path {path} cannot be loaded: {reason}") from None


def column(rows: list[dict], name: str, flag: str, kind: type | tuple[type, ...] = str) -> list:
    """One column of the rows. Raises UsageError naming the columns there are, or what was found instead of `kind`."""
    if name not in rows[0]:
        known = ", ".join(rows[0]) + nearest(name, rows[0])
        raise UsageError(f"--{flag} {name!r} is no column of the data; it has {known}")
    values = [row[name] for row in rows]
    for number, value in enumerate(values):
        if not isinstance(value, kind):
            kinds = " or ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))
            raise UsageError(f"--{flag} {name!r} holds a {type(value).__name__} in row {number}, expected a {kinds}")
    return values


def with_prompt_column(config: Config) -> Config:
    """The config with `query`, `prompt` or `question` as its prompt column, where `text` is asked for and not there."""
    if config.prompt_column != "text" or not config.dataset_path:
        return config
    names = load_rows(config, "train", 1)[0]
    found = next((name for name in ("text", "query", "prompt", "question") if name in names), "text")
    return dataclasses.replace(config, prompt_column=found)


def load_prompts(config: Config, tokenizer: PreTrainedTokenizerBase, part: str, limit: int | None) -> list[Prompt]:
    """Prompts from the rows of a part whose prompt column has a length as configured, `limit` at most."""
    least, most = config.min_prompt_chars, config.max_prompt_chars or math.inf
    rows = load_rows(config, part, limit if (least, most) == (0, math.inf) else None)
    rows = [row for row in rows if least <= len(row.get(config.prompt_column) or "") <= most][:limit]
    texts = prompt_texts(rows, config, tokenizer) if rows else []
    if config.prompt_tokens:
        texts = first_words(texts, tokenizer, config.prompt_tokens)
    encoded = prompt_ids(texts, rows, config, tokenizer) if rows else []
    prompts = [Prompt(*parts) for parts in zip(texts, encoded, rows, strict=True) if parts[1]]
    if not prompts:
        raise UsageError(f"--prompt_column {config.prompt_column!r} holds no text of the right length in {part}")
    return limit_length(prompts, config)


def prompt_ids(texts: list[str], rows: list[dict], config: Config, tokenizer) -> list[list[int]]:
    """The prompts' ids; a chat template has written the special tokens already."""
    is_chat = isinstance(rows[0][config.prompt_column], list)
    return tokenizer(texts, add_special_tokens=not is_chat).input_ids


def prompt_texts(rows: list[dict], config: Config, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The prompt column, or --prompt_template filled in from the row; chat messages by the tokenizer's own template."""
    values = column(rows, config.prompt_column, "prompt_column", (str, list))
    if isinstance(values[0], list):
        return [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in values]
    if not config.prompt_template:
        return values
    with one_sentence(f"--prompt_template {config.prompt_template!r} does not fit the columns {', '.join(rows[0])}"):
        return [config.prompt_template.format_map(row) for row in rows]


def first_words(texts: list[str], tokenizer: PreTrainedTokenizerBase, n_tokens: int) -> list[str]:
    """The longest beginning of each text that ends with a word and takes at most n_tokens."""
    openings = []
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    for text, ends in zip(texts, encoded.offset_mapping, strict=True):
        start = text[: ends[:n_tokens][-1][1]] if ends else ""
        cuts_a_word = len(ends) > n_tokens and not text[len(start) : len(start) + 1].isspace()
        openings.append(start.rsplit(maxsplit=1)[0] if cuts_a_word and len(start.split()) > 1 else start)
    return openings


def limit_length(prompts: list[Prompt], config: Config) -> list[Prompt]:
    """Cut prompts beyond max_prompt_length on the left, and say how many; or refuse them, if so configured."""
    limit, lengths = config.max_prompt_length, [len(prompt.ids) for prompt in prompts]
    count = f"{sum(length > limit for length in lengths)} of {len(prompts)} prompts"
    if max(lengths) > limit and config.long_prompts == "refuse":
        longer = f"{count} are longer than --max_prompt_length {limit} tokens (the longest has {max(lengths)})"
        raise UsageError(f"{longer}; raise it, or let them be cut with --long_prompts truncate")
    if max(lengths) > limit:
        print(f"{count} were cut on the left to {limit} tokens")
    return [prompt._replace(ids=prompt.ids[-limit:]) for prompt in prompts]


def pad(
    sequences: list[list[int]], pad_id: int, side: str
) -> tuple[TensorType["batch", "sequence"], TensorType["batch", "sequence", bool]]:
    """Ids and mask as wide as the longest sequence; the padding is on the `left` (causal prompts) or the `right`."""
    rows = [torch.tensor(sequence, dtype=torch.long) for sequence in sequences]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side=side)
    mask = pad_sequence([torch.ones_like(row).bool() for row in rows], batch_first=True, padding_side=side)
    return ids, mask


def prompt_batches(prompts: list[Prompt], batch_size: int, generator: torch.Generator) -> Iterator[list[Prompt]]:
    """Endless batches: each pass over the prompts in a new order, and what one pass lacks is taken from the next."""
    order: list[int] = []
    while True:
        while len(order) < batch_size:
            order += torch.randperm(len(prompts), generator=generator).tolist()
        yield [prompts[i] for i in order[:batch_size]]
        order = order[batch_size:]


def n_rollouts(config: Config, n_prompts: int) -> int:
    """As many batches as `epochs` passes over the prompts take, or as --n_updates says where epochs is 0."""
    return math.ceil(config.epochs * n_prompts / config.batch_size) or config.n_updates


def batch_arithmetic(config: Config, n_prompts: int) -> str:
    """prompts -> rollouts -> forward passes -> optimizer steps, in words."""
    rows = config.mini_batch_size * config.gradient_accumulation_steps
    steps = config.batch_size // rows
    return (
        f"{n_prompts:,} prompts; {config.n_updates} updates x {config.batch_size} prompts a rollout "
        f"= {config.n_updates * config.batch_size / n_prompts:.2f} passes over them\n"
        f"each update: epochs {config.ppo_epochs} x optimizer steps {steps} x forward passes "
        f"{config.gradient_accumulation_steps} x rows {config.mini_batch_size}; "
        f"optimizer steps in all: {config.n_updates * config.ppo_epochs * steps:,}"
    )


def decode_responses(
    tokenizer: PreTrainedTokenizerBase,
    query_ids: TensorType["batch", "query"],
    query_mask: TensorType["batch", "query", bool],
    response_ids: TensorType["batch", "time"],
    mask: TensorType["batch", "time", bool],
    is_encoder_decoder: bool,
) -> list[str]:
    """The responses as text, without special tokens.

    A causal model's response is decoded behind its prompt: some tokenizers drop the space in front of a first word.
    """
    texts = []
    for query, real, response, kept in zip(query_ids, query_mask, response_ids, mask, strict=True):
        before = query[:0] if is_encoder_decoder else query[real]
        both = tokenizer.decode(torch.cat([before, response[kept]]), skip_special_tokens=True)
        texts.append(both[len(tokenizer.decode(before, skip_special_tokens=True)) :])
    return texts
