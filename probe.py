"""What a tokenizer and a model do, seen on a few tokens: names and settings do not always tell.

Which special tokens stand around a text, how a model counts positions, whether its cache lasts, how much it can read.
"""

import inspect
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from config import UsageError


def special_ends(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and behind a text, seen on the first text that has a token."""

    def words() -> Iterator[str]:
        yield from ("a", *map(str, range(10)))
        yield from tokenizer.get_vocab()  # a second's work for a large one, and hardly ever needed

    for word in words():
        bare = tokenizer(word, add_special_tokens=False).input_ids
        whole = tokenizer(word, add_special_tokens=True).input_ids
        starts = [i for i in range(len(whole)) if bare and whole[i : i + len(bare)] == bare]
        if starts:
            return whole[: starts[0]], whole[starts[0] + len(bare) :]
    raise UsageError(f"the tokenizer of {getattr(tokenizer, 'name_or_path', 'the model')} has no token for any text")


class Readings(NamedTuple):
    """Logits of four tokens in two rows: of all, the same with positions from 0, and the last of the second row."""

    whole: torch.Tensor
    counted: torch.Tensor
    last: torch.Tensor


@torch.no_grad()
def read_in_three_ways(language_model: PreTrainedModel) -> Readings | None:
    """At once, at once with positions counted from 0, and in two steps with a cache that the first row has left in
    between; None where there is no cache. An encoder-decoder's positions are its own affair.
    """
    if "past_key_values" not in inspect.signature(language_model.forward).parameters:
        return None
    config = language_model.config
    words = [i for i in range(5) if i != config.get_text_config().pad_token_id][:4]
    ids = torch.tensor([words, words[::-1]], device=language_model.device)
    mask = torch.ones_like(ids)

    def read(ids: torch.Tensor, rows: slice, **others):
        if not config.is_encoder_decoder:
            return language_model(input_ids=ids, **others)
        encoded = type(prompt)(last_hidden_state=prompt.last_hidden_state[rows])
        others["attention_mask"] = mask[rows]
        return language_model(decoder_input_ids=ids, encoder_outputs=encoded, **others)

    if config.is_encoder_decoder:
        prompt = language_model.get_encoder()(input_ids=ids, attention_mask=mask)
    every, second = slice(None), slice(1, None)
    positions = {} if config.is_encoder_decoder else {"position_ids": torch.arange(4, device=ids.device).expand(2, 4)}
    whole = read(ids, every, attention_mask=mask, use_cache=False).logits
    counted = read(ids, every, attention_mask=mask, use_cache=False, **positions).logits
    cache = read(ids[:, :3], every, attention_mask=mask[:, :3], use_cache=True).get("past_key_values")
    if cache is None:
        return None
    cache.reorder_cache(torch.tensor([1], device=ids.device))
    last = read(ids[1:, 3:], second, attention_mask=mask[1:], past_key_values=cache, use_cache=True).logits
    return Readings(whole=whole, counted=counted, last=last)


def is_exact(language_model: PreTrainedModel) -> bool:
    """Whether it computes in float32, on weights of as many bits."""
    return language_model.dtype == torch.float32 and not hasattr(language_model.config, "quantization_config")


@torch.no_grad()
def undrawable_ids(language_model: PreTrainedModel) -> list[int]:
    """The pad token, if an encoder-decoder numbers the tokens behind one in its own text otherwise with a cache than
    without, as M2M100 does: sampling and scoring would differ there, by less than coarse numbers do.
    """
    config = language_model.config
    if not config.is_encoder_decoder or not is_exact(language_model):
        return []
    pad_id, start_id = config.pad_token_id, config.decoder_start_token_id
    if pad_id is None or start_id is None:
        return []
    ids = torch.tensor([[start_id, pad_id, 1 if pad_id != 1 else 2]], device=language_model.device)
    encoded = language_model.get_encoder()(input_ids=ids[:, -1:])
    whole = language_model(decoder_input_ids=ids, encoder_outputs=encoded, use_cache=False).logits
    cache = language_model(decoder_input_ids=ids[:, :2], encoder_outputs=encoded, use_cache=True).past_key_values
    last = language_model(decoder_input_ids=ids[:, 2:], encoder_outputs=encoded, past_key_values=cache).logits
    return [pad_id] if difference(whole[:, -1:], last) > 0.001 else []


def difference(logits: torch.Tensor, others: torch.Tensor, reduce=torch.max) -> float:
    """Between log-probabilities of every token there is, the largest or another of them, in nats; infinite for NaN."""
    lowest = torch.finfo(torch.float32).min / 2  # for logits of -inf, which are alike
    logprobs, other_logprobs = (one.float().clamp(min=lowest).log_softmax(-1) for one in (logits, others))
    gap = reduce((logprobs - other_logprobs).abs()).item()
    return math.inf if math.isnan(gap) else gap


POSITION_LIMITS = (  # the names that configurations have for it
    "n_positions",
    "max_position_embeddings",
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
    "n_ctx",
    "max_target_positions",
)


def context_length(model: torch.nn.Module, config: PretrainedConfig | None = None) -> int:
    """The most tokens that a model, or an encoder or decoder, can read at once, as its configuration and the tables of
    its positions say; 10⁹ for T5 and its kin, whose relative positions have no limit.

    Some tables begin behind the padding's index (RoBERTa, MPNet, Longformer), so that not all of their rows serve.
    `config` is for a part that has none of its own.
    """
    config = getattr(model, "config", config)
    if hasattr(model, "get_decoder") and not config.is_encoder_decoder:
        decoder = model.get_decoder()  # of a model that sees as well, what reads text
        model = decoder if hasattr(decoder, "config") else model
        config = model.config
    config = config.get_text_config()
    limits = [10**9]
    for name, module in model.named_modules():
        own_name = name.rpartition(".")[2]
        table = getattr(module, "weight", None) if hasattr(module, "padding_idx") else None
        if table is not None and ("position" in own_name or own_name == "wpe") and "relative" not in own_name:
            n_unused = 0 if module.padding_idx is None else module.padding_idx + 1
            limits.append(len(table) - n_unused)
    has_relative_positions = hasattr(config, "relative_attention_num_buckets")
    if not has_relative_positions:
        limits += [getattr(config, name, None) or 0 for name in POSITION_LIMITS]
    return min(limit for limit in limits if isinstance(limit, int) and limit > 0)
