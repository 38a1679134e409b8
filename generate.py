"""How text is sampled: the loop written out.

The sampling contract: what `sample` draws from is exactly what `PolicyModel.score` computes. Temperature is applied in
both. Top-k, top-p, a minimum length and greedy choice change the distribution, so they are for `--task generate` alone
(ask.py): config.py refuses them in training.
"""

import copy
import math
import weakref
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch.nn.functional import pad as pad_columns
from torchtyping import TensorType, is_float
from transformers import PretrainedConfig, PreTrainedTokenizerBase, StaticCache, TopKLogitsWarper, TopPLogitsWarper
from transformers.cache_utils import Cache, EncoderDecoderCache

from config import BrokenPolicy, Config, UsageError
from dataset import decode_responses, pad
from model import PolicyModel, TokenOutputs, eval_mode, position_ids, score_in_passes
from ppo import response_mask


class Sample(NamedTuple):
    """Responses as wide as the longest one; mask is True up to and including the first EOS, whatever the pad id is."""

    response_ids: TensorType["batch", "time"]
    mask: TensorType["batch", "time", bool]
    logprobs: TensorType["batch", "time", is_float]  # of the distribution each token was drawn from, in nats


@torch.no_grad()
def sample(
    policy: PolicyModel,
    query_ids: TensorType["batch", "query"],
    query_mask: TensorType["batch", "query", bool],
    uniforms: TensorType["batch", "max_new_tokens"],
    eos_ids: list[int],
    pad_id: int,
    min_new_tokens: int = 0,
    static_cache: bool = False,
    on_tokens: Callable = lambda tokens: None,
    **options,
) -> Sample:
    """Sample one response a prompt with the options of `draw`; `pad_id` fills what follows one of the `eos_ids`.

    `uniforms` are the random numbers in [0, 1), one a token, and decide all: a row with the same prompt and numbers
    is the same up to rounding, whatever its neighbours are. Rows that have ended leave the batch, and its key/value
    cache, once they are more than half of it; with `static_cache` (for GPUs; a first reading can leave it out) none
    does, and all steps but the first have tensors of the same shapes. `on_tokens` is given each step's tokens.
    """
    max_new_tokens = uniforms.shape[1]
    ends = torch.tensor(eos_ids, device=query_ids.device)
    ids = torch.full(uniforms.shape, eos_ids[0], device=query_ids.device)  # a row that has left the batch stays ended
    logprobs = torch.zeros(uniforms.shape, device=query_ids.device, dtype=policy.precision)
    rows = torch.arange(len(query_ids), device=query_ids.device)  # those still computed
    ended = torch.zeros_like(query_mask[:, 0])
    with eval_mode(policy), policy.autocast():
        inputs = first_inputs(policy.language_model, query_ids, query_mask)
        read, read_on = policy.language_model, policy.language_model
        if static_cache:
            inputs["past_key_values"] = new_static_cache(read, query_ids.shape[1], max_new_tokens)
            read_on = replayed(read)
        for t in range(max_new_tokens):
            output = read(**inputs, use_cache=True)
            logits = policy.drawable(output.logits[:, -1].to(policy.precision))
            if t < min_new_tokens:
                logits[:, eos_ids] = float("-inf")
            ids[rows, t], logprobs[rows, t] = draw(logits, uniforms[rows, t], **options)
            on_tokens(ids[:, t])
            ended |= torch.isin(ids[:, t], ends)
            if ended.all():
                break
            width = room(query_ids.shape[1] + max_new_tokens) if static_cache else query_ids.shape[1] + t + 1
            inputs = next_inputs(inputs, ids[rows, t], output.past_key_values, width)
            read = read_on
            running = ~ended[rows]
            if not static_cache and running.sum() < len(rows) / 2:
                inputs = select_inputs(inputs, running)
                rows = rows[running]
    ids = ids[:, : t + 1]
    logprobs = logprobs[:, : t + 1]
    mask = response_mask(ids, ends)  # what a row draws after its end, while others go on, is no part of it
    return Sample(
        response_ids=torch.where(mask, ids, pad_id),
        mask=mask,
        logprobs=torch.where(mask, logprobs, 0.0),
    )


