"""Prompts: from a row to the text that a policy is asked with, and to its ids; the same for every task.

A prompt is a column's text, a template filled in from the row (`--prompt_template`), or a conversation, which goes
through the tokenizer's own template of chat: a column of messages, or with `--chat` a text that is a user's turn.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from torchtyping import TensorType
from transformers import PreTrainedTokenizerBase

from config import Config, UsageError, template_fields
from conversations import (
    chat_text,
    check_template,
    conversation,
    drops_system,
    holds_messages,
    is_assistants,
    is_conversation,
    no_place_for_system,
    own_turns,
    readable,
)
from dataset import LOOKED_AT, check_column, in_file_order, load_rows, place_of, suspects
from encoding import bare_ids, first_words, last_tokens, text_ids, with_ends
from model import PolicyModel
from probe import special_ends
from randomness import permutation
from rows import Rows


class Prompt(NamedTuple):
    text: str  # for a person to read: without the template's marks, and whole, even where the ids are cut
    ids: list[int]
    row: dict  # the dataset's own


# --------------------------------------------------------------------------------------------------------------------
# Columns
# --------------------------------------------------------------------------------------------------------------------


def with_prompt_column(config: Config) -> Config:
    """The config with `query`, `prompt`, `question` or `messages` as its prompt column, where `text` is asked for and
    not there; and with `chat` where that column, or that of better answers, holds conversations, so that the run's
    policy is asked so later on. Raises UsageError for a system's text where there are no conversations.
    """
    if config.dataset_path:
        first_row = load_rows(config, "train", 1)[0]
        name = config.prompt_column
        if name == "text" and not config.prompt_template:
            others = ("text", "query", "prompt", "question", "messages")
            name = next((other for other in others if other in first_row), name)
        has_messages = any(isinstance(first_row.get(each), list) for each in (name, config.chosen_column))
        chat = config.chat or (not config.prompt_template and has_messages)
        config = dataclasses.replace(config, prompt_column=name, chat=chat)
    if config.system and not config.chat:
        raise no_place_for_system(config)
    return config


def check_prompts(rows: Sequence[dict], config: Config) -> None:
    """Raise UsageError unless the rows hold what prompts are made of: a template's columns, texts, or messages."""
    fields = template_fields(config.prompt_template) if config.prompt_template else []
    if not fields:
        check_column(rows, config.prompt_column, "prompt_column", (str, list))
    for row in with_messages(rows, config):
        if fields:
            raise UsageError(
                f"--prompt_template is for columns of text; --prompt_column {config.prompt_column!r} holds messages "
                f"in {place_of(row)}, which go through the tokenizer's own template"
            )
        conversation(row, config)
    for name in fields:
        check_column(rows, name, "prompt_template", object)


def with_messages(rows: Sequence[dict], config: Config) -> list[dict]:
    """Those that hold messages, in the file's order; of very many rows only the first ones are looked at."""
    name = config.prompt_column
    if name not in rows[0]:
        return []
    return [row for row in in_file_order(suspects(rows, name)[:LOOKED_AT]) if isinstance(row[name], list)]


# --------------------------------------------------------------------------------------------------------------------
# Texts
# --------------------------------------------------------------------------------------------------------------------


def prompt_text(row: dict, config: Config) -> str:
    """The text of a row's prompt, as a person reads it: of a conversation its own turns, without what --system adds."""
    if is_conversation(row, config):
        return readable(own_turns(row, config))
    if config.prompt_template:
        return config.prompt_template.format_map(row)
    return row[config.prompt_column]


