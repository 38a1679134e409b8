"""Texts and prompts: from the Hub, a folder, a file, or the built-in generated reviews; and padding into batches.

Every source is divided into four parts that share no row: `train` (the models, the reward model and the prompts of
PPO), `judge` (the independent judges of an evaluation), `validation` (to choose by) and `test` (to report on).
"""

import dataclasses
import functools
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from torchtyping import TensorType
from transformers import PreTrainedTokenizerBase

from config import Config, UsageError, first_line, nearest
from loading import hub_error, one_sentence
from randomness import permutation
from reviews import movie_reviews

PARTS = ("train", "judge", "validation", "test")
OWN_SPLITS = {  # a dataset's names for parts, of which the last that it has counts
    "dev": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}
SHARES = {"judge": 25, "validation": 10, "test": 10}  # per cent of the training split, where there is none of its own
FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


class Prompt(NamedTuple):
    text: str
    ids: list[int]
    row: dict  # the dataset's own


def load_splits(path: str) -> dict:
    """The dataset's splits by name, through `datasets`. Raises UsageError, whatever went wrong there."""
    place = Path(path)
    kind = FORMATS.get(place.suffix)
    if kind and not place.is_file():
        raise UsageError(f"--dataset_path {path} does not exist")
    if place.is_file() and not kind:
        raise UsageError(f"--dataset_path {path} is a file, expected one that ends in {', '.join(FORMATS)}")
    unreachable = "" if place.exists() else hub_error()
    import datasets  # a second to import, which --help and the built-in data need not wait for

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        if kind:
            return datasets.load_dataset(kind, data_files=path)
        return datasets.load_dataset(path)
    except Exception as error:  # the library raises a dozen kinds
        reason = unreachable or first_line(error.__cause__ or error)
        raise UsageError(f"--dataset_path {path} cannot be loaded: {reason}") from None


def own_splits(splits: dict, training_split: str) -> dict[str, str]:
    """The parts for which the dataset has a split, with its name: never the one that is trained on."""
    own = {}
    for name, part in OWN_SPLITS.items():
        if name in splits and name != training_split:
            own[part] = name
    return own


def held_out_shares(own: dict[str, str], with_judge: bool) -> dict[str, int]:
    """What the training split gives to the parts that have no split of their own, in per cent."""
    shares = {part: percent for part, percent in SHARES.items() if part not in own}
    if not with_judge:
        del shares["judge"]
    return shares


def shuffled_rows(split) -> list[dict]:
    """Always in the same order, but not in the file's: some are sorted by label."""
    return split.shuffle(seed=0).to_list()


