"""From texts to ids: special tokens once each, the first words of a text, its last tokens."""

import math

from transformers import PreTrainedTokenizerBase

from config import UsageError
from hub import one_sentence
from probe import special_ends

AT_ONCE = 1000  # texts for a tokenizer: what it says of each token, beside its id, takes a hundred times the room


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
    """The `whole_words` of each text. Raises UsageError for a tokenizer that cannot say where its tokens stand."""
    if not tokenizer.is_fast:
        raise UsageError(
            f"--prompt_tokens {n_tokens} needs a tokenizer that knows where in the text its tokens stand, "
            f"which that of {tokenizer.name_or_path} does not; give prompts of the length wanted"
        )
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    return [whole_words(text, offsets, n_tokens) for text, offsets in zip(texts, encoded.offset_mapping, strict=True)]


def bare_ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The texts' ids without special tokens at their ends. Raises UsageError for one that the model does not embed."""
    encoded = []
    with one_sentence("a text has characters that the tokenizer does not take"):
        for start in range(0, len(texts), AT_ONCE):
            encoded += tokenizer(texts[start : start + AT_ONCE], add_special_tokens=False).input_ids
    n_embedded = getattr(tokenizer, "n_embedded", math.inf)
    for text, ids in zip(texts, encoded, strict=True):
        if max(ids, default=0) >= n_embedded:
            token = tokenizer.convert_ids_to_tokens(max(ids))
            raise UsageError(f"the text {text[:80]!r} holds the special token {token}, which the model does not embed")
    return encoded


def with_ends(bare: list[list[int]], tokenizer: PreTrainedTokenizerBase, length: int | None = None) -> list[list[int]]:
    """Texts' bare ids between the special tokens of the tokenizer's, once each: a template of chat may bring the first.

    Of a text that would be longer than `length`, the last tokens, between the same ends.
    """
    before, behind = special_ends(tokenizer)
    room = max(1, length - len(before) - len(behind)) if length else None
    encoded = []
    for ids in bare:
        body = ids[len(before) :] if ids[: len(before)] == before else ids
        encoded.append(before + (body if room is None else body[-room:]) + behind)
    return encoded


def text_ids(texts: list[str], tokenizer: PreTrainedTokenizerBase, length: int | None = None) -> list[list[int]]:
    """The texts' ids `with_ends`."""
    return with_ends(bare_ids(texts, tokenizer), tokenizer, length)


def template_ids(texts: list[str], tokenizer: PreTrainedTokenizerBase, length: int | None = None) -> list[list[int]]:
    """The ids of texts that a template of chat has written, special tokens and all.

    Of a text that would be longer than `length`, the last tokens, behind the first special token if it has that.
    """
    before, _ = special_ends(tokenizer)
    encoded = []
    for ids in bare_ids(texts, tokenizer):
        if length and len(ids) > length:
            start = before if ids[: len(before)] == before else []
            ids = start + ids[-max(1, length - len(start)) :]
        encoded.append(ids)
    return encoded


def last_tokens(text: str, count: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """The end of a text that has so many tokens, in the text's own characters where the tokenizer can tell."""
    if not tokenizer.is_fast:
        return tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids[-count:])
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    start, _ = offsets[-count]
    return text[start:]
