"""How text is sampled: the loop written out, and the `generate` task.

The sampling contract: what `sample` draws from is exactly what `PolicyModel.score` computes. Temperature is applied in
both. Top-k, top-p, a minimum length and greedy choice change the distribution, so they are for `--task generate` alone:
training samples with none of them.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torchtyping import TensorType, is_float
from transformers import PreTrainedTokenizerBase

from checkpoint import check_writable, write_whole
from config import Config, UsageError
from dataset import decode_responses, given_prompts, pad
from loading import check_context, load_policy, load_tokenizer, pick_device
from model import PolicyModel, first_inputs, next_inputs, select_inputs
from ppo import response_mask
from reward import load_reward_terms, total_reward


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
    steps = list(sample_tokens(policy, query_ids, query_mask, max_new_tokens, eos_id, **options))
    ids, logprobs = (torch.stack(column, dim=1) for column in zip(*steps, strict=True))
    mask = response_mask(ids, eos_id)
    return Sample(torch.where(mask, ids, pad_id), mask, logprobs)


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
        with eval_mode(policy), policy.autocast():
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
def eval_mode(policy: PolicyModel):
    """Eval mode for a while: in train mode, activation checkpointing would silently drop the key/value cache."""
    was_training = policy.training
    policy.eval()
    try:
        yield
    finally:
        policy.train(was_training)


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


class Responses(NamedTuple):
    """A batch of prompts with the responses drawn for them, as tensors and as text."""

    query_ids: TensorType["batch", "query"]
    query_mask: TensorType["batch", "query", bool]
    sampled: Sample
    texts: list[str]


def respond(
    policy: PolicyModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    config: Config,
    generator: torch.Generator,
) -> Responses:
    """Sample a response to each prompt, given as ids, with the config's sampling settings."""
    query = encode(prompts, tokenizer, policy)
    ends = tokenizer.eos_token_id, tokenizer.pad_token_id
    sampled = sample(policy, *query, config.max_new_tokens, *ends, generator=generator, **sampling_options(config))
    return Responses(*query, sampled, decode_responses(tokenizer, *query, *sampled[:2], policy.is_encoder_decoder))


def encode(prompts: list[list[int]], tokenizer: PreTrainedTokenizerBase, policy: PolicyModel) -> list[torch.Tensor]:
    """Ids and mask on the policy's device, padded on the side that its family wants."""
    padded = pad(prompts, tokenizer.pad_token_id, "right" if policy.is_encoder_decoder else "left")
    return [tensor.to(policy.language_model.device) for tensor in padded]


def sampling_options(config: Config) -> dict:
    return {name: getattr(config, name) for name in ("temperature", "top_k", "top_p", "min_new_tokens")}


def generate(config: Config, reward_model_path: str) -> None:
    """The `generate` task: respond to --prompt, --prompts FILE, or what is typed, and print or write the responses."""
    prompts = given_prompts(config)
    if config.output:
        if not Path(config.output).parent.is_dir():
            raise UsageError(f"--output {config.output} is in a folder that does not exist")
        check_writable(Path(config.output).parent)
    device = pick_device(config.device)
    tokenizer = load_tokenizer(config.output_dir, "output_dir")
    policy = load_policy(config, config.output_dir, device).eval()
    check_context(config, policy)
    generator = torch.Generator().manual_seed(config.seed)
    if not prompts:
        return converse(policy, tokenizer, config, generator)
    if len(prompts) == config.num_samples == 1 and sys.stdout.isatty() and not config.output:
        return stream(policy, tokenizer, prompts[0], config, generator)
    terms = load_reward_terms(config, reward_model_path, device, policy.separator) if config.output else {}
    lines = []
    prompts = [prompt for prompt in prompts for _ in range(config.num_samples)]
    for start in range(0, len(prompts), config.batch_size):
        batch = prompts[start : start + config.batch_size]
        ids = [row[-config.max_prompt_length :] for row in tokenizer(batch).input_ids]
        texts = [before_stop(text, config.stop) for text in respond(policy, tokenizer, ids, config, generator).texts]
        if config.output:
            rows = [{config.prompt_column: prompt} for prompt in batch]
            rewards = total_reward(terms, batch, texts, rows, config)[0].tolist()
            lines += map(json_line, batch, texts, rewards)
        else:
            print(*map(policy.separator.join, zip(batch, texts, strict=True)), sep="\n")
    if config.output:
        write_whole(Path(config.output), "".join(lines))
        print(f"{len(lines)} responses: {config.output}")


def before_stop(text: str, stop: tuple[str, ...]) -> str:
    """The text up to where the first of the stop strings begins; all of it where there is none."""
    return text[: min((text.index(word) for word in stop if word in text), default=len(text))]


def settled(text: str, stop: tuple[str, ...]) -> str:
    """The text without an end that is part of a letter, or may be the beginning of a stop string."""
    text = text.rstrip("\ufffd")
    begun = (n for word in stop for n in range(1, len(word)) if text.endswith(word[:n]))
    return text[: len(text) - max(begun, default=0)]


def json_line(prompt: str, response: str, reward: float) -> str:
    return json.dumps({"prompt": prompt, "response": response, "reward": reward}, ensure_ascii=False) + "\n"


def converse(policy: PolicyModel, tokenizer, config: Config, generator: torch.Generator) -> None:
    """Ask for prompts on the terminal, and respond to each, until the input ends."""
    print("type the beginning of a text; end with Ctrl-D")
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            return print()
        for _ in range(config.num_samples if prompt.strip() else 0):
            stream(policy, tokenizer, prompt, config, generator)


def stream(policy: PolicyModel, tokenizer, prompt: str, config: Config, generator: torch.Generator) -> None:
    """Print the prompt, then its response as it is drawn, up to a stop string.

    Decoded anew each time, as a letter may take two tokens; an end that further tokens may change waits for them.
    """
    query = encode([tokenizer(prompt).input_ids[-config.max_prompt_length :]], tokenizer, policy)
    print(prompt, end=policy.separator, flush=True)
    drawn, shown, options = query[0][:, :0], "", sampling_options(config)
    end = tokenizer.eos_token_id
    for tokens, _ in sample_tokens(policy, *query, config.max_new_tokens, end, generator=generator, **options):
        drawn = torch.cat([drawn, tokens[:, None]], dim=1)
        real = torch.ones_like(drawn, dtype=torch.bool)
        text = decode_responses(tokenizer, *query, drawn, real, policy.is_encoder_decoder)[0]
        response = before_stop(text, config.stop)
        ready = min(response, settled(text, config.stop), key=len)
        print(ready[len(shown) :], end="", flush=True)
        shown = ready
        if shown == response != text:
            break
    print(response[len(shown) :])