def divide(rows: list[dict], shares: dict[str, int]) -> dict[str, list[dict]]:
    """So many per cent of the rows for each part, one row at least, and the rest for `train`."""
    parts = {"judge": []}  # where no share is for it
    start = 0
    for part, percent in shares.items():
        end = start + max(1, len(rows) * percent // 100)
        parts[part] = rows[start:end]
        start = end
    parts["train"] = rows[start:]
    return parts


@functools.cache
def split_parts(path: str, split: str, with_judge: bool) -> dict[str, list[dict]]:
    """The rows of every part: a split of its own, else a fixed random share of the training split, as is then said.

    A tenth each for validation and test; a quarter for the judges, which only the models trained here have.
    """
    splits = load_splits(path)
    if split not in splits:
        known = ", ".join(splits) + nearest(split, splits)
        raise UsageError(f"--dataset_split {split!r} is not in {path}; it has {known}")
    own = own_splits(splits, split)
    shares = held_out_shares(own, with_judge)
    rows = shuffled_rows(splits[split])
    parts = divide(rows, shares)
    for part, name in own.items():
        parts[part] = shuffled_rows(splits[name])
    for part in ("train", "validation", "test"):
        if not parts[part]:
            raise UsageError(f"--dataset_path {path} has no rows for {part}: {len(rows)} in {split!r}")
    if shares:
        told = ", ".join(f"{len(parts[part])} rows for {part}" for part in shares)
        print(f"held out of {path} ({split}): {told}; {len(parts['train'])} are left to train on")
    return parts


built_in_rows = functools.cache(movie_reviews)  # a run's stages read the same corpus


def load_rows(config: Config, part: str, limit: int | None = None) -> list[dict]:
    """The rows of one part, or the first `limit`. Raises UsageError if the data is missing, empty or unreadable."""
    if not config.dataset_path:
        return built_in_rows(limit or config.n_reviews, PARTS.index(part))
    parts = split_parts(config.dataset_path, config.dataset_split, with_judge=config.trains_from_scratch)
    return parts[part][:limit]


def column(rows: list[dict], name: str, flag: str, kind: type | tuple[type, ...] = str) -> list:
    """One column of the rows. Raises UsageError naming the columns there are, or what was found instead of `kind`."""
    if name not in rows[0]:
        known = ", ".join(rows[0]) + nearest(name, rows[0])
        raise UsageError(f"--{flag} {name!r} is no column of the data; it has {known}")
    values = [row[name] for row in rows]
    for number, value in enumerate(values):
        if not isinstance(value, kind):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            expected = " or ".join(each.__name__ for each in kinds)
            found = type(value).__name__
            raise UsageError(f"--{flag} {name!r} holds a {found} in row {number}, expected a {expected}")
    return values


def with_prompt_column(config: Config) -> Config:
    """The config with `query`, `prompt` or `question` as its prompt column, where `text` is asked for and not there."""
    if config.prompt_column != "text" or not config.dataset_path:
        return config
    first_row = load_rows(config, "train", 1)[0]
    for name in ("text", "query", "prompt", "question"):
        if name in first_row:
            return dataclasses.replace(config, prompt_column=name)
    return config


def prompt_texts(rows: list[dict], config: Config, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The prompt column, or --prompt_template filled in from the row; chat messages by the tokenizer's own template."""
    values = column(rows, config.prompt_column, "prompt_column", (str, list))
    if isinstance(values[0], list):
        return [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in values]
    if not config.prompt_template:
        return values
    with one_sentence(f"--prompt_template {config.prompt_template!r} does not fit the columns {', '.join(rows[0])}"):
        return [config.prompt_template.format_map(row) for row in rows]


def prompt_ids(texts: list[str], rows: list[dict], config: Config, tokenizer) -> list[list[int]]:
    """The prompts' ids; a chat template has written the special tokens already."""
    is_chat = isinstance(rows[0][config.prompt_column], list)
    return tokenizer(texts, add_special_tokens=not is_chat).input_ids


def whole_words(text: str, offsets: list[tuple[int, int]], n_tokens: int) -> str:
    """The longest beginning of a text that ends with a word and takes at most n_tokens, which stand at these offsets.

    A first word that takes more is cut all the same.
    """
    if not offsets:
        return ""
    kept = offsets[:n_tokens]
    _, end = kept[-1]
    start = text[:end]
    cuts_a_word = len(offsets) > n_tokens and not text[end : end + 1].isspace()
    if cuts_a_word and len(start.split()) > 1:
        return start.rsplit(maxsplit=1)[0]
    return start


def first_words(texts: list[str], tokenizer: PreTrainedTokenizerBase, n_tokens: int) -> list[str]:
    """The `whole_words` of each text."""
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    return [whole_words(text, offsets, n_tokens) for text, offsets in zip(texts, encoded.offset_mapping, strict=True)]


def make_prompts(rows: list[dict], config: Config, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """The rows' prompts, but for those without a token."""
    texts = prompt_texts(rows, config, tokenizer)
    if config.prompt_tokens:
        texts = first_words(texts, tokenizer, config.prompt_tokens)
    encoded = prompt_ids(texts, rows, config, tokenizer)
    prompts = []
    for text, ids, row in zip(texts, encoded, rows, strict=True):
        if ids:
            prompts.append(Prompt(text=text, ids=ids, row=row))
    return prompts


def limit_length(prompts: list[Prompt], config: Config) -> list[Prompt]:
    """Cut prompts beyond max_prompt_length on the left, and say how many; or refuse them, if so configured."""
    limit = config.max_prompt_length
    lengths = [len(prompt.ids) for prompt in prompts]
    longest = max(lengths)
    if longest <= limit:
        return prompts
    n_longer = sum(length > limit for length in lengths)
    if config.long_prompts == "refuse":
        raise UsageError(
            f"{n_longer} of {len(prompts)} prompts are longer than --max_prompt_length {limit} tokens "
            f"(the longest has {longest}); raise it, or let them be cut with --long_prompts truncate"
        )
    print(f"{n_longer} of {len(prompts)} prompts were cut on the left to {limit} tokens")
    return [prompt._replace(ids=prompt.ids[-limit:]) for prompt in prompts]


def load_prompts(config: Config, tokenizer: PreTrainedTokenizerBase, part: str, limit: int | None) -> list[Prompt]:
    """Prompts from the rows of a part whose prompt column has a length as configured, `limit` at most."""
    least = config.min_prompt_chars
    most = config.max_prompt_chars or math.inf
    any_length = least == 0 and most == math.inf
    rows = load_rows(config, part, limit if any_length else None)
    fitting = [row for row in rows if least <= len(row.get(config.prompt_column) or "") <= most][:limit]
    prompts = make_prompts(fitting, config, tokenizer) if fitting else []
    if not prompts:
        raise UsageError(f"--prompt_column {config.prompt_column!r} holds no text of the right length in {part}")
    return limit_length(prompts, config)


def pad(
    sequences: list[list[int]], pad_id: int, side: str
) -> tuple[TensorType["batch", "sequence"], TensorType["batch", "sequence", bool]]:
    """Ids and mask as wide as the longest sequence; the padding is on the `left` (causal prompts) or the `right`."""
    rows = [torch.tensor(sequence, dtype=torch.long) for sequence in sequences]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side=side)
    mask = pad_sequence([torch.ones_like(row).bool() for row in rows], batch_first=True, padding_side=side)
    return ids, mask


@functools.lru_cache(maxsize=2)  # the pass that a batch begins in and the next: ten million are not shuffled each time
def pass_order(n: int, number_of_pass: int, seed: int) -> TensorType["n"]:
    return permutation(seed, "prompts", number_of_pass, n)


def batch_of(prompts: list[Prompt], batch_size: int, number: int, seed: int) -> list[Prompt]:
    """The prompts of update `number`, counted from 0: its places in an endless row of passes over all prompts.

    Each pass has an order of its own; what one pass lacks to fill a batch is taken from the next.
    """
    batch = []
    first = number * batch_size
    for place in range(first, first + batch_size):
        number_of_pass, place_in_pass = divmod(place, len(prompts))
        order = pass_order(n=len(prompts), number_of_pass=number_of_pass, seed=seed)
        batch.append(prompts[order[place_in_pass]])
    return batch


def n_rollouts(config: Config, n_prompts: int) -> int:
    """As many batches as `epochs` passes over the prompts take, or as --n_updates says where epochs is 0."""
    if config.epochs:
        return math.ceil(config.epochs * n_prompts / config.batch_size)
    return config.n_updates


def batch_arithmetic(config: Config, n_prompts: int) -> str:
    """prompts -> rollouts -> optimizer steps -> rows of a forward pass, in words; passes may be more, and shorter."""
    passes = config.n_updates * config.batch_size / n_prompts
    rows = config.mini_batch_size * config.gradient_accumulation_steps
    steps = config.batch_size // rows
    return (
        f"{n_prompts:,} prompts; {config.n_updates} updates x {config.batch_size} prompts a rollout "
        f"= {passes:.2f} passes over them\n"
        f"each update: epochs {config.ppo_epochs} x optimizer steps {steps} x rows {rows}, "
        f"at most {config.mini_batch_size} in a forward pass; "
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
    for query, is_real, response, is_response in zip(query_ids, query_mask, response_ids, mask, strict=True):
        before = query[:0] if is_encoder_decoder else query[is_real]
        both = torch.cat([before, response[is_response]])
        start = len(tokenizer.decode(before, skip_special_tokens=True))
        texts.append(tokenizer.decode(both, skip_special_tokens=True)[start:])
    return texts