def prompt_texts(rows: Sequence[dict], config: Config, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of every row's prompt. Raises UsageError for a row of the data that has none, or that the tokenizer has
    no template for.
    """
    check_prompts(rows, config)
    talks = [row for row in in_file_order(rows) if is_conversation(row, config)]
    if talks:
        check_template(tokenizer, config, talks[0])
    elif config.system:
        raise no_place_for_system(config)
    return [prompt_text(row, config) for row in rows]


def separator_of(policy: PolicyModel, config: Config) -> str:
    """What stands between prompt and response as text: a response to a conversation is no part of its last turn."""
    return "\n" if config.chat else policy.separator


# --------------------------------------------------------------------------------------------------------------------
# Ids
# --------------------------------------------------------------------------------------------------------------------


def policy_text(row: dict, text: str, config: Config, tokenizer: PreTrainedTokenizerBase) -> str:
    """What the policy reads of a row whose prompt is this text: a conversation by its template."""
    return chat_text(conversation(row, config), row, tokenizer) if is_conversation(row, config) else text


def make_prompts(rows: Sequence[dict], config: Config, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """The rows' prompts, but for those without a token. A template of chat has written all special tokens itself."""
    rows = list(rows)  # each is made once
    if config.prompt_tokens and is_conversation(rows[0], config):
        raise UsageError(f"--prompt_tokens {config.prompt_tokens} is for texts; these prompts are conversations")
    texts = prompt_texts(rows, config, tokenizer)
    if config.prompt_tokens:
        texts = first_words(texts, tokenizer, config.prompt_tokens)
    to_read = [policy_text(row, text, config, tokenizer) for row, text in zip(rows, texts, strict=True)]
    bare = bare_ids(to_read, tokenizer)
    whole = with_ends(bare, tokenizer)
    n_special = sum(map(len, special_ends(tokenizer)))
    prompts = []
    for text, bare_one, whole_one, row in zip(texts, bare, whole, rows, strict=True):
        is_chat = is_conversation(row, config)
        if len(bare_one) > 0 and (is_chat or len(whole_one) > n_special):
            prompts.append(Prompt(text=text, ids=bare_one if is_chat else whole_one, row=row))
    return prompts


def asked(prompt: Prompt, config: Config) -> str:
    """What a person asked, without the template around it: it is put there again where the policy is asked again."""
    fields = template_fields(config.prompt_template) if config.prompt_template else []
    if len(fields) == 1 and not config.prompt_tokens and not is_conversation(prompt.row, config):
        return str(prompt.row[fields[0]])
    return prompt.text


def shortened(content: str, ids_of: Callable[[str], list[int]], limit: int, tokenizer) -> list[int]:
    """The ids of an end of `content` for which they are `limit` at most; `ids_of` puts a template around it.

    Raises UsageError if the template alone takes as many.
    """
    ids = ids_of(content)
    count = len(bare_ids([content], tokenizer)[0])
    while len(ids) > limit:
        count -= len(ids) - limit
        if count < 1:
            raise UsageError(
                f"--max_prompt_length {limit} leaves no room for a prompt in its template; raise it, or lower "
                "--max_new_tokens if that is all that the model has room for"
            )
        ids = ids_of(last_tokens(content, count, tokenizer))
    return ids


def cut_conversation(row: dict, config: Config, limit: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of the conversation without its oldest turns, but for a system's, and if need be of the last message
    without its beginning: the template stays whole.
    """

    def ids_of(messages: list[dict]) -> list[int]:
        return bare_ids([chat_text(messages, row, tokenizer)], tokenizer)[0]

    messages = conversation(row, config)
    n_first = int(messages[0]["role"] == "system")
    head, turns = messages[:n_first], messages[n_first:]
    while len(turns) > 1 and len(ids_of(head + turns)) > limit:
        turns.pop(0)
        while len(turns) > 1 and turns[0]["role"] != "user":  # templates begin with the user
            turns.pop(0)
    *others, last = head + turns
    return shortened(last["content"], lambda text: ids_of([*others, last | {"content": text}]), limit, tokenizer)


def cut_template(row: dict, config: Config, limit: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of the template filled in without the beginning of its longest column."""
    fields = template_fields(config.prompt_template)
    longest = max(fields, key=lambda name: len(str(row[name])))

    def ids_of(content: str) -> list[int]:
        return text_ids([config.prompt_template.format_map(row | {longest: content})], tokenizer)[0]

    return shortened(str(row[longest]), ids_of, limit, tokenizer)


def cut_ids(prompt: Prompt, config: Config, limit: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The prompt's ids without its beginning, `limit` at most; what stands around it stays."""
    if is_conversation(prompt.row, config):
        return cut_conversation(prompt.row, config, limit, tokenizer)
    if config.prompt_template and not config.prompt_tokens:
        return cut_template(prompt.row, config, limit, tokenizer)
    return text_ids([prompt.text], tokenizer, limit)[0]


def limit_length(
    prompts: list[Prompt], config: Config, tokenizer: PreTrainedTokenizerBase, limit: int | None = None
) -> list[Prompt]:
    """Cut prompts beyond the limit on the left, and say how many; or refuse them, if so configured. The limit is
    max_prompt_length, or the room that the model has.

    A template's own text is not cut, nor is the tokenizer's first special token.
    """
    cut = cut_prompts(prompts, config, tokenizer, limit)
    n_cut = sum(len(one.ids) < len(prompt.ids) for one, prompt in zip(cut, prompts, strict=True))
    if n_cut:
        print(f"{n_cut} of {len(prompts)} prompts were cut on the left to {limit or config.max_prompt_length} tokens")
    return cut


def cut_prompts(
    prompts: list[Prompt], config: Config, tokenizer: PreTrainedTokenizerBase, limit: int | None = None
) -> list[Prompt]:
    """What `limit_length` makes of them, without a word."""
    name, remedy = "--max_prompt_length", "raise it"
    if limit:
        name, remedy = "the model's room of", "lower --max_new_tokens"
    limit = limit or config.max_prompt_length
    longest = max(len(prompt.ids) for prompt in prompts)
    if longest <= limit:
        return prompts
    longer = [number for number, prompt in enumerate(prompts) if len(prompt.ids) > limit]
    if config.long_prompts == "refuse":
        raise UsageError(
            f"{len(longer)} of {len(prompts)} prompts are longer than {name} {limit} tokens "
            f"(the longest has {longest}); {remedy}, or let them be cut with --long_prompts truncate"
        )
    cut = list(prompts)
    for number in longer:
        cut[number] = prompts[number]._replace(ids=cut_ids(prompts[number], config, limit, tokenizer))
    return cut


def n_characters(row: dict, config: Config) -> int:
    """The length of the prompt column's text, or of all of its messages; of a template's columns where it has none."""
    value = row.get(config.prompt_column)
    if isinstance(value, list):
        return sum(len(str(message.get("content") or "")) for message in value if isinstance(message, dict))
    if value is None and config.prompt_template:
        return sum(n_letters(row.get(name)) for name in template_fields(config.prompt_template))
    return n_letters(value)


def n_letters(value) -> int:
    """The length of a value as a template writes it; of a null 0."""
    return 0 if value is None else len(str(value))


def lengths(rows: Sequence[dict], config: Config) -> Iterable[int]:
    """Each row's `n_characters`; of a column of texts alone, by Arrow."""
    found = rows.lengths(config.prompt_column) if isinstance(rows, Rows) else None
    return (n_characters(row, config) for row in rows) if found is None else found


def fitting_rows(config: Config, part: str, limit: int | None) -> Sequence[dict]:
    """The rows of a part whose prompt column has a length as configured, `limit` at most. Raises UsageError if none."""
    least = config.min_prompt_chars
    most = config.max_prompt_chars or math.inf
    if least == 0 and most == math.inf:
        return load_rows(config, part, limit)
    rows = load_rows(config, part, None)
    places = itertools.islice((n for n, length in enumerate(lengths(rows, config)) if least <= length <= most), limit)
    fitting = rows.at(list(places)) if isinstance(rows, Rows) else [rows[n] for n in places]
    if not fitting:
        raise UsageError(
            f"--prompt_column {config.prompt_column!r} holds no text of --min_prompt_chars to --max_prompt_chars "
            f"letters in {part}"
        )
    return fitting


class DrawnPrompts(Sequence):
    """Prompts of more rows than are looked at beforehand: each is made whenever it is drawn. For a row that has none,
    as it has no token, the next one stands in.
    """

    def __init__(self, rows: Sequence[dict], config: Config, tokenizer: PreTrainedTokenizerBase, longest: int) -> None:
        self.rows = rows
        self.config = config
        self.tokenizer = tokenizer
        self.longest = longest  # in tokens, of those that were looked at
        self.room = None  # for a prompt in tokens, where that is less than max_prompt_length

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key):
        if isinstance(key, slice):
            return [self[place] for place in range(*key.indices(len(self)))]
        if not -len(self) <= key < len(self):
            raise IndexError(key)
        for place in range(key, key + len(self)):
            made = make_prompts([self.rows[place % len(self)]], self.config, self.tokenizer)
            if made:
                return cut_prompts(made, self.config, self.tokenizer, self.room)[0]
        raise UsageError(f"--prompt_column {self.config.prompt_column!r} holds no text with a token any more")


def rows_of(prompts: Sequence[Prompt]) -> Sequence[dict]:
    """The rows that prompts were made of, or will be."""
    return prompts.rows if isinstance(prompts, DrawnPrompts) else [prompt.row for prompt in prompts]


def longest_prompt(prompts: Sequence[Prompt]) -> int:
    """How many tokens the longest one has that there is yet."""
    if isinstance(prompts, DrawnPrompts):
        return prompts.longest
    return max(len(prompt.ids) for prompt in prompts)


def make_room(prompts: Sequence[Prompt], room: int) -> None:
    """Have those that are yet to be made cut to the tokens that a model has room for."""
    if isinstance(prompts, DrawnPrompts) and room < prompts.config.max_prompt_length:
        prompts.room = room


def load_prompts(config: Config, tokenizer: PreTrainedTokenizerBase, part: str, limit: int | None) -> Sequence[Prompt]:
    """Prompts from the `fitting_rows` of a part. Of very many, as many as are looked at beforehand are made and let go
    again: being in random order, they are a sample of all.
    """
    rows = fitting_rows(config, part, limit)
    prompts = make_prompts(rows[:LOOKED_AT], config, tokenizer)
    if not prompts:
        raise UsageError(
            f"--prompt_column {config.prompt_column!r} holds no text with a token of the tokenizer's in {part}"
        )
    conversations = [prompt.row[config.prompt_column] for prompt in prompts if holds_messages(prompt.row, config)]
    n_answered = sum(is_assistants(messages[-1]) for messages in conversations)
    if n_answered:
        told = f"{n_answered} of {len(prompts)} conversations end with an answer of the assistant's"
        print(f"{told}: it is left out, for the policy to write")
    systems = [messages[0]["content"] for messages in conversations if messages[0]["role"] == "system"]
    if systems and drops_system(tokenizer, systems[0]):
        whose = f"the chat template of {tokenizer.name_or_path}"
        print(f"note: {whose} leaves the system's turn out, of {len(systems)} prompts")
    prompts = limit_length(prompts, config, tokenizer)
    if len(prompts) == 1 and part != "train":
        print(f"note: one prompt alone is held out for {part}: no change can be told from chance by it")
    if len(rows) <= LOOKED_AT:
        return prompts
    print(f"{len(prompts):,} of {len(rows):,} prompts in {part} were looked at; the others are when they are drawn")
    return DrawnPrompts(rows, config, tokenizer, longest=longest_prompt(prompts))


def most_prompts(config: Config) -> int | None:
    """How many prompts a run takes from the data, where there are more; None: all of them."""
    return None if config.epochs else config.n_updates * config.batch_size


def load_all_prompts(
    config: Config, tokenizer: PreTrainedTokenizerBase, limit: int | None
) -> tuple[Sequence[Prompt], Sequence[Prompt], Sequence[Prompt]]:
    """The prompts of a run: to train on, `limit` at most, to choose a policy by, and to judge it by, which are others
    where one is chosen.
    """
    training = load_prompts(config, tokenizer, "train", limit)
    validation = load_prompts(config, tokenizer, "validation", config.eval_samples)
    held_out = load_prompts(config, tokenizer, "test", config.eval_samples) if config.eval_every else validation
    return training, validation, held_out


# --------------------------------------------------------------------------------------------------------------------
# Batches
# --------------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)  # the pass that a batch begins in and the next: ten million are not shuffled each time
def pass_order(n: int, number_of_pass: int, seed: int) -> TensorType["n"]:
    return permutation(seed, "prompts", number_of_pass, n)


def batch_of(prompts: Sequence[Prompt], batch_size: int, number: int, seed: int) -> list[Prompt]:
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
    rows = min(config.mini_batch_size * config.gradient_accumulation_steps, config.batch_size)
    steps = config.batch_size // rows
    return (
        f"{n_prompts:,} prompts; {config.n_updates} updates x {config.batch_size} prompts a rollout "
        f"= {passes:.2f} passes over them\n"
        f"each update: epochs {config.ppo_epochs} x optimizer steps {steps} x rows {rows}, "
        f"at most {min(config.mini_batch_size, rows)} in a forward pass; "
        f"optimizer steps in all: {config.n_updates * config.ppo_epochs * steps:,}"
    )