def first_inputs(language_model: torch.nn.Module, query_ids: torch.Tensor, query_mask: torch.Tensor) -> dict:
    """The arguments of the first forward pass: the whole prompt, or the encoded prompt and the start token."""
    attention_mask = query_mask.long()
    if language_model.config.is_encoder_decoder:
        encoded = language_model.get_encoder()(input_ids=query_ids, attention_mask=attention_mask)
        start = torch.full_like(query_ids[:, :1], language_model.config.decoder_start_token_id)
        return {"decoder_input_ids": start, "encoder_outputs": encoded, "attention_mask": attention_mask}
    positions = position_ids(query_mask)
    return {"input_ids": query_ids, "attention_mask": attention_mask, "position_ids": positions, "logits_to_keep": 1}


def next_inputs(inputs: dict, tokens: TensorType["batch"], cache, width: int) -> dict:
    """The arguments of the next forward pass: the token just drawn, and the cache of those before it.

    `width` is how many columns the attention mask then has: so many tokens as there are, or as a static cache has room
    for.
    """
    if "decoder_input_ids" in inputs:
        return inputs | {"decoder_input_ids": tokens[:, None], "past_key_values": cache}
    mask = inputs["attention_mask"]
    return inputs | {
        "input_ids": tokens[:, None],
        "attention_mask": pad_columns(mask, (0, width - mask.shape[1]), value=1),
        "position_ids": inputs["position_ids"][:, -1:] + 1,
        "past_key_values": cache,
    }


def new_static_cache(language_model: torch.nn.Module, query_width: int, max_new_tokens: int) -> Cache:
    """Room for the keys and values of all tokens that there will be, which a step writes to and never moves."""
    config = copy.copy(language_model.config.get_text_config(decoder=True))
    if not language_model.config.is_encoder_decoder:
        return roomy_cache(config, room(query_width + max_new_tokens))
    config.num_hidden_layers = getattr(config, "num_decoder_layers", config.num_hidden_layers)  # as T5 calls them
    return EncoderDecoderCache(*(roomy_cache(config, width) for width in (max_new_tokens, query_width)))


def roomy_cache(config: PretrainedConfig, width: int) -> StaticCache:
    """A static cache in which keys and values have types of their own: under autocast, rotary positions leave keys in
    float32 where values are in bfloat16.
    """
    cache = StaticCache(config, max_cache_len=width)
    for layer in cache.layers:
        layer.lazy_initialization = partial(make_room, weakref.ref(layer))  # or it would hold itself, and its tensors
    return cache


def make_room(own: weakref.ref, *keys_and_values: torch.Tensor, **others) -> None:
    """A layer's room, as the library makes it in the type of the keys, with that for the values in theirs; `others` are
    states of layers that have no attention.
    """
    layer = own()
    type(layer).lazy_initialization(layer, *keys_and_values, **others)
    if len({states.dtype for states in keys_and_values}) > 1:
        _, values = keys_and_values
        layer.values = layer.values.to(values.dtype)
        torch._dynamo.mark_static_address(layer.values)  # as the library does, or a graph would copy it


def room(n_tokens: int) -> int:
    """Columns of a static cache: a multiple of 64, as every other width has a GPU's graph compiled anew."""
    return math.ceil(n_tokens / 64) * 64


def replayed(language_model: torch.nn.Module) -> Callable:
    """The model's forward pass; on a GPU compiled, and captured as a graph, which is replayed in one launch."""
    if language_model.device.type != "cuda":
        return language_model
    return torch.compile(language_model.forward, mode="reduce-overhead", dynamic=False)


def select_inputs(inputs: dict, keep: TensorType["batch", bool]) -> dict:
    """Drop the rows that have ended from everything that the next forward pass reads, the cache included.

    By `reorder_cache`, which layers of every kind have: attention's, and those of convolutions and state spaces.
    """
    inputs["past_key_values"].reorder_cache(keep.nonzero()[:, 0])
    kept = {name: value[keep] for name, value in inputs.items() if torch.is_tensor(value)}
    if "encoder_outputs" in inputs:
        encoded = inputs["encoder_outputs"]
        kept["encoder_outputs"] = type(encoded)(last_hidden_state=encoded.last_hidden_state[keep])
    return inputs | kept


def draw(
    logits: TensorType["batch", "vocab", is_float],
    uniforms: TensorType["batch", is_float],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> tuple[TensorType["batch"], TensorType["batch", is_float]]:
    """Draw a token a row, and its log-probability: the first token whose cumulative probability exceeds u in [0, 1).

    At temperature 0 it is the likeliest, with probability 1. Else among the top_k likeliest (0: all), and among these
    the fewest whose probabilities reach top_p.
    """
    if temperature == 0:
        highest, tokens = logits.max(-1)
        return tokens, 0 * highest  # NaN where the logits are
    if temperature != 1:
        logits = logits / temperature
    if top_k:
        logits = TopKLogitsWarper(top_k)(None, logits)
    if top_p < 1:
        logits = TopPLogitsWarper(top_p)(None, logits)
    probabilities = logits.softmax(-1)
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)  # float32 would round away tokens rarer than 1e-7
    thresholds = (uniforms * cumulative[:, -1])[:, None]
    tokens = torch.searchsorted(cumulative, thresholds, right=True).clamp(max=logits.shape[-1] - 1)
    return tokens[:, 0], probabilities.gather(-1, tokens)[:, 0].log()


