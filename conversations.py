"""Conversations: messages of a row, turns and answers, and what a tokenizer's template of chat makes of them."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from config import Config, UsageError
from dataset import LOOKED_AT, check_column, in_file_order, place_of, suspects
from encoding import bare_ids
from hub import one_sentence


def no_place_for_system(config: Config) -> UsageError:
    return UsageError(
        f"--system {config.system[:80]!r} is a turn of conversations, and the prompts are texts: add --chat, by which "
        "they are a user's turn, or leave it out"
    )


def is_assistants(message: dict) -> bool:
    return message.get("role") == "assistant"


def holds_messages(row: dict, config: Config) -> bool:
    return isinstance(row.get(config.prompt_column), list)


def is_conversation(row: dict, config: Config) -> bool:
    return config.chat or holds_messages(row, config)


def check_messages(value: list, place: str) -> None:
    """Raise UsageError, which begins with the place, unless all of the list are messages with a text."""
    for message in value:
        is_message = isinstance(message, dict) and isinstance(message.get("role"), str)
        if not is_message or not isinstance(message.get("content"), str):
            raise UsageError(f"{place} holds {str(message)[:80]}, expected messages with a text as role and as content")


def own_turns(row: dict, config: Config) -> list[dict]:
    """The messages of the row's prompt column, or its text as a user's turn; without the assistant's turns at the end,
    which are for the policy to write. Raises UsageError for what is no conversation.
    """
    value = row[config.prompt_column]
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    place = f"--prompt_column {config.prompt_column!r} in {place_of(row)}"
    check_messages(value, place)
    messages = list(value)
    while messages and is_assistants(messages[-1]):
        messages.pop()
    if not messages:
        raise UsageError(f"{place} holds no message to answer: {str(value)[:80]}")
    return messages


def with_system(messages: list[dict], config: Config) -> list[dict]:
    """The messages behind a system's turn with the text of --system, unless they have one of their own."""
    if not config.system or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": config.system}, *messages]


def conversation(row: dict, config: Config) -> list[dict]:
    """What the policy is asked: the row's `own_turns`, and the system's. Raises UsageError for what is no
    conversation.
    """
    return with_system(own_turns(row, config), config)


def readable(messages: list[dict]) -> str:
    """A conversation as a person reads it: a user's turn alone as it is, several turns as `role: content` in lines."""
    if len(messages) == 1 and messages[0]["role"] == "user":
        return messages[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def own_answer(row: dict, config: Config) -> str:
    """What the assistant answers to the row's `own_turns`, behind them. Raises UsageError where there is no answer."""
    value = row[config.prompt_column]
    n_asked = len(own_turns(row, config))
    if isinstance(value, str) or n_asked == len(value):
        raise UsageError(
            f"--prompt_column {config.prompt_column!r} in {place_of(row)} ends with no answer of the assistant's, "
            "to be learned; give such messages, or name the --completion_column"
        )
    return value[n_asked]["content"]


def is_whole(answer) -> bool:
    """Whether what stands in a column of answers is all of a conversation, rather than the assistant's part."""
    return isinstance(answer, list) and not (answer and isinstance(answer[0], dict) and is_assistants(answer[0]))


def answered(row: dict, answer: str | list[dict], config: Config) -> list[dict]:
    """The row's conversation and an answer: a text, the assistant's messages, or all of the conversation with them."""
    if is_whole(answer):
        return with_system(answer, config)
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    return [*conversation(row, config), *answer]


def without_whole_pairs(rows: Sequence[dict], config: Config) -> Sequence[dict]:
    """The rows but for those whose better and worse answer are both conversations with a prompt of their own: where
    there are such, of the first LOOKED_AT.
    """
    pair = (config.chosen_column, config.rejected_column)
    if not all(name in rows[0] for name in pair) or not suspects(rows, config.chosen_column):
        return rows
    return [row for row in rows[:LOOKED_AT] if not all(is_whole(row[name]) for name in pair)]


def check_answers(rows: Sequence[dict], name: str, flag: str, config: Config) -> None:
    """Raise UsageError unless the column holds answers: texts, or with conversations messages that end with one."""
    check_column(rows, name, flag, (str, list) if config.chat else str)
    for row in in_file_order(suspects(rows, name)[:LOOKED_AT]):
        if isinstance(row[name], list):
            place = f"--{flag} {name!r} in {place_of(row)}"
            check_messages(row[name], place)
            if not row[name] or not is_assistants(row[name][-1]):
                raise UsageError(f"{place} holds no answer of the assistant's at its end: {str(row[name])[-80:]}")


def chat_text(
    messages: list[dict], row: dict, tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool = True
) -> str:
    """The conversation by the tokenizer's template, up to where the assistant begins to write; or as it ends."""
    with one_sentence(f"the chat template of {tokenizer.name_or_path} refuses {place_of(row)}"):
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)


def end_of_answer(tokenizer: PreTrainedTokenizerBase, ends: list[int]) -> int:
    """The one of the `ends` of a response with which the template of chat ends an answer, or else the EOS."""
    messages = [{"role": role, "content": "a"} for role in ("user", "assistant")]
    (ids,) = bare_ids([chat_text(messages, {}, tokenizer, add_generation_prompt=False)], tokenizer)
    return next((token for token in reversed(ids) if token in ends), tokenizer.eos_token_id)


def drops_system(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether the template of chat writes nothing of a system's turn with this text."""
    user = {"role": "user", "content": "a"}
    one, other = (
        tokenizer.apply_chat_template([{"role": "system", "content": content}, user], tokenize=False)
        for content in (text, text + "a")
    )
    return one == other


def check_template(tokenizer: PreTrainedTokenizerBase, config: Config, row: dict) -> None:
    """Raise UsageError for a tokenizer that cannot write conversations, as that of this row is, or no --system."""
    if not tokenizer.chat_template:
        flag = "prompt_column" if config.prompt_column in row else "chosen_column"
        raise UsageError(
            f"the prompts are conversations (--{flag} {getattr(config, flag)!r}, {place_of(row)}), and the "
            f"tokenizer of {tokenizer.name_or_path} has no template for them; expected a model of chat, or texts"
        )
    check_system(tokenizer, config)


def check_system(tokenizer: PreTrainedTokenizerBase, config: Config) -> None:
    """Raise UsageError for a tokenizer whose template has no place for --system, where there is one."""
    problem = f"--system: the chat template of {tokenizer.name_or_path}"
    with one_sentence(f"{problem} refuses a system's turn"):
        if config.system and drops_system(tokenizer, config.system):
            raise UsageError(f"{problem} leaves a system's turn out without a word; give it as part of the user's")
