"""How text is sampled: the loop written out, and the `generate` task.

The sampling contract: what `sample` draws from is exactly what `PolicyModel.score` computes. Temperature is applied in
both. Top-k, top-p, a minimum length and greedy choice change the distribution, so they are for `--task generate` alone:
training samples with none of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torchtyping import TensorType, is_float
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from model import PolicyModel, position_ids


class Sample(NamedTuple):
    """Responses as wide as the longest one; mask is True up to and including the first EOS, whatever the pad id is."""

    response_ids: TensorType["batch", "time"]
    mask: TensorType["batch", "time", bool]
    logprobs: TensorType["batch", "time", is_float]  # of the distribution each token was drawn from, in nats


def sample(
    policy: PolicyModel,
    query_ids: TensorType["batch", "query"],
    query_mask: TensorType["batch", "query", bool],
    max_new_tokens: int,
    eos_id: int,
    pad_id: int,
    **options,
) -> Sample:
    """Sample one response a prompt, with the options of `sample_tokens`; `pad_id` fills what follows an EOS."""
    ids, mask, logprobs = [], [], []
    alive = torch.ones_like(query_mask[:, 0])
    for tokens, token_logprobs in sample_tokens(policy, query_ids, query_mask, max_new_tokens, eos_id, **options):
        ids.append(torch.where(alive, tokens, pad_id))
        mask.append(alive)
        logprobs.append(token_logprobs)
        alive = alive & (tokens != eos_id)
    return Sample(torch.stack(ids, dim=1), torch.stack(mask, dim=1), torch.stack(logprobs, dim=1))


@torch.no_grad()
def sample_tokens(
    policy: PolicyModel,
    query_ids: TensorType["batch", "query"],
    query_mask: TensorType["batch", "query", bool],
    max_new_tokens: int,
    eos_id: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_new_tokens: int = 0,
    generator: torch.Generator | None = None,
) -> Iterator[tuple[TensorType["batch"], TensorType["batch", is_float]]]:
    """Yield a token a row, and its log-probability, step by step until all rows drew EOS or max_new_tokens are out.

    Each row draws with its own random numbers, so it does not change with its neighbours. Rows that have ended leave
    the batch, and its key/value cache, once they are more than half of it; from then on they yield EOS.
    """
    uniforms = torch.rand(len(query_ids), max_new_tokens, generator=generator, dtype=torch.float64).to(query_ids.device)
    rows = torch.arange(len(query_ids), device=query_ids.device)  # those still computed
    ended = torch.zeros_like(query_mask[:, 0])
    inputs = first_inputs(policy.language_model, query_ids, query_mask)
    for t in range(max_new_tokens):
        with eval_mode(policy):
            output = policy.language_model(**inputs, use_cache=True)
        logits = output.logits[:, -1].float()
        if t < min_new_tokens:
            logits[:, eos_id] = float("-inf")
        drawn, drawn_logprobs = draw(logits, uniforms[rows, t], temperature, top_k, top_p)
        tokens, logprobs = torch.full_like(query_ids[:, 0], eos_id), torch.zeros(len(ended), device=ended.device)
        tokens[rows] = torch.where(ended[rows], eos_id, drawn)
        logprobs[rows] = torch.where(ended[rows], 0.0, drawn_logprobs)
        yield tokens, logprobs
        ended |= tokens == eos_id
        if ended.all():
            return
        inputs = next_inputs(inputs, drawn, output.past_key_values)
        running = ~ended[rows]
        if running.sum() < len(rows) / 2:
            inputs, rows = select_inputs(inputs, running), rows[running]


@contextmanager
def eval_mode(policy: PolicyModel) -> Iterator[None]:
    """Eval mode for a while: in train mode, activation checkpointing would silently drop the key/value cache."""
    was_training = policy.training
    policy.eval()
    try:
        yield
    finally:
        policy.train(was_training)


def first_inputs(language_model: PreTrainedModel, query_ids: torch.Tensor, query_mask: torch.Tensor) -> dict:
    """The arguments of the first forward pass: the whole prompt, or the encoded prompt and the start token."""
    attention_mask = query_mask.long()
    if language_model.config.is_encoder_decoder:
        encoded = language_model.get_encoder()(input_ids=query_ids, attention_mask=attention_mask)
        start = torch.full_like(query_ids[:, :1], language_model.config.decoder_start_token_id)
        return {"decoder_input_ids": start, "encoder_outputs": encoded, "attention_mask": attention_mask}
    positions = position_ids(query_mask)
    return {"input_ids": query_ids, "attention_mask": attention_mask, "position_ids": positions, "logits_to_keep": 1}


def next_inputs(inputs: dict, tokens: TensorType["batch"], cache) -> dict:
    """The arguments of the next forward pass: the token just drawn, behind what the cache remembers."""
    if "decoder_input_ids" in inputs:
        return inputs | {"decoder_input_ids": tokens[:, None], "past_key_values": cache}
    mask = inputs["attention_mask"]
    return inputs | {
        "input_ids": tokens[:, None],
        "attention_mask": torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1),
        "position_ids": inputs["position_ids"][:, -1:] + 1,
        "past_key_values": cache,
    }


def select_inputs(inputs: dict, keep: TensorType["batch", bool]) -> dict:
    """Drop the rows that have ended from everything that the next forward pass reads, the cache included."""
    inputs["past_key_values"].batch_select_indices(keep.nonzero()[:, 0])
    kept = {name: value[keep] for name, value in inputs.items() if torch.is_tensor(value)}
    if "encoder_outputs" in inputs:
        encoded = inputs["encoder_outputs"]
        kept["encoder_outputs"] = type(encoded)(last_hidden_state=encoded.last_hidden_state[keep])
    return inputs | kept


def truncate_logits(
    logits: TensorType["batch", "vocab", is_float], top_k: int, top_p: float
) -> TensorType["batch", "vocab", is_float]:
    """Keep the top_k likeliest tokens (0: all), then the fewest of them whose probabilities reach top_p (1: all)."""
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # probability of all likelier tokens
        logits = logits.masked_fill((before >= top_p).gather(-1, order.argsort(-1)), float("-inf"))
    return logits


def draw(
    logits: TensorType["batch", "vocab", is_float],
    uniforms: TensorType["batch", is_float],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> tuple[TensorType["batch"], TensorType["batch", is_float]]:
    """Draw a token a row, and its log-probability, by inverting the cumulative distribution at u in [0, 1).

    The token is the first whose cumulative probability exceeds u. At temperature 0 it is the likeliest, surely.
    """
    if temperature == 0:
        return logits.argmax(-1), torch.zeros_like(logits[:, 0])
    # float32 would round away tokens rarer than 1e-7
    probabilities = truncate_logits(logits / temperature, top_k, top_p).double().softmax(-1)
    cumulative = probabilities.cumsum(-1)
    thresholds = (uniforms * cumulative[:, -1])[:, None]
    tokens = torch.searchsorted(cumulative, thresholds, right=True).clamp(max=logits.shape[-1] - 1)
    return tokens[:, 0], probabilities.gather(-1, tokens)[:, 0].log().float()


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