class Responses(NamedTuple):
    """What was asked, what was drawn (a `Sample`'s fields), and that as text."""

    query_ids: TensorType["batch", "query"]
    query_mask: TensorType["batch", "query", bool]
    response_ids: TensorType["batch", "time"]
    mask: TensorType["batch", "time", bool]
    logprobs: TensorType["batch", "time", is_float]
    has_eos: TensorType["batch", bool]
    texts: list[str]


def end_ids(language_model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a response: the tokenizer's EOS, and those that the model's generation settings name.

    Models of chat end a turn with one token and a text with another, and have a list of both there.
    """
    named = language_model.generation_config.eos_token_id
    ends = named if isinstance(named, list) else [named]
    if not all(end is None or isinstance(end, int) for end in ends):
        raise UsageError(f"generation_config.json: eos_token_id is {named!r}, expected a number or a list of numbers")
    n_embedded = language_model.config.get_text_config().vocab_size
    own = {end for end in ends if end is not None and 0 <= end < n_embedded}
    return sorted(own | {tokenizer.eos_token_id})


def respond(
    policy: PolicyModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    uniforms: TensorType["batch", "max_new_tokens"],
    config: Config,
    on_tokens: Callable = lambda tokens: None,
) -> Responses:
    """Sample a response to each prompt, given as ids, by its row of `uniforms` and the config's sampling settings."""
    device = policy.language_model.device
    query_ids, query_mask = pad(prompts, tokenizer.pad_token_id, "right" if policy.is_encoder_decoder else "left")
    query_ids, query_mask = query_ids.to(device), query_mask.to(device)
    eos_ids = end_ids(policy.language_model, tokenizer)
    sampled = sample(
        policy,
        query_ids=query_ids,
        query_mask=query_mask,
        uniforms=uniforms.to(device),
        eos_ids=eos_ids,
        pad_id=tokenizer.pad_token_id,
        on_tokens=on_tokens,
        **sampling_options(config),
    )
    if not sampled.logprobs.isfinite().all():
        raise BrokenPolicy(not_finite(policy))
    texts = decode_responses(
        tokenizer,
        query_ids=query_ids,
        query_mask=query_mask,
        response_ids=sampled.response_ids,
        mask=sampled.mask,
        is_encoder_decoder=policy.is_encoder_decoder,
    )
    return Responses(
        query_ids=query_ids,
        query_mask=query_mask,
        response_ids=sampled.response_ids,
        mask=sampled.mask,
        logprobs=sampled.logprobs,
        # were the pad an EOS: pads stand behind an EOS only, so a row that was cut has none
        has_eos=torch.isin(sampled.response_ids, torch.tensor(eos_ids, device=device)).any(1),
        texts=texts,
    )


def not_finite(policy: PolicyModel) -> str:
    """What is told when a model's probabilities are no numbers: which of its weights is none, if one is."""
    for name, weight in policy.language_model.named_parameters():
        if not weight.isfinite().all():
            return f"the model's probabilities are no numbers, as its weight {name} holds NaN or infinity"
    return (
        "the model's probabilities are no numbers: its logits overflow; try a higher --temperature or another --dtype"
    )


def score_responses(
    policy: PolicyModel, responses: Responses, config: Config, with_entropy: bool = False
) -> TokenOutputs:
    """What a policy, be it the one that drew them or another, makes of the responses: `score_in_passes`."""
    return score_in_passes(
        policy,
        query_ids=responses.query_ids,
        query_mask=responses.query_mask,
        response_ids=responses.response_ids,
        response_mask=responses.mask,
        mini_batch_size=config.mini_batch_size,
        temperature=config.temperature,
        with_entropy=with_entropy,
    )


def sampling_options(config: Config) -> dict[str, float | int]:
    """The config's settings that `sample` and `draw` know by the same names."""
    names = ("temperature", "top_k", "top_p", "min_new_tokens", "static_cache")
    return {name: getattr(config, name) for name in names}
